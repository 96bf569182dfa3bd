"""predictor.load: one way to a network's answers; whatever the pictures come as, the number of test.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoint
import dataset
import engine
import predictor
from augment import prepare_batch
from cam import grad_cam
from errors import InputError, guard

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("REAL_DATA", "absent"))


def net_of(path, precision="fp32"):
    return predictor.load(path, "cpu", precision, 0)


def saved_as(folder, path, **changes):
    """A copy of a run's best.pt with other content."""
    state = checkpoint.load_checkpoint(folder / "best.pt")
    checkpoint.save_checkpoint(path, **{**state, **changes})
    return path


# ---------------------------------------------------------------- one number


def four_digits(rows):
    return [[f"{prob:.4f}" for prob in row] for row in np.asarray(rows).tolist()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["odir", "retina", "mrnet"]
)  # a frozen trunk with kept features; fine-tuned ones
def test_every_way_gives_the_same_number(name, precision, trained, tmp_path):
    """Rows of the validation part: as test.py evaluates them, one by one, and by the pass behind the heat map."""
    net = net_of(trained(name), precision)
    net.args.cache = str(tmp_path)
    part, _ = dataset.load_part(net.args, net.saved, "val")
    _, probs = net.evaluate(part)
    files = [row if len(row) > 1 else row[0] for row in part.table["files"]]
    answers = net.predict(files)
    assert four_digits([list(answer.values()) for answer in answers]) == four_digits(probs)
    assert np.ptp(probs, axis=0).max() > 1e-3, "all rows alike: the comparison would say nothing"
    for row in range(min(3, len(part))):
        alone = net.predict(*part.table["files"].iloc[row])
        inputs, _ = prepare_batch(part.dataset().__getitems__([row]), net.device)
        behind_the_map = engine.Criterion(net.task).probs(grad_cam(net.fast, *inputs)[0]).numpy()
        assert four_digits([list(alone.values())]) == four_digits(behind_the_map) == four_digits(probs[[row]])


def test_a_run_that_was_compiled_is_answered_for_as_it_is_tested(trained, tmp_path):
    args = {**checkpoint.load_checkpoint(trained("odir") / "best.pt")["args"], "compile": True}
    assert net_of(saved_as(trained("odir"), tmp_path / "best.pt", args=args)).args.compile is False


def test_paths_arrays_pictures_lists_and_folders(trained, rendered, tmp_path):
    net, images = net_of(trained("odir")), rendered("odir") / "images"
    names = [file.name.removesuffix("_left.jpg") for file in sorted(images.glob("*_left.jpg"))[:3]]
    pairs = [(images / f"{name}_left.jpg", images / f"{name}_right.jpg") for name in names]
    expected = [net.predict(*pair) for pair in pairs]
    assert list(expected[0]) == net.labels and expected[0] != expected[1]
    opened = [tuple(Image.open(path) for path in pair) for pair in pairs]
    arrays = [tuple(np.asarray(Image.open(path)) for path in pair) for pair in pairs]
    folder = tmp_path / "eyes"
    folder.mkdir()
    for path in [path for pair in pairs for path in pair]:
        shutil.copyfile(path, folder / path.name)
    close = []
    for given in (pairs, [list(map(str, pair)) for pair in pairs], opened, arrays, str(folder)):
        close.append([list(answer.values()) for answer in net.predict(given)])
    order = sorted(range(3), key=lambda k: names[k])  # a folder is read in the order of its names
    close[-1] = [close[-1][order.index(k)] for k in range(3)]
    for answers in close:
        np.testing.assert_allclose(answers, [list(answer.values()) for answer in expected], atol=1e-6)
    np.testing.assert_allclose(list(net.predict(pairs[0][0], arrays[0][1]).values()), close[0][0], atol=1e-6)
    single = net_of(trained("retina"))
    eyes = sorted((rendered("retina") / "test").iterdir())[:2]
    assert (
        single.predict(list(eyes))
        == single.predict(*eyes)
        == single.predict([Image.open(eye) for eye in eyes])
    )


def test_a_large_jpeg_opened_by_pillow_is_read_like_its_file(trained, tmp_path):
    """A JPEG far above the network's size is decoded at a reduced size: so is one that Pillow has opened."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(30, 255, (900, 900, 3), np.uint8)).save(tmp_path / "large.jpg")
    net = net_of(trained("retina"))
    assert net.predict(Image.open(tmp_path / "large.jpg")) == net.predict(tmp_path / "large.jpg")


def test_grey_and_16_bit_arrays_are_taken_as_files_of_them_are(trained, tmp_path):
    net, grey = net_of(trained("retina")), np.tile(np.arange(96, dtype=np.uint8) * 2 + 9, (96, 1))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    expected = net.predict(tmp_path / "grey.png")
    assert (
        net.predict(tmp_path / "sixteen.png")
        == net.predict(grey)
        == net.predict(grey.astype(np.uint16) * 257)
        == expected
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ((np.zeros((50, 50, 3), np.uint8),), "wholly black"),
        ((np.zeros((3, 50, 50), np.float64),), "in memory"),
        ((np.zeros((50, 50, 3), np.int32),), "in memory"),
        ((np.zeros((50, 50), np.int32),), "expected uint8"),
        ((np.zeros((4, 50, 3), np.uint8),), "at least 16"),
        ((), r"0 picture\(s\) in memory"),
        ((np.zeros((50, 50, 3), np.uint8),) * 2, "expected 1 of a patient, or a list"),
        (("gone.jpg",), "gone.jpg"),
        (([np.full((40, 40, 3), 90, np.uint8), "gone.jpg"],), "1 cannot be read: gone.jpg"),
    ],
)
def test_pictures_that_cannot_be_taken(given, said, trained):
    net = net_of(trained("retina"))
    net.args.preprocess = "fov"
    with pytest.raises(InputError, match=said):
        net.predict(*given)


def test_wrong_numbers_of_pictures(trained, rendered):
    with pytest.raises(InputError, match="paths alone"):
        net_of(trained("mrnet")).predict(np.zeros((9, 256, 256), np.uint8))
    with pytest.raises(InputError, match="expected 2 of a patient"):
        net_of(trained("odir")).predict(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(InputError, match="LEFT RIGHT"):
        net_of(trained("odir")).predict(["a_left.jpg", "a_right.jpg"])  # a list of two, not a pair
    assert net_of(trained("odir")).predict([]) == []


def test_memory_does_not_grow_with_what_is_asked(trained, rendered, monkeypatch):
    """One row at a time gives the same answers, and names the same faults, as all at once."""
    net, eyes = net_of(trained("retina")), sorted((rendered("retina") / "test").iterdir())[:5]
    rows = [(str(eye),) for eye in eyes]
    rows.insert(2, ("gone.jpg",))
    whole, faults = net.answer(rows)
    opened, open_rows = [], net.open_rows
    monkeypatch.setattr(net, "open_rows", lambda some: opened.append(len(some)) or open_rows(some))
    monkeypatch.setattr(predictor, "IN_MEMORY", 1)
    pieces, again = net.answer(rows)
    assert opened == [1] * 6 and faults == again and list(faults) == [2] and np.isnan(pieces[2]).all()
    np.testing.assert_allclose(pieces, whole, atol=1e-5)


def test_heatmap(trained, rendered):
    net, images = net_of(trained("odir")), rendered("odir") / "images"
    left = sorted(images.glob("*_left.jpg"))[0]
    maps = net.heatmap(left, images / left.name.replace("left", "right"))
    assert [name for name, _, _ in maps] == ["left eye", "right eye"]
    for _, picture, found in maps:
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and list(found) == net.labels
        assert all(cam.ndim == 2 and 0 <= cam.min() <= cam.max() <= 1 for cam in found.values())
    with pytest.raises(InputError, match="gone"):
        net.heatmap("gone_left.jpg", "gone_right.jpg")


def test_a_frozen_random_trunk_says_so(trained):
    assert net_of(trained("odir")).random_trunk and not net_of(trained("retina")).random_trunk


# ---------------------------------------------------------------- from anywhere


def test_from_any_working_folder(trained, rendered, tmp_path):
    """The data root in best.pt is absolute; the README's four lines, in a process of their own elsewhere."""
    shutil.copyfile(trained("odir") / "best.pt", tmp_path / "best.pt")
    images = rendered("odir") / "images"
    left = sorted(images.glob("*_left.jpg"))[0]
    pair = left, images / left.name.replace("left", "right")
    for path, name in zip(pair, ("left.jpg", "right.jpg"), strict=True):
        shutil.copyfile(path, tmp_path / name)
    code = "import predictor; net = predictor.load('best.pt'); print(net.predict('left.jpg', 'right.jpg'))"
    code += "; print(len(net.heatmap('left.jpg', 'right.jpg')), net.saved['data']['root'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer, rest = done.stdout.splitlines()
    np.testing.assert_allclose(
        list(eval(answer).values()), list(net_of(trained("odir")).predict(*pair).values()), atol=1e-6
    )
    assert rest == f"2 {rendered('odir').resolve()}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "left.jpg", "right.jpg"]


def test_a_runs_folder_and_its_best_pt_are_the_same(trained):
    folder = trained("retina")
    assert net_of(folder).digest == net_of(str(folder / "best.pt")).digest == net_of([folder]).digest


# ---------------------------------------------------------------- checkpoints that lie


def flags(**changes):
    return lambda state: {"args": {**state["args"], **changes}}


BAD = {
    "size": (flags(size=10**6), "--size 1000000 .*GB a picture.: expected 16 to 4096"),
    "crop": (flags(crop=10**6, augment="pair"), "--crop 1000000"),
    "no flag": (
        lambda state: {"args": {name: value for name, value in state["args"].items() if name != "trunk"}},
        "trunk",
    ),
    "flag of another type": (flags(size="large"), "best.pt of this repository"),
    "model": (flags(model="v9"), "v9"),
    "labels": (lambda state: {"labels": state["labels"][:5]}, "classifier"),
    "data set": (flags(dataset="cifar"), "does not take cifar"),
    "weights": (lambda state: {"model": {}}, "backbone"),
    "data": (lambda state: {"data": None}, "best.pt of this repository"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_checkpoint_that_cannot_be_right(name, trained, tmp_path):
    change, said = BAD[name]
    state = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    with pytest.raises(InputError, match=said):
        net_of(saved_as(trained("odir"), tmp_path / "best.pt", **change(state)))


@pytest.mark.parametrize("key", ["prior", "args", "thresholds", "labels", "task", "data", "model", "ordered"])
def test_a_checkpoint_without_one_of_its_parts(key, trained, tmp_path, capsys):
    state = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    del state[key]
    checkpoint.save_checkpoint(tmp_path / "best.pt", **state)
    assert guard(predictor.load, tmp_path / "best.pt", "cpu") == 2
    assert key in capsys.readouterr().err


def test_a_mean_needs_the_same_labels(trained):
    with pytest.raises(InputError, match="other labels"):
        predictor.load([trained("odir"), trained("retina")], "cpu")


@pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")
def test_real_photographs(trained):
    net, full = net_of(trained("retina")), REAL / "fullsize" / "IDRiD_046.jpg"
    assert net.predict(full) == net.predict(Image.open(full))
    small = (
        REAL / "odir" / "images" / "0_left.jpg"
    )  # 256 pixels for a network of 96: not reduced while decoding
    assert net.predict(small) == net.predict(np.asarray(Image.open(small)))
