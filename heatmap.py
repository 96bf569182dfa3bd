"""Where a network looks: Grad-CAM on its last map of features, laid over the pictures of a part.

    python heatmap.py --ckpt best.pt --split val --per-label 8

writes a PNG for each label and row that carries it (eye pairs: both eyes; knees: each plane's slice with the
strongest answer), <label>-<ID>.png, into heatmaps/ of the run's folder. Of your own pictures: predict.py.
"""

import sys
from pathlib import Path

import numpy as np

import checkpoint
import dataset
import engine
import figures
import predictor
from arguments import add_machine_flags
from cache import file_names
from errors import InputError, Parser, guard


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="a best.pt or a run's folder")
    add("--split", choices=["val", "test", "all"], default="val", help="the run's own part; all: every row")
    add("--data", help="another folder of the same layout (default: the one that was trained on)")
    add("--per-label", type=int, default=8, help="the first so many rows that carry each label")
    add("--out", type=Path, help="folder for the PNGs (default: heatmaps/ in the run's folder)")
    add_machine_flags(parser, precision=None)
    add("--cache", default="cache", help="folder of kept pictures and features")
    return parser


def main(argv=None):
    # The network, its rows and what it says of them
    args = get_args_parser().parse_args(argv)
    if args.per_label < 1:
        raise InputError(f"--per-label {args.per_label}: expected 1 or more")
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    net.args.cache = args.cache
    part, facts = dataset.load_part(net.args, net.saved, args.split, args.data, net.args.missing)
    for note in facts["notes"]:
        print(f"note: {note}")
    rendered = ", trained on RENDERED pictures" if net.rendered else ""
    print(f"{net.title()}{rendered}, {args.split}: {len(part)} rows")
    probs, truth, names = net.evaluate(part)[1], net.truth(part), np.array(net.names)

    # A figure for each label of each row that is asked about
    asked = []
    for label, carried in zip(net.labels, truth.T, strict=True):
        rows = np.flatnonzero(carried)[: args.per_label]
        asked += [(row, f"{label}-{part.ids()[row]}") for row in rows]
        if not len(rows):
            print(f"nobody in this part carries {label}")
    out = args.out or checkpoint.home_of(checkpoint.find_checkpoint(args.ckpt)) / "heatmaps"
    files = file_names(stem for _, stem in asked)
    for (row, _), file in engine.progress(list(zip(asked, files, strict=True)), "heat maps"):
        lines = net.map_rows(part, row, probs[row], names[truth[row]])
        figure = figures.heatmaps(lines, net.random_trunk)
        if net.rendered:
            figures.mark_rendered(figure, "a network trained on RENDERED pictures")
        figures.save(figure, out / file)
    print(f"{len(files)} PNGs in {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
