"""Reading, repairing, cropping and the command line. REAL_DATA says where real photographs are, if at all."""

import contextlib
import errno
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import preprocess  # noqa: E402
import tables  # noqa: E402
from errors import InputError, guard  # noqa: E402
from preprocess import CircleCrop, FOVExtraction, load_picture, prepare, read_picture  # noqa: E402

REAL = Path(os.environ.get("REAL_DATA", "absent"))
real = pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")


def eye(width=300, height=260, seed=0):
    """A bright, textured disc on black, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    coarse = Image.fromarray(rng.integers(60, 220, (12, 12, 3), dtype=np.uint8)).resize((width, height))
    inside = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 < (0.45 * min(width, height)) ** 2
    return np.asarray(coarse) * inside[..., None].astype(np.uint8)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def run(*args):
    """`preprocess.py` with these arguments, in this process: to import it again takes long."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = guard(preprocess.main, list(map(str, args)))
        except SystemExit as error:  # of argparse
            status = error.code
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


# --- field of view, circle, square


def test_fov_keeps_rows_and_columns_that_hold_a_bright_pixel():
    picture = np.zeros((30, 40, 3), np.uint8)
    picture[5, 10], picture[20, 33], picture[8, 12] = 8, 200, 7  # 7 is not brighter than 7
    out = FOVExtraction()(picture)
    assert out.shape == (2, 2, 3)
    assert out[0, 0, 0] == 8 and out[1, 1, 0] == 200 and out[0, 1, 0] == 0
    assert FOVExtraction(threshold=6)(picture).shape == (3, 3, 3)


@pytest.mark.parametrize("step", [FOVExtraction(), CircleCrop()])
def test_arrays_and_pil_images_give_the_same_in_their_own_kind(step):
    from_array, from_image = step(eye()), step(Image.fromarray(eye()))
    assert isinstance(from_array, np.ndarray) and from_array.dtype == np.uint8
    assert isinstance(from_image, Image.Image) and from_image.mode == "RGB"
    np.testing.assert_array_equal(from_array, np.asarray(from_image))


def test_wholly_black_is_refused_and_named(tmp_path):
    with pytest.raises(ValueError, match="wholly black"):
        FOVExtraction()(np.full((20, 20, 3), 7, np.uint8))
    Image.new("RGB", (64, 64)).save(tmp_path / "night.png")
    with pytest.raises(InputError, match="night.png.*wholly black"):
        load_picture(tmp_path / "night.png", "fov", 32)
    assert not load_picture(tmp_path / "night.png", "none", 32)[0].any()


def test_circle_crop_against_a_loop():
    picture = np.full((20, 31, 3), 255, np.uint8)
    out = CircleCrop()(picture)
    for y in range(20):
        for x in range(31):
            assert (out[y, x, 0] == 255) == ((x + 0.5 - 15.5) ** 2 + (y + 0.5 - 10) ** 2 <= 100)
    assert picture.min() == 255  # the argument is left as it was


def test_prepare_against_its_steps_and_without_a_border():
    picture = eye(400, 300)
    cropped = FOVExtraction()(CircleCrop()(FOVExtraction()(picture)))
    expected = np.asarray(Image.fromarray(cropped).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(prepare(Image.fromarray(picture), "fov", 64), expected)
    full = np.full((100, 100, 3), 90, np.uint8)  # no black border: passes through, its corners blackened
    out = prepare(Image.fromarray(full), "fov", 50)
    assert out.shape == (50, 50, 3) and out[25, 25, 0] == 90 and out[0, 0, 0] == 0
    np.testing.assert_array_equal(prepare(Image.fromarray(full), "none", 50), full[:50, :50])


def test_centre_crop_and_unknown_kind():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 200  # exactly the central square
    assert prepare(Image.fromarray(picture), "centre", 20)[:, 1:-1].min() == 200
    assert prepare(Image.fromarray(picture), "none", 20)[:, 0].max() == 0
    with pytest.raises(InputError, match="fov, none, centre"):
        prepare(Image.fromarray(picture), "squash", 20)


# --- what is read


@pytest.mark.parametrize("side", [0, 30, 60, 100, 200, 400])
def test_reduced_decoding_leaves_one_and_a_half_sides(tmp_path, side):
    picture = Image.fromarray(eye(720, 640))
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    image, repaired = read_picture(tmp_path / "a.jpg", side)
    reductions = [k for k in (8, 4, 2) if side and 640 / k >= 1.5 * side]
    assert image.size == (720 // max([*reductions, 1]), 640 // max([*reductions, 1])) and not repaired
    assert read_picture(tmp_path / "a.png", side)[0].size == (720, 640)
    if side:
        whole = prepare(Image.open(tmp_path / "a.jpg"), "fov", side)
        assert np.abs(prepare(image, "fov", side).astype(int) - whole).mean() < 4


def test_modes_are_converted(tmp_path):
    rgb = Image.fromarray(eye())
    grey = np.asarray(rgb.convert("L"))
    alpha = Image.new("L", rgb.size, 255)
    alpha.paste(0, (0, 0, 150, 260))
    opaque = np.where(np.asarray(alpha)[..., None] == 255, np.asarray(rgb), 0)
    layered = rgb.copy()
    layered.putalpha(alpha)
    palette = rgb.quantize(16)
    cases = {
        "grey.png": (rgb.convert("L"), np.repeat(grey[..., None], 3, 2)),
        "grey.jpg": (rgb.convert("L"), None),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)),
        "deep.tif": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, 2)),
        "wide.tif": (Image.fromarray(grey.astype(np.int32) * 257), np.repeat(grey[..., None], 3, 2)),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "alpha.png": (layered, opaque),
        "grey_alpha.png": (Image.merge("LA", [rgb.convert("L"), alpha]), None),
        "bits.png": (rgb.convert("1"), np.asarray(rgb.convert("1").convert("RGB"))),
        "cmyk.jpg": (rgb.convert("CMYK"), None),
        "cmyk.tif": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        out, repaired = read_picture(tmp_path / name)
        assert out.mode == "RGB" and out.size == rgb.size and not repaired, name
        if expected is not None:
            np.testing.assert_array_equal(np.asarray(out), expected, err_msg=name)
    from_cmyk = np.asarray(read_picture(tmp_path / "cmyk.jpg")[0]).astype(int)
    assert np.abs(from_cmyk - np.asarray(rgb)).mean() < 6  # not inverted
    rgb.quantize(16).save(tmp_path / "clear.png", transparency=rgb.quantize(16).getpixel((150, 130)))
    assert (
        np.asarray(read_picture(tmp_path / "clear.png")[0])[130, 150].max() == 0
    )  # transparent shows the black below


def damaged():
    """name -> (bytes, what the message says)"""
    picture = Image.fromarray(eye())
    whole = {kind: encoded(picture, kind) for kind in ("JPEG", "PNG", "BMP")}
    whole["TIFF"] = encoded(picture, "TIFF", compression="tiff_lzw")
    cases = {
        "text.jpg": (b"no picture at all\n" * 50, "not a picture"),
        "empty.png": (b"", "not a picture; its 0 bytes"),
        "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels"),
        "line.png": (encoded(Image.new("RGB", (60000, 1)), "PNG"), "60000 x 1 pixels"),
        "line.jpg": (encoded(Image.new("RGB", (60000, 1))), "60000 x 1 pixels"),
        "bomb.png": (bomb(10000, 9000), "decompression bomb"),
        "big_bomb.png": (bomb(60000, 60000), "decompression bomb"),
        "float.tif": (encoded(Image.new("F", (20, 20), 0.5), "TIFF"), "floating-point"),
        "deep.tif": (encoded(Image.new("I", (20, 20), 70000), "TIFF"), "0-65535"),
    }
    for kind, data in whole.items():
        for tenth in range(1, 10):
            cases[f"cut{tenth}.{kind.lower()}"] = (data[: len(data) * tenth // 10], "")
    flipped = bytearray(whole["PNG"])
    flipped[len(flipped) // 2] ^= 16  # one bit of the compressed pixels
    cases["flipped.png"] = (bytes(flipped), "broken PNG file")
    cases["another_end.jpg"] = (whole["JPEG"][:3000] + whole["PNG"], "truncated JPEG")
    cases["zeros.jpg"] = (whole["JPEG"][:-40] + bytes(40), "truncated JPEG")  # never written
    return cases


def bomb(width, height):
    """A small PNG that declares a huge picture."""

    def chunk(name, body):
        return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\x00\x00\x00"
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_damaged_files_are_refused_by_name(tmp_path):
    for name, (data, message) in damaged().items():
        (tmp_path / name).write_bytes(data)
        for side in (0, 100):
            with pytest.raises(InputError) as caught:
                read_picture(tmp_path / name, side)
            assert name in str(caught.value) and message in str(caught.value), (name, str(caught.value))


def test_what_the_system_refuses_is_no_fault_of_the_bytes(tmp_path, monkeypatch):
    """The caller keeps the reason of bad bytes for good, but asks the system again."""
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "absent.jpg", "fov", 32)
    with pytest.raises(IsADirectoryError):
        load_picture(tmp_path, "fov", 32)
    Image.fromarray(eye()).save(tmp_path / "a.jpg")

    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(PermissionError):
        read_picture(tmp_path / "a.jpg")


def test_an_oserror_of_the_decoder_is_a_fault_of_the_bytes(tmp_path):
    (tmp_path / "a.bmp").write_bytes(encoded(Image.fromarray(eye()), "BMP")[:-5000])
    with pytest.raises(InputError) as caught:
        read_picture(tmp_path / "a.bmp")
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_errors_are_not_taken_for_damage(tmp_path, monkeypatch):
    Image.fromarray(eye()).save(tmp_path / "a.jpg")

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(preprocess, "decode", fail)
    with pytest.raises(MemoryError):
        read_picture(tmp_path / "a.jpg")


# --- the missing end marker

WAYS = {
    "plain": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 95},
    "no_subsampling": {"subsampling": 0},
    "restart_rows": {"restart_marker_rows": 1},
    "restart_blocks": {"restart_marker_blocks": 3},
}


def check_repair(picture, options, path):
    """Only the end marker missing: repaired to the very pixels. More missing, or zeros there: refused."""
    data = encoded(picture, **options)
    assert data.endswith(preprocess.EOI)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for lost in (1, 2):
        path.write_bytes(data[:-lost])
        image, repaired = read_picture(path)
        assert repaired
        np.testing.assert_array_equal(np.asarray(image), expected)
        whole, _ = load_picture(path, "none", 48)
        path.write_bytes(data)
        np.testing.assert_array_equal(whole, load_picture(path, "none", 48)[0])
    cuts = [len(data) * tenth // 10 for tenth in range(1, 10)] + [
        len(data) - lost for lost in (4, 10, 40, 200)
    ]
    restarts = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] in (b"\xff\xda", b"\xff\xc4")][2:]
    marked = restarts[-3:] + scans
    outcomes = [0, 0]
    for cut in cuts + marked + [i + 2 for i in marked]:
        for filling in (b"", bytes(len(data) - cut), bytes(4000)):
            path.write_bytes(data[:cut] + filling)
            outcomes[refused_or_equal(path, expected)] += 1
    assert outcomes[0] >= 0.95 * sum(outcomes)  # a cut that takes nothing visible with it may be repaired


def refused_or_equal(path, expected):
    """0 where the file is refused, 1 where it gives the whole picture; fails where it gives another one."""
    try:
        image, _ = read_picture(path)
    except InputError:
        return 0
    # a progressive picture's last refinement may be lost without a trace: one grey level
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1, path
    return 1


@pytest.mark.parametrize("way", WAYS)
def test_repair_is_told_from_truncation(tmp_path, way):
    check_repair(Image.fromarray(eye()), WAYS[way], tmp_path / "a.jpg")
    check_repair(Image.fromarray(eye()).convert("L"), WAYS[way], tmp_path / "b.jpg")


def test_a_thumbnail_does_not_stand_in_for_the_end(tmp_path):
    data, thumbnail = encoded(Image.fromarray(eye())), encoded(Image.fromarray(eye(40, 40)))
    segment = b"Exif\0\0" + thumbnail
    data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + data[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    expected = np.asarray(read_picture(path)[0])
    path.write_bytes(data[:-2])
    image, repaired = read_picture(path)
    assert repaired
    np.testing.assert_array_equal(np.asarray(image), expected)
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10])
        with pytest.raises(InputError):
            read_picture(path)


@real
@pytest.mark.parametrize("way", WAYS)
def test_repair_of_real_photographs(tmp_path, way):
    for folder in ("odir/images", "idrid/train_images"):
        for source in sorted((REAL / folder).glob("*.jpg"))[5::1500]:
            check_repair(Image.open(source).convert("RGB"), WAYS[way], tmp_path / source.name)


@real
def test_real_files_as_they_are(tmp_path):
    sources = sorted((REAL / "odir/images").glob("*.jpg"))[::400]
    sources += sorted((REAL / "idrid/train_images").glob("*.jpg"))[::80]
    path = tmp_path / "a.jpg"
    for source in sources:
        data = source.read_bytes()
        expected = np.asarray(Image.open(source).convert("RGB"))
        assert not read_picture(source)[1]
        path.write_bytes(data[:-2])
        image, repaired = read_picture(path)
        assert repaired
        np.testing.assert_array_equal(np.asarray(image), expected)
        for tenth in range(1, 10):
            path.write_bytes(data[: len(data) * tenth // 10])
            with pytest.raises(InputError, match="a.jpg"):
                read_picture(path)


@real
def test_reduced_scale_is_close_to_the_full_size_way():
    differences = []
    for source in sorted((REAL / "fullsize").glob("*.jpg")):
        plain = prepare(Image.open(source).convert("RGB"), "fov", 224)
        differences.append(np.abs(load_picture(source, "fov", 224)[0].astype(int) - plain).mean())
    assert len(differences) >= 7 and np.mean(differences) < 1.5


# --- the command line


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    (folder / "deep" / "er").mkdir(parents=True)
    names = ("a.jpg", "b.JPEG", "deep/c.png", "deep/er/d.TIF", "deep/e.tiff", "f.bmp")
    for i, name in enumerate(names):
        Image.fromarray(eye(seed=i)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_every_picture_is_written(tmp_path, source, workers):
    target = tmp_path / "dst"
    first = run(source, target, "--size", 64, "--workers", workers)
    assert first.returncode == 0, first.stderr
    assert "6 written" in first.stdout and "0 failed" in first.stdout
    written = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    expected = [
        str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and p.name != "notes.txt"
    ]
    assert written == sorted(expected)
    formats = {
        "a.jpg": "JPEG",
        "b.JPEG": "JPEG",
        "deep/c.png": "PNG",
        "deep/er/d.TIF": "TIFF",
        "f.bmp": "BMP",
    }
    for name, kind in formats.items():
        with Image.open(target / name) as image:
            assert image.format == kind and image.size == (64, 64) and image.mode == "RGB"
    expected_pixels = load_picture(source / "deep/c.png", "fov", 64)[0]
    np.testing.assert_array_equal(np.asarray(Image.open(target / "deep/c.png")), expected_pixels)
    leftover = target / "deep" / f".c.png.{platform.node()}.{2**22 + 1}.tmp"  # no process has this number
    leftover.write_bytes(b"left behind by a killed call")
    picture = Image.fromarray(eye(seed=9))
    picture.save(source / "f.bmp")  # changed since
    second = run(source, target, "--size", 64, "--workers", workers)
    assert second.returncode == 0 and "6 written" in second.stdout
    np.testing.assert_array_equal(np.asarray(Image.open(target / "f.bmp")), prepare(picture, "fov", 64))
    assert not list(target.rglob("*.tmp"))


def test_what_was_drawn_stays_marked(tmp_path, source):
    (tmp_path / "rendered.json").write_text("{}")  # of the data set whose images/ these are
    assert run(source, tmp_path / "drawn/images", "--size", 64).returncode == 0
    assert tables.is_rendered(tmp_path / "drawn/images") and tables.is_rendered(tmp_path / "drawn")
    (tmp_path / "rendered.json").unlink()
    assert run(source, tmp_path / "real/images", "--size", 64).returncode == 0
    assert not tables.is_rendered(tmp_path / "real/images") and not tables.is_rendered(tmp_path / "real")


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_named_and_nothing_half_written_stays(tmp_path, source, workers):
    (source / "bad.jpg").write_text("text")
    Image.new("RGB", (50, 50)).save(source / "deep" / "night.png")
    target = tmp_path / "dst"
    result = run(source, target, "--size", 64, "--workers", workers)
    assert result.returncode == 1 and "6 written" in result.stdout and "2 failed" in result.stdout
    assert "bad.jpg cannot be read as a picture" in result.stderr and "not a picture; its 4" in result.stderr
    assert "night.png cannot be read as a picture (ValueError: wholly black" in result.stderr
    assert result.stderr.rstrip().endswith("2 of 8 pictures failed") and "Traceback" not in result.stderr
    assert not (target / "bad.jpg").exists() and not (target / "deep" / "night.png").exists()
    assert not list(target.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs Linux")
def test_a_picture_that_the_system_cannot_read_is_listed(tmp_path, source):
    (source / "broken_disk.jpg").symlink_to("/proc/self/mem")  # reading its first byte is an I/O error
    result = run(source, tmp_path / "dst", "--size", 64)
    assert result.returncode == 1 and "6 written" in result.stdout and "1 failed" in result.stdout
    assert "broken_disk.jpg: cannot be read (Input/output error)" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_target_that_cannot_be_written_ends_the_call(tmp_path, source):
    (tmp_path / "dst" / "deep").mkdir(parents=True)
    (tmp_path / "dst" / "deep" / "er").write_text("a file where a folder is needed")
    result = run(source, tmp_path / "dst", "--size", 64)
    assert result.returncode == 2 and "cannot write" in result.stderr and "Traceback" not in result.stderr


def alive(process):
    """Whether this process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_call_that_is_ended_leaves_no_worker_and_only_whole_files(tmp_path, how):
    source, target = tmp_path / "src", tmp_path / "dst"
    source.mkdir()
    Image.fromarray(eye(1000, 1000)).save(source / "00.png")
    for i in range(1, 24):
        shutil.copy(source / "00.png", source / f"{i:02d}.png")
    command = [sys.executable, str(ROOT / "preprocess.py"), source, target, "--size", "64", "--workers", "2"]
    call = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(target.glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split()
    workers += [
        child for pid in workers for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    assert len(workers) >= 2
    call.send_signal(how)
    _, said = call.communicate(timeout=60)
    assert call.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how]
    assert "Traceback" not in said and ("interrupted" in said) == (how != signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)  # a zombie, which init has not reaped, still owns its temporary file
    assert not any(alive(worker) for worker in workers)
    assert 3 <= len(list(target.glob("*.png"))) < 24
    rest = run(source, target, "--size", 64, "--workers", 2)
    assert rest.returncode == 0 and not list(target.glob("*.tmp")) and len(list(target.glob("*.png"))) == 24
    assert len({path.read_bytes() for path in target.glob("*.png")}) == 1


def test_unusable_arguments_end_with_status_2(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        "absent is no folder that holds a picture": (tmp_path / "absent", tmp_path / "dst"),
        "empty is no folder that holds a picture": (tmp_path / "empty", tmp_path / "dst"),
        "the same": (source, source),
        "one inside": (source, source / "dst"),
        "inside the other": (source, tmp_path),
        "--size 8: expected at least 16": (source, tmp_path / "dst", "--size", 8),
        "file: File exists": (source, tmp_path / "file"),
        "invalid choice": (source, tmp_path / "dst", "--kind", "circle"),
    }
    for message, arguments in cases.items():
        result = run(*arguments)
        assert result.returncode == 2 and message in result.stderr, (message, result.stderr)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "dst").exists()


def test_defaults_and_light_imports():
    args = preprocess.get_args_parser().parse_args(["a", "b"])
    assert (args.size, args.kind, args.workers) == (224, "fov", None)
    assert 1 <= preprocess.default_workers() <= 16
    code = "import sys, preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert "processes (default: the cores allowed)" in run("--help").stdout


def test_pictures_that_are_gone_from_the_source_are_counted(tmp_path, source):
    target = tmp_path / "dst"
    assert "also holds" not in run(source, target).stdout
    next(file for file in source.rglob("*.png")).unlink()
    assert "also holds 1 picture(s) that this call did not write" in run(source, target).stdout
