"""Grad-CAM against maps worked out by hand, for every network; heatmap.py's files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import heatmap
import models
from errors import guard

REAL = Path(os.environ.get("REAL_DATA", "absent"))


def run(*arguments):
    return guard(heatmap.main, [*map(str, arguments), "--device", "cpu", "--workers", "0"])


def tiny_net():
    """Two channels, x0 + x1 and x1 - x2; the mean over the 2 x 2 picture after an in-place ReLU; three classes."""
    conv = nn.Conv2d(3, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[1.0, 1, 0], [0, 1, -1]]).reshape(2, 3, 1, 1)
    head = nn.Linear(2, 3)
    head.weight.data, head.bias.data = torch.tensor([[1.0, 0], [2, -4], [-1, -1]]), torch.tensor([0.0, 1, 0])
    return models.SingleNet(nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()), head, "backbone.0")


def test_grad_cam_by_hand():
    image = torch.tensor([[[[1.0, 2], [0, 4]], [[0.0, 1], [2, 0]], [[1.0, 0], [1, 3]]]])  # (1, 3, 2, 2)
    # convolution: a = x0 + x1 = [[1, 3], [2, 4]], b = x1 - x2 = [[-1, 1], [1, -3]]; ReLU lets b's gradient through twice of four
    # means: a 10 / 4, b 2 / 4; logits: 2.5; 1 + 5 - 2 = 4; -3
    # weights of the channels = mean gradient: a: W / 4, b: W / 4 * 2 / 4
    # class 0: a / 4 -> a / 4's maximum 1: [[1, 3], [2, 4]] / 4
    # class 1: 2 a / 4 - b / 2 = [[0.5 + 0.5, 1.5 - 0.5], [1 - 0.5, 2 + 1.5]] = [[1, 1], [0.5, 3.5]] -> / 3.5
    # class 2: -a / 4 - b / 8 = [[-1/8, ...], ..., -1 + 3/8] is nowhere positive -> 0
    logits, maps, picks = models.grad_cam(tiny_net(), image)
    assert picks is None and maps.shape == (1, 3, 2, 2)
    torch.testing.assert_close(logits, torch.tensor([[2.5, 4.0, -3.0]]))
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.25, 0.75], [0.5, 1]]))
    torch.testing.assert_close(maps[0, 1], torch.tensor([[1, 1], [0.5, 3.5]]) / 3.5)
    torch.testing.assert_close(maps[0, 2], torch.zeros(2, 2))


def test_rows_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    net, images = tiny_net(), torch.randn(3, 3, 2, 2)
    alone = torch.cat([models.grad_cam(net, image[None])[1] for image in images])
    torch.testing.assert_close(models.grad_cam(net, images)[1], alone)


@pytest.mark.parametrize("name, size, side", [("v0", 64, 2), ("v1", 64, 2), ("v2", 64, 2), ("resnet18", 96, 3), ("resnet50", 64, 2),
                                              ("efficientnet-b1", 64, 2), ("alexnet", 96, 4)])
def test_every_network_of_pictures(name, size, side):
    torch.manual_seed(0)
    model = models.build_model(name, 3, "none", size)
    eyes = 2 if name in ("v0", "v1", "v2") else 1
    images = torch.randn(2, eyes, 3, size, size)
    logits, maps, picks = models.grad_cam(model, images)
    assert maps.shape == (2 * eyes, 3, side, side) and picks is None
    assert maps.min() == 0 and maps.max() == 1 and set(maps.amax((2, 3)).unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits)  # evaluation mode, and the hook changes nothing
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mrnet_shows_the_strongest_slice_of_each_plane():
    """Trunks whose features are a slice's brightness: the pooled maximum, and so the answer, comes from the brightest."""
    model = models.MRNet(2)
    for p in range(3):
        conv = nn.Conv2d(3, 256, 1, bias=False)
        nn.init.constant_(conv.weight, 1 / 3)
        model.backbone[p] = nn.Sequential(*[nn.Identity()] * 10, conv)
    nn.init.constant_(model.classifier.weight, 1 / 768)
    model.classifier.weight.data[1] *= -1
    nn.init.zeros_(model.classifier.bias)
    generator, brightest = torch.Generator().manual_seed(0), [3, 0, 5]
    volumes = [torch.rand(count, 1, 4, 4, generator=generator).expand(-1, 3, -1, -1).clone() for count in (5, 2, 6)]
    for volume, pick in zip(volumes, brightest, strict=True):
        volume[pick] += 1
    logits, maps, picks = models.grad_cam(model, volumes, [[5], [2], [6]])
    assert picks == brightest
    mean = sum(volume[pick].mean() for volume, pick in zip(volumes, brightest, strict=True)) / 3
    torch.testing.assert_close(logits, torch.stack([mean, -mean])[None])
    for volume, pick, plane in zip(volumes, brightest, maps, strict=True):
        assert plane.shape == (1, 2, 4, 4)
        torch.testing.assert_close(plane[0, 0], volume[pick, 0] / volume[pick, 0].max())  # one weight for all channels
        assert not plane[0, 1].any()  # brightness speaks against the second label


def test_explain_shows_the_slices_that_were_picked():
    torch.manual_seed(0)
    model = models.build_model("mrnet", 3)
    volumes = [torch.randint(0, 256, (count, 72, 72), dtype=torch.uint8) for count in (3, 2, 4)]
    names, shown, maps, logits = models.explain(model, {"volumes": volumes, "lengths": [[3], [2], [4]], "targets": torch.zeros(1)})
    assert logits.shape == (3,) and [cam.shape for cam in maps] == [(3, 3, 3)] * 3
    for name, plane, volume, picture in zip(names, ("axial", "coronal", "sagittal"), volumes, shown, strict=True):
        number = int(name.removeprefix(f"{plane}, slice "))  # counted from 1
        assert np.array_equal(picture, np.repeat(volume[number - 1].numpy()[:, :, None], 3, 2))


# ---------------------------------------------------------------- the script

def test_split_gives_a_file_per_label_and_patient(trained, tmp_path, capsys):
    saved = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    assert run("--ckpt", trained("odir") / "best.pt", "--split", "val", "--per-label", 1, "--out", tmp_path) == 0
    text, names = capsys.readouterr().out, sorted(file.name for file in tmp_path.iterdir())
    assert "RENDERED" in text and f"{len(names)} PNGs" in text
    for name in names:
        label, patient = name.removesuffix(".png").split("-")
        assert label in saved["labels"] and patient in saved["split"]["val"]
    missing = [line.split()[-1] for line in text.splitlines() if line.startswith("nobody")]
    assert sorted({name.split("-")[0] for name in names} | set(missing)) == sorted(saved["labels"])
    assert len(names) == len(saved["labels"]) - len(missing)
    with Image.open(tmp_path / names[0]) as image:  # both eyes below one another, the picture and eight classes
        assert 3 < image.width / image.height < 5


def test_per_label_counts(trained, tmp_path):
    assert run("--ckpt", trained("retina") / "best.pt", "--split", "val", "--per-label", 2, "--out", tmp_path) == 0
    names = [file.name for file in tmp_path.iterdir()]
    for label in ("diabetic_retinopathy", "glaucoma", "normal"):
        assert sum(name.startswith(f"{label}-") for name in names) == 2
    assert len(names) == 6


def test_pictures_and_exams(trained, rendered, tmp_path, capsys):
    eyes = sorted((rendered("retina") / "test").iterdir())[:2]
    assert run("--ckpt", trained("retina") / "best.pt", *eyes, "--out", tmp_path / "eyes") == 0
    assert sorted(file.stem for file in (tmp_path / "eyes").iterdir()) == [eye.stem for eye in eyes]
    planes = [sorted((rendered("mrnet") / "valid" / plane).iterdir())[0] for plane in ("axial", "coronal", "sagittal")]
    assert run("--ckpt", trained("mrnet") / "best.pt", *planes, "--out", tmp_path / "knee") == 0
    file, = (tmp_path / "knee").iterdir()
    with Image.open(file) as image:
        assert file.stem == planes[0].stem and 1 < image.width / image.height < 1.4  # three planes, picture and three labels


def test_default_folder_is_the_runs(trained, rendered, tmp_path, monkeypatch):
    """best.pt may be a copy elsewhere: the files about it still go to the run's folder."""
    import shutil
    shutil.copyfile(trained("retina") / "best.pt", tmp_path / "best.pt")
    monkeypatch.chdir(tmp_path)
    eye = sorted((rendered("retina") / "test").iterdir())[0]
    try:
        assert run("--ckpt", "best.pt", eye) == 0
        assert (trained("retina") / "heatmaps" / f"{eye.stem}.png").is_file()
    finally:
        shutil.rmtree(trained("retina") / "heatmaps")


def test_refused(trained, rendered, tmp_path, capsys):
    ckpt, eye = trained("retina") / "best.pt", sorted((rendered("retina") / "test").iterdir())[0]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for arguments, said in (([], "either pictures or --split"), ([eye, "--split", "val"], "either pictures or --split"),
                            (["--split", "test"], "no test part"), (["--split", "val", "--per-label", 0], "1 or more"),
                            ([eye, "--data", rendered("retina")], "--data goes with --split"), ([eye, tmp_path / "broken.jpg"], "broken.jpg"),
                            ([tmp_path / "gone.jpg"], "gone.jpg")):
        assert run("--ckpt", ckpt, *arguments, "--out", tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_names_are_safe_and_none_is_written_twice():
    names = heatmap.file_names(["val/0/a.png", "b", "B", "../c.d"], [["x y", "z"], ["z"], ["z"], [""]])
    assert names == [["x_y-val_0_a.png", "z-val_0_a.png"], ["z-b.png"], ["z-B-2.png"], ["_c.d.png"]]


@pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")
def test_real_photographs(trained, tmp_path):
    assert run("--ckpt", trained("retina") / "best.pt", REAL / "fullsize" / "IDRiD_046.jpg", "--out", tmp_path) == 0
    assert run("--ckpt", trained("odir") / "best.pt", *[REAL / f"odir/images/0_{side}.jpg" for side in ("left", "right")], "--out", tmp_path) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.png", "IDRiD_046.png"]
