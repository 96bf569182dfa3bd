"""Run folders and published.csv as report.py needs them: checked; what is stale or damaged is named.

python -c 'import runfolders as r, pathlib; print(r.read_run(pathlib.Path("runs/odir-03"))["problems"])'"""

import base64
import contextlib
import csv
import io
import json
import math
import re

from errors import InputError, reading

PREFIXES = {"": "", "per label": "", "classes": "", "auc": "", "challenge": "challenge_"}
PREFIXES["per label, learned thresholds"] = "learned_"
# The other columns are scores. published_rows: how many rows the figures are of (docs/results.md).
ENTRY = "study experiment title note published_rows f1_by_label auc_by_label".split()


def read_published(path):
    """A dict for each line of published.csv: ENTRY's columns as text, "scores" {name: figure}."""
    entries = []
    with reading(path, "a table of published figures"), open(path, newline="", encoding="utf-8") as stream:
        for line in csv.DictReader(stream, strict=True):
            entry = {key: line.pop(key) for key in ENTRY} | {"kind": "published"}
            entry["scores"] = {name: figure(float(text)) for name, text in line.items() if text != ""}
            entries.append(entry)
    return entries


def figure(value):
    """A score of a JSON file, null as NaN. Raises ValueError or TypeError for what is no score."""
    if isinstance(value, bool) or value is not None and not -1 <= value <= 1:
        raise ValueError(f"{value} is no score")
    return math.nan if value is None else float(value)


def pair(values):
    low, high = values
    return figure(low), figure(high)


def flatten(families, convert=figure):
    """{"per label": {"f1": 0.4}, "challenge": {"f1": 0.9}} -> {"f1": 0.4, "challenge_f1": 0.9}, checked."""
    flat = {}
    for family, scores in families.items():
        flat |= {PREFIXES[family] + name: convert(value) for name, value in scores.items()}
    return flat


def read_info(path, run):
    """run.json: what is computed with is checked, the rest is shown as it stands."""
    info = json.loads(path.read_text(encoding="utf-8"))
    args, data = info["args"], info["data"]
    if not {"dataset", "model", "lr", "batch", "epochs", "size"} <= args.keys():
        raise ValueError("flags are missing")
    states = {"running": "unfinished", "interrupted": "interrupted", "finished": "finished"}
    found = {"status": states[info["status"]], "data": "rendered" if data["rendered"] else "real"}
    found |= {"scores": flatten({"": info.get("scores") or {}}), "args": args, "study": str(args["dataset"])}
    found |= {"rows": dict(data["parts"]), "patients": dict(data["patients"]), "digest": data["digest"]}
    found |= {"scored": (int(data["parts"]["val"]), int(data["patients"]["val"]))}
    found |= {"notes": [str(note) for note in data.get("notes", [])], "changes": info.get("changes") or []}
    found["weights"] = [note for note in found["notes"] if note.startswith("--weights")]
    found |= {"duplicates": {"val": data.get("duplicates")}, "shuffled": args.get("shuffle_labels")}
    run |= found | {"ordered": info.get("ordered", True), "info": info}


def read_tested(path, run):
    """test_scores.json. Raises InputError where its scores are not those of this run's best checkpoint."""
    tested = json.loads(path.read_text(encoding="utf-8"))
    if tested["split"] == "all":
        raise InputError("--split all scores the training patients too; val or test is needed")
    if tested["threshold"] != 0.5:
        raise InputError(f"tested at --threshold {tested['threshold']}; the published figures are for 0.5")
    if tested.get("tta") or len(tested.get("networks", [])) > 1:
        raise InputError("it is a mean of networks or of mirrored views, not this network's own answer")
    if not tested["data"]["own"]:
        raise InputError(f"it is of other data than the run's own ({tested['data']['root']})")
    for key in ("epoch", "loss", "digest"):
        best, seen = run["info"].get(f"best_{key}"), tested["checkpoint"][key]
        if best is None:
            raise InputError("it is of a run that had not ended")
        if best != seen:
            raise InputError(f"it is stale (of a checkpoint with {key} {seen}; the run's best has {best})")
    run["contents"] = tested["data"].get("contents")
    if tested["data"]["digest"] != run["digest"]:
        raise InputError("it is stale (the data changed after the training)")
    found = {"scores": flatten(tested["scores"]), "intervals": flatten(tested.get("intervals") or {}, pair)}
    found["trivial"] = {name: flatten(answer) for name, answer in (tested.get("trivial") or {}).items()}
    for key, name, convert in (("by_label", "labels", figure), ("label_intervals", "label_intervals", pair)):
        found[key] = {score: flatten({"": one}, convert) for score, one in (tested.get(name) or {}).items()}
    if tested["rows"] != tested["expected_rows"]:
        run["problems"].append(f"scored {tested['rows']} of the {tested['expected_rows']} rows of its part")
    scored = int(tested["rows"]), int(tested["patients"])
    run |= found | {"tested": tested, "part": str(tested["split"]), "scored": scored}
    if tested.get("duplicates"):
        run["duplicates"][run["part"]] = tested["duplicates"]
    # The families in which two runs can be compared: they share the threshold 0.5.
    run["families"] = [family for family in tested["scores"] if "thresholds" not in family]


def read_history(path, run):
    history = json.loads(kept(path, sheet_as_json))
    for name, values in history.items():
        history[name] = [value if value is None else float(f"{value:.5g}") for value in values]
    run["history"] = history if history["epoch"] else None


def read_answers(path, run):
    """probs.xlsx, or ground_truth.xlsx that belongs to it: a row of labels for each ID."""
    import numpy as np  # here, as others below, because --help has to answer at once

    import metrics

    sheet = json.loads(kept(path, sheet_as_json))
    ids, labels = [str(name) for name in sheet.pop("ID")], list(sheet)
    values = np.array([*sheet.values()], float).T  # (n, L)
    if path.stem == "probs":
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("it holds no probabilities")
        run["ids"], run["labels"], run["probs"] = ids, labels, values
        return
    if (ids, labels) != (run["ids"], run["labels"]) or not np.isin(values, (0, 1)).all():
        raise ValueError("it does not fit probs.xlsx, or holds other than 0 and 1")
    truth = values.astype(int)
    # Sheets of another run or test would be compared under this run's name.
    for family in run["families"]:
        asked = family, truth.argmax(1) if family == "classes" else truth, run["probs"], labels
        scores = metrics.scores(*asked, ordered=run["ordered"])
        told = [run["scores"].get(PREFIXES[family] + name, math.nan) for name in scores]
        if not np.allclose([*scores.values()], told, rtol=0, atol=1e-6, equal_nan=True):
            raise InputError("with probs.xlsx it gives other scores than test_scores.json has")
    run["truth"] = truth


def read_picture(path, run):
    run["pictures"][path.stem] = base64.b64encode(kept(path, shrink)).decode()


def sheet_as_json(path):
    """{column: values} of an xlsx file."""
    import openpyxl

    header, *rows = openpyxl.load_workbook(io.BytesIO(path.read_bytes()), read_only=True).active.values
    columns = zip(*rows, strict=True)
    return json.dumps(dict(zip(map(str, header), columns, strict=True)), default=str).encode()


def shrink(path, width=800):
    """A picture as WebP."""
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((width, 6000), reducing_gap=2)
    image.save(buffer := io.BytesIO(), "WEBP", quality=50, method=2)
    return buffer.getvalue()


def kept(path, make):
    """make(path), bytes that take long, kept in the run's folder .report under the file's size and time."""
    from cache import replace_file

    status = path.stat()
    place = path.parent / ".report" / f"{path.name}-{status.st_size}-{status.st_mtime_ns}"
    if place.is_file():
        return place.read_bytes()
    made = make(path)
    with contextlib.suppress(OSError):  # a run folder that nobody may write to: it is made anew every time
        for old in place.parent.glob(f"{path.name}-*"):
            old.unlink()
        replace_file(place, lambda stream: stream.write(made))
    return made


def read(run, name, reader):
    """`reader` takes what a file holds into `run`. What is damaged or does not count is named."""
    path = run["folder"] / name
    if not path.exists() and name != "run.json":  # a run that was not tested yet lacks some
        return
    try:
        with reading(name, "what a run writes"):
            reader(path, run)
    except InputError as error:
        cause = error.__cause__
        damage = f"is damaged ({type(cause).__name__}: {cause})"
        run["problems"].append(f"{name} {damage if cause else f'is not counted: {error}'}")


def read_run(folder):
    """A run folder as a dict; without a sound run.json its status is "damaged"."""
    base = re.sub(r"-seed\d+$", "", folder.name)
    bare = re.sub(r"^((demo|control)-)+", "", base)
    run = dict.fromkeys("tested history rows patients digest contents ids labels probs truth".split())
    run |= dict(folder=folder, name=folder.name, bare=bare, base=base, study=bare.split("-")[0])
    run |= dict(status="damaged", data="rendered" if "demo-" in folder.name else "", part="val")
    run |= dict(shuffled="control-" in folder.name, problems=[], notes=[], changes=[], scored=("", ""))
    for key in "info args scores intervals by_label label_intervals trivial pictures duplicates".split():
        run[key] = {}
    read(run, "run.json", read_info)
    read(run, "train_results.xlsx", read_history)
    if run["info"]:
        read(run, "test_scores.json", read_tested)
    for part, count in run["duplicates"].items():
        if count:
            run["problems"].append(f"{count} of its {part} rows hold a picture that it was trained on")
    if run["tested"]:  # else they are of another checkpoint too
        read(run, "probs.xlsx", read_answers)
    if run["ids"]:
        read(run, "ground_truth.xlsx", read_answers)
    return run
