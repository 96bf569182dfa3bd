"""Who is in which part: the split by patients, never by pictures; pictures with spread labels."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

import tables
from errors import InputError
from tables import DATASETS, PARTS

PRETREATED = [*range(2174, 2183), 2957]  # ODIR patients whose backgrounds were already blacked out


def cut(rows, count, seed):
    """scikit-learn's train_test_split without scikit-learn: (rest, taken) of a frame's or series' rows."""
    order = np.random.RandomState(seed).permutation(len(rows))
    return rows.iloc[order[count:]], rows.iloc[order[:count]]


def split_patients(annotations, val_fraction=0.2, seed=42):
    """ODIR's published split: (train, val) data frames of `annotations` (one row per patient, column ID).
    Without the ten pre-treated patients, then as train_test_split does on the ascending IDs: of the official
    3 500 rows 2 792 / 698, validation beginning 296, 4308, 4556, 1710, whatever pictures are missing."""
    kept = annotations[~annotations["ID"].isin(PRETREATED)].sort_values("ID", kind="stable")
    if len(kept) < 2:
        raise InputError(f"{len(kept)} patient(s) cannot be split into a training and a validation part")
    return cut(kept, math.ceil(val_fraction * len(kept)), seed)


def split_grouped(table, val, test, seed):
    """(train, val, test) by patient, stratified by a patient's highest grade; shares of the patients."""
    from sklearn.model_selection import train_test_split  # here, because eye pairs do without it

    grade = table.groupby("patient", sort=False)["target"].max()
    rest, parts = grade, []
    for share in (val, test):
        taken, size = rest[:0], round(share * len(grade))
        try:
            if share:
                rest, taken = train_test_split(rest, test_size=size, random_state=seed, stratify=rest)
        except ValueError as error:
            problem = f"{size} of {len(grade)} patients cannot be split off with every class in each part"
            raise InputError(f"{problem}: {error} More pictures, or a larger --val-fraction") from error
        parts.append(taken)
    return [table[table["patient"].isin(part.index)] for part in (rest, *parts)]


def split(name, table, val=None, test=None, seed=42):
    """Split a table by patient, or as the data set does -> {"train", "val", "test"}: data frames.
    `val`, `test`: shares of the patients; None: the published one. Raises InputError."""
    given = table["given_part"]
    if (given != "").all():
        if val is not None or test:
            raise InputError(f"{name} brings its own split here: leave out --val- and --test-fraction")
        return {part: table[given == part] for part in PARTS}
    val = DATASETS[name]["val"] if val is None else val
    test = DATASETS[name]["test"] if test is None else test
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise InputError(f"--val-fraction {val} and --test-fraction {test}: expected to leave some to train")
    if name != "odir":
        return dict(zip(PARTS, split_grouped(table, val, test, seed), strict=True))
    train, held_out = split_patients(table, val, seed)
    taken = train[:0]
    if test:  # from the training part, so that validation stays the published one
        train, taken = cut(train, round(test * (len(train) + len(held_out))), seed)
    return {"train": train, "val": held_out, "test": taken}


def drop_missing(parts, missing):
    """Leave out rows whose files are not there (missing="drop"), or stop -> (parts, number left out)."""
    files = [Path(file) for table in parts.values() for row in table["files"] for file in row]
    folders = {file.parent for file in files}  # one listing of each: a question per file takes minutes
    there = {file for folder in folders if folder.is_dir() for file in folder.iterdir()}
    kept, left_out = {}, 0
    for part, table in parts.items():
        complete = np.array([there.issuperset(map(Path, row)) for row in table["files"]], dtype=bool)
        kept[part], left_out = table[complete], left_out + int((~complete).sum())
    if left_out and missing == "stop":
        absent = ", ".join([str(file) for file in files if file not in there][:5])
        raise InputError(f"{left_out} row(s) have no picture, first {absent}. Add them, or --missing drop")
    return kept, left_out


def set_aside(train, args):
    """(train, calibration): a share of the training patients that no gradient sees, by the split's seed."""
    patients = train["patient"].drop_duplicates()
    taken = cut(patients, math.ceil(args.calibration_fraction * len(patients)), args.split_seed)[1]
    aside = train["patient"].isin(taken)
    return train[~aside], train[aside]


def add_pseudo_labels(parts, table, root, path, min_confidence):
    """parts["train"] with the pictures of pseudo_labels.csv (filename, label, confidence, `source`), none of
    which is in `parts`. No patient of val or test may be among them, or among those they were spread from."""
    labels, held_out = table.labels, [*parts["val"]["patient"], *parts["test"]["patient"]]
    columns = ["filename", "label", "confidence"]
    sheet = tables.read_sheet(path, columns, dtype={"filename": str, "label": str})
    names = tables.check_names(path, sheet["filename"], "filename")
    patients = pd.Series(tables.patients_of(names), names.index)
    origin = sheet.get("source", names.map(lambda _: "")) == tables.SPREAD_FROM
    if not origin.any():  # an older file, or one that was filtered
        table.notes.append(f"{path} does not say whose pictures its labels were spread from")
    leak = origin & patients.isin(held_out)
    tables.check_rows(path, leak, "spread from a patient of validation or test", names)
    sheet, names = sheet[~origin], names[~origin]
    wrong = ~sheet["label"].isin(labels)
    tables.check_rows(path, wrong, f"label that is not one of {labels}", sheet["label"])
    confidence = pd.to_numeric(sheet["confidence"], errors="coerce")
    tables.check_rows(path, ~confidence.between(0, 1), "confidence outside 0 to 1", sheet["confidence"])
    more = tables.picture_frame(path, names, Path(root) / "test", sheet["label"].map(labels.index), "train")
    labelled = [name for frame in parts.values() for name in tables.plain_names(frame["ID"])]
    known = pd.Series(tables.plain_names(names), names.index).isin(labelled)
    tables.check_rows(path, known, "a picture that is labelled already", names)
    tables.check_rows(path, more["patient"].isin(held_out), "a patient of validation or test", names)
    more = more[confidence >= min_confidence]
    table.notes.append(f"{len(more)} pseudo-labelled picture(s) join the training part")
    return pd.concat([parts["train"], more], ignore_index=True)
