"""Sheets, .xlsx or .csv: how they are read and checked. A sheet's index holds the row numbers of its file."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from errors import InputError, reading

CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no sheet of results could hold these again
OUTSIDE = re.compile(r"(?:^|[/\\])\.\.(?:[/\\]|$)|^[/\\]|^\.$|^[A-Za-z]:")  # leads out of the data folder


def read_sheet(path, columns=(), header=0, dtype=None):
    """A .xlsx or .csv file that has these columns, without the blank rows at its end."""
    path = Path(path)
    with reading(path, "a table"):
        if path.suffix.lower() == ".xlsx":
            sheet = pd.read_excel(path, header=header, dtype=dtype)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more fields than names
                # Blank lines are kept, so that row numbers stay those of the file.
                sheet = pd.read_csv(path, header=header, dtype=dtype, skip_blank_lines=False, index_col=False)
    filled = np.flatnonzero(sheet.notna().any(axis=1))
    if not len(filled):
        raise InputError(f"{path} holds no row")
    check_columns(path, sheet, columns)
    first = 1 if header is None else 2
    sheet.index = range(first, first + len(sheet))
    return sheet.iloc[: filled[-1] + 1]


def check_columns(path, sheet, columns):
    """InputError where one of `columns` is missing or there twice."""
    doubled = [column for column in columns if f"{column}.1" in sheet.columns]
    if doubled:  # pandas calls the second one `name.1`
        raise InputError(f"{path}: column(s) twice: {', '.join(doubled)}")
    missing = [str(column) for column in columns if column not in sheet.columns]
    if missing:
        found = ", ".join(map(str, sheet.columns[:20]))
        raise InputError(f"{path}: column(s) missing: {', '.join(missing)} (found: {found})")


def check_rows(path, bad, what, values=None):
    """InputError naming the sheet rows where the boolean series `bad` is true, with their `values`."""
    rows = bad.index[bad]
    if len(rows):
        shown = [str(row) if values is None else f"{row} ({str(values[row])[:30]})" for row in rows[:5]]
        raise InputError(f"{path}: {what} in {len(rows)} row(s), first in sheet row(s) {', '.join(shown)}")


def check_zero_one(path, sheet, labels):
    """The label columns as float32 (n, L); InputError for anything but 0 and 1."""
    numbers = sheet[labels].apply(pd.to_numeric, errors="coerce")
    for label in labels:
        check_rows(path, ~numbers[label].isin([0, 1]), f"label {label!r} other than 0 or 1", sheet[label])
    return numbers.to_numpy(dtype=np.float32)


def check_names(path, names, what, unique=True, inside=True):
    """A column of names as stripped strings. InputError: empty, control characters, out of the data folder
    (where `inside`) or doubled (where `unique`)."""
    empty = names.isna()
    names = pd.Series([str(name).strip() for name in names.tolist()], names.index, dtype=object)
    check_rows(path, empty | (names == ""), f"empty {what}")
    control = names.str.contains(CONTROL)
    check_rows(path, control, f"control characters in {what}", names[control].map(ascii))
    if inside:
        check_rows(path, names.str.contains(OUTSIDE), f"{what} that leaves the data folder", names)
    if unique:
        check_rows(path, names.duplicated(), f"doubled {what}", names)
    return names


def as_integers(path, values, what, allowed=None):
    """A column as int64; InputError for anything that is no whole number, or not in `allowed`."""
    numbers = pd.to_numeric(values, errors="coerce").astype(np.float64)
    if allowed is None:
        right, expected = (numbers == np.floor(numbers)) & (numbers.abs() < 2**53), "no whole number"
    else:
        right, expected = numbers.isin(allowed), f"not one of {list(allowed)}"
    check_rows(path, ~right, f"{what} that is {expected}", values)
    return numbers.astype(np.int64)
