"""Published beside measured: a table on the terminal, runs/results.csv and the page runs/report.html.

    python report.py
    python report.py --compare runs/odir-03 runs/odir-11

A run belongs to the experiment whose line in run_all.sh it ran, whatever its folder is called. What differs
from that line, what is stale, damaged or rendered is named. --compare prints in which flags two runs differ,
paired differences with 95 % intervals and the ten rows they disagree on most, and writes compare.html."""

import base64
import json
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import arguments
import runfolders
from errors import InputError, Parser, end_with_parent, guard, reading

PICTURES = "confusion roc reliability samples heatmaps".split()
PROBS_BYTES, PAGE_BYTES = 6_000_000, 9_000_000  # room for probabilities, and for all with the pictures
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
    differing = {name: arguments.differences(run["args"], line) for name, line in lines.items()}
    same = [name for name, flags in differing.items() if not flags and not run["changes"]]
    if same and named not in same:
        named = same[0]
    return named, differing[named] + run["changes"] if named else []


def make_rows(published, lines, runs):
    """A row for every experiment, then one for every run without a line: a user's own, and the controls."""
    blank = dict.fromkeys(runfolders.ENTRY, "") | {"scores": {}}
    entries, own_lines, rows = {entry["experiment"]: entry for entry in published}, {}, []
    for name, line in lines.items():
        beyond = dict(study=line.dataset, experiment=name, kind="beyond")
        entries.setdefault(name, blank | beyond | {"title": f"{line.model}, lr {line.lr:g} {line.scheduler}"})
    for run in sorted(runs, key=lambda run: run["status"] == "damaged"):  # damaged ones have no flags
        run["experiment"], run["differs"] = match(run, lines)
        if run["experiment"]:
            continue
        # A control is compared with its experiment's line, another own run with the first one of its name.
        name = f"{run['study']} {run['base']}"
        line, title = own_lines.setdefault(name, types.SimpleNamespace(**run["args"])), "own run"
        if run["shuffled"]:
            title = "shuffled-label control: kappa and AUC have to fall to chance"
            if run["bare"] in lines:
                line = types.SimpleNamespace(**{**vars(lines[run["bare"]]), "shuffle_labels": True})
        run["differs"] = arguments.differences(run["args"], line) + run["changes"]
        own = {"study": run["study"], "experiment": run["base"], "title": title, "kind": "own"}
        run["experiment"] = f"own {name}"
        entries.setdefault(run["experiment"], blank | own)
    for name, entry in entries.items():
        members = [run for run in runs if run["experiment"] == name]
        members = [run for run in members if run["data"] != "rendered"] or members  # rendered if alone
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
    # First what is finished, tested, and in the folder that is called after the experiment.
    ranked = sorted(runs, key=lambda run: (not run["tested"], run["bare"] != run["experiment"]))
    for run in sorted(ranked, key=lambda run: run["status"] != "finished"):
        seed, network = str(run["args"].get("seed")), run["info"].get("best_digest")
        if run["status"] != "finished":
            why = f"it is {run['status']}"
        elif done and any(run[key] != done[0][key] for key in ("part", "digest", "contents", "weights")):
            why = f"other data, pictures of the same names, or --weights than those of {done[0]['name']}"
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
    return [f"{run['name']}: {problem}" for run in row["runs"] for problem in run["problems"]]


def make_row(entry, runs):
    """A line of the tables: its runs (seeds; perhaps none) and their scores beside the published ones."""
    import numpy as np  # here, as others below, because --help has to answer at once

    done = counted(runs)
    first = (done or runs or [None])[0]
    shown = first or {"status": "not run", "data": "", "differs": []}
    row = {**entry, "runs": runs, "n": len(done), "first": first, "cells": {}}
    row |= {key: shown[key] for key in ("status", "data", "differs")}
    row["notes"] = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    row["rows"], row["patients"] = first["scored"] if done else ("", "")
    row["scored"], published = str(row["rows"]), entry["published_rows"]
    if done and row["data"] != "rendered" and published not in ("", row["scored"]):
        row["scored"] += f" not {published}"
        first["problems"].append(f"{row['rows']} rows were scored, the published figures are of {published}")
    if done and (entry["study"], entry["kind"]) == ("aptos", "published"):
        if first["part"] != "test":
            first["problems"].append("the scores are of its validation part, the published of a test part")
        if "".join(found := first["info"].get("labels", "01234")) != "01234":  # class folders may have any
            first["problems"].append(f"its classes are {', '.join(found)}, the published ones 0 to 4")
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
    """The scores of a family ("", "challenge_", "learned_") of any of the rows, as published.csv goes."""
    found = dict.fromkeys(score for row in rows for score in row["cells"])
    return [name for name in found if name.startswith(prefix or ("challenge_", "learned_")) == bool(prefix)]


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
        told.append(one := {key: run[key] for key in ("name", "study", "history", "args")})
        if run["truth"] is None:
            continue
        part = digest(*(run[key] for key in ("digest", "part", "contents", "ids", "labels")))[:12]
        if part not in parts:
            parts[part] = {key: run[key] for key in ("ids", "labels", "families")}
            parts[part] |= {"truth": run["truth"].tolist(), "ordered": run["ordered"]}
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
        line = {key: row[key] for key in "study experiment title status data n rows patients".split()}
        for score, cell in row["cells"].items():
            line |= {f"{score}_{what}": value and f"{value:.6g}" for what, value in cell.items()}
        info = row["first"]["info"] if row["first"] else {}
        line |= {key: info.get(key) for key in ("seconds", "command", "commit", "device")}
        line["part"] = row["first"]["part"] if row["n"] else ""
        notes = [row["note"], *row["differs"], *problems_of(row), *row["notes"]]
        lines.append(line | {"note": "; ".join(filter(None, notes))})
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
        told = [f"≠ {', '.join(row['differs'])}"] if row["differs"] and row["status"] != "rendered" else []
        told += [f"! {problem}" for problem in problems_of(row)] + [f"note: {note}" for note in row["notes"]]
        print("\n    ".join([line.rstrip(), *told]))


def print_comparison(first, second):
    """Flags in which two runs differ, paired differences of their scores -> IDs they disagree on most."""
    import metrics
    from tables import patients_of

    flags = arguments.differences(second["args"], types.SimpleNamespace(**first["args"]))
    a, b = (run["args"].get("seed") for run in (first, second))
    if a != b:
        flags.append(f"seed {b} not {a}")
    if first["digest"] != second["digest"]:
        flags.append("other data, or another split of them")
    print(f"A {first['folder']}\nB {second['folder']}\nflags of B: {', '.join(flags) or 'those of A'}")
    for run in (first, second):
        for problem in run["problems"] + run["notes"] + run["changes"]:
            print(f"    ! {run['name']}: {problem}")
        if run["truth"] is None:
            print(f"no scores are compared: {run['name']} has no sound answers of its best network (test.py)")
            return []
    same = all(first[key] == second[key] for key in ("ids", "labels", "contents"))
    if not same or (first["truth"] != second["truth"]).any():
        print("no scores are compared: other rows or labels, other pictures, or their truth differs")
        return []
    rules = dict(patients=patients_of(first["ids"]), labels=first["labels"], ordered=first["ordered"])
    for family in first["families"]:
        print(f"\n{family} scores, B less A, with the 95 % interval over patients")
        truth = first["truth"].argmax(1) if family == "classes" else first["truth"]
        found = metrics.paired_bootstrap(family, truth, first["probs"], second["probs"], **rules)
        for score, gap in found.items():
            print(f"  {score:16} {gap['difference']:+.4f}  [{gap['low']:+.4f}, {gap['high']:+.4f}]")
    print("\nthe rows they disagree on most")
    gaps = abs(second["probs"] - first["probs"])
    most = (-gaps.max(1)).argsort(kind="stable")[:10]
    for row in most:
        k = gaps[row].argmax()
        a, b = first["probs"][row, k], second["probs"][row, k]
        has = "has it" if first["truth"][row, k] else "has it not"
        print(f"  {first['ids'][row]}: {first['labels'][k]} {a:.2f} by A, {b:.2f} by B ({has})")
    return [first["ids"][row] for row in most]


def photographs(run, ids):
    """{ID: photographs as WebP} of these rows of a run, where they are still those that it was tested on."""
    from cache import digest, fingerprint
    from tables import read

    shown = {}
    with reading(f"the photographs of {run['name']}", "a data set"):
        frame = read(run["study"], run["info"]["data"]["root"], run["labels"]).frame
        rows = frame[frame["ID"].astype(str).isin(ids) & (run["study"] != "mrnet")]
        for name, files in zip(rows["ID"].astype(str), rows["files"], strict=True):
            found = digest([fingerprint(Path(file).read_bytes()) for file in files])  # as dataset.Part.rows
            if found[:12] == (run["contents"] or {}).get(name):
                small = [runfolders.shrink(file, 200) for file in files]
                shown[name] = [base64.b64encode(one).decode() for one in small]
    return shown


def main():
    args = get_args_parser().parse_args()
    for folder in [args.runs, *(args.compare or [])]:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. --runs holds all runs, --compare takes two of them")
    published = runfolders.read_published(Path(__file__).with_name("published.csv"))
    files = ("run.json", "last.pt", "best.pt", "train_results.xlsx")  # any of them makes it a run folder
    found = {path.parent for file in files for path in args.runs.glob(f"*/{file}")}
    with ProcessPoolExecutor(min(4, os.cpu_count()), initializer=end_with_parent) as pool:
        runs = list(pool.map(runfolders.read_run, args.compare or sorted(found)))  # two hundred take long
    data, rows = page_data(runs), make_rows(published, arguments.experiments(), runs)
    if args.compare:
        most, data["chosen"] = print_comparison(*runs), [0, 1]
        try:
            data["photos"] = photographs(runs[0], most)
        except InputError as error:
            print(f"no photographs: {error}")
        write_page(args.runs / "compare.html", rows, data)
        print(f"wrote {args.runs / 'compare.html'}")
        return
    write_page(args.runs / "report.html", rows, data)
    write_table(args.runs / "results.csv", rows)
    for study in dict.fromkeys(row["study"] for row in rows):
        print_table([row for row in rows if row["study"] == study])
    print("\npublished | measured ± standard deviation over n seeds; rendered: drawn stand-ins, not patients")
    print(f"wrote {args.runs / 'results.csv'} and report.html")


if __name__ == "__main__":
    sys.exit(guard(main))
