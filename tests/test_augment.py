"""Random views against torchvision and by hand; whose draw depends on what; knee volumes."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
from augment import COLUMNS, RECIPES, draw, jitter, prepare_batch, prepare_volumes  # noqa: E402
from dataset import PictureSet, VolumeSet  # noqa: E402

CPU = torch.device("cpu")

HALF, NO, YES = 0.5, 0.9, 0.1  # of a draw: no turn and no change of colour; no flip; flip


def pictures(*shape, seed=0):
    """Smooth float pictures in 0..1, so that interpolation is not all there is to see."""
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise.flatten(0, -4), 5, 1, 2, count_include_pad=False)
    return smooth.reshape(shape).clamp(0, 1)


def uniforms(batch, rows, **values):
    """A draw that changes nothing but the columns given: one number, or a tensor (batch, rows[, columns])."""
    u = torch.full((batch, rows, 11), HALF)
    u[:, :, COLUMNS["hflip"]] = u[:, :, COLUMNS["vflip"]] = NO
    for name, value in values.items():
        value = torch.as_tensor(value)
        u[:, :, COLUMNS[name]] = value[..., None] if value.ndim == 2 else value
    return u


# ---------------------------------------------------------------- colour


def test_jitter_is_torchvisions_one_after_the_other():
    images, strengths = pictures(6, 3, 20, 24), (0.2, 0.3, 0.4, 0.1)
    images[0, :, :4] = 0.3  # grey has no hue
    images[1] = images[1].round()  # zeros and ones
    u = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    u[2], u[3] = 0, 0.999999
    for image, row, found in zip(images, u.tolist(), jitter(images, u, strengths), strict=True):
        b, c, s, h = ((2 * value - 1) * strength for value, strength in zip(row, strengths, strict=True))
        image = TF.adjust_brightness(image, 1 + b)
        image = TF.adjust_contrast(image, 1 + c)
        image = TF.adjust_saturation(image, 1 + s)
        torch.testing.assert_close(found, TF.adjust_hue(image, h), atol=2e-5, rtol=0)


def test_each_colour_step_alone():
    images = pictures(1, 3, 9, 9)
    for k, adjust in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        strengths = [0.0] * 4
        strengths[k] = 0.5
        found = jitter(images, torch.ones(1, 4) * 0.9, strengths)
        torch.testing.assert_close(found, adjust(images, 1.4), atol=1e-5, rtol=0)
        assert (found - images).abs().max() > 0.01


def test_a_strong_turn_of_the_hue_is_torchvisions():
    images = pictures(4, 3, 20, 24, seed=5)
    images[0] = images[0].round()
    for turn in (-0.5, -0.31, 0.2, 0.5):
        found = augment.shift_hue(images, torch.full((4,), turn))
        torch.testing.assert_close(found, TF.adjust_hue(images, turn), atol=2e-5, rtol=0)


def plain_grey(images):
    """As it was: the weights made on the CPU and copied to the device, a sum over channels."""
    return (images * images.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def plain_resample(images, matrices, size):
    grid = torch.nn.functional.affine_grid(matrices, [len(images), 3, size, size], align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def plain_hue(images, turns):
    """The same formula with a new tensor for each step."""
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    red, green, blue = images.unbind(1)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sector = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, sector) + 6 * turns[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = (n + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def plain_jitter(images, u, strengths):
    factors = [(1 + (2 * u[:, i] - 1) * strengths[i])[:, None, None, None] for i in range(3)]
    images = (images * factors[0]).clamp(0, 1)
    mean = plain_grey(images).mean((1, 2, 3), keepdim=True)
    images = (mean + (images - mean) * factors[1]).clamp(0, 1)
    grey = plain_grey(images)
    images = (grey + (images - grey) * factors[2]).clamp(0, 1)
    return plain_hue(images, (2 * u[:, 3] - 1) * strengths[3])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_colour_is_to_the_bit_what_the_plain_formulas_give(layout):
    images = pictures(6, 3, 61, 61, seed=3).contiguous(memory_format=layout)
    images[0], images[1, :, :9] = images[0].round(), 0.25
    before, u = images.clone(), torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(augment.grey(images), plain_grey(images))
    assert torch.equal(augment.shift_hue(images, u[:, 3] - 0.5), plain_hue(images, u[:, 3] - 0.5))
    assert torch.equal(jitter(images, u, augment.JITTER), plain_jitter(images, u, augment.JITTER))
    assert torch.equal(images, before)  # what is given is not changed in place


# ---------------------------------------------------------------- geometry


def test_resampling_is_torchs_own_grid():
    images = pictures(5, 3, 40, 40, seed=4)
    u = {name: torch.rand(5, 11)[:, columns] for name, columns in COLUMNS.items()}
    for size in (40, 23, 1):
        matrices = augment.affine(u, RECIPES["knee"], 0.8)
        found = augment.resample(images, matrices, size)
        torch.testing.assert_close(found, plain_resample(images, matrices, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", ["eyes", "pair", "lab"])
def test_a_draw_that_changes_nothing_gives_the_picture_back(recipe):
    images = pictures(2, 2, 3, 17, 17)
    torch.testing.assert_close(augment.augment(images, uniforms(2, 3), recipe, 17), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, dims", [("hflip", [-1]), ("vflip", [-2])])
def test_flips_are_exact(name, dims):
    images = pictures(2, 1, 3, 16, 16)
    found = augment.augment(
        images, uniforms(2, 2, **{name: torch.tensor([[YES, HALF], [NO, HALF]])}), "lab", 16
    )
    torch.testing.assert_close(found[0], images[0].flip(dims), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], images[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("turn", [0.0, 0.2, 0.65, 0.999])
def test_rotation_about_the_centre_is_torchvisions(turn):
    images = pictures(1, 1, 3, 41, 41)
    found = augment.augment(images, uniforms(1, 2, rotate=turn), "lab", 41)[0, 0]
    degrees = (2 * turn - 1) * RECIPES["lab"]["rotate"]  # counter-clockwise, as torchvision counts
    expected = TF.rotate(images[0, 0], degrees, TF.InterpolationMode.BILINEAR)
    # torchvision blacks out the last bit of the border where we fade: compare inside
    inside = TF.rotate(torch.ones(1, 41, 41), degrees, TF.InterpolationMode.BILINEAR)[0] > 0.999
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(found[:, inside], expected[:, inside], atol=2e-3, rtol=0)
    assert (
        found[:, inside] - TF.rotate(images[0, 0], -degrees, TF.InterpolationMode.BILINEAR)[:, inside]
    ).abs().max() > 0.02
    assert (found[:, 0, 0] == 0).all()  # what lies outside is black


def test_crop_offsets_cover_the_picture():
    images = pictures(4, 1, 3, 20, 20)
    top = 1 - 1e-7
    corners = torch.tensor([[0.0, 0], [top, 0], [0, top], [top, top]])  # (x, y)
    found = augment.augment(images, uniforms(4, 2, crop=corners[:, None].expand(-1, 2, -1)), "lab", 12)
    for image, crop, (x, y) in zip(images[:, 0], found[:, 0], ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        torch.testing.assert_close(crop, image[:, y : y + 12, x : x + 12], atol=1e-4, rtol=0)
    centre = augment.augment(images, uniforms(4, 2), "lab", 12)
    torch.testing.assert_close(centre[:, 0], images[:, 0, :, 4:16, 4:16], atol=1e-5, rtol=0)
    flipped = augment.augment(images, uniforms(4, 2, crop=0.0, hflip=YES), "lab", 12)
    torch.testing.assert_close(flipped[:, 0], images[:, 0, :, :12, :12].flip(-1), atol=1e-5, rtol=0)


def test_without_rotation_every_crop_stays_inside():
    images = torch.ones(1, 1, 3, 20, 20)
    for number in np.random.default_rng(0).random((20, 2), dtype=np.float32):
        found = augment.augment(images, uniforms(1, 2, crop=torch.from_numpy(number)), "lab", 13)
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- eye pairs


def test_pair_mirrored_swaps_the_eyes():
    images = pictures(2, 2, 3, 16, 16)
    mirrored = uniforms(2, 3)
    mirrored[0, -1, COLUMNS["hflip"]] = YES  # the pair's own row decides; patient 1 stays
    found = augment.augment(images, mirrored, "pair", 16)
    torch.testing.assert_close(found[0, 0], images[0, 1].flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, 1], images[0, 0].flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], images[1], atol=1e-5, rtol=0)
    own = uniforms(2, 3)
    own[:, :2, COLUMNS["hflip"]] = own[:, :2, COLUMNS["vflip"]] = YES  # an eye's own flips count for nothing
    torch.testing.assert_close(augment.augment(images, own, "pair", 16), images, atol=1e-5, rtol=0)


def test_pair_shares_vertical_flip_and_jitter():
    images = pictures(1, 2, 3, 16, 16)
    u = uniforms(1, 3)
    u[:, -1, COLUMNS["vflip"]], u[:, -1, COLUMNS["jitter"]] = YES, torch.tensor([0.9, 0.2, 0.7, 0.1])
    u[:, :2, COLUMNS["jitter"]] = 0.99
    expected = jitter(
        images[0].flip(-2), u[0, -1, COLUMNS["jitter"]].expand(2, -1), RECIPES["pair"]["jitter"]
    )
    torch.testing.assert_close(augment.augment(images, u, "pair", 16)[0], expected, atol=1e-4, rtol=0)


def test_pair_rotates_and_crops_each_eye_by_itself():
    images = pictures(1, 1, 3, 20, 20).expand(-1, 2, -1, -1, -1)  # twice the same eye
    u = uniforms(1, 3, crop=torch.tensor([[[0.0, 0], [0.5, 0.5], [0.9, 0.9]]]))
    found = augment.augment(images, u, "pair", 12)[0]
    torch.testing.assert_close(found[0], images[0, 0, :, :12, :12], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], images[0, 0, :, 4:16, 4:16], atol=1e-5, rtol=0)
    turned = augment.augment(images, uniforms(1, 3, rotate=torch.tensor([[0.1, 0.5, 0.9]])), "pair", 20)[0]
    torch.testing.assert_close(turned[1], images[0, 1], atol=1e-5, rtol=0)
    assert (turned[0] - images[0, 0]).abs().max() > 0.1


def test_eyes_are_augmented_each_by_itself():
    images = pictures(1, 1, 3, 16, 16).expand(-1, 2, -1, -1, -1)
    u = uniforms(1, 3, hflip=torch.tensor([[YES, NO, NO]]))
    u[0, 1, COLUMNS["jitter"]] = 0.9
    found = augment.augment(images, u, "eyes", 16)[0]
    torch.testing.assert_close(found[0], images[0, 0].flip(-1), atol=1e-4, rtol=0)
    expected = jitter(images[0, 1:], u[0, 1:2, COLUMNS["jitter"]], RECIPES["eyes"]["jitter"])[0]
    torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- what a draw depends on


def test_a_draw_depends_on_seed_view_index_and_repeat_alone():
    keys = [(7, 0), (3, 0), (7, 1)]
    together = draw(42, 5, keys, 2)
    assert (
        together.shape == (3, 3, 11)
        and together.dtype == torch.float32
        and 0 <= together.min()
        and together.max() < 1
    )
    for key, row in zip(keys, together, strict=True):  # whatever else is in the batch, and in which order
        assert torch.equal(draw(42, 5, [(0, 0), key], 2)[1], row)
    assert not torch.equal(together[0], together[2])  # a picture drawn twice is seen in two ways
    others = [draw(43, 5, keys, 2), draw(42, 6, keys, 2), draw(42, 5, [(8, 0), (4, 0), (8, 1)], 2)]
    assert all((other != together).any(2).all() for other in others)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(draw(42, 5, keys, 2), together)


def test_draws_are_uniform_and_flip_half():
    u = draw(0, 0, [(i, 0) for i in range(2000)], 1)[:, 0]
    assert u.mean(0).numpy() == pytest.approx(np.full(11, 0.5), abs=0.03)
    assert ((u < 0.5).float().mean(0) - 0.5).abs().max() < 0.05
    assert np.abs(np.corrcoef(u.T.numpy()) - np.eye(11)).max() < 0.1


def test_draws_are_those_of_every_run_before():
    expected = [0.9558600783348083, 0.3824140429496765, 0.359477698802948, 0.5257093906402588]
    assert draw(42, 5, [(7, 0)], 2)[0, 2, :4].tolist() == expected


def picture_set(array, **kwargs):
    """Three pairs, without files."""
    source = SimpleNamespace(rows=np.arange(6).reshape(3, 2), array=lambda: array, on=lambda device: None)
    return PictureSet(source, np.zeros((3, 1), np.float32), **kwargs)


def test_a_batch_is_augmented_as_its_rows_are_alone():
    array = (pictures(6, 16, 16, 3) * 255).byte().numpy()
    data = picture_set(array, seed=1, view=2)
    keys = [(2, 0), (0, 0), (2, 1)]
    (together,), _ = prepare_batch(data.__getitems__(keys), CPU, "pair", 12)
    assert together.shape == (3, 2, 3, 12, 12)
    for number, key in enumerate(keys):
        (alone,), _ = prepare_batch(data.__getitems__([key]), CPU, "pair", 12)
        torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_a_batch_without_a_recipe_is_the_pictures_in_0_to_1():
    array = np.random.default_rng(0).integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    (images,), targets = prepare_batch(picture_set(array).__getitems__([(2, 0), (0, 0), (2, 1)]), CPU)
    assert torch.equal(images[0], torch.from_numpy(array[[4, 5]]).permute(0, 3, 1, 2) / 255)
    assert torch.equal(images[0], images[2]) and images.min() >= 0 and images.max() <= 1
    assert targets.shape == (3, 1)


def test_an_empty_batch_passes():
    """The share of a rank that a short last batch leaves without a row."""
    empty = {"images": torch.zeros(0, 2, 8, 8, 3, dtype=torch.uint8), "targets": torch.zeros(0, 8)}
    (images,), targets = prepare_batch(empty, CPU, "pair", 8)
    assert images.shape == (0, 2, 3, 8, 8) and targets.shape == (0, 8)
    slices = torch.zeros(0, 8, 8, dtype=torch.uint8)
    empty = {"volumes": [slices] * 3, "lengths": [[], [], []], "targets": torch.zeros(0, 3)}
    (planes, lengths), _ = prepare_batch(empty, CPU, "knee")
    assert [plane.shape for plane in planes] == [(0, 3, 8, 8)] * 3 and lengths == [[], [], []]


# ---------------------------------------------------------------- how a batch travels


def batches():
    images = (pictures(2, 2, 16, 16, 3) * 255).byte()
    slices = (pictures(1, 5, 16, 16)[0] * 255).byte()
    targets, keys = torch.zeros(2, 3), [(0, 0), (1, 0)]
    knees = {"volumes": [slices] * 3, "lengths": [[2, 3]] * 3, "uniforms": draw(0, 0, keys, 0)}
    return {
        "pair": {"images": images, "uniforms": draw(0, 0, keys, 2), "targets": targets},
        "knee": {**knees, "targets": targets},
        "none": {"features": torch.zeros(2, 7), "targets": targets},
    }


@pytest.mark.parametrize("recipe", ["pair", "knee", "none"])
@pytest.mark.parametrize("device, free", [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_cuda_does_not_wait_for_a_copy(recipe, device, free, monkeypatch):
    """On MPS memory that was freed meanwhile may be copied (pytorch issues 139550, 189690)."""
    sent = []

    def send(tensor, device, non_blocking=False):
        sent.append((device.type, non_blocking))
        return tensor

    batch = batches()[recipe]
    monkeypatch.setattr(torch.Tensor, "to", send)
    prepare_batch(batch, torch.device(device), recipe)
    assert sent == [(device, free)] * {"pair": 3, "knee": 5, "none": 2}[recipe]


class Made(TorchDispatchMode):
    """Counts tensors that are made of Python numbers: on a GPU each is a copy that the step waits for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["pair", "knee", "none"])
def test_no_tensor_is_built_of_numbers_within_a_step(recipe):
    batch = batches()[recipe]
    with Made() as made:
        prepare_batch(batch, CPU, recipe)
    assert not {"lift_fresh.default", "scalar_tensor.default"} & set(made.names)
    with Made() as made:
        plain_grey(torch.zeros(1, 3, 2, 2))
    assert "lift_fresh.default" in made.names  # the old form is found


# ---------------------------------------------------------------- mirrored, for test-time augmentation


def in_a_mirror(per_row):
    """Two rows of pictures as the network gets them, and mirrored."""
    images = pictures(2, per_row, 3, 16, 16).mul(255).byte().permute(0, 1, 3, 4, 2)
    batch = {"images": images, "targets": torch.zeros(2)}
    return [prepare_batch(batch, CPU, mirrored=mirrored)[0][0] for mirrored in (False, True)]


def test_mirrored_eyes_change_places_and_planes_stay():
    plain, mirrored = in_a_mirror(2)
    assert torch.equal(mirrored, plain.flip(1).flip(-1)) and not torch.equal(mirrored, plain.flip(-1))
    plain, mirrored = in_a_mirror(1)
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
    volumes = [pictures(1, slices, 8, 8)[0].mul(255).byte() for slices in (2, 3, 4)]
    batch = {"volumes": volumes, "lengths": [[1, 1], [1, 2], [3, 1]], "targets": torch.zeros(2)}
    plain, mirrored = (prepare_batch(batch, CPU, mirrored=flag)[0][0][0] for flag in (False, True))
    for plane, other in zip(plain, mirrored, strict=True):
        assert torch.equal(other, plane.flip(-1)) and not torch.equal(other, plane)


@pytest.mark.parametrize("recipe", ["pair", "lab"])
def test_mirrored_is_a_view_that_training_has_seen(recipe):
    images, mirrored = in_a_mirror(2 if recipe == "pair" else 1)
    seen = augment.augment(images, uniforms(2, images.shape[1] + 1, hflip=YES), recipe, 16)
    torch.testing.assert_close(mirrored, seen, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- knees


def test_prepare_volumes_by_hand():
    first = torch.tensor(
        [[[10, 20], [30, 110]], [[10, 60], [10, 10]]], dtype=torch.uint8
    )  # two slices, 10 to 110
    second = torch.tensor([[[0, 255], [51, 0]]], dtype=torch.uint8)
    planes, lengths = prepare_volumes([torch.cat([first, second])] * 3, [[2, 1]] * 3, None, "none")
    assert lengths == [[2, 1]] * 3 and len(planes) == 3 and planes[0].shape == (3, 3, 2, 2)
    expected = torch.tensor([[[0, 25.5], [51, 255]], [[0, 127.5], [0, 0]], [[0, 255], [51, 0]]])
    for channel in range(3):
        torch.testing.assert_close(planes[1][:, channel], (expected - 58.09) / 49.73, atol=1e-5, rtol=0)


def test_volumes_of_several_exams_are_what_each_is_alone():
    slices = (pictures(1, 9, 20, 20)[0] * 255).byte()
    slices[4:7] = slices[4:7] // 3  # another range
    lengths = [[4, 3, 2], [1, 1, 7], [2, 6, 1]]
    u = torch.rand(3, 1, 11, generator=torch.Generator().manual_seed(6))
    for recipe in ("none", "knee"):
        together, _ = prepare_volumes([slices] * 3, lengths, u, recipe)
        for plane, counts in zip(together, lengths, strict=True):
            for exam, found in enumerate(plane.split(counts)):
                own = slices.split(counts)[exam]
                alone, _ = prepare_volumes([own] * 3, [[counts[exam]]] * 3, u[exam, None], recipe)
                torch.testing.assert_close(found, alone[0])
                low, high = own.min().item(), own.max().item()
                if recipe == "none":
                    expected = ((own.float() - low) * 255 / (high - low) - 58.09) / 49.73
                    torch.testing.assert_close(found[:, 1], expected, atol=1e-5, rtol=0)


def test_a_constant_volume_gives_finite_numbers():
    for value in (0, 7, 255):
        planes, _ = prepare_volumes(
            [torch.full((4, 8, 8), value, dtype=torch.uint8)] * 3, [[4]] * 3, None, "none"
        )
        torch.testing.assert_close(planes[0], torch.full((4, 3, 8, 8), -58.09 / 49.73))


def test_knee_one_draw_for_the_whole_volume(tmp_path):
    slices = (pictures(2, 256, 256, 1).squeeze(-1) * 255).byte().numpy()
    files = []
    for exam, count in enumerate((3, 5)):  # every slice of an exam, in every plane, is the same picture
        for plane in ("axial", "coronal", "sagittal"):
            np.save(tmp_path / f"{plane}{exam}.npy", np.repeat(slices[exam][None], count, 0))
        files.append(
            tuple(str(tmp_path / f"{plane}{exam}.npy") for plane in ("axial", "coronal", "sagittal"))
        )
    data = VolumeSet(files, np.zeros((2, 3), np.float32), 64, seed=3, view=0)
    batch = data.__getitems__([(0, 0), (1, 0)])
    assert batch["lengths"] == [[3, 5]] * 3 and batch["volumes"][0].shape == (8, 64, 64)
    assert torch.equal(batch["volumes"][0][0], torch.from_numpy(slices[0][96:160, 96:160]))  # the centre
    (planes, _), _ = prepare_batch(batch, CPU, "knee")
    for plane in planes:
        assert (plane[:3] - plane[0]).abs().max() < 1e-5 and (plane[3:] - plane[3]).abs().max() < 1e-5
        torch.testing.assert_close(plane, planes[0])
    (still, _), _ = prepare_batch(batch, CPU, "none")
    assert (still[0][0] - planes[0][0]).abs().max() > 0.1
    (alone, _), _ = prepare_batch(data.__getitems__([(1, 0)]), CPU, "knee")
    torch.testing.assert_close(alone[2], planes[2][3:])
    (other, _), _ = prepare_batch(data.__getitems__([(1, 1)]), CPU, "knee")  # drawn again: another view
    assert (other[0] - alone[0]).abs().max() > 0.1


def test_knee_shift_and_flip_by_hand():
    width = 100
    volume = (pictures(1, 1, width, width)[0] * 255).byte()
    still = prepare_volumes([volume] * 3, [[1]] * 3, None, "none")[0][0]
    black = -58.09 / 49.73
    u = uniforms(1, 1, shift=torch.tensor([0.999999, 0.5]))
    moved = prepare_volumes([volume] * 3, [[1]] * 3, u, "knee")[0][0]
    torch.testing.assert_close(moved[..., :89], still[..., 11:], atol=1e-2, rtol=0)  # 0.11 of the width
    torch.testing.assert_close(moved[..., 89:], torch.full_like(moved[..., 89:], black), atol=1e-2, rtol=0)
    flipped = prepare_volumes([volume] * 3, [[1]] * 3, uniforms(1, 1, hflip=YES), "knee")[0][0]
    torch.testing.assert_close(flipped, still.flip(-1), atol=1e-3, rtol=0)
    turned = prepare_volumes([volume] * 3, [[1]] * 3, uniforms(1, 1, rotate=1.0), "knee")[0][0]
    low, high = volume.min(), volume.max()
    stretched = (volume[None].float() - low) * (255 / (high - low))
    expected = (TF.rotate(stretched, 25, TF.InterpolationMode.BILINEAR) - 58.09) / 49.73
    inside = TF.rotate(torch.ones(1, width, width), 25, TF.InterpolationMode.BILINEAR)[0] > 0.999
    torch.testing.assert_close(turned[0, :1, inside], expected[0][:, inside], atol=2e-2, rtol=0)
    assert math.isclose(RECIPES["knee"]["shift"], 0.11) and RECIPES["knee"]["rotate"] == 25


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="needs real photographs (REAL_DATA)")
def test_real_photographs():
    folder = Path(os.environ["REAL_DATA"]) / "odir" / "images"
    lefts = sorted(folder.glob("*_left.*"))[:4]
    pairs = [[file, file.with_name(file.name.replace("_left", "_right"))] for file in lefts]
    eyes = [Image.open(file).convert("RGB").resize((224, 224)) for pair in pairs for file in pair]
    array = np.stack([np.asarray(eye) for eye in eyes]).reshape(4, 2, 224, 224, 3)
    batch = {"images": torch.from_numpy(array), "targets": torch.zeros(4, 8)}
    batch["uniforms"] = draw(42, 0, [(i, 0) for i in range(4)], 2)
    (plain,), _ = prepare_batch(batch, CPU)
    assert torch.equal(plain, torch.from_numpy(array).permute(0, 1, 4, 2, 3) / 255)
    for recipe in ("eyes", "pair", "lab"):
        (seen,), _ = prepare_batch(batch, CPU, recipe, 224)
        assert seen.shape == plain.shape and seen.min() >= 0 and seen.max() <= 1
        assert (seen - plain).abs().mean() > 0.02
        brightness = seen.mean((1, 2, 3, 4)) / plain.mean(
            (1, 2, 3, 4)
        )  # of both eyes, which may change places
        assert (brightness - 1).abs().max() < 0.25
    u = uniforms(4, 3)
    u[:, -1, COLUMNS["hflip"]] = YES
    (mirrored,), _ = prepare_batch(batch, CPU, mirrored=True)
    torch.testing.assert_close(mirrored, augment.augment(plain, u, "pair", 224), atol=2e-4, rtol=0)
