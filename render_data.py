"""Stand-ins for the five data sets: fundus photographs and knee volumes whose labels can be seen and learned.

    python render_data.py data/rendered/odir --dataset odir --patients 120 --size 256

writes the data set's own layout and the marker rendered.json. The same flags give the same pictures."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from errors import InputError, Parser, guard

VERSION = 2  # raised whenever the drawings change
ODIR_SHARES = {"N": 0.30, "D": 0.18, "G": 0.09, "C": 0.09, "A": 0.09, "H": 0.08, "M": 0.08, "O": 0.09}
KEYWORDS = {"G": ["glaucoma", "suspected glaucoma"], "O": ["retinal pigmentation", "abnormal pigment "]}
KEYWORDS |= {"D": ["mild nonproliferative retinopathy", "moderate non proliferative retinopathy"]}
KEYWORDS |= {"A": ["dry age-related macular degeneration", "wet age-related macular degeneration"]}
KEYWORDS |= {"C": ["cataract"], "H": ["hypertensive retinopathy"], "M": ["pathological myopia"]}
RETINA = {"normal": "N", "diabetic retinopathy": "D", "glaucoma": "G"}  # column -> sign
RETINA |= {"age-related macular degeneration": "A", "cataract": "C", "hypertension": "H", "myopia": "M"}
RETINA_SHARES = dict(zip(RETINA, (0.30, 0.24, 0.24, 0.055, 0.055, 0.055, 0.055), strict=True))
GRADE_SHARES = {0: 0.36, 1: 0.16, 2: 0.2, 3: 0.14, 4: 0.14}  # below: (abnormal, acl, meniscus)
KNEE_SHARES = {(0, 0, 0): 0.3, (1, 0, 0): 0.2, (1, 1, 0): 0.17, (1, 0, 1): 0.2, (1, 1, 1): 0.13}


def ellipse(x, y, rx, ry, *style):
    return "ellipse", ((x - rx, y - ry), (x + rx, y + ry)), *style


# Pixels from a knee's centre, and brightness: leg, two bones with their rims, the ligament in its sheath.
KNEE = [ellipse(0, 0, 92, 160, 62), ellipse(0, -62, 66, 58, 170, 38, 5), ellipse(0, 66, 68, 54, 160, 38, 5)]
KNEE += [("polygon", ((s * 70, -9), (s * 70, 13), (s * 30, 2)), 14) for s in (-1, 1)]  # menisci
LIGAMENT = [("line", ((-24, 24), (26, -32)), 96, 17), ("line", ((-24, 24), (26, -32)), 12, 9)]
PLANES = {"axial": 0, "coronal": 0.3, "sagittal": 0.45}  # share of the slices that show the ligament


def deal(shares, n, rng):
    """n draws whose counts follow the shares as closely as whole numbers can, in random order."""
    keys, weights, counts = list(shares), np.array(list(shares.values())), np.zeros(len(shares))
    for k in range(n):
        counts[np.argmax(weights * (k + 1) - counts)] += 1
    return [keys[i] for i in rng.permutation(np.repeat(np.arange(len(keys)), counts.astype(int)))]


def smooth_noise(rng, cells, size):
    """float32 array (size, size): normal noise on a grid of cells x cells, enlarged."""
    grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def scatter(rng, n, centre=(0.5, 0.5), inner=0.06, outer=0.36):
    """n points (n, 2) in a ring around the centre, in units of the picture's side."""
    angle, radius = rng.uniform(0, 2 * np.pi, n), np.sqrt(rng.uniform(inner**2, outer**2, n))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], 1)


def paint(pixels, shapes, colour, blur=0.0):
    """float array (S, S, 3) with shapes in (red, green, blue, strength); lengths in units of its side."""
    big = 2 * len(pixels)
    mask = Image.new("L", (big, big))
    for kind, corners, *style in shapes:
        getattr(ImageDraw.Draw(mask), kind)([*(np.ravel(corners) * big)], *style)
    mask = mask.filter(ImageFilter.GaussianBlur(blur * big)).resize(pixels.shape[1::-1], Image.Resampling.BOX)
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    return pixels + alpha * colour[3] * (np.asarray(colour[:3], np.float32) - pixels)


def blots(pixels, rng, centres, radius, colour, blur=0.0):
    """`paint` of round blots around centres (n, 2); radius: a number, or the range it is drawn from."""
    radii = rng.uniform(*radius, len(centres)) if np.ndim(radius) else [radius] * len(centres)
    halves = [size * rng.uniform(0.8, 1.25, 2) for size in radii]
    shapes = [ellipse(*centre, *half, 255) for centre, half in zip(centres, halves, strict=True)]
    return paint(pixels, shapes, colour, blur)


def vessels(rng, big, disc, narrow, wavy):
    """Lines of vessels that bend around the macula, with branches that thin out."""
    for up in (-1, 1):
        branches = []
        for direction, bend, width in ((1.2, -1.9, 0.016), (1.3, -1.6, 0.011), (2.2, 0.9, 0.011)):
            branches.append((np.array(disc), up * (direction + rng.uniform(0, 0.3)), up * bend, width, 1.0))
        while branches:
            point, angle, bend, width, length = branches.pop()
            steps, phase = int(26 * length), rng.uniform(0, 6)
            for step in range(steps):
                sway = wavy * np.cos(1.5 * step + phase) + rng.normal(0, 0.05)
                angle += bend * 0.045
                start, point = point, point + 0.026 * np.array([np.cos(angle + sway), np.sin(angle + sway)])
                thick = width * narrow * (1 - 0.6 * step / steps)
                yield "line", (start, point), int(150 + 80 * thick / 0.016), max(1, round(thick * big))
                if step % 6 == 4 and width > 0.004:
                    side, turn = rng.choice([-1, 1]), rng.uniform(0.4, 0.9)
                    branches.append((point, angle + side * turn, -side * 0.5, width * 0.5, length * 0.55))


def draw_fundus(rng, size, signs=(), grade=0, right=False):
    """One photograph, PIL RGB (size, size): `signs` from DGCAHMO, `grade` 0-4; a right eye is mirrored."""
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    disc = (rng.uniform(0.2, 0.28), rng.uniform(0.44, 0.54))
    macula = (disc[0] + rng.uniform(0.3, 0.34), disc[1] + rng.uniform(0.01, 0.05))
    base = rng.uniform((170, 80, 28), (215, 112, 58)) * rng.uniform(0.85, 1.1)
    light = 1.05 - 0.9 * ((x - rng.uniform(0.42, 0.58, 1)) ** 2 + (y - rng.uniform(0.42, 0.58, 1)) ** 2)
    pixels = base.astype(np.float32) * (light + 0.035 * smooth_noise(rng, 9, size))[..., None]
    if "M" in signs:  # the choroid's vessels, where noise crosses zero, and a large pale crescent at the disc
        stripes = np.exp(-((smooth_noise(rng, 24, size) / 0.3) ** 2))[..., None]
        pixels = pixels * 1.12 + np.float32([28, 34, 18]) - stripes * np.float32([6, 32, 22])
        pixels = blots(pixels, rng, [(disc[0] + 0.05, disc[1])], 0.105, (250, 232, 190, 0.85), 0.006)
    pixels *= 1 - 0.38 * np.exp(-((x - macula[0]) ** 2 + (y - macula[1]) ** 2) / (2 * 0.05**2))[..., None]
    radius = rng.uniform(0.05, 0.06) * (1.2 if "G" in signs else 1)
    cup = radius * (rng.uniform(0.78, 0.88) if "G" in signs else rng.uniform(0.3, 0.42))
    pixels = blots(pixels, rng, [disc], radius, (242, 186, 112, 0.9), 0.004)
    tree = vessels(rng, 2 * size, disc, *((0.5, 0.75) if "H" in signs else (1, 0.05)))
    pixels = paint(pixels, tree, (*(base * (0.62, 0.38, 0.5)), 0.8), 0.0012)
    pixels = blots(pixels, rng, [disc], cup, (255, 244, 206, 0.92), 0.003)
    if "H" in signs:  # flame-shaped haemorrhages run out from the disc along the nerve fibres
        flames = []
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(9, 14)):
            along = np.array([np.cos(angle), np.sin(angle)])
            across = np.array([-np.sin(angle), np.cos(angle)]) * rng.uniform(0.008, 0.014)
            near, far = disc + along * rng.uniform(0.07, 0.11), disc + along * rng.uniform(0.16, 0.22)
            flames.append(("polygon", (near, (near + far) / 2 + across, far, (near + far) / 2 - across), 255))
        pixels = paint(pixels, flames, (128, 14, 12, 0.9), 0.002)
    if "A" in signs:  # drusen, some of them run together
        drusen = scatter(rng, rng.integers(35, 55), macula, 0, 0.13)
        pixels = blots(pixels, rng, drusen, (0.007, 0.016), (246, 220, 130, 0.85), 0.002)
    if "O" in signs:
        naevus = scatter(rng, 1, macula, 0.15, 0.24)
        pixels = blots(pixels, rng, naevus, (0.075, 0.105), (52, 34, 32, 0.85), 0.008)
    grade = rng.integers(2, 4) if "D" in signs else grade
    if grade:  # microaneurysms and haemorrhages, then clusters of hard exudates
        spots = scatter(rng, int((0, 7, 16, 30, 60)[grade] * rng.uniform(0.85, 1.15)))
        pixels = blots(pixels, rng, spots, (0.006, 0.009 + 0.002 * grade), (112, 12, 10, 0.9), 0.001)
        for centre in scatter(rng, (0, 0, 2, 3, 6)[grade], inner=0.12, outer=0.28):
            spots = scatter(rng, rng.integers(6, 11), centre, 0, 0.05)
            pixels = blots(pixels, rng, spots, (0.005, 0.012), (255, 226, 96, 0.95))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if "C" in signs:  # a clouded lens: everything blurred behind a pale haze
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.016, 0.026) * size))
        image = Image.blend(image, Image.new("RGB", image.size, (150, 138, 104)), rng.uniform(0.5, 0.62))
    pixels = np.asarray(image) + rng.normal(0, 2.5, (size, size, 1))
    eye = (x - 0.5) ** 2 + (y - 0.5) ** 2 < rng.uniform(0.475, 0.495) ** 2
    image = Image.fromarray((np.clip(pixels, 0, 255) * eye[..., None]).astype(np.uint8))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if right else image


def draw_knee(rng, plane, abnormal, acl, meniscus):
    """One plane of a knee exam, uint8 (slices 17-40, 256, 256); an abnormal knee holds pools of fluid."""
    volume, noise = np.zeros((rng.integers(17, 41), 256, 256), np.uint8), rng.normal(0, 7, (256, 256))
    centre, gain, pool = 128 + rng.uniform(-8, 8, 2), rng.uniform(0.85, 1.1), rng.uniform(20, 28)
    for k, t in enumerate(np.linspace(-1, 1, len(volume))):
        shapes = [*KNEE]
        if abs(t) < PLANES[plane]:  # torn: oedema in its middle
            shapes += [*LIGAMENT, ellipse(0, -3, 19, 15, 222)] if acl else LIGAMENT
        if meniscus and plane != "axial" and abs(t) < 0.85:
            shapes += [ellipse(54, 2, 13, 6, 235)]
        if abnormal and abs(t) < 0.8:
            shapes += [ellipse(x, -40, 0.6 * pool, pool, 240) for x in (-70, 70)]
        image = Image.new("L", (256, 256), 6)
        for kind, corners, *style in shapes:
            corners = centre + (1 - 0.28 * t * t) * np.array(corners)
            getattr(ImageDraw.Draw(image), kind)([*corners.ravel()], *style)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.4)), np.float32) * gain
        volume[k] = np.clip(pixels + np.roll(noise, rng.integers(0, 256, 2), (0, 1)), 0, 255)
    return volume


# Each layout writes its tables and yields its pictures: file, key of its random numbers, what is to be seen.
def odir_layout(out, n, rng):
    rows, patient = [], 0
    for primary in deal(ODIR_SHARES, n, rng):
        signs = {primary} - {"N"}
        if signs and rng.random() < 0.25:
            signs.add(rng.choice([label for label in "DGCAHMO" if label != primary]))
        sides = {sign: rng.choice(["left", "right", "both"], p=[0.2, 0.2, 0.6]) for sign in sorted(signs)}
        eyes, words = [], []
        for eye in ("left", "right"):
            eyes.append([sign for sign in sides if sides[sign] in (eye, "both")])
            words.append("，".join(str(rng.choice(KEYWORDS[sign])) for sign in eyes[-1]) or "normal fundus")
        patient += int(rng.integers(1, 4)) if rows else 0
        sex, age = str(rng.choice(["Female", "Male"])), int(np.clip(rng.normal(58, 12), 18, 91))
        files = [f"{patient}_left.jpg", f"{patient}_right.jpg"]
        for right in (0, 1):
            yield f"images/{files[right]}", [len(rows), right], (eyes[right], 0, right)
        rows.append([patient, age, sex, *files, *words, *(int(one in (signs or "N")) for one in ODIR_SHARES)])
    columns = ["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"]
    columns += ["Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *ODIR_SHARES]
    pd.DataFrame(rows, columns=columns).to_excel(out / "annotations.xlsx", index=False)


def aptos_layout(out, n, rng):
    grades = deal(GRADE_SHARES, n, rng)
    names = [rng.bytes(6).hex() for _ in grades]
    pd.DataFrame({"id_code": names, "diagnosis": grades}).to_csv(out / "train.csv", index=False)
    for i, name in enumerate(names):
        yield f"train_images/{name}.png", [i], ((), grades[i], i % 2)


def dr_layout(out, n, rng):
    grades = np.repeat(deal(GRADE_SHARES, n, rng), 2)
    grades[1::2] = np.clip(grades[1::2] + rng.choice([-1, 0, 0, 0, 0, 1], n), 0, 4)  # a pair is alike
    names = [f"{10 + k}_{side}" for k in range(n) for side in ("left", "right")]
    pd.DataFrame({"image": names, "level": grades}).to_csv(out / "trainLabels.csv", index=False)
    for i, name in enumerate(names):
        yield f"{name}.jpeg", [i], ((), grades[i], i % 2)


def retina_layout(out, n, rng):
    rows, columns = [], deal(RETINA_SHARES, n, rng)
    columns += list(rng.choice(list(RETINA), n // 4, p=list(RETINA_SHARES.values())))
    for i, column in enumerate(columns):
        present = {column}
        if column != "normal" and rng.random() < 0.1:
            present.add(rng.choice([name for name in RETINA if name not in ("normal", column)]))
        rows.append([f"{i:05d}.jpg", *(int(name in present) for name in RETINA)])
        signs = [sign for name, sign in RETINA.items() if name in present]
        yield f"{'train' if i < n else 'test'}/{i:05d}.jpg", [i], (signs, 0, rng.integers(2))
    pd.DataFrame(rows[:n], columns=["filename", *RETINA]).to_csv(out / "train.csv", index=False)


def mrnet_layout(out, n, rng):
    for part, first, count in (("train", 0, n - n // 4), ("valid", n - n // 4, n // 4)):
        names = [f"{first + k:04d}" for k in range(count)]
        knees = deal(KNEE_SHARES, count, rng)
        for j, task in enumerate(("abnormal", "acl", "meniscus")):
            pd.Series([knee[j] for knee in knees], names).to_csv(out / f"{part}-{task}.csv", header=False)
        for k, knee in enumerate(knees):
            for p, plane in enumerate(PLANES):
                yield f"{part}/{plane}/{names[k]}.npy", [first + k, p], (plane, *knee)


LAYOUTS = dict(odir=odir_layout, aptos=aptos_layout, dr=dr_layout, retina=retina_layout, mrnet=mrnet_layout)


def render(out, dataset, patients=120, size=256, seed=0):
    """Draw `dataset` into the folder `out`, in one move at the end; False where the same one is there."""
    out = Path(out).resolve()
    if patients < 8 or size < 64 or seed < 0:
        raise InputError(f"patients {patients}, size {size}, seed {seed}: expected at least 8, 64 and 0.")
    settings = {"dataset": dataset, "patients": patients, "seed": seed, "size": size, "version": VERSION}
    marker, text = out / "rendered.json", json.dumps(settings)
    if marker.is_file() and marker.read_text() == text:
        return False
    if out.exists() and not marker.is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"OUT {out} holds something that was not rendered. Choose a new or an empty folder.")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        unfinished.mkdir(parents=True)
        pictures = LAYOUTS[dataset](unfinished, patients, np.random.default_rng([seed, patients]))
        for i, (file, key, shown) in enumerate(tqdm(pictures, desc=dataset, disable=None)):
            path, rng = unfinished / file, np.random.default_rng([seed, *key])
            path.parent.mkdir(parents=True, exist_ok=True)
            if dataset == "mrnet":
                np.save(path, draw_knee(rng, *shown))
            else:
                draw_fundus(rng, size, *shown).save(path, quality=92)
            if dataset == "dr" and i % 40 == 7:  # without its end marker, as one in forty of the real ones
                path.write_bytes(path.read_bytes()[:-2])
        (unfinished / marker.name).write_text(text)
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder: new, empty, or rendered before")
    parser.add_argument("--dataset", choices=LAYOUTS, required=True, help="whose layout")
    parser.add_argument("--patients", type=int, default=120, help="or exams, or pictures (aptos, retina)")
    parser.add_argument("--size", type=int, default=256, help="side of a photograph, pixels; knees have 256")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures")
    return parser


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    state = "rendered" if render(**vars(args)) else "already there"
    print(f"{args.out}: {state} ({args.dataset}, {args.patients} patients, seed {args.seed})")


if __name__ == "__main__":
    sys.exit(guard(main))
