"""Labels for the retina study's unlabelled pictures, spread from the labelled ones that lie near them.

    python spread_labels.py --ckpt best.pt

takes the outputs of the last dense layer for the run's TRAINING pictures and for those in test/, standardises them and
runs scikit-learn's LabelSpreading (Zhou et al. 2004). Writes pseudo_labels.csv (filename, label, confidence) into the
run's folder, for `train.py --pseudo-labels`. Validation and test pictures take no part.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading

import checkpoint
import dataset
import engine
import models
import pictures
from cache import replace_file
from errors import Formatter, InputError, guard
from features import TrunkFeatures, evaluate

UNKNOWN = -1  # scikit-learn's mark for a row without a label


class Logits(engine.Criterion):
    """Lets `engine.predict` hand back the outputs of the last dense layer themselves."""

    def probs(self, logits):
        return logits


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--ckpt", required=True, help="a best.pt of the retina study")
    parser.add_argument("--data", help="another folder of the same pictures (default: the one that was trained on)")
    parser.add_argument("--missing", choices=["stop", "drop"], help="missing or unreadable pictures: stop, or drop them (default: as in the run)")
    parser.add_argument("--out", help="folder for pseudo_labels.csv (default: the run's folder)")
    parser.add_argument("--kernel", choices=["knn", "rbf"], default="knn", help="who is near: knn needs no scale (ours; the study names none)")
    parser.add_argument("--neighbors", type=int, default=7, help="knn: the picture itself and its nearest ones (scikit-learn's)")
    parser.add_argument("--gamma", type=float, help="rbf: exp(-gamma d^2) (without it: 1 / number of labels, as scikit-learn's rbf_kernel; "
                        "LabelSpreading's own 20 would cut off all standardised neighbours)")
    parser.add_argument("--alpha", type=float, default=0.2, help="share that a picture takes from its neighbours (scikit-learn's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    parser.add_argument("--precision", choices=["auto", *engine.PRECISIONS], help="default: as the run was asked to")
    parser.add_argument("--workers", type=int, help="processes that decode pictures (default: the cores allowed)")
    parser.add_argument("--cache", help="folder of kept pictures and features (default: the run's)")
    return parser


def training_rows(saved, table, pseudo):
    """The labelled rows that the run trained on, never one of its validation or test part.

    A run with --pseudo-labels has names of unlabelled pictures among its training IDs; they may be missing in `table`.
    """
    split, ids = saved["split"], table["ID"].astype(str)
    wanted = set(split["train"]) - set(split["val"]) - set(split["test"])
    rows = table[ids.isin(wanted)].reset_index(drop=True)
    if rows.empty or len(rows) < len(wanted) and not pseudo:
        raise InputError(f"{len(wanted) - len(rows)} of the run's {len(wanted)} training pictures are not in this data set: "
                         "the data have changed since training")
    return rows


def spread(outputs, targets, kernel="knn", neighbors=7, gamma=None, alpha=0.2):
    """Spread `targets` (n,), UNKNOWN where there is none, over standardised outputs (n, K) -> (labels (n,), confidence (n,)).

    Confidence is the label's share of what reached the row, 0..1; a row that nothing reached has UNKNOWN and 0.
    """
    outputs = StandardScaler().fit_transform(outputs.astype(np.float64))
    # Changes shrink by `alpha` a round and add up over all rows: scikit-learn's 30 rounds are few for an alpha near 1.
    model = LabelSpreading(kernel=kernel, n_neighbors=neighbors, gamma=gamma or 1 / outputs.shape[1], alpha=alpha, max_iter=1000)
    shares = model.fit(outputs, targets).label_distributions_
    confidence = shares.max(1)
    return np.where(confidence > 0, model.classes_[shares.argmax(1)], UNKNOWN), np.clip(confidence, 0, 1)


def agreement(outputs, targets, settings):
    """Share of the labelled rows whose spread label is the true one while a fifth of them, theirs included, is hidden.

    Not hidden, a row keeps 1 - alpha of its own label and would agree with itself whatever its neighbours say.
    """
    known = np.flatnonzero(targets != UNKNOWN)
    right = 0
    for _, hidden in KFold(min(5, len(known)), shuffle=True, random_state=0).split(known):
        given = targets.copy()
        given[known[hidden]] = UNKNOWN
        right += int((spread(outputs, given, **settings)[0] == targets)[known[hidden]].sum())
    return right / len(known)


def main(argv=None):
    # Arguments, the network, the pictures
    args = get_args_parser().parse_args(argv)
    if not 0 < args.alpha < 1 or args.neighbors < 2 or args.gamma is not None and args.gamma <= 0:
        raise InputError(f"--alpha {args.alpha} --neighbors {args.neighbors} --gamma {args.gamma}: expected between 0 and 1, 2 or more, above 0")
    device = engine.pick_device(args.device)
    saved, run, model = models.open_checkpoint(args.ckpt, device)
    if run.dataset != "retina":
        raise InputError(f"{args.ckpt} was trained on {run.dataset}: only the retina data set has unlabelled pictures")
    labels, root = saved["labels"], args.data or saved["data"]["root"]
    run.cache, run.workers, run.missing = args.cache or run.cache, args.workers, args.missing or run.missing
    known = training_rows(saved, dataset.read("retina", root, labels)[0], run.pseudo_labels)
    unlabelled = dataset.unlabelled_pictures(root)
    if not unlabelled:
        raise InputError(f"{Path(root) / 'test'} holds no pictures: there is nothing to spread labels to")
    unknown = pd.DataFrame({"ID": [Path(file).name for file in unlabelled], "files": [(file,) for file in unlabelled]})

    # Outputs of the last dense layer
    precision = engine.pick_precision(args.precision or run.precision, device, run.model)
    features, outputs, tables = TrunkFeatures(model, precision, run.compile, device, run.cache), [], []
    for table in (known, unknown):
        rows, _ = dataset.drop_missing({"": table}, run.missing)
        rows, part, left_out = pictures.open_part(rows[""], run.preprocess, run.crop or run.size, run.cache, args.workers, run.missing)
        if rows.empty:
            raise InputError(f"none of {len(table)} pictures can be read")
        zeros = np.zeros(len(rows), np.int64)  # the loss is not looked at
        outputs.append(evaluate(run, model, features, part, rows, zeros, Logits("multiclass"), precision, device)[2])
        tables.append(rows)
    known, unknown = tables
    targets = np.concatenate([known["target"].to_numpy(np.int64), np.full(len(unknown), UNKNOWN)])
    if args.kernel == "knn" and args.neighbors > len(targets):
        raise InputError(f"--neighbors {args.neighbors}: there are {len(targets)} pictures")

    # Spread
    settings = dict(kernel=args.kernel, neighbors=args.neighbors, gamma=args.gamma, alpha=args.alpha)
    found, confidence = (values[len(known):] for values in spread(np.concatenate(outputs), targets, **settings))
    reached = found != UNKNOWN
    sheet = pd.DataFrame({"filename": unknown["ID"].to_numpy()[reached], "label": [labels[i] for i in found[reached]],
                          "confidence": confidence[reached]})
    if sheet.empty:
        raise InputError("no label reached any unlabelled picture: raise --neighbors, or take another --kernel")
    out = (Path(args.out) if args.out else checkpoint.home_of(run, args.ckpt)) / "pseudo_labels.csv"
    replace_file(out, lambda stream: sheet.to_csv(stream, index=False, float_format="%.6f"))
    print(f"{len(known)} labelled training pictures, {len(unknown)} unlabelled, {int((~reached).sum())} of them reached by no label")
    for label, count in sheet["label"].value_counts().reindex(labels, fill_value=0).items():
        print(f"  {label}: {count}")
    print("confidence, quartiles: " + " ".join(f"{value:.3f}" for value in sheet["confidence"].quantile([0, 0.25, 0.5, 0.75, 1])))
    print(f"spread label agrees with the true one for {agreement(np.concatenate(outputs), targets, settings):.1%} of the labelled pictures, "
          "each time with a fifth of the labels hidden (the network has seen them all: an upper bound)")
    print(f"{out} written, for train.py --pseudo-labels {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
