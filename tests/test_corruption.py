"""At least 722 damaged inputs: each ends in InputError (exit status 2), or in a repair or conversion.

None may end in another exception, a hang, executed code or a wrong number. What passes must equal the undamaged input;
only flipped bits of coded picture data that still decode cannot be told by anybody (JPEG, BMP, TIFF have no checksum).
"""

import io
import json
import os
import pickle
import shutil
import signal
import struct
import zlib

import numpy as np
import openpyxl
import pandas as pd
import pytest
import torch
from PIL import Image

import arguments
import cache
import checkpoint
import dataset
import models
import predictor
import preprocess
import tables
from decode import Pictures, decode
from errors import InputError, guard
from split import drop_missing, split

SIDE = 48
SECONDS = 20  # for one case; they take milliseconds


class Executed:
    """Unpickling this makes a folder: the proof that nothing was unpickled is that it is not there."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def refused(_):
    return False


def equals(expected):
    def check(result):
        if isinstance(expected, pd.DataFrame):
            return result.equals(expected)
        if isinstance(expected, dict):
            return result.keys() == expected.keys() and all(
                equals(value)(result[key]) for key, value in expected.items()
            )
        if torch.is_tensor(expected):
            return torch.equal(result, expected)
        if isinstance(expected, np.ndarray):
            return result.dtype == expected.dtype and np.array_equal(result, expected)
        return type(result) is type(expected) and result == expected

    return check


def tenths(data):
    return [(f"cut at {n} tenths", data[: len(data) * n // 10]) for n in range(10)]


def flips(data, number, seed=0, within=None):
    rng = np.random.default_rng(seed)
    for at in sorted(
        rng.choice(within or len(data), min(number, within or len(data)), replace=False).tolist()
    ):
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        yield f"byte {at} flipped", bytes(damaged)


class Case:
    """One damaged input: `call()` ends in InputError, or its result passes `check`."""

    def __init__(self, name, call, check=refused):
        self.name, self.call, self.check = name, call, check

    def run(self):
        """None, or what is wrong."""

        def too_long(*_):
            raise KeyboardInterrupt  # not an Exception: no handler under test swallows it

        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            result = self.call()
        except InputError as error:
            return None if len(str(error)) > 15 else f"{self.name}: says only {error}"
        except KeyboardInterrupt:
            return f"{self.name}: took longer than {SECONDS} s"
        except Exception as error:
            return f"{self.name}: {type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return None if self.check(result) else f"{self.name}: passed, with another result"


def bytes_cases(folder, label, suffix, damaged, read, check):
    """A case for each (name, bytes) of `damaged`, written to a file of its own when it is run."""

    def call(data, number):
        path = folder / f"{label.replace(' ', '_')}-{number}{suffix}"
        path.write_bytes(data)
        return read(path)

    return [
        Case(f"{label}, {name}", lambda data=data, number=number: call(data, number), check)
        for number, (name, data) in enumerate(damaged)
    ]


# ---------------------------------------------------------------- pictures


def eye(side=96):
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side]
    coarse = Image.fromarray(rng.integers(60, 220, (12, 12, 3), dtype=np.uint8)).resize((side, side))
    inside = (x + 0.5 - side / 2) ** 2 + (y + 0.5 - side / 2) ** 2 < (0.47 * side) ** 2
    return Image.fromarray(np.asarray(coarse) * inside[..., None].astype(np.uint8))


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def load(path):
    return preprocess.load_picture(path, "fov", SIDE)[0]


def png_claiming(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def picture_cases(folder, rendered):
    image, cases = eye(), []
    files = {
        "baseline": (encoded(image, "JPEG", quality=90), ".jpg"),
        "progressive": (encoded(image, "JPEG", progressive=True), ".jpg"),
        "restart markers": (encoded(image, "JPEG", restart_marker_blocks=3), ".jpeg"),
        "png": (encoded(image, "PNG"), ".png"),
        "tiff": (encoded(image, "TIFF", compression="tiff_lzw"), ".tif"),
        "bmp": (encoded(image, "BMP"), ".bmp"),
    }
    for label, (data, suffix) in files.items():
        (folder / f"whole{suffix}").write_bytes(data)
        whole = load(folder / f"whole{suffix}")
        cases += bytes_cases(folder, label, suffix, tenths(data), load, equals(whole))
        check = (
            equals(whole)
            if label == "png"
            else lambda result: result.shape == (SIDE, SIDE, 3) and result.dtype == np.uint8
        )
        cases += bytes_cases(folder, f"{label} with a", suffix, flips(data, 12), load, check)
        if suffix.startswith(".jp"):  # the counted repair
            cases += bytes_cases(
                folder,
                f"{label} without end marker",
                suffix,
                [("repaired", data[:-2])],
                lambda path: preprocess.load_picture(path, "fov", SIDE),
                lambda result, whole=whole: result[1] and np.array_equal(result[0], whole),
            )
    jpeg = files["baseline"][0]
    others = {
        "text": b"This is no picture.\n" * 50,
        "zero bytes": b"",
        "zeros": bytes(5000),
        "html": b"<!DOCTYPE html><html>404</html>",
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "pdf": b"%PDF-1.7\n" + bytes(500),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        "pickle": pickle.dumps(Executed(folder / "executed")),
        "random": np.random.default_rng(0).bytes(3000),
        "svg": b"<svg xmlns='x'/>",
        "only the start marker": b"\xff\xd8",
        "only both markers": b"\xff\xd8\xff\xd9",
        "another file's end": jpeg[:1500] + encoded(eye(40), "PNG"),
        "a header twice": jpeg[:600] + jpeg[:600],
    }
    cases += bytes_cases(folder, "no picture", ".jpg", others.items(), load, refused)
    sizes = {
        "1 x 1": Image.new("RGB", (1, 1), "white"),
        "60000 x 1": Image.new("RGB", (60000, 1), "white"),
        "1 x 60000": Image.new("RGB", (1, 60000), "white"),
        "15 x 400": Image.new("RGB", (15, 400), "white"),
        "wholly black": Image.new("RGB", (64, 64)),
        "nearly black": Image.new("RGB", (64, 64), (5, 5, 5)),
        "float": Image.fromarray(np.random.default_rng(0).random((64, 64), dtype=np.float32)),
        "32 bits": Image.fromarray(np.full((64, 64), 1 << 20, np.int32)),
    }
    for name, bad in sizes.items():
        suffix, kind = (".tif", "TIFF") if bad.mode in "FI" else (".png", "PNG")
        cases += bytes_cases(folder, "size or range", suffix, [(name, encoded(bad, kind))], load, refused)
    bombs = [
        (f"claims {w} x {h}", png_claiming(w, h))
        for w, h in ((50_000, 50_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1), (0, 0), (96, 10**6))
    ]
    cases += bytes_cases(folder, "bomb", ".png", bombs, load, refused)
    grey = image.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    converted = {
        "grey": (grey, grey, "PNG"),
        "palette": (image.quantize(256), image, "PNG"),
        "CMYK": (image.convert("CMYK"), image, "JPEG"),
        "16 bits": (sixteen, grey, "PNG"),
        "16 bits tiff": (sixteen, grey, "TIFF"),
        "alpha": (image.convert("RGBA"), image, "PNG"),
        "grey and alpha": (image.convert("LA"), grey, "PNG"),
        "CMYK tiff": (image.convert("CMYK"), image, "TIFF"),
        "webp named jpg": (image, image, "WEBP"),
        "png named jpg": (image, image, "PNG"),
    }
    for name, (given, meant, kind) in converted.items():
        expected = preprocess.prepare(meant.convert("RGB"), "none", SIDE).astype(
            int
        )  # what JPEG does to the border would move "fov"
        cases += bytes_cases(
            folder,
            "converted",
            ".jpg",
            [(name, encoded(given, kind, **({"lossless": True} if kind == "WEBP" else {})))],
            lambda path: preprocess.load_picture(path, "none", SIDE)[0],
            lambda result, expected=expected: np.abs(result - expected).mean() < 4,
        )
    (folder / "folder.jpg").mkdir()
    for name in (
        "folder.jpg",
        "absent.jpg",
    ):  # what the system says, which is not kept as a fault of the file

        def check(found, name=name):
            return name in found[4] and not found[2]

        cases.append(
            Case(f"system: {name}", lambda name=name: decode(str(folder / name), "fov", SIDE), check)
        )
    return cases


# ---------------------------------------------------------------- tables


def read_all(root, name="odir"):
    """As train.py reads: table, split, and every picture there -> all rows by ID."""
    parts, _ = drop_missing(split(name, tables.read(name, root).frame), "stop")
    return (
        pd.concat(parts.values())
        .drop(columns=["files", "given_part"])
        .sort_values("ID")
        .reset_index(drop=True)
    )


def tables_in(folder, source, name):
    """A function that makes a copy of data set `name` without its tables and fills it with `change(root)`, then reads it."""

    def case(change):
        root = folder / f"{name}-{next(numbers)}"
        root.mkdir()
        for entry in source.iterdir():
            if entry.is_dir():
                (root / entry.name).symlink_to(entry)
        change(root)
        return read_all(root, name)

    numbers = iter(range(10**6))
    return case


def annotation_cases(folder, rendered):
    source = rendered("odir")
    sheet, data = pd.read_excel(source / "annotations.xlsx"), (source / "annotations.xlsx").read_bytes()
    whole, labels = read_all(source), tables.ODIR_LABELS
    needed = ["ID", "Left-Fundus", "Right-Fundus", *labels]
    case = tables_in(folder, source, "odir")

    def of(name, frame, check=refused):
        return Case(
            f"annotations: {name}",
            lambda: case(lambda root: frame.to_excel(root / "annotations.xlsx", index=False)),
            check,
        )

    def with_cell(column, value, row=3):
        changed = sheet.astype({column: object})
        changed.loc[row, column] = value
        return changed

    def with_workbook(name, change, check=refused):
        def write(root):
            book = openpyxl.load_workbook(source / "annotations.xlsx")
            change(book.active)
            book.save(root / "annotations.xlsx")

        return Case(f"annotations: {name}", lambda: case(write), check)

    rng = np.random.default_rng(0)
    cases = [
        of("columns shuffled", sheet[list(rng.permutation(sheet.columns))], equals(whole)),
        of("ID as text", sheet.astype({"ID": str}), equals(whole)),
        of("labels as text", sheet.astype({label: str for label in labels}), equals(whole)),
        of("a further column", sheet.assign(remark="x"), equals(whole)),
        of("no row", sheet.iloc[:0]),
        of("one row", sheet.iloc[:1]),
        of("no header", sheet.rename(columns=dict(zip(sheet.columns, sheet.iloc[0], strict=True))).iloc[1:]),
        of("nothing", pd.DataFrame()),
        of("doubled row", pd.concat([sheet, sheet.iloc[[5]]])),
        of("all rows twice", pd.concat([sheet, sheet])),
        of("same ID, other labels", pd.concat([sheet, sheet.iloc[[5]].assign(N=1 - sheet.N[5])])),
        of("transposed", sheet.T.reset_index()),
        of("lower case columns", sheet.rename(columns=str.lower)),
        of("header with blanks", sheet.rename(columns={"ID": " ID "})),
        of("a row of blanks below", pd.concat([sheet, pd.DataFrame([{}])]), equals(whole)),
        of("a row of blanks between", pd.concat([sheet[:9], pd.DataFrame([{}]), sheet[9:]])),
    ]
    for column in needed:
        cases.append(of(f"{column} missing", sheet.drop(columns=column)))
        twice = pd.concat([sheet, sheet[column]], axis=1)
        cases.append(of(f"{column} twice", twice))
        cases.append(of(f"{column} empty", sheet.assign(**{column: None})))
    for value in (
        2,
        -1,
        0.5,
        "x",
        "",
        None,
        "yes",
        1e300,
        float("nan"),
        "１x",
        "1,0",
        "N",
        pd.Timestamp("2020-01-01"),
    ):
        cases.append(of(f"label {value!r}", with_cell("G", value)))
    intended = sheet.copy()
    intended.loc[3, "G"] = 1
    (folder / "intended").mkdir()
    (folder / "intended/images").symlink_to(source / "images")
    intended.to_excel(folder / "intended/annotations.xlsx", index=False)
    for value in (True, "1", " 1 ", 1.0, "1.0", "１", "+1"):  # one, or refused
        cases.append(
            of(f"label {value!r} for 1", with_cell("G", value), equals(read_all(folder / "intended")))
        )
    for value in (
        "abc",
        1.5,
        None,
        "",
        1e300,
        float("inf"),
        "1e400",
        "12;13",
        "ID",
        "七",
        pd.Timestamp("2020-01-01"),
        int(sheet.ID[4]),
    ):
        cases.append(of(f"ID {value!r}", with_cell("ID", value)))
    for value in (
        None,
        "",
        "   ",
        "../images/x.jpg",
        "/etc/hostname",
        "a/../../b.jpg",
        "absent.jpg",
        5,
        "..",
        "C:\\x.jpg",
        "x?.jpg",
        ".",
    ):
        cases.append(of(f"Left-Fundus {value!r}", with_cell("Left-Fundus", value)))
    keywords = [
        "moderate non proliferative retinopathy，glaucoma",
        "ＡＭＤ，ｃａｔａｒａｃｔ",
        "normal fundus\u00a0",
        "naïve — “quoted”",
        "眼底正常",
        "a\nb",
        "😀",
    ]
    for value in keywords:
        cases.append(of(f"keywords {value!r}", with_cell("Left-Diagnostic Keywords", value), equals(whole)))
    cases += [
        with_workbook("merged labels", lambda page: page.merge_cells("H3:K3")),
        with_workbook("merged rows", lambda page: page.merge_cells("A2:A4")),
        with_workbook("merged header", lambda page: page.merge_cells("A1:D1")),
        with_workbook("formula as label", lambda page: page.cell(4, 8).__setattr__("value", "=1+0")),
        with_workbook("formula as ID", lambda page: page.cell(4, 1).__setattr__("value", "=ROW()")),
        with_workbook("error value", lambda page: page.cell(4, 9).__setattr__("value", "#DIV/0!")),
        with_workbook("title above the header", lambda page: page.insert_rows(1)),
        with_workbook("a chart sheet of its own first", lambda page: page.parent.create_sheet("first", 0)),
        with_workbook(
            "bold header, wide columns",
            lambda page: page.column_dimensions.__getitem__("A").__setattr__("width", 40),
            equals(whole),
        ),
        with_workbook(
            "hidden rows",
            lambda page: page.row_dimensions.__getitem__(4).__setattr__("hidden", True),
            equals(whole),
        ),
    ]
    for name, damaged in [
        *tenths(data),
        *flips(data, 25),
        ("text", b"ID,N\n1,0\n"),
        ("zip of nothing", b"PK\x05\x06" + bytes(18)),
        ("old xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(2000)),
        ("zeros", bytes(4000)),
    ]:
        cases.append(
            Case(
                f"annotations: {name}",
                lambda damaged=damaged: case(lambda root: (root / "annotations.xlsx").write_bytes(damaged)),
                equals(whole),
            )
        )
    return cases + kaggle_cases(source, sheet, whole, case)


def kaggle_cases(source, sheet, whole, case):
    """full_df.csv, one row per eye, and what text files suffer from."""
    eyes = pd.concat([sheet, sheet])
    text = eyes.to_csv(index=False)

    def of(name, content, check=refused):
        content = content.encode() if isinstance(content, str) else content
        return Case(
            f"full_df.csv: {name}",
            lambda: case(lambda root: (root / "full_df.csv").write_bytes(content)),
            check,
        )

    other = eyes.copy()
    other.iloc[0, other.columns.get_loc("O")] = 1 - other.iloc[0]["O"]
    many = pd.concat([sheet] * (10**5 // len(sheet) + 1)).iloc[: 10**5].assign(ID=np.arange(10**5) + 5000)
    wrong = many.astype({"C": object})
    wrong.iloc[99_998, wrong.columns.get_loc("C")] = "?"
    lines = text.splitlines()
    return [
        of("as it is", text, equals(whole)),
        of("rows shuffled", eyes.sample(frac=1, random_state=1).to_csv(index=False), equals(whole)),
        of("byte order mark", text.encode("utf-8-sig"), equals(whole)),
        of("Windows line ends", text.replace("\n", "\r\n"), equals(whole)),
        of("eyes of one patient with different labels", other.to_csv(index=False)),
        of("semicolons", eyes.to_csv(index=False, sep=";")),
        of("UTF-16", text.encode("utf-16")),
        of("Latin-1", text.replace("normal", "n\u00f6rmal", 1).encode("latin-1", "replace"), equals(whole)),
        of("ragged row", text + "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20\n"),
        of("unclosed quote", text + '"1,2'),
        of("half a row", text[:-20]),
        of("no header", "\n".join(lines[1:])),
        of("header only", lines[0]),
        of("empty", ""),
        of("blank lines", "\n\n\n"),
        of("NUL bytes", bytes(300)),
        of("header twice", lines[0] + "\n" + text),
        of("binary", np.random.default_rng(0).bytes(2000)),
        Case(
            "full_df.csv: 10^5 rows",
            lambda: len(split("odir", read_csv_of(case, many))["train"]),
            lambda n: n == 80_000,
        ),
        Case("full_df.csv: 10^5 rows, one wrong", lambda: read_csv_of(case, wrong)),
    ]


def read_csv_of(case, frame):
    """The table of a large full_df.csv, without asking for its pictures."""
    found = []
    try:
        case(lambda root: (frame.to_csv(root / "full_df.csv", index=False), found.append(root)))
    except InputError as error:
        if "no picture" not in str(error):
            assert "100000" in str(error)  # the sheet row
            raise
    return tables.read("odir", found[0]).frame


def other_table_cases(folder, rendered):
    cases = []
    for name in ("aptos", "dr", "retina", "mrnet"):
        cases += {"aptos": aptos_cases, "dr": dr_cases, "retina": retina_cases, "mrnet": mrnet_cases}[name](
            rendered(name), tables_in(folder, rendered(name), name)
        )
    return cases


def csv_case(label, case, files, check=refused):
    """A case whose tables are `files`: name -> text or data frame."""

    def write(root):
        for name, content in files.items():
            (root / name).write_text(content if isinstance(content, str) else content.to_csv(index=False))

    return Case(label, lambda: case(write), check)


def single_table_cases(label, file, sheet, key, column, case, whole, wrong):
    """What the tables of single pictures have in common."""

    def with_cell(name, value):
        changed = sheet.astype({name: object})
        changed.loc[2, name] = value
        return changed

    made = {f"{column} {value!r}": with_cell(column, value) for value in wrong}
    made |= {
        f"{key} {value!r}": with_cell(key, value)
        for value in (None, "", "../x", "/x", "absent", sheet[key][3])
    }
    made |= {f"no {name}": sheet.drop(columns=name) for name in (key, column)}
    made |= {
        "no row": sheet.iloc[:0],
        "no header": sheet.to_csv(index=False, header=False),
        "empty": "",
        "all twice": pd.concat([sheet, sheet]),
        "semicolons": sheet.to_csv(index=False, sep=";"),
        "header twice": ",".join(sheet.columns) + "\n" + sheet.to_csv(index=False),
    }
    return [
        csv_case(f"{label}: as it is", case, {file: sheet}, equals(whole)),
        csv_case(f"{label}: no table", case, {}),
        *(csv_case(f"{label}: {name}", case, {file: content}) for name, content in made.items()),
    ]


def aptos_cases(source, case):
    sheet, whole = pd.read_csv(source / "train.csv"), read_all(source, "aptos")

    def image_folder(root):
        (root / "train_images").unlink()
        for part, grades in (("train", "013"), ("val", "013"), ("test", "4")):
            for grade in grades:
                (root / part / grade).mkdir(parents=True)
                shutil.copy(next((source / "train_images").iterdir()), root / part / grade)

    return single_table_cases(
        "aptos",
        "train.csv",
        sheet,
        "id_code",
        "diagnosis",
        case,
        whole,
        (5, -1, 1.5, "x", None, "mild", 1e300),
    ) + [
        Case("aptos: unknown class folder", lambda: case(image_folder)),
        Case(
            "aptos: class folders without pictures",
            lambda: case(lambda root: (root / "train/0").mkdir(parents=True)),
        ),
    ]


def dr_cases(source, case):
    whole = read_all(source, "dr")
    if (source / "trainLabels.csv").exists():
        sheet = pd.read_csv(source / "trainLabels.csv")
        common = single_table_cases(
            "dr", "trainLabels.csv", sheet, "image", "level", case, whole, (5, -1, 1.5, "x", None)
        )
    names, levels = ("\n".join(map(str, sheet[column])) + "\n" for column in ("image", "level"))
    first, second = ("\n".join(text.split("\n")[:20]) + "\n" for text in (names, levels))
    third, fourth = ("\n".join(text.split("\n")[20:]) for text in (names, levels))
    pair = {
        "train_img.csv": first,
        "train_label.csv": second,
        "test_img.csv": third,
        "test_label.csv": fourth,
    }
    lab = {
        "header in both": {"train_img.csv": "image\n" + first, "train_label.csv": "level\n" + second},
        "header over the names": {"train_img.csv": "image\n" + first},
        "header over the levels": {"train_label.csv": "level\n" + second},
        "numbered header": {"train_img.csv": "0\n" + first, "train_label.csv": "0\n" + second},
        "fewer labels": {"train_label.csv": second[2:]},
        "level 7": {"test_label.csv": "7" + fourth[1:]},
        "level 0.5": {"test_label.csv": "0.5" + fourth[1:]},
        "test repeats train": {"test_img.csv": first, "test_label.csv": second},
        "empty labels": {"train_label.csv": ""},
        "name twice": {"train_img.csv": first.split("\n")[1] + "\n" + first.split("\n", 1)[1]},
        "absent picture": {"test_img.csv": "99_left\n" + third.split("\n", 1)[1]},
    }
    return (
        common
        + [csv_case("dr lab: as it is", case, pair, lambda table: len(table) == len(sheet))]
        + [csv_case(f"dr lab: {name}", case, {**pair, **change}) for name, change in lab.items()]
        + [
            csv_case(f"dr lab: no {name}", case, {key: value for key, value in pair.items() if key != name})
            for name in pair
        ]
    )


def retina_cases(source, case):
    sheet = pd.read_csv(source / "train.csv")
    sheet = sheet[sheet[tables.DATASETS["retina"]["labels"]].sum(axis=1) == 1].reset_index(
        drop=True
    )  # the others are left out
    return single_table_cases(
        "retina",
        "train.csv",
        sheet,
        "filename",
        "glaucoma",
        case,
        read_all(source, "retina"),
        (2, -1, 0.5, "x", None),
    ) + [
        csv_case(
            "retina: every row carries all",
            case,
            {"train.csv": sheet.assign(**{name: 1 for name in sheet.columns[1:]})},
        ),
        csv_case(
            "retina: no row carries one",
            case,
            {"train.csv": sheet.assign(**{name: 0 for name in sheet.columns[1:]})},
        ),
        Case("retina: unknown label", lambda: tables.read("retina", source, ["glaucoma", "scurvy"])),
    ]


def mrnet_cases(source, case):
    files = {file.name: file.read_text() for file in source.glob("*.csv")}
    lines = files["train-acl.csv"].splitlines()
    acl = {
        "header": ["id,label", *lines],
        "numeric header": ["0,1", *lines],
        "one column": [line.split(",")[0] for line in lines],
        "three columns": [line + ",0" for line in lines],
        "label 2": [lines[0][:-1] + "2", *lines[1:]],
        "empty label": [lines[0][:-1], *lines[1:]],
        "doubled": [lines[0], *lines],
        "other exams": ["9999,1", *lines[1:]],
        "one missing": lines[1:],
        "id no number": ["knee,1", *lines[1:]],
        "id 1.5": ["1.5,1", *lines[1:]],
        "tabs": [line.replace(",", "\t") for line in lines],
        "empty": [],
    }
    unknown = "\n".join(f"{int(line.split(',')[0]) + 5000},{line.split(',')[1]}" for line in lines)
    return [
        csv_case("mrnet: as it is", case, files, equals(read_all(source, "mrnet"))),
        *(
            csv_case(f"mrnet: {name}", case, {**files, "train-acl.csv": "\n".join(changed)})
            for name, changed in acl.items()
        ),
        csv_case(
            "mrnet: exams without volumes",
            case,
            {**files, **{name: unknown for name in files if name.startswith("train")}},
        ),
        *(
            csv_case(f"mrnet: no {name}", case, {key: value for key, value in files.items() if key != name})
            for name in files
        ),
        Case("mrnet: unknown label", lambda: tables.read("mrnet", source, ["pcl"])),
    ]


# ---------------------------------------------------------------- volumes


def volume_cases(folder, rendered):
    volume = np.random.default_rng(0).integers(0, 255, (5, 256, 256), dtype=np.uint8)

    def saved(array, **options):
        stream = io.BytesIO()
        np.save(stream, array, **options)
        return stream.getvalue()

    whole = saved(volume)
    bad = {
        "rank 2": saved(volume[0]),
        "rank 4": saved(volume[None]),
        "rank 0": saved(np.uint8(3)),
        "float": saved(volume[:1].astype(np.float32)),
        "int16": saved(volume[:1].astype(np.int16)),
        "int8": saved(volume.astype(np.int8)),
        "bool": saved(volume > 9),
        "128 x 128": saved(volume[:, :128, :128]),
        "256 x 255": saved(volume[:, :, 1:]),
        "slices last": saved(volume.transpose(1, 2, 0)),
        "no slice": saved(volume[:0]),
        "complex": saved(volume[:1] * 1j),
        "objects": saved(np.array([Executed(folder / "executed")], dtype=object), allow_pickle=True),
        "text array": saved(np.array(["knee"])),
        "records": saved(np.zeros(3, [("a", "u1")])),
        "pickle": pickle.dumps(Executed(folder / "executed")),
        "text": b"no volume",
        "nothing": b"",
        "zeros": bytes(9000),
        "trailing bytes": whole + b"\0",
        "two volumes": whole + whole,
        "huge claim": whole.replace(b"(5, 256, 256)", b"(9**9,256,256)"),
        "shape of its own": whole.replace(b"(5, 256, 256)", b"(4, 256, 256)"),
        "code in the header": whole.replace(b"(5, 256, 256)", b"exit(1) or (5,)"),
        "dicom": bytes(128) + b"DICM" + bytes(2000),
    }
    stream = io.BytesIO()
    np.savez(stream, volume)
    bad["npz"] = stream.getvalue()
    cases = bytes_cases(folder, "volume", ".npy", bad.items(), dataset.read_volume, refused)
    cases += bytes_cases(
        folder,
        "volume",
        ".npy",
        [*tenths(whole), *flips(whole, 40, within=128)],
        dataset.read_volume,
        lambda result: np.array_equal(result, volume),
    )
    turned = saved(np.asfortranarray(volume))
    cases += bytes_cases(
        folder,
        "volume",
        ".npy",
        [("column by column", turned)],
        dataset.read_volume,
        lambda result: np.array_equal(result, volume),
    )
    cases += bytes_cases(
        folder,
        "constant volume",
        ".npy",
        [("all 7", saved(volume * 0 + 7))],
        dataset.read_volume,
        lambda result: (result == 7).all(),
    )
    (folder / "folder.npy").mkdir()
    return cases + [
        Case("a folder named .npy", lambda: dataset.read_volume(folder / "folder.npy")),
        Case("no volume", lambda: dataset.read_volume(folder / "absent.npy")),
    ]


# ---------------------------------------------------------------- checkpoints, kept arrays


def checkpoint_cases(folder, rendered):
    state = {
        "model": {"classifier.weight": torch.randn(8, 64), "classifier.bias": torch.zeros(8)},
        "args": {"model": "v0", "lr": 0.05},
        "epoch": 3,
    }
    state = dict.fromkeys(checkpoint.REQUIRED["best"].split()) | state
    checkpoint.save_checkpoint(folder / "whole.pt", "best", **state)
    data, whole = (folder / "whole.pt").read_bytes(), checkpoint.load_checkpoint(folder / "whole.pt")

    def saved(value, **options):
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), script)
    code = Executed(folder / "executed")
    bad = {
        "code": saved({**whole, "scores": code}),
        "code alone": saved(code),
        "code in a pickle": pickle.dumps({**state, "x": code}),
        "code in an old file": saved(
            {"kind": "best", "format": 1, "x": code}, _use_new_zipfile_serialization=False
        ),
        "a module": saved(torch.nn.Linear(2, 2)),
        "a tensor": saved(torch.zeros(3)),
        "a list": saved([1, 2]),
        "a state_dict": saved(state["model"]),
        "another kind": saved({**whole, "kind": "last"}),
        "another format": saved({**whole, "format": 99}),
        "no format": saved({"kind": "best"}),
        "text": b"best epoch: 3\n",
        "nothing": b"",
        "zeros": bytes(4000),
        "pickle": pickle.dumps(3),
        "numpy": saved({"kind": "best", "x": np.float64(3)}),
        "TorchScript": script.getvalue(),
        "zip of nothing": b"PK\x05\x06" + bytes(18),
        "picture": encoded(eye(), "PNG"),
        "random": np.random.default_rng(2).bytes(5000),
    }
    cases = bytes_cases(folder, "checkpoint", ".pt", bad.items(), checkpoint.load_checkpoint, refused)
    cases += bytes_cases(
        folder,
        "checkpoint",
        ".pt",
        [*tenths(data), *flips(data, 80)],
        checkpoint.load_checkpoint,
        equals(whole),
    )
    (folder / "folder.pt").mkdir()
    return cases + [
        Case("a folder named .pt", lambda: checkpoint.load_checkpoint(folder / "folder.pt")),
        Case("no checkpoint", lambda: checkpoint.load_checkpoint(folder / "absent.pt")),
    ]


def kept_cases(folder, rendered):
    """A kept array that is cut short or has a damaged header is made again; damaged facts are refused."""
    array = np.random.default_rng(0).random((50, 30), dtype=np.float32)

    def fill(empty):
        empty[:] = array

    def read(damaged):
        path = folder / f"kept{next(numbers)}.npy"
        if damaged is not None:
            path.write_bytes(damaged)
        return np.array(cache.kept_array(path, array.shape, np.float32, fill))

    def read_pictures(damaged):
        kept = Pictures(files, "none", SIDE, folder / "cache", 0)
        kept.path.with_suffix(".json").write_bytes(damaged)
        try:
            return Pictures(files, "none", SIDE, folder / "cache", 0).failed
        finally:
            kept.path.with_suffix(".json").write_bytes(facts)

    numbers = iter(range(10**6))
    data = io.BytesIO()
    np.save(data, array)
    data = data.getvalue()
    others = {
        "nothing": b"",
        "zeros": bytes(6128),
        "another type": data.replace(b"<f4", b"<f8"),
        "text": b"kept",
        "longer": data + b"\0",
        "another shape": data.replace(b"(50, 30)", b"(30, 50)"),
        "pickle": pickle.dumps(Executed(folder / "executed")),
        "gone": None,
    }
    damaged = [*tenths(data), *flips(data, 40, 1, within=128), *others.items()]
    cases = [
        Case(f"kept array, {name}", lambda content=content: read(content), equals(array))
        for name, content in damaged
    ]
    (folder / "eye.png").write_bytes(encoded(eye(), "PNG"))
    (folder / "bad.png").write_bytes(b"no picture")
    files = [(str(folder / name),) for name in ("eye.png", "bad.png")]
    kept = Pictures(files, "none", SIDE, folder / "cache", 0)
    facts, failed = kept.path.with_suffix(".json").read_bytes(), kept.failed
    others = {"no object": b"[1]", "of another": b'{"bytes": 1}', "nothing": b"", "zeros": bytes(300)}
    return cases + [
        Case(f"facts about pictures, {name}", lambda content=content: read_pictures(content), equals(failed))
        for name, content in [*tenths(facts), *others.items()]
    ]


# ---------------------------------------------------------------- what somebody asks a network about


def memory_cases(folder, rendered):
    """Pictures in memory, as the Python call takes them, for a network that is made once."""
    args = train_arguments(["--dataset", "retina", "--size", "96"])
    model = models.build_model("alexnet", 3, "none", 96)
    checkpoint.save_checkpoint(
        folder / "best.pt",
        "best",
        model=model.state_dict(),
        args=vars(args),
        labels=tables.RETINA_LABELS,
        task="multiclass",
        family="classes",
        thresholds=None,
        prior=[0.2, 0.3, 0.5],
        ordered=False,
        data={"rendered": True},
        **dict.fromkeys(("epoch", "loss", "scores", "rows", "seen")),
    )
    net, whole = predictor.load(folder / "best.pt", "cpu", "fp32", 0), np.asarray(eye())
    expected = net.predict(whole)
    bad = {
        "no axis": whole[0, 0, 0],
        "one axis": whole[0, 0],
        "four axes": whole[None],
        "channels first": whole.transpose(2, 0, 1),
        "five channels": np.concatenate([whole, whole[:, :, :2]], 2),
        "float": whole / 255,
        "float32": (whole / 255).astype(np.float32),
        "int64": whole.astype(np.int64),
        "int16": whole.astype(np.int16),
        "uint16 in colour": whole.astype(np.uint16),
        "uint32": whole.astype(np.uint32),
        "NaN": np.full((50, 50), np.nan),
        "complex": whole[:, :, 0] * 1j,
        "objects": whole.astype(object),
        "text": np.array([["a", "b"]]),
        "empty": whole[:0],
        "no column": whole[:, :0],
        "black": whole * 0,
        "nearly black": whole * 0 + 5,
        "negative": whole[:, :, 0].astype(np.int32) - 300,
        "None": None,
        "a number": 7,
        "bytes": encoded(eye(), "PNG"),
        "a dict": {"eye": whole},
        "a closed picture": closed(folder),
        "a cut file": lazily(folder, encoded(eye(), "JPEG")[:900]),
        "1 x 1": whole[:1, :1],
    }
    same = {
        "a list of lists": whole.tolist(),
        "read only": frozen(whole),
        "backwards": whole[::-1][::-1],
        "RGBA": np.dstack([whole, whole[:, :, :1] * 0 + 255]),
    }
    cases = [
        Case(f"in memory: {name}", lambda value=value: net.predict(value)) for name, value in bad.items()
    ]
    for name, value in same.items():
        given = np.asarray(value) if isinstance(value, list) else value
        cases.append(Case(f"in memory: {name}", lambda given=given: net.predict(given), equals(expected)))
    return cases


def train_arguments(argv):
    return arguments.get_args([*argv, "--weights", "none"])[0]


def frozen(array):
    copy = array.copy()
    copy.setflags(write=False)
    return copy


def closed(folder):
    (folder / "closed.png").write_bytes(encoded(eye(), "PNG"))
    image = Image.open(folder / "closed.png")
    image.load()
    image.close()
    return image


def lazily(folder, data):
    (folder / "lazy.jpg").write_bytes(data)
    return Image.open(folder / "lazy.jpg")


SWEEP = {
    "pictures": picture_cases,
    "annotations": annotation_cases,
    "other tables": other_table_cases,
    "volumes": volume_cases,
    "checkpoints": checkpoint_cases,
    "kept arrays": kept_cases,
    "in memory": memory_cases,
}


@pytest.mark.filterwarnings("ignore")
def test_the_sweep(tmp_path, rendered, capsys):
    counts, wrong = {}, []
    for kind, make in SWEEP.items():
        folder = tmp_path / kind.replace(" ", "_")
        folder.mkdir()
        cases = make(folder, rendered)
        counts[kind] = len(cases)
        wrong += [fault for case in cases if (fault := case.run())]
        assert not (folder / "executed").exists(), "pickled code was executed"
    assert not wrong, f"{len(wrong)} of {sum(counts.values())}:\n" + "\n".join(wrong)
    assert sum(counts.values()) >= 722
    with capsys.disabled():
        print(
            f"\n{sum(counts.values())} damaged inputs: "
            + ", ".join(f"{number} {kind}" for kind, number in counts.items())
        )


def test_the_marker_of_executed_code_works(tmp_path):
    pickle.loads(pickle.dumps(Executed(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()
    assert guard(lambda: checkpoint.load_checkpoint(tmp_path / "absent.pt")) == 2
    values = {  # as JSON takes them
        "a": float("nan"),
        "b": [np.float32("inf"), np.int64(2)],
        "c": np.array([0.1, np.nan]),
        1: tmp_path,
    }
    checkpoint.save_json(tmp_path / "a.json", values)
    expected = {"a": None, "b": [None, 2], "c": [0.1, None], "1": str(tmp_path)}
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == expected
