"""spread_labels.py: the spreading against its closed form, validation kept out, and the chain to train.py."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import checkpoint
import spread_labels
from errors import InputError, guard
from split import add_pseudo_labels
from spread_labels import UNKNOWN, spread, training_rows, unlabelled_rows
from tables import read


def run(*arguments):
    return guard(spread_labels.main, [*map(str, arguments), "--device", "cpu", "--workers", "0"])


@pytest.fixture
def clusters():
    """Three clusters of 20 in three dimensions, of very different scales; one labelled row in each -> (outputs, truth, given)."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 20)
    outputs = (np.eye(3)[truth] * 8 + rng.normal(size=(60, 3))) * [1, 100, 0.01] + [0, 5, 3]
    given = np.full(60, UNKNOWN)
    given[[0, 20, 40]] = [0, 1, 2]
    return outputs, truth, given


def test_labels_spread_over_their_cluster(clusters):
    outputs, truth, given = clusters
    found, confidence = spread(outputs, given)
    reached = found != UNKNOWN
    assert reached.mean() > 0.9 and (found == truth)[reached].mean() > 0.95
    assert (confidence[reached] > 1 / 3).all() and (confidence <= 1).all()


@pytest.mark.parametrize("alpha", [0.2, 0.9])
def test_spreading_is_zhous_closed_form(clusters, alpha):
    """Zhou et al. 2004: F = (1 - alpha) (I - alpha S)^-1 Y, S = D^-1/2 W D^-1/2, no row its own neighbour."""
    outputs, _, given = clusters
    x = (outputs - outputs.mean(0)) / outputs.std(0)
    distance = ((x[:, None] - x[None]) ** 2).sum(2)
    w = (distance.argsort(1).argsort(1) < 13).astype(float)  # itself and the twelve that are nearest
    np.fill_diagonal(w, 0)
    degree = w.sum(0) ** -0.5
    y = (given[:, None] == np.arange(3)).astype(float)
    f = (1 - alpha) * np.linalg.solve(np.eye(60) - alpha * degree[:, None] * w * degree, y)
    found, confidence = spread(outputs, given, neighbors=13, alpha=alpha)
    np.testing.assert_array_equal(found, f.argmax(1))
    np.testing.assert_allclose(
        confidence, (f / f.sum(1, keepdims=True)).max(1), atol=0.01 if alpha > 0.5 else 2e-3
    )


def test_what_no_label_reaches_gets_none():
    rng = np.random.default_rng(0)
    outputs = np.concatenate([rng.normal(size=(12, 3)), rng.normal(size=(12, 3)) + 1000])
    given = np.full(24, UNKNOWN)
    given[:2] = [1, 2]
    found, confidence = spread(outputs, given, neighbors=5)
    assert (found[12:] == UNKNOWN).all() and not confidence[12:].any()
    assert set(found[:12]) == {1, 2}, "classes keep their numbers where the first has no picture"


# ---------------------------------------------------------------- who takes part


def net_with(train, val, test, pseudo_labels=None):
    """What spread_labels.py asks of a network: its labels, its flags and the split it was trained with."""
    split = {"train": train, "val": val, "test": test}
    return SimpleNamespace(
        labels=["yes", "no"], args=SimpleNamespace(pseudo_labels=pseudo_labels), saved={"rows": split}
    )


def retina_folder(root, labelled, unlabelled):
    for part, names in (("train", labelled), ("test", unlabelled)):
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).touch()
    sheet = pd.DataFrame({"filename": labelled, "yes": 1, "no": 0})
    sheet.to_csv(root / "train.csv", index=False)
    return root


def test_rows_of_validation_and_test_never_take_part(tmp_path):
    root = retina_folder(tmp_path / "retina", ["a.png", "b.png", "c.png", "d.png"], [])

    def ids(*split):
        return [name.removesuffix(".png") for name in training_rows(net_with(*split), root)["ID"]]

    assert ids(["a.png", "b.png", "c.png"], ["d.png"], []) == ["a", "b", "c"]
    # A pseudo-labelled picture of the first training may bear the name of a validation or test picture.
    assert ids(["a.png", "b.png", "d.png", "unlabelled.png"], ["d.png"], ["b.png"], "pseudo_labels.csv") == [
        "a"
    ]
    with pytest.raises(InputError, match="2 of the run's 3 training pictures"):
        ids(["a.png", "x.png", "y.png"], [], [])
    with pytest.raises(InputError):
        ids(["x.png"], ["a.png"], [], "pseudo_labels.csv")


def test_pictures_that_train_would_refuse_get_no_label(tmp_path, capsys):
    """Other eyes of validation and test patients, and pictures that are labelled already, whatever their suffix."""
    labelled = ["1_left.png", "2_left.png", "3_left.png", "4.png"]
    root = retina_folder(
        tmp_path / "retina", labelled, ["1_right.jpg", "2_right.jpg", "3_right.jpg", "4.jpg", "5.jpg"]
    )
    net = net_with(["1_left.png", "4.png"], ["2_left.png"], ["3_left.png"])
    assert list(unlabelled_rows(net, root)["ID"]) == ["1_right.jpg", "5.jpg"]
    assert "3 unlabelled picture(s)" in capsys.readouterr().out
    for name in ("1_right.jpg", "5.jpg"):
        (root / "test" / name).unlink()
    with pytest.raises(InputError, match="every one"):
        unlabelled_rows(net, root)
    frame = read("retina", root, net.labels).frame.set_index("ID", drop=False)
    parts = {part: frame.loc[list(names)] for part, names in net.saved["rows"].items()}
    sheet = pd.DataFrame({"filename": ["1_right.jpg", "5.jpg"], "label": "yes", "confidence": 1})
    sheet.to_csv(tmp_path / "pseudo.csv", index=False)
    table = read("retina", root, net.labels)
    more = add_pseudo_labels(parts, table, root, tmp_path / "pseudo.csv", 0)
    assert len(more) == len(parts["train"]) + 2, "training takes what is left"


def test_validation_pictures_and_labels_change_nothing(trained, rendered, tmp_path, capsys):
    """Without the validation pictures, and with other labels for them, the same file; another training label stops it."""
    ckpt = trained("retina") / "best.pt"
    saved = checkpoint.load_checkpoint(ckpt)
    assert run("--ckpt", ckpt, "--out", tmp_path / "a", "--cache", tmp_path / "cache-a") == 0
    data = tmp_path / "data"
    shutil.copytree(rendered("retina"), data)
    sheet = pd.read_csv(data / "train.csv", dtype={"filename": str}).set_index("filename")
    labels = saved["labels"]
    for name in saved["rows"]["val"]:
        (data / "train" / name).unlink()
        sheet.loc[name, labels] = np.roll(sheet.loc[name, labels].to_numpy(), 1)
    sheet.to_csv(data / "train.csv")
    assert run("--ckpt", ckpt, "--data", data, "--out", tmp_path / "b", "--cache", tmp_path / "cache-b") == 0
    first = (tmp_path / "a/pseudo_labels.csv").read_bytes()
    assert (tmp_path / "b/pseudo_labels.csv").read_bytes() == first
    for name in saved["rows"]["train"]:
        sheet.loc[name, labels] = np.roll(sheet.loc[name, labels].to_numpy(), 1)
    sheet.to_csv(data / "train.csv")
    assert run("--ckpt", ckpt, "--data", data, "--out", tmp_path / "c", "--cache", tmp_path / "cache-b") == 2
    assert "38 picture(s) have other labels or contents than in training" in capsys.readouterr().err


# ---------------------------------------------------------------- the chain


def test_spread_then_train_on(trained, rendered, train_here, tmp_path, capsys):
    ckpt, data = trained("retina") / "best.pt", rendered("retina")
    assert run("--ckpt", ckpt, "--out", tmp_path, "--cache", tmp_path / "cache") == 0
    text = capsys.readouterr().out
    sheet = pd.read_csv(tmp_path / "pseudo_labels.csv", dtype={"filename": str})
    split = pd.read_csv(trained("retina") / "split.csv", dtype=str)
    origin = sheet["filename"][sheet["source"] == "trained on"]
    assert origin.tolist() == split["ID"][split["part"] == "train"].tolist()
    sheet = sheet[sheet["source"] == "spread"]
    unlabelled = [file.name for file in (data / "test").iterdir()]
    assert list(sheet.columns) == ["filename", "label", "confidence", "source"] and set(
        sheet["filename"]
    ) <= set(unlabelled)
    assert sheet["confidence"].between(0, 1).all()
    before = json.loads((trained("retina") / "run.json").read_text())["data"]["parts"]
    assert f"{before['train']} labelled training pictures, {len(unlabelled)} unlabelled" in text
    for label, count in sheet["label"].value_counts().items():
        assert f"  {label}: {count}\n" in text

    least = float(sheet["confidence"].median())
    for name, weights, sure in (("scratch", "none", 0.0), ("continued", ckpt, least)):
        flags = [
            "--dataset",
            "retina",
            "--data",
            data,
            "--pseudo-labels",
            tmp_path / "pseudo_labels.csv",
            "--epochs",
            1,
        ]
        train_here(
            tmp_path,
            *flags,
            "--min-confidence",
            sure,
            "--weights",
            weights,
            "--name",
            name,
            "--size",
            96,
            "--batch",
            8,
        )
        said = capsys.readouterr().out
        more = int((sheet["confidence"] >= sure).sum())
        assert f"{more} pseudo-labelled picture(s) join" in said and 0 < more <= len(sheet)
        parts = json.loads((tmp_path / "runs" / name / "run.json").read_text())["data"]["parts"]
        assert parts["train"] == before["train"] + more and parts["val"] == before["val"]
        again = checkpoint.load_checkpoint(tmp_path / "runs" / name / "best.pt")
        assert again["rows"]["val"] == checkpoint.load_checkpoint(ckpt)["rows"]["val"]

    # A second round, from a run that has unlabelled pictures among its training part.
    assert (
        run(
            "--ckpt",
            tmp_path / "runs/continued/best.pt",
            "--out",
            tmp_path / "second",
            "--cache",
            tmp_path / "cache",
        )
        == 0
    )
    assert f"{before['train']} labelled training pictures" in capsys.readouterr().out


def test_refused(trained, rendered, tmp_path, capsys):
    ckpt = trained("retina") / "best.pt"
    bare = tmp_path / "bare"
    shutil.copytree(rendered("retina"), bare)
    shutil.rmtree(bare / "test")
    for arguments, said in (
        (["--ckpt", trained("odir") / "best.pt"], "only the retina"),
        (["--ckpt", ckpt, "--alpha", 1], "expected 0 to 1"),
        (["--ckpt", ckpt, "--neighbors", 1000], "expected some of both"),
        (["--ckpt", ckpt, "--data", bare], "holds no pictures"),
        (["--ckpt", ckpt, "--data", tmp_path / "gone"], "no folder"),
    ):
        assert run(*arguments, "--out", tmp_path / "out", "--cache", tmp_path / "cache") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
