"""What a trained network says about pictures of your own.

    python predict.py --ckpt best.pt left.jpg right.jpg

prints a table of probabilities and writes prediction.png (pictures, heat maps, bars). A folder, a CSV or
several pictures give predictions.csv: ID, a probability per label, the predicted labels, the network.

What it takes depends on what the network was trained on. Eye pairs: LEFT RIGHT, a folder of <id>_left.* and
<id>_right.*, or a CSV (LEFT,RIGHT or ID,Left-Fundus,Right-Fundus). Photographs: pictures, a folder, or a CSV
(file). Knees: an exam's folder, three .npy files, a folder of axial/ coronal/ sagittal/, or a CSV
(axial,coronal,sagittal). Paths in a CSV are relative to it. This is not a medical device."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

import figures
import predictor
import tables
from arguments import add_machine_flags
from cache import replace_file
from errors import InputError, Parser, guard

NO_DEVICE = "Not a medical device: for research and teaching only, never for a diagnosis."
RENDERED = "RENDERED pictures, in training or here: this says nothing about a real eye or knee."


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("given", nargs="*", metavar="PICTURE", help="pictures, a folder or a CSV, as described above")
    add("--ckpt", required=True, nargs="+", help="a best.pt or a run's folder; several: their mean")
    add("--out", type=Path, default=Path("."), help="folder for prediction.png or predictions.csv")
    add("--threshold", type=float, default=0.5, help="a label is predicted above it (published)")
    add("--learned", action="store_true", help="the thresholds that the run learned on its training patients")
    add("--tta", action="store_true", help="mean with the mirrored pictures")
    add("--figures", action="store_true", help="of several pictures too: one with heat maps for each")
    add_machine_flags(parser.add_argument)
    return parser


def print_table(names, probs, chosen, thresholds):
    """A line per label: probability, a bar of 40 characters with the threshold, a mark if predicted."""
    width = max(map(len, names))
    for k, (name, prob) in enumerate(zip(names, probs, strict=True)):
        bar = list(f"{'#' * round(40 * prob):.<40}")
        if thresholds is not None:
            bar[min(round(40 * thresholds[k]), 39)] = "|"
        print(f"  {name:{width}}  {prob:6.4f}  {''.join(bar)}{'  <--' if chosen[k] else ''}")
    words = "the strongest class" if thresholds is None else "above its threshold, the | in the bar"
    print(f"  {'':{width}}  <-- {words}")


def draw(net, row, probs, thresholds, name, path):
    """One answer as a picture, with heat maps of the network that gave the numbers -> what was done."""
    part, _ = net.open_rows([row])
    part.table["ID"] = ""  # the note names the patient
    try:
        lines = net.map_rows(part, 0, probs)
    except InputError as error:  # a network without a map of features
        return f"no picture: {error}"
    note = f"{name}, by {net.title()}. {NO_DEVICE} Each map is scaled to its own maximum."
    if len(net.members) > 1:
        note += " The maps are those of the first."
    if net.random_trunk:
        note += " The trunk has random weights: its maps mean nothing."
    if net.rendered:
        note += f" {RENDERED}"
    figures.save(figures.prediction(lines, thresholds, note), path, dpi=120)
    return f"{path} written"


def main(argv=None):
    # The networks, and what they are asked about: what follows --ckpt and is no checkpoint is a picture
    parser = get_args_parser()
    args = parser.parse_args(argv)
    nets = [one for one in args.ckpt[1:] if one.endswith(".pt") or Path(one, "best.pt").exists()]
    given = [*(one for one in args.ckpt[1:] if one not in nets), *args.given]
    if not given:
        parser.error("expected pictures, a folder or a CSV")
    net = predictor.load([args.ckpt[0], *nets], args.device, args.precision, args.workers)
    net.rendered |= any(map(tables.is_rendered, given))
    if net.rendered:
        print(f"{'!' * 84}\n!! {RENDERED}\n{'!' * 84}", flush=True)
    thresholds = net.limits(args.threshold, args.learned)
    frame, many = tables.given_rows(net.args.dataset, given)
    probs, faults = net.answer(list(frame["files"]), args.tta)
    left_out = f"{len(faults)} of {len(frame)} cannot be read"
    if len(faults) == len(frame):
        raise InputError(f"{left_out}: {'; '.join(list(faults.values())[:5])}")
    frame, probs = frame.drop(frame.index[list(faults)]), np.delete(probs, list(faults), axis=0)
    chosen, ids = net.chosen(probs, thresholds), frame["ID"].astype(str).tolist()

    if not many:
        print(f"{ids[0]}, by {net.title()}:")
        print_table(net.names, probs[0], chosen[0], thresholds)
        print(draw(net, frame["files"].iloc[0], probs[0], thresholds, ids[0], args.out / "prediction.png"))
    else:
        path, table = args.out / "predictions.csv", pd.DataFrame({"ID": ids})
        table[net.labels] = probs.astype(float)
        table["predicted"] = [";".join(np.array(net.labels)[row]) or "none" for row in chosen]
        table["network"] = f"{net.title()}, {net.digest[:10]}"
        if net.rendered:
            table["note"] = "RENDERED pictures, in training or here"
        replace_file(path, lambda stream: table.to_csv(stream, index=False, float_format="%.7f"), "w")
        print(f"{path} written: {len(table)} predicted by {net.title()}.")
        for label, count in zip(net.names, chosen.sum(0), strict=True):
            print(f"  {label}: {count}")
        for k, file in enumerate(figures.file_names(ids) if args.figures else ()):
            print(draw(net, frame["files"].iloc[k], probs[k], thresholds, ids[k], args.out / file))
    print(NO_DEVICE)
    if faults:
        print(*faults.values(), f"{left_out} and are left out", sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(guard(main))
