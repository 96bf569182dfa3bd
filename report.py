"""Published beside measured: a table on the terminal, runs/results.csv and the page runs/report.html.

    python report.py
    python report.py --compare runs/odir-03 runs/odir-11

A run belongs to the experiment whose line in run_all.sh it ran, whatever its folder is called. What differs
from that line, what is stale, damaged or rendered is named. --compare prints the flags in which two runs
differ, the paired difference of every score with its 95 % interval and the ten rows they disagree on most,
and writes runs/compare.html with their curves and photographs.
"""

import base64
import json
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import arguments
import runfolders
from errors import InputError, Parser, end_with_parent, guard

# The order in which scores are shown.
SCORES = "accuracy kappa quadratic_kappa f1 auc final auc_abnormal auc_acl auc_meniscus".split()
PICTURES = "confusion roc reliability samples heatmaps".split()
PROBS_BYTES, PAGE_BYTES = 6_000_000, 9_000_000  # room for probabilities, and for all with the pictures
# How many rows (eye pairs, test pictures, pictures, exams) the published figures are of: docs/results.md
PUBLISHED_ROWS = {"odir": 698, "aptos": 583, "dr": 7025, "mrnet": 120}
NOTHING = dict.fromkeys(("published", "measured", "std", "low", "high", "n"))


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=Path, default="runs", help="run folders; the report goes there")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two run folders")
    return parser


def match(run, lines):
    """(experiment, the flags that differ from its line in run_all.sh); (None, []) for a run of its own."""
    named = run["bare"] if run["bare"] in lines and not run["shuffled"] else None
    if run["shuffled"] or run["status"] == "damaged":
        return named, []
    changed = run["info"].get("changes") or []  # by a resume
    differing = {name: arguments.differences(run["args"], line) + changed for name, line in lines.items()}
    same = [name for name, flags in differing.items() if not flags]
    if same and named not in same:
        named = same[0]
    return named, differing.get(named, [])


def make_rows(published, lines, runs):
    """A row for every experiment, then one for every run without a line: a user's own, and the controls."""
    entries, rows = {entry["experiment"]: entry for entry in published}, []
    blank = dict.fromkeys(runfolders.ENTRY, "") | {"scores": {}}
    for name, line in lines.items():
        title = f"{line.model}, lr {line.lr:g} {line.scheduler}"
        beyond = {"study": line.dataset, "experiment": name, "title": title, "kind": "beyond"}
        entries.setdefault(name, blank | beyond)
    own_lines = {}  # the flags of the first own run of each name
    for run in sorted(runs, key=lambda run: run["status"] == "damaged"):  # damaged ones have no flags
        run["experiment"], run["differs"] = match(run, lines)
        if not run["experiment"]:
            run["experiment"] = f"own {run['base']}"
            line = own_lines.setdefault(run["base"], types.SimpleNamespace(**run["args"]))
            if run["shuffled"] and run["bare"] in lines:
                line = types.SimpleNamespace(**{**vars(lines[run["bare"]]), "shuffle_labels": True})
            run["differs"] = arguments.differences(run["args"], line) + (run["info"].get("changes") or [])
            own = {"study": run["study"], "experiment": run["base"], "title": "own run", "kind": "own"}
            if run["shuffled"]:
                own["title"] = "shuffled-label control: kappa and AUC have to fall to chance"
            entries.setdefault(run["experiment"], blank | own)
    for name, entry in entries.items():
        members = [run for run in runs if run["experiment"] == name]
        # Rendered runs count where there is no real one.
        members = [run for run in members if run["data"] != "rendered"] or members
        alike = {}
        for run in sorted(members, key=lambda run: bool(run["differs"])):
            alike.setdefault(tuple(run["differs"]), []).append(run)
        for k, group in enumerate(alike.values() or [[]]):
            shown = f"{entry['experiment']} ({group[0]['name']})" if k else entry["experiment"]
            rows.append(make_row(entry | {"experiment": shown}, group))
    return rows


def counted(runs):
    """The finished runs whose mean is shown: one part of one data set, each seed once. Names the others."""
    done, seeds = [], {}

    def rank(run):  # finished, tested, and in the folder that is called after the experiment
        return run["status"] != "finished", not run["tested"], run["bare"] != run["experiment"]

    for run in sorted(runs, key=rank):
        seed, network = str(run["args"].get("seed")), run["info"].get("best_digest")
        if run["status"] != "finished":
            why = f"it is {run['status']}"
        elif done and (run["part"], run["digest"]) != (done[0]["part"], done[0]["digest"]):
            why = f"it was scored on other data than {done[0]['name']}"
        elif network in [one["info"].get("best_digest") for one in done]:
            why = "it holds the network of another run here"
        elif seed in seeds:
            why = f"it has the seed of {seeds[seed]}"
        else:
            seeds[seed] = run["name"]
            done.append(run)
            continue
        if done:
            run["problems"].append(f"not counted: {why}")
    return done


def problems_of(row):
    """What is wrong with the runs of a row."""
    return [f"{run['name']}: {problem}" for run in row["runs"] for problem in run["problems"]]


def make_row(entry, runs):
    """A line of the tables: its runs (seeds; perhaps none) and their scores beside the published ones."""
    import numpy as np  # here, as others below, because --help has to answer at once

    done = counted(runs)
    first = (done or runs or [None])[0]
    shown = first or {"status": "not run", "data": "", "differs": []}
    row = {**entry, "runs": runs, "n": len(done), "first": first, "cells": {}}
    row |= {key: shown[key] for key in ("status", "data", "differs")}
    if done and entry["study"] == "aptos" and entry["kind"] == "published" and first["part"] != "test":
        first["problems"].append("these scores are of its validation part, the published ones of a test part")
    row["rows"], row["patients"] = first["scored"] if done else ("", "")
    row |= {"scored": str(row["rows"]), "notes": list(dict.fromkeys(sum([run["notes"] for run in runs], [])))}
    published = PUBLISHED_ROWS.get(entry["study"]) if entry["kind"] == "published" else None
    if done and entry["scores"] and row["data"] != "rendered" and published not in (None, row["rows"]):
        row["scored"] += f" not {published}"
        first["problems"].append(f"{row['rows']} rows were scored, the published figures are of {published}")
    if done and entry["study"] == "aptos" and entry["kind"] == "published" and "labels" in first["info"]:
        found = ", ".join(first["info"]["labels"])  # class folders may have any
        if found != ", ".join("01234"):
            first["problems"].append(f"its classes are {found}, the published ones the grades 0 to 4")
    if done and row["data"] == "rendered":
        row["status"] = "rendered"
    elif done and row["differs"]:
        row["status"] = "changed"
    for score in dict.fromkeys([*entry["scores"], *(first["scores"] if done else [])]):
        row["cells"][score] = cell = NOTHING | {"published": entry["scores"].get(score)}
        values = [run["scores"][score] for run in done if score in run["scores"]]
        if values:
            cell |= {"measured": sum(values) / len(values), "n": len(values)}
            cell["low"], cell["high"] = first["intervals"].get(score, (None, None))
        if len(values) > 1:
            cell["std"] = float(np.std(values, ddof=1))
    return row


def columns_of(rows, prefix=""):
    """The scores of a family ("", "challenge_", "learned_") that any of the rows has, in their order."""
    found = dict.fromkeys(score for row in rows for score in row["cells"])
    others = ("challenge_", "learned_")
    mine = [score for score in found if score.startswith(prefix or others) == bool(prefix)]
    order = [prefix + score for score in SCORES]
    return sorted(mine, key=lambda score: order.index(score) if score in order else len(order))


def show(value, digits=4):
    if value is None:
        return "–"
    return "undefined" if value != value else f"{value:.{digits}f}"


def page_data(runs):
    """What the page's script draws and compares: flags, curves and probabilities of runs, each part once."""
    import numpy as np

    from cache import digest
    from tables import patients_of

    parts, told, size = {}, [], 0
    for number, run in enumerate(runs):
        run["number"] = number
        one = {key: run[key] for key in ("name", "study", "history", "args")}
        told.append(one)
        if run["truth"] is None:
            continue
        part = digest(run["digest"], run["part"], run["ids"], run["labels"])[:12]
        if part not in parts:
            parts[part] = {key: run[key] for key in ("ids", "labels", "families")}
            parts[part] |= {"truth": run["truth"].tolist(), "ordered": run["info"].get("ordered")}
            parts[part]["patients"] = np.unique(patients_of(run["ids"]), return_inverse=True)[1].tolist()
        if size < PROBS_BYTES:
            packed = run["probs"].astype("<f4").tobytes()  # as the network gave them: none become equal
            one["part"], one["probs"] = part, base64.b64encode(packed).decode()
            size += len(one["probs"])
    return {"runs": told, "parts": parts, "where": arguments.WHERE}


def write_page(path, rows, data):
    """One file without network: the tables, what `page_data` returns, and pictures while there is room."""
    import jinja2

    from cache import replace_file

    text = json.dumps(data, default=str)
    room = PAGE_BYTES - len(text)
    for run in [row["first"] for row in rows if row["first"]]:
        if room > 0 and run["tested"]:  # what test.py drew is as stale as its scores
            for name in PICTURES:
                runfolders.read(run, f"{name}.png", runfolders.read_picture)
            room -= sum(map(len, run["pictures"].values()))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "columns_of": columns_of, "problems_of": problems_of}
    data = json.loads(text, parse_constant=str)  # JavaScript knows no NaN in JSON
    page = environment.get_template("report_template.html").render(rows=rows, data=data, empty=NOTHING)
    replace_file(path, lambda stream: stream.write(page.encode("utf-8", "replace")))


def write_table(path, rows):
    """results.csv: a line for each row, published and measured figures side by side."""
    import pandas as pd

    from cache import replace_file

    lines = []
    for row in rows:
        names = "study experiment title status data n rows patients".split()
        line = {key: row[key] for key in names}
        for score, cell in row["cells"].items():
            line |= {f"{score}_{what}": value and f"{value:.6g}" for what, value in cell.items()}
        info = row["first"]["info"] if row["first"] else {}
        line |= {key: info.get(key) for key in ("seconds", "command", "commit", "device")}
        line["part"] = row["first"]["part"] if row["n"] else ""
        notes = [row["note"], *row["differs"], *problems_of(row), *row["notes"]]
        line["note"] = "; ".join(filter(None, notes))
        lines.append(line)
    text = pd.DataFrame(lines, dtype=object).to_csv(index=False)
    replace_file(path, lambda stream: stream.write(text.encode("utf-8", "replace")))


def print_table(rows):
    """One study on the terminal."""
    names = columns_of(rows)[:4]
    names = ["final", "challenge_final"] if "final" in names else names
    heads = "".join(f"{name.replace('_', ' '):27}" for name in names)
    print(f"\n{rows[0]['study']}\n{'experiment':27}{'status':13}{'n':4}{'scored':14}{heads}".rstrip())
    for row in rows:
        line = f"{row['experiment']:26} {row['status']:12} {row['n'] or '–':<4}{row['scored']:14}"
        for name in names:
            cell = row["cells"].get(name, NOTHING)
            spread = "" if cell["std"] is None else f" ± {cell['std']:.4f}"
            spread += f" (n {cell['n']})" if cell["n"] not in (None, row["n"]) else ""
            line += f"{show(cell['published']):6} | {show(cell['measured']) + spread:18}"
        print(line.rstrip())
        if row["differs"] and row["status"] != "rendered":
            print(f"    ≠ {', '.join(row['differs'])}")
        for problem in problems_of(row):
            print(f"    ! {problem}")
        for note in row["notes"]:
            print(f"    note: {note}")


def print_comparison(first, second, about):
    """Flags in which two runs differ, paired differences of their scores, rows they disagree on."""
    import metrics
    from tables import patients_of

    flags = arguments.differences(second["args"], types.SimpleNamespace(**first["args"]))
    seeds = [run["args"].get("seed") for run in (first, second)]
    if seeds[0] != seeds[1]:
        flags.append(f"seed {seeds[1]} not {seeds[0]}")
    if first["digest"] != second["digest"]:
        flags.append("other data, or another split of them")
    print(f"A {first['folder']}\nB {second['folder']}\nflags of B: {', '.join(flags) or 'those of A'}")
    for run in (first, second):
        for problem in run["problems"] + run["notes"] + (run["info"].get("changes") or []):
            print(f"    ! {run['name']}: {problem}")
    if about["why_not"]:
        print(f"no scores are compared: {about['why_not']}")
        return
    rules = {"patients": patients_of(first["ids"]), "labels": first["labels"]}
    rules["ordered"] = first["info"].get("ordered", True)
    for family in first["families"]:
        print(f"\n{family} scores, B less A, with the 95 % interval over patients")
        truth = first["truth"].argmax(1) if family == "classes" else first["truth"]
        found = metrics.paired_bootstrap(family, truth, first["probs"], second["probs"], **rules)
        for score, gap in found.items():
            print(f"  {score:16} {gap['difference']:+.4f}  [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    print("\nthe rows they disagree on most")
    for row, k in runfolders.most_different(first, second):
        a, b = first["probs"][row, k], second["probs"][row, k]
        has = "has it" if first["truth"][row, k] else "has it not"
        print(f"  {first['ids'][row]}: {first['labels'][k]} {a:.2f} by A, {b:.2f} by B ({has})")
    if about["no_photos"]:
        print(f"no photographs: {about['no_photos']}")


def main():
    args = get_args_parser().parse_args()
    if not args.runs.is_dir():
        raise InputError(f"--runs {args.runs}: no such folder. Expected the one that holds the run folders")
    published = runfolders.read_published(Path(__file__).with_name("published.csv"))
    for folder in args.compare or []:
        if not folder.is_dir():
            raise InputError(f"--compare {folder}: no such folder. Expected two run folders, as runs/odir-03")
    files = ("run.json", "last.pt", "best.pt", "train_results.xlsx")  # any of them makes it a run folder
    found = {path.parent for file in files for path in args.runs.glob(f"*/{file}")}
    with ProcessPoolExecutor(min(4, os.cpu_count()), initializer=end_with_parent) as pool:
        runs = list(pool.map(runfolders.read_run, args.compare or sorted(found)))  # two hundred take long
    data = page_data(runs)
    if args.compare:
        data |= runfolders.comparison(*runs)
    rows = make_rows(published, arguments.experiments(), runs)
    page = args.runs / ("compare.html" if args.compare else "report.html")
    write_page(page, rows, data)
    if args.compare:
        print_comparison(*runs, data)
    else:
        write_table(args.runs / "results.csv", rows)
        for study in dict.fromkeys(row["study"] for row in rows):
            print_table([row for row in rows if row["study"] == study])
        about = "measured ± standard deviation over n seeds; rendered: drawn stand-ins, not patients"
        print(f"\npublished | {about}\nwrote {args.runs / 'results.csv'}")
    print(f"wrote {page}")


if __name__ == "__main__":
    sys.exit(guard(main))
