"""Who is in which part, what a part gives to a network, and what `load` and `load_part` refuse."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import arguments  # noqa: E402
import checkpoint  # noqa: E402
import dataset  # noqa: E402
import decode  # noqa: E402
import samplers  # noqa: E402
import tables  # noqa: E402
from cache import digest  # noqa: E402
from dataset import FeatureSet, PictureSet, VolumeSet, split_patients  # noqa: E402
from decode import GivenPictures, Pictures  # noqa: E402
from errors import InputError  # noqa: E402
from preprocess import load_picture  # noqa: E402
from render_data import render  # noqa: E402
from split import PRETREATED, drop_missing, split  # noqa: E402
from tables import GRADES, targets_of  # noqa: E402

REAL = Path(os.environ.get("REAL_DATA", "absent"))
needs_real = pytest.mark.skipif(not (REAL / "odir").is_dir(), reason="REAL_DATA names no folder with odir/")
POS_WEIGHT = [2.0184, 2.0953, 14.4254, 15.8193, 20.9843, 36.7297, 18.3889, 2.6640]  # published


def refused(function, *words):
    """The message of the InputError that `function` must raise, with all of `words` in it."""
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def write(root, frame, name):
    """A sheet of text or of a data frame -> its folder."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(frame if isinstance(frame, str) else frame.to_csv(index=False))
    return root


def frame_of(name, root):
    return tables.read(name, root).frame


# ---------------------------------------------------------------- the published split


@needs_real
def test_published_split_and_weights():
    table = tables.read("odir", REAL / "odir")
    parts = split("odir", table.frame)
    assert len(table.frame) == 3500 and table.labels == list("NDGCAHMO") and not table.notes
    assert [len(parts[part]) for part in ("train", "val", "test")] == [2792, 698, 0]
    assert parts["val"]["ID"].tolist()[:4] == [296, 4308, 4556, 1710]
    assert parts["val"][table.labels].sum().astype(int).tolist() == [214, 226, 34, 37, 37, 29, 30, 217]
    weight = samplers.pos_weight(targets_of(parts["train"], table.labels))
    assert np.round(weight, 4) == pytest.approx(POS_WEIGHT, abs=1e-4)
    assert not set(PRETREATED) & (set(parts["train"]["ID"]) | set(parts["val"]["ID"]))
    # the bare function on the bare sheet, as its signature promises, in the official order and in any other
    sheet = pd.read_excel(REAL / "odir" / "annotations.xlsx")
    for rows in (sheet, sheet.sample(frac=1, random_state=3)):
        train, val = split_patients(rows)
        assert train["ID"].tolist() == parts["train"]["ID"].tolist()
        assert val["ID"].tolist() == parts["val"]["ID"].tolist()


@needs_real
def test_a_third_part_leaves_validation_as_it_is():
    frame = frame_of("odir", REAL / "odir")
    plain, three = split("odir", frame), split("odir", frame, test=0.1)
    assert three["val"]["ID"].tolist() == plain["val"]["ID"].tolist()
    assert len(three["test"]) == 349 and len(three["train"]) == 2792 - 349
    assert set(three["train"]["ID"]) | set(three["test"]["ID"]) == set(plain["train"]["ID"])
    assert not set(three["train"]["ID"]) & set(three["test"]["ID"])


@needs_real
def test_the_split_does_not_depend_on_what_is_on_disk(tmp_path):
    here = frame_of("odir", REAL / "odir")
    shutil.copy(REAL / "odir" / "annotations.xlsx", tmp_path)  # without a picture
    parts, without = split("odir", here), split("odir", frame_of("odir", tmp_path))
    assert all(parts[part]["ID"].tolist() == without[part]["ID"].tolist() for part in parts)
    kept, left_out = drop_missing(parts, "drop")
    assert left_out == 3490 - len(kept["train"]) - len(kept["val"])
    assert len(kept["val"]) == 399  # the README of the data says so
    there = set(kept["val"]["ID"])
    assert kept["val"]["ID"].tolist() == [i for i in parts["val"]["ID"] if i in there]  # the published order
    refused(lambda: drop_missing(parts, "stop"), f"{left_out} row(s)", "--missing drop", "_left.jpg")


@pytest.mark.skipif(not (REAL / "idrid").is_dir(), reason="REAL_DATA names no folder with idrid/")
def test_idrid_in_aptos_form():
    frame = frame_of("aptos", REAL / "idrid")
    parts, left_out = drop_missing(split("aptos", frame), "stop")
    assert left_out == 0 and sum(map(len, parts.values())) == 413
    assert min(map(len, parts.values())) == round(413 * 583 / 3662)


# ---------------------------------------------------------------- other splits


def patients(count):
    return pd.DataFrame({"ID": np.arange(count) * 3, "given_part": ""})


def test_split_depends_on_seed_and_fraction():
    sheet = patients(50)
    found = [
        split_patients(sheet, *more)[1]["ID"].tolist() for more in ((0.2, 42), (0.2, 42), (0.2, 43), (0.5,))
    ]
    assert found[0] == found[1] != found[2] and len(found[0]) == 10 and len(found[3]) == 25
    refused(lambda: split_patients(sheet.iloc[:1]), "1 patient(s)")
    for val, test in ((0, 0), (1, 0), (0.5, 0.5), (-0.1, 0), (0.2, -0.1)):
        refused(lambda val=val, test=test: split("odir", sheet, val, test), "leave some to train")


@pytest.mark.parametrize("name", ["odir", "aptos", "dr"])
def test_the_split_depends_on_the_ids_alone(tmp_path, rendered, name):
    """A sheet sorted by age, say, gives the same patients in the same order (issue: 10)."""
    source = rendered(name)
    file = {"odir": "annotations.xlsx", "aptos": "train.csv", "dr": "trainLabels.csv"}[name]
    read = pd.read_excel if name == "odir" else pd.read_csv
    sheet = read(source / file)
    expected = split(name, frame_of(name, source))
    for number, rows in enumerate((sheet.iloc[::-1], sheet.sample(frac=1, random_state=0))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for entry in source.iterdir():
            if entry.name != file:
                (folder / entry.name).symlink_to(entry)
        rows.to_excel(folder / file, index=False) if name == "odir" else rows.to_csv(
            folder / file, index=False
        )
        found = split(name, frame_of(name, folder))
        assert {part: rows["ID"].tolist() for part, rows in found.items()} == {
            part: rows["ID"].tolist() for part, rows in expected.items()
        }


def test_aptos_published_sizes_stratified(tmp_path):
    counts = [1805, 370, 999, 193, 295]  # the competition's 3 662 training rows
    grades = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts))
    sheet = pd.DataFrame({"id_code": [f"{i:012x}" for i in range(3662)], "diagnosis": grades})
    table = tables.read("aptos", write(tmp_path, sheet, "train.csv"))
    parts = split("aptos", table.frame)
    assert table.labels == GRADES and [len(parts[part]) for part in parts] == [2346, 733, 583]
    ids = [i for part in parts.values() for i in part["ID"]]
    assert sorted(ids) == sorted(table.frame["ID"])
    for part in parts.values():
        assert np.bincount(part["target"]) == pytest.approx(np.array(counts) * len(part) / 3662, abs=1.5)
    assert split("aptos", table.frame)["val"]["ID"].tolist() == parts["val"]["ID"].tolist()
    assert split("aptos", table.frame, seed=1)["val"]["ID"].tolist() != parts["val"]["ID"].tolist()


def test_a_split_that_the_data_set_brings_is_kept(tmp_path):
    for part, names in (("train", "abc"), ("val", "ab"), ("test", "a")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for file in ("1.png", "2.JPG", "notes.txt"):
                (tmp_path / part / name / file).touch()
    frame = frame_of("aptos", tmp_path)
    assert [len(rows) for rows in split("aptos", frame).values()] == [6, 4, 2]
    refused(lambda: split("aptos", frame, val=0.3), "brings its own split")


def test_dr_keeps_both_eyes_of_a_patient_together(tmp_path):
    rng = np.random.default_rng(1)
    rows = [(f"{patient}_{eye}", rng.integers(5)) for patient in range(100) for eye in ("left", "right")]
    sheet = pd.DataFrame(rows, columns=["image", "level"]).sample(frac=1, random_state=1)
    frame = frame_of("dr", write(tmp_path, sheet, "trainLabels.csv"))
    parts = split("dr", frame, test=0.1)
    found = {part: set(rows["patient"]) for part, rows in parts.items()}
    assert [len(found[part]) for part in ("train", "val", "test")] == [70, 20, 10]
    assert len(found["train"] | found["val"] | found["test"]) == 100
    assert [len(part) for part in parts.values()] == [140, 40, 20]
    worst = frame.groupby("patient")["target"].max()
    for names in found.values():  # stratified by the worse eye
        share = np.bincount(worst, minlength=5) * len(names) / 100
        assert np.bincount(worst[list(names)], minlength=5) == pytest.approx(share, abs=1.5)


def test_too_few_of_a_class_to_split(tmp_path):
    text = "id_code,diagnosis\n" + "".join(f"{i},{int(i == 0)}\n" for i in range(30))
    refused(
        lambda: split("aptos", frame_of("aptos", write(tmp_path, text, "train.csv"))),
        "6 of 30 patients cannot be split",
        "every class",
    )
    two = "id_code,diagnosis\na,0\nb,1\n"
    refused(lambda: split("aptos", frame_of("aptos", write(tmp_path, two, "train.csv"))), "0 of 2 patients")


def test_missing_files_stop_or_cost_their_rows(tmp_path):
    write(tmp_path, "id_code,diagnosis\n001,0\n002,1\n003.jpeg,2\n004,3\n", "train.csv")
    (tmp_path / "train_images").mkdir()
    for name in ("001.png", "002.jpg", "003.jpeg"):
        (tmp_path / "train_images" / name).touch()
    frame = frame_of("aptos", tmp_path)
    assert [Path(files[0]).name for files in frame["files"]] == ["001.png", "002.jpg", "003.jpeg", "004"]
    refused(lambda: drop_missing({"train": frame}, "stop"), "1 row(s)", "004")
    kept, left_out = drop_missing({"train": frame}, "drop")
    assert left_out == 1 and kept["train"]["target"].tolist() == [0, 1, 2]


def test_a_hundred_thousand_rows(tmp_path):
    n = 100_000
    names = [f"{i // 2}_{('left', 'right')[i % 2]}" for i in range(n)]
    sheet = pd.DataFrame({"image": names, "level": np.random.default_rng(0).integers(5, size=n)})
    parts = split("dr", frame_of("dr", write(tmp_path, sheet, "trainLabels.csv")))
    kept, left_out = drop_missing(parts, "drop")
    assert len(parts["val"]) == n // 5 and left_out == n and sum(map(len, kept.values())) == 0


# ---------------------------------------------------------------- the data sets, as torch users expect them


@pytest.fixture(scope="module")
def eyes(rendered, tmp_path_factory):
    """Six files of one rendered patient each, as three pairs, decoded at 32 pixels."""
    files = sorted(str(file) for file in (rendered("odir") / "images").iterdir())[:6]
    rows = [tuple(files[i : i + 2]) for i in range(0, 6, 2)]
    return Pictures(rows, "fov", 32, tmp_path_factory.mktemp("eyes"), 0)


def test_eye_pairs_by_number_and_by_batch(eyes):
    targets = np.eye(3, dtype=np.float32)
    data = PictureSet(eyes, targets)
    assert len(data) == 3
    images, target = data[1]
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and target.tolist() == [0, 1, 0]
    for eye in range(2):
        pixels = load_picture(eyes.files[2 + eye], "fov", 32)[0].transpose(2, 0, 1)
        assert np.array_equal(images[eye].numpy() * 255, pixels)
    batch = data.__getitems__([2, 0])
    assert set(batch) == {"images", "targets"} and batch["images"].dtype == torch.uint8
    assert batch["targets"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert torch.equal(batch["images"][1] / 255, data[0][0].permute(0, 2, 3, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=lambda batch: batch)
    assert [len(batch["images"]) for batch in loader] == [2, 1]


def test_random_views_depend_on_row_and_repeat(eyes):
    data = PictureSet(eyes, np.zeros(3, np.float32), seed=5, view=2)
    batch = data.__getitems__([(1, 0), (1, 1), (2, 0)])
    again = data.__getitems__([(2, 0), (1, 1)])
    assert batch["uniforms"].shape == (3, 3, 11)  # both eyes', and the pair's
    assert torch.equal(batch["uniforms"][[2, 1]], again["uniforms"])
    assert not torch.equal(batch["uniforms"][0], batch["uniforms"][1])
    assert "uniforms" not in data.__getitems__([])


def test_features_by_row_and_at_their_place():
    features = torch.arange(8.0).reshape(4, 2)
    plain = FeatureSet(features[:3], np.array([0, 1, 2]))
    assert len(plain) == 3 and not plain.on_device
    batch = plain.__getitems__([(2, 1), (0, 0)])
    assert batch["features"].tolist() == [[4, 5], [0, 1]] and batch["targets"].tolist() == [2, 0]
    placed = FeatureSet(features, np.array([7, 8]), [(0, 0), (1, 1), (1, 0), (0, 1)])
    batch = placed.__getitems__([(0, 1), (1, 0)])
    assert batch["features"].tolist() == [[6, 7], [4, 5]] and batch["targets"].tolist() == [7, 8]


def test_knees_of_different_length_and_their_crop(rendered):
    frame = frame_of("mrnet", rendered("mrnet"))
    data = VolumeSet(frame["files"], np.zeros((len(frame), 3), np.float32), 72)
    batch = data.__getitems__([1, 0])
    whole = [np.load(file) for file in frame["files"].iloc[1]]
    for plane, volume in enumerate(whole):
        assert batch["lengths"][plane][0] == len(volume)
        assert np.array_equal(batch["volumes"][plane][: len(volume)], volume[:, 92:164, 92:164])
    volumes, target = data[0]
    assert [len(volume) for volume in volumes] == [lengths[1] for lengths in batch["lengths"]]
    assert target.tolist() == [0, 0, 0] and len(data) == len(frame)
    empty = data.__getitems__([])
    assert [volume.shape for volume in empty["volumes"]] == [(0, 72, 72)] * 3 and empty["lengths"] == [[]] * 3
    scaled = VolumeSet(frame["files"], np.zeros((len(frame), 3), np.float32), 64, "none")[1][0]
    assert [volume.shape[1:] for volume in scaled] == [(64, 64)] * 3
    assert float(scaled[0].float().mean()) == pytest.approx(float(whole[0].mean()), abs=1)


def test_a_subset_keeps_rows_pictures_and_targets_together(eyes):
    table = pd.DataFrame({"ID": [10, 20, 30], "patient": ["a", "b", "c"], "files": [()] * 3})
    part = dataset.Part(table, eyes, np.eye(3, dtype=np.float32), 4, 32)
    fewer = part.subset([2, 0])
    assert len(part) == 3 and len(fewer) == 2 and fewer.ids() == ["30", "10"] and fewer.expected == 4
    assert fewer.patients().tolist() == ["c", "a"]
    for new, old in ((0, 2), (1, 0)):
        (images, target), (expected, wanted) = fewer.dataset()[new], part.dataset()[old]
        assert torch.equal(images, expected) and torch.equal(target, wanted)
        assert all(np.array_equal(a, b) for a, b in zip(fewer.shown(new), part.shown(old), strict=True))


# ---------------------------------------------------------------- decoded pictures, kept


def test_decoded_pictures_are_kept_and_say_what_was_found(eyes, tmp_path, monkeypatch):
    files = [shutil.copy(file, tmp_path) for file in eyes.files[:3]]
    cut = Path(files[1])
    cut.write_bytes(cut.read_bytes()[:-2])  # only the end marker is gone
    Path(files[2]).write_bytes(b"no picture")
    rows = [(file,) for file in files]
    found = Pictures(rows, "fov", 32, tmp_path / "cache", 0)
    assert found.repaired == [str(cut)] and list(found.failed) == [files[2]]
    assert "no JPEG" in found.failed[files[2]] and [len(content) for content in found.contents] == [2, 2, 0]
    monkeypatch.setattr(decode, "load_picture", None)  # the second time nothing is decoded
    again = Pictures(rows, "fov", 32, tmp_path / "cache", 0)
    assert np.array_equal(again.array(), found.array()) and again.failed == found.failed
    assert again.repaired == found.repaired and again.contents == found.contents


def cut_short(path):
    """As another file of the same name: whoever has mapped the old one keeps it."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_damaged_pictures_and_facts_are_made_again(eyes, tmp_path, damage, suffix):
    rows = [(file,) for file in eyes.files]
    first = Pictures(rows, "fov", 32, tmp_path, 0)
    pixels = first.array().copy()
    damage(first.path.with_suffix(suffix))
    again = Pictures(rows, "fov", 32, tmp_path, 0)
    assert again.contents == first.contents and np.array_equal(again.array(), pixels)


def test_what_the_system_refuses_is_asked_again(eyes, tmp_path, monkeypatch):
    """A permission error passes; kept, it would later leave a patient out silently (issue 12: 8)."""
    file = shutil.copy(eyes.files[0], tmp_path)
    real = decode.load_picture

    def denied(path, *args):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(decode, "load_picture", denied)
    refused(lambda: Pictures([(file,)], "fov", 32, tmp_path / "cache", 0), "Permission denied", "run again")
    assert not list((tmp_path / "cache").glob("pictures-*"))
    monkeypatch.setattr(decode, "load_picture", real)
    assert not Pictures([(file,)], "fov", 32, tmp_path / "cache", 0).failed


def test_a_worker_gets_the_path_not_the_pictures(eyes, tmp_path):
    """Under spawn and forkserver every worker unpickles its data set (issue 11: 6)."""
    big = Pictures([(file,) for file in eyes.files], "fov", 256, tmp_path, 0)
    data = PictureSet(big, np.zeros(6, np.float32))
    data.__getitems__([0])  # mapped in this process
    sent = pickle.dumps(data)
    assert big.array().nbytes > 1_000_000 and len(sent) < 10_000
    arrived = pickle.loads(sent)
    assert arrived.pictures.mapped is None
    assert torch.equal(arrived.__getitems__([3])["images"], data.__getitems__([3])["images"])
    assert isinstance(arrived.pictures.array(), np.memmap)


def test_pictures_in_memory_are_taken_as_kept_ones_are(eyes):
    given = PictureSet(GivenPictures(eyes.array(), eyes.rows[::-1].copy()), np.zeros(3, np.float32))
    assert torch.equal(given[0][0], PictureSet(eyes, np.zeros(3, np.float32))[2][0])


# ---------------------------------------------------------------- load


@pytest.fixture
def retina(rendered, tmp_path):
    """A copy of the rendered retina set -> (folder, load(*flags))."""
    root = tmp_path / "retina"
    shutil.copytree(rendered("retina"), root)

    def load(*flags):
        fixed = ["--dataset", "retina", "--data", str(root), "--size", "72", "--workers", "0"]
        return dataset.load(
            arguments.get_args([*fixed, "--cache", str(tmp_path / "cache"), *map(str, flags)])[0]
        )

    return root, load


def test_what_load_says_of_its_parts(retina):
    root, load = retina
    data = load("--test-fraction", 0.2)
    sizes = {part: len(rows) for part, rows in data.rows.items()}
    assert data.facts["parts"] == sizes and set(sizes) == {"train", "val", "test"}
    opened = {part: {bool(digest) for _, digest in rows.values()} for part, rows in data.rows.items()}
    assert opened == {"train": {True}, "val": {True}, "test": {False}}
    assert data.facts["rendered"] and data.facts["root"] == str(root) and data.facts["duplicates"] == 0
    assert data.facts["left_out"] == data.facts["unreadable"] == 0
    assert [part.expected for part in (data.train, data.val)] == [sizes["train"], sizes["val"]]
    counts = np.bincount(data.train.targets, minlength=3)
    assert data.prior() == pytest.approx(counts / counts.sum())
    assert not set(data.train.patients()) & set(data.val.patients())


def test_digest_changes_with_rows_labels_pictures_and_parts(retina):
    root, load = retina
    digests = [load(*more).facts["digest"] for more in ([], ["--split-seed", 1], ["--test-fraction", 0.2])]
    relabel(root, turn)
    digests.append(load().facts["digest"])
    file = load().train.table["files"].iloc[0][0]
    Image.open(file).rotate(90).save(file)
    digests.append(load().facts["digest"])
    assert len(set(digests)) == 5 and load().facts["digest"] == digests[-1]


def test_missing_and_unreadable_rows_are_counted_beside_what_should_be_there(retina):
    root, load = retina
    data = load()
    train, val = (part.table["files"].iloc[0][0] for part in (data.train, data.val))
    sizes = [len(part) for part in (data.train, data.val)]
    Path(train).unlink()
    Path(val).write_bytes(b"no picture")
    refused(load, "1 row(s) have no picture", Path(train).name)
    shutil.copy(data.train.table["files"].iloc[1][0], train)
    Image.open(train).rotate(90).save(train)
    refused(load, "1 file(s) cannot be read", Path(val).name, "--missing drop")
    Path(train).unlink()
    less = load("--missing", "drop")
    assert [len(part) for part in (less.train, less.val)] == [sizes[0] - 1, sizes[1] - 1]
    assert [part.expected for part in (less.train, less.val)] == sizes
    assert less.facts["left_out"] == 1 and less.facts["unreadable"] == 1
    assert less.facts["parts"]["val"] == sizes[1] - 1
    assert less.val.table["ID"].tolist() == data.val.table["ID"].tolist()[1:]
    assert np.array_equal(less.val.dataset()[0][0], data.val.dataset()[1][0])


def test_nothing_left_to_train_on(retina):
    root, load = retina
    for file in load().val.table["files"]:
        Path(file[0]).unlink()
    refused(lambda: load("--missing", "drop"), "no row is left")


def test_shuffled_labels_are_those_of_the_training_part_alone(retina):
    _, load = retina
    plain, control = load(), load("--shuffle-labels")
    assert not np.array_equal(plain.train.targets, control.train.targets)
    assert np.array_equal(plain.train.targets, plain.train.table["target"]), (
        "shuffled only where it is asked for"
    )
    assert np.array_equal(np.sort(plain.train.targets), np.sort(control.train.targets))
    assert np.array_equal(plain.val.targets, control.val.targets)
    assert plain.facts["digest"] == control.facts["digest"]  # of the data as they are


def test_a_calibration_part_is_cut_from_the_training_patients(rendered, tmp_path):
    flags = ["--data", str(rendered("odir")), "--size", "32", "--workers", "0", "--cache", str(tmp_path)]
    plain = dataset.load(arguments.get_args(flags)[0])
    three = dataset.load(arguments.get_args([*flags, "--calibration-fraction", "0.25"])[0])
    assert three.val.ids() == plain.val.ids() and len(three.calibration) == 8
    assert {*three.train.ids(), *three.calibration.ids()} == set(plain.train.ids())
    assert not set(three.train.ids()) & set(three.calibration.ids())


def test_without_data_stand_ins_are_drawn_and_named_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    args = arguments.get_args(["--size", "32", "--workers", "0"])[0]
    commands = []

    def draw(command):
        commands.append(command)
        return dataset.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(dataset.subprocess, "run", draw)
    refused(lambda: dataset.load(args), "could not be rendered", "data/rendered/odir")
    assert len(commands) == 1 and "--dataset" in commands[0]
    assert capfd.readouterr().out.count("RENDERED STAND-INS") == 1
    args.data = "nowhere"  # what was named is never replaced
    refused(lambda: dataset.load(args), "nowhere", "is no folder")
    assert len(commands) == 1


# ---------------------------------------------------------------- a picture in two parts


def same_bytes(source, target):
    shutil.copy(source, target)


def same_pixels(source, target):
    """Another file of the same picture: a PNG with a comment in the place of the JPEG."""
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", "another file")
    with Image.open(source) as image:
        image.convert("RGB").save(target, format="PNG", pnginfo=comment)


@pytest.mark.parametrize("copy", [same_bytes, same_pixels])
@pytest.mark.parametrize("crop", [[], ["--augment", "lab", "--crop", "67"]])
def test_a_validation_picture_that_is_in_training_stops_the_run(retina, copy, crop):
    """Known by its content, not its name; with --crop the parts are decoded at two sizes (issue 12: 7)."""
    _, load = retina
    data = load(*crop)
    train, val = (part.table["files"] for part in (data.train, data.val))
    for number in range(2):
        copy(train.iloc[number][0], val.iloc[number][0])
    refused(lambda: load(*crop), "2 validation row(s)", "--duplicates keep")
    kept = load("--duplicates", "keep", *crop)
    assert kept.facts["duplicates"] == 2 and len(kept.val) == len(data.val)


def test_a_knee_in_two_parts(rendered, tmp_path):
    root = tmp_path / "mrnet"
    shutil.copytree(rendered("mrnet"), root)
    flags = ["--dataset", "mrnet", "--data", str(root), "--size", "72", "--cache", str(tmp_path / "cache")]
    data = dataset.load(arguments.get_args(flags)[0])
    assert data.facts["duplicates"] == 0 and data.train.pictures is None
    shutil.copy(data.train.table["files"].iloc[0][1], data.val.table["files"].iloc[1][1])
    refused(lambda: dataset.load(arguments.get_args(flags)[0]), "1 validation row(s)")


def test_another_slice_makes_another_knee(rendered, tmp_path):
    """Of every slice, not of the middle one that is shown."""
    root = tmp_path / "mrnet"
    shutil.copytree(rendered("mrnet"), root)
    flags = ["--dataset", "mrnet", "--data", str(root), "--size", "72", "--cache", str(tmp_path / "cache")]
    data = dataset.load(arguments.get_args(flags)[0])
    file = data.val.table["files"].iloc[0][2]
    volume = np.load(file)
    volume[0, 128, 128] += 1
    np.save(file, volume)
    again = dataset.load(arguments.get_args(flags)[0])
    changed = [name for name, row in again.rows["val"].items() if row != data.rows["val"][name]]
    assert changed == data.val.ids()[:1]


@pytest.mark.parametrize("taken", ["train", "val"])
def test_calibration_patients_are_in_no_other_part(rendered, tmp_path, taken):
    root = tmp_path / "odir"
    shutil.copytree(rendered("odir"), root)
    flags = ["--data", str(root), "--size", "32", "--workers", "0", "--cache", str(tmp_path / "cache")]
    flags += ["--calibration-fraction", "0.25"]
    data = dataset.load(arguments.get_args(flags)[0])
    source = getattr(data, taken).table["files"].iloc[0][0]
    shutil.copy(source, data.calibration.table["files"].iloc[1][0])
    name = {"train": "calibration", "val": "validation"}[taken]
    refused(lambda: dataset.load(arguments.get_args(flags)[0]), f"1 {name} row(s)", "--duplicates keep")
    kept = dataset.load(arguments.get_args([*flags, "--duplicates", "keep"])[0])
    assert kept.facts["duplicates"] == (taken == "val")
    assert any("learned on rows that are trained on" in note for note in kept.facts["notes"]) == (
        taken == "train"
    )


def test_a_last_pt_is_no_source_of_weights(retina, trained):
    """It is refused where the network is built; here it is known by what it is."""
    _, load = retina
    assert load("--weights", trained("retina") / "last.pt").facts["duplicates"] == 0


def test_weights_that_know_a_validation_patient_by_name(retina, trained, tmp_path):
    """Re-encoded, or the other eye: no picture is the same. And what was drawn is said to be."""
    root, load = retina
    for file in (root / "train").iterdir():
        with Image.open(file) as image:
            image.rotate(90).save(file, quality=70)
    weights = trained("retina") / "best.pt"
    notes = load("--weights", weights).facts["notes"]
    assert any("RENDERED" in note for note in notes) and not any("by their names" in note for note in notes)
    other = load("--weights", weights, "--split-seed", 7)
    theirs = set(tables.patients_of(checkpoint.load_checkpoint(weights)["rows"]["train"]))
    known = theirs.intersection(other.val.patients())
    assert f"--weights was trained on {len(known)} of the val patients" in " ".join(other.facts["notes"])
    assert known and not other.facts["duplicates"]


@needs_real
def test_no_real_validation_picture_is_in_training(tmp_path):
    """Of all 4 000 pictures by their bytes; by pixels the run itself looks."""
    parts, _ = drop_missing(split("odir", frame_of("odir", REAL / "odir")), "drop")
    digests = {}
    for name in ("train", "val"):
        files = [file for row in parts[name]["files"] for file in row]
        digests[name] = {dataset.digest(Path(file).read_bytes()) for file in files}
    assert len(digests["val"]) == 2 * 399 and not digests["train"] & digests["val"]


# ---------------------------------------------------------------- load_part


@pytest.fixture
def finished(trained, rendered, tmp_path):
    """A finished run on the retina set -> (args, best.pt's content, a copy of its data, load_part)."""
    saved = checkpoint.load_checkpoint(trained("retina") / "best.pt")
    args = arguments.argparse.Namespace(**saved["args"])
    args.cache = str(tmp_path / "cache")
    copy = tmp_path / "copy"
    shutil.copytree(rendered("retina"), copy)

    def load(part="val", root=None, **more):
        return dataset.load_part(args, saved, part, root, **more)

    return saved, copy, load


def test_a_part_comes_back_as_the_run_had_it(finished):
    saved, copy, load = finished
    part, facts = load()
    assert part.ids() == list(saved["rows"]["val"]) and part.expected == len(part)
    assert part.targets.tolist() == [int(target) for target, _ in saved["rows"]["val"].values()]
    assert facts["own"] and facts["rendered"] and not facts["left_out"]
    whole, facts = load("all")
    assert len(whole) == sum(map(len, saved["rows"].values())) and facts["own"]
    assert facts["notes"][-1].startswith(
        f"{len(saved['rows']['train'])} row(s), by name, are those it was trained"
    )
    moved, facts = load(root=copy)  # the same rows and labels in another folder
    assert moved.ids() == part.ids() and facts["own"] and "are the run's" in facts["notes"][-1]
    refused(lambda: load("test"), "no test part", "--test-fraction")


def relabel(root, change):
    sheet = pd.read_csv(root / "train.csv")
    change(sheet)
    sheet.to_csv(root / "train.csv", index=False)


def turn(sheet):
    """Every picture gets the next label."""
    columns = tables.RETINA_LABELS
    sheet[columns] = sheet[[columns[-1], *columns[:-1]]].to_numpy()


def test_edited_labels_stop_the_evaluation(finished):
    """Unless --data names another data set, and then it says so (issue 12: 6)."""
    saved, copy, load = finished
    saved["data"]["root"] = str(copy)
    assert load()[1]["own"]
    relabel(copy, turn)
    wanted = len(saved["rows"]["val"])
    message = refused(load, f"{wanted} row(s)", "other labels than in training", "--data")
    assert list(saved["rows"]["val"])[0] in message
    refused(lambda: load("all"), "other labels than in training")
    refused(lambda: load(root=copy), "other labels than in training")  # the run's own folder by name
    saved["data"]["root"] = str(copy.parent / "elsewhere")
    part, facts = load(root=copy)
    assert not facts["own"] and "other rows or labels" in facts["notes"][-1]
    assert part.targets.tolist() != [int(target) for target, _ in saved["rows"]["val"].values()]


def test_one_edited_label_is_enough(finished):
    saved, copy, load = finished
    saved["data"]["root"] = str(copy)
    name = list(saved["rows"]["val"])[3]

    def change(sheet):
        row = sheet["filename"] == name
        values = sheet.loc[row, tables.RETINA_LABELS].to_numpy()
        sheet.loc[row, tables.RETINA_LABELS] = np.roll(values, 1)

    relabel(copy, change)
    assert name in refused(load, "1 row(s)", "other labels")


def test_other_patients_in_another_folder(finished):
    saved, copy, load = finished
    relabel(copy, lambda sheet: sheet.update({"filename": "new_" + sheet["filename"]}))
    for file in list((copy / "train").iterdir()):
        file.rename(file.with_name(f"new_{file.name}"))
    refused(lambda: load(root=copy), "are not in this data set", "--split all")
    refused(lambda: load(root=copy, missing="drop"), "are not in this data set")  # not one of them is there
    part, facts = load("all", copy)
    assert len(part) == sum(map(len, saved["rows"].values())) and not facts["own"]
    assert all(name.startswith("new_") for name in part.ids())
    saved["data"]["root"] = str(copy)
    refused(load, "They have changed since training")


def test_what_is_missing_at_test_time_is_counted(finished):
    """Rows scored beside the rows that the part should have (issue 12: 9)."""
    saved, copy, load = finished
    saved["data"]["root"] = str(copy)
    files = [Path(file[0]) for file in load()[0].table["files"]]
    wanted = len(files)
    files[0].unlink()
    refused(load, "1 row(s) have no picture", files[0].name)
    files[1].write_bytes(b"no picture")
    relabel(copy, lambda sheet: sheet.replace({"filename": {files[2].name: "another.jpg"}}, inplace=True))
    files[2].rename(files[2].with_name("another.jpg"))
    part, facts = load(missing="drop")
    assert len(part) == wanted - 3 and part.expected == wanted and facts["left_out"] == 3
    assert part.ids() == list(saved["rows"]["val"])[3:]
    for file in files:
        file.unlink(missing_ok=True)
    refused(lambda: load(missing="drop"), "no row is left")


def test_another_data_sets_classes_are_refused(rendered, trained, tmp_path):
    """The grades of this run against an ImageFolder of two classes."""
    saved = checkpoint.load_checkpoint(trained("aptos") / "best.pt")
    for number, name in enumerate(("wet", "dry") * 4):
        folder = tmp_path / "folders" / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((rendered("aptos") / "train_images").iterdir()), folder / f"{number}.png")
    args = arguments.argparse.Namespace(**saved["args"])
    refused(
        lambda: dataset.load_part(args, saved, "all", tmp_path / "folders"),
        "has the classes dry, wet",
        "trained on 0, 1, 2, 3, 4",
    )


def test_what_is_left_out_shuffled_or_shared_is_noted(tmp_path, trained):
    """An unreadable picture, shuffled labels, test pictures that chose the epoch, other classes of --weights."""
    root = tmp_path / "eyes"
    render(root, "odir", 40, 64)
    flags = ["--data", str(root), "--size", "32", "--workers", "0", "--cache", str(tmp_path / "cache")]
    flags += ["--test-fraction", "0.2", "--missing", "drop", "--shuffle-labels"]
    first = dataset.load(arguments.get_args(flags)[0])
    Path(first.val.table["files"].iloc[0][0]).write_bytes(b"no picture")
    weights = trained("retina") / "best.pt"
    args = arguments.get_args([*flags, "--weights", str(weights)])[0]
    data = dataset.load(args)
    notes = data.facts["notes"]
    assert "1 row(s) with an unreadable picture are left out (--missing drop)" in notes
    assert "the labels are shuffled among the training rows (--shuffle-labels)" in notes
    content = digest(weights.read_bytes())[:10]
    assert f"--weights best.pt has the digest {content}" in notes
    test = list(data.rows["test"])[:2]
    for name, files in zip(test, data.val.table["files"].iloc[:2], strict=True):
        for file, side in zip(files, ("left", "right"), strict=True):
            shutil.copy(file, root / "images" / f"{name}_{side}.jpg")
    saved = {"data": {"root": str(root), "digest": "x"}, "labels": data.labels, "rows": data.rows, "seen": []}
    part, facts = dataset.load_part(args, saved, "test", missing="drop")
    assert any(note.startswith("2 row(s) hold the pictures of validation rows") for note in facts["notes"])
    assert list(facts["contents"]) == part.ids() and facts["where"] == "test" and not facts["suffix"]


def test_links_to_rendered_pictures_are_rendered(tmp_path):
    render(tmp_path / "drawn", "odir", 8, 64)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/images").symlink_to(tmp_path / "drawn/images")
    assert tables.is_rendered(tmp_path / "linked")
    (tmp_path / "linked/images").unlink()
    assert not tables.is_rendered(tmp_path / "linked")
