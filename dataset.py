"""Eye pairs, photographs and knees as torch data sets; `load` for training, `load_part` for all else.

data = dataset.load(args)                 # args as train.py has them
images, target = data.train.dataset()[0]  # eye pairs: (2, 3, S, S) in 0..1, and 0/1 per label"""

import functools
import subprocess
import sys
from collections import ChainMap
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import tables
from augment import draw
from cache import digest
from checkpoint import load_file
from decode import Pictures
from engine import local_rank, together
from errors import InputError, reading
from split import add_pseudo_labels, drop_missing, set_aside, split, split_patients  # noqa: F401 - for others
from tables import DATASETS, PLANES, targets_of


class RowSet(torch.utils.data.Dataset):
    """A data set whose `__getitems__([(index, repeat), ...])` gives a whole batch as a dict of tensors.
    `repeat` counts how often the row came before in the epoch: each time it gets another random view.
    `view`: which random views (a number), None for none. A subclass gives `inputs(keys)`."""

    on_device = False  # whether batches come from a GPU's memory
    per_row = 0  # pictures of a row that get random views of their own

    def __init__(self, targets, seed=0, view=None):
        self.targets, self.seed, self.view = torch.as_tensor(targets), seed, view

    def __len__(self):
        return len(self.targets)

    def __getitems__(self, indices):
        keys = [index if isinstance(index, tuple) else (int(index), 0) for index in indices]
        batch = {**self.inputs(keys), "targets": self.targets[[row for row, _ in keys]]}
        if self.view is not None and keys:
            batch["uniforms"] = draw(self.seed, self.view, keys, self.per_row)
        return batch


class PictureSet(RowSet):
    """Eye pairs or photographs: batches {"images": uint8 (B, P, S, S, 3), "targets", "uniforms"}.
    An integer index gives (images float32 (P, 3, S, S) in 0..1, target)."""

    def __init__(self, pictures, targets, seed=0, view=None, device=None):
        super().__init__(targets, seed, view)
        self.pictures, self.per_row = pictures, pictures.rows.shape[1]
        self.on_device = device is not None and pictures.on(device) is not None
        if self.on_device:
            self.targets = self.targets.to(device)

    def inputs(self, keys):
        places = self.pictures.rows[[row for row, _ in keys]]
        if self.on_device:
            return {"images": self.pictures.resident[torch.from_numpy(places).to(self.targets.device)]}
        return {"images": torch.from_numpy(self.pictures.array()[places])}

    def __getitem__(self, index):
        batch = self.__getitems__([index])
        return batch["images"][0].permute(0, 3, 1, 2) / 255, batch["targets"][0]


class FeatureSet(RowSet):
    """Kept features (n, D), of the rows or of these `keys`: batches {"features": (B, D), "targets"}."""

    def __init__(self, features, targets, keys=None):
        super().__init__(torch.as_tensor(targets).to(features.device))
        self.features, self.place = features, keys and {key: number for number, key in enumerate(keys)}
        self.on_device = features.device.type != "cpu"

    def inputs(self, keys):
        numbers = [self.place[key] for key in keys] if self.place else [row for row, _ in keys]
        index = torch.tensor(numbers, dtype=torch.long, device=self.features.device)
        return {"features": self.features[index]}


class VolumeSet(RowSet):
    """Knees: batches {"volumes": three uint8 (sum of slices, S, S), "lengths": of exams, "targets"}, by index
    ([volumes], target). `how`: "crop" cuts the centre S x S (published: 224), "none" scales to it."""

    def __init__(self, files, targets, size, how="crop", seed=0, view=None):
        super().__init__(targets, seed, view)
        self.files, self.size, self.how = list(files), size, how

    def read(self, file):
        volume = torch.from_numpy(read_volume(file))
        if self.how == "crop":
            low = (256 - self.size) // 2
            return volume[:, low : low + self.size, low : low + self.size]
        scaled = F.interpolate(volume[None].float(), (self.size, self.size), mode="bilinear", antialias=True)
        return scaled[0].round().clamp(0, 255).to(torch.uint8)

    def inputs(self, keys):
        empty = torch.zeros((0, self.size, self.size), dtype=torch.uint8)  # a rank may have no exam
        batch = {"volumes": [], "lengths": []}
        for plane in range(len(PLANES)):
            exams = [self.read(self.files[row][plane]) for row, _ in keys]
            batch["volumes"].append(torch.cat([empty, *exams]))
            batch["lengths"].append([len(exam) for exam in exams])
        return batch

    def __getitem__(self, index):
        batch = self.__getitems__([index])
        return batch["volumes"], batch["targets"][0]


def read_volume(file):
    """One plane of an exam, mapped from disk: uint8 (slices, 256, 256). Never unpickles anything."""
    with reading(file, "a plain .npy array"):
        volume = np.lib.format.open_memmap(file, "c")
    if volume.dtype != np.uint8 or volume.shape[1:] != (256, 256) or not len(volume):
        raise InputError(f"{file}: {volume.dtype} {volume.shape}; expected uint8 (slices, 256, 256)")
    if volume.offset + volume.nbytes != Path(file).stat().st_size:
        raise InputError(f"{file}: the header claims {len(volume)} slices, but the file's length is another")
    return volume


def volume_fault(file):
    """Why a volume cannot be used; an empty string when it can."""
    try:
        read_volume(file)
    except InputError as error:
        return str(error)
    return ""


@dataclass
class Part:
    """What is trained or evaluated on."""

    table: pd.DataFrame  # ID, patient, files ...: a row per patient, photograph or exam
    pictures: Pictures | None  # None for knees, whose volumes are read as they are needed
    targets: np.ndarray  # float32 (n, L) 0/1, or int64 (n,) class numbers
    expected: int = 0  # rows that the part should have
    size: int = 224
    how: str = "fov"

    def __len__(self):
        return len(self.table)

    def ids(self):
        return [str(i) for i in self.table["ID"]]

    def patients(self):
        return self.table["patient"].to_numpy()

    @functools.cached_property
    def contents(self):
        """Of each row, for each file: [digest of its bytes, of its pixels]; of a plane [of all slices]."""
        if self.pictures is None:  # gigabytes of knees: read once
            return [[[digest(read_volume(file))] for file in files] for files in self.table["files"]]
        return [[self.pictures.contents[place] for place in places] for places in self.pictures.rows]

    def rows(self):
        """{ID: (target as text, digest of its files' bytes)}: what each row is, for comparisons."""
        rows = {}
        for name, target, files in zip(self.ids(), self.targets.tolist(), self.contents, strict=True):
            rows[name] = str(target), digest([first for first, *_ in files])
        return rows

    def subset(self, rows):
        """The part with these rows (numbers) alone."""
        pictures = self.pictures and self.pictures.chosen(self.pictures.rows[rows])
        return replace(self, table=self.table.iloc[rows], pictures=pictures, targets=self.targets[rows])

    def dataset(self, seed=0, view=None, device=None):
        """As a torch data set. `view`: which random views, a number; `device`: where its pictures may lie."""
        if self.pictures is None:
            return VolumeSet(self.table["files"], self.targets, self.size, self.how, seed, view)
        return PictureSet(self.pictures, self.targets, seed, view, device)

    def shown(self, row):
        """Pictures of a row, uint8 (S, S, 3): both eyes, one photograph, or each plane's middle slice."""
        if self.pictures is not None:
            return list(self.pictures.array()[self.pictures.rows[row]])
        volumes = [read_volume(file) for file in self.table["files"].iloc[row]]
        return [np.repeat(volume[len(volume) // 2][:, :, None], 3, 2) for volume in volumes]


@dataclass
class Data:
    """What a run trains and validates on, and what is known of all its parts."""

    train: Part
    val: Part
    labels: list
    task: str  # multilabel, multiclass
    family: str  # of its scores
    ordered: bool  # whether the classes are grades
    facts: dict  # for run.json
    rows: dict  # name of every part, opened or not -> {ID: (target, digest of its pictures or "")}
    seen: set  # digests of what the network saw in training
    calibration: Part | None = None  # of --calibration-fraction

    def prior(self):
        """Share of the training rows that carry each label."""
        targets = self.train.targets
        carried = targets if self.task == "multilabel" else np.eye(len(self.labels))[targets]
        return carried.mean(0).tolist()


def eval_size(args):
    """Pixels a side that evaluation sees."""
    return args.crop or args.size


def decode_files(files, args, size):
    """The Pictures of rows of files: one process of a machine decodes, the others find the result."""
    asked = list(files), args.preprocess, size, args.cache, args.workers
    with together():
        if local_rank() == 0:
            Pictures(*asked)
    return Pictures(*asked)


def open_part(table, targets, args, size, missing, expected=0):
    """Decode what a part needs -> Part. An unreadable file stops, or costs its row.
    `expected`: rows that the part should have, those included that were left out before."""
    nothing = "no row is left whose pictures are all there and readable"
    if not len(table):
        raise InputError(nothing)
    if args.dataset == "mrnet":
        pictures = None
        faults = {file: fault for file in chain(*table["files"]) if (fault := volume_fault(file))}
    else:
        pictures = decode_files(table["files"], args, size)
        faults = pictures.failed
    good = np.array([faults.keys().isdisjoint(row) for row in table["files"]])
    with together():  # a file may be damaged on one machine alone
        if faults and missing == "stop":
            shown = "; ".join(list(faults.values())[:3])
            raise InputError(f"{len(faults)} file(s) cannot be read: {shown}. Mend them, or --missing drop")
    if not good.any():
        raise InputError(nothing)
    part = Part(table, pictures, targets, expected or len(table), size, args.preprocess)
    return part.subset(np.flatnonzero(good))


def find_data(args):
    """The data folder: --data, data/<name>, or that of rendered stand-ins, which are drawn where missing."""
    root = Path(args.data or f"data/{args.dataset}")
    stand_ins = not args.data and not root.is_dir()
    if stand_ins:
        root = Path("data/rendered") / args.dataset
    with together():  # what goes wrong in one process ends all of them
        if stand_ins and local_rank() == 0:
            bar = "!" * 78
            print(bar, f"!! No data/{args.dataset}: this run takes RENDERED STAND-INS from {root}.", sep="\n")
            print("!! Its scores say nothing about real eyes or knees. See docs/data.md.", bar, sep="\n")
            script = Path(__file__).with_name("render_data.py")
            command = [sys.executable, script, root, "--dataset", args.dataset, "--patients", "160"]
            if not tables.is_rendered(root) and subprocess.run(command).returncode:
                raise InputError(f"the stand-ins could not be rendered into {root}")
    return root


def load(args):
    """Read, check, split and decode what a run with these arguments trains and validates on -> Data.
    Raises InputError for all that is not as its layout says, and where nothing is left to train on."""
    root = find_data(args)
    with together():
        table = tables.read(args.dataset, root, args.labels)
        labels, notes = table.labels, table.notes
        frames = split(args.dataset, table.frame, args.val_fraction, args.test_fraction, args.split_seed)
        if args.pseudo_labels:
            frames["train"] = add_pseudo_labels(frames, table, root, args.pseudo_labels, args.min_confidence)
        if args.calibration_fraction:
            frames["train"], frames["calibration"] = set_aside(frames["train"], args)
        expected = {name: len(frame) for name, frame in frames.items()}
        frames, left_out = drop_missing(frames, args.missing)
    parts, unreadable = {}, 0
    for name in [name for name in frames if name != "test"]:  # training never opens the test part
        frame, size = frames[name], args.size if name == "train" else eval_size(args)
        part = open_part(frame, targets_of(frame, labels), args, size, args.missing, expected[name])
        parts[name], frames[name], unreadable = part, part.table, unreadable + len(frame) - len(part)
    for number, fault in ((left_out, "without a picture"), (unreadable, "with an unreadable picture")):
        if number:
            notes.append(f"{number} row(s) {fault} are left out (--missing drop)")
    repaired = {file for part in parts.values() if part.pictures for file in part.pictures.repaired}
    rows = {name: part.rows() for name, part in parts.items()}
    closed = zip(frames["test"]["ID"], targets_of(frames["test"], labels).tolist(), strict=True)
    rows["test"] = {str(name): (str(target), "") for name, target in closed}
    train, val, calibration = parts["train"], parts["val"], parts.get("calibration")
    seen = seen_by_weights(args, frames, table).union(*chain(*train.contents))
    if calibration:  # thresholds are learned from it: it knows nothing of training, nor validation of it
        if count_duplicates(calibration, seen, args, "calibration"):
            notes.append("the thresholds are learned on rows that are trained on too (--duplicates keep)")
        seen.update(*chain(*calibration.contents))
    facts = dict(root=str(root), rendered=tables.is_rendered(root), notes=notes, left_out=left_out)
    facts |= dict(unreadable=unreadable, repaired=sorted(repaired), digest=digest(rows))
    facts["duplicates"] = count_duplicates(val, seen, args, "validation")
    facts["parts"] = {name: len(frame) for name, frame in frames.items()}
    facts["patients"] = {name: frame["patient"].nunique() for name, frame in frames.items()}
    if args.shuffle_labels:
        notes.append("the labels are shuffled among the training rows (--shuffle-labels)")
        train.targets = train.targets[np.random.default_rng(args.seed).permutation(len(train))]
    about = (DATASETS[args.dataset][name] for name in ("task", "family"))
    return Data(train, val, labels, *about, table.ordered, facts, rows, seen, calibration)


def seen_by_weights(args, frames, table):
    """Digests of the pictures that a best.pt of --weights was trained on; table.notes: what else is known."""
    state, file, notes = {}, Path(args.weights), table.notes
    with together():  # the file may be damaged on one machine alone
        if file.is_file() and not args.resume:  # a resumed run knows what it has seen
            state = load_file(args.weights)
            notes.append(f"--weights {file.name} has the digest {digest(file.read_bytes())[:10]}")
    if not isinstance(state, dict) or state.get("kind") != "best":  # a trunk's own state_dict
        return set()
    if state["data"]["rendered"]:
        notes.append("--weights was trained on RENDERED pictures")
    if state["args"]["dataset"] == args.dataset:
        theirs = set(tables.patients_of(state["rows"]["train"]))
        for part in [name for name in frames if name != "train"]:
            if known := theirs.intersection(frames[part]["patient"].astype(str)):
                notes.append(f"--weights was trained on {len(known)} of the {part} patients, by their names")
    return set(state["seen"])


def trained_on(part, seen, args):
    """IDs of the rows of which a picture is among `seen`: the same bytes, or the same decoded pixels."""
    if part.pictures is not None and part.size != args.size:  # pixels were seen at --size
        part = replace(part, pictures=decode_files(part.table["files"], args, args.size))
    rows, seen = zip(part.ids(), part.contents, strict=True), set(seen)
    return [name for name, files in rows if not seen.isdisjoint(chain(*files))]


def count_duplicates(part, seen, args, name):
    """Rows of a part of which a picture was trained on; InputError where there are some, unless allowed."""
    found = trained_on(part, seen, args)
    if found and args.duplicates == "stop":
        problem = f"{len(found)} {name} row(s) hold a picture that is in training too: "
        raise InputError(f"{problem}{', '.join(found[:5])}. Remove one of each, or give --duplicates keep")
    return len(found)


def load_part(args, saved, split, root=None, missing="stop"):
    """The rows of a checkpoint's part in their order, opened -> (Part, facts). `all`: every row of the data.
    facts: root, rendered, notes, digest, left_out, own (rows, labels and pictures are the run's), where (in
    words), suffix (of folders about it), contents {ID: digest of its pictures}, trained_on (IDs of rows whose
    picture training saw). InputError: rows or labels are not the run's, and `root` is no other data set."""
    root = root or saved["data"]["root"]
    other = Path(root).resolve() != Path(saved["data"]["root"]).resolve()
    table = tables.read(args.dataset, root, saved["labels"] if args.dataset in ("retina", "mrnet") else None)
    if table.labels != saved["labels"]:
        theirs, ours = ", ".join(table.labels), ", ".join(saved["labels"])
        raise InputError(f"{root} has the classes {theirs}; this network was trained on {ours}")
    frame, expected = choose_rows(table.frame, saved, split, other, missing)
    frame = drop_missing({split: frame}, missing)[0][split]
    part = open_part(frame, targets_of(frame, table.labels), args, eval_size(args), missing, expected)
    known, rows = ChainMap(*saved["rows"].values()), part.rows()  # ID -> (target, digest of its pictures)
    changed = [name for name in rows if name in known and known[name][0] != rows[name][0]]
    if changed and not other:
        first = f"{', '.join(changed[:5])}. Restore them, or name another data set with --data"
        raise InputError(f"{len(changed)} row(s) of {root} have other labels than in training: {first}")
    shared = [name for name in rows if name in known and known[name][1]]  # test pictures were never opened
    replaced = sum(known[name][1] != rows[name][1] for name in shared)
    own, notes = not replaced, table.notes
    if other:  # fewer rows from another folder, or pictures that nothing is known of, are not the run's own
        same = not changed and len(part) == expected and rows.keys() <= known.keys()
        own = own and same and len(shared) == len(rows)
        words = "the rows and labels are the run's" if same else "other rows or labels than the run's"
        notes.append(f"--data names another folder than the run's; {words}")
    if replaced:
        notes.append(f"{replaced} row(s) have other pictures than in training")
    trained = rows.keys() & saved["rows"]["train"].keys()
    chose = {content for _, content in saved["rows"]["val"].values()}
    both = sum(content in chose for _, content in rows.values())
    if split == "test" and both:
        notes.append(f"{both} row(s) hold the pictures of validation rows, which chose the epoch")
    if split == "all" and trained:
        notes.append(f"{len(trained)} row(s), by name, are those it was trained on: no measure of it")
    facts = dict(root=str(root), rendered=tables.is_rendered(root), notes=notes, own=own)
    facts |= dict(digest=saved["data"]["digest"] if own else digest({split: rows}))
    facts |= dict(trained_on=trained_on(part, saved["seen"], args), left_out=expected - len(part))
    facts["contents"] = {name: content[:12] for name, (_, content) in rows.items()}
    place = Path(root).resolve()
    facts["where"] = split if own else f"{split} of {root}"
    facts["suffix"] = "" if own else f"-{place.name}-{digest(str(place))[:6]}"
    return part, facts


def choose_rows(frame, saved, split, other, missing):
    """(rows of the asked part in the order the run had them, how many it should have)."""
    if split == "all":
        return frame, len(frame)
    wanted = saved["rows"].get(split)
    if not wanted:
        raise InputError(f"this run has no {split} part: use --split val, or train with --test-fraction")
    by_id = frame.set_index(frame["ID"].astype(str))
    there = [i for i in wanted if i in by_id.index]
    if len(there) < len(wanted) and (missing == "stop" or not there):
        missed = f"{len(wanted) - len(there)} of the {len(wanted)} rows of the run's {split} part"
        advice = "--split all takes other patients" if other else "They have changed since training"
        raise InputError(f"{missed} are not in this data set. {advice}; --missing drop leaves them out")
    return by_id.loc[there].reset_index(drop=True), len(wanted)
