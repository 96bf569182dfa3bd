"""Grad-CAM against maps worked out by hand, for every network of the studies."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cam  # noqa: E402
import features  # noqa: E402
import models  # noqa: E402
from errors import InputError  # noqa: E402

CPU = torch.device("cpu")


def tiny_net():
    """Channels x0 + x1 and x1 - x2; their mean over 2 x 2 pixels after an in-place ReLU; three classes."""
    conv = nn.Conv2d(3, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[1.0, 1, 0], [0, 1, -1]]).reshape(2, 3, 1, 1)
    head = nn.Linear(2, 3)
    head.weight.data = torch.tensor([[1.0, 0], [2, -4], [-1, -1]])
    head.bias.data = torch.tensor([0.0, 1, 0])
    trunk = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = models.SingleNet(trunk, head)
    net.normalise, net.cam_layer = nn.Identity(), "0"
    return net


def test_grad_cam_by_hand():
    image = torch.tensor([[[[1.0, 2], [0, 4]], [[0.0, 1], [2, 0]], [[1.0, 0], [1, 3]]]])  # (1, 3, 2, 2)
    # convolution: a = x0 + x1 = [[1, 3], [2, 4]], b = x1 - x2 = [[-1, 1], [1, -3]]
    # ReLU lets b's gradient through twice of four; means: a 10 / 4, b 2 / 4; logits: 2.5; 1 + 5 - 2 = 4; -3
    # weights of the channels = mean gradient: a: W / 4, b: W / 4 * 2 / 4
    # class 0: a / 4 -> a / 4's maximum 1: [[1, 3], [2, 4]] / 4
    # class 1: 2 a / 4 - b / 2 = [[0.5 + 0.5, 1.5 - 0.5], [1 - 0.5, 2 + 1.5]] = [[1, 1], [0.5, 3.5]] -> / 3.5
    # class 2: -a / 4 - b / 8 = [[-1/8, ...], ..., -1 + 3/8] is nowhere positive -> 0
    logits, maps, picks = cam.grad_cam(tiny_net(), image)
    assert picks is None and maps.shape == (1, 3, 2, 2)
    torch.testing.assert_close(logits, torch.tensor([[2.5, 4.0, -3.0]]))
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.25, 0.75], [0.5, 1]]))
    torch.testing.assert_close(maps[0, 1], torch.tensor([[1, 1], [0.5, 3.5]]) / 3.5)
    torch.testing.assert_close(maps[0, 2], torch.zeros(2, 2))


def test_rows_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    net, images = tiny_net(), torch.randn(3, 3, 2, 2)
    alone = torch.cat([cam.grad_cam(net, image[None])[1] for image in images])
    torch.testing.assert_close(cam.grad_cam(net, images)[1], alone)


NETWORKS = [
    ("v0", 64, 2),
    ("v1", 64, 2),
    ("v2", 64, 2),
    ("v3", 64, 2),
    ("resnet18", 96, 3),
    ("resnet50", 64, 2),
    ("efficientnet-b1", 64, 2),
    ("efficientnet-lite0", 64, 2),
    ("alexnet", 96, 4),
]


@pytest.mark.parametrize("name, size, side", NETWORKS)
def test_every_network_of_pictures(name, size, side):
    torch.manual_seed(0)
    model = models.build_model(name, 3, "none", size)
    eyes = 2 if name in models.HEADS else 1
    images = torch.rand(2, eyes, 3, size, size)
    logits, maps, picks = cam.grad_cam(model, images)
    assert maps.shape == (2 * eyes, 3, side, side) and picks is None
    assert maps.min() == 0 and maps.max() == 1
    assert set(maps.amax((2, 3)).unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits)  # evaluation mode, and the hook changes nothing
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_are_those_of_the_network_that_gives_the_number():
    """Of the folded trunk that answers, in its precision (issue 12: 11)."""
    torch.manual_seed(0)
    model = models.build_model("v0", 3, "none", 64, "resnet18")
    images = torch.rand(2, 2, 3, 64, 64)
    plain = cam.grad_cam(model, images)
    folded = cam.grad_cam(features.with_fast_trunk(model), images)
    torch.testing.assert_close(folded[0], plain[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(folded[1], plain[1], atol=1e-3, rtol=1e-2)
    fast = features.with_fast_trunk(model, "bf16")
    logits, maps, _ = cam.grad_cam(fast, images)
    with torch.no_grad():
        assert torch.equal(logits, fast(images)) and maps.dtype == torch.float32
    assert not torch.equal(logits, plain[0]) and maps.shape == (4, 3, 2, 2)


def test_tokens_of_a_transformer_are_laid_out_as_a_map():
    """(N, 1 + h * w, C): the class token first, then row by row."""
    tokens = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    laid = cam.as_map(tokens)
    assert laid.shape == (2, 3, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(laid[:, :, row, column], tokens[:, 1 + 3 * row + column])


def test_a_network_without_a_map_says_so():
    net = models.SingleNet(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), nn.Linear(4, 2))
    net.name = "dense"
    with pytest.raises(InputError, match="dense has no map of features"):
        cam.grad_cam(net, torch.rand(1, 3, 2, 2))


# ---------------------------------------------------------------- knees


def test_mrnet_shows_the_strongest_slice_of_each_plane():
    """Trunks whose features are a slice's brightness: the pooled maximum comes from the brightest slice."""
    model = models.MRNet(2)
    for plane in range(3):
        conv = nn.Conv2d(3, 256, 1, bias=False)
        nn.init.constant_(conv.weight, 1 / 3)
        model.backbone[plane] = nn.Sequential(*[nn.Identity()] * 10, conv)
    nn.init.constant_(model.classifier.weight, 1 / 768)
    model.classifier.weight.data[1] *= -1
    nn.init.zeros_(model.classifier.bias)
    generator, brightest = torch.Generator().manual_seed(0), [3, 0, 5]
    volumes = []
    for count, pick in zip((5, 2, 6), brightest, strict=True):
        volumes.append(torch.rand(count, 1, 4, 4, generator=generator).expand(-1, 3, -1, -1).clone())
        volumes[-1][pick] += 1
    logits, maps, picks = cam.grad_cam(model, volumes, [[5], [2], [6]])
    assert picks == brightest
    mean = sum(volume[pick].mean() for volume, pick in zip(volumes, brightest, strict=True)) / 3
    torch.testing.assert_close(logits, torch.stack([mean, -mean])[None])
    for volume, pick, plane in zip(volumes, brightest, maps, strict=True):
        assert plane.shape == (1, 2, 4, 4)
        # one weight for all channels
        torch.testing.assert_close(plane[0, 0], volume[pick, 0] / volume[pick, 0].max())
        assert not plane[0, 1].any()  # brightness speaks against the second label


def test_explain_shows_the_slices_that_were_picked():
    torch.manual_seed(0)
    model = models.build_model("mrnet", 3)
    volumes = [torch.randint(0, 256, (count, 72, 72), dtype=torch.uint8) for count in (3, 2, 4)]
    batch = {"volumes": volumes, "lengths": [[3], [2], [4]], "targets": torch.zeros(1)}
    names, shown, maps = cam.explain(model, batch, CPU)
    assert [plane.shape for plane in maps] == [(3, 3, 3)] * 3
    planes = ("axial", "coronal", "sagittal")
    for name, plane, volume, picture in zip(names, planes, volumes, shown, strict=True):
        number = int(name.removeprefix(f"{plane}, slice "))  # counted from 1
        assert np.array_equal(picture, np.repeat(volume[number - 1].numpy()[:, :, None], 3, 2))


@pytest.mark.parametrize("name, titles", [("v0", ["left eye", "right eye"]), ("resnet18", [""])])
def test_explain_names_the_eyes(name, titles):
    model = models.build_model(name, 2, "none", 32, "resnet18" if name == "v0" else "resnet50")
    images = torch.randint(0, 256, (1, len(titles), 32, 32, 3), dtype=torch.uint8)
    names, shown, maps = cam.explain(model, {"images": images, "targets": torch.zeros(1)}, CPU)
    assert names == titles and len(maps) == len(titles) and maps[0].shape[0] == 2
    assert all(np.array_equal(picture, images[0, i].numpy()) for i, picture in enumerate(shown))
