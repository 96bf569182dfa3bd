"""Where a network looks: Grad-CAM on its last map of features, laid over the pictures.

    python heatmap.py --ckpt best.pt left.jpg right.jpg
    python heatmap.py --ckpt best.pt --split val --per-label 8

writes <ID>.png, or <label>-<ID>.png for the first rows of a part that carry each label (eye pairs: both eyes;
knees: each plane's slice with the strongest answer), into heatmaps/ of the run's folder."""

import sys

import numpy as np

from arguments import add_checkpoint_flags
from errors import InputError, Parser, guard


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("given", nargs="*", metavar="PICTURE", help="pictures, a folder or a CSV, as predict.py takes them")
    add("--ckpt", required=True, help="a best.pt or a run's folder")
    add("--split", choices=["val", "test", "all"], help="instead of pictures: rows of this part")
    add("--per-label", type=int, default=8, help="of a part: the first so many rows that carry each label")
    add_checkpoint_flags(parser, "the PNGs")
    return parser


def main(argv=None):
    # The network, the rows and their probabilities; what imports torch comes after the arguments
    args = get_args_parser().parse_args(argv)
    if bool(args.given) == bool(args.split) or args.data and not args.split or args.per_label < 1:
        raise InputError("give either pictures or --split; --data goes with --split, --per-label: 1 or more")
    import checkpoint
    import dataset
    import engine
    import figures
    import predictor
    import tables

    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    net.args.cache, asked = args.cache, []
    if args.split:
        missing = args.missing or net.args.missing
        part, facts = dataset.load_part(net.args, net.saved, args.split, args.data, missing)
        probs, truth = net.evaluate(part)[1], net.truth(part)
        for label, carried in zip(net.labels, truth.T, strict=True):
            rows = carried.nonzero()[0][: args.per_label].tolist()
            asked += [(row, f"{label}-{part.ids()[row]}") for row in rows]
    else:
        frame, _ = tables.given_rows(net.args.dataset, args.given)
        part, faults = net.open_rows(list(frame["files"]))
        if faults:
            raise InputError(f"{len(faults)} of {len(frame)} cannot be read: {'; '.join(faults.values())}")
        part.table["ID"], probs = frame["ID"].to_numpy(), net.live(part)
        asked, truth = list(enumerate(part.ids())), np.zeros(probs.shape, bool)  # not known
        facts = dict(notes=[], where=f"{len(part)} row(s) given", suffix="")
        facts["rendered"] = any(map(tables.is_rendered, args.given))
    for note in facts["notes"]:
        print(f"note: {note}")
    rendered = net.rendered or facts["rendered"]
    about = f"{net.title()}, epoch {net.saved['epoch']}, {facts['where']}"
    print(f"{about}{', RENDERED pictures' if rendered else ''}: {len(dict(asked))} rows")

    out = args.out or checkpoint.home_of(net.path, net.digest) / f"heatmaps{facts['suffix']}"
    files = figures.file_names(stem for _, stem in asked)
    for (row, _), file in engine.progress(list(zip(asked, files, strict=True)), "heat maps"):
        lines = net.map_rows(part, row, probs[row], np.array(net.names)[truth[row]])
        figure = figures.heatmaps(lines, net.random_trunk)
        figures.caption(figure, about)
        if rendered:
            figures.mark_rendered(figure)
        figures.save(figure, out / file)
    print(f"{len(files)} PNGs in {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
