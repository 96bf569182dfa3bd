"""The networks of the five studies, where their weights come from, and their class-activation maps.

Every network has a `.backbone` (the trunk: pictures in, features out) and a `.classifier` (features in, logits out),
so that a frozen trunk's features can be kept, and a head trained on them alone.
"""

import argparse
import copy
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import url_map
from torch import nn
from torch.utils.model_zoo import load_url

from augment import prepare_batch
from checkpoint import load_checkpoint, load_file
from dataset import PLANES
from errors import InputError

MODELS = {  # name -> the data sets it takes
    "v0": ("odir",), "v1": ("odir",), "v2": ("odir",),
    "efficientnet-b1": ("aptos", "dr", "retina"), "resnet18": ("aptos", "dr", "retina"),
    "resnet50": ("aptos", "dr", "retina"), "alexnet": ("aptos", "dr", "retina"), "mrnet": ("mrnet",),
}


class SingleNet(nn.Module):
    """Pictures (B, 3, H, W) -> logits (B, num_labels); a (B, 1, 3, H, W) batch is taken too."""

    def __init__(self, backbone, classifier, cam_layer):
        super().__init__()
        self.backbone, self.classifier = backbone, classifier
        self.cam_layer = cam_layer  # name of the module whose output Grad-CAM looks at

    def features(self, images):
        if images.ndim == 5:
            images = images.flatten(0, 1)
        return self.backbone(images)

    def forward(self, images):
        return self.classifier(self.features(images))


class DualResNet(SingleNet):
    """Both eyes (B, 2, 3, H, W) through one ResNet-50, features (B, 4096) side by side, one head.

    Heads: v0 linear; v1 dropout 0.2 before it; v2 4096-128-64-num_labels with ReLU and dropout 0.5.
    """

    def __init__(self, head="v0", num_labels=8):
        backbone = torchvision.models.resnet50()
        backbone.fc = nn.Identity()
        classifier = {
            "v0": lambda: nn.Linear(4096, num_labels),
            "v1": lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(4096, num_labels)),
            "v2": lambda: nn.Sequential(nn.Linear(4096, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU(),
                                        nn.Dropout(0.5), nn.Linear(64, num_labels)),
        }[head]()
        super().__init__(backbone, classifier, "backbone.layer4")

    def features(self, images):
        batch = len(images)
        return self.backbone(images.flatten(0, 1)).reshape(batch, -1 if batch else 4096)


class GreenChannel(nn.Module):
    """(B, 3, H, W) -> (B, 1, H, W): vessels and lesions stand out most in a fundus photograph's green channel."""

    def forward(self, images):
        return images[:, 1:2]


def AlexNet(num_labels=3, size=224):  # noqa: N802 - SPEC's name
    """The retina study's AlexNet on the green channel: 96@11/4 valid, 256@5, 384@3, 384@3, 256@3, one dense layer.

    BatchNorm after each ReLU, max pooling 3/2 after the first, second and fifth convolution, He-normal weights.
    At 224 x 224 the dense layer sees 256 x 5 x 5 = 6400 features.
    """
    def block(channels, filters, kernel, stride=1, padding=0, pool=False):
        layers = [nn.Conv2d(channels, filters, kernel, stride, padding), nn.ReLU(), nn.BatchNorm2d(filters)]
        return layers + ([nn.MaxPool2d(3, 2)] if pool else [])

    side = (size - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    if side < 1:
        raise InputError(f"--size {size} is too small for AlexNet: 67 or more")
    backbone = nn.Sequential(GreenChannel(), *block(1, 96, 11, stride=4, pool=True), *block(96, 256, 5, padding=2, pool=True),
                             *block(256, 384, 3, padding=1), *block(384, 384, 3, padding=1),
                             *block(384, 256, 3, padding=1, pool=True), nn.Flatten())
    return he_normal(SingleNet(backbone, nn.Linear(256 * side * side, num_labels), "backbone.15"))


def he_normal(net):
    """Weights as He et al. (2015) draw them: what goes in keeps its scale from layer to layer."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net


class MRNet(nn.Module):
    """Three planes of knee exams -> logits (B, num_labels), exams of any number of slices in one batch.

    `volumes`: per plane the slices of all exams one after the other (sum of slices, 3, H, W); `lengths`: per plane the
    slices of each exam. A trunk (torchvision's AlexNet) per plane, average pool, maximum over slices, concatenated
    (B, 768), one linear layer.
    """

    def __init__(self, num_labels=3):
        super().__init__()
        # Without normalisation torchvision's own random weights fade to nothing: no lesson reaches the first layers.
        self.backbone = he_normal(nn.ModuleList(torchvision.models.alexnet().features for _ in range(3)))
        self.classifier = nn.Linear(3 * 256, num_labels)

    def features(self, volumes, lengths):
        planes = []
        for trunk, slices, counts in zip(self.backbone, volumes, lengths, strict=True):
            pooled = trunk(slices).float().mean((2, 3))  # (sum of slices, 256)
            planes.append(torch.stack([exam.amax(0) for exam in pooled.split(counts)]) if counts else pooled)
        return torch.cat(planes, 1)  # (B, 768)

    def forward(self, volumes, lengths):
        return self.classifier(self.features(volumes, lengths))


def build_model(name, num_labels, weights="none", size=224):
    """The network `name` with `num_labels` outputs; `weights`: "none", "imagenet" or a file (see `load_weights`)."""
    if name not in MODELS:
        raise InputError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    if name in ("v0", "v1", "v2"):
        model = DualResNet(name, num_labels)
    elif name == "mrnet":
        model = MRNet(num_labels)
    elif name == "alexnet":
        model = AlexNet(num_labels, size)
    elif name == "efficientnet-b1":
        # Its BatchNorm remembers 100 steps, ten times torch's: random weights would be validated on what it began with.
        backbone = EfficientNet.from_name("efficientnet-b1", batch_norm_momentum=0.9 if weights == "none" else 0.99)
        features, dropout = backbone._fc.in_features, backbone._dropout.p
        # Dropout belongs to the head: kept features must not be dropped out.
        backbone._fc, backbone._dropout = nn.Identity(), nn.Identity()
        backbone.set_swish(memory_efficient=False)  # the plain form gives the same numbers and can be compiled
        model = SingleNet(backbone, nn.Sequential(nn.Dropout(dropout), nn.Linear(features, num_labels)), "backbone._bn1")
    else:
        backbone = getattr(torchvision.models, name)()
        features, backbone.fc = backbone.fc.in_features, nn.Identity()
        model = SingleNet(backbone, nn.Linear(features, num_labels), "backbone.layer4")
    model.name = name
    load_weights(model, weights)
    return model


# ---------------------------------------------------------------- weights

def load_weights(model, weights):
    """Fill `model` from "none" (stays random), "imagenet" (the libraries' own, from their cache or downloaded) or a file.

    A file is one of our checkpoints (best.pt, same architecture; its head is taken too where it has the same shape) or a
    plain state_dict of the trunk in its library's form. Keys are strict. Raises InputError with how to supply weights.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        if model.name == "alexnet":
            raise InputError("--weights imagenet: this AlexNet is the retina study's own; there are no ImageNet weights for it. "
                             "Use --weights none or a checkpoint")
        load_trunk(model, imagenet_state(model.name), "the ImageNet weights")
        return
    if not Path(weights).is_file():
        raise InputError(f"--weights {weights}: expected imagenet, none or a file, and there is no such file")
    state = load_file(weights)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError(f"--weights {weights} is neither a best.pt nor a network's state_dict")
    if state.get("kind") != "best":
        load_trunk(model, state, weights)
        return
    theirs = state["args"]["model"]
    if theirs != model.name and not {theirs, model.name} <= {"v0", "v1", "v2"}:
        raise InputError(f"--weights {weights} is a checkpoint of {theirs}, not of {model.name}")
    own, given = model.state_dict(), state["model"]
    head = {key for key in own if key.startswith("classifier.")}
    same = all(key in given and given[key].shape == own[key].shape for key in head) and theirs == model.name
    if not same:
        print(f"{weights}: the trunk is taken, the head is another and starts afresh")
        given = {key: value for key, value in given.items() if not key.startswith("classifier.")} | {key: own[key] for key in head}
    load_strict(model, given, weights)


def imagenet_state(name):
    """The published ImageNet state_dict for the trunk of model `name`."""
    name = {"v0": "resnet50", "v1": "resnet50", "v2": "resnet50", "mrnet": "alexnet"}.get(name, name)
    try:
        if name == "efficientnet-b1":
            return load_url(url_map[name], map_location="cpu", weights_only=True)
        return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(f"--weights imagenet: {name}'s weights are not in the local cache ({torch.hub.get_dir()}/checkpoints) and "
                         f"cannot be downloaded ({error}). Put the file there, name one with --weights PATH, or train from "
                         "random weights with --weights none") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:  # damaged, or it holds code
        raise InputError(f"--weights imagenet: {name}'s file in {torch.hub.get_dir()}/checkpoints cannot be read "
                         f"({' '.join(str(error).split())[:120]}). Delete it, or copy it there again") from error


def load_trunk(model, state, source):
    """A library's state_dict into the trunk, without its own classification layer."""
    if model.name == "mrnet":
        features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        for trunk in model.backbone:
            load_strict(trunk, features, source)
        return
    load_strict(model.backbone, {key: value for key, value in state.items() if not key.startswith(("fc.", "_fc."))}, source)


def load_strict(module, state, source):
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{source} does not fit {type(module).__name__}: {' '.join(str(error).split())[:300]}") from error


def open_checkpoint(path, device):
    """A best.pt -> (its dict, the arguments of its run, the network with its weights on `device`)."""
    saved = load_checkpoint(path)
    run = argparse.Namespace(**saved["args"])
    model = build_model(run.model, len(saved["labels"]), "none", run.crop or run.size)
    load_strict(model, saved["model"], path)
    return saved, run, model.to(device)


# ---------------------------------------------------------------- frozen trunks

def fold_batchnorm(backbone):
    """A copy of a ResNet in evaluation mode whose BatchNorms are folded into their convolutions (others: a plain copy)."""
    backbone = copy.deepcopy(backbone).eval()
    if isinstance(backbone, torchvision.models.ResNet):
        from torch.fx.experimental.optimization import fuse
        return fuse(backbone)
    return backbone


class FastTrunk(nn.Module):
    """A frozen trunk as it is cheapest to run: BatchNorm folded, reduced precision, channels last; float32 out."""

    def __init__(self, backbone, dtype=torch.float32, compile=False):
        super().__init__()
        self.net = fold_batchnorm(backbone).requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
        self.run = compiled(self.net) if compile else self.net
        self.dtype, self.compile, self.batch = dtype, compile, 0

    def train(self, mode=True):  # frozen means frozen, whatever the model around it does
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        count = len(images)
        # A compiled trunk is made for one batch size: a short last batch is filled up. An empty one (a rank without rows) too.
        self.batch = max(1, count, self.batch if self.compile else 0)
        if count < self.batch and (self.compile or not count):
            images = torch.cat([images, images.new_zeros((self.batch - count, *images.shape[1:]))])
        return self.run(images.to(dtype=self.dtype, memory_format=torch.channels_last)).float()[:count]


def with_fast_trunk(model, precision="fp32", compile=False):
    """`model` with its trunk replaced by a FastTrunk; the classifier is shared, not copied."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    fast = copy.copy(model)
    fast._modules = dict(model._modules)
    fast.backbone = (nn.ModuleList(FastTrunk(trunk, dtype, compile) for trunk in model.backbone)
                     if isinstance(model.backbone, nn.ModuleList) else FastTrunk(model.backbone, dtype, compile))
    return fast


def compiled(module):
    """`torch.compile(module)`, or an InputError where there is no compiler."""
    import shutil

    import torch._inductor.config as inductor
    on_cuda = next(module.parameters()).is_cuda
    if not on_cuda and not any(map(shutil.which, (inductor.cpp.cxx[1] or "", "g++", "clang++", "cl"))):
        raise InputError("--compile needs a C++ compiler (g++, clang++ or cl) on this machine: install one or leave --compile out")
    inductor.freezing = True  # weights of a frozen trunk may be packed once
    return torch.compile(module)


# ---------------------------------------------------------------- class-activation maps

def grad_cam(model, *inputs):
    """Grad-CAM (Selvaraju et al. 2017) of every class on the last convolution's output.

    Returns (logits (B, K), maps, picks). maps: float (N, K, h, w), each scaled to a maximum of 1 (a map without positive
    evidence stays 0), N = B * pictures for pictures. For MRNet: a list of three (1, K, h, w) of ONE exam's slice with the
    strongest answer in each plane, and `picks` its slice numbers; None otherwise.
    """
    model.eval()
    layers = [trunk[10] for trunk in model.backbone] if isinstance(model, MRNet) else [model.get_submodule(model.cam_layer)]
    activations, handles = [], []

    def keep(_, __, output):
        activations.append(output.detach().requires_grad_())
        return activations[-1].clone()  # an in-place ReLU may follow

    try:
        handles = [layer.register_forward_hook(keep) for layer in layers]
        with torch.enable_grad():
            logits = model(*inputs)
            maps = [[] for _ in layers]
            for label in range(logits.shape[1]):
                grads = torch.autograd.grad(logits[:, label].sum(), activations, retain_graph=True)
                for planes, activation, grad in zip(maps, activations, grads, strict=True):
                    planes.append((grad.mean((2, 3), keepdim=True) * activation).sum(1).relu().detach())
    finally:
        for handle in handles:
            handle.remove()
    maps = [torch.stack(planes, 1) for planes in maps]  # each (N, K, h, w)
    if not isinstance(model, MRNet):
        return logits.detach(), scaled(maps[0]), None
    picks = [int(plane.sum((1, 2, 3)).argmax()) for plane in maps]
    return logits.detach(), [scaled(plane[pick:pick + 1]) for plane, pick in zip(maps, picks, strict=True)], picks


def explain(model, batch):
    """Heat maps of one row's batch (pictures.single_batch) -> (names, pictures, maps, logits).

    A picture uint8 (S, S, 3) and its maps (K, h, w) for each eye, for the one photograph, or, for knees, for each plane's
    slice with the strongest answer; the names say which. logits: (K,), computed in float32.
    """
    inputs, _ = prepare_batch(batch, next(model.parameters()).device)
    logits, maps, picks = grad_cam(model, *inputs)
    if picks is None:
        shown = list(batch["images"][0].numpy())
        return ["left eye", "right eye"] if len(shown) == 2 else [""], shown, list(maps.cpu().numpy()), logits[0].cpu()
    names = [f"{plane}, slice {pick + 1}" for plane, pick in zip(PLANES, picks, strict=True)]
    slices = [plane[pick].numpy() for plane, pick in zip(batch["volumes"], picks, strict=True)]
    return names, [np.repeat(s[:, :, None], 3, 2) for s in slices], [plane[0].cpu().numpy() for plane in maps], logits[0].cpu()


def scaled(maps):
    peak = maps.amax((2, 3), keepdim=True)
    return maps / torch.where(peak > 0, peak, torch.ones_like(peak))
