"""Where a network looks: Grad-CAM on its last map of features, laid over the picture.

    python heatmap.py --ckpt best.pt left.jpg right.jpg
    python heatmap.py --ckpt best.pt --split val --per-label 8

writes one PNG per picture (eye pairs: per patient; knees: per exam, each plane's slice with the strongest
answer) into heatmaps/ of the run's folder: <picture>.png, or <label>-<ID>.png for the rows of a split.
"""

import sys
from pathlib import Path

import numpy as np

import checkpoint
import dataset
import engine
import figures
import predictor
import tables
from arguments import add_machine_flags
from cache import file_stem, replace_file
from errors import InputError, Parser, guard


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    text = "as predict.py takes them: LEFT RIGHT, photographs, an exam, a folder or a CSV"
    add("given", nargs="*", metavar="PICTURE", help=text)
    add("--ckpt", required=True, help="a best.pt or a run's folder")
    text = "instead of pictures: rows of this part of the run's own split"
    add("--split", choices=["val", "test", "all"], help=text)
    add("--data", help="with --split: another folder of the same layout (default: the run's)")
    add("--per-label", type=int, default=8, help="with --split: the first so many rows that carry each label")
    add("--out", type=Path, help="folder for the PNGs (default: heatmaps/ in the run's folder)")
    add_machine_flags(parser, precision=None)
    add("--cache", default="cache", help="folder of kept pictures")
    return parser


def rows_per_label(net, args):
    """The first --per-label rows of the split that carry each label -> (Part, (n, K) labels to draw, (n, K)
    truth).
    """
    net.args.cache = args.cache
    part, facts = dataset.load_part(net.args, net.saved, args.split, args.data)
    for note in facts["notes"]:
        print(f"note: {note}")
    targets = part.targets
    truth = targets == 1 if net.task == "multilabel" else targets[:, None] == np.arange(len(net.labels))
    chosen = truth & (truth.cumsum(0) <= args.per_label)
    for label, count in zip(net.labels, chosen.sum(0), strict=True):
        if not count:
            print(f"nobody in this part carries {label}")
    rows = np.flatnonzero(chosen.any(1))
    return part.subset(rows), chosen[rows], truth[rows]


def file_names(stems):
    """A file name for each stem; a second one of the same name gets -2."""
    taken, names = {}, []
    for stem in map(file_stem, stems):
        taken[stem.lower()] = number = taken.get(stem.lower(), 0) + 1
        names.append(f"{stem}-{number}.png" if number > 1 else f"{stem}.png")
    return names


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if bool(args.given) == bool(args.split) or args.data and not args.split or args.per_label < 1:
        raise InputError(
            "expected either pictures or --split; --data goes with --split, --per-label is 1 or more"
        )

    # The network, and the rows that are asked about
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    if args.split:
        part, chosen, truth = rows_per_label(net, args)
        probs = net.evaluate(part)[1]
    else:
        frame, _ = tables.given_rows(net.args.dataset, args.given)
        part, faults = net.open_rows(list(frame["files"]))
        if faults:
            raise InputError(
                f"{len(faults)} of {len(frame)} cannot be read: {'; '.join(list(faults.values())[:5])}"
            )
        part.table["ID"] = frame["ID"].to_numpy()
        probs = net.answer_part(part, mirrored=False)
        truth = np.zeros((len(part), len(net.labels)), bool)
        chosen = None
    out = args.out or checkpoint.home_of(checkpoint.find_checkpoint(args.ckpt)) / "heatmaps"
    rendered = ", trained on RENDERED pictures" if net.rendered else ""
    print(f"{net.args.name} ({net.args.dataset}, {net.args.model}{rendered}): {len(part)} rows")

    # A figure for each row, under the name of each label that it was chosen for
    stems, rows = [], []
    for row, name in enumerate(part.ids()):
        labels = (
            [f"{net.labels[k]}-{name}" for k in np.flatnonzero(chosen[row])] if chosen is not None else [name]
        )
        stems += labels
        rows += [row] * len(labels)
    drawn = {}
    for row, name in engine.progress(zip(rows, file_names(stems), strict=True), "heat maps", total=len(rows)):
        if row not in drawn:
            names = [net.names[k] for k in np.flatnonzero(truth[row])]
            figure = figures.heatmaps(net.map_rows(part, row, probs[row], names), net.random_trunk)
            if net.rendered:
                figures.mark_rendered(figure, "a network trained on RENDERED pictures")
            drawn = {row: figure}
        replace_file(
            out / name, lambda stream, figure=drawn[row]: figure.savefig(stream, dpi=110, format="png")
        )
    print(f"{len(rows)} PNGs in {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
