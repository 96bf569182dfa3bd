"""Score a file of predictions as the ODIR-5K challenge does: every patient x label cell flattened into one list.

    python challenge_eval.py runs/odir-03/ground_truth.xlsx runs/odir-03/submission.csv

Both files (.xlsx or .csv) hold the columns ID,N,D,G,C,A,H,M,O: 0/1 in the first, probabilities in the second; the
official annotations.xlsx is a ground truth too. Rows are joined by ID. Prints Cohen's kappa, micro F1, AUC, their mean,
and beside them what two trivial answers score on the same patients. A score is undefined, not zero, where it is 0/0.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from errors import InputError, guard
from metrics import challenge_scores, trivial_scores, undefined_scores

LABELS = list("NDGCAHMO")
OFFICIAL = ["Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus",
            "Left-Diagnostic Keywords", "Right-Diagnostic Keywords"]
NAMES = {"kappa": "Cohen kappa", "f1": "micro F1", "auc": "AUC", "final": "final score"}


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ground_truth", type=Path, help="xlsx or csv with ID and 0/1 in N,D,G,C,A,H,M,O")
    parser.add_argument("predictions", type=Path, help="xlsx or csv with ID and probabilities in N,D,G,C,A,H,M,O")
    return parser


def read_labels(path, binary):
    """The columns N to O of an xlsx or csv file as float64, indexed by ID: 0/1 if `binary`, otherwise within 0-1.

    InputError names the file and the rows, as a spreadsheet counts them, of whatever is missing or cannot be trusted.
    """
    import pandas as pd  # here, so that --help answers at once

    wanted = ["ID", *LABELS]
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file")
    try:
        if path.suffix.lower() == ".xlsx":
            table = pd.read_excel(path, dtype=object)
        else:  # blank lines are kept here so that row numbers stay those of the file
            table = pd.read_csv(path, dtype=object, skip_blank_lines=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty; expected the columns {','.join(wanted)}") from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"cannot read {path}: {error}. Expected an .xlsx or .csv file") from error
    missing = [column for column in wanted if column not in table.columns]
    other = [str(column) for column in table.columns if column not in wanted + OFFICIAL * binary]
    if missing or other:
        raise InputError(f"{path}: missing columns {missing}, other columns {other}; expected {','.join(wanted)}")
    table = table[wanted].dropna(how="all")
    if table.empty:
        raise InputError(f"{path} has no rows")
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    refuse(path, numbers["ID"] % 1 != 0, table["ID"], "ID must be a whole number")  # NaN and inf: NaN is not 0
    refuse(path, numbers["ID"].duplicated(keep=False), table["ID"], "IDs must not repeat")
    for label in LABELS:
        good = numbers[label].isin([0, 1]) if binary else numbers[label].between(0, 1)
        refuse(path, ~good, table[label], f"column {label} must be {'0 or 1' if binary else 'a number from 0 to 1'}")
    return numbers.astype({"ID": np.int64}).set_index("ID")


def refuse(path, wrong, values, what):
    if wrong.any():
        first = ", ".join(f"row {index + 2}: {values[index]}" for index in wrong.index[wrong][:5])
        raise InputError(f"{path}: {what}; wrong in {wrong.sum()} rows ({first})")


def read_pair(ground_truth, predictions):
    """(y_true, y_prob), float64 (patients, 8), of two files in the order of the first, joined by ID."""
    truth, answer = read_labels(ground_truth, binary=True), read_labels(predictions, binary=False)
    for here, there, path in ((truth, answer, predictions), (answer, truth, ground_truth)):
        absent = here.index.difference(there.index)
        if len(absent):
            raise InputError(f"{path} lacks {len(absent)} of the {len(here)} IDs of the other file, first "
                             f"{', '.join(map(str, absent[:5]))}. Both must hold the same patients")
    return truth.to_numpy(), answer.loc[truth.index].to_numpy()


def main(argv=None):
    args = get_args_parser().parse_args(argv)
    y_true, y_prob = read_pair(args.ground_truth, args.predictions)
    rows = {"these predictions": challenge_scores(y_true, y_prob),
            **trivial_scores(y_true, y_true.mean(axis=0), "challenge")}
    print(f"challenge score, all cells flattened: {len(y_true)} patients x {len(LABELS)} labels, positive above 0.5\n")
    print(" " * 20 + "".join(f"{name:>14}" for name in NAMES.values()))
    for name, found in rows.items():
        cells = ("undefined" if np.isnan(found[key]) else f"{found[key]:.4f}" for key in NAMES)
        print(f"{name:20}" + "".join(f"{cell:>14}" for cell in cells))
    print("\nclass priors: every patient gets the labels' frequencies in this ground truth. Micro F1 is cell accuracy.")
    for sentence in undefined_scores(y_true, y_prob, LABELS, "challenge"):
        print(f"undefined: {sentence}")


if __name__ == "__main__":
    sys.exit(guard(main))
