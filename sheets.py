"""Sheets, .xlsx or .csv: one way to read them and to check them. Every message names the rows of the sheet.

`first_row` is the number of the first row of data in the file: 1 where it has no header.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from errors import InputError, reading

CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no sheet of results could hold these again
OUTSIDE = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^\.$|^[A-Za-z]:")  # leads out of the data folder


def read_sheet(path, **kwargs):
    """A .xlsx or .csv file without the blank rows at its end. Row i of the frame is row i + 2 of the file."""
    path = Path(path)
    with reading(path, "a table"):
        if path.suffix.lower() == ".xlsx":
            sheet = pd.read_excel(path, **kwargs)
        else:  # blank lines are kept, so that row numbers stay those of the file
            sheet = pd.read_csv(path, skip_blank_lines=False, **kwargs)
    filled = np.flatnonzero(sheet.notna().any(axis=1))
    if not len(filled):
        raise InputError(f"{path} holds no row")
    return sheet.iloc[: filled[-1] + 1]


def check_rows(path, bad, what, first_row=2, values=None):
    """Raise InputError naming the sheet rows where the boolean array `bad` is true, with their `values`."""
    rows = np.flatnonzero(np.asarray(bad))
    if not len(rows):
        return
    shown = [str(row + first_row) for row in rows[:5]]
    if values is not None:
        found = np.asarray(values, dtype=object)[rows[:5]]
        shown = [f"{row} ({str(value)[:30]})" for row, value in zip(shown, found, strict=True)]
    raise InputError(f"{path}: {what} in {len(rows)} row(s), first in sheet row(s) {', '.join(shown)}")


def check_columns(path, sheet, columns):
    """InputError where one of `columns` is missing or there twice."""
    doubled = [column for column in columns if f"{column}.1" in sheet.columns]
    if doubled:  # pandas calls the second one `name.1`
        raise InputError(f"{path}: column(s) twice: {', '.join(doubled)}")
    missing = [column for column in columns if column not in sheet.columns]
    if missing:
        found = ", ".join(map(str, sheet.columns[:20]))
        raise InputError(f"{path}: column(s) missing: {', '.join(map(str, missing))} (found: {found})")


def check_zero_one(path, sheet, labels, first_row=2):
    """The label columns as float32 (n, L); InputError for anything but 0 and 1."""
    numbers = sheet[labels].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = (numbers != 0) & (numbers != 1)
    for column, label in enumerate(labels):
        check_rows(path, wrong[:, column], f"label {label!r} other than 0 or 1", first_row, sheet[label])
    return numbers.astype(np.float32)


def check_names(path, names, what, first_row=2, unique=True, inside=True):
    """A column of names as stripped strings. InputError: empty, control characters, out of the data folder
    (where `inside`) or doubled (where `unique`)."""
    empty = names.isna()
    names = pd.Series([str(name).strip() for name in names.tolist()], dtype=object)
    check_rows(path, empty.to_numpy() | (names == ""), f"empty {what}", first_row)
    unprintable = names.str.contains(CONTROL)
    check_rows(path, unprintable, f"control characters in {what}", first_row, names.map(ascii))
    if inside:
        outside = names.str.contains(OUTSIDE)
        check_rows(path, outside, f"{what} that leaves the data folder", first_row, names)
    if unique:
        check_rows(path, names.duplicated(), f"doubled {what}", first_row, names)
    return names


def as_integers(path, values, what, allowed=None, first_row=2):
    """A column as int64; InputError for anything that is no whole number, or not in `allowed`."""
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(numbers) | (numbers != np.floor(numbers)) | (np.abs(numbers) >= 2**53)
    expected = "no whole number"
    if allowed is not None:
        wrong |= ~np.isin(numbers, allowed)
        expected = f"not one of {list(allowed)}"
    check_rows(path, wrong, f"{what} that is {expected}", first_row, values)
    return numbers.astype(np.int64)
