"""Fundus photographs made ready for training: field of view cut out, circle-cropped, resized to a square.

    python preprocess.py data/odir/images data/odir/images_224 --size 224

writes each picture under SRC to DST. Status 1: the pictures that are listed failed."""

import io
import math
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from cache import remove_leftovers, replace_file
from errors import InputError, Parser, end_with_parent, guard, reading

KINDS = ("fov", "none", "centre")
READS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")  # what PIL may try; nothing that starts a program
WRITES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
SHORTEST = 16  # pixels; nothing shorter is a photograph
SOS, EOI = b"\xff\xda", b"\xff\xd9"  # JPEG markers: start of a scan, end of the picture


def read_picture(path, side=0):
    """-> (PIL image in RGB, whether a missing JPEG end marker was supplied). Raises InputError, and OSError.
    With `side` > 0 a JPEG is decoded at the largest reduction that leaves 1.5 x side pixels both ways."""
    data = Path(path).read_bytes()
    # FF D9 does not occur inside a scan: no end marker after the last scan began means that it is missing.
    repaired = data.startswith(b"\xff\xd8") and data.find(SOS, max(data.rfind(EOI), 0)) >= 0
    with reading(path, "a picture"):
        if repaired:
            data = data.rstrip(b"\xff")  # half an end marker
            never_written = data.endswith(b"\0\0")  # as in a broken download
            if never_written or lacks_more(data):
                raise ValueError("a truncated JPEG: its end is missing. Copy or download it again")
        return to_rgb(decode(data + EOI if repaired else data, side)), repaired


def decode(data, side=0):
    """Encoded bytes -> PIL image in the file's own mode. Raises ValueError, or what PIL raises."""
    with warnings.catch_warnings(action="ignore"):  # remarks on metadata are no business of ours
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if data.startswith(b"\x89PNG"):
                Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # all checksums; JPEG has none
            image = Image.open(io.BytesIO(data), formats=READS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"not a picture; its {len(data)} bytes are no JPEG, PNG, TIFF or BMP") from None
        if min(image.size) < SHORTEST:
            raise ValueError(f"{image.width} x {image.height} pixels; at least {SHORTEST} were expected")
        if side:  # other formats than JPEG are decoded in full all the same
            image.draft(None, (math.ceil(1.5 * side),) * 2)
        image.load()
    return image


def lacks_more(data):
    """Whether a JPEG without its end marker lacks more: a part of its last scan, or whole scans."""
    # What follows a scan that is cut short is decoded as picture, after the restart markers due next.
    last = max(data.rfind(bytes([0xFF, 0xD0 + n])) for n in range(8))  # -1 if none: data[0] is as FF D7
    restarts = [bytes([0xFF, 0xD0 + (data[last + 1] + n) % 8]) for n in range(1, 17)]
    fillers = (b"", b"\x55" * 512, b"\xaa" * 512)  # the last two differ in every bit
    endings = [filler + b"".join(marker + filler for marker in restarts) + EOI for filler in fillers]
    # Whole: 64 coefficients of each component came in full precision (progressive: by several scans).
    frame = data[max(data.rfind(bytes([0xFF, kind])) for kind in (0xC0, 0xC1, 0xC2)) :]
    scans = [(scan.end(), scan[1][0]) for scan in re.finditer(rb"\xff\xda..(.)", frame, re.DOTALL)]
    rules = [(count, *frame[place + 2 * count :][:3]) for place, count in scans]
    brought = [count * (end + 1 - start) for count, start, end, bits in rules if bits & 15 == 0]
    return len({decode(data + ending).tobytes() for ending in endings}) > 1 or sum(brought) != 64 * frame[9]


def to_rgb(image):
    """PIL image of any mode -> RGB: 16 bits are scaled, alpha is laid over black. Raises ValueError."""
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.int64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("floating-point grey values, or some outside 0-65535. Save it with 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


class FOVExtraction:
    """uint8 (H, W, 3) or PIL image -> the same kind: rows and columns with a grey level over `threshold`."""

    def __init__(self, threshold=7):
        self.threshold = threshold

    def __call__(self, image):
        pixels = np.asarray(image)
        bright = np.asarray(Image.fromarray(pixels).convert("L")) > self.threshold
        if not bright.any():
            raise ValueError(f"wholly black: no pixel is brighter than {self.threshold}. Leave it out")
        pixels = pixels[np.ix_(bright.any(1), bright.any(0))]
        return Image.fromarray(pixels) if isinstance(image, Image.Image) else pixels


class CircleCrop:
    """uint8 (H, W, 3) or PIL image -> the same kind, black outside the largest centred circle."""

    def __call__(self, image):
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        y, x = np.ogrid[:height, :width]
        inside = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 <= (min(height, width) / 2) ** 2
        pixels = pixels * inside[..., None].astype(np.uint8)
        return Image.fromarray(pixels) if isinstance(image, Image.Image) else pixels


def prepare(image, kind, size):
    """PIL RGB image -> uint8 array (size, size, 3). Raises ValueError for a wholly black picture ("fov").
    "fov": field of view, circle, field of view, squash to a square; "none": squash; "centre": the centre."""
    if kind not in KINDS:
        raise InputError(f"preprocessing {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if kind == "centre":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    if kind == "fov":
        image = FOVExtraction()(CircleCrop()(FOVExtraction()(image)))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))  # antialiased when it shrinks


def load_picture(path, kind, size):
    """A file -> (uint8 array (size, size, 3), repaired). Raises what `read_picture` and `prepare` raise."""
    image, repaired = read_picture(path, side=size)
    with reading(path, "a picture"):
        return prepare(image, kind, size), repaired


def default_workers():
    """Processes worth starting: the cores this process may use (affinity, container limit), at most 16."""
    from joblib import cpu_count  # here, because it takes a third of a second

    return min(16, cpu_count())


def in_processes(function, items, workers=None):
    """Yields `function` of every item, in order, by so many processes (None: all cores, at most 16)."""
    workers = default_workers() if workers is None else workers
    if workers < 2:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=end_with_parent)
    try:
        yield from pool.map(function, items, chunksize=4)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("src", metavar="SRC", type=Path, help=f"folder searched for {' '.join(WRITES)}")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder that is written, outside SRC")
    parser.add_argument("--size", type=int, default=224, help="side of the square that is written, pixels")
    parser.add_argument("--kind", choices=KINDS, default="fov", help="which crop comes before the resize")
    parser.add_argument("--workers", type=int, help="processes (default: the cores allowed)")
    return parser


def make_picture(job, kind, size):
    """(source, target) -> "", or why the source failed. Raises OSError where DST cannot be written."""
    source, target = job
    try:
        image = Image.fromarray(load_picture(source, kind, size)[0])
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{source}: cannot be read ({error.strerror}). Check the file and its permissions."
    replace_file(target, partial(image.save, format=WRITES[target.suffix.lower()], quality=95))
    return ""


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.size < SHORTEST:
        raise InputError(f"--size {args.size}: expected at least {SHORTEST}.")
    src, dst = args.src.resolve(), args.dst.resolve()
    if src.is_relative_to(dst) or dst.is_relative_to(src):
        raise InputError(f"SRC {src} and DST {dst}: the same, or one inside the other. Choose another DST.")
    sources = sorted(path for path in src.rglob("*") if path.suffix.lower() in WRITES and path.is_file())
    if not sources:
        raise InputError(f"SRC {src} is no folder that holds a picture ({' '.join(WRITES)}).")
    dst.mkdir(parents=True, exist_ok=True)
    if any((folder / "rendered.json").exists() for folder in (src, src.parent)):
        (dst / "rendered.json").write_text("{}")  # what was drawn stays marked
    jobs = [(source, dst / source.relative_to(src)) for source in sources]
    for folder in {target.parent for _, target in jobs}:
        remove_leftovers(folder)
    made = in_processes(partial(make_picture, kind=args.kind, size=args.size), jobs, args.workers)
    results = list(tqdm(made, total=len(jobs), unit="picture", disable=None))
    failures = list(filter(None, results))
    print(f"{len(jobs) - len(failures)} written to {args.dst}, {len(failures)} failed")
    written = {target for (_, target), failure in zip(jobs, results, strict=True) if not failure}
    if older := {file for file in dst.rglob("*") if file.suffix.lower() in WRITES} - written:
        print(f"note: {args.dst} also holds {len(older)} picture(s) that this call did not write")
    if failures:
        print(*failures, f"{len(failures)} of {len(jobs)} pictures failed", sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(guard(main))
