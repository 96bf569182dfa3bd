"""Who is in which part: the patient split, by patients and never by pictures.

train, val = split.split_patients(pandas.read_excel("data/odir/annotations.xlsx"))
"""

import math
from pathlib import Path

import numpy as np

from errors import InputError
from tables import DATASETS, PARTS

PRETREATED = [*range(2174, 2183), 2957]  # ODIR patients whose backgrounds were already blacked out


def permuted(count, share, seed):
    """scikit-learn's train_test_split without scikit-learn: positions (rest, taken), `share` rounded up."""
    taken = math.ceil(share * count) if isinstance(share, float) else share
    order = np.random.RandomState(seed).permutation(count)
    return order[taken:], order[:taken]


def split_patients(annotations, val_fraction=0.2, seed=42):
    """ODIR's published split: (train, val) data frames of `annotations` (one row per patient, column ID).

    Without the ten pre-treated patients, then as train_test_split does on the IDs in ascending order: of
    the official 3 500 rows 2 792 / 698, validation beginning 296, 4308, 4556, 1710. Depends on the IDs
    alone, and is done before anything is dropped for a missing picture.
    """
    kept = annotations[~annotations["ID"].isin(PRETREATED)].sort_values("ID", kind="stable")
    if len(kept) < 2:
        raise InputError(f"{len(kept)} patient(s) cannot be split into a training and a validation part")
    train, val = permuted(len(kept), float(val_fraction), seed)
    return kept.iloc[train], kept.iloc[val]


def split_grouped(table, val, test, seed):
    """(train, val, test) by patient, stratified by a patient's highest grade; shares of the patients."""
    from sklearn.model_selection import train_test_split  # here, because eye pairs do without it

    grade = table.groupby("patient", sort=False)["target"].max()
    sizes = round(val * len(grade)), round(test * len(grade))
    if not sizes[0]:
        problem = f"{len(grade)} patient(s) leave none for validation at a share of {val:.3g}"
        raise InputError(f"{problem}: more pictures or a larger --val-fraction")
    rest, names = grade, []
    for size in sizes:
        taken = rest.iloc[:0]
        if size:
            try:
                rest, taken = train_test_split(rest, test_size=size, random_state=seed, stratify=rest)
            except ValueError as error:
                parts = f"parts of {sizes} with every class in each"
                advice = "More pictures, or a larger --val-fraction"
                raise InputError(
                    f"{len(grade)} patients cannot be split into {parts}: {error} {advice}"
                ) from error
        names.append(taken.index)
    return table[table.patient.isin(rest.index)], *(table[table.patient.isin(part)] for part in names)


def split(name, table, val=None, test=None, seed=42):
    """Split a table by patient -> {"train", "val", "test"}: data frames.

    A split that the data set brings is kept. `val`, `test`: shares of the patients; None: the published one.
    """
    given = table["given_part"]
    if (given != "").all():
        if val is not None or test:
            flags = "--val-fraction and --test-fraction"
            raise InputError(f"this {name} data set brings its own split: {flags} do not apply")
        return {part: table[given == part] for part in PARTS}
    val = DATASETS[name]["val"] if val is None else val
    test = DATASETS[name]["test"] if test is None else test
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        given = f"--val-fraction {val} and --test-fraction {test}"
        raise InputError(f"{given}: expected shares that leave some to train")
    if name != "odir":
        return dict(zip(PARTS, split_grouped(table, val, test, seed), strict=True))
    train, validation = split_patients(table, val, seed)
    held = train.iloc[:0]
    if test:  # cut from the training part, so that validation stays the published one
        rest, taken = permuted(len(train), round(test * (len(train) + len(validation))), seed)
        train, held = train.iloc[rest], train.iloc[taken]
    return {"train": train, "val": validation, "test": held}


def drop_missing(parts, missing):
    """Leave out rows whose files are not there (missing="drop"), or stop -> (parts, number left out)."""
    folders, complete, absent = {}, {}, []
    for part, table in parts.items():
        complete[part] = np.ones(len(table), dtype=bool)
        for row, files in enumerate(table["files"]):
            gone = [file for file in files if not is_there(file, folders)]
            if gone:
                complete[part][row] = False
                absent.append(gone[0])
    if absent and missing == "stop":
        advice = "Complete the folder, or leave these patients out with --missing drop"
        raise InputError(
            f"{len(absent)} row(s) have no picture, the first: {', '.join(absent[:5])}. {advice}"
        )
    return {part: table[complete[part]] for part, table in parts.items()}, len(absent)


def is_there(file, folders):
    """Whether a file exists, by one listing of its folder: a question per file takes minutes."""
    path = Path(file)
    folder = str(path.parent)
    if folder not in folders:
        folders[folder] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
    return path.name in folders[folder]


def set_aside(train, args):
    """(train, calibration): a share of the training patients that no gradient sees, drawn by the split's
    seed.
    """
    patients = train["patient"].unique()
    _, taken = permuted(len(patients), float(args.calibration_fraction), args.split_seed)
    aside = train["patient"].isin(patients[taken])
    return train[~aside], train[aside]
