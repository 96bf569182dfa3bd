"""What a run costs, against the plain loop that people write first, both sides in this one process, in turn.

    python benchmark.py                       # every benchmark on data/odir, or on rendered eyes where that is missing
    python benchmark.py extraction sampler    # some of them

prints a line per benchmark: medians of both sides, their ratio and its smallest and largest value. The plain loop is
float32, contiguous, one process; every picture is decoded and goes through the trunk in every epoch.
"""

import argparse
import copy
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from PIL import Image

import dataset
import engine
import metrics
import models
import preprocess
import samplers
from augment import normalise, prepare_batch
from checkpoint import describe_machine
from errors import InputError, guard
from pictures import VolumeSet

HERE = Path(__file__).parent
EPOCHS = {"0": 36, "1": 32, "2": 47, "3": 59, "4": 59, "5": 59, "6": 42, "7": 100, "11": 47, "12": 30}  # published epochs run


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--data", default="data/odir", help="ODIR folder (default: data/odir)")
    parser.add_argument("--fullsize", help="folder of full-size photographs for preprocessing (default: the first pictures of --data)")
    parser.add_argument("--mrnet", default="data/rendered/mrnet", help="MRNet folder (default: data/rendered/mrnet)")
    parser.add_argument("--pictures", type=int, default=128, help="pictures of one measurement (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side (default: 3)")
    parser.add_argument("--size", type=int, default=224, help="pixels a side (default: 224)")
    parser.add_argument("--batch", type=int, default=64, help="pictures of a training step (default: 64)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    return parser


# ---------------------------------------------------------------- measuring

def seconds(function, device):
    """Wall time of one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(plain, ours, repeats, device):
    """[seconds of `plain`], [seconds of `ours`], A B A B ... after one warm-up of each."""
    plain(), ours()
    pairs = [(seconds(plain, device), seconds(ours, device)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def line(name, plain, ours, unit=None, amount=1):
    """Print medians, ratio and spread; with `unit` both sides as `amount` per second. Returns the median ratio."""
    ratios = [a / b for a, b in zip(plain, ours, strict=True)]
    a, b = statistics.median(plain), statistics.median(ours)
    sides = f"plain {amount / a:.1f} {unit}, ours {amount / b:.1f} {unit}" if unit else f"plain {a:.2f} s, ours {b:.2f} s"
    print(f"{name}: {sides}, ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}, n={len(ratios)})", flush=True)
    return statistics.median(ratios)


def matrix_product(device, precision, n):
    """(an n x n matrix product to time, its floating-point operations): the machine's own limit in this precision."""
    a, b = (torch.randn(n, n, device=device, dtype=engine.PRECISIONS[precision]) for _ in range(2))
    times = max(1, 2**38 // (2 * n**3))
    return lambda: [a @ b for _ in range(times)], 2 * times * n**3


def trunk_operations(size):
    """Floating-point operations of ResNet-50's trunk for one picture (two per multiply-add), convolutions alone."""
    total = []
    net = torchvision.models.resnet50()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: total.append(2 * out[0].numel() * m.weight[0].numel()))
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size))
    return sum(total)


def eye_files(args, count):
    table, _, _ = dataset.read("odir", args.data)
    parts, _ = dataset.drop_missing({"all": table}, "drop")
    files = [file for row in parts["all"]["files"] for file in row]
    return [files[i % len(files)] for i in range(count)]


# ---------------------------------------------------------------- the plain side

def plain_batch(files, size):
    """Decode, resize, to tensor, normalise: one process, one picture after the other."""
    images = [torch.from_numpy(np.array(Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))) for f in files]
    return normalise(torch.stack(images).permute(0, 3, 1, 2).contiguous().float() / 255)


def plain_epoch(net, head, optimizer, files, args, device, train=True):
    """One epoch as people write it: frozen ResNet-50, both eyes, a linear head."""
    for start in range(0, len(files), 64):
        images = plain_batch(files[start:start + 64], args.size).to(device)
        with torch.no_grad():
            features = net(images).reshape(len(images) // 2, -1)
        if train:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(head(features), torch.zeros(len(features), 8, device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# ---------------------------------------------------------------- the benchmarks

def in_parts(net, images, size):
    return [net(part) for part in images.split(size)]


def extraction(args, device):
    """A frozen ResNet-50's features of pictures in memory: plain, folded in the fast precision, and compiled."""
    precision = engine.pick_precision("auto", device)
    net = torchvision.models.resnet50().eval().to(device)
    net.fc = torch.nn.Identity()
    images = torch.randn(args.pictures, 3, args.size, args.size, device=device)
    step = 16 if device.type == "cpu" else 256
    work = trunk_operations(args.size) * len(images)
    for compile in (False, True):
        fast = models.FastTrunk(net, engine.PRECISIONS[precision], compile).to(device)
        ours = functools.partial(in_parts, fast, images, step)
        with torch.inference_mode():
            first = seconds(functools.partial(fast, images[:step]), device)
            line(f"extraction {'compiled' if compile else 'eager'} ({precision}, {args.size})",
                 *in_turn(functools.partial(in_parts, net, images, 64), ours, args.repeats, device), "pictures/s", len(images))
            for n in (8192,) if device.type == "cuda" else (2048, 4096):  # the smaller one lies in a CPU's caches
                product, operations = matrix_product(device, precision, n)
                limit, taken = in_turn(product, ours, 4 * args.repeats, device)
                shares = [(work / b) / (operations / a) for a, b in zip(limit, taken, strict=True)]
                reached, possible = (amount / statistics.median(times) / 1e9 for amount, times in ((work, taken), (operations, limit)))
                print(f"  {reached:.0f} GFLOP/s, {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) "
                      f"of the {possible:.0f} of a {n} x {n} matrix product, in turn with it", flush=True)
        print(f"  first call {first:.1f} s", flush=True)


def whole_run(args, device, experiments=("3",)):
    """Experiments from nothing and again with features kept, as whole processes; the plain loop from three epochs."""
    table, _, _ = dataset.read("odir", args.data)
    parts, _ = dataset.drop_missing(dataset.split("odir", table), "drop")
    files = [file for row in parts["train"]["files"][:args.pictures] for file in row]
    net = torchvision.models.resnet50().eval().to(device)
    net.fc, head = torch.nn.Identity(), torch.nn.Linear(4096, 8).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    plain_epoch(net, head, optimizer, files[:64], args, device)
    per_picture = [seconds(lambda: plain_epoch(net, head, optimizer, files, args, device), device) / len(files) for _ in range(3)]
    pictures = 2 * (len(parts["train"]) + len(parts["val"]))
    print(f"plain epoch of {pictures} pictures: " + ", ".join(f"{value * pictures:.0f} s" for value in per_picture)
          + f" (from {len(files)} pictures each)")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", str(Path(args.data).absolute()), "--missing", "drop", "--weights", "none"]
        for again in (False, True):
            start, epochs = time.perf_counter(), 0
            for number in experiments:
                subprocess.run([sys.executable, HERE / "train.py", *experiment_flags(number), *flags, "--name", f"{number}-{again}",
                                "--device", device.type, "--epochs", str(EPOCHS[number]), "--patience", "1000"],
                               cwd=folder, check=True, stdout=subprocess.DEVNULL)
                epochs += json.loads(Path(folder, "runs", f"{number}-{again}", "run.json").read_text())["epochs_run"]
            taken = time.perf_counter() - start
            line(f"experiment(s) {' '.join(experiments)}, {epochs} epochs, {'features kept' if again else 'from nothing'}",
                 [value * pictures * epochs for value in per_picture], [taken] * 3)


def experiment_flags(number):
    """The flags of an eye-pair experiment, as its line in run_all.sh has them."""
    name = f"run odir-{int(number):02d} "
    text = next(text for text in (HERE / "run_all.sh").read_text().splitlines() if text.startswith(name))
    return text.removeprefix(name).split()


def study(args, device):
    """Experiments 0-7, 11 and 12."""
    whole_run(args, device, tuple(EPOCHS))


def preprocessing(args, device):
    """Photographs to 224: full-size arrays, against reduced-scale decoding."""
    folder = Path(args.fullsize) if args.fullsize else None
    files = sorted(map(str, folder.glob("*.jpg"))) if folder else eye_files(args, 16)
    if not files:
        raise InputError(f"--fullsize {folder}: no .jpg in it")
    differences = []
    plain, ours = in_turn(lambda: [plain_preprocess(f, 224) for f in files],
                          lambda: [preprocess.load_picture(f, "fov", 224) for f in files], args.repeats, device)
    for file in files:
        differences.append(np.abs(plain_preprocess(file, 224).astype(float) - preprocess.load_picture(file, "fov", 224)[0]).mean())
    width, height = Image.open(files[0]).size
    line(f"preprocessing {width} x {height} to 224, one core", plain, ours, "pictures/s", len(files))
    print(f"  mean difference {np.mean(differences):.2f} of 255, largest picture {max(differences):.2f}")


def plain_preprocess(file, size):
    """Decode in full, mask by arrays, crop, black out, crop, resize: what a notebook does."""
    picture = np.array(Image.open(file).convert("RGB"))
    for step in range(2):
        mask = np.array(Image.fromarray(picture).convert("L")) > 7
        picture = picture[np.ix_(mask.any(1), mask.any(0))]
        if step == 0:
            y, x = np.mgrid[:picture.shape[0], :picture.shape[1]]
            centre = picture.shape[0] // 2, picture.shape[1] // 2
            picture = picture * ((y - centre[0])**2 + (x - centre[1])**2 <= min(centre)**2)[:, :, None].astype(np.uint8)
    return np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


def sampler(args, device):
    """One epoch of the balanced sampler over a million rows, against a loop over the counts (timed on 20 000 draws)."""
    rng = np.random.default_rng(0)
    labels = (rng.random((1_000_000, 8)) < rng.uniform(0.02, 0.4, 8)).astype(np.int64)
    members = [np.flatnonzero(column) for column in labels.T]

    def plain(draws=20_000):
        counts = np.zeros(8, np.int64)
        for _ in range(draws):
            row = rng.choice(members[rng.choice(np.flatnonzero(counts == counts.min()))])
            counts += labels[row]

    ours, setting_up = timed(samplers.LabelBalancedSampler, labels)
    a, b = in_turn(plain, lambda: ours.order(0), args.repeats, device)
    line("balanced sampler, an epoch of 1 000 000 rows, 8 labels", [value * 50 for value in a], b)
    print(f"  setting it up: {setting_up:.2f} s (the plain loop's lists of rows by label are not counted either)")
    probs = rng.random((1_000_000, 8))
    print(f"  all per-label and challenge scores of 1 000 000 patients: "
          f"{seconds(lambda: [metrics.scores(f, labels, probs) for f in ('per label', 'challenge')], device):.1f} s")


def finetune(args, device):
    """A training step of the whole ResNet-50: plain float32 loop, ours from kept uint8 pictures, ours on a resident batch."""
    precision = engine.pick_precision("auto", device)
    files = eye_files(args, args.batch)
    kept = np.stack([preprocess.load_picture(file, "fov", args.size)[0] for file in files])[:, None]
    slow = torchvision.models.resnet50(num_classes=8).to(device)
    fast = copy.deepcopy(slow).to(memory_format=torch.channels_last)
    criterion, targets = engine.Criterion("multilabel"), torch.zeros(len(files), 8)
    resident = prepare_batch({"images": torch.from_numpy(kept), "targets": targets}, device)[0][0].flatten(0, 1)

    def step(net, images, context):
        with context:
            logits = net(images)
        loss = criterion(logits.float(), targets.to(device))[0].mean()
        net.zero_grad(set_to_none=True)
        loss.backward()

    def plain_step():
        step(slow, plain_batch(files, args.size).to(device), engine.autocast(device, "fp32"))

    def our_step():
        batch = prepare_batch({"images": torch.from_numpy(kept[np.arange(len(files))]), "targets": targets}, device)[0][0].flatten(0, 1)
        step(fast, batch, engine.autocast(device, precision))

    plain, ours = in_turn(plain_step, our_step, args.repeats, device)
    line(f"fine-tuning step, ResNet-50, batch {len(files)}, {args.size} ({precision})", plain, ours, "pictures/s", len(files))
    alone, ours = in_turn(lambda: step(fast, resident, engine.autocast(device, precision)), our_step, args.repeats, device)
    print(f"  share of the resident-batch step: {statistics.median(a / b for a, b in zip(alone, ours, strict=True)):.0%}")


def mrnet(args, device):
    """One training pass over exams: batch 1 in float32, contiguous, against batch 4 in the fast precision."""
    table, labels, _ = dataset.read("mrnet", args.mrnet)
    table = table[:max(4, args.pictures // 16)]
    data = VolumeSet(table["files"], dataset.targets_of(table, labels), 224)
    precision = engine.pick_precision("auto", device)
    slow = models.build_model("mrnet", 3).to(device)
    fast = copy.deepcopy(slow).to(memory_format=torch.channels_last)
    criterion = engine.Criterion("multilabel")

    def epoch(net, batch, chosen):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, weight_decay=0.01)
        for keys in samplers.Batches(np.arange(len(table)), batch):
            inputs, targets = prepare_batch(data[keys], device)
            if chosen == "fp32":
                inputs = ([plane.contiguous() for plane in inputs[0]], inputs[1])
            with engine.autocast(device, chosen):
                logits = net(*inputs)
            optimizer.zero_grad()
            criterion(logits.float(), targets)[0].mean().backward()
            optimizer.step()

    for batch in (1, 4):
        plain, ours = in_turn(lambda: epoch(slow, 1, "fp32"), lambda: epoch(fast, batch, precision), args.repeats, device)  # noqa: B023
        line(f"MRNet epoch, batch {batch}, {precision}", plain, ours, "exams/s", len(table))


def growth(args, device):
    """Annotations of 10^3 to 10^6 patients through reading, splitting, sampling and scoring: seconds and memory."""
    rng = np.random.default_rng(0)
    for n in (10**3, 10**4, 10**5, 10**6):
        labels = (rng.random((n, 8)) < 0.2).astype(int)
        sheet = pd.DataFrame(labels, columns=dataset.ODIR_LABELS)
        sheet.insert(0, "ID", np.arange(n) + 10_000)
        for side in ("Left", "Right"):
            sheet[f"{side}-Fundus"] = [f"{i}_{side.lower()}.jpg" for i in range(n)]
        with tempfile.TemporaryDirectory() as folder:
            sheet.to_csv(Path(folder, "full_df.csv"), index=False)
            table, read = timed(dataset.read, "odir", folder)
        parts, split = timed(dataset.split, "odir", table[0])
        targets = dataset.targets_of(parts["train"], table[1])
        _, sampled = timed(samplers.epoch_order, "balanced", targets, 0, 0)
        _, scored = timed(metrics.scores, "per label", targets, rng.random(targets.shape))
        print(f"{n:>9} patients: read {read:.2f} s, split {split:.2f} s, sample {sampled:.2f} s, score {scored:.2f} s; "
              f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


BENCHMARKS = {"extraction": extraction, "run": whole_run, "study": study, "preprocessing": preprocessing, "sampler": sampler,
              "finetune": finetune, "mrnet": mrnet, "growth": growth}


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        raise InputError(f"unknown benchmark {', '.join(unknown)}: expected of {', '.join(BENCHMARKS)}")
    if not Path(args.data).is_dir():
        args.data = "data/rendered/odir"
        subprocess.run([sys.executable, HERE / "render_data.py", args.data, "--dataset", "odir"], check=True)
    if not Path(args.mrnet).is_dir() and (not args.names or "mrnet" in args.names):
        subprocess.run([sys.executable, HERE / "render_data.py", args.mrnet, "--dataset", "mrnet", "--patients", "16"], check=True)
    device = engine.pick_device(args.device)
    print(f"{time.strftime('%Y-%m-%d')}, {describe_machine(device)}, {preprocess.default_workers()} cores, torch {torch.__version__}: "
          f"python benchmark.py {' '.join(sys.argv[1:])}")
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args, device)


if __name__ == "__main__":
    sys.exit(guard(main))
