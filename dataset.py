"""Eye pairs, photographs and knees as torch data sets; the patient split; one `load` for every script.

    data = dataset.load(args)                 # args as train.py has them
    images, target = data.train.dataset()[0]  # eye pairs: (2, 3, S, S) in 0..1, and 0/1 per label

Pictures are decoded once, in parallel, and kept on disk as uint8.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import tables
from augment import draw
from cache import digest
from decode import Pictures
from engine import local_rank, together
from errors import InputError, reading
from split import drop_missing, set_aside, split, split_patients  # noqa: F401 - dataset.split_patients is SPEC's name
from tables import DATASETS, PLANES, targets_of

# ---------------------------------------------------------------- the data sets


def as_keys(indices):
    """Row numbers, or (row number, how often it came before in this epoch) -> the latter."""
    return [index if isinstance(index, tuple) else (int(index), 0) for index in indices]


class RowSet(torch.utils.data.Dataset):
    """A data set whose `__getitems__([(index, repeat), ...])` gives a whole batch as a dict of tensors.

    `repeat` counts how often the row came before in the epoch: each time it gets another random view.
    `view`: number of the random views, None for none.
    """

    on_device = False  # whether batches come from a GPU's memory

    def __init__(self, targets, seed=0, view=None):
        self.targets, self.seed, self.view = torch.as_tensor(targets), seed, view

    def __len__(self):
        return len(self.targets)


class PictureSet(RowSet):
    """Eye pairs or photographs: batches {"images": uint8 (B, P, S, S, 3), "targets", "uniforms"}.

    An integer index gives (images float32 (P, 3, S, S) in 0..1, target).
    """

    def __init__(self, pictures, targets, seed=0, view=None, device=None):
        super().__init__(targets, seed, view)
        self.pictures = pictures
        self.on_device = device is not None and pictures.on(device) is not None
        if self.on_device:
            self.targets = self.targets.to(device)

    def __getitems__(self, keys):
        keys = as_keys(keys)
        index = [i for i, _ in keys]
        places = self.pictures.rows[index]
        if self.on_device:
            images = self.pictures.resident[torch.from_numpy(places).to(self.targets.device)]
        else:
            images = torch.from_numpy(self.pictures.array()[places])
        batch = {"images": images, "targets": self.targets[index]}
        if self.view is not None and keys:
            batch["uniforms"] = draw(self.seed, self.view, keys, places.shape[1])
        return batch

    def __getitem__(self, index):
        batch = self.__getitems__([index])
        return batch["images"][0].permute(0, 3, 1, 2) / 255, batch["targets"][0]


class FeatureSet(RowSet):
    """Kept features (n, D): batches {"features": (B, D), "targets"}. An integer index gives (features,
    target).

    `place`: {(row, repeat): number of its features}, for augmented views; else row i has features i.
    """

    def __init__(self, features, targets, place=None):
        super().__init__(targets)
        self.features, self.place = features, place
        self.targets = self.targets.to(features.device)
        self.on_device = features.device.type != "cpu"

    def __getitems__(self, keys):
        keys = as_keys(keys)
        rows = [self.place[key] for key in keys] if self.place else [row for row, _ in keys]
        index = torch.tensor(rows, dtype=torch.long, device=self.features.device)
        return {"features": self.features[index], "targets": self.targets[index]}

    def __getitem__(self, index):
        return self.features[index], self.targets[index]


class VolumeSet(RowSet):
    """Knees: batches {"volumes": three uint8 (sum of slices, S, S), "lengths": slices of each exam,
    "targets"}.

    `how`: "crop" cuts the centre S x S of the 256 x 256 slices (published: 224), "none" scales them to S x
    S. An integer index gives ([three uint8 (slices, S, S)], target).
    """

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

    def __getitems__(self, keys):
        keys = as_keys(keys)
        empty = torch.zeros((0, self.size, self.size), dtype=torch.uint8)
        volumes, lengths = [], []
        for plane in range(len(PLANES)):
            exams = [self.read(self.files[i][plane]) for i, _ in keys]
            volumes.append(torch.cat([empty, *exams]))
            lengths.append([len(exam) for exam in exams])
        batch = {"volumes": volumes, "lengths": lengths, "targets": self.targets[[i for i, _ in keys]]}
        if self.view is not None and keys:
            batch["uniforms"] = draw(self.seed, self.view, keys, 0)
        return batch

    def __getitem__(self, index):
        batch = self.__getitems__([index])
        return batch["volumes"], batch["targets"][0]


def read_volume(file):
    """One plane of an exam, mapped from disk: uint8 (slices, 256, 256). Never unpickles anything."""
    with reading(file, "a plain .npy array"):
        volume = np.load(file, mmap_mode="c", allow_pickle=False)
    right = isinstance(volume, np.ndarray) and volume.dtype == np.uint8 and volume.ndim == 3
    if not right or volume.shape[1:] != (256, 256) or not len(volume):
        found = f"{volume.dtype} {volume.shape}" if isinstance(volume, np.ndarray) else type(volume).__name__
        raise InputError(f"{file}: {found}; expected uint8 (slices, 256, 256)")
    # A damaged header can claim fewer slices than there are.
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


# ---------------------------------------------------------------- a part, and all parts of a run


@dataclass
class Part:
    """What is trained or evaluated on. `pictures` is None for knees, whose volumes are read as they are
    needed.
    """

    table: pd.DataFrame  # ID, patient, files ...: a row per patient, photograph or exam
    pictures: Pictures | None
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

    def subset(self, rows):
        """The part with these rows (numbers) alone."""
        pictures = self.pictures and self.pictures.chosen(self.pictures.rows[rows])
        return Part(self.table.iloc[rows], pictures, self.targets[rows], len(rows), self.size, self.how)

    def dataset(self):
        """As a torch data set, without random views."""
        if self.pictures is None:
            return VolumeSet(self.table["files"], self.targets, self.size, self.how)
        return PictureSet(self.pictures, self.targets)

    def shown(self, row):
        """The pictures of a row, uint8 (S, S, 3) each: both eyes, one photograph, or each plane's middle
        slice.
        """
        if self.pictures is not None:
            return list(self.pictures.array()[self.pictures.rows[row]])
        volumes = [read_volume(file) for file in self.table["files"].iloc[row]]
        return [np.repeat(volume[len(volume) // 2][:, :, None], 3, 2) for volume in volumes]

    def aspect(self, row):
        """Width by height of the photograph, where it was squashed into a square."""
        if self.how != "none" or self.pictures is None:
            return 1.0
        from PIL import Image

        with Image.open(self.table["files"].iloc[row][0]) as image:
            return image.width / image.height


@dataclass
class Data:
    """The parts of a run that were asked for, and what is known of all its parts."""

    parts: dict  # name -> Part
    labels: list
    task: str  # multilabel, multiclass
    family: str  # of its scores
    ordered: bool  # whether the classes are grades
    facts: dict  # for run.json
    frames: dict = field(default_factory=dict)  # name -> table of every part, opened or not

    @property
    def train(self):
        return self.parts["train"]

    @property
    def val(self):
        return self.parts["val"]

    def prior(self):
        """Share of the training rows that carry each label."""
        targets = self.train.targets
        if targets.ndim == 2:
            return targets.mean(0).tolist()
        return (np.bincount(targets, minlength=len(self.labels)) / len(targets)).tolist()


def eval_size(args):
    """Pixels a side that evaluation sees."""
    return args.crop or args.size


def open_part(table, targets, args, size, missing):
    """Decode what a part needs -> (Part, rows left out). An unreadable file stops, or leaves its row out
    ("drop").
    """
    files = list(table["files"])
    if args.dataset == "mrnet":
        pictures, faults = None, {}
        for file in (file for row in files for file in row):
            if fault := volume_fault(file):
                faults[file] = fault
    else:
        with together():  # one process of a machine decodes, the others find the result
            if local_rank() == 0:
                Pictures(files, args.preprocess, size, args.cache, args.workers)
        pictures = Pictures(files, args.preprocess, size, args.cache, args.workers)
        faults = pictures.failed
    bad = np.array([any(file in faults for file in row) for row in files], dtype=bool)
    if bad.any() and missing == "stop":
        shown = "; ".join(list(faults.values())[:3])
        advice = "Replace them, or leave these rows out with --missing drop"
        raise InputError(f"{len(faults)} file(s) cannot be read, the first: {shown}. {advice}")
    part = Part(table, pictures, targets, len(table), size, args.preprocess)
    return part.subset(np.flatnonzero(~bad)) if bad.any() else part, int(bad.sum())


def find_data(name, given):
    """The data folder: --data as given, data/<name>, or rendered stand-ins, drawn when they are wanted
    first.
    """
    root = Path(given or Path("data") / name)
    if given or root.is_dir():
        return root
    root, line = Path("data") / "rendered" / name, "!" * 78
    print(f"{line}\n!! There is no data/{name}. This run takes RENDERED STAND-INS from {root}:")
    print(f"!! its scores say nothing about real eyes or knees. Real data: docs/data.md.\n{line}", flush=True)
    script = str(Path(__file__).parent / "render_data.py")
    command = [sys.executable, script, str(root), "--dataset", name, "--patients", "160"]
    if not tables.is_rendered(root) and subprocess.run(command).returncode:
        raise InputError(f"the stand-ins could not be rendered into {root}")
    return root


def load(args):
    """Read, check, split and decode what a training run with these arguments trains and validates on -> Data.

    Raises InputError for everything that is not as its layout says, and where nothing is left to train on.
    """
    with together():
        if local_rank() == 0:
            find_data(args.dataset, args.data)
    with together():
        root = (
            find_data(args.dataset, args.data)
            if args.data or not local_rank()
            else rendered_or_real(args.dataset)
        )
        table = tables.read(args.dataset, root, args.labels)
        frames = split(args.dataset, table.frame, args.val_fraction, args.test_fraction, args.split_seed)
        notes = list(table.notes)
        if args.pseudo_labels:
            frames["train"], added = tables.add_pseudo_labels(
                frames, table.labels, root, args.pseudo_labels, args.min_confidence
            )
            notes.append(f"{added} pseudo-labelled picture(s) join the training part")
        if args.calibration_fraction:
            frames["train"], frames["calibration"] = set_aside(frames["train"], args)
        expected = {name: len(frame) for name, frame in frames.items()}
        frames, left_out = drop_missing(frames, args.missing)
        if left_out:
            notes.append(f"{left_out} row(s) without a picture are left out (--missing drop)")
    parts, unreadable = {}, 0
    for name in ("train", "val", *(["calibration"] if args.calibration_fraction else [])):
        targets = targets_of(frames[name], table.labels)
        size = args.size if name == "train" else eval_size(args)
        parts[name], bad = open_part(frames[name], targets, args, size, args.missing)
        parts[name].expected, frames[name] = expected[name], parts[name].table
        unreadable += bad
        if not len(parts[name]):
            raise InputError(f"no row is left in the {name} part: there is nothing to train on")
    repaired = {file for part in parts.values() if part.pictures for file in part.pictures.repaired}
    duplicates = count_duplicates(parts["train"], parts["val"])
    if duplicates and args.duplicates == "stop":
        problem = f"{duplicates} validation row(s) hold a picture that is in training too: their scores say too much"
        raise InputError(
            f"{problem}. Remove one of each, or go on with --duplicates keep, which every output says"
        )
    facts = {
        "root": str(root),
        "rendered": tables.is_rendered(root),
        "notes": notes,
        "left_out": left_out,
        "unreadable": unreadable,
        "repaired": sorted(repaired),
        "duplicates": duplicates,
        "digest": data_digest(frames, table.labels),
        "parts": {name: len(frame) for name, frame in frames.items()},
        "patients": {name: frame["patient"].nunique() for name, frame in frames.items()},
    }
    if args.shuffle_labels:
        order = np.random.default_rng(args.seed).permutation(len(parts["train"]))
        parts["train"].targets = parts["train"].targets[order]
    about = DATASETS[args.dataset]
    return Data(parts, table.labels, about["task"], about["family"], table.ordered, facts, frames)


def rendered_or_real(name):
    root = Path("data") / name
    return root if root.is_dir() else Path("data") / "rendered" / name


def count_duplicates(train, val):
    """Validation rows of which a picture is in training too: the same bytes, or the same pixels after
    decoding.
    """
    known = {content for files in row_contents(train) for content in files}
    return sum(any(content in known for content in files) for files in row_contents(val))


def row_contents(part):
    """Per row the digests of its files; of a knee each plane's middle slice."""
    if part.pictures is not None:
        contents = part.pictures.contents
        return [{content for place in row for content in contents[place]} for row in part.pictures.rows]
    found = []
    for files in part.table["files"]:
        volumes = [read_volume(file) for file in files]
        found.append({digest(volume[len(volume) // 2], volume.shape) for volume in volumes})
    return found


def data_digest(frames, labels):
    """Digest of who is in which part with which targets: a resumed run compares it."""
    pieces = []
    for name, frame in frames.items():
        pieces.append([name, [str(i) for i in frame["ID"]], targets_of(frame, labels).tolist()])
    return digest(json.dumps(pieces))


# ---------------------------------------------------------------- a part of a run that is finished


def load_part(args, saved, split, root=None, missing="stop", pictures=True):
    """The rows of a checkpoint's part in their order, opened -> (Part, facts). `all`: every row of the data
    set.

    facts: root, rendered, notes, own (whether these are the rows and labels that the run had), left_out.
    Raises InputError where rows or labels are not the run's, unless `root` names another data set.
    """
    given, root = root, root or saved["data"]["root"]
    table = tables.read(args.dataset, root, saved["labels"] if args.dataset in ("retina", "mrnet") else None)
    if table.labels != saved["labels"]:
        theirs = ", ".join(saved["labels"])
        raise InputError(
            f"{root} has the classes {', '.join(table.labels)}; this network was trained on {theirs}"
        )
    other = given is not None and Path(given).resolve() != Path(saved["data"]["root"]).resolve()
    frame, expected = choose_rows(table.frame, saved, split, other, missing)
    changed = changed_labels(frame, saved)
    notes = list(table.notes)
    if changed and not other:
        raise InputError(
            f"{len(changed)} row(s) of {root} have other labels than in training, the first: {', '.join(changed[:5])}. "
            "Restore them, or name another data set with --data"
        )
    own = not changed and {str(i) for i in frame["ID"]} <= {i for ids in saved["split"].values() for i in ids}
    if other:
        same = "the rows and labels are the run's" if own else "these are other rows or labels than the run's"
        notes.append(f"--data names another folder than the run's; {same}")
    frames, left_out = drop_missing({split: frame}, missing)
    part, unreadable = open_part(
        frames[split], targets_of(frames[split], table.labels), args, eval_size(args), missing
    )
    if not len(part):
        raise InputError("no row is left to evaluate")
    part.expected = expected
    facts = {"root": str(root), "rendered": tables.is_rendered(root), "notes": notes, "own": own}
    return part, {**facts, "left_out": expected - len(part)}


def choose_rows(frame, saved, split, other, missing):
    """(rows of the asked part in the order the run had them, how many it should have)."""
    if split == "all":
        return frame, len(frame)
    wanted = saved["split"].get(split)
    if not wanted:
        advice = "train with --test-fraction to keep one, or use --split val or all"
        raise InputError(f"this run has no {split} part: {advice}")
    by_id = frame.set_index(frame["ID"].astype(str))
    there = [i for i in wanted if i in by_id.index]
    if len(there) < len(wanted) and (missing == "stop" or not there):
        advice = (
            "Use --split all for other patients, or --missing drop"
            if other
            else "They have changed since training"
        )
        gone = len(wanted) - len(there)
        raise InputError(
            f"{gone} of the {len(wanted)} rows of the run's {split} part are not in this data set. {advice}"
        )
    return by_id.loc[there].reset_index(drop=True), len(wanted)


def changed_labels(frame, saved):
    """IDs of rows that carry other labels than the run's."""
    stored = {}
    for part, ids in saved["split"].items():
        stored.update(zip(ids, saved["targets"][part].tolist(), strict=True))
    now = targets_of(frame, saved["labels"]).tolist()
    ids = [str(i) for i in frame["ID"]]
    return [i for i, target in zip(ids, now, strict=True) if i in stored and stored[i] != target]
