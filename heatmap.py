"""Where a network looks: Grad-CAM on its last convolution, laid over the picture, all classes side by side.

    python heatmap.py --ckpt best.pt left.jpg right.jpg
    python heatmap.py --ckpt best.pt --split val --per-label 8

writes one PNG per picture (eye pairs: per patient; knees: per exam, each plane's slice with the strongest answer) into
heatmaps/ of the run's folder: <picture>.png, or <label>-<ID>.png for the rows of a split.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

import checkpoint
import dataset
import engine
import figures
import models
import pictures
from cache import replace_file
from errors import Formatter, InputError, guard


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("given", nargs="*", metavar="PICTURE", help="as predict.py takes them: LEFT RIGHT, photographs, an exam, a folder or a CSV")
    parser.add_argument("--ckpt", required=True, help="a best.pt")
    parser.add_argument("--split", choices=["val", "test", "all"], help="instead of pictures: rows of this part of the run's own split")
    parser.add_argument("--data", help="with --split: another folder of the same layout (default: the one that was trained on)")
    parser.add_argument("--per-label", type=int, default=8, help="with --split: the first so many rows that carry each label")
    parser.add_argument("--out", help="folder for the PNGs (default: heatmaps/ in the run's folder)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    parser.add_argument("--workers", type=int, help="processes that decode pictures (default: the cores allowed)")
    return parser


def rows_per_label(saved, run, args):
    """The first --per-label rows of the split that carry each label -> (their table, [labels of each row], truth (n, K))."""
    root, labels = args.data or saved["data"]["root"], saved["labels"]
    table, found, notes = dataset.read(run.dataset, root, labels if run.dataset in ("retina", "mrnet") else None)
    if found != labels:
        raise InputError(f"{root} has the classes {', '.join(found)}; this network was trained on {', '.join(labels)}")
    for note in notes:
        print(f"note: {note}")
    table = checkpoint.choose_rows(table, saved, args.split, args.data)
    targets = dataset.targets_of(table, labels)
    carried = targets == 1 if saved["task"] == "multilabel" else targets[:, None] == np.arange(len(labels))
    chosen = carried & (carried.cumsum(0) <= args.per_label)
    for label, count in zip(labels, chosen.sum(0), strict=True):
        if not count:
            print(f"nobody in this part carries {label}")
    wanted = chosen.any(1)
    labels_of = [[label for label, yes in zip(labels, row, strict=True) if yes] for row in chosen[wanted]]
    return table[wanted].reset_index(drop=True), labels_of, carried[wanted]


def file_names(ids, labels_of):
    """A name for each row and label, without what a file name cannot hold; a second one of the same name gets -2."""
    taken, names = {}, []
    for name, labels in zip(ids, labels_of, strict=True):
        stem = re.sub(r"\.(png|jpe?g|tiff?|bmp)$", "", str(name), flags=re.IGNORECASE)
        row = []
        for label in labels:
            plain = re.sub(r"[^\w.-]+", "_", f"{label}-{stem}" if label else stem).lstrip(".")
            taken[plain.lower()] = number = taken.get(plain.lower(), 0) + 1
            row.append(f"{plain}-{number}.png" if number > 1 else f"{plain}.png")
        names.append(row)
    return names


def draw(model, source, row, run, saved, truth):
    """The figure of one row: a line per picture, eye or plane, the picture first, then every class with its probability.
    What is true, where that is known, stands in brackets."""
    names, shown, maps, logits = models.explain(model, pictures.single_batch(source, row, run.crop or run.size))
    probs = engine.Criterion(saved["task"]).probs(logits[None])[0].tolist()
    classes = [f"[{label}] {prob:.2f}" if yes else f"{label} {prob:.2f}" for label, prob, yes in zip(saved["labels"], probs, truth, strict=True)]
    figure = figures.heatmaps(shown, maps, [[f"{source[1]['ID'][row]} {name}".strip(), *classes] for name in names])
    return figures.mark_rendered(figure, "a network trained on RENDERED pictures") if saved["data"]["rendered"] else figure


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if bool(args.given) == bool(args.split) or args.data and not args.split or args.per_label < 1:
        raise InputError("expected either pictures or --split; --data goes with --split, --per-label is 1 or more")

    # The network, and the rows that are asked about
    device = engine.pick_device(args.device)
    saved, run, model = models.open_checkpoint(args.ckpt, device)
    if args.split:
        table, labels_of, truth = rows_per_label(saved, run, args)
    else:
        table, _ = pictures.given_rows(run.dataset, args.given)
        labels_of, truth = [[""]] * len(table), np.zeros((len(table), len(saved["labels"])), bool)
    out = Path(args.out) if args.out else checkpoint.home_of(run, args.ckpt) / "heatmaps"
    print(f"{run.name} ({run.dataset}, {run.model}{', trained on RENDERED pictures' if saved['data']['rendered'] else ''}): {len(table)} rows")

    # A figure for each
    with tempfile.TemporaryDirectory(prefix="heatmap-", ignore_cleanup_errors=True) as cache:
        kind = None if run.dataset == "mrnet" else run.preprocess
        rows, part, faults = pictures.open_given(table, kind, run.crop or run.size, cache, args.workers)
        if faults:
            raise InputError(f"{len(faults)} of {len(table)} cannot be read: " + "; ".join(list(faults.values())[:5]))
        written = 0
        for row, names in engine.progress(enumerate(file_names(rows["ID"], labels_of)), "heat maps", total=len(rows)):
            figure = draw(model, (part, rows), row, run, saved, truth[row])
            for name in names:
                replace_file(out / name, lambda stream, figure=figure: figure.savefig(stream, dpi=110, format="png", bbox_inches="tight"))
                written += 1
    print(f"{written} PNGs in {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
