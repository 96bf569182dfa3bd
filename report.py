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
import matplotlib
import numpy as np
import pandas as pd
from PIL import Image

import figures
from errors import InputError, guard

STUDIES = {"odir": "ODIR-5K: eight labels from both eyes", "aptos": "APTOS 2019: grade of diabetic retinopathy",
           "dr": "EyePACS: grade of diabetic retinopathy", "retina": "Retina: diabetic retinopathy, glaucoma, normal",
           "mrnet": "MRNet: knee MRI in three planes"}
SCORES = {"accuracy": "accuracy", "kappa": "Cohen kappa", "quadratic_kappa": "quadratic kappa", "f1": "F1", "auc": "AUC",
          "final": "final", "auc_abnormal": "AUC abnormal", "auc_acl": "AUC ACL", "auc_meniscus": "AUC meniscus"}
MAIN_CURVES = ("val_final_score", "val_accuracy", "val_auc")  # the first that the runs have is the study's main score
PICTURES = {"confusion": "Confusion matrices", "roc": "ROC curves", "samples": "Sample patients", "heatmaps": "Heat maps"}
ENTRY = ["study", "experiment", "title", "note"]  # published.csv; its other columns are scores
CELL = dict.fromkeys(("published", "measured", "std", "low", "high"))
# What flipped bytes make json, zip, XML, openpyxl, pandas and Pillow raise (SyntaxError: a broken PNG or XML).
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, EOFError, RuntimeError,
          zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default="runs", help="the run folders; the report goes there (%(default)s)")
    parser.add_argument("--published", type=Path, default=Path(__file__).with_name("published.csv"),
                        help="study, experiment, title, note, then a column per score (published.csv beside this script)")
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
    data = info["data"]
    texts = {key: str(info[key]) for key in ("command", "commit", "device", "epochs_run", "best_epoch") if key in info}
    return {"status": info["status"], "study": str(info["dataset"]), "rendered": bool(data["rendered"]), "texts": texts,
            "scores": flatten({"": info.get("scores") or {}}), "seconds": number(info.get("seconds")), "part": "val",
            "shuffled": bool(info.get("shuffled_labels")), "parts": dict(data.get("parts") or {}),
            "left_out": dict(data.get("left_out") or {}), "digest": data.get("digest"), "repaired": data.get("repaired", 0)}


def read_scores(path):
    tested = json.loads(path.read_text(encoding="utf-8"))
    if tested["split"] == "all":
        raise ValueError("--split all scores the training patients too; val or test is needed")
    return {"scores": flatten(tested["scores"]), "part": str(tested["split"]),
            "intervals": flatten(tested.get("intervals", {}), lambda pair: (number(pair[0]), number(pair[1]))),
            "labels": {score: flatten({"": values}) for score, values in tested.get("labels", {}).items()},
            "trivial": {answer: flatten(families) for answer, families in tested.get("trivial", {}).items()}}


def read_history(path):
    history = pd.read_excel(path)
    return {"history": history, "pictures": [("Learning curves", embed(figures.curves(history)))]}


def read_run(folder):
    """One run folder as a dict. A damaged file is named in "problems"; without run.json the status is "damaged" too."""
    bare = re.sub(r"^((demo|control)-)+", "", folder.name)
    run = {"name": folder.name, "base": re.sub(r"-seed\d+$", "", folder.name), "status": "damaged", "problems": [],
           "study": bare.split("-")[0], "rendered": folder.name.startswith("demo-"), "shuffled": "control-" in folder.name,
           "texts": {}, "scores": {}, "intervals": {}, "labels": {}, "trivial": {}, "history": None, "pictures": [],
           "seconds": float("nan"), "parts": {}, "left_out": {}, "digest": None, "repaired": 0, "part": ""}
    readers = {"run.json": read_info, "test_scores.json": read_scores, "train_results.xlsx": read_history}
    for stem, caption in PICTURES.items():
        readers[f"{stem}.png"] = lambda path, caption=caption: {"pictures": [(caption, embed(path))]}
    for name, read in readers.items():
        try:
            found = read(folder / name)
            found["pictures"] = run["pictures"] + found.get("pictures", [])
            run |= found
        except FileNotFoundError:  # a run that was stopped early, or not tested yet, has no other file
            run["problems"] += ["run.json is missing: damaged"] if name == "run.json" else []
        except DAMAGE as error:
            run["problems"].append(f"{name} is damaged ({type(error).__name__}: {error})")
    return run | {"shuffled": run["shuffled"] or "control-" in folder.name}


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


def make_row(entry, published, runs):
    """A line of the tables and its runs (seeds; perhaps none). Rendered ones count only where there is no real one."""
    runs = [run for run in runs if not run["rendered"]] or runs
    done = [run for run in runs if run["status"] == "finished"]
    first = (done or runs or [None])[0]
    row = {**entry, "runs": runs, "first": first, "n": len(done), "status": first["status"] if first else "not run",
           "data": ("rendered" if first["rendered"] else "real") if first else "", "scores": {},
           "part": ", ".join(sorted({run["part"] for run in done})),
           "problems": [f"{run['name']}: {text}" for run in runs for text in run["problems"]]}
    if done:
        row["status"] = "rendered" if first["rendered"] else "finished"
        row["problems"] += [f"{r['name']} is {r['status']}: not counted" for r in runs if r["status"] != "finished"]
    for score in dict.fromkeys([*published, *(score for run in done for score in run["scores"])]):
        values = [run["scores"][score] for run in done if score in run["scores"]]
        low, high = first["intervals"].get(score, (None, None)) if done else (None, None)
        row["scores"][score] = {"published": published.get(score), "measured": float(np.mean(values)) if values else None,
                                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "low": low, "high": high}
    return row


def make_rows(published, runs):
    """A row per line of published.csv, then one for every run that has no line there: a user's own, and the controls."""
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
        title = "shuffled-label control: has to fall to chance" if own[0]["shuffled"] else "own run"
        rows.append(make_row({"study": own[0]["study"], "experiment": base, "title": title, "note": ""}, {}, own))
    return rows


def make_study(key, rows):
    """What the page shows of one study: its rows, score families, trivial answers, learning curves, scores by label."""
    order = [prefix + score for prefix in ("", "challenge_") for score in SCORES]
    used = {name for row in rows for name, cell in row["scores"].items() if cell != CELL}
    used = sorted(used, key=lambda name: (order.index(name) if name in order else len(order), name))
    plain = [name for name in used if not name.startswith("challenge_")]
    title = ("Per-label scores" if "final" in plain else "Scores over the classes" if "accuracy" in plain else
             "AUC by label, and their mean" if plain else "Experiments")
    challenge = [("Challenge scores (all cells flattened)", used[len(plain):])] if len(used) > len(plain) else []
    histories = {row["experiment"]: row["first"]["history"] for row in rows if row["first"] and row["first"]["pictures"]}
    histories = {name: history for name, history in histories.items() if history is not None}
    main_curve = [name for name in MAIN_CURVES if any(name in history for history in histories.values())][:1]
    labelled = [row for row in rows if row["n"] and row["first"]["labels"]]
    by_label = {}
    for score, values in ((score, values) for row in labelled for score, values in row["first"]["labels"].items()):
        by_label[score] = list(dict.fromkeys([*by_label.get(score, []), *values]))
    trivial = sorted((run for row in rows for run in row["runs"] if run["trivial"]), key=lambda run: run["rendered"])
    return {"title": STUDIES.get(key, key), "rows": rows, "families": [(title, plain), *challenge], "labelled": labelled,
            "by_label": by_label, "trivial": trivial[0] if trivial else None,
            "headlines": ["final", "challenge_final"] if "final" in plain else plain[:4],
            "curves": embed(figures.compare_curves(histories, ["val_loss", *main_curve])) if histories else None}


def show(value, digits=4):
    return "–" if value is None else "undefined" if value != value else f"{value:.{digits}f}"


def duration(seconds):
    return "–" if seconds != seconds else f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def heat(value):
    """The background of a score between 0 and 1, and whichever of black and white stands out more on it (WCAG 2)."""
    rgb = np.array(matplotlib.colormaps["cividis"](np.clip(value, 0, 1))[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return f"background:{matplotlib.colors.to_hex(rgb)};color:{'#000' if linear > 0.179 else '#fff'}"


def print_table(study):
    heads = "".join(f"{name.replace('_', ' '):27}" for name in study["headlines"])
    print(f"\n{study['title']}\n{'experiment':27}{'status':13}{'n':3}{heads}".rstrip())
    for row in study["rows"]:
        line = f"{row['experiment']:26} {row['status']:12} {row['n'] or '':<3}"
        for cell in (row["scores"].get(name, CELL) for name in study["headlines"]):
            spread = "" if cell["std"] is None else f" ± {cell['std']:.4f}"
            line += f"{show(cell['published']):6} | {show(cell['measured']) + spread:18}"
        print("\n    ! ".join([line.rstrip(), *row["problems"]]))


def write(path, text):
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main():
    args = get_args_parser().parse_args()
    if not args.runs.is_dir():
        raise InputError(f"--runs {args.runs}: no such folder. Expected the one with the run folders that train.py makes.")
    try:
        published = pd.read_csv(args.published, dtype=dict.fromkeys(ENTRY, str)).fillna(dict.fromkeys(ENTRY, ""))
        published = published.astype({name: float for name in published if name not in ENTRY})
        repeated = published[ENTRY]["experiment"].duplicated()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--published {args.published} cannot be read: {error}. Expected {', '.join(ENTRY)}, scores.") from error
    if repeated.any():
        raise InputError(f"--published {args.published}: {published['experiment'][repeated].iloc[0]} has two lines, not one.")
    files = ("run.json", "last.pt", "best.pt", "train_results.xlsx")  # any of them makes it a run folder
    folders = sorted({path.parent for file in files for path in args.runs.glob(f"*/{file}")})
    rows = make_rows(published, [read_run(folder) for folder in folders])
    studies = [make_study(key, [row for row in rows if row["study"] == key]) for key in dict.fromkeys(row["study"] for row in rows)]
    for study in studies:
        print_table(study)
    table = []
    for row in rows:
        run = row["first"] or {"seconds": None, "texts": {}}
        table.append({key: row[key] for key in ("study", "experiment", "title", "status", "data", "part", "n")})
        table[-1] |= {f"{name}_{what}": value for name, cell in row["scores"].items() for what, value in cell.items()}
        table[-1] |= {"seconds": run["seconds"]} | {key: run["texts"].get(key) for key in ("command", "commit", "device")}
        table[-1]["note"] = "; ".join(filter(None, [row["note"], *row["problems"]]))
    write(args.runs / "results.csv", pd.DataFrame(table).to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"show": show, "duration": duration, "heat": heat}
    page = environment.get_template("report_template.html").render(studies=studies, rows=rows, scores=SCORES, empty=CELL,
                                                                        nan=float("nan"))
    write(args.runs / "report.html", page)
    print(f"\npublished | measured ± standard deviation over n seeds; rendered: drawn stand-ins, not patients\n"
          f"wrote {args.runs / 'results.csv'} and {args.runs / 'report.html'}")


if __name__ == "__main__":
    sys.exit(guard(main))
