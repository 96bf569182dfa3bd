"""What a run costs, against the plain loop that people write first, the two sides in turn.

    python benchmark.py extraction sampler

prints each side's speed or seconds, the median ratio and its spread. The plain loop is float32 and
contiguous; it decodes every picture in every epoch and pushes it through the trunk."""

import copy
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import engine
import models
import preprocess
import samplers
import split
import tables
from augment import draw, prepare_batch
from checkpoint import describe_machine
from errors import Parser, guard
from features import EXTRACT_BATCH, FastTrunk

HERE = Path(__file__).parent
MATRIX = {"cpu": 4096, "cuda": 8192}  # rows of the matrices whose product is the machine's own limit
# Published epochs of the experiments with a frozen trunk whose pictures stay the same.
EPOCHS = {"00": 36, "01": 32, "02": 47, "03": 59, "04": 59, "05": 59, "06": 42, "07": 100, "11": 47, "12": 30}


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    names = [*BENCHMARKS, "all"]
    add("names", nargs="*", choices=names, default="all", metavar="NAME", help=", ".join(names))
    add("--data", type=Path, default=Path("data/odir"), help="eye pairs")
    add("--fullsize", type=Path, default=Path("data/fullsize"), help="photographs as the camera left them")
    add("--trunk", choices=["resnet50", *models.EFFICIENTNETS], default="resnet50", help="network")
    add("--pictures", type=int, default=128, help="pictures of one measurement")
    add("--size", type=int, default=224, help="pixels a side")
    add("--repeats", type=int, default=3, help="measurements of each side")
    add("--rows", type=int, default=10**6, help="of the sampler")
    return parser


def in_turn(repeats, *sides):
    """Seconds (sides, repeats): A B A B ... after a round to warm up; a GPU's queue is emptied."""
    seconds = np.zeros((repeats + 1, len(sides)))
    for turn, side in np.ndindex(seconds.shape):
        start = time.perf_counter()
        sides[side]()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds[turn, side] = time.perf_counter() - start
    return seconds[1:].T


def show(name, plain, ours, unit="s", amount=None):
    """Print both medians, in seconds or as `amount` per second; the median ratio and its spread."""
    ratios, sides = plain / ours, np.array([np.median(plain), np.median(ours)])
    sides = amount / sides if amount else sides
    spread = f"{np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f}, n={len(ratios)})"
    print(f"{name}: plain {sides[0]:.4g}, ours {sides[1]:.4g} {unit}, ratio {spread}", flush=True)


def eye_pairs(args):
    """{part: a frame of the patients that have both photographs}."""
    return split.drop_missing(split.split("odir", tables.read("odir", args.data).frame), "drop")[0]


@torch.inference_mode()
def each(function, items):
    for item in items:
        function(item)


def step(net, inputs, precision="fp32"):
    """A training step towards zeros."""
    with engine.autocast(next(net.parameters()).device, precision):
        loss = net(*inputs).float().square().mean()
    net.zero_grad()
    loss.backward()
    torch.optim.SGD(net.parameters(), lr=1e-6).step()


def plain_picture(file, kind, size):
    """A picture as the network sees it, decoded in full before it is scaled."""
    return preprocess.prepare(Image.open(file).convert("RGB"), kind, size)


def plain_epoch(net, trained, files, size, device):
    """Decode, resize, run the trunk, train the head (or all of it), batch by batch."""
    for start in range(0, len(files), 64):
        images = np.stack([plain_picture(file, "none", size) for file in files[start : start + 64]])
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
        pairs = images.unflatten(0, (-1, 2)) / 255
        with torch.no_grad():
            inputs = pairs if trained is net else net.features(pairs)
        step(trained, (inputs,))


def plain_draws(labels, draws):
    """The balanced sampler as a loop over the counts."""
    rng, counts = np.random.default_rng(0), np.zeros(labels.shape[1], np.int64)
    members = [np.flatnonzero(column) for column in labels.T]
    for _ in range(draws):
        least = rng.choice(np.flatnonzero(counts == counts.min()))
        counts += labels[rng.choice(members[least])]
    return counts


def extraction(args, device):
    """Features of pictures in memory: folded, in the fast precision, compiled; against a matrix product."""
    precision = engine.pick_precision("auto", device)
    net = models.build_trunk(args.trunk, args.size, True)[0].eval().to(device)
    loop = net
    if args.trunk in models.EFFICIENTNETS:  # as its library has it, with layers that only pad
        loop = models.efficientnet(args.trunk, args.size, True).eval().to(device)
    images = torch.randn(args.pictures, 3, args.size, args.size, device=device)
    n, batch = MATRIX.get(device.type, 4096), EXTRACT_BATCH.get(device.type, 16)
    matrix = torch.randn(n, n, device=device, dtype=engine.PRECISIONS[precision])
    for how in ("eager", "compiled"):
        fast = FastTrunk(net, precision, how == "compiled").to(device)
        sides = [partial(each, loop, images.split(64)), partial(each, fast, images.split(batch))]
        plain, ours, product = in_turn(args.repeats, *sides, partial(torch.mm, matrix, matrix))
        name = f"extraction, {args.trunk}, {args.size}, {precision}, {how}"
        show(name, plain, ours, "pictures/s", len(images))
        if args.trunk == "resnet50":  # which multiplies and adds 4.09 x 10^9 times a picture of 224 pixels
            shares = 8.18e9 * (args.size / 224) ** 2 * len(images) / ours / (2 * n**3 / product)
            limit = f"{2e-9 * n**3 / np.median(product):.0f} GFLOP/s of {n} x {n} matrices"
            print(f"  {np.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) of the {limit}")


def run(args, device, experiments=("03",)):
    """Whole processes, from nothing and with what these kept; a plain epoch before and after each."""
    parts, lines = eye_pairs(args), (HERE / "run_all.sh").read_text()
    net = models.build_model("v0", 8, "none", args.size, args.trunk).to(device).eval()
    files = parts["train"]["files"].explode().tolist()[: args.pictures]
    plain = partial(plain_epoch, net, net.classifier, files, args.size, device)
    pictures = 2 * (len(parts["train"]) + len(parts["val"]))
    factor = pictures / len(files) * sum(EPOCHS[one] for one in experiments)
    common = ["--data", args.data.resolve(), "--missing", "drop", "--trunk", args.trunk, "--patience", 1000]
    common += ["--weights", "imagenet" if args.trunk == "efficientnet-lite0" else "none", "--size", args.size]
    with tempfile.TemporaryDirectory() as folder:
        for state in ("from nothing", "kept"):
            before, start = in_turn(1, plain), time.perf_counter()
            for one in experiments:
                flags = re.search(f"^run odir-{one} (.*)", lines, re.M)[1].split()
                flags += [*common, "--epochs", EPOCHS[one], "--name", f"{one} {state}"]
                command = [sys.executable, HERE / "train.py", *map(str, flags)]
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            taken = time.perf_counter() - start
            name = f"{args.trunk}, experiments {' '.join(experiments)} {state}, whole processes"
            show(name, np.append(before, in_turn(1, plain)) * factor, taken)


def preprocessing(args, device):
    """Decoding in full against decoding at a reduced scale, to 224 pixels on one core."""
    files, seen = sorted(args.fullsize.glob("*.jpg")), {"kind": "fov", "size": 224}
    ways = [partial(each, partial(way, **seen), files) for way in (plain_picture, preprocess.load_picture)]
    show("preprocessing", *in_turn(args.repeats, *ways), "pictures/s", len(files))


def sampler(args, device):
    """An epoch of the balanced sampler, 8 labels, against a fiftieth of it by the plain loop."""
    rng = np.random.default_rng(0)
    labels = (rng.random((args.rows, 8)) < rng.uniform(0.02, 0.4, 8)).astype(np.int64)
    ours = partial(samplers.LabelBalancedSampler(labels).order, 0)
    plain, taken = in_turn(args.repeats, partial(plain_draws, labels, args.rows // 50), ours)
    show(f"balanced sampler, an epoch of {args.rows} rows", plain * 50, taken)


def finetune(args, device):
    """A step of 64 kept pictures in training's own precision and layout; what preparing these takes."""
    files = eye_pairs(args)["train"]["files"].explode().tolist()[: min(64, args.pictures)]
    kept = np.stack([preprocess.load_picture(file, "fov", args.size)[0] for file in files])
    keys = [(row, 0) for row in range(len(files) // 2)]
    batch = {"images": torch.from_numpy(kept).unflatten(0, (-1, 2)), "uniforms": draw(0, 0, keys, 2)}
    batch["targets"] = torch.zeros(len(keys), 8)
    slow = models.build_model("v0", 8, "none", args.size, args.trunk).to(device).train()
    fast = copy.deepcopy(slow).to(memory_format=torch.channels_last)
    if device.type == "cpu":
        models.depthwise_in_float32(fast)
    precision = engine.pick_precision("auto", device)
    sides = [partial(plain_epoch, slow, slow, files, args.size, device)]
    sides += [partial(step, fast, prepare_batch(batch, device)[0], precision)]
    sides += [partial(prepare_batch, batch, device, recipe) for recipe in ("none", "pair")]
    plain, ours, *preparing = in_turn(args.repeats, *sides)
    name = f"fine-tuning, {args.trunk}, {args.size}, batch {len(files)}, {precision}"
    show(name, plain, ours + preparing[0], "pictures/s", len(files))
    bare, pair = [np.median(seconds / ours) for seconds in preparing]
    print(f"  preparing a batch takes {bare:.1%} of the step on it, with --augment pair {pair:.1%}")


BENCHMARKS = {"extraction": extraction, "run": run, "study": partial(run, experiments=tuple(EPOCHS))}
BENCHMARKS |= {"preprocessing": preprocessing, "sampler": sampler, "finetune": finetune}


def main(argv=None):
    args, device = get_args_parser().parse_args(argv), engine.pick_device("auto")
    machine = f"{describe_machine(device)}, {preprocess.default_workers()} cores, torch {torch.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine}", flush=True)
    for name in BENCHMARKS if "all" in args.names else args.names:
        BENCHMARKS[name](args, device)


if __name__ == "__main__":
    sys.exit(guard(main))
