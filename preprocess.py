"""Fundus photographs made ready for training: field of view cut out, circle-cropped, resized to a square.

    python preprocess.py data/odir/images data/odir/images_224 --size 224

writes every picture found under SRC to the same relative name under DST, and DST/preprocess.json with the settings. A
second call skips what is finished. Exit status 0: all is well; 1: the pictures listed failed; 2: unusable arguments.
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import Formatter, InputError, guard

KINDS = ("fov", "none", "centre")
READS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")  # what PIL may try; nothing that starts a program
WRITES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
SHORTEST = 16  # pixels; nothing shorter is a photograph
SOS, EOI = b"\xff\xda", b"\xff\xd9"  # JPEG markers: start of a scan, end of the picture


def read_picture(path, side=0):
    """-> (PIL image in RGB, whether a missing JPEG end marker was supplied).

    With `side` > 0 a JPEG is decoded at the largest DCT reduction that leaves 1.5 x side pixels both ways (the border
    around the eye is cropped later). Alpha is laid over black; 16 bits are scaled. Raises InputError naming the file.
    JPEG has no checksum: flipped bits that still decode cannot be noticed (PNG's checksums are verified). What is lost
    of a repaired progressive JPEG is at most one grey level in its last blocks.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    if not data:
        raise InputError(f"{path}: the file is empty (0 bytes). Copy or download it again.")
    # FF D9 does not occur inside a scan: no end marker after the last scan began means that it is missing
    repaired = data.startswith(b"\xff\xd8") and data.find(SOS, max(data.rfind(EOI), 0)) >= 0
    try:
        if repaired and not lacks_only_end_marker(data):
            raise InputError("a truncated JPEG: its end is missing. Copy or download it again.")
        return to_rgb(decode(data.rstrip(b"\xff") + EOI if repaired else data, side)), repaired
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes PIL raises OSError, SyntaxError, struct.error, IndexError ...
        raise InputError(f"{path}: a damaged or truncated picture ({error}). Copy or download it again.") from error


def decode(data, side=0):
    """Encoded bytes -> loaded PIL image in the file's own mode. Raises InputError for its size, or what PIL raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata are no business of ours
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=READS)
            if image.format == "PNG":
                image.verify()  # the checksums of all chunks; the image cannot be used afterwards
                image = Image.open(io.BytesIO(data), formats=READS)
        except Image.UnidentifiedImageError as error:
            raise InputError("not a picture, whatever its name says. Expected JPEG, PNG, TIFF or BMP.") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"a decompression bomb, over {Image.MAX_IMAGE_PIXELS} pixels. Scale it down.") from error
        if min(image.size) < SHORTEST:
            raise InputError(f"{image.width} x {image.height} pixels; at least {SHORTEST} on each side were expected.")
        if side and image.format in ("JPEG", "MPO"):
            image.draft(None, (math.ceil(1.5 * side),) * 2)
        image.load()
    return image


def lacks_only_end_marker(data):
    """Whether every pixel of a JPEG without end marker is there. What PIL raises for other damage passes through.

    Filler between a complete scan and an end marker is skipped. An incomplete scan takes it for picture, and so does a
    complete one that is cut short; where cutting changes nothing, the end is no scan but, say, another file's bytes.
    """
    data = data.rstrip(b"\xff")  # half an end marker
    if data.endswith(b"\0\0"):  # never written, as in a broken download; a scan's last byte is filled with ones
        return False
    if not holds_all_scans(data) or depends_on_filler(data):
        return False
    cut = 64 if decode(data + EOI).info.get("progressive") else 8  # a progressive one ends in hardly visible bits
    header = data.rfind(SOS) + 2
    entropy_coded = len(data) - header - int.from_bytes(data[header : header + 2])
    return entropy_coded > 0 and depends_on_filler(data[: -min(cut, entropy_coded)])


def depends_on_filler(data):
    """Whether what follows `data`, a JPEG without its end, would be decoded as picture: nothing, or two fillers that
    differ in every bit, each with the restart markers that come next."""
    data = data.rstrip(b"\xff")  # half a marker or half an escaped FF would turn the filler into a marker of its own
    last = max(data.rfind(bytes([0xFF, 0xD0 + n])) for n in range(8))
    markers = [bytes([0xFF, 0xD0 + (data[last + 1] + n) % 8]) for n in range(1, 17)]
    first, *others = (
        np.asarray(decode(data + bits + b"".join(marker + bits for marker in markers) + EOI))
        for bits in (b"", b"\x55" * 512, b"\xaa" * 512)
    )
    return not all(np.array_equal(first, other) for other in others)


def holds_all_scans(data):
    """Whether the scans of a JPEG bring every coefficient of every component to full precision (progressive: ten)."""
    missing, at = {}, 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # inside entropy-coded data, or without length
            at += 1 if marker == 0xFF else 2
            continue
        body = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # frame: which components there are
            missing = {body[6 + 3 * n]: set(range(64)) for n in range(body[5])}
        elif marker == 0xDA:  # scan: components, first and last coefficient, precision still to come
            first, last, low_bit = body[-3], body[-2], body[-1] & 15
            for n in range(body[0]):
                if low_bit == 0:
                    missing[body[1 + 2 * n]] -= set(range(first, last + 1))
        at += 2 + length
    return bool(missing) and not any(missing.values())


def to_rgb(image):
    """PIL image of any mode -> RGB; 16 bits are scaled, not clipped. Raises InputError for values of unknown range."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError("grey values outside 0-65535. Save it with 8 or 16 bits per channel.")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError("floating-point grey values of unknown range. Save it with 8 or 16 bits per channel.")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


class FOVExtraction:
    """Keeps the rows and the columns that hold a pixel brighter than `threshold` (ITU-R 601 grey level, 0-255).

    uint8 array (H, W, 3) or PIL image in, the same kind out. Raises InputError for a wholly black picture.
    """

    def __init__(self, threshold=7):
        self.threshold = threshold

    def __call__(self, image):
        pixels = np.asarray(image)
        bright = np.asarray(Image.fromarray(pixels).convert("L")) > self.threshold
        rows, columns = bright.any(1), bright.any(0)
        if not rows.any():
            raise InputError(f"wholly black: no pixel is brighter than {self.threshold}. Leave it out or replace it.")
        pixels = pixels[np.ix_(rows, columns)]
        return Image.fromarray(pixels) if isinstance(image, Image.Image) else pixels


class CircleCrop:
    """Blacks out what is outside the largest centred circle. uint8 array (H, W, 3) or PIL image in, same kind out."""

    def __call__(self, image):
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        y, x = np.ogrid[:height, :width]
        inside = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 <= (min(height, width) / 2) ** 2
        pixels = pixels * inside[..., None].astype(np.uint8)
        return Image.fromarray(pixels) if isinstance(image, Image.Image) else pixels


def prepare(image, kind, size):
    """PIL RGB image -> uint8 array (size, size, 3).

    Kinds: "fov" = field of view, circle, field of view, squash to the square; "none" = squash alone; "centre" = shorter
    side to `size`, centre crop. Raises InputError for a wholly black picture ("fov") and for another kind.
    """
    if kind not in KINDS:
        raise InputError(f"preprocessing {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    box = (0, 0, *image.size)
    if kind == "fov":
        fov = FOVExtraction()
        image = fov(CircleCrop()(fov(image)))
        box = (0, 0, *image.size)
    elif kind == "centre":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))  # antialiased when it shrinks


def load_picture(path, kind, size):
    """A file -> (uint8 array (size, size, 3), repaired), as `prepare` describes. Every InputError names the file."""
    image, repaired = read_picture(path, side=size)
    try:
        return prepare(image, kind, size), repaired
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def process(job, kind, size):
    """(source, target) -> None, or why it failed. Written beside and renamed: what bears the target's name is whole."""
    source, target = job
    partial_file = target.with_name(f".preprocess-{os.getpid()}-{target.name}")
    try:
        pixels, _ = load_picture(source, kind, size)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(partial_file, WRITES[target.suffix.lower()], quality=95)
        os.replace(partial_file, target)
    except InputError as error:
        return str(error)
    finally:
        partial_file.unlink(missing_ok=True)


def is_finished(source, target, settings_file, size):
    """Whether `target` is newer than its source and than the settings, and opens as a picture of the right size."""
    try:
        if target.stat().st_mtime_ns < max(source.stat().st_mtime_ns, settings_file.stat().st_mtime_ns):
            return False
        with Image.open(target, formats=READS) as image:
            return image.size == (size, size)
    except OSError:  # not there, or no picture
        return False


def default_workers():
    """Processes worth starting: the cores this process may use (affinity, container limit), at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = Path("/sys/fs/cgroup/cpu.max")  # control groups v2: "<quota> <period>" or "max <period>"
    if limit.exists() and not (quota := limit.read_text().split())[0].startswith("max"):
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min(16, cores))


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("src", metavar="SRC", type=Path, help="folder searched for .jpg .jpeg .png .tif .tiff .bmp")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder that is written, outside SRC")
    parser.add_argument("--size", type=int, default=224, help="side of the square that is written, pixels")
    parser.add_argument("--kind", choices=KINDS, default="fov", help="field of view and circle, squash, or centre crop")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes; by default the cores allowed")
    return parser


def find_jobs(args):
    """-> [(source, target)] for every picture under SRC, sorted. Raises InputError for unusable arguments."""
    if args.size < SHORTEST or args.workers < 1:
        raise InputError(f"--size {args.size} --workers {args.workers}: expected at least {SHORTEST} and at least 1.")
    if not args.src.is_dir():
        raise InputError(f"SRC {args.src} is not a folder. Give the folder that holds the pictures.")
    src, dst = args.src.resolve(), args.dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise InputError(f"SRC {args.src} and DST {args.dst}: the same, or one inside the other. Choose another DST.")
    if args.dst.exists() and not args.dst.is_dir():
        raise InputError(f"DST {args.dst} is not a folder. Choose another name.")
    sources = sorted(path for path in args.src.rglob("*") if path.suffix.lower() in WRITES and path.is_file())
    if not sources:
        raise InputError(f"SRC {args.src} holds no picture; looked for {' '.join(WRITES)} in it and below.")
    return [(source, args.dst / source.relative_to(args.src)) for source in sources]


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    jobs = find_jobs(args)
    args.dst.mkdir(parents=True, exist_ok=True)
    settings, settings_file = json.dumps({"kind": args.kind, "size": args.size}), args.dst / "preprocess.json"
    if not settings_file.is_file() or settings_file.read_text() != settings:  # what is older was made otherwise
        temporary = settings_file.with_name(f".preprocess-{os.getpid()}-{settings_file.name}")
        temporary.write_text(settings)
        os.replace(temporary, settings_file)
    todo = [job for job in jobs if not is_finished(*job, settings_file, args.size)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failures, pool = [], None
    try:
        work = partial(process, kind=args.kind, size=args.size)
        if args.workers > 1 and len(todo) > 1:  # a worker leaves Ctrl-C to this process, and ends its picture
            pool = ProcessPoolExecutor(args.workers, None, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        results = pool.map(work, todo, chunksize=4) if pool else map(work, todo)
        failures = [reason for reason in tqdm(results, total=len(todo), unit="picture", disable=None) if reason]
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("error: a worker was killed, most often for want of memory. Try fewer --workers.", file=sys.stderr)
        return 1
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        for leftover in args.dst.rglob(".preprocess-*"):  # of a worker that was killed, now or in an earlier call
            leftover.unlink(missing_ok=True)
    written, skipped = len(todo) - len(failures), len(jobs) - len(todo)
    print(f"{written} written to {args.dst}, {skipped} skipped as finished, {len(failures)} failed")
    if failures:
        print("\n".join([*failures, f"{len(failures)} of {len(jobs)} pictures failed"]), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(guard(main))
