"""Evaluate a checkpoint; it brings everything but the pictures with it.

    python test.py --ckpt best.pt

prints scikit-learn's classification report and every score with its 95 % bootstrap interval over patients, and writes
probs.xlsx, ground_truth.xlsx, classification_report.txt, confusion.png, roc.png, samples.png, heatmaps.png,
test_scores.json (and submission.csv for ODIR) into the run's folder, into a folder of its own for another split.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import checkpoint
import dataset
import engine
import figures
import metrics
import models
import pictures
from errors import Formatter, InputError, guard
from features import TrunkFeatures, evaluate


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--ckpt", required=True, help="a best.pt")
    parser.add_argument("--split", choices=["val", "test", "all"], default="val", help="part of the run's own split; all: every row of the data set")
    parser.add_argument("--data", help="another folder of the same layout (default: the one that was trained on)")
    parser.add_argument("--missing", choices=["stop", "drop"], help="missing pictures: stop, or drop their rows (default: as in the run)")
    parser.add_argument("--out", help="folder for the files (default: the run's folder)")
    parser.add_argument("--threshold", type=float, default=0.5, help="a label is predicted above it (published)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of the patients")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    parser.add_argument("--precision", choices=["auto", *engine.PRECISIONS], help="default: as the run was asked to")
    parser.add_argument("--workers", type=int, help="processes that decode pictures (default: the cores allowed)")
    parser.add_argument("--cache", help="folder of kept pictures and features (default: the run's)")
    return parser


def draw_heatmaps(model, source, targets, labels, task, size):
    """A row of class-activation maps for the first patient of every label; what is true stands in brackets."""
    shown, maps, titles = [], [], []
    for row in pictures.first_of_each(targets, len(labels), task):
        names, panels, cams, _ = models.explain(model, pictures.single_batch(source, row, size))
        true = targets[row] == 1 if task == "multilabel" else np.arange(len(labels)) == targets[row]
        shown += panels
        maps += cams
        titles += [[f"{source[1]['ID'].iloc[row]} {name}", *(f"[{label}]" if yes else label for label, yes in zip(labels, true, strict=True))]
                   for name in names]
    return figures.heatmaps(shown, maps, titles)


def report_scores(families, targets, probs, labels, prior, args):
    """Every family's scores, 95 % intervals, trivial answers and undefined scores, as test_scores.json holds them."""
    result = {"scores": {}, "intervals": {}, "trivial": {}, "undefined": []}
    for family in families:
        result["scores"][family] = metrics.scores(family, targets, probs, labels, args.threshold)
        result["intervals"][family] = metrics.bootstrap_intervals(family, targets, probs, args.resamples, labels=labels, threshold=args.threshold)
        result["undefined"] += [s for s in metrics.undefined_scores(targets, probs, labels, family, args.threshold) if s not in result["undefined"]]
        for name, scores in metrics.trivial_scores(targets, prior, family, labels, args.threshold).items():
            result["trivial"].setdefault(name, {})[family] = scores
    if targets.ndim == 2:
        per_label = metrics.per_label_scores(targets, probs, args.threshold)
        result["labels"] = {score: dict(zip(labels, per_label[score], strict=True)) for score in ("f1", "auc")}
    return result


def print_scores(result):
    for family, scores in result["scores"].items():
        print(f"\n{family} scores:" if family != "challenge" else "\nchallenge scores (all cells flattened):")
        for name, value in scores.items():
            low, high = result["intervals"][family][name]
            print(f"  {name:16} {value:.4f}   95 % interval {low:.4f} to {high:.4f}")
        for name, trivial in result["trivial"].items():
            if family in trivial:
                print(f"  ({name} would score: " + ", ".join(f"{k} {v:.4f}" for k, v in trivial[family].items()) + ")")
    for sentence in result["undefined"]:
        print(f"undefined: {sentence}")


def main(argv=None):
    args = get_args_parser().parse_args(argv)

    if not 0 <= args.threshold <= 1 or args.resamples < 1:
        raise InputError(f"--threshold {args.threshold} --resamples {args.resamples}: expected 0 to 1, and 1 or more")

    # The run, from its checkpoint alone
    device = engine.pick_device(args.device)
    saved, run, model = models.open_checkpoint(args.ckpt, device)
    labels, task = saved["labels"], saved["task"]
    if task == "multiclass" and args.threshold != 0.5:
        raise InputError(f"--threshold {args.threshold}: the classes {', '.join(labels)} exclude each other, the strongest is predicted")
    run.cache, run.workers, run.missing = args.cache or run.cache, args.workers, args.missing or run.missing
    precision = engine.pick_precision(args.precision or run.precision, device, run.model)
    size = run.crop or run.size

    # Its data
    root = args.data or saved["data"]["root"]
    table, found, notes = dataset.read(run.dataset, root, labels if run.dataset in ("retina", "mrnet") else None)
    if found != labels:
        raise InputError(f"{root} has the classes {', '.join(found)}; this network was trained on {', '.join(labels)}")
    for note in notes:
        print(f"note: {note}")
    rows, left_out = dataset.drop_missing({"": checkpoint.choose_rows(table, saved, args.split, args.data, run.missing)}, run.missing)
    kind = None if run.dataset == "mrnet" else run.preprocess
    rows, part, unreadable = pictures.open_part(rows[""], kind, size, run.cache, run.workers, run.missing)
    if rows.empty:
        raise InputError("no row is left to evaluate")
    targets = dataset.targets_of(rows, labels)
    rendered = dataset.is_rendered(root)
    print(f"{run.dataset}{' (RENDERED)' if rendered else ''}, {args.split}: {len(rows)} rows"
          + (f", {left_out + unreadable} left out" if left_out + unreadable else "") + f"; {run.model} on {device} in {precision}")
    if args.split == "all" and not args.data:
        print("note: all rows include those it was trained on: these scores are no measure of it")

    # Where the files go: what is no result of the study gets a folder of its own
    home, usual = checkpoint.home_of(run, args.ckpt), args.split == "val" and not args.data and args.threshold == 0.5
    out = Path(args.out) if args.out else home if usual else home / (f"test-{args.split}" + f"-{args.threshold:g}" * (args.threshold != 0.5))
    out.mkdir(parents=True, exist_ok=True)

    # Probabilities
    features = TrunkFeatures(model, precision, run.compile, device, run.cache)
    loss, targets, probs = evaluate(run, model, features, part, rows, targets, engine.Criterion(task), precision, device)

    # Scores
    families = ["per label", "challenge"] if run.dataset == "odir" else [saved["family"]]
    result = {"split": args.split, "threshold": args.threshold, "n": len(rows), "rendered": rendered, "loss": loss, "checkpoint": str(args.ckpt),
              **report_scores(families, targets, probs, labels, np.array(saved["prior"]), args)}
    from sklearn.metrics import classification_report
    names = dataset.full_names(run.dataset, labels)
    predictions = probs > args.threshold if task == "multilabel" else probs.argmax(1)
    rows_of = (targets.astype(int), predictions.astype(int))
    if task == "multilabel" and len(labels) == 1:  # scikit-learn takes one column for two classes: the label is class 1
        rows_of = tuple(column.ravel() for column in rows_of)
    text = classification_report(*rows_of, labels=[1] if rows_of[0].ndim == 1 and task == "multilabel" else range(len(labels)), digits=4,
                                 zero_division=0, target_names=names)
    print(text)
    print_scores(result)

    # Files
    ids = rows["ID"].reset_index(drop=True)
    truth = targets if task == "multilabel" else np.eye(len(labels), dtype=int)[targets]
    prob_sheet = pd.concat([ids, pd.DataFrame(probs.astype(np.float64), columns=labels)], axis=1)
    checkpoint.write_sheet(out / "probs.xlsx", prob_sheet)
    checkpoint.write_sheet(out / "ground_truth.xlsx", pd.concat([ids, pd.DataFrame(truth.astype(int), columns=labels)], axis=1))
    if run.dataset == "odir":
        prob_sheet.to_csv(out / "submission.csv", index=False)
    (out / "classification_report.txt").write_text(text)
    source = (part, rows)
    for file, figure in (("confusion.png", figures.confusion(targets, probs, names, task, args.threshold)),
                         ("roc.png", figures.roc(targets, probs, names, task)),
                         ("samples.png", figures.samples(pictures.examples(source, targets, probs, labels, task, args.threshold))),
                         ("heatmaps.png", draw_heatmaps(model, source, targets, labels, task, size))):
        if rendered:
            figures.mark_rendered(figure)
        figure.savefig(out / file, dpi=110)
    checkpoint.save_json(out / "test_scores.json", result)
    print(f"\n{out}/: probs.xlsx, ground_truth.xlsx, classification_report.txt, confusion.png, roc.png, samples.png, heatmaps.png, test_scores.json"
          + (", submission.csv" if run.dataset == "odir" else ""))


if __name__ == "__main__":
    sys.exit(guard(main))
