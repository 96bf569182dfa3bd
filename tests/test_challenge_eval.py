"""The challenge's script on files: scores, row order, and every input it must refuse with status 2."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import challenge_eval
import metrics
from errors import InputError

COLUMNS = ["ID", *"NDGCAHMO"]


def frames(n=40, seed=0):
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame((rng.random((n, 8)) < 0.2).astype(int), columns=COLUMNS[1:])
    answer = pd.DataFrame(rng.random((n, 8)), columns=COLUMNS[1:])
    ids = rng.permutation(np.arange(5000))[:n]
    truth.insert(0, "ID", ids)
    answer.insert(0, "ID", ids)
    return truth, answer


def write(table, path):
    table.to_excel(path, index=False) if path.suffix == ".xlsx" else table.to_csv(path, index=False)
    return path


def run(*arguments):
    script = Path(challenge_eval.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name)).split()[-4:]


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_scores_of_two_files_in_another_order(tmp_path, suffix):
    truth, answer = frames()
    expected = metrics.challenge_scores(truth[COLUMNS[1:]], answer[COLUMNS[1:]])
    shuffled = answer.sample(frac=1, random_state=1)[COLUMNS[::-1]]
    done = run(write(truth, tmp_path / f"truth{suffix}"), write(shuffled, tmp_path / "answer.csv"))
    assert done.returncode == 0, done.stderr
    assert "challenge score, all cells flattened: 40 patients x 8 labels" in done.stdout
    assert row(done.stdout, "these predictions") == [f"{value:.4f}" for value in expected.values()]
    zeros = truth[COLUMNS[1:]].eq(0).to_numpy().mean()
    assert row(done.stdout, "all zeros") == ["0.0000", f"{zeros:.4f}", "0.5000", f"{(zeros + 0.5) / 3:.4f}"]
    assert row(done.stdout, "class priors")[0] == "0.0000"


def test_official_annotations_are_a_ground_truth(tmp_path):
    truth, answer = frames()
    for column in ("Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"):
        truth.insert(1, column, "x")
    paths = write(truth, tmp_path / "annotations.xlsx"), write(answer, tmp_path / "answer.xlsx")
    y_true, y_prob = challenge_eval.read_pair(*paths)
    assert (y_true == truth[COLUMNS[1:]]).all(axis=None) and np.allclose(y_prob, answer[COLUMNS[1:]])


def test_the_name_others_rely_on():
    assert challenge_eval.challenge_scores is metrics.challenge_scores


def test_undefined_scores_are_named_not_numbered(tmp_path):
    truth, answer = frames(5)
    truth[COLUMNS[1:]] = 0
    answer[COLUMNS[1:]] /= 2
    done = run(write(truth, tmp_path / "truth.csv"), write(answer, tmp_path / "answer.csv"))
    assert done.returncode == 0
    assert row(done.stdout, "these predictions") == ["undefined", "1.0000", "undefined", "undefined"]
    assert "undefined: auc of all labels: only one class among 40 cells" in done.stdout


def change(table, cell, value):
    table = table.astype(object)
    table.loc[cell] = value
    return table


BAD = {  # what is done to (ground truth, predictions), and what the message must say
    "missing column": (
        lambda t, p: (t, p.drop(columns="M")),
        r"answer\S*: column\(s\) missing: M \(found: ID, N",
    ),
    "duplicated ID": (
        lambda t, p: (t, pd.concat([p, p[3:4]])),
        r"answer.*repeated ID in 2 row\(s\), first in sheet row\(s\) 5 \(\d+\), 42 \(\d+\)$",
    ),
    "ID is no number": (
        lambda t, p: (change(t, (2, "ID"), "x7"), p),
        r"truth.*ID that is no whole number in 1 row\(s\), .* 4 \(x7\)$",
    ),
    "ID is missing": (
        lambda t, p: (change(t, (2, "ID"), None), p),
        r"truth.*ID that is no whole number in 1 row\(s\), .* 4 \(nan\)$",
    ),
    "ID is broken": (
        lambda t, p: (change(t, (2, "ID"), 1.5), p),
        r"truth.*ID that is no whole number in 1 row\(s\), .* 4 \(1\.5\)$",
    ),
    "missing rows": (lambda t, p: (t, p[2:]), r"answer\S* lacks 2 of the 40 IDs"),
    "more rows": (lambda t, p: (t[1:], p), r"truth\S* lacks 1 of the 40 IDs"),
    "other IDs": (lambda t, p: (t, p.assign(ID=p["ID"] + 10_000)), r"answer\S* lacks 40 of the 40 IDs"),
    "no rows": (lambda t, p: (t, p[:0]), "answer.* holds no row"),
    "label 2": (
        lambda t, p: (change(t, (0, "G"), 2), p),
        r"truth.*column G that is not 0 or 1 in 1 row\(s\), .* 2 \(2\)$",
    ),
    "label missing": (
        lambda t, p: (change(t, (0, "G"), None), p),
        r"truth.*column G that is not 0 or 1 .* 2 \(nan\)$",
    ),
    "label is text": (
        lambda t, p: (change(t, (0, "G"), "yes"), p),
        r"truth.*column G that is not 0 or 1 .* 2 \(yes\)$",
    ),
    "above 1": (
        lambda t, p: (t, change(p, (5, "O"), 1.01)),
        r"answer.*column O that is not a number from 0 to 1 .* 7 \(1\.01\)$",
    ),
    "below 0": (lambda t, p: (t, change(p, (5, "O"), -0.01)), r"answer.*column O .* 7 \(-0\.01\)$"),
    "infinite": (lambda t, p: (t, change(p, (5, "O"), np.inf)), r"answer.*column O .* 7 \(inf\)$"),
    "probability missing": (lambda t, p: (t, change(p, (5, "O"), None)), r"answer.*column O .* 7 \(nan\)$"),
    "probability is text": (lambda t, p: (t, change(p, (5, "O"), "0,5")), r"answer.*column O .* 7 \(0,5\)$"),
}


@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_by_file_and_row(tmp_path, capsys, name, suffix):
    spoil, message = BAD[name]
    truth, answer = spoil(*frames())
    paths = [
        write(table, tmp_path / f"{file}{suffix}") for file, table in (("truth", truth), ("answer", answer))
    ]
    assert challenge_eval.guard(challenge_eval.main, list(map(str, paths))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert pd.Series([printed.err]).str.contains(message, regex=True)[0], printed.err


FILES = {
    "absent.csv": (None, "absent.csv is missing"),
    "empty.csv": (b"", "empty.csv cannot be read as a table .*No columns"),
    "blank.csv": (b"\n\n", "blank.csv cannot be read as a table"),
    "header.csv": (b"ID,N,D,G,C,A,H,M,O\n", "header.csv holds no row"),
    "semicolon.csv": (b"ID;N;D\n1;2;3\n", r"semicolon.csv: column\(s\) missing: ID, .*found: ID;N;D"),
    "ragged.csv": (
        b"ID,N,D,G,C,A,H,M,O\n1,2\n1,2,3,4,5,6,7,8,9,10,11\n",
        "ragged.csv cannot be read as a table .*line 3",
    ),
    "binary.csv": (b"\xff\xfe\x00\x81" * 9, "binary.csv cannot be read as a table"),
    "text.xlsx": (b"no workbook", "text.xlsx cannot be read as a table"),
    "cut.xlsx": (b"PK\x03\x04" + bytes(200), "cut.xlsx cannot be read as a table"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_refused(tmp_path, capsys, name):
    content, message = FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    truth = write(frames()[0], tmp_path / "truth.csv")
    assert challenge_eval.guard(challenge_eval.main, [str(truth), str(tmp_path / name)]) == 2
    assert pd.Series([capsys.readouterr().err]).str.contains(message, regex=True)[0]


def test_the_process_ends_with_status_2_and_one_line(tmp_path):
    truth, answer = frames()
    done = run(write(truth, tmp_path / "truth.csv"), write(answer.assign(N=7), tmp_path / "answer.csv"))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert run(tmp_path).returncode == 2  # a second file is needed
    assert run(tmp_path, tmp_path).returncode == 2  # folders are no files


def test_blank_lines_do_not_move_the_row_numbers(tmp_path):
    path = tmp_path / "answer.csv"
    path.write_text("ID,N,D,G,C,A,H,M,O\n\n1,0,0,0,0,0,0,0,0\n\n2,0,0,0,0,0,0,0,9\n")
    with pytest.raises(InputError, match=r"column O .*in 1 row\(s\), first in sheet row\(s\) 5 \(9\)$"):
        challenge_eval.read_labels(path, binary=False)


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "ground_truth" in done.stdout and "predictions" in done.stdout
