"""Tables as people download them: what is read, how it is split, and what every bad sheet is answered with."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import samplers  # noqa: E402
from dataset import GRADES, ODIR_LABELS, add_pseudo_labels, drop_missing, read, split, split_patients, targets_of  # noqa: E402
from errors import InputError  # noqa: E402

REAL = Path(os.environ.get("REAL_DATA", "absent"))
needs_real = pytest.mark.skipif(not (REAL / "odir").is_dir(), reason="REAL_DATA names no folder with odir/")
POS_WEIGHT = [2.0184, 2.0953, 14.4254, 15.8193, 20.9843, 36.7297, 18.3889, 2.6640]  # published


def odir_sheet(n=20):
    """An official sheet: patient i has label i % 8, every fourth one a second label."""
    rows = []
    for i in range(n):
        labels = [int(k == i % 8 or i % 4 == 3 and k == (i + 1) % 8) for k in range(8)]
        rows.append([i * 3, 50 + i, "Female", f"{i * 3}_left.jpg", f"{i * 3}_right.jpg", "cataract", "normal fundus", *labels])
    return pd.DataFrame(rows, columns=["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus", "Left-Diagnostic Keywords",
                                       "Right-Diagnostic Keywords", *ODIR_LABELS])


def kaggle(sheet):
    """full_df.csv as on Kaggle: first every patient's right eye, then the left ones, the patient's columns repeated."""
    eyes = []
    for side in ("Right", "Left"):
        eyes.append(sheet.assign(filepath="../input/" + sheet[f"{side}-Fundus"], labels="['N']", target="[1, 0, 0, 0, 0, 0, 0, 0]",
                                 filename=sheet[f"{side}-Fundus"]))
    return pd.concat(eyes)


def write(root, sheet, name="annotations.xlsx"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(sheet, str):
        path.write_text(sheet)
    elif path.suffix == ".xlsx":
        sheet.to_excel(path, index=False)
    else:
        sheet.to_csv(path, index=False)
    return root


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def refused(function, *words):
    """The message of the InputError that `function` must raise, with all of `words` in it."""
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


# ---------------------------------------------------------------- the published split

@needs_real
def test_published_split_and_weights():
    table, labels, notes = read("odir", REAL / "odir")
    parts = split("odir", table)
    assert len(table) == 3500 and labels == list("NDGCAHMO") and not notes
    assert [len(parts[part]) for part in ("train", "val", "test")] == [2792, 698, 0]
    assert parts["val"]["ID"].tolist()[:4] == [296, 4308, 4556, 1710]
    assert parts["val"][labels].sum().astype(int).tolist() == [214, 226, 34, 37, 37, 29, 30, 217]
    assert np.round(samplers.pos_weight(targets_of(parts["train"], labels)), 4) == pytest.approx(POS_WEIGHT, abs=1e-4)
    assert not set(dataset.PRETREATED) & (set(parts["train"]["ID"]) | set(parts["val"]["ID"]))
    # the bare function on the bare sheet, as its signature promises
    train, val = split_patients(pd.read_excel(REAL / "odir" / "annotations.xlsx"))
    assert train["ID"].tolist() == parts["train"]["ID"].tolist() and val["ID"].tolist() == parts["val"]["ID"].tolist()


@needs_real
def test_a_third_part_leaves_validation_as_it_is():
    table, _, _ = read("odir", REAL / "odir")
    plain, three = split("odir", table), split("odir", table, test=0.1)
    assert three["val"]["ID"].tolist() == plain["val"]["ID"].tolist()
    assert len(three["test"]) == 349 and len(three["train"]) == 2792 - 349
    assert set(three["train"]["ID"]) | set(three["test"]["ID"]) == set(plain["train"]["ID"])
    assert not set(three["train"]["ID"]) & set(three["test"]["ID"])


@needs_real
def test_kaggles_table_is_the_official_one(tmp_path):
    official = pd.read_excel(REAL / "odir" / "annotations.xlsx")
    folded, _, _ = read("odir", write(tmp_path, kaggle(official), "full_df.csv"))
    table, labels, _ = read("odir", write(tmp_path / "official", official))
    assert folded["ID"].tolist() == table["ID"].tolist()
    assert (targets_of(folded, labels) == targets_of(table, labels)).all()
    assert [[Path(f).name for f in files] for files in folded["files"]] == [[Path(f).name for f in files] for files in table["files"]]
    assert split("odir", folded)["val"]["ID"].tolist() == split("odir", table)["val"]["ID"].tolist()


def test_kaggles_single_eyes_still_make_a_patient(tmp_path):
    sheet = kaggle(odir_sheet(12)).iloc[5:]  # five right eyes were taken out, as the poor ones are on Kaggle
    table, _, _ = read("odir", write(tmp_path, sheet, "full_df.csv"))
    assert table["ID"].tolist() == odir_sheet(12)["ID"].tolist()
    assert targets_of(table, ODIR_LABELS).tolist() == odir_sheet(12)[ODIR_LABELS].to_numpy().tolist()


@needs_real
def test_the_split_does_not_depend_on_what_is_on_disk(tmp_path):
    here, labels, _ = read("odir", REAL / "odir")
    bare, _, _ = read("odir", write(tmp_path, pd.read_excel(REAL / "odir" / "annotations.xlsx")))
    parts, without = split("odir", here), split("odir", bare)
    assert all(parts[part]["ID"].tolist() == without[part]["ID"].tolist() for part in parts)
    kept, left_out = drop_missing(parts, "drop")
    assert left_out == 3490 - len(kept["train"]) - len(kept["val"]) and len(kept["val"]) == 399  # the README of the data says 399
    order = parts["val"]["ID"].tolist()
    assert kept["val"]["ID"].tolist() == [i for i in order if i in set(kept["val"]["ID"])]  # still the published order
    refused(lambda: drop_missing(parts, "stop"), f"{left_out} row(s)", "--missing drop", "_left.jpg")


def test_split_depends_on_seed_and_fraction():
    sheet = odir_sheet(50)
    a, b, c = (split_patients(sheet, *more)[1]["ID"].tolist() for more in ((0.2, 42), (0.2, 42), (0.2, 43)))
    assert a == b != c and len(a) == 10 and len(split_patients(sheet, 0.5)[1]) == 25
    refused(lambda: split_patients(sheet.iloc[:1]), "1 patient(s)")
    for val, test in ((0, 0), (1, 0), (0.5, 0.5), (-0.1, 0), (0.2, -0.1)):
        refused(lambda val=val, test=test: split("odir", sheet.assign(given_part=""), val, test), "leave something for training")


# ---------------------------------------------------------------- APTOS

def test_aptos_published_sizes_stratified(tmp_path):
    counts = [1805, 370, 999, 193, 295]  # the competition's 3 662 training rows
    grades = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts))
    root = write(tmp_path, pd.DataFrame({"id_code": [f"{i:012x}" for i in range(3662)], "diagnosis": grades}), "train.csv")
    table, labels, _ = read("aptos", root)
    parts = split("aptos", table)
    assert labels == GRADES and [len(parts[part]) for part in ("train", "val", "test")] == [2346, 733, 583]
    assert sorted(i for part in parts.values() for i in part["ID"]) == sorted(table["ID"])
    for part in parts.values():
        assert np.bincount(part["target"]) == pytest.approx(np.array(counts) * len(part) / 3662, abs=1.5)
    assert split("aptos", table)["val"]["ID"].tolist() == parts["val"]["ID"].tolist()
    assert split("aptos", table, seed=1)["val"]["ID"].tolist() != parts["val"]["ID"].tolist()


def test_aptos_finds_pictures_whatever_their_suffix(tmp_path):
    write(tmp_path, "id_code,diagnosis\n001,0\n002,1\n003.jpeg,2\nNone,3\n", "train.csv")
    touch(tmp_path / "train_images", "001.png", "002.jpg", "003.jpeg")
    refused(lambda: read("aptos", tmp_path), "empty id_code", "row(s) 5")  # pandas reads None as a missing value
    write(tmp_path, "id_code,diagnosis\n001,0\n002,1\n003.jpeg,2\n004,3\n", "train.csv")
    table, _, _ = read("aptos", tmp_path)
    assert table["ID"].tolist() == ["001", "002", "003.jpeg", "004"]  # leading zeros stay
    assert [Path(files[0]).name for files in table["files"]] == ["001.png", "002.jpg", "003.jpeg", "004"]
    refused(lambda: drop_missing({"train": table}, "stop"), "1 row(s)", "004")
    kept, left_out = drop_missing({"train": table}, "drop")
    assert left_out == 1 and kept["train"]["target"].tolist() == [0, 1, 2]
    write(tmp_path, "id_code,diagnosis\n001,0\n002,1\n", "train.csv")
    assert [Path(files[0]).name for files in read("aptos", tmp_path)[0]["files"]] == ["001.png", "002.jpg"]  # names, though they look like numbers


def test_image_folder(tmp_path):
    for part, names in (("train", "abc"), ("val", "ab"), ("test", "a")):
        for name in names:
            touch(tmp_path / part / name, "1.png", "2.JPG", "notes.txt")
    table, labels, _ = read("aptos", tmp_path)
    assert labels == ["a", "b", "c"] and len(table) == 12 and table["target"].tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0]
    parts = split("aptos", table)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [6, 4, 2]
    refused(lambda: split("aptos", table, val=0.3), "brings its own split")
    touch(tmp_path / "val" / "z", "1.png")
    refused(lambda: read("aptos", tmp_path), "unknown class 'z'", "a, b, c")


@pytest.mark.skipif(not (REAL / "idrid").is_dir(), reason="REAL_DATA names no folder with idrid/")
def test_idrid_in_aptos_form():
    table, _, _ = read("aptos", REAL / "idrid")
    assert len(table) == 413 and np.bincount(table["target"]).tolist() == [134, 20, 136, 74, 49]
    parts, left_out = drop_missing(split("aptos", table), "stop")
    assert left_out == 0 and sum(map(len, parts.values())) == 413 and min(map(len, parts.values())) == round(413 * 583 / 3662)


# ---------------------------------------------------------------- DR

def test_dr_keeps_both_eyes_of_a_patient_together(tmp_path):
    rng = np.random.default_rng(1)
    rows = [(f"{patient}_{eye}", rng.integers(5)) for patient in range(100) for eye in ("left", "right")]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    table, labels, _ = read("dr", write(tmp_path, pd.DataFrame(rows, columns=["image", "level"]), "trainLabels.csv"))
    parts = split("dr", table, test=0.1)
    patients = {part: set(rows["patient"]) for part, rows in parts.items()}
    assert [len(patients[part]) for part in ("train", "val", "test")] == [70, 20, 10]
    assert not patients["train"] & patients["val"] and not patients["train"] & patients["test"] and not patients["val"] & patients["test"]
    assert [len(part) for part in parts.values()] == [140, 40, 20] and labels == GRADES
    worst = table.groupby("patient")["target"].max()
    for names in patients.values():  # stratified by the worse eye
        assert np.bincount(worst[list(names)], minlength=5) == pytest.approx(np.bincount(worst, minlength=5) * len(names) / 100, abs=1.5)


def test_dr_looks_for_pictures_where_they_may_lie(tmp_path):
    write(tmp_path, "image,level\n10_left,0\n10_right,4\n", "trainLabels.csv")
    touch(tmp_path, "10_left.jpeg")
    assert [Path(files[0]).name for files in read("dr", tmp_path)[0]["files"]] == ["10_left.jpeg", "10_right"]
    touch(tmp_path / "train", "10_left.jpeg", "10_right.jpeg")
    assert [files[0] for files in read("dr", tmp_path)[0]["files"]] == [str(tmp_path / "train" / f"10_{eye}.jpeg") for eye in ("left", "right")]


def lab_files(root):
    write(root, "10_left.jpeg\n10_right.jpeg\n11_left.jpeg\n", "train_img.csv")
    write(root, "2\n0\n4\n", "train_label.csv")
    write(root, "11_right.jpeg\n12_left.jpeg\n", "test_img.csv")
    write(root, "1\n3\n", "test_label.csv")
    return root


def test_labs_headerless_pair_keeps_its_first_row(tmp_path):
    table, _, notes = read("dr", lab_files(tmp_path))
    assert table["ID"].tolist() == ["10_left.jpeg", "10_right.jpeg", "11_left.jpeg", "11_right.jpeg", "12_left.jpeg"]
    assert table["target"].tolist() == [2, 0, 4, 1, 3] and table["patient"].tolist() == ["10", "10", "11", "11", "12"]
    parts = split("dr", table)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [3, 2, 0]
    assert len(notes) == 1 and notes[0].startswith("1 patient(s)")  # patient 11 straddles the lab's own parts


@pytest.mark.parametrize("name, text, words", [
    ("train_label.csv", "level\n2\n0\n4\n", ["train_label.csv", "no header", "row(s) 1"]),
    ("train_label.csv", "2\n0\n", ["3 rows", "has 2", "row by row"]),
    ("train_label.csv", "2\n\n0\n4\n", ["train_label.csv", "row(s) 2"]),  # a blank line must not shift the rows
    ("train_label.csv", "2\n0\n5\n", ["train_label.csv", "row(s) 3"]),
    ("train_img.csv", "10_left.jpeg\n10_right.jpeg\n10_left.jpeg\n", ["train_img.csv", "doubled", "row(s) 3"]),
    ("test_img.csv", "12_left.jpeg\n10_left.jpeg\n", ["test_img.csv", "train_img.csv has too", "row(s) 2"]),
    ("train_img.csv", "", ["train_img.csv"]),
])
def test_labs_pair_read_wrongly(tmp_path, name, text, words):
    write(lab_files(tmp_path), text, name)
    refused(lambda: read("dr", tmp_path), *words)


# ---------------------------------------------------------------- retina

RETINA = ("filename,normal,diabetic retinopathy,glaucoma,cataract\n"
          "1.jpg,1,0,0,0\n2.jpg,0,1,0,0\n3.jpg,0,1,1,0\n4.jpg,0,0,1,0\n5.jpg,0,0,0,1\n6.jpg,1,0,0,0\n")


def test_retina_labels_are_chosen_and_the_rest_counted(tmp_path):
    write(tmp_path, RETINA, "train.csv")
    table, labels, notes = read("retina", tmp_path)
    assert labels == ["diabetic retinopathy", "glaucoma", "normal"]
    assert list(zip(table["ID"], table["target"], strict=True)) == [("1.jpg", 2), ("2.jpg", 0), ("4.jpg", 1), ("6.jpg", 2)]
    assert notes == ["2 row(s) carry none or several of the chosen labels and are left out"]
    table, labels, _ = read("retina", tmp_path, ["glaucoma", "normal"])
    assert list(zip(table["ID"], table["target"], strict=True)) == [("1.jpg", 1), ("3.jpg", 0), ("4.jpg", 0), ("6.jpg", 1)]
    refused(lambda: read("retina", tmp_path, ["glaucoma", "drusen"]), "missing: drusen", "cataract")
    refused(lambda: read("retina", write(tmp_path, RETINA.replace("5.jpg,0", "5.jpg,7"), "train.csv")), "'normal' other than 0 or 1", "row(s) 6")
    refused(lambda: read("retina", write(tmp_path, RETINA.replace("5.jpg", "4.jpg"), "train.csv")), "doubled filename", "row(s) 6")


def test_unlabelled_and_pseudo_labelled_pictures(tmp_path):
    write(tmp_path, RETINA, "train.csv")
    touch(tmp_path / "test", "b.png", "a.jpg", "readme.txt")
    assert [Path(file).name for file in dataset.unlabelled_pictures(tmp_path)] == ["a.jpg", "b.png"]
    table, labels, _ = read("retina", tmp_path)
    path = tmp_path / "pseudo_labels.csv"
    path.write_text("filename,label,confidence\na.jpg,normal,0.9\nb.png,glaucoma,0.4\n")
    more, added = add_pseudo_labels(table, labels, tmp_path, path, 0.4)
    assert added == 2 and more["target"].tolist() == [2, 0, 1, 2, 2, 1] and more["files"].iloc[-1] == (str(tmp_path / "test" / "b.png"),)
    more, added = add_pseudo_labels(table, labels, tmp_path, path, 0.5)
    assert added == 1 and more["ID"].tolist()[-1] == "a.jpg" and len(more) == len(table) + 1
    for text, words in (("filename,label,confidence\na.jpg,drusen,0.9\n", ["not one of", "row(s) 2"]),
                        ("filename,label,confidence\na.jpg,normal,1.5\n", ["confidence outside", "row(s) 2"]),
                        ("filename,label,confidence\na.jpg,normal,\n", ["confidence outside", "row(s) 2"]),
                        ("filename,label,confidence\na.jpg,normal,1\na.jpg,normal,1\n", ["doubled filename", "row(s) 3"]),
                        ("filename,label,confidence\n../train/1.jpg,normal,1\n", ["leaves the data folder", "row(s) 2"]),
                        ("filename,label\na.jpg,normal\n", ["missing: confidence"])):
        path.write_text(text)
        refused(lambda: add_pseudo_labels(table, labels, tmp_path, path, 0.0), *words)


# ---------------------------------------------------------------- MRNet

def knees(root):
    for source, ids in (("train", "0000 0001 0002"), ("valid", "1130 1131")):
        for k, label in enumerate(("abnormal", "acl", "meniscus")):
            write(root, "".join(f"{i},{(n + k) % 2}\n" for n, i in enumerate(ids.split())), f"{source}-{label}.csv")
        for plane in dataset.PLANES:
            touch(root / source / plane, *(f"{i}.npy" for i in ids.split()))
    return root


def test_mrnet(tmp_path):
    table, labels, _ = read("mrnet", knees(tmp_path))
    assert table["ID"].tolist() == ["train-0000", "train-0001", "train-0002", "valid-1130", "valid-1131"]  # the first row is data
    assert targets_of(table, labels).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert table["files"].iloc[1] == tuple(str(tmp_path / "train" / plane / "0001.npy") for plane in ("axial", "coronal", "sagittal"))
    parts, left_out = drop_missing(split("mrnet", table), "stop")
    assert left_out == 0 and [len(parts[part]) for part in ("train", "val", "test")] == [3, 2, 0]
    single, labels, _ = read("mrnet", tmp_path, ["acl"])
    assert labels == ["acl"] and targets_of(single, labels).tolist() == [[1], [0], [1], [1], [0]]
    refused(lambda: read("mrnet", tmp_path, ["acl", "tear"]), "not tear", "meniscus")
    (tmp_path / "train" / "coronal" / "0001.npy").unlink()  # a plane of an exam is missing
    refused(lambda: drop_missing(split("mrnet", table), "stop"), "1 row(s)", "coronal/0001.npy")
    assert drop_missing(split("mrnet", table), "drop")[1] == 1


@pytest.mark.parametrize("text, words", [
    ("id,label\n0000,1\n0001,0\n0002,1\n", ["no header", "row(s) 1"]),
    ("0000,1,0\n", ["3 columns"]),
    ("0000,1\n0001,2\n0002,1\n", ["other than 0 or 1", "row(s) 2"]),
    ("0000,1\n0000,1\n0002,1\n", ["doubled exam id", "row(s) 2"]),
    ("0000,1\n0001,0\n0003,1\n", ["do not hold the same exams", "[2, 3]"]),
])
def test_mrnet_bad_tables(tmp_path, text, words):
    write(knees(tmp_path), text, "train-acl.csv")
    refused(lambda: read("mrnet", tmp_path), "train-acl.csv", *words)


def test_mrnet_label_files_in_another_order(tmp_path):
    write(knees(tmp_path), "0002,1\n0000,1\n0001,0\n", "train-acl.csv")
    table, labels, _ = read("mrnet", tmp_path)
    assert table["acl"].tolist()[:3] == [1, 0, 1] and table["ID"].tolist()[0] == "train-0000"  # joined by id, not by row


# ---------------------------------------------------------------- bad sheets

def changed(column, row, value):
    sheet = odir_sheet().astype({column: object})
    sheet.loc[row, column] = value
    return sheet


@pytest.mark.parametrize("sheet, words", [
    (odir_sheet().drop(columns="G"), ["missing: G", "found: ID"]),
    (odir_sheet().drop(columns=["ID", "Left-Fundus"]), ["missing: ID, Left-Fundus"]),
    (changed("N", 2, 2), ["'N' other than 0 or 1", "row(s) 4"]),
    (changed("D", 0, 0.5), ["'D' other than 0 or 1", "row(s) 2"]),
    (changed("O", 19, None), ["'O' other than 0 or 1", "row(s) 21"]),
    (changed("H", 5, "yes"), ["'H' other than 0 or 1", "row(s) 7"]),
    (changed("ID", 3, 0), ["doubled ID", "row(s) 5"]),
    (changed("ID", 3, "nine"), ["ID that is no whole number", "row(s) 5"]),
    (changed("ID", 3, 1.5), ["ID that is no whole number", "row(s) 5"]),
    (changed("ID", 3, None), ["ID that is no whole number", "row(s) 5"]),
    (changed("ID", 3, "inf"), ["ID that is no whole number", "row(s) 5"]),
    (changed("Left-Fundus", 4, None), ["empty Left-Fundus", "row(s) 6"]),
    (changed("Right-Fundus", 4, "  "), ["empty Right-Fundus", "row(s) 6"]),
    (changed("Right-Fundus", 4, "../../secret.jpg"), ["leaves the data folder", "row(s) 6"]),
    (changed("Right-Fundus", 4, "/etc/passwd"), ["leaves the data folder", "row(s) 6"]),
    (odir_sheet().iloc[:0], ["holds no row"]),
])
def test_odir_bad_sheets(tmp_path, sheet, words):
    refused(lambda: read("odir", write(tmp_path, sheet)), "annotations.xlsx", *words)
    if "doubled ID" not in words and "Left-Fundus" in sheet:  # the same through Kaggle's file, where a sheet row is an eye
        refused(lambda: read("odir", write(tmp_path / "k", kaggle(sheet), "full_df.csv")), "full_df.csv", words[0])


def test_odir_ten_bad_rows_are_counted_and_five_named(tmp_path):
    sheet = odir_sheet().assign(A=9)
    message = refused(lambda: read("odir", write(tmp_path, sheet)), "in 20 row(s)")
    assert re.search(r"row\(s\) 2, 3, 4, 5, 6$", message)


def test_kaggles_eyes_that_disagree(tmp_path):
    sheet = kaggle(odir_sheet())
    sheet.iloc[25, sheet.columns.get_loc("N")] = 1 - sheet.iloc[25]["N"]
    refused(lambda: read("odir", write(tmp_path, sheet, "full_df.csv")), "different labels", "row(s) 27")


@pytest.mark.parametrize("name, dataset_name", [("annotations.xlsx", "odir"), ("train.csv", "aptos"), ("trainLabels.csv", "dr"),
                                                ("train.csv", "retina")])
def test_files_that_are_no_tables(tmp_path, name, dataset_name):
    refused(lambda: read(dataset_name, tmp_path / "nowhere"), "is no folder")
    refused(lambda: read(dataset_name, tmp_path), name, "is missing")
    for number, content in enumerate((b"", b"\x00\xff\x13\x88" * 100, b"PK\x03\x04 cut off", b"just words\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        refused(lambda folder=folder: read(dataset_name, folder), name)


@pytest.mark.parametrize("text, words", [
    ("id_code,diagnosis\na,0\nb,5\n", ["diagnosis", "not one of", "row(s) 3"]),
    ("id_code,diagnosis\na,0\nb,x\n", ["diagnosis", "row(s) 3"]),
    ("id_code,diagnosis\na,0\nb,1.5\n", ["diagnosis", "row(s) 3"]),
    ("id_code,diagnosis\na,0\na,1\n", ["doubled id_code", "row(s) 3"]),
    ("id_code,diagnosis\na,0\n\nb,7\n", ["row(s) 3"]),  # the blank line itself, by its own number
    ("id_code,diagnosis\na,0\nb,7\n\n\n", ["row(s) 3"]),  # blank lines at the end are nothing
    ("id_code;diagnosis\na;0\n", ["missing: id_code, diagnosis", "id_code;diagnosis"]),
    ("id_code,diagnosis,diagnosis\na,0,1\n", ["twice: diagnosis"]),
    ("id_code,diagnosis\n", ["holds no row"]),
])
def test_aptos_bad_tables(tmp_path, text, words):
    refused(lambda: read("aptos", write(tmp_path, text, "train.csv")), "train.csv", *words)


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_taken(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbfid_code,diagnosis\r\na,0\r\nb,1\r\n\r\n,\r\n")
    assert read("aptos", tmp_path)[0]["target"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["odir", "aptos", "dr"])
def test_labels_are_only_chosen_where_there_is_a_choice(tmp_path, name):
    write(tmp_path, "id_code,diagnosis\na,0\n", "train.csv")
    refused(lambda: read(name, tmp_path, list("abcde")), "--labels", "always has")


def test_too_few_of_a_class_to_split(tmp_path):
    write(tmp_path, "id_code,diagnosis\n" + "".join(f"{i},{int(i == 0)}\n" for i in range(30)), "train.csv")
    refused(lambda: split("aptos", read("aptos", tmp_path)[0]), "cannot be split", "every class")


# ---------------------------------------------------------------- at scale, and what a run is compared by

def test_a_hundred_thousand_rows(tmp_path):
    n = 100_000
    rng = np.random.default_rng(0)
    names = [f"{i // 2}_{('left', 'right')[i % 2]}" for i in range(n)]
    table, _, _ = read("dr", write(tmp_path, pd.DataFrame({"image": names, "level": rng.integers(5, size=n)}), "trainLabels.csv"))
    parts = split("dr", table)
    kept, left_out = drop_missing(parts, "drop")
    assert len(parts["val"]) == n // 5 and left_out == n and sum(map(len, kept.values())) == 0


def test_digest_changes_with_rows_labels_and_parts(tmp_path):
    table, labels, _ = read("odir", write(tmp_path, odir_sheet()))
    parts = split("odir", table)
    found = [dataset.data_digest(parts, labels), dataset.data_digest(split("odir", table, seed=1), labels),
             dataset.data_digest(split("odir", table, test=0.2), labels)]
    other = {part: rows.assign(N=1 - rows["N"]) for part, rows in parts.items()}
    assert len({*found, dataset.data_digest(other, labels)}) == 4
    assert dataset.data_digest(split("odir", table), labels) == found[0]


def test_rendered_folders_are_known_by_their_marker(tmp_path):
    assert not dataset.is_rendered(tmp_path)
    touch(tmp_path, "rendered.json")
    assert dataset.is_rendered(tmp_path)
