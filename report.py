"""Published beside measured: a table on the terminal, runs/results.csv and the page runs/report.html.

    python report.py
    python report.py --compare runs/odir-03 runs/odir-11

A run belongs to the experiment whose line in run_all.sh it ran, whatever its folder is called. What differs from
that line, what is stale, damaged or rendered is named. --compare prints the flags in which two runs differ, every
score's difference with its 95 % interval and the ten patients they disagree on, and writes runs/compare.html.
"""

import argparse
import base64
import csv
import io
import json
import math
import re
import sys
from pathlib import Path

import arguments
from errors import InputError, Parser, guard, reading

SCORES = (
    "accuracy kappa quadratic_kappa f1 auc final auc_abnormal auc_acl auc_meniscus".split()
)  # their order
PREFIXES = {"": "", "per label": "", "classes": "", "auc": "", "challenge": "challenge_"}
PREFIXES["per label, learned thresholds"] = "learned_"
PICTURES = "confusion roc samples heatmaps reliability".split()
ENTRY = "study experiment title note f1_by_label auc_by_label".split()  # the other columns are scores
PROBS_BYTES, PAGE_BYTES = (
    4_500_000,
    9_500_000,
)  # what probabilities, and pictures with them, may take of the page
NOTHING = {"published": None, "measured": None, "std": None, "low": None, "high": None}


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=Path, default="runs", help="run folders; the report goes there")
    beside = Path(__file__).with_name("published.csv")
    parser.add_argument(
        "--published", type=Path, default=beside, help="study, experiment, title, note, scores"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two run folders")
    return parser


# ---------------------------------------------------------------- what is read


def read_published(path):
    """A dict for each line of published.csv: ENTRY's columns as text, "scores" {name: figure or None}."""
    with reading(f"--published {path}", "a table of published figures"):
        with open(path, newline="", encoding="utf-8-sig") as stream:
            table = list(csv.reader(stream, strict=True))
        entries = []
        for cells in table[1:]:
            line = dict(zip(table[0], cells, strict=True))
            entry = {key: line.pop(key) for key in ENTRY[:4]} | {key: line.pop(key, "") for key in ENTRY[4:]}
            entry["scores"] = {name: checked(float(text)) if text else None for name, text in line.items()}
            entries.append(entry)
    names = [entry["experiment"] for entry in entries]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--published {path}: expected a line for each experiment, and none twice")
    return entries


def checked(value):
    """Scores of a JSON file at any depth; null stands for NaN there. Raises ValueError for what is no score."""
    if isinstance(value, dict):
        return {key: checked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [checked(inner) for inner in value]
    if isinstance(value, bool) or value is not None and not -1 <= value <= 1:
        raise ValueError(f"{value} is no score")
    return math.nan if value is None else float(value)


def flatten(families):
    """{"per label": {"f1": 0.4}, "challenge": {"f1": 0.9}} -> {"f1": 0.4, "challenge_f1": 0.9}, checked."""
    flat = {}
    for family, scores in families.items():
        for name, value in scores.items():
            flat[PREFIXES[family] + name] = checked(value)
    return flat


def read_info(path, run):
    """run.json: what is compared or computed with is checked, the rest is shown as it stands."""
    info = json.loads(path.read_text(encoding="utf-8"))
    if info["status"] not in ("running", "interrupted", "finished"):
        raise ValueError(f"status {info['status']!r}")
    run["scores"] = flatten({"": info.get("scores") or {}})
    run["args"], run["study"] = dict(info.get("args") or {}), str(info["dataset"])
    run["data"] = "rendered" if info["data"]["rendered"] else "real"
    run["shuffled"] = run["shuffled"] or bool(info.get("shuffled_labels"))
    run["status"], run["info"] = info["status"].replace("running", "unfinished"), info


def read_tested(path, run):
    """test_scores.json. Raises InputError where its scores are not those of this run's best checkpoint."""
    tested, info = json.loads(path.read_text(encoding="utf-8")), run["info"]
    if tested["split"] == "all":
        raise InputError("--split all scores the training patients too; val or test is needed")
    if tested["threshold"] != 0.5:
        raise InputError(f"tested at --threshold {tested['threshold']}; the published figures are for 0.5")
    if not tested["data"]["own"]:
        raise InputError(f"it is of other data than the run's own ({tested['data']['root']})")
    for key, value in tested["checkpoint"].items():
        if value != info.get(f"best_{key}"):
            raise InputError(f"it is stale ({key} {value}, the run's best is {info.get(f'best_{key}')})")
    if tested["data"]["digest"] != info["data"]["digest"]:
        raise InputError("it is stale (the data changed since)")
    found = {"scores": flatten(tested["scores"]), "part": str(tested["split"])}
    found["intervals"] = flatten(tested.get("intervals") or {})
    found["trivial"] = {name: flatten(answer) for name, answer in (tested.get("trivial") or {}).items()}
    found["by_label"] = checked(tested.get("labels") or {})
    found["label_intervals"] = checked(tested.get("label_intervals") or {})
    if tested["rows"] != tested["expected_rows"]:
        run["problems"].append(f"scored {tested['rows']} of {tested['expected_rows']} rows")
    run |= found | {"tested": tested}


def read_sheet(path):
    """{column: values} of an xlsx file."""
    return json.loads(kept(path, sheet_as_json))


def sheet_as_json(path):
    import openpyxl  # here and below, because --help has to answer at once

    header, *rows = openpyxl.load_workbook(io.BytesIO(path.read_bytes()), read_only=True).active.values
    columns = zip(*rows, strict=True)
    return json.dumps(dict(zip(map(str, header), columns, strict=True))).encode()


def read_history(path, run):
    history = read_sheet(path)
    for name, values in history.items():
        if any(value is not None and not math.isfinite(value) for value in values):
            raise ValueError(f"{name} holds no numbers")
    run["history"] = history if history["epoch"] else None


def read_answers(path, run):
    """probs.xlsx and, beside it, ground_truth.xlsx -> "answers": labels, IDs, probabilities and truth (n, L)."""
    import numpy as np

    probs, truth = read_sheet(path), read_sheet(path.with_name("ground_truth.xlsx"))
    ids, same = [str(name) for name in probs.pop("ID")], [str(name) for name in truth.pop("ID")]
    probs, truth, labels = np.array([*probs.values()], float), np.array([*truth.values()], int), list(probs)
    if same != ids or probs.shape != truth.shape or not ((probs >= 0) & (probs <= 1)).all():
        raise ValueError("it does not fit ground_truth.xlsx, or holds no probabilities")
    run["answers"] = {"labels": labels, "ids": ids, "probs": probs.T, "truth": truth.T}


def read_picture(path, run):
    run["pictures"][path.stem] = base64.b64encode(kept(path, shrink)).decode()


def shrink(path):
    """A picture as WebP, at most 900 pixels wide."""
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((900, 6000), reducing_gap=2)
    image.save(buffer := io.BytesIO(), "WEBP", quality=60, method=2)
    return buffer.getvalue()


def kept(path, make):
    """make(path), as bytes, kept in the run's folder .report under the size and time of what it was made of."""
    from cache import replace_file

    status = path.stat()
    place = path.parent / ".report" / f"{path.name}-{status.st_size}-{status.st_mtime_ns}"
    if place.is_file():
        return place.read_bytes()
    made = make(path)
    try:
        for old in place.parent.glob(f"{path.name}-*"):
            old.unlink()
        replace_file(place, lambda stream: stream.write(made))
    except OSError:  # a folder that nobody may write to: it is made anew every time
        pass
    return made


def read(run, name, reader):
    """`reader` takes what a file of the run holds into `run`. What is damaged or does not count is named."""
    path = run["folder"] / name
    if not path.exists():  # a run that was stopped early, or not tested yet, lacks some
        return
    try:
        with reading(name, "what a run writes"):
            reader(path, run)
    except InputError as error:
        cause = error.__cause__
        damage = f"is damaged ({type(cause).__name__}: {cause})"
        run["problems"].append(f"{name} " + (damage if cause else f"is not counted: {error}"))


def read_run(folder):
    """A run folder as a dict; without a sound run.json its status is "damaged"."""
    name = folder.name
    bare = re.sub(r"-seed\d+$", "", re.sub(r"^((demo|control)-)+", "", name))
    run = {"folder": folder, "name": name, "bare": bare, "base": re.sub(r"-seed\d+$", "", name), "info": {}}
    run |= {"study": bare.split("-")[0], "status": "damaged", "data": "rendered" if "demo-" in name else ""}
    run |= {"shuffled": "control-" in name, "args": {}, "part": "val", "scores": {}, "intervals": {}}
    run |= {"by_label": {}, "label_intervals": {}, "trivial": {}, "tested": None, "history": None}
    run |= {"answers": None, "pictures": {}, "problems": []}
    if not (folder / "run.json").exists():
        run["problems"].append("run.json is damaged (it is missing)")
    read(run, "run.json", read_info)
    if run["info"]:
        read(run, "test_scores.json", read_tested)
    read(run, "train_results.xlsx", read_history)
    return run
