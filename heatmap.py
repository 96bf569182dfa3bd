"""Where a network looks: Grad-CAM on its last map of features, laid over the picture.

    python heatmap.py --ckpt best.pt left.jpg right.jpg
    python heatmap.py --ckpt best.pt --split val --per-label 8

writes one PNG per picture (eye pairs: per patient; knees: per exam, each plane's slice with the strongest
answer) into heatmaps/ of the run's folder: <picture>.png, or <label>-<ID>.png for the rows of a split.
"""

import sys
from pathlib import Path

import numpy as np

from arguments import add_machine_flags
from cache import file_names
from errors import InputError, Parser, guard


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("given", nargs="*", metavar="PICTURE", help="pictures or a folder, as predict.py takes them")
    add("--ckpt", required=True, help="a best.pt or a run's folder")
    add("--split", choices=["val", "test", "all"], help="instead of pictures: rows of this part")
    add("--data", help="with --split: another folder of the same layout (default: the run's)")
    add("--per-label", type=int, default=8, help="with --split: the first so many rows that carry each label")
    add("--out", type=Path, help="folder for the PNGs (default: heatmaps/ in the run's folder)")
    add_machine_flags(parser, precision=None)
    add("--cache", default="cache", help="folder of kept pictures and features")
    return parser


def rows_of_split(net, args):
    """The first --per-label rows that carry each label -> (Part, [(row, file's stem)])."""
    import dataset

    net.args.cache = args.cache
    part, facts = dataset.load_part(net.args, net.saved, args.split, args.data, net.args.missing)
    for note in facts["notes"]:
        print(f"note: {note}")
    asked = []
    for label, carried in zip(net.labels, net.truth(part).T, strict=True):
        rows = carried.nonzero()[0][: args.per_label].tolist()
        asked += [(row, f"{label}-{part.ids()[row]}") for row in rows]
        if not rows:
            print(f"nobody in this part carries {label}")
    net.rendered |= facts["rendered"]
    return part, sorted(asked)


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if bool(args.given) == bool(args.split) or args.data and not args.split or args.per_label < 1:
        rule = "--data goes with --split, --per-label is 1 or more"
        raise InputError(f"expected either pictures or --split; {rule}")
    import checkpoint
    import engine
    import figures
    import predictor
    import tables

    # The network, the rows that are asked about, their probabilities and labels
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    if args.split:
        part, asked = rows_of_split(net, args)
        probs, truth = net.evaluate(part)[1], net.truth(part)
    else:
        frame, _ = tables.given_rows(net.args.dataset, args.given)
        part, faults = net.open_rows(list(frame["files"]))
        if faults:
            shown = "; ".join(list(faults.values())[:5])
            raise InputError(f"{len(faults)} of {len(frame)} cannot be read: {shown}")
        part.table["ID"] = frame["ID"].to_numpy()
        asked, probs = list(enumerate(part.ids())), net.live(part)
        truth = np.zeros(probs.shape, bool)  # not known
    rendered = ", RENDERED pictures" if net.rendered else ""
    print(f"{net.title()}{rendered}: {len(dict(asked))} rows")

    # A figure for each row, under the name of each label that it was chosen for
    out = args.out or checkpoint.home_of(net.path, net.digest) / "heatmaps"
    files, drawn = file_names(stem for _, stem in asked), None
    for (row, _), file in engine.progress(list(zip(asked, files, strict=True)), "heat maps"):
        if row != drawn:
            lines = net.map_rows(part, row, probs[row], np.array(net.names)[truth[row]])
            figure, drawn = figures.heatmaps(lines, net.random_trunk), row
            figures.caption(figure, net.title())
            if net.rendered:
                figures.mark_rendered(figure)
        figures.save(figure, out / file)
    print(f"{len(files)} PNGs in {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
