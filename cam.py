"""Class-activation maps: where a network looks (Grad-CAM, Selvaraju et al. 2017)."""

from contextlib import ExitStack

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from augment import prepare_batch
from errors import InputError
from models import MRNet
from tables import PLANES


def cam_layers(model, inputs):
    """The modules whose output the maps are made of: each trunk's last map of features, else InputError."""
    trunks = model.backbone if isinstance(model, MRNet) else [model.backbone]
    trunks = [getattr(trunk, "net", trunk) for trunk in trunks]  # the network inside a features.FastTrunk
    if hasattr(model, "cam_layer"):
        return [trunk.get_submodule(model.cam_layer) for trunk in trunks]
    trunk = trunks[0]
    family = type(trunk).__name__  # torchvision is not imported for its name alone
    if family == "VisionTransformer":  # after its last block only the class token counts
        return [trunk.encoder.layers[-1].ln_1]
    if family == "SwinTransformer":  # before it the channels come last
        return [trunk.permute]
    pixels = {}  # of each layer's map, in the order of the calls; 0 for a module that is called twice
    layers = set(trunk.modules()) - {trunk}

    def note(module, _, output):
        if module in layers and torch.is_tensor(output) and output.ndim == 4:
            pixels[module] = 0 if module in pixels else output.shape[2] * output.shape[3]

    with torch.no_grad(), register_module_forward_hook(note):
        model.features(*(part[:1] for part in inputs))
    widest = min(2, max(pixels.values(), default=0))  # a map of one pixel where there is no other
    if not widest:
        raise InputError(f"{model.name} has no map of features: there are no heat maps of it")
    return [[module for module, count in pixels.items() if count >= widest][-1]]


def as_map(features):
    """(N, C, h, w) as it is; tokens (N, 1 + h * w, C) of a transformer laid out as (N, C, h, w)."""
    if features.ndim == 4:
        return features.float()
    side = int((features.shape[1] - 1) ** 0.5)
    return features[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))


def grad_cam(model, *inputs):
    """-> (logits (B, K), maps float32 (B * pictures, K, h, w) of maximum 1, or 0; None). Of MRNet: logits,
    three (1, K, h, w) of ONE exam's slice with the strongest answer in each plane, these slices' numbers."""
    model.eval()
    layers, activations = cam_layers(model, inputs), []

    def keep(_, __, output):
        activations.append(output.detach().requires_grad_())
        return activations[-1].clone()  # an in-place ReLU may follow

    with torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        logits = model(*inputs)
    maps = [[] for _ in layers]
    for label in range(logits.shape[1]):
        grads = torch.autograd.grad(logits[:, label].sum(), activations, retain_graph=True)
        for planes, activation, grad in zip(maps, activations, grads, strict=True):
            weights = as_map(grad).mean((2, 3), keepdim=True)
            planes.append((weights * as_map(activation)).sum(1).relu().detach())
    maps = [torch.stack(planes, 1) for planes in maps]  # each (N, K, h, w)
    peaks = [plane.amax((2, 3), keepdim=True) for plane in maps]
    scaled = [plane / peak.where(peak > 0, 1) for plane, peak in zip(maps, peaks, strict=True)]
    if not isinstance(model, MRNet):
        return logits.detach(), scaled[0], None
    picks = [int(plane.sum((1, 2, 3)).argmax()) for plane in maps]
    return logits.detach(), [plane[[pick]] for plane, pick in zip(scaled, picks, strict=True)], picks


def explain(model, batch, device):
    """Of a row's eyes, photograph or planes: names, pictures uint8 (S, S, 3), maps (K, h, w), a list each."""
    _, maps, picks = grad_cam(model, *prepare_batch(batch, device)[0])
    if picks is None:
        pictures = list(batch["images"][0].cpu().numpy())
        return ["left eye", "right eye"] if len(pictures) == 2 else [""], pictures, list(maps.cpu().numpy())
    names = [f"{plane}, slice {pick + 1}" for plane, pick in zip(PLANES, picks, strict=True)]
    slices = [plane[pick].cpu().numpy() for plane, pick in zip(batch["volumes"], picks, strict=True)]
    pictures = [np.repeat(grey[:, :, None], 3, 2) for grey in slices]
    return names, pictures, [plane[0].cpu().numpy() for plane in maps]
