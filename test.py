"""Evaluate a checkpoint; it brings everything but the pictures with it.

    python test.py --ckpt best.pt

prints scikit-learn's classification report and every score with its 95 % bootstrap interval over patients.
Writes probs.xlsx, ground_truth.xlsx, classification_report.txt, confusion.png, roc.png, samples.png,
heatmaps.png, reliability.png, test_scores.json (and submission.csv for ODIR) into the folder of the run.
Another part, threshold or data set gets a folder of its own there. Several checkpoints: their mean.
"""

import sys
from pathlib import Path

import numpy as np

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


def evaluate(args, net):
    """The rows that are asked for, through each network -> (Part, facts, loss of the first, probs (n, K))."""
    found = []
    for member in net.members:
        member.args.cache, missing = args.cache, args.missing or member.args.missing
        part, facts = dataset.load_part(member.args, member.saved, args.split, args.data, missing)
        found.append((part, facts, *member.evaluate(part, mirrored=args.tta)))
    part, facts, loss, _ = found[0]
    for member, (other, *_) in zip(net.members, found, strict=True):
        if other.ids() != part.ids() or not np.array_equal(other.targets, part.targets):
            rule = "a mean needs the same rows, which no network was trained on"
            raise InputError(f"{member.path} has another {args.split} part than {net.path}: {rule}")
    return part, facts, loss, np.mean([probs for *_, probs in found], axis=0)


def output_folder(args, net, facts):
    """Where the files go: what is not the run's own published result gets a folder of its own."""
    if args.out:
        return args.out
    home = checkpoint.home_of(checkpoint.find_checkpoint(args.ckpt[0]))
    name = f"test-{args.split}"
    if args.threshold != 0.5:
        name += f"-{args.threshold:g}"
    if args.tta:
        name += "-mirrored"
    if len(net.members) > 1:
        name += f"-mean-{digest(*(member.digest for member in net.members))[:6]}"
    if not facts["own"]:
        root = Path(facts["root"]).resolve()
        name += f"-{root.name}-{digest(str(root))[:6]}"
    published = "test-test" if net.args.dataset == "aptos" else "test-val"
    return home if name == published else home / name


# ---------------------------------------------------------------- scores


def report_scores(part, probs, net, args):
    """Scores, 95 % intervals over patients, trivial answers and what is undefined, of each family."""
    families = {net.family: args.threshold}
    if net.args.dataset == "odir":
        families["challenge"] = args.threshold
    if net.thresholds and args.threshold == 0.5:
        families[LEARNED] = np.array(net.thresholds)
    truth, patients = part.targets, part.patients()
    result = {"scores": {}, "intervals": {}, "trivial": {}, "undefined": []}
    for name, threshold in families.items():
        family = "per label" if name == LEARNED else name
        rules = {"labels": net.labels, "threshold": threshold, "ordered": net.ordered}
        resampled = {"n_resamples": args.resamples, "patients": patients, **rules}
        result["scores"][name] = metrics.scores(family, truth, probs, **rules)
        result["intervals"][name] = metrics.bootstrap_intervals(family, truth, probs, **resampled)
        for answer, scores in metrics.trivial_scores(truth, net.prior, family, **rules).items():
            result["trivial"].setdefault(answer, {})[name] = scores
        result["undefined"] += metrics.undefined_scores(truth, probs, net.labels, family, threshold)
    result["undefined"] = list(dict.fromkeys(result["undefined"]))
    if net.task == "multilabel":
        each = metrics.per_label_scores(truth, probs, args.threshold)
        ranges = metrics.label_intervals(truth, probs, args.threshold, args.resamples, patients=patients)
        for name, values in (("labels", each), ("label_intervals", ranges)):
            result[name] = {key: dict(zip(net.labels, values[key], strict=True)) for key in ("f1", "auc")}
    result["calibration_error"] = metrics.expected_calibration_error(truth, probs)
    return result


def print_scores(result):
    titles = {"challenge": "challenge scores (all cells flattened)"}
    titles[LEARNED] = "per label scores at the thresholds that were learned on training patients"
    for family, scores in result["scores"].items():
        print(f"\n{titles.get(family, f'{family} scores')}:")
        for name, value in scores.items():
            low, high = result["intervals"][family][name]
            print(f"  {name:16} {value:.4f}   95 % interval {low:.4f} to {high:.4f}")
        for name, answer in result["trivial"].items():
            if family in answer:
                values = ", ".join(f"{key} {value:.4f}" for key, value in answer[family].items())
                print(f"  ({name} would score: {values})")
    for sentence in result["undefined"]:
        print(f"undefined: {sentence}")
    print(f"expected calibration error {result['calibration_error']:.4f}")


def classification_text(part, chosen, net):
    """scikit-learn's report of what is predicted, `chosen` (n, K)."""
    from sklearn.metrics import classification_report

    truth, numbers = part.targets.astype(int), range(len(net.labels))
    predicted = chosen.astype(int) if net.task == "multilabel" else chosen.argmax(1)
    if net.task == "multilabel" and len(net.labels) == 1:  # scikit-learn takes one column for two classes
        truth, predicted, numbers = truth.ravel(), predicted.ravel(), [1]
    rules = dict(labels=numbers, target_names=net.names, digits=4, zero_division=0)
    return classification_report(truth, predicted, **rules)


# ---------------------------------------------------------------- files


def draw_samples(part, probs, chosen, net, rows):
    samples = []
    for row in rows:
        answers = list(zip(net.names, probs[row].tolist(), strict=True))
        sample = {"title": part.ids()[row], "pictures": part.shown(row), "aspect": part.aspect(row)}
        sample["truth"] = [net.names[k] for k in np.flatnonzero(net.truth(part)[row])]
        sample["prediction"] = [answers[k] for k in np.flatnonzero(chosen[row])]
        samples.append({**sample, "probs": dict(answers)})
    return figures.samples(samples)


def draw_all(part, probs, chosen, net, threshold):
    """{file name: figure}; samples and heat maps are of the first row that carries each label."""
    truth = net.truth(part)
    rows = [int(column.argmax()) for column in truth.T if column.any()]
    rows = list(dict.fromkeys(rows)) or [0]
    drawn = {
        "confusion.png": figures.confusion(part.targets, probs, net.names, net.task, threshold),
        "roc.png": figures.roc(part.targets, probs, net.names, net.task),
        "reliability.png": figures.reliability(part.targets, probs),
        "samples.png": draw_samples(part, probs, chosen, net, rows),
    }
    lines = []
    try:
        for row in rows:
            lines += net.map_rows(part, row, probs[row], truth[row])
        drawn["heatmaps.png"] = figures.heatmaps(lines, net.random_trunk)
    except InputError as error:  # a network without a map of features
        print(f"note: {error}")
    return drawn


def shifted_to_half(probs, thresholds):
    """Probabilities (n, L) mapped by straight lines so that 0.5 means the learned threshold of the label."""
    shifted = np.empty(probs.shape)
    for k, limit in enumerate(thresholds):
        shifted[:, k] = np.interp(probs[:, k], [0, limit, 1], [0, 0.5, 1])
    yes = probs > thresholds
    return np.where(yes, np.maximum(shifted, np.nextafter(0.5, 1)), np.minimum(shifted, 0.5))


def write_files(out, part, probs, net, text):
    """Sheets and the report -> their names."""
    ids = part.table[["ID"]].reset_index(drop=True)
    answers, truths = ids.copy(), ids.copy()
    answers[net.labels], truths[net.labels] = probs.astype(float), net.truth(part).astype(int)
    checkpoint.write_sheet(out / "probs.xlsx", answers)
    checkpoint.write_sheet(out / "ground_truth.xlsx", truths)
    replace_file(out / "classification_report.txt", lambda stream: stream.write(text), "w")
    written = ["probs.xlsx", "ground_truth.xlsx", "classification_report.txt"]
    if net.args.dataset == "odir":
        if net.thresholds:
            answers[net.labels] = shifted_to_half(probs.astype(float), np.array(net.thresholds))
        replace_file(out / "submission.csv", lambda stream: answers.to_csv(stream, index=False), "w")
        written.append("submission.csv")
    return written


def main(argv=None):
    # The networks and their rows
    args = get_args_parser().parse_args(argv)
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    limits = net.limits(args.threshold)
    if args.resamples < 1:
        raise InputError(f"--resamples {args.resamples}: expected 1 or more")
    part, facts, loss, probs = evaluate(args, net)
    patients, duplicates = len(set(part.patients())), net.saved["data"]["duplicates"]
    for note in facts["notes"]:
        print(f"note: {note}")
    if duplicates:
        print(f"note: {duplicates} validation row(s) were trained on too (--duplicates keep)")
    if args.split == "all" and facts["own"]:
        print("note: all rows include those it was trained on: these scores are no measure of it")
    rendered = facts["rendered"] or net.rendered
    left = f", {facts['left_out']} of {part.expected} left out" if facts["left_out"] else ""
    machine = f"{net.args.model} on {net.device} in {net.precision}"
    about = f"{net.args.dataset}{' (RENDERED)' if rendered else ''}, {args.split}: {len(part)} rows"
    print(f"{about}, {patients} patients{left}; {machine}")

    # Scores
    result = {"checkpoint": {"digest": net.digest, "epoch": net.saved["epoch"], "loss": net.saved["loss"]}}
    result["networks"] = [{"path": str(one.path), "digest": one.digest} for one in net.members]
    result["data"] = {"root": facts["root"], "rendered": rendered, "own": facts["own"]}
    result["data"]["digest"] = dataset.data_digest({args.split: part.table}, net.labels)
    if facts["own"]:
        result["data"]["digest"] = net.saved["data"]["digest"]
    result |= {"split": args.split, "threshold": args.threshold, "tta": args.tta}
    result |= {"rows": len(part), "expected_rows": part.expected, "patients": patients}
    result |= {"precision": net.precision, "weights": net.args.weights, "duplicates": duplicates}
    result |= {"loss": loss if len(net.members) == 1 and not args.tta else None, "thresholds": None}
    if net.thresholds:
        result["thresholds"] = dict(zip(net.labels, net.thresholds, strict=True))
    result |= report_scores(part, probs, net, args)
    chosen = net.chosen(probs, limits)
    text = classification_text(part, chosen, net)
    print(text)
    print_scores(result)

    # Files
    out = output_folder(args, net, facts)
    written = write_files(out, part, probs, net, text)
    for name, figure in draw_all(part, probs, chosen, net, args.threshold).items():
        if rendered:
            figures.mark_rendered(figure)
        replace_file(out / name, lambda stream, figure=figure: figure.savefig(stream, dpi=110, format="png"))
        written.append(name)
    checkpoint.save_json(out / "test_scores.json", result)
    print(f"\n{out}/: {', '.join([*written, 'test_scores.json'])}")


if __name__ == "__main__":
    sys.exit(guard(main))
