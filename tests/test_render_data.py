"""The stand-ins: layouts like the real ones, the same pictures for the same seed, labels that can be seen."""

import contextlib
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import render_data  # noqa: E402
from errors import InputError, guard  # noqa: E402
from preprocess import load_picture, read_picture  # noqa: E402
from render_data import KNEE_SHARES, ODIR_SHARES, RETINA, deal, draw_fundus, draw_knee, render  # noqa: E402

REAL = Path(os.environ.get("REAL_DATA", "absent"))
LABELS = list("NDGCAHMO")


def run(*args):
    """`render_data.py` with these arguments, in this process: to import it again takes long."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = guard(render_data.main, list(map(str, args)))
        except SystemExit as error:  # of argparse
            status = error.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def digests(folder):
    """Of every file; of a workbook, which holds the time it was made at, of its cells."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        book = path.suffix == ".xlsx"
        content = pd.read_excel(path).to_csv().encode() if book else path.read_bytes()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def odir(tmp_path_factory):
    out = tmp_path_factory.mktemp("rendered") / "odir"
    assert render(out, "odir", 60, 64, 3)
    return out


def test_odir_has_the_official_layout(odir):
    table = pd.read_excel(odir / "annotations.xlsx")
    official = ["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"]
    official += ["Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *LABELS]
    assert list(table) == official and len(table) == 60
    assert table.ID.is_unique and table.ID.is_monotonic_increasing
    assert table.ID[0] == 0 and table.ID.iloc[-1] > 60
    assert set(table["Patient Sex"]) == {"Female", "Male"} and table["Patient Age"].between(1, 110).all()
    files = {*table["Left-Fundus"], *table["Right-Fundus"]}
    assert files == {f"{i}_{side}.jpg" for i in table.ID for side in ("left", "right")}
    assert files == {path.name for path in (odir / "images").iterdir()}
    for path in (odir / "images").iterdir():
        assert read_picture(path)[0].size == (64, 64)


@pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")
def test_odir_sheet_agrees_with_the_real_one(odir):
    rendered, real = pd.read_excel(odir / "annotations.xlsx"), pd.read_excel(REAL / "odir/annotations.xlsx")
    assert list(rendered) == list(real) and list(rendered.dtypes) == list(real.dtypes)
    columns = ["Left-Diagnostic Keywords", "Right-Diagnostic Keywords"]
    words = {word for column in columns for text in real[column] for word in text.split("，")}
    assert {word for column in columns for text in rendered[column] for word in text.split("，")} <= words


def test_odir_labels_and_keywords_agree(odir):
    table = pd.read_excel(odir / "annotations.xlsx")
    assert (table[LABELS].sum() >= 3).all() and table[LABELS].isin([0, 1]).all(axis=None)
    assert (table.N + table[LABELS[1:]].max(axis=1) == 1).all()  # everyone has a label, or is normal
    assert (table[LABELS].sum(axis=1) > 1).any()
    meaning = {word: label for label, words in render_data.KEYWORDS.items() for word in words}
    one_sided = 0
    for _, row in table.iterrows():
        eyes = [row[f"{side}-Diagnostic Keywords"].split("，") for side in ("Left", "Right")]
        signs = [{meaning[word] for word in eye if word != "normal fundus"} for eye in eyes]
        assert (signs[0] | signs[1] or {"N"}) == {label for label in LABELS if row[label]}
        one_sided += signs[0] != signs[1]
    assert one_sided


@pytest.mark.parametrize("dataset", ["odir", "aptos", "dr", "retina", "mrnet"])
def test_the_same_seed_gives_the_same_content(tmp_path, dataset):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        render(tmp_path / name, dataset, 8, 64, seed)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    pictures = [name for name in first if name.endswith((".jpg", ".jpeg", ".png", ".npy"))]
    assert len({first[name] for name in pictures}) == len(pictures)  # no two alike
    assert not {first[name] for name in pictures} & set(other.values())  # nor of another seed


def test_aptos_layout(tmp_path):
    render(tmp_path / "a", "aptos", 20, 64)
    table = pd.read_csv(tmp_path / "a/train.csv")
    assert list(table) == ["id_code", "diagnosis"] and sorted(set(table.diagnosis)) == [0, 1, 2, 3, 4]
    files = {path.name for path in (tmp_path / "a/train_images").iterdir()}
    assert files == {f"{name}.png" for name in table.id_code} and len(files) == 20


def test_dr_layout_and_missing_end_markers(tmp_path):
    render(tmp_path / "a", "dr", 30, 64)
    table = pd.read_csv(tmp_path / "a/trainLabels.csv")
    assert list(table) == ["image", "level"] and set(table.level) == {0, 1, 2, 3, 4}
    assert list(table.image[:3]) == ["10_left", "10_right", "11_left"]
    repaired = [name for name in table.image if read_picture(tmp_path / "a" / f"{name}.jpeg")[1]]
    assert repaired == [table.image[7], table.image[47]]
    assert len(list((tmp_path / "a").glob("*.jpeg"))) == 60


def test_retina_layout(tmp_path):
    render(tmp_path / "a", "retina", 40, 64)
    table = pd.read_csv(tmp_path / "a/train.csv")
    assert list(table) == ["filename", *RETINA] and table[list(RETINA)].isin([0, 1]).all(axis=None)
    assert {path.name for path in (tmp_path / "a/train").iterdir()} == set(table.filename)
    assert len(list((tmp_path / "a/test").iterdir())) == 10
    assert (table[["normal", "diabetic retinopathy", "glaucoma"]].sum() >= 5).all()
    assert not (table.normal & (table[list(RETINA)].sum(axis=1) > 1)).any()
    assert not set(table.filename) & {path.name for path in (tmp_path / "a/test").iterdir()}


def test_mrnet_layout(tmp_path):
    render(tmp_path / "a", "mrnet", 16)
    known = set()
    for part, count in (("train", 12), ("valid", 4)):
        labels = {}
        for label in ("abnormal", "acl", "meniscus"):
            lines = (tmp_path / "a" / f"{part}-{label}.csv").read_text().splitlines()
            rows = dict(line.split(",") for line in lines)
            assert len(lines) == len(rows) == count
            assert all(len(name) == 4 and name.isdigit() for name in rows)
            assert set(rows.values()) == {"0", "1"}
            labels[label] = rows
        for name, abnormal in labels["abnormal"].items():
            assert int(abnormal) >= max(int(labels["acl"][name]), int(labels["meniscus"][name]))
        assert not known & set(labels["acl"])
        known |= set(labels["acl"])
        for plane in ("axial", "coronal", "sagittal"):
            files = sorted((tmp_path / "a" / part / plane).iterdir())
            assert {path.stem for path in files} == set(labels["acl"])
            for path in files:
                volume = np.load(path, allow_pickle=False)
                assert volume.dtype == np.uint8 and volume.shape[1:] == (256, 256) and 17 <= len(volume) <= 40


# --- the labels can be seen


@functools.cache
def drawn(seed, sign="", grade=0):
    return np.asarray(draw_fundus(np.random.default_rng(seed), 224, sign, grade).resize((64, 64)), float)


def lesions(sign="", grade=0, n=6):
    """Share of 64 x 64 pixels that a sign changes against the same eye without it."""
    changed = [(np.abs(drawn(seed, sign, grade) - drawn(seed)).max(2) > 12).mean() for seed in range(n)]
    return float(np.mean(changed))


def test_every_sign_changes_what_is_seen_at_64_pixels():
    for sign in "DGCAHMO":
        assert lesions(sign) > 0.008, sign


def test_grades_grow():
    shares = [lesions(grade=grade) for grade in range(5)]
    assert shares[0] == 0 and all(low < high for low, high in zip(shares, shares[1:], strict=False)), shares


def features(pixels):
    """Coarse description of a picture: the spread of each channel's quantiles, no position."""
    inside = pixels[8:-8, 8:-8].reshape(-1, 3).astype(float)
    inside = inside[inside.sum(1) > 30]
    centred = inside - np.median(inside, 0)
    return np.percentile(centred, [0.5, 2, 10, 90, 98, 99.5], axis=0).ravel()


def nearest_class_accuracy(x, y):
    x = (x - x.mean(0)) / x.std(0)
    train, test = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1
    centres = {label: x[train & (y == label)].mean(0) for label in set(y)}
    guesses = [min(centres, key=lambda label: np.linalg.norm(row - centres[label])) for row in x[test]]
    return np.mean(np.array(guesses) == y[test])


def test_signs_are_learnable_and_shuffled_labels_are_not():
    signs = np.array([sign for sign in ["", "D", "C", "M", "O"] for _ in range(24)])
    eyes = [draw_fundus(np.random.default_rng([9, i]), 96, sign) for i, sign in enumerate(signs)]
    x = np.stack([features(np.asarray(eye)) for eye in eyes])
    assert nearest_class_accuracy(x, signs) > 0.75
    rng = np.random.default_rng(0)
    assert nearest_class_accuracy(x, rng.permutation(signs)) < 0.45  # chance is 0.2


def test_eyes_mirror_and_have_the_disc_on_their_side():
    for seed in range(4):
        left = np.asarray(draw_fundus(np.random.default_rng(seed), 96), float)
        right = np.asarray(draw_fundus(np.random.default_rng(seed), 96, right=True), float)
        np.testing.assert_array_equal(left, right[:, ::-1])
        bright = left[30:66].sum(2).max(0)
        assert bright[:48].max() > bright[48:].max()


def test_knee_signs_are_in_the_planes_where_they_belong():
    def change(plane, with_sign, without):
        a = draw_knee(np.random.default_rng(5), plane, *with_sign).astype(int)
        b = draw_knee(np.random.default_rng(5), plane, *without).astype(int)
        return (np.abs(a - b) > 60).any((1, 2)).sum()  # slices

    assert change("axial", (1, 1, 0), (1, 0, 0)) == 0 and change("sagittal", (1, 1, 0), (1, 0, 0)) >= 4
    assert change("axial", (1, 0, 1), (1, 0, 0)) == 0 and change("coronal", (1, 0, 1), (1, 0, 0)) >= 8
    assert all(change(plane, (1, 0, 0), (0, 0, 0)) >= 8 for plane in ("axial", "coronal", "sagittal"))
    assert all(knee[0] >= max(knee[1:]) for knee in KNEE_SHARES)


def test_deal_follows_the_shares():
    for n in (8, 100, 3500):
        dealt = deal(ODIR_SHARES, n, np.random.default_rng(0))
        assert len(dealt) == n
        assert all(abs(dealt.count(label) - share * n) < 2 for label, share in ODIR_SHARES.items())
    assert min(deal(ODIR_SHARES, 100, np.random.default_rng(0)).count(label) for label in LABELS) >= 7


# --- the folder


def test_marker_second_call_and_other_settings(tmp_path):
    out = tmp_path / "new" / "a"
    first = run(out, "--dataset", "aptos", "--patients", 8, "--size", 64)
    assert first.returncode == 0 and ": rendered" in first.stdout, first.stderr
    assert json.loads((out / "rendered.json").read_text()) == {
        "dataset": "aptos", "patients": 8, "seed": 0, "size": 64, "version": render_data.VERSION,
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = run(out, "--dataset", "aptos", "--patients", 8, "--size", 64)
    assert second.returncode == 0 and "already there" in second.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(out, "--dataset", "dr", "--patients", 8, "--size", 64).returncode == 0
    assert (out / "trainLabels.csv").is_file() and not (out / "train.csv").exists()  # replaced, not mixed


def test_what_was_not_rendered_is_left_alone(tmp_path):
    real = tmp_path / "odir"
    real.mkdir()
    (real / "annotations.xlsx").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in (real, tmp_path / "file"):
        result = run(out, "--dataset", "odir", "--patients", 8, "--size", 64)
        assert result.returncode == 2 and "was not rendered" in result.stderr
        assert "Traceback" not in result.stderr
    assert (real / "annotations.xlsx").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "odir"]
    (tmp_path / "empty").mkdir()
    assert render(tmp_path / "empty", "aptos", 8, 64)  # an empty folder is fine


def test_an_interrupted_rendering_leaves_nothing_half_made(tmp_path, monkeypatch):
    render(tmp_path / "a", "aptos", 8, 64)
    before, calls = digests(tmp_path / "a"), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw_fundus(*args, **kwargs)

    monkeypatch.setattr(render_data, "draw_fundus", interrupted)
    for name in ("a", "b"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            render(tmp_path / name, "aptos", 9, 64)
    assert digests(tmp_path / "a") == before and [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    (tmp_path / ".b.unfinished").mkdir()  # as SIGKILL leaves it
    (tmp_path / ".b.unfinished" / "old.png").write_text("")
    render(tmp_path / "b", "aptos", 8, 64)
    assert digests(tmp_path / "b") == before and not (tmp_path / ".b.unfinished").exists()


def test_arguments(tmp_path):
    for change in ({"patients": 7}, {"size": 63}, {"seed": -1}):
        with pytest.raises(InputError, match="expected at least"):
            render(tmp_path / "a", "odir", **{"patients": 8, "size": 64, **change})
    args = render_data.get_args_parser().parse_args(["x", "--dataset", "dr"])
    assert (args.patients, args.size, args.seed) == (120, 256, 0)
    assert run(tmp_path / "a", "--dataset", "cifar").returncode == 2
    assert run(tmp_path / "a").returncode == 2 and not list(tmp_path.iterdir())
    assert "--patients" in run("--help").stdout


def test_rendered_eyes_survive_preprocessing(odir):
    for path in sorted((odir / "images").iterdir())[:12]:
        pixels, repaired = load_picture(path, "fov", 64)
        assert pixels.shape == (64, 64, 3) and not repaired and pixels.mean() > 40
