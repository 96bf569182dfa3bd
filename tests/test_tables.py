"""Tables as people download them: what is read, in which order, and what every bad sheet is answered with."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402
from errors import InputError  # noqa: E402
from split import add_pseudo_labels  # noqa: E402
from spread_labels import unlabelled_rows  # noqa: E402
from tables import (  # noqa: E402
    ODIR_LABELS,
    given_rows,
    read,
    targets_of,
)

REAL = Path(os.environ.get("REAL_DATA", "absent"))
needs_real = pytest.mark.skipif(not (REAL / "odir").is_dir(), reason="REAL_DATA names no folder with odir/")


def odir_sheet(n=20):
    """An official sheet: patient i has label i % 8, every fourth one a second label."""
    rows = []
    for i in range(n):
        labels = [int(k == i % 8 or i % 4 == 3 and k == (i + 1) % 8) for k in range(8)]
        rows.append(
            [
                i * 3,
                50 + i,
                "Female",
                f"{i * 3}_left.jpg",
                f"{i * 3}_right.jpg",
                "cataract",
                "normal fundus",
                *labels,
            ]
        )
    return pd.DataFrame(
        rows,
        columns=[
            "ID",
            "Patient Age",
            "Patient Sex",
            "Left-Fundus",
            "Right-Fundus",
            "Left-Diagnostic Keywords",
            "Right-Diagnostic Keywords",
            *ODIR_LABELS,
        ],
    )


def kaggle(sheet):
    """full_df.csv as on Kaggle: first every right eye, then every left one, the patient's columns in both."""
    eyes = []
    for side in ("Right", "Left"):
        eyes.append(
            sheet.assign(
                filepath="../input/" + sheet[f"{side}-Fundus"],
                labels="['N']",
                target="[1, 0, 0, 0, 0, 0, 0, 0]",
                filename=sheet[f"{side}-Fundus"],
            )
        )
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


def read_three(*arguments):
    table = read(*arguments)
    return table.frame, table.labels, table.notes


def refused(function, *words):
    """The message of the InputError that `function` must raise, with all of `words` in it."""
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def test_kaggles_single_eyes_still_make_a_patient(tmp_path):
    sheet = kaggle(odir_sheet(12)).iloc[5:]  # five right eyes were taken out, as the poor ones are on Kaggle
    table, _, _ = read_three("odir", write(tmp_path, sheet, "full_df.csv"))
    assert table["ID"].tolist() == odir_sheet(12)["ID"].tolist()
    assert targets_of(table, ODIR_LABELS).tolist() == odir_sheet(12)[ODIR_LABELS].to_numpy().tolist()
    assert not any("not read" in note for note in read("odir", tmp_path).notes)
    write(tmp_path, odir_sheet(12), "annotations.xlsx")
    assert any("full_df.csv is not read" in note for note in read("odir", tmp_path).notes)


def test_rows_of_mixed_eyes_or_ids_are_named(tmp_path):
    """A column that slipped by one row, or IDs sorted alone: the split would tear people apart."""
    sheet = odir_sheet(12)
    write(tmp_path, sheet, "annotations.xlsx")
    assert not read("odir", tmp_path).notes
    for column in ("Right-Fundus", "ID"):
        slipped = sheet.assign(**{column: sheet[column].to_numpy()[[1, 0, *range(2, 12)]]})
        write(tmp_path, slipped, "annotations.xlsx")
        assert any(note.startswith("2 row(s) hold, by file name") for note in read("odir", tmp_path).notes)


def test_the_first_of_several_sheets_is_read_and_the_lab_s_files_give_way(tmp_path):
    with pd.ExcelWriter(tmp_path / "annotations.xlsx") as book:
        for name, count in (("new", 12), ("old", 20)):
            odir_sheet(count).to_excel(book, sheet_name=name, index=False)
    assert len(read("odir", tmp_path).frame) == 12
    write(tmp_path, "image,level\n10_left,0\n10_right,4\n", "trainLabels.csv")
    write(tmp_path, "10_left\n", "train_img.csv")
    assert any("train_img.csv is not read" in note for note in read("dr", tmp_path).notes)
    write(tmp_path, "id_code,diagnosis\na,0\nb,4\n", "train.csv")
    (tmp_path / "train").mkdir()
    assert any("train is not read" in note for note in read("aptos", tmp_path).notes)


# ---------------------------------------------------------------- DR


def test_dr_looks_for_pictures_where_they_may_lie(tmp_path):
    write(tmp_path, "image,level\n10_left,0\n10_right,4\n", "trainLabels.csv")
    touch(tmp_path, "10_left.jpeg")
    assert [Path(files[0]).name for files in read("dr", tmp_path).frame["files"]] == [
        "10_left.jpeg",
        "10_right",
    ]
    touch(tmp_path / "train", "10_left.jpeg", "10_right.jpeg")
    assert [files[0] for files in read("dr", tmp_path).frame["files"]] == [
        str(tmp_path / "train" / f"10_{eye}.jpeg") for eye in ("left", "right")
    ]


def lab_files(root):
    write(root, "10_left.jpeg\n10_right.jpeg\n11_left.jpeg\n", "train_img.csv")
    write(root, "2\n0\n4\n", "train_label.csv")
    write(root, "11_right.jpeg\n12_left.jpeg\n", "test_img.csv")
    write(root, "1\n3\n", "test_label.csv")
    return root


def test_labs_headerless_pair_keeps_its_first_row(tmp_path):
    table, _, notes = read_three("dr", lab_files(tmp_path))
    assert table["ID"].tolist() == [
        "10_left.jpeg",
        "10_right.jpeg",
        "11_left.jpeg",
        "11_right.jpeg",
        "12_left.jpeg",
    ]
    assert table["target"].tolist() == [2, 0, 4, 1, 3] and table["patient"].tolist() == [
        "10",
        "10",
        "11",
        "11",
        "12",
    ]
    assert table["given_part"].tolist() == ["train"] * 3 + ["val"] * 2
    assert len(notes) == 1 and notes[0].startswith("1 patient(s)")  # patient 11 straddles the lab's own parts


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("train_label.csv", "level\n2\n0\n4\n", ["train_label.csv", "no header", "row(s) 1"]),
        ("train_label.csv", "2\n0\n", ["3 rows", "csv 2;", "as many"]),
        (
            "train_label.csv",
            "2\n\n0\n4\n",
            ["train_label.csv", "row(s) 2"],
        ),  # a blank line must not shift the rows
        ("train_label.csv", "2\n0\n5\n", ["train_label.csv", "row(s) 3"]),
        (
            "train_img.csv",
            "10_left.jpeg\n10_right.jpeg\n10_left.jpeg\n",
            ["train_img.csv", "doubled", "row(s) 3"],
        ),
        (
            "test_img.csv",
            "12_left.jpeg\n10_left.jpeg\n",
            ["test_img.csv", "train_img.csv has too", "row(s) 2"],
        ),
        ("train_img.csv", "", ["train_img.csv"]),
    ],
)
def test_labs_pair_read_wrongly(tmp_path, name, text, words):
    write(lab_files(tmp_path), text, name)
    refused(lambda: read("dr", tmp_path), *words)


# ---------------------------------------------------------------- retina

RETINA = (
    "filename,normal,diabetic retinopathy,glaucoma,cataract\n"
    "1.jpg,1,0,0,0\n2.jpg,0,1,0,0\n3.jpg,0,1,1,0\n4.jpg,0,0,1,0\n5.jpg,0,0,0,1\n6.jpg,1,0,0,0\n"
)


def test_retina_labels_are_chosen_and_the_rest_counted(tmp_path):
    write(tmp_path, RETINA, "train.csv")
    table, labels, notes = read_three("retina", tmp_path)
    assert labels == ["diabetic retinopathy", "glaucoma", "normal"]
    assert list(zip(table["ID"], table["target"], strict=True)) == [
        ("1.jpg", 2),
        ("2.jpg", 0),
        ("4.jpg", 1),
        ("6.jpg", 2),
    ]
    assert notes == ["2 row(s) carry none or several of the chosen labels and are left out"]
    table, labels, _ = read_three("retina", tmp_path, ["glaucoma", "normal"])
    assert list(zip(table["ID"], table["target"], strict=True)) == [
        ("1.jpg", 1),
        ("3.jpg", 0),
        ("4.jpg", 0),
        ("6.jpg", 1),
    ]
    refused(lambda: read("retina", tmp_path, ["glaucoma", "drusen"]), "missing: drusen", "cataract")
    refused(
        lambda: read("retina", write(tmp_path, RETINA.replace("5.jpg,0", "5.jpg,7"), "train.csv")),
        "'normal' other than 0 or 1",
        "row(s) 6",
    )
    refused(
        lambda: read("retina", write(tmp_path, RETINA.replace("5.jpg", "4.jpg"), "train.csv")),
        "doubled filename",
        "row(s) 6",
    )


def test_unlabelled_and_pseudo_labelled_pictures(tmp_path):
    write(tmp_path, RETINA, "train.csv")
    touch(tmp_path / "test", "b.png", "a.jpg", "readme.txt")
    net = SimpleNamespace(labels=None, saved={"rows": {"val": [], "test": []}})
    assert unlabelled_rows(net, tmp_path)["ID"].tolist() == ["a.jpg", "b.png"]
    data = read("retina", tmp_path)
    table = data.frame
    parts = {"train": table, "val": table[:0], "test": table[:0]}
    path = tmp_path / "pseudo_labels.csv"
    path.write_text("filename,label,confidence\na.jpg,normal,0.9\nb.png,glaucoma,0.4\n")
    more = add_pseudo_labels(parts, data, tmp_path, path, 0.4)
    assert data.notes[-2].endswith("does not say whose pictures its labels were spread from")
    # Filtered by confidence, it has lost the rows that it was spread from.
    whole = "filename,label,confidence,source\na.jpg,normal,0.9,spread\n1.jpg,,,trained on\n"
    for text, told in ((whole, False), (whole.replace("1.jpg,,,trained on\n", ""), True)):
        path.write_text(text)
        add_pseudo_labels(parts, data, tmp_path, path, 0.4)
        assert data.notes[-2].endswith("does not say whose pictures its labels were spread from") is told
    path.write_text("filename,label,confidence\na.jpg,normal,0.9\nb.png,glaucoma,0.4\n")
    add_pseudo_labels(parts, data, tmp_path, path, 0.4)
    assert data.notes[-1].startswith("2 pseudo-labelled")
    assert more["target"].tolist() == [2, 0, 1, 2, 2, 1] and more["files"].iloc[-1] == (
        str(tmp_path / "test" / "b.png"),
    )
    more = add_pseudo_labels(parts, data, tmp_path, path, 0.5)
    assert more["ID"].tolist()[-1] == "a.jpg" and len(more) == len(table) + 1
    for text, words in (
        ("filename,label,confidence\na.jpg,drusen,0.9\n", ["not one of", "row(s) 2"]),
        ("filename,label,confidence\na.jpg,normal,1.5\n", ["confidence outside", "row(s) 2"]),
        ("filename,label,confidence\na.jpg,normal,\n", ["confidence outside", "row(s) 2"]),
        ("filename,label,confidence\na.jpg,normal,1\na.jpg,normal,1\n", ["doubled filename", "row(s) 3"]),
        ("filename,label,confidence\n../train/1.jpg,normal,1\n", ["leaves the data folder", "row(s) 2"]),
        ("filename,label\na.jpg,normal\n", ["missing: confidence"]),
    ):
        path.write_text(text)
        refused(lambda: add_pseudo_labels(parts, data, tmp_path, path, 0.0), *words)


# ---------------------------------------------------------------- MRNet


def knees(root):
    for source, ids in (("train", "0000 0001 0002"), ("valid", "1130 1131")):
        for k, label in enumerate(("abnormal", "acl", "meniscus")):
            write(
                root,
                "".join(f"{i},{(n + k) % 2}\n" for n, i in enumerate(ids.split())),
                f"{source}-{label}.csv",
            )
        for plane in tables.PLANES:
            touch(root / source / plane, *(f"{i}.npy" for i in ids.split()))
    return root


def test_mrnet(tmp_path):
    table, labels, _ = read_three("mrnet", knees(tmp_path))
    assert table["ID"].tolist() == [
        "train-0000",
        "train-0001",
        "train-0002",
        "valid-1130",
        "valid-1131",
    ]  # the first row is data
    assert targets_of(table, labels).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert table["files"].iloc[1] == tuple(
        str(tmp_path / "train" / plane / "0001.npy") for plane in ("axial", "coronal", "sagittal")
    )
    assert table["given_part"].tolist() == ["train"] * 3 + ["val"] * 2
    single, labels, _ = read_three("mrnet", tmp_path, ["acl"])
    assert labels == ["acl"] and targets_of(single, labels).tolist() == [[1], [0], [1], [1], [0]]
    refused(lambda: read("mrnet", tmp_path, ["acl", "tear"]), "train-tear.csv is missing")


@pytest.mark.parametrize(
    "text, words",
    [
        ("id,label\n0000,1\n0001,0\n0002,1\n", ["no header", "row(s) 1"]),
        ("0000\n", ["column(s) missing: 1"]),
        ("0000,1\n0001,2\n0002,1\n", ["other than 0 or 1", "row(s) 2"]),
        ("0000,1\n0000,1\n0002,1\n", ["doubled exam id", "row(s) 2"]),
        ("0000,1\n0001,0\n0003,1\n", ["do not hold the same exams", "[2, 3]"]),
    ],
)
def test_mrnet_bad_tables(tmp_path, text, words):
    write(knees(tmp_path), text, "train-acl.csv")
    refused(lambda: read("mrnet", tmp_path), "train-acl.csv", *words)


def test_mrnet_label_files_in_another_order(tmp_path):
    write(knees(tmp_path), "0002,1\n0000,1\n0001,0\n", "train-acl.csv")
    table, labels, _ = read_three("mrnet", tmp_path)
    assert (
        table["acl"].tolist()[:3] == [1, 0, 1] and table["ID"].tolist()[0] == "train-0000"
    )  # joined by id, not by row


# ---------------------------------------------------------------- bad sheets


def changed(column, row, value):
    sheet = odir_sheet().astype({column: object})
    sheet.loc[row, column] = value
    return sheet


@pytest.mark.parametrize(
    "sheet, words",
    [
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
    ],
)
def test_odir_bad_sheets(tmp_path, sheet, words):
    refused(lambda: read("odir", write(tmp_path, sheet)), "annotations.xlsx", *words)
    if (
        "doubled ID" not in words and "Left-Fundus" in sheet
    ):  # the same through Kaggle's file, where a sheet row is an eye
        refused(
            lambda: read("odir", write(tmp_path / "k", kaggle(sheet), "full_df.csv")), "full_df.csv", words[0]
        )


def test_odir_ten_bad_rows_are_counted_and_five_named(tmp_path):
    sheet = odir_sheet().assign(A=9)
    message = refused(lambda: read("odir", write(tmp_path, sheet)), "in 20 row(s)")
    assert re.search(r"row\(s\) 2 \(9\), 3 \(9\), 4 \(9\), 5 \(9\), 6 \(9\)$", message)


def test_kaggles_eyes_that_disagree(tmp_path):
    sheet = kaggle(odir_sheet())
    sheet.iloc[25, sheet.columns.get_loc("N")] = 1 - sheet.iloc[25]["N"]
    refused(lambda: read("odir", write(tmp_path, sheet, "full_df.csv")), "different labels", "row(s) 27")


@pytest.mark.parametrize(
    "name, dataset_name",
    [
        ("annotations.xlsx", "odir"),
        ("train.csv", "aptos"),
        ("trainLabels.csv", "dr"),
        ("train.csv", "retina"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, dataset_name):
    refused(lambda: read(dataset_name, tmp_path / "nowhere"), "is no folder")
    refused(lambda: read(dataset_name, tmp_path), name, "is missing")
    for number, content in enumerate(
        (b"", b"\x00\xff\x13\x88" * 100, b"PK\x03\x04 cut off", b"just words\n")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        refused(lambda folder=folder: read(dataset_name, folder), name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("id_code,diagnosis\na,0\nb,5\n", ["diagnosis", "not one of", "row(s) 3"]),
        ("id_code,diagnosis\na,0\nb,x\n", ["diagnosis", "row(s) 3"]),
        ("id_code,diagnosis\na,0\nb,1.5\n", ["diagnosis", "row(s) 3"]),
        ("id_code,diagnosis\na,0\na,1\n", ["doubled id_code", "row(s) 3"]),
        ("id_code,diagnosis\na,0\n\nb,7\n", ["row(s) 3"]),  # the blank line itself, by its own number
        ("id_code,diagnosis\na,0\nb,7\n\n\n", ["row(s) 3"]),  # blank lines at the end are nothing
        ("id_code;diagnosis\na;0\n", ["missing: id_code, diagnosis", "id_code;diagnosis"]),
        ("id_code,diagnosis,diagnosis\na,0,1\n", ["twice: diagnosis"]),
        ("id_code,diagnosis\n", ["holds no row"]),
    ],
)
def test_aptos_bad_tables(tmp_path, text, words):
    refused(lambda: read("aptos", write(tmp_path, text, "train.csv")), "train.csv", *words)


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_taken(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbfid_code,diagnosis\r\na,0\r\nb,1\r\n\r\n,\r\n")
    assert read("aptos", tmp_path).frame["target"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["odir", "aptos", "dr"])
def test_labels_are_only_chosen_where_there_is_a_choice(tmp_path, name):
    write(tmp_path, "id_code,diagnosis\na,0\n", "train.csv")
    refused(lambda: read(name, tmp_path, list("abcde")), "--labels", "always has")


def test_rendered_folders_are_known_by_their_marker(tmp_path):
    assert not tables.is_rendered(tmp_path)
    touch(tmp_path, "rendered.json")
    assert tables.is_rendered(tmp_path)


# ---------------------------------------------------------------- one rule for patients of photographs


def graded(root, names, dataset_name="aptos"):
    """The sheet of a data set of photographs with these names, their classes 0, 1, 0, 1 and so on."""
    classes = [i % 2 for i in range(len(names))]
    if dataset_name == "retina":
        other = [1 - k for k in classes]
        sheet = pd.DataFrame(
            {"filename": names, "glaucoma": classes, "normal": other, "diabetic retinopathy": 0}
        )
        return write(root, sheet, "train.csv")
    columns = {"aptos": ["id_code", "diagnosis"], "dr": ["image", "level"]}[dataset_name]
    sheet = pd.DataFrame({columns[0]: names, columns[1]: classes})
    return write(root, sheet, "train.csv" if dataset_name == "aptos" else "trainLabels.csv")


@pytest.mark.parametrize("name", ["aptos", "dr", "retina"])
def test_both_eyes_belong_to_one_patient(tmp_path, name):
    names = [
        "7_left",
        "7_right.jpg",
        "8-OD.PNG",
        "8-os",
        "9_l",
        "9_R.tiff",
        "IMG.001_left",
        "IMG.002_left",
        "x.y",
    ]
    frame = read(name, graded(tmp_path, names, name)).frame
    patients = dict(zip(frame["ID"], frame["patient"], strict=True))
    assert [patients[i] for i in names] == ["7", "7", "8", "8", "9", "9", "IMG.001", "IMG.002", "x.y"]


def test_image_folders_have_patients_and_say_where_their_split_divides_one(tmp_path):
    touch(tmp_path / "train" / "0", "7_left.png", "8_left.png")
    touch(tmp_path / "train" / "1", "8_right.png")
    touch(tmp_path / "val" / "0", "7_right.png")
    table = read("aptos", tmp_path)
    assert table.frame["patient"].tolist() == ["7", "8", "8", "7"]
    assert len(table.notes) == 1 and table.notes[0].startswith(
        "1 patient(s), by file name, are in several parts"
    )


def test_two_names_of_one_picture_are_refused(tmp_path):
    touch(tmp_path / "train_images", "1.jpg", "2.jpg")
    refused(
        lambda: read("aptos", graded(tmp_path, ["1", "2", "1.jpg"])),
        "a row above has too",
        "row(s) 4 (1.jpg)",
    )
    assert len(read("aptos", graded(tmp_path, ["1", "2.jpg"])).frame) == 2


def test_no_labelled_picture_comes_back_with_a_pseudo_label(tmp_path):
    names = [f"{i:05d}" for i in range(15)]
    frame = read("retina", graded(tmp_path, names, "retina")).frame
    parts = {"train": frame[:10], "val": frame[10:13], "test": frame[13:]}
    table = tables.Table(frame, tables.DATASETS["retina"]["labels"])
    path = tmp_path / "pseudo_labels.csv"
    touch(tmp_path / "test", *(f"{name}.jpg" for name in names))

    def add(*files):
        path.write_text("filename,label,confidence\n" + "".join(f"{file},normal,0.9\n" for file in files))
        return add_pseudo_labels(parts, table, tmp_path, path, 0.5)

    message = refused(lambda: add(*(f"{name}.jpg" for name in names)), "labelled already in 15 row(s)")
    assert "2 (00000.jpg)" in message
    for name in ("00000.jpg", "00011.JPEG", "00014"):  # of training, validation and test
        refused(lambda name=name: add("new.jpg", name), "labelled already", f"row(s) 3 ({name})")
    for name in ("00010_left.jpg", "00013_right.jpg"):
        refused(lambda name=name: add(name), "patient of validation or test", f"row(s) 2 ({name})")
    more = add("00003_right.jpg", "new.jpg")  # the other eye of a training patient helps
    assert more["ID"].tolist() == [*names[:10], "00003_right.jpg", "new.jpg"]
    assert more["patient"].tolist()[-2:] == ["00003", "new"] and set(more["given_part"][-2:]) == {"train"}
    touch(tmp_path / "test", "new.jpg")
    refused(lambda: add("new", "new.jpg"), "a row above has too", "row(s) 3 (new.jpg)")


# ---------------------------------------------------------------- classes and their order


@pytest.mark.parametrize(
    "folders, labels",
    [
        (["10", "9", "8"], ["8", "9", "10"]),
        (["grade 1", "grade 0", "grade 2"], ["grade 0", "grade 1", "grade 2"]),
        (
            ["Mild", "Moderate", "No_DR", "Proliferate_DR", "Severe"],
            ["No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"],
        ),
        (["severe", "moderate", "proliferative-dr"], ["moderate", "severe", "proliferative-dr"]),
    ],
)
def test_grades_are_put_in_their_order(tmp_path, folders, labels):
    for name in folders:
        touch(tmp_path / "train" / name, "a.png" if name == labels[0] else "b.png")
    table = read("aptos", tmp_path)
    assert table.labels == labels and table.ordered and "quadratic" not in str(table.notes)
    assert table.frame.set_index("ID")["target"].to_dict() == {
        f"train/{name}/{'b.png' if k else 'a.png'}": k for k, name in enumerate(labels)
    }


def test_grades_with_a_gap_have_no_quadratic_kappa(tmp_path):
    """Its squared distances would be those of positions: 0, 1, 2 instead of 0, 1, 4."""
    for name in ("grade4", "grade0", "grade1"):
        touch(tmp_path / "train" / name, f"{name}.png")
    table = read("aptos", tmp_path)
    assert table.labels == ["grade0", "grade1", "grade4"] and not table.ordered
    assert "no quadratic kappa" in table.notes[0]


@pytest.mark.parametrize("name", ["ID", "predicted", "network", "note"])
def test_a_class_is_no_column_of_the_results(tmp_path, name):
    for folder in (name, "other"):
        touch(tmp_path / "train" / folder, f"{folder}.png")
    refused(lambda: read("aptos", tmp_path), name, "Rename the folder")


def test_labels_spread_from_pictures_that_are_held_out_here_are_refused(tmp_path):
    root, csv = tmp_path / "data", tmp_path / "run/pseudo_labels.csv"
    touch(root / "test", "new.jpg")
    csv.parent.mkdir()
    part = pd.DataFrame({"ID": ["1.jpg", "2.jpg"], "patient": ["1", "2"]})
    parts = {"train": part[:0], "val": part[:1], "test": part[1:]}

    table = tables.Table(part, ["glaucoma", "normal"])

    def add(*origin):
        rows = ["filename,label,confidence,source", "new.jpg,glaucoma,0.9,spread"]
        csv.write_text("\n".join(rows + [f"{name},,,{tables.SPREAD_FROM}" for name in origin]))
        return add_pseudo_labels(parts, table, root, csv, 0)["ID"].tolist()

    assert add("3.jpg") == ["new.jpg"]
    assert not any("whose pictures" in note for note in table.notes)
    for leaked in ("1.jpg", "2_left.jpg"):
        refused(
            lambda leaked=leaked: add("3.jpg", leaked), "spread from a patient of", f"row(s) 4 ({leaked})"
        )


@pytest.mark.parametrize(
    "folders", [["glaucoma", "normal"], ["1", "01"], ["0 mild", "1", "x"], ["No DR", "No_DR"]]
)
def test_other_classes_have_no_order(tmp_path, folders):
    for name in folders:
        touch(tmp_path / "train" / name, f"{name}.png")
    table = read("aptos", tmp_path)
    assert table.labels == sorted(folders) and not table.ordered
    assert (
        len(table.notes) == 1
        and "no quadratic kappa" in table.notes[0]
        and ", ".join(sorted(folders)) in table.notes[0]
    )


def test_which_data_sets_are_grades(tmp_path):
    ordered = {name: entry["ordered"] for name, entry in tables.DATASETS.items()}
    assert ordered == {"odir": False, "aptos": True, "dr": True, "retina": False, "mrnet": False}
    assert read("aptos", graded(tmp_path / "a", ["1", "2"])).ordered
    assert not read("retina", graded(tmp_path / "r", ["1", "2"], "retina")).ordered


def test_labels_as_people_read_them():
    assert tables.full_names("odir", ODIR_LABELS)[:2] == ["N normal", "D diabetes"]
    grades = ["0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative"]
    for name in ("aptos", "dr"):
        assert tables.full_names(name, ["0", "1", "2", "3", "4"]) == grades
    assert tables.full_names("aptos", ["0", "1"]) == ["0", "1"]  # an ImageFolder with classes of its own
    assert tables.full_names("retina", ["glaucoma", "normal"]) == ["glaucoma", "normal"]


# ---------------------------------------------------------------- the order of rows


@pytest.mark.parametrize("name", ["odir", "kaggle", "aptos", "dr", "retina", "lab", "mrnet"])
def test_a_sorted_sheet_changes_nothing(tmp_path, name):
    names = [f"{i}_{eye}" for i in (100, 9, 10, 2) for eye in ("right", "left")]

    def lines(file, order):
        path = tmp_path / file
        rows = path.read_text().splitlines()
        path.write_text("".join(f"{rows[i]}\n" for i in order))

    found = []
    for turn in range(2):
        if name == "odir":
            read_name, root = (
                "odir",
                write(tmp_path, odir_sheet().sort_values("N", kind="stable")[:: 1 - 2 * turn]),
            )
        elif name == "kaggle":
            read_name, root = "odir", write(tmp_path, kaggle(odir_sheet())[:: 1 - 2 * turn], "full_df.csv")
        elif name == "lab":
            read_name, root = "dr", lab_files(tmp_path)
            for file in ("train_img.csv", "train_label.csv"):
                lines(file, [2, 0, 1] if turn else [0, 1, 2])
        elif name == "mrnet":
            read_name, root = "mrnet", knees(tmp_path)
            for label in ("abnormal", "acl", "meniscus"):
                lines(f"train-{label}.csv", [2, 0, 1] if turn else [0, 1, 2])
        else:
            read_name, root = name, graded(tmp_path, names, name)
            file = "trainLabels.csv" if name == "dr" else "train.csv"
            lines(file, [0, *np.random.default_rng(turn).permutation(8) + 1])
        found.append(read(read_name, root).frame)
    pd.testing.assert_frame_equal(found[0], found[1])
    assert found[0].index.tolist() == list(range(len(found[0])))
    if name in ("odir", "kaggle"):
        assert found[0]["ID"].tolist() == sorted(odir_sheet()["ID"])
    if name in ("aptos", "dr", "retina"):
        assert found[0]["ID"].tolist() == [f"{i}_{eye}" for i in (2, 9, 10, 100) for eye in ("left", "right")]


@needs_real
def test_the_official_order_stays():
    official = pd.read_excel(REAL / "odir" / "annotations.xlsx")
    table = read("odir", REAL / "odir")
    assert table.frame["ID"].tolist() == official["ID"].tolist() and table.labels == ODIR_LABELS
    assert (targets_of(table.frame, ODIR_LABELS) == official[ODIR_LABELS].to_numpy()).all()
    images = REAL / "odir" / "images"
    left, right = official["Left-Fundus"], official["Right-Fundus"]
    assert table.frame["files"].tolist() == [
        (str(images / a), str(images / b)) for a, b in zip(left, right, strict=True)
    ]
    assert table.notes == [] and not table.ordered


@needs_real
def test_kaggles_table_is_the_official_one(tmp_path):
    official = pd.read_excel(REAL / "odir" / "annotations.xlsx")
    folded = read("odir", write(tmp_path / "kaggle", kaggle(official), "full_df.csv")).frame
    frame = read("odir", write(tmp_path / "official", official)).frame
    names = [[[Path(file).name for file in files] for files in one["files"]] for one in (folded, frame)]
    assert names[0] == names[1]
    pd.testing.assert_frame_equal(folded.drop(columns="files"), frame.drop(columns="files"))


@pytest.mark.skipif(not (REAL / "idrid").is_dir(), reason="REAL_DATA names no folder with idrid/")
def test_idrid_in_aptos_form():
    table = read("aptos", REAL / "idrid")
    frame = table.frame
    assert len(frame) == 413 and np.bincount(frame["target"]).tolist() == [134, 20, 136, 74, 49]
    assert frame["patient"].is_unique and all(Path(file).is_file() for (file,) in frame["files"])
    assert table.notes == [] and table.ordered


# ---------------------------------------------------------------- names that no sheet of results could hold


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\t", "\uffff"])
def test_control_characters_are_refused_with_their_row(tmp_path, character):
    write(tmp_path, f'id_code,diagnosis\na,0\n"b{character}c",1\n', "train.csv")
    refused(
        lambda: read("aptos", tmp_path),
        "control characters in id_code",
        "row(s) 3 (",
        ascii(f"b{character}c"),
    )
    sheet = odir_sheet()
    sheet.loc[4, "Right-Fundus"] = f"12{character}_right.jpg"
    write(tmp_path, kaggle(sheet), "full_df.csv")
    refused(lambda: read("odir", tmp_path), "control characters in Right-Fundus", "row(s) 6")


def test_a_control_character_in_the_name_of_a_file_is_refused(tmp_path):
    touch(tmp_path / "train" / "0", "a.png", "b\n.png")
    refused(lambda: read("aptos", tmp_path), "control characters", r"b\n.png", "Rename")


def test_names_like_formulas_are_kept_as_they_are(tmp_path):
    names = ["=1+2", "@x", "+5", "-7", "=HYPERLINK(1)"]
    assert sorted(read("aptos", graded(tmp_path, names)).frame["ID"]) == sorted(names)


def test_a_drive_letter_leaves_the_data_folder(tmp_path):
    refused(lambda: read("aptos", graded(tmp_path, ["a", "C:x"])), "leaves the data folder", "row(s) 3 (C:x)")


# ---------------------------------------------------------------- sheets


def test_messages_show_what_they_found(tmp_path):
    refused(lambda: read("odir", write(tmp_path, changed("ID", 3, "nine"))), "row(s) 5 (nine)")
    refused(lambda: read("odir", write(tmp_path, changed("H", 5, "yes"))), "row(s) 7 (yes)")
    refused(lambda: read("odir", write(tmp_path, changed("H", 5, "y" * 999))), f"row(s) 7 ({'y' * 30})")


def test_suffixes_in_capitals_are_workbooks(tmp_path):
    odir_sheet().to_excel(tmp_path / "a.xlsx", index=False)
    (tmp_path / "a.xlsx").rename(tmp_path / "A.XLSX")
    assert len(tables.read_sheet(tmp_path / "A.XLSX")) == 20


def test_kaggles_eyes_with_different_file_names(tmp_path):
    sheet = kaggle(odir_sheet())
    sheet.iloc[25, sheet.columns.get_loc("Left-Fundus")] = "other.jpg"
    refused(
        lambda: read("odir", write(tmp_path, sheet, "full_df.csv")), "file names", "in 1 row(s)", "row(s) 27"
    )


def test_a_data_set_of_ones_own_takes_a_reader_and_an_entry(tmp_path, monkeypatch):
    def read_clinic(root, labels):
        path = root / "grades.csv"
        sheet = tables.read_sheet(path, dtype={"photo": str})
        tables.check_columns(path, sheet, ["photo", "grade"])
        names = tables.check_names(path, sheet["photo"], "photo")
        target = tables.as_integers(path, sheet["grade"], "a grade", range(len(labels)))
        return tables.Table(tables.picture_frame(path, names, root / "photos", target), labels)

    entry = {**tables.CLASSES, "labels": ["no", "yes"]}
    monkeypatch.setitem(tables.READERS, "clinic", read_clinic)
    monkeypatch.setitem(tables.DATASETS, "clinic", entry)
    touch(tmp_path / "photos", "10_left.png", "9_left.png")
    table = read("clinic", write(tmp_path, "photo,grade\n10_left,1\n9_left,0\n", "grades.csv"))
    assert table.frame["ID"].tolist() == ["9_left", "10_left"] and targets_of(
        table.frame, table.labels
    ).tolist() == [0, 1]
    assert table.frame["files"][1] == (str(tmp_path / "photos" / "10_left.png"),) and not table.ordered


# ---------------------------------------------------------------- pictures that somebody names


def test_a_right_eye_before_the_left_one_is_noticed(tmp_path):
    refused(
        lambda: given_rows("odir", ["x_right.jpg", "x_left.jpg"]), "x_right.jpg x_left.jpg", "Give LEFT RIGHT"
    )
    refused(lambda: given_rows("odir", ["a/x-OD.PNG", "b/x-os.jpg"]), "Give LEFT RIGHT")
    for pair in (
        ["x_left.jpg", "x_right.jpg"],
        ["a.jpg", "x_left.jpg"],
        ["x_right.jpg", "y.jpg"],
        ["a.jpg", "b.jpg"],
    ):
        frame, many = given_rows("odir", pair)
        assert frame["files"].tolist() == [tuple(pair)] and not many
    refused(lambda: given_rows("odir", ["x_left.jpg", "x_left.jpg"]), "twice", "LEFT RIGHT")
    write(tmp_path, "LEFT,RIGHT\n1_left.jpg,1_right.jpg\n2_right.jpg,2_left.jpg\n", "these.csv")
    refused(lambda: given_rows("odir", [tmp_path / "these.csv"]), "by their names", "sheet row 3")


def test_an_exam_and_the_folder_of_exams(tmp_path):
    knees(tmp_path)
    for plane in tables.PLANES:
        touch(tmp_path / "exam7", f"{plane}.npy")
    planes = tuple(str(tmp_path / "exam7" / f"{plane}.npy") for plane in tables.PLANES)
    frame, many = given_rows("mrnet", [tmp_path / "exam7"])
    assert frame.to_dict("records") == [{"ID": "exam7", "files": planes}] and not many
    frame, many = given_rows("mrnet", planes)
    assert frame["files"].tolist() == [planes] and not many
    frame, many = given_rows("mrnet", [tmp_path / "valid"])
    assert frame["ID"].tolist() == ["1130", "1131"] and many
    assert frame["files"][1] == tuple(str(tmp_path / "valid" / plane / "1131.npy") for plane in tables.PLANES)
    refused(lambda: given_rows("mrnet", planes[:2]), "knees")
    refused(lambda: given_rows("mrnet", [tmp_path / "exam7", tmp_path / "valid"]), "knees")
    refused(lambda: given_rows("aptos", [tmp_path / "exam7", "a.jpg"]), "single photographs")
    refused(lambda: given_rows("odir", ["one.jpg"]), "LEFT RIGHT")


def test_a_row_with_more_fields_than_the_header_is_refused(tmp_path):
    """pandas would take the first column for an index, and every label for its neighbour's."""
    (tmp_path / "train.csv").write_text("id_code,diagnosis,site\na,0,1,x\nb,1,2,x\n")
    with pytest.raises(InputError, match="cannot be read as a table"):
        tables.read("aptos", tmp_path)


def test_the_labs_label_file_has_one_column(tmp_path):
    (tmp_path / "train_img.csv").write_text("a\nb\n")
    (tmp_path / "train_label.csv").write_text("0,3\n1,4\n")
    with pytest.raises(InputError, match="2 columns; expected 1 and no header"):
        tables.read("dr", tmp_path)


def test_eyes_of_two_patients_are_noted(tmp_path, capsys):
    given_rows("odir", ["0_left.jpg", "10_right.jpg"])
    assert "eyes of two patients" in capsys.readouterr().out
    for pair in (["left.jpg", "right.jpg"], ["0_left.jpg", "0_right.jpg"], ["a.jpg", "b.jpg"]):
        given_rows("odir", pair)
    assert not capsys.readouterr().out


def test_an_official_sheet_names_pictures_beside_it(tmp_path):
    touch(tmp_path / "images", "0_left.jpg")
    write(tmp_path, odir_sheet(2))
    frame, many = given_rows("odir", [tmp_path / "annotations.xlsx"])
    images = tmp_path / "images"
    assert many and frame["ID"].tolist() == ["0", "3"]
    assert frame["files"][1] == (str(images / "3_left.jpg"), str(images / "3_right.jpg"))


def test_a_csv_of_pairs_is_read_beside_it_where_any_row_is_there(tmp_path):
    (tmp_path / "images").mkdir()
    for file in ("1_left.jpg", "1_right.jpg", "images/1_left.jpg", "images/1_right.jpg"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "x.csv").write_text("LEFT,RIGHT\n0_left.jpg,0_right.jpg\n1_left.jpg,1_right.jpg\n")
    frame, many = tables.given_rows("odir", [tmp_path / "x.csv"])
    assert many and frame["files"][1] == (str(tmp_path / "1_left.jpg"), str(tmp_path / "1_right.jpg"))


def test_files_that_class_folders_do_not_give_are_counted(tmp_path):
    touch(tmp_path / "train" / "0 healthy", "a.png", "b.webp", ".hidden")
    touch(tmp_path / "train" / "1 sick", "c.png")
    touch(tmp_path / "train" / "1 sick" / "2023", "d.png")
    table = read("aptos", tmp_path)
    assert len(table.frame) == 2 and table.notes[0].startswith("2 file(s) are ignored")
