"""Random views of pictures, computed for a whole batch on its device. A picture's random numbers depend on
(seed, view, index, repeat) alone, whatever the workers, processes or batches. Pictures stay in 0..1."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MRNET_MEAN, MRNET_STD = 58.09, 49.73  # of volumes stretched to 0..255, as published
JITTER = (0.2, 0.2, 0.2, 0.1)  # brightness, contrast, saturation, hue: torchvision ColorJitter's arguments
# Rotation in degrees, shift as a share of the width. "lab": the DR grading lab; "knee": of a whole volume.
RECIPES = {"lab": {"rotate": 20, "hflip": True, "vflip": True}}
RECIPES["knee"] = {"rotate": 25, "shift": 0.11, "hflip": True}
RECIPES["eyes"] = {"rotate": 30, "hflip": True, "vflip": True, "jitter": JITTER}  # experiments 8, 9
# Experiments 14-17: "shared" is what both eyes of a patient have in common; mirrored, they change places.
RECIPES["pair"] = {**RECIPES["eyes"], "shared": ("hflip", "vflip", "jitter"), "swap": True}
COLUMNS = {"rotate": slice(0, 1), "crop": slice(1, 3), "shift": slice(3, 5)}  # of a draw
COLUMNS |= {"hflip": slice(5, 6), "vflip": slice(6, 7), "jitter": slice(7, 11)}


def draw(seed, view, keys, pictures):
    """Uniform numbers (B, pictures + 1, 11) in [0, 1) for keys [(index, repeat)]; the last is the pair's."""
    rows = [np.random.default_rng((seed, view, *key)).random((pictures + 1, 11), np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


def augment(images, uniforms, recipe, crop):
    """Images (B, P, 3, H, W) float in 0..1 and their `draw` -> (B, P, 3, crop, crop), black around them."""
    recipe = RECIPES[recipe]
    own, pair = uniforms[:, :-1], uniforms[:, -1:].expand(-1, images.shape[1], -1)
    u = {}
    for name, columns in COLUMNS.items():
        source = pair if name in recipe.get("shared", ()) else own
        u[name] = source[:, :, columns].flatten(0, 1)  # (B * P, columns)
    if recipe.get("swap"):  # mirrored, a left eye is a right eye
        mirrored = pair[:, 0, COLUMNS["hflip"]] < 0.5
        images = torch.where(mirrored[:, :, None, None, None], images.flip(1), images)
    images = resample(images.flatten(0, 1), affine(u, recipe, crop / images.shape[-1]), crop)
    if "jitter" in recipe:
        images = jitter(images, u["jitter"], recipe["jitter"])
    return images.unflatten(0, own.shape[:2])


def affine(u, recipe, scale):
    """Matrices (N, 2, 3) from output to input coordinates (-1..1): crop and flips, then the rotation."""
    angle = (2 * u["rotate"][:, 0] - 1) * math.radians(recipe.get("rotate", 0))
    flip_x = flip_y = torch.full_like(angle, scale)
    if recipe.get("hflip"):
        flip_x = flip_x * (1 - 2 * (u["hflip"][:, 0] < 0.5))
    if recipe.get("vflip"):
        flip_y = flip_y * (1 - 2 * (u["vflip"][:, 0] < 0.5))
    shift = 2 * (2 * u["shift"] - 1) * recipe.get("shift", 0)
    x, y = ((2 * u["crop"] - 1) * (1 - scale) + shift).unbind(1)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * flip_x, -sin * flip_y, cos * x - sin * y], 1)
    second = torch.stack([sin * flip_x, cos * flip_y, sin * x + cos * y], 1)
    return torch.stack([first, second], 1)


def resample(images, matrices, size):
    """Images (N, C, H, W) seen through `matrices` (N, 2, 3) -> (N, C, size, size), bilinear."""
    # F.affine_grid by hand: its matrix product takes as long as the resampling, and TF32 would round it.
    centres = torch.linspace(-1, 1, size, device=images.device) * (size - 1) / size
    a, b, c = (column[:, :, None, None] for column in matrices.unbind(2))  # (N, 2, 1, 1) each
    grid = a * centres + b * centres[:, None] + c  # (N, 2, size, size)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), align_corners=False)


def jitter(images, u, strengths):
    """torchvision's adjust_brightness, _contrast, _saturation, _hue of (N, 3, H, W) by u (N, 4) in [0, 1)."""
    factors = [1 + (2 * u[:, i, None, None, None] - 1) * strengths[i] for i in range(3)]
    brightness, contrast, saturation = factors  # (N, 1, 1, 1) each
    images = (images * brightness).clamp_(0, 1)  # a copy, which the next steps change in place
    mean = grey(images).mean((1, 2, 3), keepdim=True)
    images.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1)
    plain = grey(images)
    images.sub_(plain).mul_(saturation).add_(plain).clamp_(0, 1)
    return shift_hue(images, (2 * u[:, 3] - 1) * strengths[3])


def grey(images):
    """ITU-R 601 luma, (N, 1, H, W), with torchvision's rounding of the weights."""
    red, green, blue = images.split(1, 1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)


def shift_hue(images, turns):
    """Turn the hue of (N, 3, H, W) in 0..1 by `turns` (N,) of the colour circle, through HSV."""
    value = images.amax(1)
    chroma = value - images.amin(1)
    red, green, blue = images.unbind(1)
    safe = chroma.clamp(min=torch.finfo(chroma.dtype).tiny)  # a grey pixel has 0 / tiny = 0
    hue = (red - green).div_(safe).add_(4)
    hue = torch.where(value == green, (blue - red).div_(safe).add_(2), hue)
    hue = torch.where(value == red, (green - blue).div_(safe), hue).add_(6 * turns[:, None, None])
    turned = torch.empty_like(images)
    for channel, n in enumerate((5, 3, 1)):  # the usual closed form of HSV -> RGB
        k = (hue + n).remainder_(6)
        share = (4 - k).clamp_(0, 1).mul_(k.clamp_(0, 1))  # min(k, 4 - k), within 0..1
        torch.sub(value, share.mul_(chroma), out=turned[:, channel])
    return turned


def prepare_batch(batch, device, recipe="none", size=None, mirrored=False):
    """A data set's batch -> (inputs of the model, targets) on `device`; pictures: (B, P, 3, size, size)."""
    device = torch.device(device)
    # On MPS a source may be freed before a copy that is not waited for (pytorch issues 139550, 189690).
    send = functools.partial(torch.Tensor.to, device=device, non_blocking=device.type == "cuda")
    batch = {name: send(value) if torch.is_tensor(value) else value for name, value in batch.items()}
    if "features" in batch:
        return (batch["features"],), batch["targets"]
    if "volumes" in batch:
        volumes = [send(plane).flip(-1) if mirrored else send(plane) for plane in batch["volumes"]]
        return prepare_volumes(volumes, batch["lengths"], batch.get("uniforms"), recipe), batch["targets"]
    images = batch["images"].permute(0, 1, 4, 2, 3).float().div_(255)  # (B, P, 3, S, S), channels last
    if recipe != "none" and len(images):
        images = augment(images, batch["uniforms"], recipe, size or images.shape[-1])
    if mirrored:  # a mirrored left eye is a right eye: the eyes of a pair change places
        images = images.flip((1, -1))
    return (images,), batch["targets"]


def prepare_volumes(volumes, lengths, uniforms, recipe):
    """Three planes of uint8 slices (sum of slices, S, S) -> ([(sum of slices, 3, S, S)] * 3, lengths).
    Each exam is stretched to 0..255 by its own minimum and maximum (a constant one: 0), then normalised."""
    matrices = None
    if recipe != "none" and lengths[0]:
        u = {name: uniforms[:, 0, columns] for name, columns in COLUMNS.items()}
        matrices = affine(u, RECIPES[recipe], 1.0)  # (exams, 2, 3): one view for all planes and slices
    planes = []
    for plane, counts in zip(volumes, lengths, strict=True):
        exams = [plane[:0].float()]  # a rank may have none
        for number, slices in enumerate(plane.float().split(counts)):
            low, high = slices.amin(), slices.amax()
            slices = (slices - low).mul_(255 / (high - low).clamp_min(1))  # whole numbers: below 1 is 0
            if matrices is not None:
                slices = resample(slices[None], matrices[number, None], slices.shape[-1])[0]
            exams.append(slices)
        slices = torch.cat(exams).sub_(MRNET_MEAN).div_(MRNET_STD)
        planes.append(slices[:, None].expand(-1, 3, -1, -1))
    return planes, lengths
