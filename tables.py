"""The five data sets as people download them: their sheets and folders read, checked and put in order.

    table = tables.read("odir", "data/odir")  # table.frame: one row per patient, picture or exam

A frame has the columns ID, patient, files (a tuple of paths), given_part ("" where the split is ours to make)
and a 0/1 column per label, or `target`, a position in them. New data sets go into READERS and DATASETS."""

import dataclasses
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from errors import InputError, reading

ODIR_LABELS, GRADES = list("NDGCAHMO"), list("01234")
RETINA_LABELS = ["diabetic retinopathy", "glaucoma", "normal"]
PLANES = ["axial", "coronal", "sagittal"]
PARTS = ("train", "val", "test")
SPREAD_FROM = "trained on"  # source of the rows in pseudo_labels.csv that its labels come from
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

# Shares of val and test are the published ones; 0: no test part unless --test-fraction asks for one.
# "ordered": its classes are grades, so that it matters by how much an answer is wrong.
MULTILABEL = {"task": "multilabel", "val": 0.2, "test": 0.0, "ordered": False}
CLASSES = {"task": "multiclass", "family": "classes", "val": 0.2, "test": 0.0, "ordered": False}
DATASETS = {
    "odir": {**MULTILABEL, "labels": ODIR_LABELS, "family": "per label"},
    "aptos": {**CLASSES, "labels": GRADES, "ordered": True, "val": 733 / 3662, "test": 583 / 3662},
    "dr": {**CLASSES, "labels": GRADES, "ordered": True},
    "retina": {**CLASSES, "labels": RETINA_LABELS},
    "mrnet": {**MULTILABEL, "labels": ["abnormal", "acl", "meniscus"], "family": "auc"},
}
WORDS = dict.fromkeys(["aptos", "dr"], "none mild moderate severe proliferative".split())  # for people
WORDS["odir"] = "normal diabetes glaucoma cataract AMD hypertension myopia other".split()
APTOS_CLASSES = {"nodr": 0, "mild": 1, "moderate": 2, "severe": 3, "proliferativedr": 4, "proliferatedr": 4}

CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # a sheet of results cannot hold these
OUTSIDE = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^\.$|^[A-Za-z]:")  # leads out of the data folder
SUFFIX = re.compile(r"\.(?:png|jpe?g|tiff?|bmp)$", re.IGNORECASE)
SWAPPED = re.compile(r"[_-](?:right|od|r)\n.*[_-](?:left|os|l)$", re.IGNORECASE)
SIDE = re.compile(r"[_-](left|right|od|os|l|r)$", re.IGNORECASE)


@dataclasses.dataclass
class Table:
    """A data set as read. `notes`: sentences that a user should see; `ordered`: the classes are grades."""

    frame: pd.DataFrame
    labels: list
    notes: list = dataclasses.field(default_factory=list)
    ordered: bool = True


def read(name, root, labels=None):
    """Read data set `name` under `root` -> Table, by part, then by ID, whatever the order of the sheet."""
    root, known = Path(root), DATASETS[name]["labels"]
    if not root.is_dir():
        raise InputError(f"--data {root} is no folder: give the one that holds the {name} data set (README)")
    labels = list(labels or known)
    if name not in ("retina", "mrnet") and labels != known:
        raise InputError(f"--labels: {name} always has the labels {' '.join(known)}")
    table = READERS[name](root, labels)
    table.ordered = table.ordered and DATASETS[name]["ordered"]
    ids, parts = table.frame["ID"], table.frame["given_part"].map(("", *PARTS).index)
    padded = ids if pd.api.types.is_integer_dtype(ids) else ids.map(with_padded_digits)
    table.frame = table.frame.iloc[np.lexsort((ids, padded, parts))].reset_index(drop=True)
    if astride := (table.frame.groupby("patient")["given_part"].nunique() > 1).sum():
        table.notes.append(f"{astride} patient(s), by file name, are in several parts of the split it brings")
    return table


def with_padded_digits(name):
    """The name as it is sorted: 9_left before 10_left."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)


def full_names(name, labels):
    """Labels as people read them: ODIR's letters and the grades with their words."""
    if name not in WORDS or list(labels) != DATASETS[name]["labels"]:
        return list(labels)
    return [f"{label} {word}" for label, word in zip(labels, WORDS[name], strict=True)]


def targets_of(frame, labels):
    """Targets of a frame, copied: float32 (n, L) for multi-label, int64 (n,) for multi-class."""
    if "target" in frame:
        return frame["target"].to_numpy(dtype=np.int64, copy=True)
    return frame[labels].to_numpy(dtype=np.float32, copy=True)


def is_rendered(root):
    """Whether `root`, or a folder in it or of it, was drawn by render_data.py (its marker file says so)."""
    root = Path(root).parent if Path(root).is_file() else Path(root)
    folders = [root, *root.glob("*/")]
    folders += [folder.resolve().parent for folder in folders]  # of links to pictures elsewhere
    return any((folder / "rendered.json").exists() for folder in folders)


def plain_names(names):
    """Names without the suffix of a picture: `00000` and `00000.jpg` are one picture."""
    return [SUFFIX.sub("", name) for name in names]


def patients_of(names):
    """`10_left`, `10_right` (or OD, OS, l, r; with a folder and picture suffix or not) -> patient `10`."""
    stems = [name.replace("\\", "/").rpartition("/")[2] for name in plain_names(names)]
    return [SIDE.sub("", stem) for stem in stems]


def picture_frame(path, names, folder, target, given_part=""):
    """The frame of the photographs in `folder` that a sheet names, with a picture's suffix or without."""
    there = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = {SUFFIX.sub("", file): file for file in there}  # .png before .jpg before .jpeg
    found |= dict(zip(there, there, strict=True))
    frame = pd.DataFrame({"ID": names, "patient": patients_of(names)})
    frame["files"] = [(f"{folder}{os.sep}{found.get(name, name)}",) for name in names]
    check_rows(path, frame["files"].duplicated(), "a picture that a row above has too", names)
    return frame.assign(given_part=given_part, target=target)


def not_read(path, other):
    """The note on a file that gives way to `path`, which lies beside it."""
    return [f"{other} is not read: {path.name} lies beside it"] if path.exists() and other.exists() else []


def of_two_patients(names):
    """Whether pictures are, by their names, of different patients: 1_left.jpg and 2_right.jpg."""
    return all(map(SIDE.search, plain_names(names))) and len(set(patients_of(names))) > 1


def check_order(rows):
    """Of {where: files}: InputError where names tell another order or two exams; a note of two patients."""
    for where, files in rows.items():
        folders, stems = [Path(file).parent.name for file in files], [Path(file).stem for file in files]
        for planes, exams in ((folders, stems), (stems, folders)):  # axial/7.npy or 7/axial.npy
            if sorted(planes) == PLANES != planes:
                raise InputError(f"{where}: by their names in another order than {' '.join(PLANES)}")
            if planes == PLANES != exams and len(set(exams)) > 1:
                raise InputError(f"{where}: by their names planes of different exams")
        if SWAPPED.search("\n".join(plain_names(files))):
            raise InputError(f"{where}: by their names a right eye, then a left one. Give LEFT RIGHT")
    if mixed := [where for where, files in rows.items() if of_two_patients(files)]:
        print(f"note: by their names eyes of two patients in {len(mixed)} row(s), first {mixed[0]}")


def read_sheet(path, columns=(), header=0, dtype=None):
    """A .xlsx or .csv file that has these columns, without a header these alone; no blank rows at its end."""
    # An error instead of a warning: a row with more fields than names.
    with reading(path, "a table"), warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
        if Path(path).suffix.lower() == ".xlsx":
            sheet = pd.read_excel(path, header=header, dtype=dtype)  # of several sheets the first
        else:  # blank lines are kept, so that row numbers stay those of the file
            sheet = pd.read_csv(path, header=header, dtype=dtype, skip_blank_lines=False, index_col=False)
    filled = np.flatnonzero(sheet.notna().any(axis=1))
    if not len(filled):
        raise InputError(f"{path} holds no row")
    check_columns(path, sheet, columns)
    if header is None and sheet.shape[1] > len(columns):
        raise InputError(f"{path}: {sheet.shape[1]} columns; expected {len(columns)} and no header")
    sheet.index += 1 if header is None else 2
    return sheet.iloc[: filled[-1] + 1]


def check_columns(path, sheet, columns):
    """InputError where one of `columns` is missing or there twice."""
    if doubled := [column for column in columns if f"{column}.1" in sheet.columns]:  # pandas' second `name`
        raise InputError(f"{path}: column(s) twice: {', '.join(doubled)}")
    if missing := [str(column) for column in columns if column not in sheet.columns]:
        found = ", ".join(map(str, sheet.columns[:20]))
        raise InputError(f"{path}: column(s) missing: {', '.join(missing)} (found: {found})")


def check_rows(path, bad, what, values=None):
    """InputError naming the sheet rows where the boolean series `bad` is true, with their `values`."""
    rows = bad.index[bad]
    if len(rows):
        shown = [str(row) if values is None else f"{row} ({str(values[row])[:30]})" for row in rows[:5]]
        raise InputError(f"{path}: {what} in {len(rows)} row(s), first in sheet row(s) {', '.join(shown)}")


def check_zero_one(path, sheet, labels):
    """The label columns as float32 (n, L); InputError for anything but 0 and 1."""
    numbers = sheet[labels].apply(pd.to_numeric, errors="coerce")
    for label in labels:
        check_rows(path, ~numbers[label].isin([0, 1]), f"label {label!r} other than 0 or 1", sheet[label])
    return numbers.to_numpy(dtype=np.float32)


def check_names(path, names, what, unique=True, inside=True):
    """A column, stripped. InputError: empty, control characters, outside (`inside`) or doubled (`unique`)."""
    empty = names.isna()
    names = pd.Series([str(name).strip() for name in names.tolist()], names.index, dtype=object)
    check_rows(path, empty | (names == ""), f"empty {what}")
    check_rows(path, names.str.contains(CONTROL), f"control characters in {what}", names.map(ascii))
    check_rows(path, names.str.contains(OUTSIDE) & inside, f"{what} that leaves the data folder", names)
    if unique:
        check_rows(path, names.duplicated(), f"doubled {what}", names)
    return names


def as_integers(path, values, what, allowed=None):
    """A column as int64; InputError for anything that is no whole number, or not in `allowed`."""
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    if allowed is None:
        right, expected = (numbers == np.floor(numbers)) & (numbers.abs() < 2**53), "no whole number"
    else:
        right, expected = numbers.isin(allowed), f"not one of {list(allowed)}"
    check_rows(path, ~right, f"{what} that is {expected}", values)
    return numbers.astype(np.int64)


def read_odir(root, labels):
    """Official annotations.xlsx (one row per patient) or Kaggle's full_df.csv (one row per eye, folded)."""
    path, other = root / "annotations.xlsx", root / "full_df.csv"
    notes = not_read(path, other)
    if other.exists() and not notes:
        path = other
    eyes = ["Left-Fundus", "Right-Fundus"]
    sheet = read_sheet(path, ["ID", *eyes, *labels])
    ids = as_integers(path, sheet["ID"], "an ID")
    left, right = (check_names(path, sheet[eye], eye, unique=False).to_numpy() for eye in eyes)
    odd = 0  # eyes of two patients in a row, or of another one than it names
    for name, first, second in zip(ids.tolist(), left, right, strict=True):
        if first != f"{name}_left.jpg" or second != f"{name}_right.jpg":  # not as the official ones
            number = patients_of([first])[0]
            odd += of_two_patients([first, second]) or number.isdecimal() and int(number) != name
    if odd:
        notes.append(f"{odd} row(s) hold, by file name, eyes of two patients or of another than their ID")
    folder = f"{root / 'images'}{os.sep}"
    files = list(zip(folder + left, folder + right, strict=True))
    frame = pd.DataFrame({"ID": ids, "patient": ids, "files": files, "given_part": ""})
    frame[labels] = check_zero_one(path, sheet, labels)
    folded = frame.duplicated() & (path.suffix == ".csv")  # Kaggle's second eye repeats the patient's columns
    check_rows(path, frame["ID"].duplicated() & ~folded, "doubled ID, or different labels or file names")
    frame = frame[~folded]
    empty = int((frame[labels].sum(axis=1) == 0).sum())
    if empty:
        notes.append(f"{empty} patient(s) carry no label at all")
    return Table(frame, labels, notes)


def read_aptos(root, labels):
    """train.csv (id_code, diagnosis) with train_images/, or ImageFolder's {train,val,test}/<class>/."""
    path = root / "train.csv"
    if not path.exists() and (root / "train").is_dir():
        return read_image_folder(root)
    notes = not_read(path, root / "train")
    sheet = read_sheet(path, ["id_code", "diagnosis"], dtype={"id_code": str})
    names = check_names(path, sheet["id_code"], "id_code")
    target = as_integers(path, sheet["diagnosis"], "a diagnosis", range(len(labels)))
    return Table(picture_frame(path, names, root / "train_images", target), labels, notes)


def grade_of(name):
    """The grade that a class is named by: the one number in its name, or APTOS's word; otherwise None."""
    numbers = re.findall("[0-9]+", name)
    if len(numbers) == 1:
        return int(numbers[0])
    return APTOS_CLASSES.get(re.sub(r"[\s_-]", "", name.lower()))


def read_image_folder(root):
    """{train,val,test}/<class>/picture. The folders' names are the classes, by grade where they hold one."""
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    grades, notes, rows = {grade_of(name) for name in classes}, [], []
    graded = None not in grades and len(grades) == len(classes)
    if graded:
        classes.sort(key=grade_of)
    # A kappa with squared distances counts classes: of grades 0, 1 and 4 it would take the wrong ones.
    ordered = graded and max(grades) - min(grades) == len(grades) - 1
    if not ordered:
        notes.append(f"the classes {', '.join(classes)} are no row of grades: there is no quadratic kappa")
    if taken := {"ID", "predicted", "network", "note"}.intersection(classes):  # columns of sheets of results
        raise InputError(f"{root / 'train'}: no class may be called {', '.join(taken)}. Rename the folder")
    for file in sorted(file for part in PARTS for file in (root / part).glob("*/*")):
        part, name = file.parts[-3:-1]
        if name not in classes:
            raise InputError(f"{file.parent}: unknown class {name!r}; train/ has {', '.join(classes)}")
        if CONTROL.search(file.name):
            raise InputError(f"{file.parent}: control characters in {ascii(file.name)}. Rename this file")
        if file.suffix.lower() in SUFFIXES:
            rows.append((f"{part}/{name}/{file.name}", classes.index(name), part))
    if not rows:
        raise InputError(f"{root}: neither train.csv nor pictures in train/<class>/")
    ignored = sum(file.is_file() for part in PARTS for file in (root / part).rglob("[!.]*")) - len(rows)
    if ignored:
        notes.append(f"{ignored} file(s) are ignored: no {' '.join(SUFFIXES)} straight in a class's folder")
    names, target, parts = (pd.Series(values) for values in zip(*rows, strict=True))
    return Table(picture_frame(root, names, root, target, parts), classes, notes, ordered)


def read_dr(root, labels):
    """trainLabels.csv (image, level), or the lab's {train,test}_img.csv and _label.csv without header.
    The lab's test file, which measured its accuracies and chose its best epoch, is our `val`."""
    path, grades, frames = root / "trainLabels.csv", range(len(labels)), []
    notes = not_read(path, root / "train_img.csv")
    if path.exists() or not (root / "train_img.csv").exists():
        sheet = read_sheet(path, ["image", "level"], dtype={"image": str})
        names = check_names(path, sheet["image"], "image")
        target = as_integers(path, sheet["level"], "a level", grades)
        folder = next((root / name for name in ("train", "images") if (root / name).is_dir()), root)
        return Table(picture_frame(path, names, folder, target), labels, notes)
    for source, part in (("train", "train"), ("test", "val")):
        path, label_path = root / f"{source}_img.csv", root / f"{source}_label.csv"
        names = check_names(path, read_sheet(path, [0], header=None, dtype=str)[0], "image")
        levels = read_sheet(label_path, [0], header=None)[0]
        target = as_integers(label_path, levels, "a level (the file has no header)", grades)
        if len(names) != len(target):
            raise InputError(f"{path} has {len(names)} rows, {label_path} {len(target)}; expected as many")
        folder = root / source if (root / source).is_dir() else root
        frames.append(picture_frame(path, names, folder, target, part))
    train, test = frames
    shared = pd.Series(plain_names(test["ID"]), test.index).isin(plain_names(train["ID"]))
    check_rows(path, shared, "a picture that train_img.csv has too", test["ID"])
    return Table(pd.concat(frames), labels)


def read_retina(root, labels):
    """train.csv: `filename`, a 0/1 column per pathology. Only rows with exactly one of `labels` are taken."""
    path = root / "train.csv"
    if len(labels) < 2:
        raise InputError(f"--labels {labels[0]}: pictures carry one of the labels, so name two or more")
    sheet = read_sheet(path, ["filename", *labels], dtype={"filename": str})
    names = check_names(path, sheet["filename"], "filename")
    values = check_zero_one(path, sheet, labels)
    chosen = values.sum(axis=1) == 1
    if not chosen.any():
        raise InputError(f"{path}: no row carries exactly one of {', '.join(labels)}")
    frame = picture_frame(path, names, root / "train", values.argmax(axis=1))[chosen]
    left_out = f"{(~chosen).sum()} row(s) carry none or several of the chosen labels and are left out"
    return Table(frame, labels, [] if chosen.all() else [left_out])


def read_mrnet(root, labels):
    """{train,valid}-<label>.csv without header (id, label) and {train,valid}/<plane>/<four digits>.npy."""
    frames = []
    for source, part in (("train", "train"), ("valid", "val")):
        columns = {}
        for label in labels:
            path = root / f"{source}-{label}.csv"
            sheet = read_sheet(path, [0, 1], header=None)
            exams = as_integers(path, sheet[0], "an exam id (the file has no header)")
            check_rows(path, exams.duplicated(), "doubled exam id", exams)
            columns[label] = pd.Series(check_zero_one(path, sheet, [1])[:, 0], index=exams)
            if other := columns[labels[0]].index.symmetric_difference(exams)[:5].tolist():
                raise InputError(f"{path}, {source}-{labels[0]}.csv do not hold the same exams: {other}")
        frame = pd.DataFrame(columns)  # joined by exam
        names = [f"{exam:04d}" for exam in frame.index]
        files = [tuple(str(root / source / plane / f"{name}.npy") for plane in PLANES) for name in names]
        frame["ID"] = frame["patient"] = [f"{source}-{name}" for name in names]
        frames.append(frame.assign(files=files, given_part=part))
    return Table(pd.concat(frames), labels)


READERS = {"odir": read_odir, "aptos": read_aptos, "dr": read_dr, "retina": read_retina, "mrnet": read_mrnet}
GIVEN = {"odir": "eye pairs: LEFT RIGHT, a folder of <id>_left.* and <id>_right.*, or a CSV"}
GIVEN["mrnet"] = "knees: axial.npy coronal.npy sagittal.npy, their folder, one of axial/ and so on, or a CSV"


def given_rows(name, given):
    """Paths from a command line, as GIVEN says -> (frame with ID and files, whether they are many)."""
    wanted = GIVEN.get(name, "single photographs: pictures, a folder of pictures, or a CSV")
    paths, shown = [Path(path) for path in given], " ".join(map(str, given))
    ids = [paths[0].stem.removesuffix("_left")]
    if name == "mrnet" and len(paths) == 1 and (paths[0] / "axial.npy").exists():
        ids, paths = [paths[0].resolve().name], [paths[0] / f"{plane}.npy" for plane in PLANES]
    if len(paths) == 1 and paths[0].suffix.lower() in (".csv", ".xlsx"):
        return rows_of_sheet(name, paths[0]), True
    if len(paths) == 1 and paths[0].is_dir():
        rows = sorted(rows_of_folder(name, paths[0]), key=lambda row: with_padded_digits(row[0]))
        if not rows:
            raise InputError(f"{shown} holds nothing to predict. This network takes {wanted}")
        return pd.DataFrame(rows, columns=["ID", "files"]), True
    number = {"odir": 2, "mrnet": 3}.get(name, len(paths))
    if len(paths) != number or len(set(paths)) != number or any(path.is_dir() for path in paths):
        raise InputError(f"{shown}: this network takes {wanted}; no file twice")
    files = [tuple(map(str, paths))]
    if name in GIVEN:
        check_order({shown: files[0]})
    else:
        ids, files = [path.name for path in paths], [(str(path),) for path in paths]
        if len(set(ids)) < len(ids):
            ids = list(map(str, paths))
    return pd.DataFrame({"ID": ids, "files": files}), len(files) > 1


def rows_of_folder(name, folder):
    """[(ID, files)] of a folder. An eye or a plane that is missing keeps the name it should have."""
    if name == "mrnet":
        exams = {file.stem for plane in PLANES for file in (folder / plane).glob("*.npy")}
        return [(exam, tuple(str(folder / plane / f"{exam}.npy") for plane in PLANES)) for exam in exams]
    there = [file for file in folder.glob("[!.]*") if file.is_file()]
    files = [file for file in there if file.suffix.lower() in SUFFIXES]
    if name == "odir":
        files = [file for file in files if file.stem.lower().endswith(("_left", "_right"))]
    if len(files) < len(there):
        wanted = "<id>_left, <id>_right" if name == "odir" else " ".join(SUFFIXES)
        print(f"note: {len(there) - len(files)} file(s) in {folder} are ignored: they are no {wanted}")
    if name != "odir":
        return [(file.name, (str(file),)) for file in files]
    pairs = {}
    for file in files:
        patient, _, side = file.stem.rpartition("_")
        pair = pairs.setdefault(patient, {side: f"{folder / patient}_{side}.*" for side in ("left", "right")})
        if not pair[side.lower()].endswith("*"):
            raise InputError(f"{file} and {pair[side.lower()]}: two pictures of one eye")
        pair[side.lower()] = str(file)
    return [(patient, tuple(pair.values())) for patient, pair in pairs.items()]


def rows_of_sheet(name, path):
    """The rows of a CSV, its paths relative to it or, in the official layout, to images/ beside it."""
    sheet, folder = read_sheet(path, dtype=str), path.parent
    wanted = {"odir": ["Left-Fundus", "Right-Fundus"], "mrnet": PLANES}.get(name, ["file"])
    if name == "odir" and "LEFT" in sheet.columns:
        wanted = ["LEFT", "RIGHT"]
    check_columns(path, sheet, wanted)
    columns = [check_names(path, sheet[column], column, unique=False, inside=False) for column in wanted]
    ids = check_names(path, sheet["ID"] if "ID" in sheet.columns else columns[0], "ID", inside=False)
    if name == "odir" and (folder / "images").is_dir():
        if not any((folder / file).exists() for file in columns[0]):
            folder = folder / "images"
    files = [tuple(str(folder / file) for file in row) for row in zip(*columns, strict=True)]
    if name in GIVEN:
        check_order({f"{path}, sheet row {row}": pair for row, pair in zip(ids.index, files, strict=True)})
    return pd.DataFrame({"ID": ids.to_numpy(), "files": files})
