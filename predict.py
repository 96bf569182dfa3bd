"""What a trained network says about pictures of your own.

    python predict.py --ckpt best.pt left.jpg right.jpg

prints a table of probabilities and writes prediction.png (pictures, heat maps, bars). A folder, a CSV or
several pictures give predictions.csv: ID, a probability per label, the predicted labels. This is not a
medical device.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import checkpoint
import figures
import predictor
import tables
from arguments import add_machine_flags
from cache import file_stem, replace_file
from errors import InputError, Parser, guard

NO_DEVICE = "Not a medical device: for research and teaching only, never for a diagnosis."
RENDERED = "Trained on RENDERED pictures: what it says about a real eye or knee means nothing."
GIVEN = (
    "eye pairs: LEFT RIGHT, a folder of <id>_left.* and <id>_right.*, or a CSV (LEFT,RIGHT or "
    "ID,Left-Fundus,Right-Fundus); one photograph: pictures, a folder, or a CSV (file); knees: an exam's "
    "folder, three .npy files, a folder of axial/ coronal/ sagittal/, or a CSV (axial,coronal,sagittal). Paths "
    "in a CSV are relative to it"
)


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("given", nargs="*", metavar="PICTURE", help=GIVEN)
    add("--ckpt", required=True, nargs="+", help="a best.pt or a run's folder; several: their mean")
    add("--out", type=Path, default=Path("."), help="folder for prediction.png or predictions.csv")
    text = "a label is predicted above it (published); classes that exclude each other have none"
    add("--threshold", type=float, default=0.5, help=text)
    add("--learned", action="store_true", help="the thresholds that the run learned on its training patients")
    add("--tta", action="store_true", help="mean with the mirrored pictures")
    add("--figures", action="store_true", help="of many: a picture each, too")
    add_machine_flags(parser, precision=None)
    return parser


def print_table(net, probs, chosen, thresholds):
    """A line per label: probability, a bar of 40 characters with the threshold in it, a mark where it is
    predicted.
    """
    width = max(map(len, net.names))
    for k, (name, prob) in enumerate(zip(net.names, probs, strict=True)):
        bar = list(f"{'#' * round(40 * prob):.<40}")
        if thresholds is not None:
            bar[min(round(40 * thresholds[k]), 39)] = "|"
        print(f"  {name:{width}}  {prob:6.4f}  {''.join(bar)}{'  <--' if chosen[k] else ''}")
    words = "the strongest class" if thresholds is None else "above its threshold, the | in the bar"
    print(f"  {'':{width}}  <-- {words}")


def draw(net, row, probs, thresholds, name, out):
    """One patient's answer as a picture: heat maps of the network that gave the numbers."""
    part, _ = net.open_rows([row])
    maps = net.explain(part, 0)
    notes = [NO_DEVICE]
    if len(maps) > 1:
        notes.insert(0, f"From above: {'; '.join(piece for piece, _, _ in maps)}.")
    if net.random_trunk:
        notes.append("The trunk has random weights: its maps mean nothing.")
    if net.rendered:
        notes.append(RENDERED)
    pictures, cams = [picture for _, picture, _ in maps], [list(found.values()) for _, _, found in maps]
    figure = figures.prediction(
        pictures, cams, net.names, probs, thresholds, f"{name}. {' '.join(notes)}", part.aspect(0)
    )
    how = {"dpi": 120, "format": "png", "bbox_inches": "tight", "pad_inches": 0.1}
    replace_file(out, lambda stream: figure.savefig(stream, **how))


def choose_thresholds(args, net):
    """(L,) or None for classes that exclude each other."""
    if net.task == "multiclass":
        if args.threshold != 0.5 or args.learned:
            classes = f"the classes {', '.join(net.labels)} exclude each other, the strongest is predicted"
            raise InputError(f"--threshold, --learned: {classes}")
        return None
    if not args.learned:
        return np.full(len(net.labels), args.threshold)
    if net.thresholds is None or len(args.ckpt) > 1:
        raise InputError(
            "--learned: no thresholds were learned (train with --folds or --calibration-fraction)"
        )
    return np.array(net.thresholds)


def get_args(argv):
    """Parsed flags. What follows the checkpoints of --ckpt and is none itself is a picture."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    count = 1
    while count < len(args.ckpt) and checkpoint.find_checkpoint(args.ckpt[count]).suffix == ".pt":
        count += 1
    args.given, args.ckpt = [*args.ckpt[count:], *args.given], args.ckpt[:count]
    if not args.given:
        parser.error("expected pictures, a folder or a CSV")
    return args


def main(argv=None):
    args = get_args(argv)
    if not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: expected 0 to 1")

    # The networks and what they are asked about
    found = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    members = getattr(found, "members", [found])
    net = members[0]
    if net.rendered:
        line = "!" * 84
        print(f"{line}\n!! {RENDERED}\n{line}", flush=True)
    thresholds = choose_thresholds(args, net)
    frame, many = tables.given_rows(net.args.dataset, args.given)
    rows, ids = list(frame["files"]), frame["ID"].astype(str).tolist()
    args.out.mkdir(parents=True, exist_ok=True)

    # Probabilities
    probs, faults = 0, {}
    for member in members:
        own, faults = member.answer(rows, args.tta)
        probs = probs + own / len(members)
    if len(faults) == len(rows):
        shown = "; ".join(list(faults.values())[:5])
        raise InputError(f"none of the {len(rows)} can be read: {shown}" if many else shown)
    readable = [row for row in range(len(rows)) if row not in faults]
    strongest = np.arange(len(net.labels)) == probs.argmax(1)[:, None]
    chosen = strongest if thresholds is None else probs > thresholds
    name = f"{checkpoint_name(net)} ({net.args.dataset}, {net.args.model})"

    # One: a table and a picture
    if not many:
        print(f"{ids[0]}, by {name}:")
        print_table(net, probs[0], chosen[0], thresholds)
        draw(net, rows[0], probs[0], thresholds, ids[0], args.out / "prediction.png")
        print(f"{args.out / 'prediction.png'} written. {NO_DEVICE}")
        return 0

    # Many: a sheet, and on request a picture each
    result = pd.concat([frame["ID"], pd.DataFrame(probs.astype(np.float64), columns=net.labels)], axis=1)
    answers = []
    for row in chosen:
        answers.append(";".join(label for label, yes in zip(net.labels, row, strict=True) if yes))
    result["predicted"] = answers
    if net.rendered:
        result["trained_on"] = "RENDERED pictures"
    result = result.iloc[readable]
    path = args.out / "predictions.csv"
    replace_file(path, lambda stream: result.to_csv(stream, index=False, float_format="%.7f"), "w")
    print(f"{path} written: {len(readable)} predicted by {name}. {NO_DEVICE}")
    for label, count in zip(net.labels, chosen[readable].sum(0), strict=True):
        print(f"  {label}: {count}")
    if args.figures:
        for row in readable:
            picture = args.out / f"{file_stem(ids[row])}.png"
            draw(net, rows[row], probs[row], thresholds, ids[row], picture)
        print(f"{len(readable)} pictures written into {args.out}")
    if faults:
        print("\n".join(faults.values()), file=sys.stderr)
        print(f"{len(faults)} of {len(rows)} cannot be read and are left out", file=sys.stderr)
    return 1 if faults else 0


def checkpoint_name(net):
    """The run that a network comes from, as it called itself."""
    return net.saved["args"]["name"]


if __name__ == "__main__":
    sys.exit(guard(main))
