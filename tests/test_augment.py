"""Random views against torchvision and by hand; whose draw depends on what; knee volumes."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
from augment import COLUMNS, RECIPES, draw, jitter, normalise, prepare_batch, prepare_volumes  # noqa: E402
from pictures import PictureSet, VolumeSet  # noqa: E402

HALF, NO, YES = 0.5, 0.9, 0.1  # of a draw: no turn and no change of colour; no flip; flip


def pictures(*shape, seed=0):
    """Smooth float pictures in 0..1, so that interpolation is not all there is to see."""
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise.flatten(0, -4), 5, 1, 2, count_include_pad=False).reshape(shape).clamp(0, 1)


def uniforms(batch, rows, **values):
    """A draw that changes nothing, but for the columns given: one number, or a tensor (batch, rows[, columns])."""
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


# ---------------------------------------------------------------- geometry

@pytest.mark.parametrize("recipe", ["eyes", "pair", "lab"])
def test_a_draw_that_changes_nothing_gives_the_picture_back(recipe):
    images = pictures(2, 2, 3, 17, 17)
    torch.testing.assert_close(augment.augment(images, uniforms(2, 3), recipe, 17), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, dims", [("hflip", [-1]), ("vflip", [-2])])
def test_flips_are_exact(name, dims):
    images = pictures(2, 1, 3, 16, 16)
    found = augment.augment(images, uniforms(2, 2, **{name: torch.tensor([[YES, HALF], [NO, HALF]])}), "lab", 16)
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
    assert (found[:, inside] - TF.rotate(images[0, 0], -degrees, TF.InterpolationMode.BILINEAR)[:, inside]).abs().max() > 0.02
    assert (found[:, 0, 0] == 0).all()  # what lies outside is black


def test_crop_offsets_cover_the_picture():
    images = pictures(4, 1, 3, 20, 20)
    top = 1 - 1e-7
    corners = torch.tensor([[0.0, 0], [top, 0], [0, top], [top, top]])  # (x, y)
    found = augment.augment(images, uniforms(4, 2, crop=corners[:, None].expand(-1, 2, -1)), "lab", 12)
    for image, crop, (x, y) in zip(images[:, 0], found[:, 0], ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        torch.testing.assert_close(crop, image[:, y:y + 12, x:x + 12], atol=1e-4, rtol=0)
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
    expected = jitter(images[0].flip(-2), u[0, -1, COLUMNS["jitter"]].expand(2, -1), RECIPES["pair"]["jitter"])
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
    assert together.shape == (3, 3, 11) and together.dtype == torch.float32 and 0 <= together.min() and together.max() < 1
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


def test_a_batch_is_augmented_as_its_rows_are_alone():
    array = (pictures(6, 16, 16, 3) * 255).byte().numpy()
    data = PictureSet(array, np.arange(6).reshape(3, 2), np.zeros((3, 1), np.float32), seed=1, view=2)
    keys = [(2, 0), (0, 0), (2, 1)]
    (together,), _ = prepare_batch(data[keys], torch.device("cpu"), "pair", 12)
    assert together.shape == (3, 2, 3, 12, 12)
    for number, key in enumerate(keys):
        (alone,), _ = prepare_batch(data[[key]], torch.device("cpu"), "pair", 12)
        torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.1
    plain = PictureSet(array, np.arange(6).reshape(3, 2), np.zeros((3, 1), np.float32))
    (images,), targets = prepare_batch(plain[keys], torch.device("cpu"))
    expected = TF.normalize(torch.from_numpy(array[[4, 5]]).permute(0, 3, 1, 2) / 255, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    torch.testing.assert_close(images[0], expected)
    assert targets.shape == (3, 1)
    assert torch.equal(normalise(torch.ones(1, 3, 1, 1)).ravel(), (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


# ---------------------------------------------------------------- knees

def test_prepare_volumes_by_hand():
    first = torch.tensor([[[10, 20], [30, 110]], [[10, 60], [10, 10]]], dtype=torch.uint8)  # two slices, 10 to 110
    second = torch.tensor([[[0, 255], [51, 0]]], dtype=torch.uint8)
    planes, lengths = prepare_volumes([torch.cat([first, second])] * 3, [[2, 1]] * 3, None, "none")
    assert lengths == [[2, 1]] * 3 and len(planes) == 3 and planes[0].shape == (3, 3, 2, 2)
    expected = torch.tensor([[[0, 25.5], [51, 255]], [[0, 127.5], [0, 0]], [[0, 255], [51, 0]]])
    for channel in range(3):
        torch.testing.assert_close(planes[1][:, channel], (expected - 58.09) / 49.73, atol=1e-5, rtol=0)


def test_a_constant_volume_gives_finite_numbers():
    for value in (0, 7, 255):
        planes, _ = prepare_volumes([torch.full((4, 8, 8), value, dtype=torch.uint8)] * 3, [[4]] * 3, None, "none")
        torch.testing.assert_close(planes[0], torch.full((4, 3, 8, 8), -58.09 / 49.73))


def test_knee_one_draw_for_the_whole_volume(tmp_path):
    slices = (pictures(2, 256, 256, 1).squeeze(-1) * 255).byte().numpy()
    files = []
    for exam, count in enumerate((3, 5)):  # every slice of an exam, in every plane, is the same picture
        for plane in ("axial", "coronal", "sagittal"):
            np.save(tmp_path / f"{plane}{exam}.npy", np.repeat(slices[exam][None], count, 0))
        files.append(tuple(str(tmp_path / f"{plane}{exam}.npy") for plane in ("axial", "coronal", "sagittal")))
    data = VolumeSet(files, np.zeros((2, 3), np.float32), 64, seed=3, view=0)
    batch = data[[(0, 0), (1, 0)]]
    assert batch["lengths"] == [[3, 5]] * 3 and batch["volumes"][0].shape == (8, 64, 64)
    assert torch.equal(batch["volumes"][0][0], torch.from_numpy(slices[0][96:160, 96:160]))  # the centre
    (planes, _), _ = prepare_batch(batch, torch.device("cpu"), "knee")
    for plane in planes:
        assert (plane[:3] - plane[0]).abs().max() < 1e-5 and (plane[3:] - plane[3]).abs().max() < 1e-5
        torch.testing.assert_close(plane, planes[0])
    (still, _), _ = prepare_batch(batch, torch.device("cpu"), "none")
    assert (still[0][0] - planes[0][0]).abs().max() > 0.1
    (alone, _), _ = prepare_batch(data[[(1, 0)]], torch.device("cpu"), "knee")
    torch.testing.assert_close(alone[2], planes[2][3:])
    (other, _), _ = prepare_batch(data[[(1, 1)]], torch.device("cpu"), "knee")  # drawn again: another view
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
