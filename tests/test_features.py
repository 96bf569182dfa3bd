"""Kept features: the same curve with and without them, read when they are there, made again when damaged."""

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
import features  # noqa: E402
import models  # noqa: E402
from augment import prepare_batch  # noqa: E402
from decode import Pictures  # noqa: E402
from errors import InputError  # noqa: E402
from features import TrunkFeatures  # noqa: E402
from preprocess import load_picture  # noqa: E402
from render_data import render  # noqa: E402

CPU = torch.device("cpu")
# A frozen ResNet-18 on single photographs: the same code as the eye pairs', at a fifth of the cost.
SINGLE = [
    "--dataset",
    "aptos",
    "--model",
    "resnet18",
    "--no-fine-tune",
    "--batch",
    "8",
    "--sampler",
    "shuffle",
]


def curve(run):
    return pd.read_excel(run / "train_results.xlsx")[["train_loss", "val_loss"]].to_numpy()


def kept_files(folder, kind):
    return sorted((folder / "cache").glob(f"{kind}-*.npy"))


@pytest.fixture
def extractions(monkeypatch):
    """The pictures that went through a trunk to be kept, extraction by extraction: [(rows, view)]."""
    calls, extract = [], TrunkFeatures.extract

    def counted(self, pictures, view, keys, array):
        calls.append((len(keys), view))
        extract(self, pictures, view, keys, array)

    monkeypatch.setattr(TrunkFeatures, "extract", counted)
    return calls


# ---------------------------------------------------------------- whole trainings


def test_the_same_curve_for_eye_pairs_and_the_second_run_reads(tmp_path, rendered, train_here, extractions):
    flags = ["--data", rendered("odir"), "--model", "v2", "--trunk", "resnet18", "--batch", "16"]
    # v2: dropout is drawn alike, too
    kept = train_here(tmp_path, *flags)
    assert (
        extractions == [(32, None), (8, None)] and len(kept_files(tmp_path, "features")) == 2
    )  # training, validation; not per epoch
    stamps = [file.stat().st_mtime_ns for file in kept_files(tmp_path, "features")]
    again = train_here(tmp_path, *flags)
    assert len(extractions) == 2 and stamps == [
        file.stat().st_mtime_ns for file in kept_files(tmp_path, "features")
    ]
    assert (curve(kept) == curve(again)).all()
    plain = train_here(tmp_path, *flags, "--no-feature-cache")
    assert len(extractions) == 2
    assert curve(plain) == pytest.approx(curve(kept), abs=1e-4)
    assert len(set(curve(kept).ravel())) == 4  # a curve, not a constant
    other_head = train_here(
        tmp_path,
        "--data",
        rendered("odir"),
        "--model",
        "v0",
        "--trunk",
        "resnet18",
        "--scheduler",
        "none",
        "--sampler",
        "balanced",
        "--weighted-loss",
        "--batch",
        "4",
        "--epochs",
        "1",
    )
    assert (
        len(extractions) == 2 and json.loads((other_head / "run.json").read_text())["args"]["model"] == "v0"
    )  # the same features


@pytest.mark.parametrize(
    "recipe",
    [
        ["--augment", "eyes"],
        # drawn several times in an epoch, a picture gets another view each time (issue 12: 10)
        ["--augment", "eyes", "--crop", "28", "--sampler", "weighted"],
    ],
)
def test_the_same_curve_augmented(tmp_path, rendered, train_here, recipe, extractions):
    flags = [*SINGLE, "--data", rendered("aptos"), *recipe]
    kept = train_here(tmp_path, *flags)
    number = len(extractions)
    assert [view for _, view in extractions if view is not None] == [0, 1]  # a fresh view an epoch
    plain = train_here(tmp_path, *flags, "--no-feature-cache")
    assert len(extractions) == number
    assert curve(plain) == pytest.approx(curve(kept), abs=1e-4)


def test_views_cycle_and_are_shared_by_the_next_experiment(tmp_path, rendered, train_here, extractions):
    flags = [*SINGLE, "--data", rendered("aptos"), "--augment", "eyes"]
    train_here(tmp_path, *flags, "--views", "2", "--epochs", "3")
    assert [view for _, view in extractions if view is not None] == [0, 1]
    train_here(tmp_path, *flags, "--lr", "0.1", "--epochs", "3")  # fresh views 0, 1, 2: two of them are there
    assert [view for _, view in extractions if view is not None] == [0, 1, 2]
    train_here(
        tmp_path, *flags, "--seed", "7", "--epochs", "1"
    )  # another seed sees other views, and another random trunk
    assert [view for _, view in extractions if view is not None] == [0, 1, 2, 0]


def test_fine_tuning_and_moving_batchnorm_keep_no_features(tmp_path, rendered, train_here, extractions):
    train_here(tmp_path, *SINGLE, "--data", rendered("aptos"), "--epochs", "1", "--bn", "batch")
    assert not extractions and not kept_files(tmp_path, "features")
    train_here(
        tmp_path,
        *SINGLE,
        "--data",
        rendered("aptos"),
        "--fine-tune",
        "--freeze-epochs",
        "1",
        "--bn",
        "pretrained",
    )
    assert len(extractions) == 1  # the frozen epoch's alone


# ---------------------------------------------------------------- the arrays on disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("eyes") / "odir"
    render(out, "odir", 8, 64, 1)
    return sorted(str(file) for file in (out / "images").iterdir())[:6]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.build_model("resnet18", 5)


def singles(files, cache, kind="fov", size=32):
    return Pictures([(file,) for file in files], kind, size, cache, 0)


def trunk(network, cache, precision="fp32", **changed):
    """TrunkFeatures on the CPU, with the flags of train.py that it looks at."""
    flags = dict(augment="none", crop=None, size=32, seed=0, compile=False, workers=0, cache=cache)
    return TrunkFeatures(network, SimpleNamespace(**flags | changed), precision, CPU)


def test_features_are_the_trunks_outputs_row_by_row(folder, network, tmp_path):
    pairs = Pictures([tuple(folder[:2]), tuple(folder[2:4]), tuple(folder[4:])], "fov", 32, tmp_path, 0)
    dual = models.build_model("v0", 8, trunk="resnet18")
    found = trunk(dual, tmp_path)(pairs)
    assert found.shape == (3, 1024) and found.dtype == torch.float32
    shown = torch.stack(
        [torch.from_numpy(load_picture(file, "fov", 32)[0].copy()) for file in folder]
    ).unflatten(0, (3, 2))
    (batch,), _ = prepare_batch({"images": shown, "targets": torch.zeros(3)}, CPU)
    with torch.no_grad():
        torch.testing.assert_close(found, dual.eval().features(batch), atol=1e-4, rtol=1e-3)
    assert trunk(network, tmp_path)(singles(folder, tmp_path)).shape == (6, 512)


def test_more_rows_than_one_block(folder, network, tmp_path, monkeypatch):
    whole = trunk(network, tmp_path)(singles(folder, tmp_path))
    monkeypatch.setattr(features, "EXTRACT_BATCH", {"cpu": 4})
    blocks = trunk(network, tmp_path / "other")(singles(folder, tmp_path))
    torch.testing.assert_close(blocks, whole, atol=1e-5, rtol=1e-4)


def rewrite(path, change):
    """As another file of the same name: whoever has mapped the old one keeps it."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


DAMAGE = {
    "a byte of the header": lambda path: rewrite(path, lambda content: content[:20] + b"?" + content[21:]),
    "another shape": lambda path: rewrite(path, lambda content: content.replace(b"(6, ", b"(5, ")),
    "cut": lambda path: rewrite(path, lambda content: content[:-100]),
    "empty": lambda path: rewrite(path, lambda content: b""),
    "no array": Path.unlink,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_features_and_pictures_are_made_again(folder, network, tmp_path, extractions, name):
    first = trunk(network, tmp_path)(singles(folder, tmp_path)).clone()
    for kind in ("features", "pictures"):
        (path,) = tmp_path.glob(f"{kind}-*.npy")
        DAMAGE[name](path)
        again = trunk(network, tmp_path)(singles(folder, tmp_path))
        assert torch.equal(again, first) and not list(tmp_path.glob(".*"))
        assert (
            len(extractions) == 2
        )  # features: once made, once again; the pictures' damage costs no extraction
    trunk(network, tmp_path)(singles(folder, tmp_path))
    assert len(extractions) == 2


def test_leftovers_of_killed_processes_are_ignored_and_removed(folder, network, tmp_path):
    first = trunk(network, tmp_path)(singles(folder, tmp_path))
    (path,) = tmp_path.glob("features-*.npy")
    gone = 2**22 + 1  # no process has this number
    leftover = path.with_name(f".{path.name}.{platform.node()}.{gone}.tmp")
    leftover.write_bytes(path.read_bytes()[:200])
    path.unlink()
    assert torch.equal(trunk(network, tmp_path)(singles(folder, tmp_path)), first)
    assert not leftover.exists()


def test_a_broken_extraction_leaves_nothing_behind(folder, network, tmp_path, monkeypatch):
    def fails(self, pictures, view, keys, array):
        array[:2] = 1
        raise KeyboardInterrupt

    monkeypatch.setattr(TrunkFeatures, "extract", fails)
    with pytest.raises(KeyboardInterrupt):
        trunk(network, tmp_path)(singles(folder, tmp_path))
    assert not list(tmp_path.glob("features-*")) and not list(tmp_path.glob(".*"))


def test_kept_arrays_depend_on_everything_they_are_made_from(folder, network, tmp_path, extractions):
    files = [shutil.copy(file, tmp_path) for file in folder[:3]]
    os.utime(files[0], ns=(10**18, 10**18))
    cache = tmp_path / "cache"

    def made():
        return len(extractions)

    trunk(network, cache)(singles(files, cache))
    assert made() == 1
    trunk(network, cache)(singles(files, cache))
    assert made() == 1  # nothing changed
    os.utime(files[0], ns=(10**18 + 1, 10**18 + 1))  # touched
    trunk(network, cache)(singles(files, cache))
    assert made() == 2
    shutil.copy(folder[4], files[1])  # other content
    changed = trunk(network, cache)(singles(files, cache))
    assert made() == 3
    before = changed.clone()
    for kind, size in (("none", 32), ("centre", 32), ("fov", 48)):
        assert not torch.equal(trunk(network, cache)(singles(files, cache, kind, size)), before)
    assert made() == 6
    trunk(network, cache)(singles(files[:2], cache))  # other rows
    trunk(network, cache)(singles(files[::-1], cache))
    assert made() == 8
    assert not torch.equal(trunk(network, cache, "bf16")(singles(files, cache)), before)
    assert made() == 9
    torch.manual_seed(1)
    other = models.build_model("resnet18", 5)
    trunk(other, cache)(singles(files, cache))
    assert made() == 10
    other.backbone.bn1.running_mean += 0.1  # a statistic counts as much as a weight
    trunk(other, cache)(singles(files, cache))
    assert made() == 11
    with torch.no_grad():
        other.classifier.weight += 1  # the head does not
    trunk(other, cache)(singles(files, cache))
    assert made() == 11
    pictures = singles(files, cache)
    views = []
    for seed, view in ((0, 0), (0, 1), (1, 0)):
        views.append(trunk(network, cache, augment="eyes", seed=seed)(pictures, view))
    assert made() == 14 and not torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    trunk(network, cache, augment="lab")(pictures, 0)
    trunk(network, cache, augment="eyes", crop=28)(pictures, 0)
    trunk(network, cache, augment="eyes")(pictures, 0, [(0, 0), (0, 1)])  # other repeats of the rows
    assert made() == 17
    assert torch.equal(trunk(network, cache, augment="eyes")(pictures, 1), views[1]) and made() == 17


def test_normalisation_counts_as_a_weight_does(folder, network, tmp_path, extractions):
    pictures = singles(folder, tmp_path)
    first = trunk(network, tmp_path)(pictures).clone()
    other = models.build_model("resnet18", 5)
    other.load_state_dict(network.state_dict())
    other.normalise = models.Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not torch.equal(trunk(other, tmp_path)(pictures), first) and len(extractions) == 2


def augmented(files, keys, size):
    """The pictures of these keys as the third view of seed 3 shows them, (B, 1, 3, size, size)."""
    shown = [torch.from_numpy(load_picture(files[row], "fov", 32)[0].copy()) for row, _ in keys]
    uniforms = augment.draw(3, 1, keys, 1)
    batch = {"images": torch.stack(shown)[:, None], "uniforms": uniforms, "targets": torch.zeros(len(keys))}
    return prepare_batch(batch, CPU, "eyes", size)[0][0]


@pytest.mark.parametrize("keys", [[(i, 0) for i in range(6)], [(2, 0), (2, 1), (5, 0), (2, 2)]])
def test_augmented_features_are_those_of_the_augmented_pictures(folder, network, tmp_path, keys):
    """A row that is drawn several times in an epoch has a view, and features, of its own each time."""
    flags = dict(augment="eyes", crop=28, seed=3)
    found = trunk(network, tmp_path, **flags)(singles(folder, tmp_path), 1, keys)
    with torch.no_grad():
        expected = network.eval().features(augmented(folder, keys, 28))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_features_that_are_not_finite_are_refused(folder, tmp_path):
    torch.manual_seed(0)
    network = models.build_model("resnet18", 5)
    with torch.no_grad():
        network.backbone.conv1.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite in fp32"):
        trunk(network, tmp_path)(singles(folder, tmp_path))
    assert not list(tmp_path.glob("features-*"))


# ---------------------------------------------------------------- precision


def test_bf16_features_and_their_probabilities(folder, network, tmp_path, record_property):
    """Small random networks on six pictures: what is asserted is loose; the figures are recorded."""
    found = {name: trunk(network, tmp_path, name)(singles(folder, tmp_path)) for name in ("fp32", "bf16")}
    assert found["bf16"].dtype == torch.float32 and not torch.equal(found["fp32"], found["bf16"])
    difference = (found["fp32"] - found["bf16"]).abs()
    with torch.no_grad():
        probs = {name: network.classifier(values).softmax(1) for name, values in found.items()}
    worst = float((probs["fp32"] - probs["bf16"]).abs().max())
    record_property("bf16_feature_difference", float(difference.max()))
    record_property("bf16_probability_difference", worst)
    assert worst < 0.05 and difference.max() < 0.1 * found["fp32"].abs().max()
