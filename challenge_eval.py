"""Score predictions as the ODIR-5K challenge does: every patient x label cell flattened into one list.

    python challenge_eval.py runs/odir-03/ground_truth.xlsx runs/odir-03/submission.csv

Both files (.xlsx or .csv) hold the columns ID,N,D,G,C,A,H,M,O: 0/1 in the first, probabilities in the
second; the official annotations.xlsx is a ground truth too. Rows are joined by ID. Prints Cohen's kappa,
micro F1, AUC, their mean, and beside them what two trivial answers score. A score of 0/0 is undefined."""

import sys
from pathlib import Path

import numpy as np

from errors import InputError, Parser, guard
from metrics import challenge_scores, trivial_scores, undefined_scores

LABELS = list("NDGCAHMO")
NAMES = {"kappa": "Cohen kappa", "f1": "micro F1", "auc": "AUC", "final": "final score"}


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("ground_truth", type=Path, help="xlsx or csv with ID and 0/1 in N,D,G,C,A,H,M,O")
    parser.add_argument("predictions", type=Path, help="xlsx or csv with ID and probabilities in them")
    return parser


def read_labels(path, binary):
    """The columns N to O of a sheet as float64, indexed by ID: 0/1 if `binary`, otherwise within 0 to 1."""
    import pandas as pd  # here, so that --help answers at once

    from tables import as_integers, check_rows, read_sheet

    sheet = read_sheet(path, ["ID", *LABELS], dtype=object)[["ID", *LABELS]].dropna(how="all")
    ids = as_integers(path, sheet["ID"], "ID")
    check_rows(path, ids.duplicated(keep=False), "repeated ID", ids)
    numbers = sheet[LABELS].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    expected = "0 or 1" if binary else "a number from 0 to 1"
    for label in LABELS:
        good = numbers[label].isin([0, 1]) if binary else numbers[label].between(0, 1)
        check_rows(path, ~good, f"column {label} that is not {expected}", sheet[label])
    return numbers.set_index(ids)


def read_pair(ground_truth, predictions):
    """(y_true, y_prob), float64 (patients, 8), of two files in the order of the first, joined by ID."""
    truth, answer = read_labels(ground_truth, binary=True), read_labels(predictions, binary=False)
    for here, there, path in ((truth, answer, predictions), (answer, truth, ground_truth)):
        if absent := here.index.difference(there.index).tolist():
            raise InputError(f"{path} lacks {len(absent)} of the {len(here)} IDs: {absent[:5]}. Add them")
    return truth.to_numpy(), answer.loc[truth.index].to_numpy()


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    y_true, y_prob = read_pair(args.ground_truth, args.predictions)
    answers = {"these predictions": challenge_scores(y_true, y_prob)}
    answers |= trivial_scores(y_true, y_true.mean(axis=0), "challenge")
    print(f"{args.predictions}, against {args.ground_truth}")
    print(f"challenge score, all cells flattened: {len(y_true)} patients x 8 labels, positive above 0.5\n")
    print(" " * 20 + "".join(f"{name:>14}" for name in NAMES.values()))
    for name, found in answers.items():
        cells = ["undefined" if np.isnan(found[key]) else f"{found[key]:.4f}" for key in NAMES]
        print(f"{name:20}" + "".join(f"{cell:>14}" for cell in cells))
    print("\nclass priors: the labels' frequencies in this ground truth. Micro F1 is cell accuracy.")
    for sentence in undefined_scores(y_true, y_prob, LABELS, "challenge"):
        print(f"undefined: {sentence}")


if __name__ == "__main__":
    sys.exit(guard(main))
