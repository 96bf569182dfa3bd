"""Evaluate a checkpoint; it brings everything but the pictures with it.

    python test.py --ckpt best.pt

prints scikit-learn's classification report and every score with its 95 % bootstrap interval over patients,
and writes probs.xlsx, ground_truth.xlsx, classification_report.txt, confusion.png, roc.png, samples.png,
heatmaps.png, reliability.png, test_scores.json (and submission.csv for ODIR) into the folder of the
checkpoint's run. Another part, threshold or data set gets a folder of its own there. Several checkpoints:
the mean of their probabilities.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import checkpoint
import dataset
import figures
import metrics
import predictor
from arguments import add_machine_flags
from cache import digest, replace_file
from errors import InputError, Parser, guard

LEARNED = "per label, learned thresholds"


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="a best.pt or a run's folder; several: their mean")
    text = "part of the run's own split; all: every row of the data set"
    add("--split", choices=["val", "test", "all"], default="val", help=text)
    add("--data", help="another folder of the same layout (default: the one that was trained on)")
    text = "missing pictures: stop, or drop their rows (default: as in the run)"
    add("--missing", choices=["stop", "drop"], help=text)
    add("--out", type=Path, help="folder for the files (default: the run's folder)")
    add("--threshold", type=float, default=0.5, help="a label is predicted above it (published)")
    add("--tta", action="store_true", help="mean with the mirrored pictures")
    add("--resamples", type=int, default=1000, help="bootstrap resamples of the patients")
    add_machine_flags(parser, precision=None)
    add("--cache", default="cache", help="folder of kept pictures and features")
    return parser


def output_folder(args, net, facts):
    """Where the files go: what is not the study's own result gets a folder of its own."""
    if args.out:
        return args.out
    home = checkpoint.home_of(checkpoint.find_checkpoint(args.ckpt[0]))
    name = f"test-{args.split}"
    if args.threshold != 0.5:
        name += f"-{args.threshold:g}"
    if args.tta:
        name += "-mirrored"
    if len(args.ckpt) > 1:
        name += f"-mean-of-{len(args.ckpt)}"
    if args.data and not facts["own"]:
        root = Path(facts["root"]).resolve()
        name += f"-{root.name}-{digest(str(root))[:6]}"
    published = "test-test" if net.args.dataset == "aptos" else "test-val"  # the part that was published
    return home if name == published else home / name


def score(family, part, probs, net, args, threshold):
    """One family's scores, 95 % intervals over patients, trivial answers and undefined scores."""
    rules = {"labels": net.labels, "threshold": threshold, "ordered": net.ordered}
    base = "per label" if family == LEARNED else family
    return {
        "scores": metrics.scores(base, part.targets, probs, **rules),
        "intervals": metrics.bootstrap_intervals(
            base, part.targets, probs, args.resamples, patients=part.patients(), **rules
        ),
        "trivial": metrics.trivial_scores(part.targets, net.prior, base, **rules),
        "undefined": metrics.undefined_scores(part.targets, probs, net.labels, base, threshold),
    }


def report_scores(part, probs, net, args):
    """Everything about the scores that test_scores.json holds."""
    families = {net.family: args.threshold}
    if net.args.dataset == "odir":
        families["challenge"] = args.threshold
    if net.thresholds and args.threshold == 0.5:
        families[LEARNED] = np.array(net.thresholds)
    result = {"scores": {}, "intervals": {}, "trivial": {}, "undefined": []}
    for family, threshold in families.items():
        found = score(family, part, probs, net, args, threshold)
        result["scores"][family], result["intervals"][family] = found["scores"], found["intervals"]
        for name, scores in found["trivial"].items():
            result["trivial"].setdefault(name, {})[family] = scores
        result["undefined"] += [text for text in found["undefined"] if text not in result["undefined"]]
    if part.targets.ndim == 2:
        each = metrics.per_label_scores(part.targets, probs, args.threshold)
        ranges = metrics.label_intervals(
            part.targets, probs, args.threshold, args.resamples, patients=part.patients()
        )
        for name, values in (("labels", each), ("label_intervals", ranges)):
            result[name] = {key: dict(zip(net.labels, values[key], strict=True)) for key in ("f1", "auc")}
    result["calibration_error"] = metrics.expected_calibration_error(part.targets, probs)
    return result


def print_scores(result):
    for family, scores in result["scores"].items():
        print(f"\n{family} scores:" if family != "challenge" else "\nchallenge scores (all cells flattened):")
        for name, value in scores.items():
            low, high = result["intervals"][family][name]
            print(f"  {name:16} {value:.4f}   95 % interval {low:.4f} to {high:.4f}")
        for name, trivial in result["trivial"].items():
            if family in trivial:
                values = ", ".join(f"{key} {value:.4f}" for key, value in trivial[family].items())
                print(f"  ({name} would score: {values})")
    for sentence in result["undefined"]:
        print(f"undefined: {sentence}")
    print(f"expected calibration error {result['calibration_error']:.4f}")


def classification_text(part, probs, net, threshold):
    """scikit-learn's report, at the same threshold as the scores."""
    from sklearn.metrics import classification_report

    if net.task == "multiclass":
        truth, predicted = part.targets, probs.argmax(1)
    else:
        truth, predicted = part.targets.astype(int), (probs > threshold).astype(int)
    numbers = range(len(net.labels))
    if net.task == "multilabel" and len(net.labels) == 1:  # scikit-learn takes one column for two classes
        truth, predicted, numbers = truth.ravel(), predicted.ravel(), [1]
    rules = dict(labels=numbers, target_names=net.names, digits=4, zero_division=0)
    return classification_report(truth, predicted, **rules)


def first_of_each(targets, num_labels):
    """The first row that carries each label, without repeats; where no row carries any, the first row."""
    carried = targets == 1 if targets.ndim == 2 else targets[:, None] == np.arange(num_labels)
    rows = [int(column.argmax()) for column in carried.T if column.any()]
    return list(dict.fromkeys(rows)) or [0]


def truth_of(part, row, net):
    """The labels that a row carries."""
    if net.task == "multiclass":
        return [net.names[part.targets[row]]]
    return [name for name, carried in zip(net.names, part.targets[row], strict=True) if carried]


def draw_samples(part, probs, net, threshold):
    rows = []
    for row in first_of_each(part.targets, len(net.labels)):
        chosen = np.flatnonzero(probs[row] > threshold) if net.task == "multilabel" else [probs[row].argmax()]
        rows.append(
            {
                "title": str(part.table["ID"].iloc[row]),
                "pictures": part.shown(row),
                "truth": truth_of(part, row, net),
                "prediction": [(net.names[k], float(probs[row, k])) for k in chosen],
                "probs": dict(zip(net.names, probs[row].tolist(), strict=True)),
                "aspect": part.aspect(row),
            }
        )
    return figures.samples(rows)


def draw_heatmaps(part, probs, net):
    """A line of class-activation maps for each picture of the first row that carries each label."""
    rows = []
    for row in first_of_each(part.targets, len(net.labels)):
        rows += net.map_rows(part, row, probs[row], truth_of(part, row, net))
    return figures.heatmaps(rows, net.random_trunk)


def shifted_to_half(answers, labels, thresholds):
    """The sheet of probabilities mapped by straight lines so that 0.5 means the learned threshold."""
    shifted = answers.copy()
    for label, limit in zip(labels, thresholds, strict=True):
        below, above = answers[label] / (2 * limit), 0.5 + (answers[label] - limit) / (2 - 2 * limit)
        shifted[label] = np.where(answers[label] <= limit, below, above)
    return shifted


def write_files(out, part, probs, net, result, text, threshold):
    """Sheets, report, pictures, test_scores.json -> their names."""
    ids = part.table["ID"].reset_index(drop=True)
    truth = part.targets if net.task == "multilabel" else np.eye(len(net.labels))[part.targets]
    answers = pd.concat([ids, pd.DataFrame(probs.astype(np.float64), columns=net.labels)], axis=1)
    truths = pd.concat([ids, pd.DataFrame(truth.astype(int), columns=net.labels)], axis=1)
    checkpoint.write_sheet(out / "probs.xlsx", answers)
    checkpoint.write_sheet(out / "ground_truth.xlsx", truths)
    written = ["probs.xlsx", "ground_truth.xlsx", "classification_report.txt", "test_scores.json"]
    if net.args.dataset == "odir":
        submission = answers
        if net.thresholds:
            submission = shifted_to_half(answers, net.labels, net.thresholds)
        replace_file(out / "submission.csv", lambda stream: submission.to_csv(stream, index=False), "w")
        written.append("submission.csv")
    replace_file(out / "classification_report.txt", lambda stream: stream.write(text), "w")
    pictures = {
        "confusion.png": figures.confusion(part.targets, probs, net.names, net.task, threshold),
        "roc.png": figures.roc(part.targets, probs, net.names, net.task),
        "reliability.png": figures.reliability(part.targets, probs),
        "samples.png": draw_samples(part, probs, net, threshold),
    }
    try:
        pictures["heatmaps.png"] = draw_heatmaps(part, probs, net)
    except InputError as error:  # a network without a map of features
        print(f"note: {error}")
    for name, figure in pictures.items():
        if result["data"]["rendered"]:
            figures.mark_rendered(figure)
        replace_file(out / name, lambda stream, figure=figure: figure.savefig(stream, dpi=110, format="png"))
    checkpoint.save_json(out / "test_scores.json", result)
    return [*written, *pictures]


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if not 0 <= args.threshold <= 1 or args.resamples < 1:
        given = f"--threshold {args.threshold} --resamples {args.resamples}"
        raise InputError(f"{given}: expected 0 to 1, and 1 or more")

    # The networks and their rows
    found = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    members = getattr(found, "members", [found])
    net, probs = members[0], 0
    if net.task == "multiclass" and args.threshold != 0.5:
        classes = f"the classes {', '.join(net.labels)} exclude each other, the strongest is predicted"
        raise InputError(f"--threshold {args.threshold}: {classes}")
    for member in members:
        member.args.cache, missing = args.cache, args.missing or member.args.missing
        part, facts = dataset.load_part(member.args, member.saved, args.split, args.data, missing)
        loss, own = member.evaluate(part, mirrored=args.tta)
        probs = probs + own / len(members)
    for note in facts["notes"]:
        print(f"note: {note}")
    rendered = " (RENDERED)" if facts["rendered"] else ""
    left = f", {facts['left_out']} of {part.expected} left out" if facts["left_out"] else ""
    rows = f"{len(part)} rows, {len(np.unique(part.patients()))} patients{left}"
    machine = f"{net.args.model} on {net.device} in {net.precision}"
    print(f"{net.args.dataset}{rendered}, {args.split}: {rows}; {machine}")
    duplicates = net.saved["data"]["duplicates"]
    if duplicates:
        print(f"note: {duplicates} validation row(s) were trained on too (--duplicates keep)")
    if args.split == "all" and facts["own"]:
        print("note: all rows include those it was trained on: these scores are no measure of it")

    # Scores
    if len(members) > 1:
        net.thresholds = None  # they belong to one network
    result = {
        "checkpoint": {"digest": net.digest, "epoch": net.saved["epoch"], "loss": net.saved["loss"]},
        "data": {name: facts[name] for name in ("root", "rendered", "own")},
        **{
            "split": args.split,
            "threshold": args.threshold,
            "rows": len(part),
            "expected_rows": part.expected,
        },
        **{
            "patients": len(np.unique(part.patients())),
            "precision": net.precision,
            "tta": args.tta,
            "networks": len(members),
        },
        **{"weights": net.args.weights, "loss": loss, "duplicates": duplicates},
        "thresholds": dict(zip(net.labels, net.thresholds, strict=True)) if net.thresholds else None,
        **report_scores(part, probs, net, args),
    }
    result["data"]["digest"] = net.saved["data"]["digest"] if facts["own"] else digest(part.ids())
    text = classification_text(part, probs, net, args.threshold)
    print(text)
    print_scores(result)

    # Files
    out = output_folder(args, net, facts)
    out.mkdir(parents=True, exist_ok=True)
    written = write_files(out, part, probs, net, result, text, args.threshold)
    print(f"\n{out}/: {', '.join(written)}")


if __name__ == "__main__":
    sys.exit(guard(main))
