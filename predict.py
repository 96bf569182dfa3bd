"""What a trained network says about pictures of your own.

    python predict.py --ckpt best.pt left.jpg right.jpg

prints a table of probabilities and writes prediction.png (pictures, heat maps, bars). A folder or a CSV instead of the
pictures gives predictions.csv: ID, a probability per label, the predicted labels. This is not a medical device.
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import engine
import figures
import models
import pictures
from augment import prepare_batch
from cache import replace_file
from dataset import full_names
from errors import Formatter, InputError, guard
from features import live_data, loader_workers
from samplers import Batches

NO_DEVICE = "Not a medical device: for research and teaching only, never for a diagnosis."
RENDERED = "Trained on RENDERED pictures: what it says about a real eye or knee means nothing."


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("given", nargs="+", metavar="PICTURE", help="eye pairs: LEFT RIGHT, a folder of <id>_left.* and <id>_right.*, or a CSV "
                        "(LEFT,RIGHT or ID,Left-Fundus,Right-Fundus); one photograph: pictures, a folder, or a CSV (file); knees: an exam's "
                        "folder, three .npy files, a folder of axial/ coronal/ sagittal/, or a CSV (axial,coronal,sagittal). "
                        "Paths in a CSV are relative to it")
    parser.add_argument("--ckpt", required=True, help="a best.pt")
    parser.add_argument("--out", default=".", help="folder for prediction.png or predictions.csv")
    parser.add_argument("--threshold", type=float, default=0.5, help="a label is predicted above it (published); where "
                        "classes exclude each other the strongest is predicted, and there is none")
    parser.add_argument("--batch", type=int, default=32, help="rows computed at a time (as test.py)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    parser.add_argument("--precision", choices=["auto", *engine.PRECISIONS], help="default: as the run was asked to")
    parser.add_argument("--workers", type=int, help="processes that decode pictures (default: the cores allowed)")
    return parser


def predict_rows(model, run, rows, part, num_labels, task, args, device):
    """Probabilities (n, K), computed as test.py computes them: fast trunk, classifier in float32.

    In fp32 they are test.py's to 1e-5. In bf16 and fp16 a kernel may sum in another order in a batch of another size, and a
    feature then rounds the other way (0.4 % in bf16). Measured on a CPU with AMX, 40 eye pairs, 8 labels, bf16: at most 3e-7
    from test.py's, in batches of 32 and of 1; bf16 itself was up to 0.17 from fp32, with a trunk of random weights.
    """
    precision = engine.pick_precision(args.precision or run.precision, device, run.model)
    targets = np.zeros((len(rows), num_labels), np.float32) if task == "multilabel" else np.zeros(len(rows), np.int64)  # not looked at
    data = live_data(run, part, rows, targets)
    loader = engine.make_loader(data, Batches(np.arange(len(rows)), args.batch), loader_workers(run, device, data), device)
    fast = models.with_fast_trunk(model, precision).to(device)
    return engine.predict(fast, loader, functools.partial(prepare_batch, device=device), engine.Criterion(task))[2]


def print_table(labels, probs, chosen, threshold):
    """A line per label: probability, a bar of 40 characters with the threshold in it, a mark where it is predicted."""
    width = max(map(len, labels))
    for label, prob, mark in zip(labels, probs, chosen, strict=True):
        bar = list(f"{'#' * round(40 * prob):.<40}")
        if threshold is not None:
            bar[min(round(40 * threshold), 39)] = "|"
        print(f"  {label:{width}}  {prob:6.4f}  {''.join(bar)}{'  <--' if mark else ''}")
    print(f"  {'':{width}}  <-- " + ("the strongest class" if threshold is None else f"above the threshold {threshold:g}, the | in the bar"))


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if not 0 <= args.threshold <= 1 or args.batch < 1:
        raise InputError(f"--threshold {args.threshold} --batch {args.batch}: expected 0 to 1, and 1 or more")

    # The network and what it is asked about
    device = engine.pick_device(args.device)
    saved, run, model = models.open_checkpoint(args.ckpt, device)
    labels, task, run.workers = saved["labels"], saved["task"], args.workers
    rendered = saved["data"]["rendered"]
    if rendered:
        print(f"{'!' * 84}\n!! {RENDERED}\n{'!' * 84}", flush=True)
    if task == "multiclass" and args.threshold != 0.5:
        raise InputError(f"--threshold {args.threshold}: the classes {', '.join(labels)} exclude each other, the strongest is predicted")
    table, many = pictures.given_rows(run.dataset, args.given)
    size, kind = run.crop or run.size, None if run.dataset == "mrnet" else run.preprocess
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # As in training the pictures are decoded once, by all processes, and mapped from disk; not kept here.
    with tempfile.TemporaryDirectory(prefix="predict-", ignore_cleanup_errors=True) as cache:
        rows, part, faults = pictures.open_given(table, kind, size, cache, args.workers)
        if rows.empty:
            shown = "; ".join(list(faults.values())[:5])
            raise InputError(f"none of the {len(table)} can be read: {shown}" if many else shown)

        # Probabilities
        probs = predict_rows(model, run, rows, part, len(labels), task, args, device)
        chosen = probs > args.threshold if task == "multilabel" else np.arange(len(labels)) == probs.argmax(1)[:, None]

        # One: a table and a picture
        if not many:
            names = full_names(run.dataset, labels)
            threshold = args.threshold if task == "multilabel" else None
            print(f"{rows['ID'][0]}, by {run.name} ({run.dataset}, {run.model}):")
            print_table(names, probs[0], chosen[0], threshold)
            pieces, shown, cams, _ = models.explain(model, pictures.single_batch((part, rows), 0, size))
            note = " ".join([*([f"From above: {'; '.join(pieces)}."] if len(pieces) > 1 else []), NO_DEVICE, *([RENDERED] if rendered else [])])
            figure = figures.prediction(shown, cams, names, probs[0], threshold, note)
            replace_file(out / "prediction.png", lambda stream: figure.savefig(stream, dpi=120, format="png", bbox_inches="tight", pad_inches=0.1))
            print(f"{out / 'prediction.png'} written. {NO_DEVICE}")
            return 0

    # Many: a table on disk
    result = pd.concat([rows["ID"], pd.DataFrame(probs.astype(np.float64), columns=labels)], axis=1)
    result["predicted"] = [";".join(label for label, yes in zip(labels, row, strict=True) if yes) for row in chosen]
    if rendered:
        result["trained_on"] = "RENDERED pictures"
    replace_file(out / "predictions.csv", lambda stream: result.to_csv(stream, index=False, float_format="%.7f"))
    print(f"{out / 'predictions.csv'}: {len(result)} predicted by {run.name} ({run.dataset}, {run.model}). {NO_DEVICE}")
    for label, count in zip(labels, chosen.sum(0), strict=True):
        print(f"  {label}: {count}")
    if faults:
        print("\n".join(faults.values()), f"{len(faults)} of {len(table)} cannot be read and are left out", sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(guard(main))
