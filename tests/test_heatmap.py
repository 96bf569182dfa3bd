"""heatmap.py: which files it writes for which rows; its maps are of the network that gave the number."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoint
import figures
import heatmap
import predictor
from errors import guard

REAL = Path(os.environ.get("REAL_DATA", "absent"))


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
    carried = np.any([json.loads(target) for target, _ in saved["rows"]["val"].values()], axis=0)
    assert [name.split("-")[0] for name in names] == sorted(np.array(saved["labels"])[carried])
    with Image.open(tmp_path / names[0]) as image:  # two eyes, a picture and three or four maps in each line
        assert 1.2 < image.width / image.height < 2.5


def test_per_label_counts(trained, tmp_path):
    flags = ["--split", "val", "--per-label", 2, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run("--ckpt", trained("retina"), *flags) == 0
    names = [file.name for file in (tmp_path / "out").iterdir()]
    for label in ("diabetic_retinopathy", "glaucoma", "normal"):
        assert sum(name.startswith(f"{label}-") for name in names) == 2
    assert len(names) == 6


def test_pictures_and_exams(trained, rendered, tmp_path, capsys):
    eyes = sorted((rendered("retina") / "test").iterdir())[:2]
    assert run("--ckpt", trained("retina") / "best.pt", *eyes, "--out", tmp_path / "eyes") == 0
    assert sorted(file.stem for file in (tmp_path / "eyes").iterdir()) == [eye.stem for eye in eyes]
    planes = [
        sorted((rendered("mrnet") / "valid" / plane).iterdir())[0]
        for plane in ("axial", "coronal", "sagittal")
    ]
    assert run("--ckpt", trained("mrnet") / "best.pt", *planes, "--out", tmp_path / "knee") == 0
    (file,) = (tmp_path / "knee").iterdir()
    with Image.open(file) as image:
        assert (
            file.stem == planes[0].stem and 0.8 < image.width / image.height < 1.4
        )  # three planes, picture and three labels


def test_default_folder_is_that_of_the_run_in_which_the_checkpoint_lies(
    trained, rendered, tmp_path, monkeypatch
):
    """Of a moved run the moved folder; of a lone best.pt one beside it, never the one that the file names."""
    before = sorted(trained("retina").rglob("*"))
    shutil.copytree(trained("retina"), tmp_path / "moved")
    shutil.copyfile(trained("retina") / "best.pt", tmp_path / "best.pt")
    monkeypatch.chdir(tmp_path)
    eye = sorted((rendered("retina") / "test").iterdir())[0]
    assert run("--ckpt", "moved", eye) == 0 and (tmp_path / "moved/heatmaps" / f"{eye.stem}.png").is_file()
    assert (
        run("--ckpt", "best.pt", eye) == 0 and (tmp_path / "test-best/heatmaps" / f"{eye.stem}.png").is_file()
    )
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


def test_refused(trained, rendered, tmp_path, capsys):
    ckpt, eye = trained("retina") / "best.pt", sorted((rendered("retina") / "test").iterdir())[0]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for arguments, said in (
        ([], "either pictures or --split"),
        ([eye, "--split", "val"], "either pictures or --split"),
        (["--split", "test"], "no test part"),
        (["--split", "val", "--per-label", 0], "1 or more"),
        ([eye, "--data", rendered("retina")], "--data goes with --split"),
        ([eye, tmp_path / "broken.jpg"], "broken.jpg"),
        ([tmp_path / "gone.jpg"], "gone.jpg"),
    ):
        assert run("--ckpt", ckpt, *arguments, "--out", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_names_are_safe_and_none_is_written_twice():
    assert figures.file_names(["a b", "a_b", "a_b-2"]) == ["a_b.png", "a_b-2.png", "a_b-2-2.png"]
    names = ["x y-val/0/a.png", "z-val/0/a.png", "z-b", "z-B", "../c.d", "z-b.JPG"]
    assert figures.file_names(names) == [
        "x_y-val_0_a.png",
        "z-val_0_a.png",
        "z-b.png",
        "z-B-2.png",
        "_c.d.png",
        "z-b-3.png",
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")
def test_real_photographs(trained, tmp_path):
    assert (
        run("--ckpt", trained("retina") / "best.pt", REAL / "fullsize" / "IDRiD_046.jpg", "--out", tmp_path)
        == 0
    )
    assert (
        run(
            "--ckpt",
            trained("odir") / "best.pt",
            *[REAL / f"odir/images/0_{side}.jpg" for side in ("left", "right")],
            "--out",
            tmp_path,
        )
        == 0
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.png", "IDRiD_046.png"]


def test_maps_of_another_data_set_get_a_folder_of_their_own(trained, rendered, tmp_path, monkeypatch):
    shutil.copytree(trained("retina"), tmp_path / "run")
    shutil.copytree(rendered("retina"), tmp_path / "other")
    with Image.open(file := next((tmp_path / "other/train").iterdir())) as image:
        image.rotate(180).save(file)
    said, caption = [], figures.caption
    monkeypatch.setattr(figures, "caption", lambda fig, text: said.append(text) or caption(fig, text))
    flags = ["--ckpt", tmp_path / "run", "--per-label", 1, "--cache", tmp_path / "cache"]
    assert run(*flags, "--split", "val") == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run/heatmaps").iterdir()}
    assert said[-1].endswith(", val") and "epoch " in said[-1]
    assert run(*flags, "--split", "all", "--data", tmp_path / "other") == 0
    assert {file: file.read_bytes() for file in (tmp_path / "run/heatmaps").iterdir()} == before
    assert len(list((tmp_path / "run").glob("heatmaps-other-*/*.png"))) == 3
    assert said[-1].endswith(f", all of {tmp_path / 'other'}")
