"""heatmap.py: which files it writes for which rows; its maps are of the network that gave the number."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoint
import figures
import heatmap
import predictor
from cache import file_names
from errors import guard


def run(*arguments):
    return guard(heatmap.main, [*map(str, arguments), "--device", "cpu", "--workers", "0"])


def test_split_gives_a_file_per_label_and_patient(trained, tmp_path, capsys):
    saved = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    flags = ["--split", "val", "--per-label", 1, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run("--ckpt", trained("odir") / "best.pt", *flags) == 0
    tmp_path = tmp_path / "out"
    text, names = capsys.readouterr().out, sorted(file.name for file in tmp_path.iterdir())
    assert "RENDERED" in text and f"{len(names)} PNGs" in text
    for name in names:
        label, patient = name.removesuffix(".png").split("-")
        assert label in saved["labels"] and patient in saved["rows"]["val"]
    missing = [line.split()[-1] for line in text.splitlines() if line.startswith("nobody")]
    assert sorted({name.split("-")[0] for name in names} | set(missing)) == sorted(saved["labels"])
    assert len(names) == len(saved["labels"]) - len(missing)
    with Image.open(tmp_path / names[0]) as image:  # two eyes, a picture and three or four maps in each line
        assert 1.2 < image.width / image.height < 2.5


def test_per_label_counts(trained, tmp_path):
    flags = ["--split", "val", "--per-label", 2, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run("--ckpt", trained("retina"), *flags) == 0
    names = [file.name for file in (tmp_path / "out").iterdir()]
    for label in ("diabetic_retinopathy", "glaucoma", "normal"):
        assert sum(name.startswith(f"{label}-") for name in names) == 2
    assert len(names) == 6


def test_exams(trained, tmp_path):
    flags = ["--split", "val", "--per-label", 1, "--out", tmp_path / "knee", "--cache", tmp_path / "cache"]
    assert run("--ckpt", trained("mrnet") / "best.pt", *flags) == 0
    file = next((tmp_path / "knee").iterdir())
    with Image.open(file) as image:  # three planes, picture and three labels
        assert 0.8 < image.width / image.height < 1.4


def test_default_folder_is_that_of_the_run_in_which_the_checkpoint_lies(trained, tmp_path, monkeypatch):
    """Of a moved run the moved folder; of a lone best.pt one beside it, never the one that the file names."""
    before = sorted(trained("retina").rglob("*"))
    shutil.copytree(trained("retina"), tmp_path / "moved")
    shutil.copyfile(trained("retina") / "best.pt", tmp_path / "best.pt")
    monkeypatch.chdir(tmp_path)
    for given, folder in (("moved", "moved/heatmaps"), ("best.pt", "test-best/heatmaps")):
        assert run("--ckpt", given, "--per-label", 1) == 0 and list((tmp_path / folder).glob("normal-*.png"))
    assert sorted(trained("retina").rglob("*")) == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_maps_probabilities_and_words_are_of_one_network(precision, trained, tmp_path, monkeypatch):
    """What is drawn has test.py's probability (the kept features') and the map of the same forward pass."""
    seen, drawn = [], figures.heatmaps
    monkeypatch.setattr(
        figures, "heatmaps", lambda rows, trunk: seen.append((rows, trunk)) or drawn(rows, trunk)
    )
    flags = ["--split", "val", "--per-label", 1, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run("--ckpt", trained("odir"), *flags, "--precision", precision) == 0
    net = predictor.load(trained("odir"), "cpu", precision, 0)
    images = Path(net.saved["data"]["root"]) / "images"
    for rows, random_trunk in seen:
        assert random_trunk and [row["title"].split(" ", 1)[1] for row in rows] == ["left eye", "right eye"]
        patient = rows[0]["title"].split()[0]
        pair = [images / f"{patient}_{side}.jpg" for side in ("left", "right")]
        answer, maps = net.predict(*pair), net.heatmap(*pair)
        for row, (_, picture, cams) in zip(rows, maps, strict=True):
            np.testing.assert_array_equal(row["picture"], picture)
            for (name, prob, cam), label in zip(row["maps"], net.labels, strict=True):
                assert name.split()[0] == label and f"{prob:.4f}" == f"{answer[label]:.4f}"
                np.testing.assert_allclose(cam, cams[label], atol=1e-5)


def test_refused(trained, tmp_path, capsys):
    assert run("--ckpt", trained("retina"), "--split", "test", "--out", tmp_path / "out") == 2
    assert "no test part" in capsys.readouterr().err and not list(tmp_path.glob("out/*"))


def test_names_are_safe_and_none_is_written_twice():
    names = ["x y-val/0/a.png", "z-val/0/a.png", "z-b", "z-B", "../c.d", "z-b.JPG"]
    assert file_names(names) == [
        "x_y-val_0_a.png",
        "z-val_0_a.png",
        "z-b.png",
        "z-B-2.png",
        "_c.d.png",
        "z-b-3.png",
    ]
