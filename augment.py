"""Random views of pictures, drawn per picture on the CPU and computed for a whole batch on its device.

The random numbers of a picture depend on (seed, view, index, repeat) alone: the same with any number of workers,
processes or batches, after a resume, and when a view's features are kept on disk.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (0.2, 0.2, 0.2, 0.1)  # brightness, contrast, saturation, hue: torchvision ColorJitter's arguments
# rotate in degrees; shift as a share of the width; "shared" names what both eyes of a patient have in common.
RECIPES = {
    "eyes": {"rotate": 30, "hflip": True, "vflip": True, "jitter": JITTER},  # experiments 8, 9: each eye by itself
    "pair": {"rotate": 30, "hflip": True, "vflip": True, "jitter": JITTER,  # experiments 14-17
             "shared": ("hflip", "vflip", "jitter"), "swap": True},
    "lab": {"rotate": 20, "hflip": True, "vflip": True},  # the DR grading lab
    "knee": {"rotate": 25, "shift": 0.11, "hflip": True},  # MRNet: one draw for the whole volume
}
COLUMNS = {"rotate": slice(0, 1), "crop": slice(1, 3), "shift": slice(3, 5), "hflip": slice(5, 6), "vflip": slice(6, 7),
           "jitter": slice(7, 11)}


def draw(seed, view, keys, pictures):
    """Uniform numbers (B, pictures + 1, 11) in [0, 1) for keys [(index, repeat)]; the last row is the pair's own."""
    return torch.from_numpy(np.stack([
        np.random.default_rng((seed, view, index, repeat)).random((pictures + 1, 11), dtype=np.float32)
        for index, repeat in keys]))


def augment(images, uniforms, recipe, crop):
    """Images (B, P, 3, H, W) float in 0..1 and their `draw` -> (B, P, 3, crop, crop), in 0..1.

    Rotation, shift, crop and flips are one bilinear resampling (what lies outside the picture is black).
    """
    recipe = RECIPES[recipe]
    batch, pictures, channels, height, width = images.shape
    own, pair = uniforms[:, :-1], uniforms[:, -1:].expand(-1, pictures, -1)
    u = {name: (pair if name in recipe.get("shared", ()) else own)[:, :, columns].flatten(0, 1)
         for name, columns in COLUMNS.items()}  # each (B * P, columns)
    if recipe.get("swap"):  # mirrored, a left eye is a right eye
        mirrored = pair[:, 0, COLUMNS["hflip"]] < 0.5
        images = torch.where(mirrored[:, :, None, None, None], images.flip(1), images)
    images = resample(images.flatten(0, 1), affine(u, recipe, crop / width), crop)
    if "jitter" in recipe:
        images = jitter(images, u["jitter"], recipe["jitter"])
    return images.unflatten(0, (batch, pictures))


def affine(u, recipe, scale):
    """Matrices (N, 2, 3) that take output to input coordinates (-1..1): crop and flips first, then the rotation."""
    angle = (2 * u["rotate"][:, 0] - 1) * math.radians(recipe.get("rotate", 0))
    flip_x = torch.where(u["hflip"][:, 0] < 0.5, -scale, scale) if recipe.get("hflip") else torch.full_like(angle, scale)
    flip_y = torch.where(u["vflip"][:, 0] < 0.5, -scale, scale) if recipe.get("vflip") else torch.full_like(angle, scale)
    offset = (2 * u["crop"] - 1) * (1 - scale) + 2 * (2 * u["shift"] - 1) * recipe.get("shift", 0)  # (N, 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([
        torch.stack([cos * flip_x, -sin * flip_y, cos * offset[:, 0] - sin * offset[:, 1]], 1),
        torch.stack([sin * flip_x, cos * flip_y, sin * offset[:, 0] + cos * offset[:, 1]], 1)], 1)


def resample(images, matrices, size):
    """Images (N, C, H, W) seen through `matrices` (N, 2, 3) -> (N, C, size, size), bilinear."""
    grid = F.affine_grid(matrices, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def jitter(images, u, strengths):
    """Brightness, contrast, saturation, hue in this order (torchvision draws the order too), each picture its own.

    `images` (N, 3, H, W) in 0..1, `u` (N, 4) in [0, 1). Equals torchvision's adjust_* one after the other.
    """
    brightness, contrast, saturation = (1 + (2 * u[:, i] - 1) * strengths[i] for i in range(3))
    images = (images * brightness[:, None, None, None]).clamp(0, 1)
    mean = grey(images).mean((1, 2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast[:, None, None, None]).clamp(0, 1)
    plain = grey(images)
    images = (plain + (images - plain) * saturation[:, None, None, None]).clamp(0, 1)
    return shift_hue(images, (2 * u[:, 3] - 1) * strengths[3])


def grey(images):
    """ITU-R 601 luma, (N, 1, H, W), with torchvision's rounding of the weights."""
    return (images * images.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def shift_hue(images, turns):
    """Turn the hue of (N, 3, H, W) in 0..1 by `turns` (N,) of the colour circle, through HSV."""
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(value == red, (green - blue) / safe,
                      torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    hue = hue + 6 * turns[:, None, None]
    channels = []
    for n in (5, 3, 1):  # the usual closed form of HSV -> RGB
        k = (n + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


# ---------------------------------------------------------------- a batch as it enters the network

def prepare_batch(batch, device, recipe="none", size=None):
    """A data set's batch -> (inputs of the model, targets), on `device`, augmented by `recipe` to `size`, normalised."""
    batch = {name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for name, value in batch.items()}
    if "features" in batch:
        return (batch["features"],), batch["targets"]
    if "volumes" in batch:
        volumes = [plane.to(device, non_blocking=True) for plane in batch["volumes"]]
        return prepare_volumes(volumes, batch["lengths"], batch.get("uniforms"), recipe), batch["targets"]
    images = batch["images"].permute(0, 1, 4, 2, 3).float().div_(255)  # (B, P, 3, S, S), channels last in memory
    if recipe != "none" and len(images):
        images = augment(images, batch["uniforms"], recipe, size or images.shape[-1])
    return (normalise(images),), batch["targets"]


def normalise(images):
    """ImageNet mean and standard deviation, (..., 3, H, W) in 0..1."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def prepare_volumes(volumes, lengths, uniforms, recipe):
    """Three planes of uint8 slices (sum of slices, S, S) -> ([(sum of slices, 3, S, S)] * 3, lengths).

    Each exam's volume is stretched to 0..255 by its own minimum and maximum (a constant one becomes 0), then
    (x - 58.09) / 49.73, MRNet's published mean and deviation.
    """
    planes = []
    for slices, counts in zip(volumes, lengths, strict=True):
        slices = slices.float()
        if counts:
            lows, highs = (torch.stack([f(exam) for exam in slices.split(counts)]) for f in (torch.amin, torch.amax))
            owner = torch.arange(len(counts), device=slices.device).repeat_interleave(torch.tensor(counts, device=slices.device))
            spread = (highs - lows).clamp_min(1)[owner, None, None]  # uint8: a difference below 1 is none
            slices = (slices - lows[owner, None, None]) * (255 / spread)
            if recipe != "none":
                u = {name: uniforms[:, 0, columns] for name, columns in COLUMNS.items()}
                slices = resample(slices[:, None], affine(u, RECIPES[recipe], 1.0)[owner], slices.shape[-1])[:, 0]
        planes.append(((slices - 58.09) / 49.73)[:, None].expand(-1, 3, -1, -1))
    return planes, lengths
