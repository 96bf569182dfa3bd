"""Published beside measured: a table on the terminal, runs/results.csv, and runs/report.html with every picture in it.

    python report.py

Reads every run folder and published.csv. What cannot be read is named as damaged; what ran on rendered data says so.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

import figures
from errors import InputError, guard

STUDIES = {"odir": "ODIR-5K: eight labels from both eyes", "aptos": "APTOS 2019: grade of diabetic retinopathy",
           "dr": "EyePACS: grade of diabetic retinopathy", "retina": "Retina: diabetic retinopathy, glaucoma, normal",
           "mrnet": "MRNet: knee MRI in three planes"}
SCORES = {"accuracy": "accuracy", "kappa": "Cohen kappa", "quadratic_kappa": "quadratic kappa", "f1": "F1",
          "auc": "AUC", "final": "final", "auc_abnormal": "AUC abnormal", "auc_acl": "AUC ACL",
          "auc_meniscus": "AUC meniscus"}
MAIN_CURVES = ("val_final_score", "val_accuracy", "val_auc")  # a study's main score: the first that its runs have
PICTURES = {"confusion": "Confusion matrices", "roc": "ROC curves", "samples": "Samples", "heatmaps": "Heat maps"}
OWN = ("own run", "shuffled-label control: kappa and AUC have to fall to chance")  # what has no line in published.csv
HOW = ("seed", "name", "resume", "runs", "cache", "workers", "device", "precision", "compile")  # seeds of one run may differ in these
ENTRY = ["study", "experiment", "title", "note"]  # published.csv; its other columns are scores
CELL = dict.fromkeys(("published", "measured", "std", "low", "high"))
# What flipped bytes make json, zip, XML, openpyxl, pandas and Pillow raise (SyntaxError: a broken PNG or XML).
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, EOFError,
          RuntimeError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs", help="run folders; the report goes there (%(default)s)")
    parser.add_argument("--published", type=Path, default=Path(__file__).with_name("published.csv"),
                        help="study, experiment, title, note, then a column per score (beside this script)")
    return parser


def number(value):
    return float("nan") if value is None else float(value)  # NaN is written as null


def flatten(families, convert=number):
    """{"per label": {"f1": 0.4}, "challenge": {"f1": 0.9}} -> {"f1": 0.4, "challenge_f1": 0.9}"""
    return {"challenge_" * (family == "challenge") + name: convert(value)
            for family, scores in families.items() for name, value in scores.items()}


def read_info(path):
    info = json.loads(path.read_text(encoding="utf-8"))
    if info["status"] not in ("running", "interrupted", "finished"):
        raise ValueError(f"status {info['status']!r}")
    data, args, texts = info["data"], dict(info.get("args") or {}), ("command", "commit", "device", "epochs_run", "best_epoch")
    status = "unfinished" if info["status"] == "running" else info["status"]
    return {"status": status, "study": str(info["dataset"]), "data": "rendered" if data["rendered"] else "real",
            "texts": {key: str(info[key]) for key in texts if key in info}, "part": "val",
            "seconds": number(info.get("seconds")), "scores": flatten({"": info.get("scores") or {}}),
            "shuffled": bool(info.get("shuffled_labels")), "digest": str(data.get("digest")),
            "repaired": str(data.get("repaired")), "parts": dict(data.get("parts") or {}),
            "left_out": int(data.get("left_out") or 0), "args": {key: str(args[key]) for key in args if key not in HOW}}


def read_scores(path):
    tested = json.loads(path.read_text(encoding="utf-8"))
    if tested["split"] == "all":
        raise ValueError("--split all scores the training patients too; val or test is needed")
    if tested.get("threshold", 0.5) != 0.5:
        raise ValueError(f"tested at --threshold {tested['threshold']}; the published figures are for 0.5")
    return {"scores": flatten(tested["scores"]), "part": str(tested["split"]),
            "intervals": flatten(tested.get("intervals", {}), lambda pair: (number(pair[0]), number(pair[1]))),
            "labels": {score: flatten({"": values}) for score, values in tested.get("labels", {}).items()},
            "trivial": {answer: flatten(families) for answer, families in tested.get("trivial", {}).items()}}


def read_history(path):
    history = pd.read_excel(path)
    return {"history": history, "pictures": [("Learning curves", embed(figures.curves(history)))]}


def embed(source):
    """A Figure or the path of a picture as a data: URI: WebP, at most 1000 pixels wide."""
    if not isinstance(source, Path):
        source.savefig(buffer := io.BytesIO(), dpi=100)
        source = buffer
    with Image.open(source) as image:
        image = image.convert("RGB")
    image.thumbnail((1000, 6000))
    image.save(buffer := io.BytesIO(), "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_run(folder):
    """One run folder as a dict. A damaged file is named in "problems"; without run.json the status is "damaged" too."""
    run = {"name": folder.name, "base": re.sub(r"-seed\d+$", "", folder.name), "status": "damaged", "problems": [],
           "study": re.sub(r"^((demo|control)-)+", "", folder.name).split("-")[0], "shuffled": False, "part": "",
           "data": "rendered" if "demo-" in folder.name else "", "texts": {}, "scores": {}, "intervals": {},
           "labels": {}, "trivial": {}, "history": None, "pictures": [], "seconds": float("nan"), "parts": {},
           "left_out": 0, "digest": "unknown", "repaired": "unknown", "args": {}}
    readers = {"run.json": read_info, "test_scores.json": read_scores, "train_results.xlsx": read_history}
    for stem, caption in PICTURES.items():
        readers[f"{stem}.png"] = lambda path, caption=caption: {"pictures": [(caption, embed(path))]}
    for name, read in readers.items():
        try:
            found = read(folder / name)
            run |= {**found, "pictures": run["pictures"] + found.get("pictures", [])}
        except FileNotFoundError:  # a run that was stopped early, or not tested yet, lacks others
            run["problems"] += ["run.json is damaged (it is missing)"] if name == "run.json" else []
        except DAMAGE as error:
            run["problems"].append(f"{name} is damaged ({type(error).__name__}: {error})")
    return run | {"shuffled": run["shuffled"] or "control-" in folder.name}


def make_row(entry, published, runs):
    """A line of the tables and its runs (seeds; perhaps none). Rendered ones count only where there is no real one."""
    runs = [run for run in runs if run["data"] != "rendered"] or runs
    done = [run for run in runs if run["status"] == "finished"]
    first = (done or runs or [{"status": "not run", "data": "", "texts": {}, "seconds": None, "intervals": {},
                                "parts": {}, "left_out": 0, "shuffled": False}])[0]
    other = sorted({key for run in done for key in {**run["args"], **done[0]["args"]} if run["args"].get(key) != done[0]["args"].get(key)})
    row = {**entry, "published": bool(published), "runs": runs, "first": first, "n": len(done), "data": first["data"], "scores": {},
           "status": "rendered" if done and first["data"] == "rendered" else first["status"],
           "part": ", ".join(sorted({run["part"] for run in done})),
           "problems": [f"{run['name']}: {text}" for run in runs for text in run["problems"]]
           + [f"{run['name']} is {run['status']}: not counted" for run in runs if done and run["status"] != "finished"]
           + [f"these runs differ in {', '.join(other)}: their mean says little"] * bool(other),
           "facts": [f"{first['texts'].get('epochs_run', '?')} epochs"] * bool(done)
           + [f"{first['left_out']} rows left out"] * bool(first["left_out"])
           + ["random weights"] * (first.get("args", {}).get("weights") == "none")}
    for score in dict.fromkeys([*published, *(score for run in done for score in run["scores"])]):
        values = [run["scores"][score] for run in done if score in run["scores"]]
        low, high = first["intervals"].get(score, (None, None)) if values else (None, None)
        row["scores"][score] = {
            "published": published.get(score), "measured": float(np.mean(values)) if values else None,
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "low": low, "high": high}
    return row


def make_rows(published, runs):
    """A row per line of published.csv, then one for every run without a line there: a user's own, and the controls."""
    rows, taken = [], set()
    for line in published.to_dict("records"):
        names = (line["experiment"], f"demo-{line['experiment']}")
        own = [run for run in runs if run["base"] in names and not run["shuffled"]]
        taken |= {run["name"] for run in own}
        scores = {score: None if pd.isna(value) else value for score, value in line.items() if score not in ENTRY}
        rows.append(make_row({key: line[key] for key in ENTRY}, scores, own))
    left = [run for run in runs if run["name"] not in taken]
    for base in dict.fromkeys(run["base"] for run in left):
        own = [run for run in left if run["base"] == base]
        title = OWN[own[0]["shuffled"]]
        rows.append(make_row({"study": own[0]["study"], "experiment": base, "title": title, "note": ""}, {}, own))
    return rows


def make_study(key, rows):
    """What the page shows of one study: rows, score families, trivial answers, learning curves, scores by label."""
    order = [prefix + score for prefix in ("", "challenge_") for score in SCORES]
    used = {name for row in rows for name, cell in row["scores"].items() if cell != CELL}
    plain = sorted((name for name in used if not name.startswith("challenge_")), key=[*order, *sorted(used)].index)
    challenge = sorted(used.difference(plain), key=[*order, *sorted(used)].index)
    title = ("Per-label scores" if "final" in plain else "Scores over the classes" if "accuracy" in plain else
             "AUC by label, and their mean" if plain else "Experiments")
    histories = {row["experiment"] + " (rendered)" * (row["data"] == "rendered"): row["first"]["history"]
                 for row in rows if row["runs"] and row["first"]["history"] is not None}
    numbers = {name for history in histories.values() for name in history if history[name].notna().any()}
    curve = [name for name in MAIN_CURVES if name in numbers][:1]
    labelled, by_label = [row for row in rows if row["n"] and row["first"]["labels"]], {}
    for score, values in (item for row in labelled for item in row["first"]["labels"].items()):
        by_label[score] = list(dict.fromkeys([*by_label.get(score, []), *values]))
    trivial = sorted((run for row in rows for run in row["runs"] if run["trivial"]), key=lambda run: run["data"])
    return {"title": STUDIES.get(key, key), "rows": rows, "labelled": labelled, "by_label": by_label,
            "families": [(title, plain)] + [("Challenge scores (all cells flattened)", challenge)] * bool(challenge),
            "trivial": trivial[0] if trivial else None,
            "headlines": ["final", "challenge_final"] if "final" in plain else plain[:4],
            "curves": embed(figures.compare_curves(histories, ["val_loss", *curve])) if histories else None}


def show(value, digits=4):
    return "–" if value is None else "undefined" if value != value else f"{value:.{digits}f}"


def duration(seconds):
    return "–" if seconds is None or seconds != seconds else f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def print_table(study):
    heads = "".join(f"{name.replace('_', ' '):27}" for name in study["headlines"])
    print(f"\n{study['title']}\n{'experiment':27}{'status':13}{'n':4}{heads}".rstrip())
    for row in study["rows"]:
        line = f"{row['experiment']:26} {row['status']:12} {row['n'] or '–':<4}"
        for cell in (row["scores"].get(name, CELL) for name in study["headlines"]):
            spread = "" if cell["std"] is None else f" ± {cell['std']:.4f}"
            line += f"{show(cell['published']):6} | {show(cell['measured']) + spread:18}"
        print("\n    ! ".join([line.rstrip(), *row["problems"]]))


def main():
    args = get_args_parser().parse_args()
    if not args.runs.is_dir():
        raise InputError(f"--runs {args.runs}: no such folder. Expected the one that holds train.py's run folders.")
    try:
        published = pd.read_csv(args.published, dtype=dict.fromkeys(ENTRY, str)).fillna(dict.fromkeys(ENTRY, ""))
        published = published.astype({name: float for name in published if name not in ENTRY})
        repeated = published[ENTRY]["experiment"].duplicated()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--published {args.published}: {error}. Expected {', '.join(ENTRY)} and scores.") from error
    if repeated.any():
        raise InputError(f"--published {args.published}: two lines for {published['experiment'][repeated].iloc[0]}.")
    files = ("run.json", "last.pt", "best.pt", "train_results.xlsx")  # any of them makes it a run folder
    folders = sorted({path.parent for file in files for path in args.runs.glob(f"*/{file}")})
    rows = make_rows(published, [read_run(folder) for folder in folders])
    keys = dict.fromkeys(row["study"] for row in rows)
    studies = [make_study(key, [row for row in rows if row["study"] == key]) for key in keys]
    for study in studies:
        print_table(study)
    print("\npublished | measured ± standard deviation over n seeds; rendered: drawn stand-ins, not patients")
    table = pd.DataFrame([{
        **{key: row[key] for key in ("study", "experiment", "title", "status", "data", "part", "n")},
        **{f"{name}_{what}": value for name, cell in row["scores"].items() for what, value in cell.items()},
        "seconds": row["first"]["seconds"],
        **{key: row["first"]["texts"].get(key) for key in ("command", "commit", "device")},
        "note": "; ".join(filter(None, [row["note"], *row["problems"]]))} for row in rows])
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(show=show, duration=duration)
    template = environment.get_template("report_template.html")
    page = template.render(studies=studies, rows=rows, scores=SCORES, empty=CELL)
    for name, text in (("results.csv", table.to_csv(index=False, float_format="%.6g")), ("report.html", page)):
        part = args.runs / f".{name}.{os.getpid()}.part"  # written beside and renamed: never half a report
        part.write_text(text, encoding="utf-8")
        os.replace(part, args.runs / name)
        print(f"wrote {args.runs / name}")


if __name__ == "__main__":
    sys.exit(guard(main))
