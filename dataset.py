"""The five data sets: reading their tables, checking them, and splitting them by patient.

    table = dataset.read("odir", "data/odir")          # one row per patient, picture or exam
    parts = dataset.split("odir", table)               # {"train": ..., "val": ..., "test": ...}

A table has the columns ID, patient, files (a tuple of paths per row), given_part ("" where the data set leaves the
split to us) and either one 0/1 column per label (multi-label) or `target` (multi-class, a position in its labels).
"""

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from cache import digest
from errors import InputError

ODIR_LABELS = ["N", "D", "G", "C", "A", "H", "M", "O"]
ODIR_NAMES = ["normal", "diabetes", "glaucoma", "cataract", "AMD", "hypertension", "myopia", "other"]
GRADES = ["0", "1", "2", "3", "4"]
PLANES = ["axial", "coronal", "sagittal"]
PRETREATED = [*range(2174, 2183), 2957]  # ODIR patients whose backgrounds were already blacked out
SUFFIXES = (".png", ".jpg", ".jpeg")
PARTS = ("train", "val", "test")

# What a data set is. Shares of val and test are the published ones; 0 test patients unless --test-fraction asks.
DATASETS = {
    "odir": {"task": "multilabel", "labels": ODIR_LABELS, "family": "per label", "val": 0.2, "test": 0.0},
    "aptos": {"task": "multiclass", "labels": GRADES, "family": "classes", "val": 733 / 3662, "test": 583 / 3662},
    "dr": {"task": "multiclass", "labels": GRADES, "family": "classes", "val": 0.2, "test": 0.0},
    "retina": {"task": "multiclass", "labels": ["diabetic retinopathy", "glaucoma", "normal"], "family": "classes",
               "val": 0.2, "test": 0.0},
    "mrnet": {"task": "multilabel", "labels": ["abnormal", "acl", "meniscus"], "family": "auc", "val": 0.2, "test": 0.0},
}


def full_names(name, labels):
    """Labels as people read them: ODIR's letters with their words."""
    words = dict(zip(ODIR_LABELS, ODIR_NAMES, strict=True)) if name == "odir" else {}
    return [f"{label} {words.get(label, '')}".strip() for label in labels]


# ---------------------------------------------------------------- reading tables

def read(name, root, labels=None):
    """Read data set `name` under `root` -> (table, labels, notes): notes are sentences on what was left out.

    Raises InputError for anything that is not as its layout says, with the rows of the sheet it found it in.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"--data {root} is no folder, seen from {Path.cwd()}: give the folder that holds the {name} data set (README, Data)")
    labels = list(labels or DATASETS[name]["labels"])
    if name not in ("retina", "mrnet") and labels != DATASETS[name]["labels"]:
        raise InputError(f"--labels: {name} always has the labels {' '.join(DATASETS[name]['labels'])}")
    return READERS[name](root, labels)


def read_sheet(path, **kwargs):
    """A .xlsx or .csv file as a DataFrame; InputError where it cannot be read or holds no row."""
    path = Path(path)
    try:
        # Blank lines are kept, so that row numbers stay those of the file.
        sheet = pd.read_excel(path, **kwargs) if path.suffix == ".xlsx" else pd.read_csv(path, skip_blank_lines=False, **kwargs)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, OSError, ImportError, zipfile.BadZipFile,
            zipfile.LargeZipFile, pd.errors.ParserError, EOFError, NotImplementedError, zipfile.zlib.error) as error:
        raise InputError(f"{path} cannot be read as a table ({type(error).__name__}: {str(error)[:100]})") from error
    filled = np.flatnonzero(sheet.notna().any(axis=1))
    if not len(filled):
        raise InputError(f"{path} holds no row")
    return sheet.iloc[:filled[-1] + 1]  # blank lines at the end are nothing


def check_rows(path, bad, what, first_row=2):
    """Raise InputError naming the sheet rows where the boolean array `bad` is true."""
    rows = np.flatnonzero(np.asarray(bad))
    if len(rows):
        shown = ", ".join(str(row + first_row) for row in rows[:5])
        raise InputError(f"{path}: {what} in {len(rows)} row(s), first in sheet row(s) {shown}")


def check_columns(path, sheet, columns):
    missing = [column for column in columns if column not in sheet.columns]
    doubled = [column for column in columns if f"{column}.1" in sheet.columns]  # pandas' name for a second one
    if missing or doubled:
        raise InputError(f"{path}: " + "; ".join(
            ([f"column(s) missing: {', '.join(missing)} (found: {', '.join(map(str, sheet.columns[:20]))})"] if missing else [])
            + ([f"column(s) twice: {', '.join(doubled)}"] if doubled else [])))


def check_zero_one(path, sheet, labels, first_row=2):
    """The label columns as float32 (n, L); InputError for anything but 0 and 1."""
    values = sheet[labels].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    for column, label in enumerate(labels):
        check_rows(path, ~np.isin(values[:, column], (0, 1)), f"label {label!r} other than 0 or 1", first_row)
    return values.astype(np.float32)


def check_names(path, names, what, first_row=2, unique=True):
    """A column of names as stripped strings; InputError for empty ones, and for doubled ones where `unique`."""
    check_rows(path, names.isna() | (names.astype(str).str.strip() == ""), f"empty {what}", first_row)
    names = names.astype(str).str.strip()
    # A table must not reach outside its own folder.
    check_rows(path, names.str.contains(r"(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^\.$|\0", regex=True), f"{what} that leaves the data folder", first_row)
    if unique:
        check_rows(path, names.duplicated(), f"doubled {what}", first_row)
    return names


def as_integers(path, values, what, allowed=None, first_row=2):
    """A column as int64; InputError for anything that is no whole number, or not in `allowed`."""
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (np.abs(numbers) >= 2**53)
    if allowed is not None:
        wrong |= ~np.isin(numbers, allowed)
    check_rows(path, wrong, f"{what} that is {'not one of ' + str(list(allowed)) if allowed is not None else 'no whole number'}", first_row)
    return numbers.astype(np.int64)


def make_table(ids, patients, files, given_part, targets):
    """A table as the top of this file describes; `targets` is a dict of columns."""
    return pd.DataFrame({"ID": ids, "patient": patients, "files": files, "given_part": given_part, **targets})


def read_odir(root, labels):
    """Official annotations.xlsx (one row per patient) or Kaggle's full_df.csv (one row per eye, folded to patients)."""
    path = root / "annotations.xlsx"
    if not path.exists() and (root / "full_df.csv").exists():
        path = root / "full_df.csv"
    sheet = read_sheet(path)
    columns = ["ID", "Left-Fundus", "Right-Fundus", *labels]
    check_columns(path, sheet, columns)
    ids = as_integers(path, sheet["ID"], "an ID")
    left = check_names(path, sheet["Left-Fundus"], "Left-Fundus", unique=False)
    right = check_names(path, sheet["Right-Fundus"], "Right-Fundus", unique=False)
    values = check_zero_one(path, sheet, labels)
    folder = root / "images"
    files = [(str(folder / a), str(folder / b)) for a, b in zip(left, right, strict=True)]
    table = make_table(ids, ids, files, "", dict(zip(labels, values.T, strict=True)))
    if path.suffix == ".csv":
        once = table.drop_duplicates()  # the two eyes of a patient repeat the same patient columns
        check_rows(path, once.duplicated("ID").reindex(table.index, fill_value=False), "a patient's eyes with different labels")
        table = once.sort_values("ID").reset_index(drop=True)  # the official order
    check_rows(path, table.duplicated("ID"), "doubled ID")
    empty = int((table[labels].sum(axis=1) == 0).sum())
    return table, labels, [f"{empty} patient(s) carry no label at all"] if empty else []


def find_files(folder, names):
    """Paths of `names` in `folder`, with or without one of SUFFIXES; a name without a file keeps its own path."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return [(str(folder / next((name + suffix for suffix in ("", *SUFFIXES, ".JPG", ".JPEG", ".PNG") if name + suffix in there),
                               name)),) for name in names]


def read_aptos(root, labels):
    """train.csv (id_code, diagnosis) with train_images/, or the ImageFolder layout {train,val,test}/<class>/."""
    path = root / "train.csv"
    if not path.exists() and (root / "train").is_dir():
        return read_image_folder(root)
    sheet = read_sheet(path, dtype={"id_code": str})
    check_columns(path, sheet, ["id_code", "diagnosis"])
    names = check_names(path, sheet["id_code"], "id_code")
    target = as_integers(path, sheet["diagnosis"], "a diagnosis", range(len(labels)))
    return make_table(names, names, find_files(root / "train_images", names), "", {"target": target}), labels, []


def read_image_folder(root):
    """{train,val,test}/<class>/picture: the classes are the folders' names, in sorted order."""
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    rows = []
    for part in PARTS:
        for folder in sorted((root / part).glob("*/")):
            if folder.name not in classes:
                raise InputError(f"{folder}: unknown class {folder.name!r}; {root / 'train'} has {', '.join(classes)}")
            rows += [(f"{part}/{folder.name}/{file.name}", (str(file),), part, classes.index(folder.name))
                     for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    if not rows:
        raise InputError(f"{root}: neither train.csv nor pictures in train/<class>/")
    ids, files, parts, target = zip(*rows, strict=True)
    return make_table(ids, ids, files, parts, {"target": target}), classes, []


def read_dr(root, labels):
    """trainLabels.csv (image, level), or the lab's headerless pairs train_img/train_label and test_img/test_label.

    The lab's test file is what its accuracies were measured on and its best epoch chosen by: it is our `val`.
    """
    folder = next((root / name for name in ("train", "images") if (root / name).is_dir()), root)
    path = root / "trainLabels.csv"
    if path.exists() or not (root / "train_img.csv").exists():
        sheet = read_sheet(path, dtype={"image": str})
        check_columns(path, sheet, ["image", "level"])
        names = check_names(path, sheet["image"], "image")
        target = as_integers(path, sheet["level"], "a level", range(len(labels)))
        return make_table(names, patients_of(names), find_files(folder, names), "", {"target": target}), labels, []
    tables = []
    for prefix, part in (("train", "train"), ("test", "val")):
        image_path, label_path = root / f"{prefix}_img.csv", root / f"{prefix}_label.csv"
        names = check_names(image_path, read_sheet(image_path, header=None, dtype=str).iloc[:, 0], "image", first_row=1)
        levels = as_integers(label_path, read_sheet(label_path, header=None).iloc[:, 0], "a level (the file has no header)",
                             range(len(labels)), first_row=1)
        if len(names) != len(levels):
            raise InputError(f"{image_path} has {len(names)} rows, {label_path} has {len(levels)}: they belong together row by row")
        own = root / prefix if (root / prefix).is_dir() else root
        tables.append(make_table(names, patients_of(names), find_files(own, names), part, {"target": levels}))
    table = pd.concat(tables, ignore_index=True)
    check_rows(root / "test_img.csv", table.ID.duplicated()[len(tables[0]):], "a picture that train_img.csv has too", 1)
    straddling = len(set(tables[0].patient) & set(tables[1].patient))
    return table, labels, [f"{straddling} patient(s) have one eye in the lab's training and one in its test part"] if straddling else []


def patients_of(names):
    """`10_left` and `10_right` (with or without a suffix or folder; OD, OS, l, r too) -> patient `10`; else the name."""
    return [re.sub(r"[_-](left|right|od|os|l|r)$", "", Path(name).name.removesuffix(Path(name).suffix), flags=re.IGNORECASE) for name in names]


def read_retina(root, labels):
    """train.csv: `filename`, then one 0/1 column per pathology; rows with none or several of `labels` are left out."""
    path = root / "train.csv"
    if len(labels) < 2:
        raise InputError(f"--labels {labels[0]}: retina pictures carry exactly one of the chosen labels, so name two or more")
    sheet = read_sheet(path, dtype={"filename": str})
    check_columns(path, sheet, ["filename", *labels])
    names = check_names(path, sheet["filename"], "filename")
    values = check_zero_one(path, sheet, labels)
    chosen = values.sum(1) == 1
    if not chosen.any():
        raise InputError(f"{path}: no row carries exactly one of {', '.join(labels)}")
    table = make_table(names, names, find_files(root / "train", names), "", {"target": values.argmax(1).astype(np.int64)})
    left_out = int((~chosen).sum())
    return (table[chosen].reset_index(drop=True), labels,
            [f"{left_out} row(s) carry none or several of the chosen labels and are left out"] if left_out else [])


def read_mrnet(root, labels):
    """{train,valid}-<label>.csv without header (id, label) and {train,valid}/<plane>/<four digits>.npy."""
    unknown = [label for label in labels if label not in DATASETS["mrnet"]["labels"]]
    if unknown:
        raise InputError(f"--labels: mrnet has {', '.join(DATASETS['mrnet']['labels'])}, not {', '.join(unknown)}")
    tables = []
    for source, part in (("train", "train"), ("valid", "val")):
        columns = {}
        for label in labels:
            path = root / f"{source}-{label}.csv"
            sheet = read_sheet(path, header=None)
            if sheet.shape[1] != 2:
                raise InputError(f"{path}: {sheet.shape[1]} columns; expected two (id, label) and no header")
            numbers = as_integers(path, sheet[0], "an exam id (the file has no header)", first_row=1)
            check_rows(path, pd.Series(numbers).duplicated(), "doubled exam id", 1)
            columns[label] = pd.Series(check_zero_one(path, sheet, [1], first_row=1)[:, 0], index=numbers)
        numbers = columns[labels[0]].index
        for label in labels[1:]:
            other = set(numbers) ^ set(columns[label].index)
            if other:
                raise InputError(f"{root}/{source}-{label}.csv and {source}-{labels[0]}.csv do not hold the same exams: "
                                 f"{len(other)} differ, first {sorted(other)[:5]}")
        names = [f"{number:04d}" for number in numbers]
        files = [tuple(str(root / source / plane / f"{name}.npy") for plane in PLANES) for name in names]
        ids = [f"{source}-{name}" for name in names]
        tables.append(make_table(ids, ids, files, part, {label: columns[label].reindex(numbers).to_numpy() for label in labels}))
    return pd.concat(tables, ignore_index=True), labels, []


READERS = {"odir": read_odir, "aptos": read_aptos, "dr": read_dr, "retina": read_retina, "mrnet": read_mrnet}


def targets_of(table, labels):
    """Targets of a table: float32 (n, L) for multi-label, int64 (n,) for multi-class."""
    if "target" in table:
        return table["target"].to_numpy(dtype=np.int64, copy=True)  # pandas hands out read-only views, torch wants its own
    return table[labels].to_numpy(dtype=np.float32, copy=True)


def unlabelled_pictures(root):
    """The retina set's pictures in test/, which carry no label."""
    return sorted(str(file) for file in (Path(root) / "test").glob("*") if file.suffix.lower() in SUFFIXES)


def add_pseudo_labels(table, labels, root, path, min_confidence):
    """Rows for unlabelled pictures from pseudo_labels.csv (filename, label, confidence) -> (table, number added)."""
    sheet = read_sheet(path, dtype={"filename": str, "label": str})
    check_columns(path, sheet, ["filename", "label", "confidence"])
    names = check_names(path, sheet["filename"], "filename")
    check_rows(path, ~sheet["label"].isin(labels), f"label that is not one of {labels}")
    check_rows(path, names.isin(table["ID"].astype(str)), "a picture that is labelled already")
    confidence = pd.to_numeric(sheet["confidence"], errors="coerce")
    check_rows(path, ~confidence.between(0, 1), "confidence outside 0 to 1")
    sure = (confidence >= min_confidence).to_numpy()
    target = sheet["label"].map(labels.index).to_numpy(dtype=np.int64)
    more = make_table(names, names, find_files(Path(root) / "test", names), "train", {"target": target})[sure]
    return pd.concat([table, more], ignore_index=True), int(sure.sum())


# ---------------------------------------------------------------- splitting

def split_patients(annotations, val_fraction=0.2, seed=42):
    """ODIR's published split: (train, val) data frames of `annotations` (one row per patient, column ID).

    Without the ten pre-treated patients, then scikit-learn's train_test_split: on the official 3 500 rows 2 792 / 698
    patients, validation beginning 296, 4308, 4556, 1710. Done before anything is dropped for a missing picture.
    """
    from sklearn.model_selection import train_test_split
    kept = annotations[~annotations["ID"].isin(PRETREATED)]
    if len(kept) < 2:
        raise InputError(f"{len(kept)} patient(s) cannot be split into a training and a validation part")
    return train_test_split(kept, test_size=val_fraction, random_state=seed)


def split_grouped(table, val, test, seed):
    """(train, val, test) by patient, stratified by a patient's highest grade; sizes in patients, shares of all."""
    from sklearn.model_selection import train_test_split
    grade = table.groupby("patient", sort=False)["target"].max()
    sizes = round(val * len(grade)), round(test * len(grade))
    if not sizes[0]:
        raise InputError(f"{len(grade)} patient(s) leave none for validation at a share of {val:.3g}: more pictures or a larger --val-fraction")
    rest, names = grade, []
    for size in sizes:
        taken = rest.iloc[:0]
        if size:
            try:
                rest, taken = train_test_split(rest, test_size=size, random_state=seed, stratify=rest)
            except ValueError as error:
                raise InputError(f"{len(grade)} patients cannot be split into parts of {sizes} with every class in each: {error} "
                                 "More pictures, or a larger --val-fraction") from error
        names.append(taken.index)
    return table[table.patient.isin(rest.index)], *(table[table.patient.isin(part)] for part in names)


def split(name, table, val=None, test=None, seed=42):
    """Split a table by patient -> {"train", "val", "test"}: data frames. A split given by the data set is kept.

    `val` and `test` are shares of the patients; None is the data set's published share.
    """
    given = table["given_part"]
    if (given != "").all():
        if val is not None or test:
            raise InputError(f"this {name} data set brings its own split: --val-fraction and --test-fraction do not apply")
        return {part: table[given == part] for part in PARTS}
    val = DATASETS[name]["val"] if val is None else val
    test = DATASETS[name]["test"] if test is None else test
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise InputError(f"--val-fraction {val} and --test-fraction {test}: expected shares that leave something for training")
    if name != "odir":
        return dict(zip(PARTS, split_grouped(table, val, test, seed), strict=True))
    train, validation = split_patients(table, val, seed)
    rest = train.iloc[:0]
    if test:  # cut from the training part, so that validation stays the published one
        from sklearn.model_selection import train_test_split
        train, rest = train_test_split(train, test_size=round(test * (len(train) + len(validation))), random_state=seed)
    return {"train": train, "val": validation, "test": rest}


def drop_missing(parts, missing):
    """Leave rows whose files are not there out of `parts` (missing="drop"), or stop -> (parts, number left out)."""
    folders = {}

    def there(file):
        folder, _, name = file.rpartition("/") if "/" in file else (".", "", Path(file).name)
        if folder not in folders:
            folders[folder] = {entry.name for entry in Path(folder).iterdir()} if Path(folder).is_dir() else set()
        return name in folders[folder]

    complete = {part: np.array([all(map(there, files)) for files in table["files"]], dtype=bool) for part, table in parts.items()}
    absent = [next(f for f in files if not there(f)) for part, table in parts.items() for files in table["files"][~complete[part]]]
    if absent and missing == "stop":
        names = ", ".join(absent[:5])
        raise InputError(f"{len(absent)} row(s) have no picture, the first: {names}. Complete the folder, or leave these "
                         "patients out with --missing drop")
    return {part: table[complete[part]] for part, table in parts.items()}, len(absent)


# ---------------------------------------------------------------- what stands in when there is no data

def is_rendered(root):
    """Whether `root` was drawn by render_data.py (its marker file says so)."""
    return (Path(root) / "rendered.json").exists()


def data_digest(parts, labels):
    """Digest of who is in which part with which targets: a resumed or tested run compares it."""
    return digest(*(json.dumps([part, [str(i) for i in table.ID], targets_of(table, labels).tolist()]) for part, table in parts.items()))
