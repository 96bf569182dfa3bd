"""Stand-ins for the five data sets: drawn fundus photographs and knee volumes whose labels can be seen and learned.

    python render_data.py data/rendered/odir --dataset odir --patients 120 --size 256

writes the data set's own layout (tables and pictures) into OUT, and OUT/rendered.json with the settings, by which what
is made from it is known as rendered. The same settings give the same bytes. Nothing about real eyes follows from it.
"""

import argparse
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from errors import Formatter, InputError, guard

VERSION = 1  # raised whenever the drawings change
ODIR_SHARES = {"N": 0.30, "D": 0.18, "G": 0.09, "C": 0.09, "A": 0.09, "H": 0.08, "M": 0.08, "O": 0.09}
KEYWORDS = {
    "D": ("mild nonproliferative retinopathy", "moderate non proliferative retinopathy"),
    "G": ("glaucoma", "suspected glaucoma"),
    "C": ("cataract",),
    "A": ("dry age-related macular degeneration", "wet age-related macular degeneration"),
    "H": ("hypertensive retinopathy",),
    "M": ("pathological myopia",),
    "O": ("retinal pigmentation", "abnormal pigment "),  # the space is in the official sheet
}
RETINA = {  # column -> sign, share
    "normal": ("N", 0.30),
    "diabetic retinopathy": ("D", 0.24),
    "glaucoma": ("G", 0.24),
    "age-related macular degeneration": ("A", 0.055),
    "cataract": ("C", 0.055),
    "hypertension": ("H", 0.055),
    "myopia": ("M", 0.055),
}
GRADE_SHARES = {0: 0.36, 1: 0.16, 2: 0.2, 3: 0.14, 4: 0.14}
# abnormal, acl, meniscus
KNEE_SHARES = {(0, 0, 0): 0.3, (1, 0, 0): 0.2, (1, 1, 0): 0.17, (1, 0, 1): 0.2, (1, 1, 1): 0.13}


def deal(shares, n, rng):
    """n draws whose counts follow the shares as closely as whole numbers can, in random order."""
    keys, weights, counts = list(shares), np.array(list(shares.values())), np.zeros(len(shares))
    for k in range(n):
        counts[np.argmax(weights * (k + 1) - counts)] += 1
    return [keys[i] for i in rng.permutation(np.repeat(np.arange(len(keys)), counts.astype(int)))]


def blend(pixels, mask, colour, strength=1.0):
    """float array (S, S, 3) with `colour` laid over it where the mask, a PIL "L" image of any size, is bright."""
    alpha = np.asarray(mask.resize(pixels.shape[1::-1], Image.Resampling.BOX), np.float32)[..., None] / 255 * strength
    return pixels + alpha * (np.asarray(colour, np.float32) - pixels)


def smooth_noise(rng, cells, size):
    """float32 array (size, size): normal noise on a grid of cells x cells, enlarged."""
    grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def dots(rng, big, centres, radii, blur=0.0):
    """Mask (big, big) of round blots; centres (n, 2) and radii (n,) in units of the picture's side."""
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    for (x, y), radius in zip(centres, radii, strict=True):
        rx, ry = radius * rng.uniform(0.8, 1.25, 2)
        draw.ellipse([(x - rx) * big, (y - ry) * big, (x + rx) * big, (y + ry) * big], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(blur * big)) if blur else mask


def scatter(rng, n, centre=(0.5, 0.5), inner=0.06, outer=0.36):
    """n points (n, 2) in a ring around the centre, in units of the picture's side."""
    angle, radius = rng.uniform(0, 2 * np.pi, n), np.sqrt(rng.uniform(inner**2, outer**2, n))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], 1)


def vessels(rng, big, disc, narrow, wavy):
    """Mask (big, big) of the vessel tree: four arcades that bend around the macula, with branches that thin out."""
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    for up in (-1, 1):
        stems = ((1.2, -1.9, 0.016), (1.3, -1.6, 0.011), (2.2, 0.9, 0.011))  # direction, bend, width
        branches = [(np.array(disc), up * (a + rng.uniform(0, 0.3)), up * bend, width, 1.0) for a, bend, width in stems]
        while branches:
            point, angle, bend, width, length = branches.pop()
            steps, phase = int(26 * length), rng.uniform(0, 6)
            for step in range(steps):
                sway = wavy * np.cos(1.5 * step + phase) + rng.normal(0, 0.05)
                angle += bend * 0.045
                end = point + 0.026 * np.array([np.cos(angle + sway), np.sin(angle + sway)])
                thick = width * narrow * (1 - 0.6 * step / steps)
                shade = int(150 + 80 * thick / 0.016)
                draw.line([*(point * big), *(end * big)], fill=shade, width=max(1, round(thick * big)))
                point = end
                if step % 6 == 4 and width > 0.004:
                    side = rng.choice([-1, 1])
                    turned = angle + side * rng.uniform(0.4, 0.9)
                    branches.append((point, turned, -side * 0.5, width * 0.5, length * 0.55))
    return mask.filter(ImageFilter.GaussianBlur(0.0012 * big))


def draw_fundus(rng, size, signs=(), grade=0, right=False):
    """One fundus photograph, PIL RGB (size, size): `signs` from D G C A H M O, `grade` 0-4 of diabetic retinopathy.

    Drawn as a left eye (disc on the left) and mirrored for a right one.
    """
    big = 2 * size
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    disc = (rng.uniform(0.2, 0.28), rng.uniform(0.44, 0.54))
    macula = (disc[0] + rng.uniform(0.3, 0.34), disc[1] + rng.uniform(0.01, 0.05))
    base = np.array([rng.uniform(170, 215), rng.uniform(80, 112), rng.uniform(28, 58)]) * rng.uniform(0.85, 1.1)
    bright = rng.uniform(0.42, 0.58, 2)
    light = 1.05 - 0.9 * ((x - bright[0]) ** 2 + (y - bright[1]) ** 2) + 0.035 * smooth_noise(rng, 9, size)
    pixels = base.astype(np.float32) * light[..., None]
    if "M" in signs:  # the choroid's vessels are seen through a bright fundus; a large pale crescent at the disc
        stripes = np.exp(-((smooth_noise(rng, 24, size) / 0.3) ** 2))[..., None]  # ridges along the noise's zero lines
        pixels = pixels * 1.12 + np.float32([28, 34, 18]) - stripes * np.float32([6, 32, 22])
        pixels = blend(pixels, dots(rng, big, [(disc[0] + 0.05, disc[1])], [0.105], 0.006), (250, 232, 190), 0.85)
    gaussian = np.exp(-((x - macula[0]) ** 2 + (y - macula[1]) ** 2) / (2 * 0.05**2))
    pixels *= 1 - 0.38 * gaussian[..., None]
    radius = rng.uniform(0.05, 0.06) * (1.2 if "G" in signs else 1)
    cup = radius * (rng.uniform(0.78, 0.88) if "G" in signs else rng.uniform(0.3, 0.42))
    pixels = blend(pixels, dots(rng, big, [disc], [radius], 0.004), (242, 186, 112), 0.9)
    narrow, wavy = (0.5, 0.75) if "H" in signs else (1, 0.05)
    pixels = blend(pixels, vessels(rng, big, disc, narrow, wavy), base * (0.62, 0.38, 0.5), 0.8)
    pixels = blend(pixels, dots(rng, big, [disc], [cup], 0.003), (255, 244, 206), 0.92)
    if "H" in signs:  # flame-shaped haemorrhages run out from the disc along the nerve fibres
        mask = Image.new("L", (big, big))
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(9, 14)):
            across = np.array([-np.sin(angle), np.cos(angle)]) * rng.uniform(0.008, 0.014)
            along = np.array([np.cos(angle), np.sin(angle)])
            near, far = disc + along * rng.uniform(0.07, 0.11), disc + along * rng.uniform(0.16, 0.22)
            corners = (near, (near + far) / 2 + across, far, (near + far) / 2 - across)
            ImageDraw.Draw(mask).polygon([tuple(corner * big) for corner in corners], fill=255)
        pixels = blend(pixels, mask.filter(ImageFilter.GaussianBlur(0.002 * big)), (128, 14, 12), 0.9)
    if "A" in signs:  # drusen, some of them run together
        n = rng.integers(35, 55)
        mask = dots(rng, big, scatter(rng, n, macula, 0, 0.13), rng.uniform(0.007, 0.016, n), 0.002)
        pixels = blend(pixels, mask, (246, 220, 130), 0.85)
    if "O" in signs:  # a naevus
        spot = scatter(rng, 1, macula, 0.15, 0.24)
        pixels = blend(pixels, dots(rng, big, spot, rng.uniform(0.075, 0.105, 1), 0.008), (52, 34, 32), 0.85)
    if "D" in signs:
        grade = rng.integers(2, 4)
    if grade:
        n = int((0, 7, 16, 30, 46)[grade] * rng.uniform(0.85, 1.15))
        mask = dots(rng, big, scatter(rng, n), rng.uniform(0.006, 0.009 + 0.002 * grade, n), 0.001)
        pixels = blend(pixels, mask, (112, 12, 10), 0.9)  # microaneurysms and haemorrhages
        for centre in scatter(rng, (0, 0, 2, 3, 4)[grade], inner=0.12, outer=0.28):  # clusters of hard exudates
            n = rng.integers(6, 11)
            mask = dots(rng, big, scatter(rng, n, centre, 0, 0.05), rng.uniform(0.005, 0.012, n))
            pixels = blend(pixels, mask, (255, 226, 96), 0.95)
    if grade == 4:  # preretinal haemorrhage: a boat with a level top
        place, width = scatter(rng, 1, inner=0.15, outer=0.25)[0], rng.uniform(0.09, 0.13)
        mask = Image.new("L", (big, big))
        box = np.array([place - width, place + width]) * big
        ImageDraw.Draw(mask).pieslice([*box.ravel()], 0, 180, fill=255)
        pixels = blend(pixels, mask.filter(ImageFilter.GaussianBlur(0.004 * big)), (96, 8, 10), 0.95)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "C" in signs:  # a clouded lens: everything blurred behind a pale haze
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.016, 0.026) * size))
        image = Image.blend(image, Image.new("RGB", image.size, (150, 138, 104)), rng.uniform(0.5, 0.62))
    pixels = np.asarray(image) + rng.normal(0, 2.5, (size, size, 1))
    eye = (x - 0.5) ** 2 + (y - 0.5) ** 2 < rng.uniform(0.475, 0.495) ** 2
    image = Image.fromarray((np.clip(pixels, 0, 255) * eye[..., None]).astype(np.uint8))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if right else image


AXIAL = ((0, 0, 104, 100, 120), (0, 0, 94, 90, 62), (0, 14, 66, 50, 40), (0, 14, 61, 45, 168))  # skin, muscle, femur
AXIAL += ((0, -58, 34, 17, 40), (0, -58, 30, 13, 172))  # patella; all are x, y, half axes (pixels), brightness
UPRIGHT = ((0, 0, 92, 160, 120), (0, 0, 82, 150, 62), (0, -62, 66, 58, 38), (0, -62, 61, 53, 170))
UPRIGHT += ((0, 66, 68, 54, 38), (0, 66, 63, 49, 160))  # skin, muscle, femur, tibia
POOLS = {"axial": ((-62, -40), (62, -40)), "coronal": ((-72, -40), (72, -40)), "sagittal": ((-70, -58),)}


def draw_knee(rng, plane, abnormal, acl, meniscus):
    """One plane of a knee exam, uint8 (slices 17-40, 256, 256). The ligament is in the middle slices of two planes,
    sagittal and coronal, the menisci in all of theirs, an abnormal knee's effusion in all three planes."""
    slices, centre = int(rng.integers(17, 41)), 128 + rng.uniform(-8, 8, 2)
    gain, noise, pool = rng.uniform(0.85, 1.1), rng.normal(0, 7, (320, 320)).astype(np.float32), rng.uniform(20, 28)
    volume = np.zeros((slices, 256, 256), np.uint8)
    for k, t in enumerate(np.linspace(-1, 1, slices)):
        scale = 1 - 0.28 * t * t
        ellipses, lines, wedges = list(AXIAL if plane == "axial" else UPRIGHT), [], []
        if plane != "axial":  # menisci: dark wedges; a torn one is bright inside
            wedges = [[(side * 70, -9), (side * 70, 13), (side * 30, 2)] for side in (-1, 1)]
        if abs(t) < {"axial": 0, "coronal": 0.3, "sagittal": 0.45}[plane]:  # the ligament in its pale sheath
            lines = [(-24, 24, 26, -32, 96, 17)]
            lines += [(-24, 24, -9, 7, 12, 9), (9, -13, 26, -32, 12, 9)] if acl else [(-24, 24, 26, -32, 12, 9)]
        late = [(0, -3, 19, 15, 222)] if acl and lines else []  # oedema where the torn ligament's middle was
        late += [(54, 2, 13, 6, 235)] if meniscus and wedges and abs(t) < 0.85 else []
        late += [(x, y, 0.6 * pool, pool, 240) for x, y in POOLS[plane]] if abnormal and abs(t) < 0.8 else []
        image = Image.new("L", (256, 256), 6)
        draw = ImageDraw.Draw(image)
        draw_ellipses(draw, ellipses, centre, scale)
        for wedge in wedges:
            draw.polygon([tuple(centre + scale * np.array(corner)) for corner in wedge], fill=14)
        for *ends, fill, width in lines:
            draw.line([*(centre + scale * np.array(ends[:2])), *(centre + scale * np.array(ends[2:]))], fill, width)
        draw_ellipses(draw, late, centre, scale)
        top, left = rng.integers(0, 64, 2)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.4)), np.float32) * gain
        volume[k] = np.clip(pixels + noise[top : top + 256, left : left + 256], 0, 255)
    return volume


def draw_ellipses(draw, ellipses, centre, scale):
    """Fills ellipses (x, y, half axes, brightness), given from the knee's centre, onto the slice."""
    for x, y, rx, ry, fill in ellipses:
        corners = centre + scale * np.array([[x - rx, y - ry], [x + rx, y + ry]])
        draw.ellipse([*corners.ravel()], fill=fill)


def save(image, path, whole=True):
    """Writes the picture; as JPEG without its end marker unless `whole`."""
    image.save(path, quality=92)
    if not whole:
        path.write_bytes(path.read_bytes()[:-2])


def write_sheet(frame, path):
    """An Excel sheet whose bytes depend on the frame alone: the dates that openpyxl stamps in are set to one day."""
    buffer = io.BytesIO()
    frame.to_excel(buffer, index=False)
    with zipfile.ZipFile(buffer) as stamped, zipfile.ZipFile(path, "w") as target:
        for name in stamped.namelist():
            content = re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+Z", b"2000-01-01T00:00:00Z", stamped.read(name))
            target.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def render_odir(out, n, size, seed):
    rng, rows, signs_of = np.random.default_rng([seed, n]), [], []
    for primary in deal(ODIR_SHARES, n, rng):
        labels = {primary}
        if primary != "N" and rng.random() < 0.25:
            labels.add(rng.choice([label for label in "DGCAHMO" if label != primary]))
        sides = {label: rng.choice(["left", "right", "both"], p=[0.2, 0.2, 0.6]) for label in sorted(labels - {"N"})}
        eyes = [[label for label in sides if sides[label] in (eye, "both")] for eye in ("left", "right")]
        words = ["，".join(str(rng.choice(KEYWORDS[label])) for label in eye) or "normal fundus" for eye in eyes]
        patient = rows[-1][0] + int(rng.integers(1, 4)) if rows else 0
        sex, age = str(rng.choice(["Female", "Male"])), int(np.clip(rng.normal(58, 12), 18, 91))
        files, ones = [f"{patient}_left.jpg", f"{patient}_right.jpg"], [int(label in labels) for label in ODIR_SHARES]
        rows.append([patient, age, sex, *files, *words, *ones])
        signs_of.append(eyes)
    columns = ["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"]
    columns += ["Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *ODIR_SHARES]
    write_sheet(pd.DataFrame(rows, columns=columns), out / "annotations.xlsx")
    (out / "images").mkdir()
    for i, (row, eyes) in enumerate(zip(tqdm(rows, desc="odir", disable=None), signs_of, strict=True)):
        for right in (False, True):
            eye = draw_fundus(np.random.default_rng([seed, i, right]), size, eyes[right], right=right)
            save(eye, out / "images" / row[3 + right])


def render_aptos(out, n, size, seed):
    rng = np.random.default_rng([seed, n])
    grades = deal(GRADE_SHARES, n, rng)
    names = [rng.bytes(6).hex() for _ in grades]
    pd.DataFrame({"id_code": names, "diagnosis": grades}).to_csv(out / "train.csv", index=False)
    (out / "train_images").mkdir()
    for i, (name, grade) in enumerate(zip(tqdm(names, desc="aptos", disable=None), grades, strict=True)):
        eye = draw_fundus(np.random.default_rng([seed, i]), size, grade=grade, right=i % 2 == 1)
        save(eye, out / "train_images" / f"{name}.png")


def render_dr(out, n, size, seed):
    rng = np.random.default_rng([seed, n])
    first = deal(GRADE_SHARES, n, rng)
    second = [int(np.clip(grade + rng.choice([-1, 0, 0, 0, 0, 1]), 0, 4)) for grade in first]  # a pair is alike
    levels = [level for pair in zip(first, second, strict=True) for level in pair]
    names = [f"{10 + patient}_{eye}" for patient in range(n) for eye in ("left", "right")]
    pd.DataFrame({"image": names, "level": levels}).to_csv(out / "trainLabels.csv", index=False)
    for i, (name, level) in enumerate(zip(tqdm(names, desc="dr", disable=None), levels, strict=True)):
        eye = draw_fundus(np.random.default_rng([seed, i]), size, grade=level, right=i % 2 == 1)
        save(eye, out / f"{name}.jpeg", whole=i % 40 != 7)  # as one in forty of the real ones is found


def render_retina(out, n, size, seed):
    rng, rows = np.random.default_rng([seed, n]), []
    (out / "train").mkdir(), (out / "test").mkdir()
    unlabelled = max(1, n // 4)
    columns = deal({name: share for name, (_, share) in RETINA.items()}, n, rng)
    columns += [str(name) for name in rng.choice(list(RETINA), unlabelled, p=[share for _, share in RETINA.values()])]
    for i, column in enumerate(tqdm(columns, desc="retina", disable=None)):
        present = {column}
        if column != "normal" and rng.random() < 0.1:
            present.add(str(rng.choice([name for name in RETINA if name not in ("normal", column)])))
        signs = [RETINA[name][0] for name in RETINA if name in present]
        name = f"{i:05d}.jpg"
        eye = draw_fundus(np.random.default_rng([seed, i]), size, signs, right=bool(rng.integers(2)))
        save(eye, out / ("train" if i < n else "test") / name)
        if i < n:
            rows.append([name, *(int(column in present) for column in RETINA)])
    pd.DataFrame(rows, columns=["filename", *RETINA]).to_csv(out / "train.csv", index=False)


def render_mrnet(out, n, size, seed):
    valid = max(1, n // 4)
    progress = tqdm(total=n, desc="mrnet", disable=None)
    for part, first, count in (("train", 0, n - valid), ("valid", n - valid, valid)):
        knees = deal(KNEE_SHARES, count, np.random.default_rng([seed, n, first]))
        for j, label in enumerate(("abnormal", "acl", "meniscus")):
            table = pd.DataFrame({"id": [f"{first + k:04d}" for k in range(count)], label: [knee[j] for knee in knees]})
            table.to_csv(out / f"{part}-{label}.csv", index=False, header=False)
        for p, plane in enumerate(("axial", "coronal", "sagittal")):
            (out / part / plane).mkdir(parents=True)
            for k, knee in enumerate(knees):
                volume = draw_knee(np.random.default_rng([seed, first + k, p]), plane, *knee)
                np.save(out / part / plane / f"{first + k:04d}.npy", volume)
                progress.update(1 / 3)
    progress.close()


RENDER = {"odir": render_odir, "aptos": render_aptos, "dr": render_dr, "retina": render_retina, "mrnet": render_mrnet}


def render(out, dataset, patients=120, size=256, seed=0):
    """Draws a stand-in for `dataset` into the folder `out`; False where the same one is there already.

    An older rendering with other settings is replaced, in one move at the end. Raises InputError for any other folder
    that is not empty, fewer than 8 patients or fewer than 64 pixels (the signs would be lost).
    """
    out = Path(out)
    if patients < 8 or size < 64 or seed < 0:
        raise InputError(f"patients {patients}, size {size}, seed {seed}: expected at least 8, 64 and 0.")
    settings = json.dumps({"dataset": dataset, "patients": patients, "seed": seed, "size": size, "version": VERSION})
    marker = out / "rendered.json"
    if out.exists() and not (marker.is_file() or out.is_dir() and not any(out.iterdir())):
        raise InputError(f"OUT {out} holds something that was not rendered. Choose a new folder or an empty one.")
    if marker.is_file() and marker.read_text() == settings:
        return False
    unfinished = out.resolve().with_name(f".{out.resolve().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        unfinished.mkdir(parents=True)
        RENDER[dataset](unfinished, patients, size, seed)
        (unfinished / "rendered.json").write_text(settings)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that is made: new, empty, or rendered before")
    parser.add_argument("--dataset", choices=RENDER, required=True, help="whose layout")
    parser.add_argument("--patients", type=int, default=120, help="patients, exams, or (aptos, retina) pictures")
    parser.add_argument("--size", type=int, default=256, help="side of a photograph, pixels; knees are always 256")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    made = render(args.out, args.dataset, args.patients, args.size, args.seed)
    state = "rendered" if made else "already there"
    print(f"{args.out}: {state} ({args.dataset}, {args.patients} patients, seed {args.seed})")


if __name__ == "__main__":
    sys.exit(guard(main))
