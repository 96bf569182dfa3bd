"""What the networks are fed: pictures decoded once and kept, kept features, knee volumes; as batches by index.

Every data set here answers a list of keys [(index, repeat)] with one batch, so a DataLoader makes one call per batch.
"""

import functools
import tokenize
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from augment import draw
from cache import Kept, digest, file_stamps
from dataset import PLANES, check_columns, check_names, check_rows, read_sheet
from engine import gather, local_rank, progress
from errors import InputError
from preprocess import WRITES, default_workers, load_picture


def load_row(file, kind, size):
    """One picture, or the reason why there is none: (uint8 (size, size, 3), repaired, reason)."""
    try:
        return *load_picture(file, kind, size), ""
    except InputError as error:
        return np.zeros((size, size, 3), np.uint8), False, str(error)


class Pictures:
    """The pictures of some rows, preprocessed once and kept: `.rows` (n, P) points into `.array()` (m, S, S, 3) uint8.

    `.failed` {file: reason} and `.repaired` [file] say what could not be read, and what was repaired in memory.
    """

    def __init__(self, files, kind, size, cache, workers=None):
        self.files = [file for row in files for file in row]
        self.rows = np.arange(len(self.files)).reshape(len(files), -1)
        self.kind, self.size, self.workers = kind, size, workers
        self.key = digest(file_stamps(self.files), kind, size, "pictures-1")
        self.kept = Kept(cache, "pictures", self.key, (len(self.files), size, size, 3), np.uint8, self.make)
        self.mapped = None
        facts = self.kept.extra()
        self.failed, self.repaired = facts["failed"], facts["repaired"]

    def make(self, extra):
        extra.update(failed={}, repaired=[])
        load = functools.partial(load_row, kind=self.kind, size=self.size)
        workers = default_workers() if self.workers is None else self.workers
        with ProcessPoolExecutor(workers) if workers > 1 and len(self.files) > 64 else nullcontext() as pool:
            done = pool.map(load, self.files, chunksize=16) if pool else map(load, self.files)
            bar = progress(done, f"pictures {self.kind} {self.size}", total=len(self.files))
            for file, (picture, repaired, reason) in zip(self.files, bar, strict=True):
                if reason:
                    extra["failed"][file] = reason
                if repaired:
                    extra["repaired"].append(file)
                yield picture[None]

    def array(self):
        """The kept array, mapped from disk; its checksum is compared once, not in every epoch."""
        if self.mapped is None:
            self.mapped = self.kept.load(mmap=True)
        return self.mapped


class PictureSet(torch.utils.data.Dataset):
    """Batches of pictures: [(index, repeat)] -> {"images": uint8 (B, P, S, S, 3), "uniforms", "targets"}."""

    def __init__(self, array, rows, targets, seed=0, view=None):
        self.array, self.rows, self.targets, self.seed, self.view = array, rows, torch.as_tensor(targets), seed, view

    def __getitem__(self, keys):
        index = [i for i, _ in keys]
        batch = {"images": torch.from_numpy(self.array[self.rows[index]]), "targets": self.targets[index]}
        if self.view is not None and keys:
            batch["uniforms"] = draw(self.seed, self.view, keys, self.rows.shape[1])
        return batch


class FeatureSet(torch.utils.data.Dataset):
    """Batches of kept features: [(index, repeat)] -> {"features": float32 (B, D), "targets"}."""

    def __init__(self, features, targets):
        self.features, self.targets = features, torch.as_tensor(targets, device=features.device)

    def __getitem__(self, keys):
        index = torch.tensor([i for i, _ in keys], dtype=torch.long, device=self.features.device)
        return {"features": self.features[index], "targets": self.targets[index]}


def open_part(table, kind, size, cache, workers, missing):
    """The pictures of a part -> (table without unreadable rows, Pictures, rows left out); Pictures is None for volumes.

    `kind` is preprocess.KINDS or None for knee volumes. An unreadable file stops (missing="stop") or leaves its row out.
    """
    files, pictures = list(table["files"]), None
    if kind is None:
        failed = {file: reason for row in files for file in row if (reason := volume_fault(file))}
    else:
        if local_rank() == 0:  # one process of a machine decodes, the others find the result
            Pictures(files, kind, size, cache, workers)
        gather(None)
        pictures = Pictures(files, kind, size, cache, workers)
        failed = pictures.failed
    bad = np.array([any(file in failed for file in row) for row in files], dtype=bool)
    if bad.any() and missing == "stop":
        raise InputError(f"{len(failed)} file(s) cannot be read, the first: " + "; ".join(list(failed.values())[:3])
                         + ". Replace them, or leave these rows out with --missing drop")
    if pictures:
        pictures.rows = pictures.rows[~bad]
    return table[~bad], pictures, int(bad.sum())


# ---------------------------------------------------------------- pictures that somebody names, outside a data set

GIVEN = {  # data set -> what is asked for, and the columns of a table of them
    "odir": ("eye pairs: LEFT RIGHT, a folder of <id>_left.* and <id>_right.*, or a CSV", (["Left-Fundus", "Right-Fundus"], ["LEFT", "RIGHT"])),
    "mrnet": ("knees: an exam's folder (axial.npy, coronal.npy, sagittal.npy), its three files in this order, a folder of the folders axial/, "
              "coronal/ and sagittal/, or a CSV", (PLANES,)),
    "": ("single photographs: pictures, a folder of pictures, or a CSV", (["file"],)),
}


def given_rows(name, given):
    """Paths from a command line -> (data frame with ID and files, whether they are many), for data set `name`'s models.

    Raises InputError where they are not what GIVEN says; whether the files can be read is `open_given`'s business.
    """
    paths = [Path(path) for path in given]
    wanted, columns = GIVEN.get(name, GIVEN[""])
    first, several = paths[0], len(paths) > 1
    if not several and first.suffix.lower() in (".csv", ".xlsx"):
        return rows_of_table(first, columns), True
    if not several and first.is_dir() and not (name == "mrnet" and (first / "axial.npy").exists()):
        rows = rows_of_folder(name, first)
        if not rows:
            raise InputError(f"{first} holds nothing to predict. This network takes {wanted}")
        return pd.DataFrame(sorted(rows), columns=["ID", "files"]), True
    if name == "mrnet" and not several and first.is_dir():
        return pd.DataFrame({"ID": [first.resolve().name], "files": [tuple(str(first / f"{plane}.npy") for plane in PLANES)]}), False
    per_row = {"odir": 2, "mrnet": 3}.get(name, 1)
    if any(path.is_dir() for path in paths) or per_row > 1 and len(paths) != per_row:
        raise InputError(f"{' '.join(map(str, paths))}: this network takes {wanted}")
    if len(set(paths)) < len(paths):
        raise InputError(f"{' '.join(map(str, paths))}: the same one twice; this network takes {wanted}")
    if per_row == 1:
        names = [path.name for path in paths]
        return pd.DataFrame({"ID": names if len(set(names)) == len(names) else list(map(str, paths)), "files": [(str(p),) for p in paths]}), several
    return pd.DataFrame({"ID": [first.stem.removesuffix("_left")], "files": [tuple(map(str, paths))]}), False


def rows_of_folder(name, folder):
    """[(ID, files)] of a folder. An eye or a plane that is missing keeps the name it should have."""
    if name == "mrnet":
        exams = {file.name for plane in PLANES for file in (folder / plane).glob("*.npy")}
        return [(exam.removesuffix(".npy"), tuple(str(folder / plane / exam) for plane in PLANES)) for exam in exams]
    files = [file for file in folder.iterdir() if file.suffix.lower() in WRITES and not file.name.startswith(".")]
    if name != "odir":
        return [(file.name, (str(file),)) for file in files]
    eyes, others = {}, 0
    for file in files:
        patient, _, side = file.stem.rpartition("_")
        side = side.lower()
        if side not in ("left", "right"):
            others += 1
        else:
            if eyes.setdefault(patient, {}).setdefault(side, file) != file:
                raise InputError(f"{file} and {eyes[patient][side].name}: two pictures of one eye")
    if others:
        print(f"note: {others} picture(s) in {folder} are named neither <id>_left nor <id>_right and are ignored")
    return [(patient, tuple(str(pair.get(side, folder / f"{patient}_{side}.*")) for side in ("left", "right"))) for patient, pair in eyes.items()]


def rows_of_table(path, columns):
    """The rows of a CSV whose paths are relative to it, or, as in the official layout, to images/ beside it; without a
    column ID the first path is the ID."""
    sheet = read_sheet(path, dtype=str)
    chosen = next((names for names in columns if names[0] in sheet.columns), columns[0])
    check_columns(path, sheet, chosen)
    for column in chosen:
        check_rows(path, sheet[column].isna() | (sheet[column].str.strip() == ""), f"empty {column}")
    ids = check_names(path, sheet["ID"], "ID") if "ID" in sheet.columns else sheet[chosen[0]].str.strip()
    check_rows(path, ids.duplicated(), "doubled ID")
    files = [[file.strip() for file in row] for row in sheet[chosen].to_numpy()]
    official = "Left-Fundus" in chosen and not (path.parent / files[0][0]).exists() and (path.parent / "images").is_dir()
    folder = path.parent / "images" if official else path.parent
    return pd.DataFrame({"ID": ids, "files": [tuple(str(folder / file) for file in row) for row in files]})


def open_given(table, kind, size, cache, workers=None):
    """The rows of `given_rows` that can be read -> (rows, Pictures or None for volumes, {ID: why it cannot be read})."""
    absent = {file: f"{file}: there is no such file" for row in table["files"] for file in row if not Path(file).is_file()}
    there = table[[not any(file in absent for file in row) for row in table["files"]]]
    rows, pictures = there, None
    if len(there):
        rows, pictures, _ = open_part(there, kind, size, cache, workers, "drop")
    left_out = table[~table["ID"].isin(rows["ID"])]
    if pictures or kind:
        failed = pictures.failed if pictures else {}  # none where no row had all its files
    else:
        failed = {file: volume_fault(file) for row in left_out["files"] for file in row if file not in absent}
    why = {i: "; ".join(reason for file in files if (reason := absent.get(file) or failed.get(file)))
           for i, files in zip(left_out["ID"], left_out["files"], strict=True)}
    return rows.reset_index(drop=True), pictures, why


# ---------------------------------------------------------------- knee volumes

def volume_fault(file):
    """Why a volume cannot be used; an empty string when it can."""
    try:
        read_volume(file)
    except InputError as error:
        return str(error)
    return ""


def read_volume(file):
    """One plane of an exam, mapped from disk: uint8 (slices, 256, 256). Never unpickles anything."""
    try:
        volume = np.load(file, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, TypeError, KeyError, MemoryError, OverflowError, RuntimeError, tokenize.TokenError) as error:
        raise InputError(f"{file}: not a plain .npy array ({str(error)[:80]})") from error
    if not isinstance(volume, np.ndarray) or volume.dtype != np.uint8 or volume.ndim != 3 or volume.shape[1:] != (256, 256) or not len(volume):
        got = f"{volume.dtype} {volume.shape}" if isinstance(volume, np.ndarray) else type(volume).__name__
        raise InputError(f"{file}: {got}; expected uint8 (slices, 256, 256)")
    if volume.offset + volume.nbytes != Path(file).stat().st_size:  # a damaged header can claim fewer slices than there are
        raise InputError(f"{file}: the header claims {len(volume)} slices, but the file's length is another. Copy it again")
    return volume


class VolumeSet(torch.utils.data.Dataset):
    """Batches of exams: [(index, repeat)] -> {"volumes": three uint8 (sum of slices, S, S), "lengths", ...}.

    `size` is the centre crop of the 256 x 256 slices (published: 224).
    """

    def __init__(self, files, targets, size, seed=0, view=None):
        self.files, self.targets, self.size, self.seed, self.view = list(files), torch.as_tensor(targets), size, seed, view

    def __getitem__(self, keys):
        index = [i for i, _ in keys]
        lo = (256 - self.size) // 2
        crop = slice(lo, lo + self.size)
        planes = [[read_volume(self.files[i][plane])[:, crop, crop] for i in index] for plane in range(len(PLANES))]
        empty = np.zeros((0, self.size, self.size), np.uint8)
        batch = {"volumes": [torch.from_numpy(np.concatenate([empty, *volumes])) for volumes in planes],
                 "lengths": [[len(volume) for volume in volumes] for volumes in planes], "targets": self.targets[index]}
        if self.view is not None and keys:
            batch["uniforms"] = draw(self.seed, self.view, keys, 0)
        return batch


def pictures_of(source, row):
    """The pictures of one row, uint8 (S, S, 3) each: both eyes, one photograph, or the middle slice of each plane."""
    pictures, table = source
    if pictures is not None:
        return list(pictures.array()[pictures.rows[row]])
    volumes = [read_volume(file) for file in table["files"].iloc[row]]
    return [np.repeat(volume[len(volume) // 2][:, :, None], 3, 2) for volume in volumes]


def first_of_each(targets, num_labels, task):
    """The first row that carries each label (a label that nobody carries has none), without repeats; where no row carries any, the first row."""
    carried = targets == 1 if task == "multilabel" else targets[:, None] == np.arange(num_labels)
    return list(dict.fromkeys(int(column.argmax()) for column in carried.T if column.any())) or [0]


def examples(source, targets, probs, labels, task, threshold=0.5):
    """A row for every label, as figures.samples takes them; `source` = (Pictures or None, table)."""
    rows = []
    for row in first_of_each(targets, len(labels), task):
        truth = [name for name, t in zip(labels, targets[row], strict=True) if t] if task == "multilabel" else [labels[targets[row]]]
        shown = np.flatnonzero(probs[row] > threshold) if task == "multilabel" else [probs[row].argmax()]
        rows.append({"title": str(source[1]["ID"].iloc[row]), "pictures": pictures_of(source, row), "truth": truth,
                     "prediction": [(labels[i], float(probs[row, i])) for i in shown]})
    return rows


def single_batch(source, row, size):
    """One row of a part as a batch, for grad_cam: {"images"} or {"volumes", "lengths"}, and its "targets"."""
    pictures, table = source
    data = (VolumeSet(table["files"], np.zeros(len(table)), size) if pictures is None else
            PictureSet(pictures.array(), pictures.rows, np.zeros(len(pictures.rows))))
    return data[[(row, 0)]]
