"""Evaluate a checkpoint; it brings everything but the data set with it.

    python test.py --ckpt best.pt

prints scikit-learn's classification report and every score with its 95 % bootstrap interval over patients.
Writes these, probs.xlsx, ground_truth.xlsx, five pictures and, of ODIR, submission.csv (-learned: 0.5 is the
learned threshold) into the run's folder; another part, threshold or data set gets a folder of its own."""

import sys

import numpy as np
from sklearn.metrics import classification_report

import checkpoint
import dataset
import figures
import metrics
import predictor
from arguments import add_checkpoint_flags
from cache import digest, replace_file
from errors import InputError, Parser, guard

LEARNED = "per label, learned thresholds"
TITLES = {"challenge": "challenge scores (all cells flattened)"}
TITLES[LEARNED] = "per label scores at the thresholds that were learned on training patients"
FILES = "probs.xlsx ground_truth.xlsx submission.csv submission-learned.csv classification_report.txt".split()
FILES += "confusion.png roc.png reliability.png samples.png heatmaps.png test_scores.json".split()


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, nargs="+", help="a best.pt or a run's folder; several: their mean")
    add("--split", choices=["val", "test", "all"], default="val", help="the run's own part; all: every row")
    add("--threshold", type=float, default=0.5, help="a label is predicted above it (published)")
    add("--tta", action="store_true", help="mean with the mirrored pictures")
    add("--resamples", type=int, default=1000, help="bootstrap resamples of the patients")
    add_checkpoint_flags(parser, "the files")
    return parser


def evaluate(args, net):
    """The rows that are asked for, through each network -> (Part, facts, loss of the first, probs (n, K))."""
    found = []
    for member in net.members:
        member.args.cache, missing = args.cache, args.missing or member.args.missing
        part, facts = dataset.load_part(member.args, member.saved, args.split, args.data, missing)
        first = found[0][0] if found else part
        if part.ids() != first.ids() or not np.array_equal(part.targets, first.targets):
            raise InputError(f"{member.path} has another {args.split} part than {net.path}: no mean of them")
        found.append((part, facts, *member.evaluate(part, mirrored=args.tta)))
    part, facts, loss, _ = found[0]
    every = [one for _, one, *_ in found]  # what is known of a mean is what is known of any of its networks
    facts["own"] = all(one["own"] for one in every)
    facts["rendered"] |= net.rendered
    facts["duplicates"] = len(set().union(*(one["trained_on"] for one in every)))
    notes = [note for one in every for note in one["notes"]]
    # Also what was known when it was trained: that it had seen validation patients, for example.
    trained = [note for member in net.members for note in member.saved["data"]["notes"] if note not in notes]
    facts["notes"] = list(dict.fromkeys(notes + [f"in training: {note}" for note in trained]))
    return part, facts, loss, np.mean([probs for *_, probs in found], axis=0)


def output_folder(args, net, facts):
    """Where the files go: what is not the run's own published result gets a folder of its own."""
    if args.out:
        return args.out
    home = checkpoint.home_of(net.path, net.digest)
    name = f"test-{args.split}"
    if args.threshold != 0.5:
        name += f"-{args.threshold}"
    if args.tta:
        name += "-mirrored"
    if len(net.members) > 1:
        name += f"-mean-{digest(*(member.digest for member in net.members))[:6]}"
    name += facts["suffix"]
    # APTOS was published on its test part; class folders may have none.
    published = net.args.dataset == "aptos" and net.saved["rows"].get("test")
    return home if name == ("test-test" if published else "test-val") else home / name


def report_scores(part, probs, net, args):
    """Scores, 95 % intervals over patients, trivial answers and what is undefined, of each family."""
    families = {net.family: args.threshold}
    if net.args.dataset == "odir":
        families["challenge"] = args.threshold
    if net.thresholds and args.threshold == 0.5:
        families[LEARNED] = np.array(net.thresholds)
    truth, resampled = part.targets, {"n_resamples": args.resamples, "patients": part.patients()}
    result = {"scores": {}, "intervals": {}, "trivial": {}, "undefined": []}
    for name, threshold in families.items():
        family = "per label" if name == LEARNED else name
        rules = {"labels": net.labels, "threshold": threshold, "ordered": net.ordered}
        result["scores"][name] = metrics.scores(family, truth, probs, **rules)
        result["intervals"][name] = metrics.bootstrap_intervals(family, truth, probs, **resampled, **rules)
        for answer, scores in metrics.trivial_scores(truth, net.prior, family, **rules).items():
            result["trivial"].setdefault(answer, {})[name] = scores
        result["undefined"] += metrics.undefined_scores(truth, probs, net.labels, family, threshold)
    result["undefined"] = list(dict.fromkeys(result["undefined"]))
    if net.task == "multilabel":
        asked, rules = ("each label", truth, probs), {"threshold": args.threshold}
        intervals = metrics.bootstrap_intervals(*asked, **resampled, **rules)
        for name, values in (("labels", metrics.scores(*asked, **rules)), ("label_intervals", intervals)):
            result[name] = {key: dict(zip(net.labels, values[key], strict=True)) for key in ("f1", "auc")}
    result["calibration_error"] = metrics.expected_calibration_error(truth, probs)
    return result


def print_scores(result):
    for family, scores in result["scores"].items():
        print(f"\n{TITLES.get(family, f'{family} scores')}:")
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


def draw_all(part, probs, chosen, net, threshold):
    """{file name: figure}; samples and heat maps are of the first row that carries each label."""
    truth, names = net.truth(part), np.array(net.names)
    rows = list(dict.fromkeys(int(column.argmax()) for column in truth.T if column.any())) or [0]
    samples, lines = [], []
    for row in rows:
        sample = {"title": part.ids()[row], "pictures": part.shown(row)}
        sample |= {"truth": names[truth[row]].tolist(), "prediction": names[chosen[row]].tolist()}
        samples.append({**sample, "probs": dict(zip(net.names, probs[row].tolist(), strict=True))})
    asked = part.targets, probs, net.names, net.task
    drawn = {"confusion.png": figures.confusion(*asked, threshold), "roc.png": figures.roc(*asked)}
    drawn["reliability.png"] = figures.reliability(part.targets, probs)
    drawn["samples.png"] = figures.samples(samples)
    try:
        for row, sample in zip(rows, samples, strict=True):
            lines += net.map_rows(part, row, probs[row], sample["truth"])
        drawn["heatmaps.png"] = figures.heatmaps(lines, net.random_trunk)
    except InputError as error:  # a network without a map of features
        print(f"note: {error}")
    return drawn


def shifted_to_half(probs, thresholds):
    """Probabilities (n, L) mapped by straight lines so that 0.5 means the learned threshold of the label."""
    columns = zip(probs.T, thresholds, strict=True)
    shifted = np.stack([np.interp(column, [0, limit, 1], [0, 0.5, 1]) for column, limit in columns], axis=1)
    return np.where(probs > thresholds, np.maximum(shifted, np.nextafter(0.5, 1)), np.minimum(shifted, 0.5))


def write_files(out, part, probs, net, text, learned):
    """Sheets and the report; `learned`: a submission by the learned thresholds, too."""
    answers, truths = (part.table[["ID"]].reset_index(drop=True) for _ in range(2))
    answers[net.labels], truths[net.labels] = probs.astype(float), net.truth(part).astype(int)
    checkpoint.write_sheet(out / "probs.xlsx", answers)
    checkpoint.write_sheet(out / "ground_truth.xlsx", truths)
    replace_file(out / "classification_report.txt", lambda stream: stream.write(text), "w")
    if net.args.dataset == "odir":
        replace_file(out / "submission.csv", lambda stream: answers.to_csv(stream, index=False), "w")
    if net.args.dataset == "odir" and learned:
        answers[net.labels] = shifted_to_half(probs.astype(float), np.array(net.thresholds))
        replace_file(out / "submission-learned.csv", lambda stream: answers.to_csv(stream, index=False), "w")


def main(argv=None):
    # The networks and their rows
    args = get_args_parser().parse_args(argv)
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    limits = net.limits(args.threshold)
    if args.resamples < 1:
        raise InputError(f"--resamples {args.resamples}: expected 1 or more")
    if args.out and (args.out / "run.json").exists():  # whose own results would be lost
        raise InputError(f"--out {args.out} is a run's folder: give no --out, or another folder")
    part, facts, loss, probs = evaluate(args, net)
    out = output_folder(args, net, facts)
    patients, duplicates = len(set(part.patients())), facts["duplicates"]
    mark = " (RENDERED)" if facts["rendered"] else ""
    about = f"{net.title()}, {facts['where']}{mark}: {len(part)} rows, {patients} patients"
    if facts["left_out"]:
        about += f", {facts['left_out']} of {part.expected} left out"
    if duplicates:
        facts["notes"].append(f"{duplicates} row(s) hold a picture that the network was trained on")
        about += f", {duplicates} trained on"
    if args.tta:
        about += ", mean with the mirrored pictures"
    for note in facts["notes"]:
        print(f"note: {note}")
    print(f"{about}, on {net.device}")

    # Scores
    result = {"checkpoint": {"digest": net.digest, "epoch": net.saved["epoch"], "loss": net.saved["loss"]}}
    result["networks"] = [{"path": str(one.path), "digest": one.digest} for one in net.members]
    result["data"] = {name: facts[name] for name in ("root", "own", "digest", "contents", "rendered")}
    result |= {name: getattr(args, name) for name in ("split", "threshold", "tta", "resamples")}
    result |= {"rows": len(part), "expected_rows": part.expected, "patients": patients}
    result |= {"duplicates": duplicates, "precision": net.precision, "weights": net.args.weights}
    result["loss"] = loss if len(net.members) == 1 and not args.tta else None
    result["thresholds"] = dict(zip(net.labels, net.thresholds, strict=True)) if net.thresholds else None
    result |= report_scores(part, probs, net, args)
    chosen = net.chosen(probs, limits)
    predicted = chosen.argmax(1) if net.task == "multiclass" else chosen.astype(int)
    numbers = range(len(net.labels)) if len(net.labels) > 1 else [1]  # it takes one column for two classes
    rules = dict(labels=numbers, target_names=net.names, digits=4, zero_division=0)
    text = classification_report(part.targets.astype(int), predicted, **rules)
    print(text)
    print_scores(result)

    # Files
    for name in FILES:
        (out / name).unlink(missing_ok=True)  # none of another test stays beside those of this one
    decided = about if limits is None else f"{about}, threshold {args.threshold:g}"
    write_files(out, part, probs, net, f"{decided}\n\n{text}", LEARNED in result["scores"])
    for name, figure in draw_all(part, probs, chosen, net, args.threshold).items():
        if facts["rendered"]:
            figures.mark_rendered(figure)
        words = decided if name in ("confusion.png", "samples.png") else about
        if name == "heatmaps.png" and len(net.members) > 1:
            words += "; the maps are those of the first network"
        figures.caption(figure, words)
        figures.save(figure, out / name)
    checkpoint.save_json(out / "test_scores.json", result)
    print(f"\n{out}/: {', '.join(name for name in FILES if (out / name).exists())}")


if __name__ == "__main__":
    sys.exit(guard(main))
