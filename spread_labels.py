"""Labels for the retina study's unlabelled pictures, spread from the labelled ones that lie near them.

    python spread_labels.py --ckpt best.pt

takes the outputs of the last dense layer for the run's TRAINING pictures and for those in test/, standardises
them and runs scikit-learn's LabelSpreading (Zhou et al. 2004). Writes pseudo_labels.csv (filename, label,
confidence, source) into the run's folder, for `train.py --pseudo-labels`. Held-out patients take no part."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading

import checkpoint
import dataset
import engine
import predictor
import tables
from arguments import add_checkpoint_flags
from cache import replace_file
from errors import InputError, Parser, guard
from split import drop_missing

UNKNOWN = -1  # scikit-learn's mark for a row without a label


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="a best.pt of the retina study, or its run's folder")
    add("--neighbors", type=int, default=7, help="the picture itself and its nearest (scikit-learn's)")
    add("--alpha", type=float, default=0.2, help="share taken from the neighbours (scikit-learn's)")
    add_checkpoint_flags(parser, "pseudo_labels.csv")
    return parser


def spread(outputs, targets, neighbors=7, alpha=0.2):
    """Spread `targets` (n,), UNKNOWN where there is none, over outputs (n, K) -> (labels, confidence).
    Confidence (n,) is the label's share of what reached the row, 0..1. Nothing: UNKNOWN and 0."""
    outputs = StandardScaler().fit_transform(outputs.astype(np.float64))
    # Changes shrink by `alpha` a round and add up over all rows: scikit-learn's 30 rounds are few near 1.
    model = LabelSpreading(kernel="knn", n_neighbors=neighbors, alpha=alpha, max_iter=1000)
    shares = model.fit(outputs, targets).label_distributions_
    confidence = shares.max(1)
    return np.where(confidence > 0, model.classes_[shares.argmax(1)], UNKNOWN), np.clip(confidence, 0, 1)


def training_rows(net, root):
    """The labelled rows that the run trained on, never one of its validation or test part.
    Pseudo-labelled pictures among the run's training IDs are in no table, and so are left out."""
    frame, split = tables.read("retina", root, net.labels).frame, net.saved["rows"]
    wanted = set(split["train"]) - set(split["val"]) - set(split["test"])
    frame = frame[frame["ID"].astype(str).isin(wanted)].reset_index(drop=True)
    if (gone := len(wanted) - len(frame)) and (frame.empty or not net.args.pseudo_labels):
        raise InputError(f"{gone} of the run's {len(wanted)} training pictures are gone: restore them")
    return frame


def unlabelled_rows(net, root):
    """The pictures in test/, without those that train.py would refuse: labelled, or of a held-out patient."""
    labelled = tables.plain_names(tables.read("retina", root, net.labels).frame["ID"])
    files = sorted(str(file) for file in Path(root).glob("test/*") if file.suffix.lower() in tables.SUFFIXES)
    names = [Path(file).name for file in files]
    held_out = tables.patients_of([*net.saved["rows"]["val"], *net.saved["rows"]["test"]])
    known = np.isin(tables.plain_names(names), labelled) | np.isin(tables.patients_of(names), held_out)
    refused = "labelled, or of a validation or test patient"
    if known.all():  # also of no picture
        raise InputError(f"{root}/test holds no pictures to label: {len(files)}, every one {refused}")
    if known.any():
        print(f"note: {known.sum()} unlabelled picture(s) are left out: {refused}")
    frame = pd.DataFrame({"ID": names, "files": [(file,) for file in files], "target": UNKNOWN})
    return frame[~known].reset_index(drop=True)


def main(argv=None):
    # Arguments, the network, outputs of its last dense layer
    args = get_args_parser().parse_args(argv)
    net = predictor.load(args.ckpt, args.device, args.precision, args.workers)
    if not 0 < args.alpha < 1 or args.neighbors < 2:
        raise InputError(f"--alpha {args.alpha} --neighbors {args.neighbors}: expected 0 to 1, 2 or more")
    if net.args.dataset != "retina":
        raise InputError(f"--ckpt is of {net.args.dataset}: only the retina data have unlabelled pictures")
    net.args.cache, missing = args.cache, args.missing or net.args.missing
    root = args.data or net.saved["data"]["root"]
    frame = pd.concat([training_rows(net, root), unlabelled_rows(net, root)], ignore_index=True)
    frame = drop_missing({"": frame}, missing)[0][""]
    targets = np.maximum(frame["target"].to_numpy(np.int64), 0)  # the loss is not looked at
    part = dataset.open_part(frame, targets, net.args, dataset.eval_size(net.args), missing)
    targets, files = part.table["target"].to_numpy(np.int64), part.table["ID"].to_numpy()
    unlabelled, known, rows = targets == UNKNOWN, net.saved["rows"]["train"], part.rows()
    if changed := sum(known[name] != rows[name] for name in files[~unlabelled]):
        raise InputError(f"{changed} picture(s) have other labels or contents than in training: restore them")
    count = f"{(~unlabelled).sum()} labelled training pictures, {unlabelled.sum()} unlabelled"
    if unlabelled.all() or not unlabelled.any() or args.neighbors > len(part):
        raise InputError(f"{count}: expected some of both, and --neighbors {args.neighbors} in all")
    criterion = engine.Criterion("multiclass")
    criterion.probs = torch.nn.Identity()  # the outputs of the last dense layer themselves
    outputs = net.evaluate(part, criterion)[1]
    found, confidence = spread(outputs, targets, args.neighbors, args.alpha)
    reached = unlabelled & (found != UNKNOWN)
    if not reached.any():
        raise InputError("no label reached any picture: raise --neighbors")
    sheet = pd.DataFrame({"filename": files[reached], "label": np.array(net.labels)[found[reached]]})
    trained = pd.DataFrame({"filename": list(net.saved["rows"]["train"]), "source": tables.SPREAD_FROM})
    sheet = pd.concat([sheet.assign(confidence=confidence[reached], source="spread"), trained])
    out = (args.out or checkpoint.home_of(net.path, net.digest)) / "pseudo_labels.csv"
    replace_file(out, lambda stream: sheet.to_csv(stream, index=False, float_format="%.6f"), "w")
    print(f"{count}, {unlabelled.sum() - reached.sum()} of them reached by no label")
    for label, count in sheet["label"].value_counts().reindex(net.labels, fill_value=0).items():
        print(f"  {label}: {count}")
    print(f"{out} written, for train.py --pseudo-labels {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
