"""The networks against the published counts, the libraries and plain loops; where weights come from."""

import copy
import json
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import url_map
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import features  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from augment import IMAGENET_MEAN, IMAGENET_STD, prepare_batch  # noqa: E402
from checkpoint import state_digest  # noqa: E402
from dataset import PictureSet  # noqa: E402
from decode import Pictures  # noqa: E402
from errors import InputError, guard  # noqa: E402
from models import AlexNet, DualResNet, MRNet, build_model  # noqa: E402

HEADS = {"v0": 32_776, "v1": 32_776, "v2": 4096 * 128 + 128 + 128 * 64 + 64 + 64 * 8 + 8, "v3": 32_776}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def normal(pictures):
    """As ImageNet's weights want pictures in 0..1."""
    return (pictures - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def shake_batchnorm(module, seed=0):
    """Statistics and scales that a mistake in folding could not hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator) * 0.1)
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                layer.weight.copy_(torch.rand(layer.num_features, generator=generator) * 0.5 + 0.5)
                layer.bias.copy_(torch.randn(layer.num_features, generator=generator) * 0.1)
    return module


# ---------------------------------------------------------------- the eye pairs' network


@pytest.mark.parametrize("head", HEADS)
def test_published_parameter_counts(head):
    model = build_model(head, 8)
    assert isinstance(model, DualResNet)
    assert count(model.backbone) == 23_508_032 and count(model.classifier) == HEADS[head]
    assert count(model) == 23_508_032 + HEADS[head]
    dropouts = [module.p for module in model.classifier.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == {"v0": [], "v1": [0.2], "v2": [0.5, 0.5], "v3": []}[head]
    assert not any(
        isinstance(module, nn.Dropout) for module in model.backbone.modules()
    )  # kept features must not be dropped


def test_dual_net_is_one_trunk_for_both_eyes_side_by_side():
    model = build_model("v0", 8).eval()
    pair = images(3, 2, 3, 32, 32)
    with torch.no_grad():
        left, right = (model.backbone(normal(pair[:, eye])) for eye in range(2))
        expected = torch.cat([left, right], 1) @ model.classifier.weight.T + model.classifier.bias
        torch.testing.assert_close(model(pair), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(pair), model(pair.flip(1)))
        assert model.features(pair[:0]).shape == (0, 4096)


def test_unknown_model():
    with pytest.raises(InputError, match="'v4'.*close to it: .*v[0-3]"):
        build_model("v4", 8)


def test_v3_takes_both_eyes_in_any_order():
    """The maximum and the minimum of the two eyes: what either shows, and what both do."""
    model = build_model("v3", 8).eval()
    pair = images(2, 2, 3, 32, 32)
    with torch.no_grad():
        left, right = model.features(pair).chunk(2, 1)
        both = torch.cat([torch.maximum(left, right), torch.minimum(left, right)], 1)
        expected = both @ model.classifier[1].weight.T + model.classifier[1].bias
        torch.testing.assert_close(model(pair), expected)
        torch.testing.assert_close(model(pair.flip(1)), model(pair), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- parity with the libraries


def test_efficientnet_gives_the_librarys_outputs():
    library = shake_batchnorm(EfficientNet.from_name("efficientnet-b1", num_classes=5)).eval()
    model = build_model("efficientnet-b1", 5).eval()
    state = library.state_dict()
    head = {"1.weight": state.pop("_fc.weight"), "1.bias": state.pop("_fc.bias")}
    model.backbone.load_state_dict(state)
    model.classifier.load_state_dict(head)
    pictures = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = library(normal(pictures))
        torch.testing.assert_close(model(pictures), expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            model(pictures[:, None]), expected, atol=1e-4, rtol=1e-3
        )  # (B, 1, 3, H, W), as the loader gives it
    assert count(model) == count(library) and model.classifier[0].p == library._dropout.p


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_give_the_librarys_outputs(name):
    library = shake_batchnorm(getattr(torchvision.models, name)(num_classes=5)).eval()
    model = build_model(name, 5).eval()
    state = library.state_dict()
    model.classifier.load_state_dict({"weight": state.pop("fc.weight"), "bias": state.pop("fc.bias")})
    model.backbone.load_state_dict(state)
    pictures = images(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), library(normal(pictures)), atol=1e-4, rtol=1e-4)
    assert count(model) == count(library)


# ---------------------------------------------------------------- AlexNet


def test_alexnet_shapes_and_count_by_hand():
    model = AlexNet(3, 224)
    shapes, x = [], torch.zeros(1, 3, 224, 224)
    for layer in model.backbone:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.Flatten):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [
        (96, 54, 54),
        (96, 26, 26),
        (256, 26, 26),
        (256, 12, 12),
        (384, 12, 12),
        (384, 12, 12),
        (256, 12, 12),
        (256, 5, 5),
        (6400,),
    ]
    convolutions = [(1, 96, 11), (96, 256, 5), (256, 384, 3), (384, 384, 3), (384, 256, 3)]
    by_hand = sum(i * o * k * k + o + 2 * o for i, o, k in convolutions) + 6400 * 3 + 3
    assert count(model) == by_hand
    kinds = [type(layer) for layer in model.backbone]
    after = [kinds[i + 1 : i + 3] for i, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert after == [[nn.ReLU, nn.BatchNorm2d]] * 5  # BatchNorm after each ReLU
    assert [layer.stride for layer in model.backbone if isinstance(layer, nn.Conv2d)] == [(4, 4)] + [
        (1, 1)
    ] * 4


def test_alexnet_sees_the_green_channel_alone_and_starts_he_normal():
    torch.manual_seed(0)
    model = AlexNet(3, 96).eval()
    picture = images(1, 3, 96, 96)
    other = picture.clone()
    other[:, [0, 2]] = 5
    with torch.no_grad():
        torch.testing.assert_close(model(picture), model(other))
        assert not torch.allclose(model(picture), model(picture * 2))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            assert (
                layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
                and not layer.bias.any()
            )
    with pytest.raises(InputError, match="--size 66.*67"):
        AlexNet(3, 66)
    assert AlexNet(3, 67).classifier.in_features == 256


# ---------------------------------------------------------------- MRNet


def plain_mrnet(model, exams):
    """One exam, one plane, one slice after the other -> logits (B, L)."""
    logits = []
    for exam in exams:
        found = []
        for trunk, plane in zip(model.backbone, exam, strict=True):
            slices = [trunk(s[None]).mean((2, 3))[0] for s in plane]
            found.append(torch.stack(slices).max(0).values)
        logits.append(model.classifier(torch.cat(found)))
    return torch.stack(logits)


def test_mrnet_equals_a_plain_loop_alone_and_in_a_batch():
    torch.manual_seed(0)
    model = build_model("mrnet", 3).eval()
    assert isinstance(model, MRNet) and model.classifier.in_features == 768 and len(model.backbone) == 3
    counts = [(1, 4, 2), (3, 1, 5), (2, 2, 1)]  # slices of each exam in each plane
    exams = [
        [images(n, 3, 64, 64, seed=10 * i + p) for p, n in enumerate(planes)]
        for i, planes in enumerate(counts)
    ]
    volumes = [torch.cat([exam[plane] for exam in exams]) for plane in range(3)]
    lengths = [[planes[plane] for planes in counts] for plane in range(3)]
    with torch.no_grad():
        together = model(volumes, lengths)
        torch.testing.assert_close(together, plain_mrnet(model, exams), atol=1e-5, rtol=1e-4)
        for number, exam in enumerate(exams):
            alone = model(exam, [[len(plane)] for plane in exam])
            torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=1e-4)
    library = torchvision.models.alexnet()
    assert [count(trunk) for trunk in model.backbone] == [count(library.features)] * 3


# ---------------------------------------------------------------- frozen trunks


def test_with_fast_trunk_shares_the_head_and_leaves_the_model_alone():
    model = build_model("v2", 8)
    fast = features.with_fast_trunk(model).train()
    assert fast.classifier is model.classifier and isinstance(fast.backbone, features.FastTrunk)
    assert isinstance(model.backbone, torchvision.models.ResNet)
    assert not fast.backbone.training and fast.classifier.training
    knees = features.with_fast_trunk(build_model("mrnet", 3))
    assert [type(trunk) for trunk in knees.backbone] == [features.FastTrunk] * 3


EPOCHS = {"fitted": 2, "batch": 2, "pretrained": 1}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, rendered, train_here):
    """{--bn: (the network as it was built, best.pt, last.pt, its folder)} of three short trainings."""
    folder, found = tmp_path_factory.mktemp("frozen"), {}
    for bn in EPOCHS:
        run = train_here(
            folder, "--data", rendered("odir"), "--trunk", "resnet18", "--bn", bn, "--epochs", EPOCHS[bn]
        )
        torch.manual_seed(42)
        found[bn] = (
            build_model("v0", 8, trunk="resnet18"),
            torch.load(run / "best.pt", weights_only=True),
            torch.load(run / "last.pt", weights_only=True),
            run,
        )
    return found


@pytest.mark.parametrize("bn", EPOCHS)
def test_a_frozen_trunks_parameters_stay_and_the_head_moves(frozen, bn):
    built, best, last, run = frozen[bn]
    assert json.loads((run / "run.json").read_text())["epochs_run"] == EPOCHS[bn]
    parameters = [f"backbone.{name}" for name, _ in built.backbone.named_parameters()]
    assert len(parameters) == 60 and all(
        torch.equal(best["model"][name], built.state_dict()[name]) for name in parameters
    )
    assert not torch.equal(best["model"]["classifier.weight"], built.classifier.weight)
    whole = bn == "batch"  # then last.pt holds the trunk as well
    if whole:
        assert all(torch.equal(last["model"][name], built.state_dict()[name]) for name in parameters)
    else:
        trunk = build_model("v0", 8, trunk="resnet18")
        trunk.load_state_dict(best["model"])
        assert last["trunk"] == state_digest(
            trunk.normalise, trunk.backbone
        )  # the trunk of the last epoch is the best epoch's, bit for bit


def statistics(state):
    return {key: value for key, value in state.items() if "running_" in key or "num_batches" in key}


def test_fitted_statistics_are_those_of_the_training_pictures(frozen, rendered, tmp_path):
    built, best, _, _ = frozen["fitted"]
    ids = set(best["rows"]["train"])
    files = sorted(
        str(file) for file in (rendered("odir") / "images").iterdir() if file.name.split("_")[0] in ids
    )
    pictures = Pictures([(file,) for file in files], "fov", 32, tmp_path, 0)
    data = PictureSet(pictures, np.zeros(len(files), np.float32))
    (batch,), _ = prepare_batch(data.__getitems__(range(len(files))), torch.device("cpu"))
    batch = normal(batch)
    assert len(batch) == 64  # 32 patients: one batch of the fit
    trunk = built.backbone
    with torch.no_grad():
        x = trunk.conv1(batch[:, 0])
        torch.testing.assert_close(
            best["model"]["backbone.bn1.running_mean"], x.mean((0, 2, 3)), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(
            best["model"]["backbone.bn1.running_var"], x.var((0, 2, 3)), atol=1e-4, rtol=1e-3
        )
        # and the last layer's, behind everything else: what it sees as it normalises by these pictures
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        trunk.train()(batch[:, 0])
    last = trunk.layer4[-1].bn2
    torch.testing.assert_close(
        best["model"]["backbone.layer4.1.bn2.running_mean"], last.running_mean, atol=1e-3, rtol=1e-2
    )
    torch.testing.assert_close(
        best["model"]["backbone.layer4.1.bn2.running_var"], last.running_var, atol=1e-3, rtol=2e-2
    )


def test_batch_moves_the_statistics_pretrained_keeps_them(frozen):
    fresh = statistics(build_model("v0", 8, trunk="resnet18").state_dict())
    _, best, last, _ = frozen["batch"]
    moved = statistics(last["model"])
    assert moved["backbone.bn1.num_batches_tracked"] == 2 * 1  # two epochs of one batch of 32 patients
    assert all(not torch.equal(moved[key], fresh[key]) for key in fresh)
    kept = statistics(frozen["pretrained"][1]["model"])
    assert all(torch.equal(kept[key], fresh[key]) for key in fresh)


# ---------------------------------------------------------------- weights

FILES = {
    "v0": "resnet50-11ad3fa6.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "mrnet": "alexnet-owt-7be5be79.pth",
    "efficientnet-b1": Path(url_map["efficientnet-b1"]).name,
}


def library(name):
    """The library's own network, randomly initialised, in the form in which it publishes weights."""
    if name == "efficientnet-b1":
        return EfficientNet.from_name(name)
    return {
        "v0": torchvision.models.resnet50,
        "resnet18": torchvision.models.resnet18,
        "mrnet": torchvision.models.alexnet,
    }[name]()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache of weights, and no way out; what is asked for is written down."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    return asked, tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("name", FILES)
def test_imagenet_weights_from_the_cache(name, no_network):
    asked, cache = no_network
    torch.manual_seed(5)
    theirs = library(name)
    if name == "mrnet":
        theirs.classifier = nn.Linear(2, 2)  # AlexNet's own, which is not taken, has 230 MB
    torch.save(theirs.state_dict(), cache / FILES[name])
    model = build_model(name, 5, "imagenet")
    assert not asked
    trunks = model.backbone if name == "mrnet" else [model.backbone]
    expected = theirs.features.state_dict() if name == "mrnet" else theirs.state_dict()
    for trunk in trunks:
        found = trunk.state_dict()
        assert set(expected) - set(found) <= {"fc.weight", "fc.bias", "_fc.weight", "_fc.bias"} and set(
            found
        ) <= set(expected)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    # the same file by name, and strictly: one key too few or too many is refused
    assert build_model(name, 5, str(cache / FILES[name]))
    state = theirs.state_dict()
    missing = next(iter(state))
    torch.save({key: value for key, value in state.items() if key != missing}, cache / "less.pth")
    with pytest.raises(
        InputError, match="less.pth does not fit.*" + re.escape(missing.removeprefix("features."))
    ):
        build_model(name, 5, str(cache / "less.pth"))
    torch.save(
        {**state, "features.other" if name == "mrnet" else "other": torch.zeros(1)}, cache / "more.pth"
    )
    with pytest.raises(InputError, match="more.pth does not fit.*other"):
        build_model(name, 5, str(cache / "more.pth"))


@pytest.mark.parametrize("name", FILES)
def test_missing_imagenet_weights_say_how_to_supply_them(name, no_network):
    asked, cache = no_network
    with pytest.raises(InputError) as caught:
        build_model(name, 5, "imagenet")
    assert [Path(url).name for url in asked] == [FILES[name]]
    words = (
        str(cache),
        "no network in tests",
        "--weights PATH",
        "--weights none",
        "--trunk efficientnet-lite0",
    )
    assert all(word in str(caught.value) for word in words)


def test_damaged_imagenet_weights_and_those_that_hold_code(no_network):
    _, cache = no_network
    for content in (b"", b"<html>moved</html>", None):
        if content is None:
            torch.save(
                {"conv1.weight": Path("x")}, cache / FILES["resnet18"]
            )  # a class, which would have to be unpickled
        else:
            (cache / FILES["resnet18"]).write_bytes(content)
        with pytest.raises(InputError, match="resnet18.*" + str(cache)):
            build_model("resnet18", 5, "imagenet")


def test_the_seeds_alexnet_has_no_imagenet_weights(no_network):
    asked, _ = no_network
    with pytest.raises(InputError, match="--weights imagenet: no such file; expected a file, none"):
        build_model("alexnet", 3, "imagenet", 96)
    assert not asked


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(InputError, match="--weights .*gone.pt.*no such file"):
        build_model("resnet18", 3, str(tmp_path / "gone.pt"))
    things = {
        "words.pt": "not a checkpoint",
        "list.pt": [1, 2],
        "tensor.pt": torch.zeros(3),
        "numbers.pt": {1: 2},
        "empty.pt": {},
        "theirs.pt": {"model": {"conv1.weight": torch.zeros(1)}, "epoch": 3},
        "module.pt": nn.Linear(2, 2),
        "half.pt": {"model": library("resnet18").state_dict(), "args": {}},
    }
    for name, thing in things.items():
        path = tmp_path / name
        path.write_text(thing) if isinstance(thing, str) else torch.save(thing, path)
        with pytest.raises(InputError, match=name):
            build_model("resnet18", 3, str(path))
    cut = tmp_path / "cut.pt"
    torch.save(library("resnet18").state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:100_000])
    with pytest.raises(InputError, match="cut.pt"):
        build_model("resnet18", 3, str(cut))


def test_best_pt_as_weights(frozen, capsys):
    _, best, _, run = frozen["fitted"]
    path = str(run / "best.pt")
    torch.manual_seed(9)
    same = build_model("v0", 8, path, trunk="resnet18")
    assert all(
        torch.equal(value, best["model"][key]) for key, value in same.state_dict().items()
    )  # head and statistics too
    assert "head" not in capsys.readouterr().out
    for name, labels in (("v2", 8), ("v1", 8), ("v0", 3), ("v3", 8)):  # another head, or one of another size
        model = build_model(name, labels, path, trunk="resnet18")
        assert all(
            torch.equal(value, best["model"][f"backbone.{key}"])
            for key, value in model.backbone.state_dict().items()
        )
        assert "the head is another and starts afresh" in capsys.readouterr().out
        assert model.classifier(torch.zeros(1, 1024)).shape == (1, labels)
    swapped = ["D", "N", *best["labels"][2:]]  # as many labels, in another order
    for labels, afresh in ((best["labels"], False), (swapped, True)):
        model = build_model("v0", 8, path, trunk="resnet18", labels=labels)
        assert torch.equal(model.classifier.weight, best["model"]["classifier.weight"]) is not afresh
        assert ("the head is another" in capsys.readouterr().out) is afresh
    single = build_model("resnet18", 5, path)  # from eye pairs to one photograph
    assert single.backbone.conv1.weight.equal(best["model"]["backbone.conv1.weight"])
    assert "the head is another and starts afresh" in capsys.readouterr().out
    for name in ("resnet50", "mrnet", "v0"):
        with pytest.raises(InputError, match="a checkpoint of v0, resnet18, does not fit"):
            build_model(name, 8, path)
    with pytest.raises(InputError, match="last.pt is for --resume alone"):
        build_model("v0", 8, str(run / "last.pt"))


def test_imagenet_on_real_data_stops_on_rendered_goes_on_loudly(
    rendered, train_here, no_network, tmp_path, monkeypatch, capsys
):
    real = tmp_path / "real"
    shutil.copytree(rendered("odir"), real, ignore=shutil.ignore_patterns("rendered.json"))
    monkeypatch.chdir(tmp_path)
    flags = [
        "--weights",
        "imagenet",
        "--size",
        "32",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--workers",
        "0",
    ]
    assert guard(train.main, ["--data", str(real), *flags]) == 2
    out, err = capsys.readouterr()
    assert "error: --weights imagenet" in err and "--weights PATH" in err and "RANDOM" not in out
    assert not (tmp_path / "runs").exists() and not (tmp_path / "best.pt").exists()  # nothing half-written
    run = train_here(tmp_path / "run", "--data", rendered("odir"), "--weights", "imagenet", "--epochs", 1)
    assert "!! RANDOM WEIGHTS" in capsys.readouterr().out
    facts = json.loads((run / "run.json").read_text())
    assert facts["args"]["weights"] == "none" and facts["data"]["rendered"] is True


def test_depthwise_convolutions_compute_in_float32_on_a_cpu():
    """In the network that trains: its bf16 result is the float32 one, rounded. Every other number stays."""
    torch.manual_seed(0)
    net = models.build_model("efficientnet-lite0", 2, size=32).eval()
    changed = copy.deepcopy(net)
    models.depthwise_in_float32(changed)
    layers = {name: layer for name, layer in changed.named_modules() if type(layer).__name__ == "Depthwise"}
    assert len(layers) == 16
    assert changed.state_dict().keys() == net.state_dict().keys()
    for name, layer in layers.items():
        images = torch.rand(2, layer.in_channels, 8, 8)
        expected = net.get_submodule(name)(images.bfloat16().float())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(images.bfloat16()), expected.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(layer(images), net.get_submodule(name)(images), rtol=0, atol=0)
