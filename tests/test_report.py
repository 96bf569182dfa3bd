"""The report of fake run folders: figures by hand, damage named, and the page in a headless browser."""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import arguments
import cache
import figures
import metrics
import report
import runfolders
from errors import InputError, guard

ROOT = Path(report.__file__).parent
LINES = arguments.experiments()
EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def fake_run(
    runs,
    name,
    dataset="odir",
    status="finished",
    rendered=False,
    labels=("N", "D", "G"),
    tested=True,
    final=0.45,
    epochs=6,
    pictures=False,
    line=None,
    flags=None,
    **extra,
):
    """A run folder as train.py and test.py leave it; `flags`: what differs from its line of run_all.sh."""
    folder = runs / name
    folder.mkdir(parents=True)
    keys = (
        ("kappa", "f1", "auc", "final")
        if dataset == "odir"
        else ("accuracy", "kappa", "quadratic_kappa", "f1")
    )
    scores = dict.fromkeys(keys, 0.25) | {keys[-1]: final}
    seed = re.search(r"-seed(\d+)$", name)
    bare = re.sub(r"^((demo|control)-)+|-seed\d+$", "", name)
    own = bare == "mine"
    args = dict(vars(LINES[line or ("odir-03" if own else bare)]))
    args |= (
        {"name": name, "seed": int(seed[1]) if seed else 42} | ({"lr": 0.07} if own else {}) | (flags or {})
    )
    rows = {"odir": 698, "aptos": 583, "dr": 7025, "mrnet": 120}[dataset]
    data = {
        "root": "data",
        "digest": "abc",
        "rendered": rendered,
        "parts": {"train": 80, "val": rows},
        "patients": {"train": 80, "val": 19},
        "left_out": 3,
        "repaired": 0,
        "duplicates": 0,
    }
    run = {
        "status": status,
        "args": args,
        "command": f"python train.py --name {name}",
        "commit": "0123456789abcdef",
        "device": "cpu",
        "precision": "fp32",
        "trunk_name": "resnet50",
        "labels": list(labels),
        "task": "multilabel",
        "family": "per label",
        "ordered": True,
        "best_epoch": 3,
        "best_loss": 0.31,
        "best_digest": f"weights of {name}",
        "epochs_run": epochs,
        "seconds": 75.0,
        "scores": scores,
        "data": data,
    } | extra
    (folder / "run.json").write_text(json.dumps(run))
    rng = np.random.default_rng(len(name))
    history = pd.DataFrame({"epoch": range(epochs), "lr": 0.05})
    for part in ("train", "val"):
        history[f"{part}_loss"] = 0.7 * 0.9 ** np.arange(epochs) + 0.02 * rng.random(epochs)
        for key in keys:
            history[f"{part}_{'final_score' if key == 'final' else key}"] = 0.5 - 0.4 * 0.8 ** np.arange(
                epochs
            )
    history.to_excel(folder / "train_results.xlsx", index=False)
    if tested:
        families = {"per label": scores, "challenge": {"kappa": 0.3, "f1": 0.86, "auc": 0.85, "final": 0.67}}
        if dataset != "odir":
            families = {"classes": scores}
        first = next(iter(families))
        by_label = {
            "f1": {label: 0.1 + 0.8 * i / len(labels) for i, label in enumerate(labels)},
            "auc": {label: None if i == 1 else 0.9 for i, label in enumerate(labels)},
        }
        (folder / "test_scores.json").write_text(
            json.dumps(
                {
                    "checkpoint": {"digest": run["best_digest"], "epoch": 3, "loss": 0.31},
                    "data": {"root": "data", "digest": "abc", "rendered": rendered, "own": True},
                    "split": "val",
                    "threshold": 0.5,
                    "rows": rows,
                    "expected_rows": rows,
                    "patients": 19,
                    "precision": "fp32",
                    "weights": args["weights"],
                    "tta": None,
                    "loss": 0.31,
                    "scores": families,
                    "intervals": {first: {keys[-1]: [final - 0.05, final + 0.05]}},
                    "labels": by_label,
                    "label_intervals": {
                        "f1": {label: [0.1, 0.9] for label in labels},
                        "auc": {labels[1]: [None, None]},
                    },
                    "trivial": {"all zeros": {first: dict.fromkeys(keys, 0.0), "challenge": {"f1": 0.8524}}},
                    "undefined": [f"auc of {labels[1]}"],
                    "thresholds": None,
                    "calibration_error": 0.07,
                }
            )
        )
    if pictures:
        y_true = (np.arange(40)[:, None] % (np.arange(len(labels)) + 2) == 0).astype(int)
        y_prob = np.clip(y_true * 0.3 + rng.random(y_true.shape) * 0.7, 0, 1)
        figures.confusion(y_true, y_prob, labels, "multilabel").savefig(folder / "confusion.png")
        figures.roc(y_true, y_prob, labels, "multilabel").savefig(folder / "roc.png")
    return folder


def add_answers(folder, quality, labels="NDG", n=60, ids=None, truth_seed=1):
    """probs.xlsx, ground_truth.xlsx and their scores in test_scores.json -> (truth, probs), both (n, L)."""
    truth = (np.random.default_rng(truth_seed).random((n, len(labels))) < 0.4).astype(int)
    probs = np.clip(
        quality * truth + np.random.default_rng(sum(folder.name.encode())).random(truth.shape) * 0.7, 0, 1
    )
    for name, values in (("probs", probs), ("ground_truth", truth)):
        sheet = pd.DataFrame(values, columns=list(labels))
        sheet.insert(0, "ID", range(n) if ids is None else ids)
        sheet.to_excel(folder / f"{name}.xlsx", index=False)
    tell_scores(folder, truth, probs)
    return truth, probs


def tell_scores(folder, truth, probs, families=("per label", "challenge")):
    """test_scores.json as test.py writes it of these answers."""
    classes = truth.argmax(1)
    found = {
        name: metrics.scores(name, classes if name == "classes" else truth, probs, "NDG") for name in families
    }
    content = json.loads((folder / "test_scores.json").read_text())
    (folder / "test_scores.json").write_text(json.dumps(content | {"scores": found}))


def edit(folder, file, **changes):
    """Change keys of a JSON file of a run; a dict is merged into the one that is there."""
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and key in content else value
    (folder / file).write_text(json.dumps(content))


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """The page's template is compiled by the first test that writes one, and kept for the others."""
    import jinja2

    kept, compile_ = {}, jinja2.Environment.compile
    with pytest.MonkeyPatch.context() as patch:

        def compile_once(self, source, *more, **options):
            if source not in kept:
                kept[source] = compile_(self, source, *more, **options)
            return kept[source]

        patch.setattr(jinja2.Environment, "compile", compile_once)
        yield


def rows_here(runs, lines=None):
    """{experiment: row} of run folders."""
    published = runfolders.read_published(ROOT / "published.csv")
    folders = sorted(path for path in runs.iterdir() if path.is_dir())
    rows = report.make_rows(published, lines or LINES, [runfolders.read_run(folder) for folder in folders])
    return {row["experiment"]: row for row in rows}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("report") / "runs"
    for name, final in (("odir-03", 0.40), ("odir-03-seed43", 0.46), ("odir-03-seed44", 0.43)):
        fake_run(runs, name, final=final, pictures=name == "odir-03")
    fake_run(runs, "demo-odir-03", rendered=True, final=0.99)
    fake_run(runs, "demo-odir-05", rendered=True, pictures=True)
    fake_run(runs, "odir-06", status="interrupted", tested=False)
    fake_run(runs, "odir-11", tested=False, final=0.5)
    (fake_run(runs, "odir-12") / "run.json").write_text('{"name": "odir-12", "sta')
    (fake_run(runs, "odir-10") / "train_results.xlsx").write_bytes(b"PK\x03\x04 cut short")
    (fake_run(runs, "odir-08", pictures=True) / "roc.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    fake_run(runs, "control-odir-03", flags={"shuffle_labels": True}, final=0.11)
    add_answers(runs / "odir-08", 0.3)
    add_answers(runs / "demo-odir-05", 0.36)
    fake_run(runs, "mine", labels=("N", EVIL, "G"), pictures=True, command=f"python train.py --name '{EVIL}'")
    fake_run(runs, "aptos-1", dataset="aptos", labels=("0", "1", "2", "3", "4"))
    (runs / "features").mkdir()
    return runs


@pytest.fixture(scope="module")
def made(runs):
    command = [sys.executable, ROOT / "report.py", "--runs", runs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (
        done.stdout,
        pd.read_csv(runs / "results.csv").set_index("experiment"),
        (runs / "report.html").read_text(),
    )


def rows_of(page, css_class):
    """The experiments' rows of every table of this class, as lists of plain cell texts."""
    tables = re.findall(rf'<table class="sortable {css_class}.*?</table>', page, re.S)
    found = []
    for table in tables:
        bodies = "".join(re.findall(r'<tbody class="experiments.*?</tbody>', table, re.S))
        found.append([])
        for row in re.findall(r"<tr.*?</tr>", bodies, re.S):
            cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
            found[-1].append(
                [" ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in cells]
            )
    return found


def test_results_csv_by_hand(made):
    _, table, _ = made
    row = table.loc["odir-03"]
    assert (row["status"], row["data"], row["n"], row["part"]) == ("finished", "real", 3, "val")
    assert row["final_published"] == 0.4551 and row["challenge_f1_published"] == 0.8610
    assert row["final_measured"] == pytest.approx(0.43) and row["final_std"] == pytest.approx(0.03)
    assert row["challenge_final_measured"] == pytest.approx(0.67)
    assert (row["final_low"], row["final_high"]) == (pytest.approx(0.35), pytest.approx(0.45))
    assert (
        row["seconds"] == 75 and row["command"] == "python train.py --name odir-03" and row["device"] == "cpu"
    )
    assert table.loc["odir-11", "final_measured"] == 0.5  # not tested: the validation scores of run.json
    assert pd.isna(table.loc["odir-11", "challenge_final_measured"])
    assert (
        table.loc["aptos-1", "accuracy_published"] == 0.71869
        and table.loc["aptos-1", "accuracy_measured"] == 0.25
    )


def test_every_line_of_published_has_a_row_and_a_status(made):
    _, table, page = made
    published = pd.read_csv(ROOT / "published.csv")
    beyond = [name for name in LINES if name not in set(published["experiment"])]
    assert list(table.index) == [*published["experiment"], *beyond, "control-odir-03", "mine"]
    expected = {
        "odir-03": "finished",
        "odir-05": "rendered",
        "odir-06": "interrupted",
        "odir-11": "finished",
        "odir-12": "damaged",
        "odir-10": "finished",
        "odir-08": "finished",
        "control-odir-03": "finished",
        "mine": "finished",
        "aptos-1": "finished",
    }
    for name, status in table["status"].items():
        assert status == expected.get(name, "not run"), name
    assert pd.isna(table.loc["odir-06", "final_measured"]), "an interrupted run is no result"
    per_label, challenge, aptos, *others = rows_of(page, "results")
    odir = 20 + sum(name.startswith("odir") for name in beyond)
    assert len(per_label) == len(challenge) == odir and len(aptos) == 1
    assert [len(rows) for rows in others] == [5, 5, 4]
    assert sum(map(len, rows_of(page, "runs"))) == (table["status"] != "not run").sum(), (
        "how each was run: only what was run"
    )
    assert "33 experiments of the publications and 2 more runs" in " ".join(page.split())


def test_damage_is_named_everywhere(made):
    printed, table, page = made
    for name, file in (("odir-12", "run.json"), ("odir-10", "train_results.xlsx"), ("odir-08", "roc.png")):
        what = f"{file} is damaged"
        assert what in table.loc[name, "note"] and f"{name}: {what}" in printed and f"{name}: {what}" in page
        assert table.loc[name, "status"] == "damaged" or "odir-12" not in name
    assert table.loc["odir-10", "final_measured"] == 0.45, "a damaged sheet does not take the scores with it"


def test_page_shows_published_beside_measured(made):
    printed, _, page = made
    per_label, challenge = rows_of(page, "results")[:2]
    row = next(row for row in per_label if row[0].startswith("odir-03 "))
    assert row[-2:] == ["0.4551", "0.4300 ± 0.0300 (3) first: [0.350, 0.450]"]
    row = next(row for row in challenge if row[0].startswith("odir-03 "))
    assert row[-2:] == ["0.6857", "0.6700 ± 0.0000 (3)"]
    row = next(row for row in per_label if row[0].startswith("control-odir-03 shuffled-label control"))
    assert row[-1].startswith("0.1100")
    assert next(row for row in per_label if row[0].startswith("odir-05 "))[1] == "▲ rendered"
    assert (
        "Challenge scores (all cells flattened)" in page
        and "trivial answer: all zeros" in page
        and "0.8524" in page
    )
    assert "This is no medical device." in page and "0.4300 ± 0.0300" in printed


def test_what_comes_from_data_is_escaped(made):
    _, _, page = made
    assert EVIL not in page and html.escape(EVIL) in page
    assert page.count("<script>") == 1


def test_page_is_one_file_without_network(made):
    _, _, page = made
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"data:[^\"]*|http-equiv", "", page)
    assert len(page) < 15e6


def test_shuffled_run_under_a_published_name_is_not_a_result(tmp_path):
    fake_run(tmp_path, "odir-03", flags={"shuffle_labels": True}, tested=False)
    published = runfolders.read_published(ROOT / "published.csv")
    rows = report.make_rows(published, LINES, [runfolders.read_run(tmp_path / "odir-03")])
    assert [(row["n"], row["title"][:8]) for row in rows if row["experiment"] == "odir-03"][1] == (
        1,
        "shuffled",
    )
    assert rows[3]["status"] == "not run"


def test_own_runs_of_one_name_that_were_not_run_alike_are_not_averaged(tmp_path):
    for name, more in (("mine", {}), ("mine-seed43", {}), ("mine-seed44", {"epochs": 1})):
        fake_run(tmp_path, name, line="odir-03", tested=False, flags={"lr": 0.07, "weights": "none"} | more)
    alone = runfolders.read_run(tmp_path / "mine"), runfolders.read_run(tmp_path / "mine-seed43")
    rows = report.make_rows([], {}, list(alone))
    assert len(rows) == 1 and report.problems_of(rows[0]) == [] and rows[0]["n"] == 2
    rows = rows_here(tmp_path)
    assert rows["mine"]["n"] == 2 and rows["mine"]["status"] == "finished"
    other = rows["mine (mine-seed44)"]
    assert other["n"] == 1 and other["status"] == "changed" and other["differs"] == ["epochs 1 not 100"]


def test_a_run_that_did_not_end_is_unfinished(tmp_path):
    assert runfolders.read_run(fake_run(tmp_path, "odir-03", status="running"))["status"] == "unfinished"


def test_scores_of_training_patients_are_not_shown(tmp_path):
    folder = fake_run(tmp_path, "odir-03")
    tested = json.loads((folder / "test_scores.json").read_text())
    (folder / "test_scores.json").write_text(json.dumps(tested | {"split": "all"}))
    run = runfolders.read_run(folder)
    assert run["scores"]["final"] == 0.45 and "challenge_final" not in run["scores"]
    assert "training patients" in run["problems"][0]
    (folder / "test_scores.json").write_text(json.dumps(tested | {"threshold": 0.3}))
    run = runfolders.read_run(folder)
    assert run["scores"]["final"] == 0.45 and "challenge_final" not in run["scores"]
    assert "--threshold 0.3" in run["problems"][0]


FILES = ["run.json", "test_scores.json", "train_results.xlsx", "probs.xlsx", "confusion.png"]


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_never_end_in_a_traceback(tmp_path, file):
    folder, rng = fake_run(tmp_path, "odir-03", epochs=2, pictures=True), np.random.default_rng(0)
    add_answers(folder, 0.3)
    for other in folder.iterdir():  # only the run and the file in question, to be quick
        if other.name not in ("run.json", "test_scores.json", file):
            other.unlink()
    whole = (folder / file).read_bytes()
    for trial in range(40):
        cut = trial % 2 == 0
        broken = bytearray(whole[: rng.integers(len(whole) - 20)] if cut else whole)
        for place in rng.integers(len(whole), size=0 if cut else 1 + trial):
            broken[place] = rng.integers(256)
        (folder / file).write_bytes(broken)
        run = runfolders.read_run(folder)
        data = report.page_data([run])
        rows = report.make_rows([], LINES, [run])
        report.write_page(tmp_path / "report.html", rows, data)
        problems = run["problems"]
        assert not cut or any(file in problem for problem in problems), (
            f"{file} cut at {len(broken)} bytes passed"
        )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        "[" * 100000,
        {"status": "done"},
        {"status": None},
        {"data": 3},
        {"data": {"parts": [3]}},
        {"data": {"patients": 3}},
        {"scores": {"f1": "a"}},
        {"scores": {"f1": "0.4"}},
        {"scores": {"f1": float("nan")}},
        {"scores": {"f1": 41}},
        {"args": [3]},
        {"args": None},
    ],
)
def test_run_json_of_another_shape_is_damaged(tmp_path, content):
    folder = fake_run(tmp_path, "odir-03")
    if isinstance(content, str):
        (folder / "run.json").write_text(content)
    else:  # what else it holds is sound
        edit(folder, "run.json", **content)
    run = runfolders.read_run(folder)
    assert run["status"] == "damaged" and run["problems"][0].startswith("run.json is damaged")


HEAD = "study,experiment,title,note,published_rows,f1_by_label,auc_by_label,f1"


@pytest.mark.parametrize(
    "published",
    [
        "study,experiment\nodir,odir-00\n",
        f"{HEAD}\na,b,c,,,,,x\n",
        f"{HEAD}\na,b,c,,,,,nan\n",
        f"{HEAD}\na,b,c,,,,,inf\n",
        f"{HEAD}\na,b,c,,,,,1,2\n",
        f"{HEAD}\na,b,c,,,\n",
        f"{HEAD}\na,b,c,,,,,\udcff\n",
        f'{HEAD}\na,b,"c,,,,,1\n',
        f"{HEAD}\na,b,{'c' * 200000},,,,,1\n",
    ],
)
def test_a_damaged_published_csv_is_a_message(tmp_path, published):
    path = tmp_path / "published.csv"
    path.write_text(f"{HEAD}\na,b,c,,,,,1\n")
    assert runfolders.read_published(path)[0]["scores"] == {"f1": 1}, "a sound one is read"
    path.write_bytes(published.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"published\.csv"):
        runfolders.read_published(path)


def test_a_folder_of_runs_that_is_not_there_is_a_message(tmp_path, capsys):
    assert main_of("--runs", tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_published_csv_is_the_published_table():
    table = pd.read_csv(ROOT / "published.csv").set_index("experiment")
    assert len(table) == 33 and table.index.is_unique and table["title"].notna().all()
    odir = table[table["study"] == "odir"]
    for prefix in ("", "challenge_"):  # final is the mean of the three, to the rounding of the four figures
        mean = odir[[f"{prefix}kappa", f"{prefix}f1", f"{prefix}auc"]].mean(axis=1)
        assert (mean - odir[f"{prefix}final"]).abs().max() < 2e-4
    assert odir["note"].notna().sum() == 2
    mrnet = table.loc["mrnet-1"]
    assert mrnet[["auc_acl", "auc_abnormal", "auc_meniscus"]].mean() == pytest.approx(mrnet["auc"], abs=1e-3)


PROBE = """<script>
addEventListener("load", () => {  // pictures in data: URIs are loaded by now
  const table = document.querySelector("table.results"), body = table.querySelector("tbody.experiments");
  const names = () => [...body.rows].map(row => row.cells[0].dataset.value);
  const heads = [...table.tHead.rows[1].cells], measured = heads.length - 1;
  const seen = row => row.offsetParent !== null;
  const rows = [...document.querySelectorAll("table.results tbody.experiments tr")];
  window.result = { start: names(), pictures: document.images.length,
    loaded: [...document.images].filter(image => image.complete && image.naturalWidth > 0).length,
    rows: [...document.querySelectorAll("table.results")].map(t =>
      t.querySelectorAll("tbody.experiments tr").length),
    hidden: rows.filter(row => !seen(row)).length,
    missing: rows.filter(row => row.matches(".missing")).length,
    right: heads[measured].getBoundingClientRect().right,
    overview: document.querySelectorAll(".overview svg[role=img] path").length };
  document.querySelector("#all")?.click();
  result.hiddenThen = rows.filter(row => !seen(row)).length;
  heads[measured].firstElementChild.click();
  result.up = names();
  result.sorted = heads[measured].getAttribute("aria-sort");
  heads[measured].firstElementChild.click();
  result.down = names();
  heads[0].firstElementChild.click();
  result.byName = names();
  const selects = [...document.querySelectorAll("select")].slice(0, 2);
  const pick = (select, name) => [...select.options].find(option => option.text === name)?.value ?? "";
  if (window.pair) {
    selects.forEach((select, k) => { select.value = pick(select, pair[k]); });
    selects[0].dispatchEvent(new Event("change"));
  }
  const found = document.querySelector(".found");
  result.found = found?.innerText ?? "";
  result.foundCharts = found?.querySelectorAll("svg[role=img]").length;
  result.paired = {};
  for (const box of document.querySelectorAll("[data-family]")) {
    const lines = [...box.querySelectorAll("tbody tr")];
    result.paired[box.dataset.family] = lines.map(row => [...row.cells].map(cell => cell.innerText));
  }
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  setTimeout(() => {  // folds draw their curves once they are open
    result.curves = document.querySelectorAll("details .curves svg[role=img]").length;
    result.width = document.documentElement.clientWidth;
    result.scroll = document.documentElement.scrollWidth;
    result.done = true;
  }, 1000);
});
</script></body>"""
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,"><pre></pre>
<iframe srcdoc="{page}" style="width:{width}px;height:844px;border:0"></iframe><script>
const timer = setInterval(() => {{
  if (!frames[0].result?.done) return;
  clearInterval(timer);
  document.querySelector("pre").textContent = JSON.stringify(frames[0].result);
  frames[0].frameElement.remove();
}}, 20);</script>"""


def browse(page, tmp_path, width=390, pair=None):
    """What the probe saw in the page, the lines of the console, the URLs it asked of a network."""
    # Headless Chromium opens no window below 500 pixels, but a frame can be as narrow as a telephone.
    probe = f"<script>window.pair = {json.dumps(pair)}</script>{PROBE}"
    frame = FRAME.format(page=html.escape(page.replace("</body>", probe)), width=width)
    (tmp_path / "frame.html").write_text(frame)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1400,1000",
            "--virtual-time-budget=20000",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={tmp_path / 'net.json'}",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S).group(1)))
    net = (tmp_path / "net.json").read_text()
    assert "file:///" in net, "the log of the network is empty"
    return (
        seen,
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        {
            match[2]
            for match in re.finditer(r'"initiator":"([^"]*)".*?"url":"((?:http|ws)[^"]*)"', net)
            if match[1] != "not an origin"
        },
    )  # Chromium's own look-ups have no page behind them


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_in_a_browser_as_wide_as_a_telephone(made, tmp_path):
    _, table, page = made
    seen, console, urls = browse(page, tmp_path, pair=["odir-08", "demo-odir-05"])
    assert not console and not urls
    assert seen["pictures"] == seen["loaded"] == 2 * 4 - 1, (
        "confusion and ROC of four rows, one of them damaged"
    )
    odir = table[table["study"] == "odir"]
    assert seen["rows"] == [len(odir), len(odir), 1, 5, 5, 4]
    assert seen["width"] == 390 and seen["scroll"] <= 390
    published = odir["final_measured"][odir["final_published"].notna()]
    assert seen["start"] == list(published.index) and seen["sorted"] == "ascending"
    assert seen["byName"] == sorted(published.index)
    count = published.notna().sum()  # rows without a figure stay at the end either way
    assert list(published[seen["up"]][:count]) == sorted(published.dropna())
    assert list(published[seen["down"]][:count]) == sorted(published.dropna(), reverse=True)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_in_a_browser_at_1280_pixels(made, tmp_path):
    _, table, page = made
    seen, console, _ = browse(page, tmp_path, width=1280, pair=["odir-08", "mine"])
    assert not console and seen["scroll"] <= 1280
    assert seen["right"] <= 1280, "the column final, the headline, is out of view"
    assert seen["hidden"] == seen["missing"] > 30, "what was not run is hidden where anything was run"
    assert seen["hiddenThen"] == 0, "the switch shows it"
    ran = table[(table["status"] != "not run") & (table.index != "odir-10")]  # its sheet is damaged
    assert seen["overview"] == 2 * len(ran), "loss and main score of each"
    assert seen["curves"] == 5 * len(ran)
    assert "lr 0.05 0.07" in " ".join(seen["found"].split()) and seen["foundCharts"] == 2
    assert "No scores are compared: one of them has no probabilities" in seen["found"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("family", ["per label", "classes", "auc"])
def test_the_page_compares_two_runs_as_metrics_does(tmp_path, family):
    runs, labels, n = tmp_path / "runs", list("NDG"), 60
    ids = [f"{k // 2}_{'left' if k % 2 else 'right'}" for k in range(n)]
    answers = []
    for name, quality in (("odir-03", 0.3), ("odir-11", 0.45)):
        folder = fake_run(runs, name)
        truth, probs = add_answers(folder, quality, ids=ids)
        if family == "classes":
            truth = np.eye(3, dtype=int)[truth.argmax(1)]
            sheet = pd.DataFrame(truth, columns=labels)
            sheet.insert(0, "ID", ids)
            sheet.to_excel(folder / "ground_truth.xlsx", index=False)
        families = ["per label", "challenge"] if family == "per label" else [family]
        tell_scores(folder, truth, probs, families)
        tested = json.loads((folder / "test_scores.json").read_text())
        (folder / "test_scores.json").write_text(json.dumps(tested | {"intervals": {}, "trivial": {}}))
        answers.append(probs)
    assert main_of("--runs", runs) == 0
    seen, console, _ = browse((runs / "report.html").read_text(), tmp_path, pair=["odir-03", "odir-11"])
    assert not console and list(seen["paired"]) == families
    for name, lines in seen["paired"].items():
        y_true = truth.argmax(1) if name == "classes" else truth
        rules = {"labels": labels, "patients": np.arange(n) // 2}
        expected = metrics.paired_bootstrap(name, y_true, *answers, **rules)
        both = [metrics.scores(name, y_true, probs, labels=labels) for probs in answers]
        assert len(lines) == len(expected) >= 4
        for score, a, b, difference, interval, _ in lines:
            score = score.replace(" ", "_")
            assert float(a) == pytest.approx(both[0][score], abs=6e-5)
            assert float(b) == pytest.approx(both[1][score], abs=6e-5)
            assert float(difference.replace("−", "-")) == pytest.approx(
                expected[score]["difference"], abs=6e-5
            )
            low, high = (float(text) for text in interval.replace("−", "-").strip("[]").split(", "))
            width = expected[score]["high"] - expected[score]["low"]
            assert low == pytest.approx(expected[score]["low"], abs=0.12 * width)
            assert high == pytest.approx(expected[score]["high"], abs=0.12 * width)
    gaps = np.abs(answers[0] - answers[1]).max(1)
    worst = [ids[row] for row in np.argsort(-gaps, kind="stable")[:10]]
    told = [line.split("\t")[0] for line in seen["found"].split("truth\n")[-1].splitlines()]
    assert told[:10] == worst


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_what_the_scripts_leave_in_a_browser(trained, script, tmp_path):
    """Two studies as train.py and test.py leave them, under the demo's names, with their real pictures."""
    for name, run, part in (("odir", "demo-odir-03", "val"), ("aptos", "demo-aptos-1", "test")):
        shutil.copytree(trained(name), tmp_path / "runs" / run)
        flags = ["--ckpt", f"runs/{run}", "--split", part, "--resamples", 50, "--workers", 0]
        script("test.py", *flags, cwd=tmp_path, status=0)
    script("report.py", cwd=tmp_path, status=0)
    seen, console, urls = browse((tmp_path / "runs/report.html").read_text(), tmp_path)
    assert not console and not urls and seen["scroll"] <= seen["width"] == 390
    pictures = [path for path in (tmp_path / "runs").glob("*/*.png") if path.stem in report.PICTURES]
    assert seen["pictures"] == seen["loaded"] == len(pictures) >= 8, (
        "confusion, ROC, samples, heat maps of two runs"
    )
    # Of eight validation patients the final score may be undefined in every epoch.
    assert seen["curves"] >= 2 * 4 and seen["overview"] in (3, 4)
    beyond = [name for name in LINES if name.startswith("odir") and not re.fullmatch(r"odir-\d\d", name)]
    odir = 18 + len(beyond)
    assert seen["rows"] == [odir, odir, 1, 5, 5, 4] and seen["start"][:2] == ["odir-00", "odir-01"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_test_sees_a_broken_page(made, tmp_path):
    broken = made[2].replace(
        "</h1>",
        '</h1><img src="data:image/png;base64,AAAA"><div style="width:900px">wide</div>'
        '<script>undefined_name()</script><img src="http://127.0.0.1:9/x.png">',
        1,
    )
    seen, console, urls = browse(broken, tmp_path)
    assert any("undefined_name" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
    assert seen["loaded"] == seen["pictures"] - 2 and seen["scroll"] > 390
    assert not urls, "the page's own policy stops the request"
    _, _, urls = browse(re.sub(r"<meta http-equiv[^>]*>", "", broken), tmp_path)
    assert urls == {"http://127.0.0.1:9/x.png"}


def main_of(*arguments):
    """report.main with these arguments, guarded -> its exit status."""
    before, sys.argv = sys.argv, ["report.py", *map(str, arguments)]
    try:
        return guard(report.main)
    finally:
        sys.argv = before


# ---------------------------------------------------------------- which experiment a run is


def test_a_run_belongs_to_the_experiment_whose_flags_it_ran(tmp_path):
    fake_run(tmp_path, "by-hand", line="odir-11", final=0.51)
    fake_run(tmp_path, "odir-12", line="odir-04", final=0.46)
    rows = rows_here(tmp_path)
    assert (rows["odir-11"]["n"], rows["odir-11"]["status"], rows["odir-11"]["differs"]) == (
        1,
        "finished",
        [],
    )
    assert rows["odir-11"]["cells"]["final"]["measured"] == 0.51
    assert rows["odir-04"]["cells"]["final"]["measured"] == 0.46, "named odir-12, it ran the flags of odir-04"
    assert rows["odir-12"]["status"] == "not run" and "by-hand" not in rows


def test_a_changed_run_is_marked_with_every_flag_that_differs(tmp_path, capsys):
    fake_run(tmp_path / "runs", "odir-12", flags={"lr": 0.5, "batch": 64, "size": 64, "epochs": 2})
    fake_run(tmp_path / "runs", "demo-odir-05", flags={"size": 64}, rendered=True)
    rows = rows_here(tmp_path / "runs")
    assert rows["odir-12"]["status"] == "changed" and rows["odir-05"]["status"] == "rendered"
    told = {"lr 0.5 not 0.05", "batch 64 not 32", "size 64 not 224", "epochs 2 not 100"}
    assert set(rows["odir-12"]["differs"]) == told
    assert main_of("--runs", tmp_path / "runs") == 0
    printed, page = capsys.readouterr().out, (tmp_path / "runs/report.html").read_text()
    lines = printed.splitlines()
    place = next(k for k, line in enumerate(lines) if line.startswith("odir-12 "))
    assert "changed" in lines[place] and all(flag in lines[place + 1] for flag in told)
    assert "size 64 not 224" not in lines[[line.startswith("odir-05 ") for line in lines].index(True) + 1]
    per_label = rows_of(page, "results")[0]
    changed, demo = (
        next(row for row in per_label if row[0].startswith(name)) for name in ("odir-12", "odir-05")
    )
    assert changed[1] == "≠ changed" and all(flag in changed[0] for flag in told)
    assert demo[1] == "▲ rendered" and "size 64" not in demo[0]
    assert page.count("size 64 not 224") >= 3, "and in the details of both"
    table = pd.read_csv(tmp_path / "runs/results.csv").set_index("experiment")
    assert table.loc["odir-12", "status"] == "changed" and "lr 0.5 not 0.05" in table.loc["odir-12", "note"]


def test_changed_runs_are_never_mixed_with_unchanged_ones(tmp_path):
    for name, flags, final in (
        ("odir-03", {}, 0.4),
        ("odir-03-seed43", {"lr": 0.5}, 0.9),
        ("odir-03-seed44", {}, 0.5),
    ):
        fake_run(tmp_path, name, flags=flags, final=final)
    rows = rows_here(tmp_path)
    assert rows["odir-03"]["n"] == 2 and rows["odir-03"]["cells"]["final"]["measured"] == pytest.approx(0.45)
    other = rows["odir-03 (odir-03-seed43)"]
    assert other["status"] == "changed" and other["cells"]["final"]["measured"] == 0.9


def test_a_run_without_flags_is_not_taken_for_an_experiment(tmp_path):
    fake_run(tmp_path, "odir-03", args={})
    fake_run(tmp_path, "mine", args={"dataset": "odir"})
    rows = rows_here(tmp_path)
    for name in ("odir-03", "mine"):
        assert rows[name]["status"] == "damaged" and "flags are missing" in report.problems_of(rows[name])[0]
    assert rows["mine"]["title"] == "own run"


def test_a_mean_says_of_how_many_runs_it_is(tmp_path):
    fake_run(tmp_path / "runs", "odir-03")
    fake_run(tmp_path / "runs", "odir-03-seed43")
    fake_run(tmp_path / "runs", "odir-03-seed44", tested=False)
    assert main_of("--runs", tmp_path / "runs") == 0
    per_label, challenge = rows_of((tmp_path / "runs/report.html").read_text(), "results")[:2]
    row = next(row for row in per_label if row[0].startswith("odir-03"))
    assert "± 0.0000 (3)" in row[-1]
    row = next(row for row in challenge if row[0].startswith("odir-03"))
    assert "± 0.0000 (2)" in row[-1], "challenge scores are those of the tested runs alone"


def test_a_control_is_compared_with_its_line_and_own_runs_with_what_a_resume_changed(tmp_path, capsys):
    fake_run(tmp_path / "runs", "control-odir-03", flags={"shuffle_labels": True, "size": 32})
    fake_run(tmp_path / "runs", "mine", changes=["lr was 0.05 for 3 epochs"])
    fake_run(tmp_path / "runs", "mine-seed43")
    assert main_of("--runs", tmp_path / "runs") == 0
    lines = capsys.readouterr().out.splitlines()
    after = {line.split()[0]: lines[number + 1] for number, line in enumerate(lines[:-1]) if line}
    assert after["control-odir-03"] == "    ≠ size 32 not 224"
    changed = [line for line in lines if line.startswith("mine") and " changed " in line]
    assert len(changed) == 1 and "    ≠ lr was 0.05 for 3 epochs" in lines


def test_notes_of_every_seed_are_shown(tmp_path, capsys):
    fake_run(tmp_path / "runs", "odir-03")
    edit(fake_run(tmp_path / "runs", "odir-03-seed43"), "run.json", data=noted("--weights knows 21 patients"))
    assert main_of("--runs", tmp_path / "runs") == 0
    assert "note: --weights knows 21 patients" in capsys.readouterr().out


def noted(*notes):
    data = {"digest": "abc", "rendered": False, "parts": {"val": 698}, "patients": {"val": 19}}
    return {**data, "root": "data", "notes": list(notes)}


def test_other_classes_than_the_publications_are_named(tmp_path, capsys):
    edit(fake_run(tmp_path / "runs", "aptos-1"), "run.json", labels=["cat", "dog", "owl"])
    assert main_of("--runs", tmp_path / "runs") == 0
    assert "its classes are cat, dog, owl" in capsys.readouterr().out


def test_the_same_seed_twice_is_no_second_seed(tmp_path):
    fake_run(tmp_path, "odir-03", final=0.4)
    fake_run(tmp_path, "copy", line="odir-03", final=0.4)
    row = rows_here(tmp_path)["odir-03"]
    assert row["n"] == 1 and row["cells"]["final"]["std"] is None
    assert report.problems_of(row) == ["copy: not counted: it has the seed of odir-03"]


def test_what_a_row_says_of_its_figures(tmp_path, capsys):
    """Rows that were trained on, another part than the published one, fewer runs than the row has."""
    fake_run(tmp_path, "odir-03")
    edit(tmp_path / "odir-03", "test_scores.json", duplicates=3)
    fake_run(tmp_path, "odir-03-seed43", tested=False)
    fake_run(tmp_path, "clinic", line="odir-05", final=0.9)
    for file in ("run.json", "test_scores.json"):
        edit(tmp_path / "clinic", file, data={"digest": "other"})
    fake_run(tmp_path, "odir-05")
    fake_run(tmp_path, "aptos-1", dataset="aptos")
    rows = rows_here(tmp_path)
    assert "3 of its val rows hold a picture that it was trained on" in str(
        report.problems_of(rows["odir-03"])
    )
    assert rows["odir-05"]["first"]["name"] == "odir-05"  # not the first of the alphabet
    assert "clinic: not counted: other data" in str(report.problems_of(rows["odir-05"]))
    assert "of its validation part" in str(report.problems_of(rows["aptos-1"]))
    report.print_table([rows["odir-03"]])
    assert rows["odir-03"]["n"] == 2 and "(n 1)" in capsys.readouterr().out


def test_figures_of_other_data_than_the_published_ones_say_so(tmp_path, capsys):
    """24 patients of one's own, not the 698 of the publication; no figure was published for a scratch run."""
    own, few = {"data": {"digest": "own", "parts": {"val": 24}}}, {"rows": 24, "expected_rows": 24}
    for name in ("odir-03", "odir-05", "odir-06", "dr-resnet18-scratch", "demo-odir-08"):
        study = "dr" if name.startswith("dr") else "odir"
        fake_run(tmp_path, name, dataset=study, rendered="demo" in name)
        if name != "odir-06":
            edit(tmp_path / name, "run.json", **own)
            edit(tmp_path / name, "test_scores.json", data={"digest": "own"}, **few)
    (tmp_path / "odir-05/test_scores.json").unlink()  # not tested: train.py's own scores are shown
    assert main_of("--runs", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    table = pd.read_csv(tmp_path / "results.csv").set_index("experiment")
    page = rows_of((tmp_path / "report.html").read_text(), "results")[0]
    told = "24 rows were scored, the published figures are of 698"
    for name, cell in (
        ("odir-03", "24 not 698"),
        ("odir-05", "24 not 698"),
        ("odir-06", "698"),
        ("odir-08", "24"),
    ):
        place = next(k for k, line in enumerate(lines) if line.startswith(name))
        assert re.split("  +", lines[place])[3] == cell
        marked = "not" in cell
        text = next(row[0] for row in page if row[0].startswith(name))
        assert (told in lines[place + 1], told in str(table.loc[name, "note"]), told in text) == (marked,) * 3
        assert table.loc[name, "rows"] == int(cell.split()[0]) and f"{cell.split()[0]} rows scored" in text
    assert table.loc["odir-03", "patients"] == 19
    assert "published figures" not in str(table.loc["dr-resnet18-scratch", "note"])


def test_what_training_noted_of_its_data_and_kept_duplicates_are_named_before_a_test_too(tmp_path, capsys):
    """A patient in several parts, a validation picture that is trained on: they make the scores too good."""
    noted = "20 patient(s), by file name, are in several parts of the split it brings"
    kept = "2 of its val rows hold a picture that it was trained on"
    pair = [fake_run(tmp_path, name, tested=False) for name in ("odir-03", "odir-05")]
    edit(pair[0], "run.json", data={"notes": [noted], "duplicates": 2})
    assert main_of("--runs", tmp_path) == 0
    printed, csv = capsys.readouterr().out, (tmp_path / "results.csv").read_text()
    row = rows_of((tmp_path / "report.html").read_text(), "results")[0][3][0]
    assert main_of("--runs", tmp_path, "--compare", *pair) == 0
    for text in (printed, csv, row, capsys.readouterr().out):
        assert noted in text and text.count(kept) == 1
    fake_run(tmp_path, "aptos-1", dataset="aptos")
    edit(tmp_path / "aptos-1", "run.json", data={"duplicates": 2}, labels=list("01234"))
    edit(tmp_path / "aptos-1", "test_scores.json", split="test", duplicates=1)
    problems = report.problems_of(rows_here(tmp_path)["aptos-1"])
    assert [problem.split(": ")[1] for problem in problems] == [
        kept,
        kept.replace("2 of its val", "1 of its test"),
    ]


def test_scores_of_other_data_or_of_another_part_are_not_averaged(tmp_path):
    for name in ("odir-03", "odir-03-seed43", "odir-03-seed44"):
        fake_run(tmp_path, name)
    edit(tmp_path / "odir-03-seed43", "test_scores.json", split="test")
    edit(tmp_path / "odir-03-seed44", "run.json", data={"digest": "other"})
    edit(tmp_path / "odir-03-seed44", "test_scores.json", data={"digest": "other"})
    row = rows_here(tmp_path)["odir-03"]
    problems = report.problems_of(row)
    assert row["n"] == 1 and len(problems) == 2
    assert all(
        "not counted: other data, pictures of the same names, or --weights" in text for text in problems
    )


def test_experiments_beyond_the_publication_have_a_heading_of_their_own(tmp_path, monkeypatch):
    line = argparse.Namespace(**vars(LINES["odir-03"]) | {"trunk": "efficientnet-lite0", "lr": 0.003})
    monkeypatch.setattr(arguments, "experiments", lambda: LINES | {"odir-best": line})
    fake_run(
        tmp_path / "runs", "odir-best", line="odir-03", flags={"trunk": "efficientnet-lite0", "lr": 0.003}
    )
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    table = re.findall(r'<table class="sortable results.*?</table>', page, re.S)[0]
    before, after = table.split(">beyond the publication<")
    assert 'data-value="odir-17"' in before and 'data-value="odir-best"' in after
    assert rows_of(page, "results")[0][-1][1] == "✓ finished" or "odir-best-frozen" in after


# ---------------------------------------------------------------- whose scores they are


STALE = {
    "epoch": {"checkpoint": {"epoch": 1}},
    "loss": {"checkpoint": {"loss": 0.5}},
    "digest": {"checkpoint": {"digest": "weights of before"}},
    "the data changed": {"data": {"digest": "other"}},
    "other data": {"data": {"own": False}},
}


@pytest.mark.parametrize("what", STALE)
def test_stale_scores_are_named_and_not_counted(tmp_path, what):
    folder = fake_run(tmp_path, "odir-03", final=0.4)
    add_answers(folder, 0.3)
    edit(folder, "test_scores.json", scores={"per label": {"final": 0.99}}, **STALE[what])
    run = runfolders.read_run(folder)
    assert what in run["problems"][0] and "not counted" in run["problems"][0]
    assert run["scores"]["final"] == 0.4 and "challenge_final" not in run["scores"] and not run["intervals"]
    assert run["probs"] is None, "its probabilities are those of the same checkpoint"
    row = rows_here(tmp_path)["odir-03"]
    assert row["n"] == 1 and row["cells"]["final"]["measured"] == 0.4
    big_pictures(folder)
    report.write_page(tmp_path / "report.html", [row], report.page_data([row["first"]]))
    assert not row["first"]["pictures"], "what was drawn of another checkpoint"


def test_scores_of_a_run_that_does_not_name_its_checkpoint_are_stale(tmp_path):
    folder = fake_run(tmp_path, "odir-03")
    edit(folder, "run.json", best_digest=None)
    assert "had not ended" in runfolders.read_run(folder)["problems"][0]
    edit(folder, "test_scores.json", checkpoint="runs/odir-03/best.pt")
    assert runfolders.read_run(folder)["tested"] is None


def test_rows_scored_stand_beside_the_rows_there_should_be(tmp_path, capsys):
    edit(fake_run(tmp_path / "runs", "odir-03"), "test_scores.json", rows=3, expected_rows=24, patients=2)
    fake_run(tmp_path / "runs", "odir-05")
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    assert "scored 3 of the 24 rows of its part" in capsys.readouterr().out
    short, whole = rows_of(page, "runs")[0]
    assert short[3] == "val 3 of 24 rows 2 patients" and whole[3] == "val 698 of 698 rows 19 patients"
    assert whole[2].startswith("train: 80 rows, 80 patients val: 698 rows, 19 patients")
    assert page.count('<small class="problem">3 of 24 rows') == 1


def test_the_trivial_answer_is_that_of_the_rows_own_classes(tmp_path):
    for name, value in (("odir-03", 0.2), ("odir-05", 0.2), ("odir-06", 0.7)):
        folder = fake_run(tmp_path / name / "runs", "odir-03")
        shutil.copytree(folder, tmp_path / "all" / name)
        edit(tmp_path / "all" / name, "run.json", args={**vars(LINES[name]), "name": name, "seed": 42})
        edit(
            tmp_path / "all" / name,
            "test_scores.json",
            trivial={"largest class": {"per label": {"final": value}}},
        )
        edit(tmp_path / "all" / name, "run.json", best_digest="weights of odir-03")
    assert main_of("--runs", tmp_path / "all") == 0
    page = (tmp_path / "all/report.html").read_text()
    assert "trivial answer:" not in page.split("glossary")[1], "they differ: none stands for the study"
    rows = {row[0].split()[0]: row[-1] for row in rows_of(page, "results")[0]}
    assert "largest class: 0.200" in rows["odir-03"] and "largest class: 0.700" in rows["odir-06"]
    shutil.rmtree(tmp_path / "all/odir-06")
    assert main_of("--runs", tmp_path / "all") == 0
    assert "trivial answer: largest class" in (tmp_path / "all/report.html").read_text()


FACTS = {
    "6 epochs": {},
    "698 rows scored": {},
    "20 patient(s), by file name": {"data": {"notes": ["20 patient(s), by file name, are in several parts"]}},
    "random weights": {"args": {"weights": "none"}},
    "trunk efficientnet-lite0": {"trunk_name": "efficientnet-lite0"},
    "in bf16": {"precision": "bf16"},
    "2 of its val rows hold a picture that it was trained on": {"data": {"duplicates": 2}},
}


@pytest.mark.parametrize("fact", FACTS)
def test_facts_of_a_run_stand_in_its_row(tmp_path, fact):
    folder = fake_run(tmp_path / "runs", "odir-03")
    plain = [other for other in FACTS if FACTS[other] and other != fact]
    edit(folder, "run.json", **FACTS[fact])
    if fact == "in bf16":
        edit(folder, "test_scores.json", precision="bf16")
    assert main_of("--runs", tmp_path / "runs") == 0
    row = rows_of((tmp_path / "runs/report.html").read_text(), "results")[0][3][0]
    assert fact in row and not any(other in row for other in plain)


@pytest.mark.parametrize("how", [{"tta": True}, {"networks": [{}, {}]}])
def test_a_mean_of_views_or_of_networks_is_not_the_runs_own_score(tmp_path, how):
    folder = fake_run(tmp_path / "runs", "odir-03")
    edit(folder, "test_scores.json", **how)
    assert main_of("--runs", tmp_path / "runs") == 0
    assert "not this network's own answer" in (tmp_path / "runs/results.csv").read_text()


def test_a_copy_under_another_seed_is_no_second_run_and_a_changed_flag_is_named(tmp_path):
    for number, name in enumerate(("odir-03", "odir-03-seed43")):
        folder = fake_run(tmp_path / "runs", name)
        info = json.loads((folder / "run.json").read_text())
        edit(folder, "run.json", args={**info["args"], "seed": 42 + number}, best_digest="the same")
        scores = json.loads((folder / "test_scores.json").read_text())
        edit(folder, "test_scores.json", checkpoint={**scores["checkpoint"], "digest": "the same"})
    assert main_of("--runs", tmp_path / "runs") == 0
    text = (tmp_path / "runs/results.csv").read_text()
    assert "not counted: it holds the network of another run here" in text
    edit(tmp_path / "runs/odir-03", "run.json", changes=["lr was 0.01 for 3 epochs"])
    shutil.rmtree(tmp_path / "runs/odir-03-seed43")
    assert main_of("--runs", tmp_path / "runs") == 0
    text = (tmp_path / "runs/results.csv").read_text()
    assert "lr was 0.01 for 3 epochs" in text and "changed" in text


def test_learned_thresholds_are_a_family_of_their_own(tmp_path):
    folder = fake_run(tmp_path / "runs", "odir-03", final=0.4)
    fake_run(tmp_path / "runs", "odir-05")
    edit(folder, "test_scores.json", scores={"per label, learned thresholds": {"final": 0.77}})
    row = rows_here(tmp_path / "runs")["odir-03"]
    assert row["cells"]["final"]["measured"] == 0.4 and row["cells"]["learned_final"]["measured"] == 0.77
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    plain, challenge, learned = rows_of(page, "results")[:3]
    assert [row[0].split()[0] for row in learned] == ["odir-03"] and learned[0][-1] == "0.7700"
    assert not any("0.7700" in cell for row in plain + challenge for cell in row)
    edit(folder, "test_scores.json", scores={"per label, of my own": {"final": 0.77}})
    assert "is damaged" in runfolders.read_run(folder)["problems"][0], "a family that nobody knows"


def test_scores_by_label_stand_beside_the_published_ones(tmp_path):
    labels = list("NDGCAHMO")
    fake_run(tmp_path / "runs", "odir-03", labels=labels)
    fake_run(tmp_path / "runs", "odir-05", labels=labels)
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    plots = re.findall(r"<figure><figcaption>(\w+) by label.*?</figure>", page, re.S)
    assert plots == ["F1", "AUC", "F1", "AUC"]
    first = page.split("<figcaption>F1 by label")[1].split("</figure>")[0]
    assert first.count('class="published"') == first.count("<circle") == 8
    assert f"M{120 + 0.49 * 240 - 6}" in first, "N: 0.49 published"
    assert page.count('class="published"') == 16, "experiment 5 has no published figures by label"
    published = {entry["experiment"]: entry for entry in runfolders.read_published(ROOT / "published.csv")}
    figures_of_three = published["odir-03"]["f1_by_label"], published["odir-03"]["auc_by_label"]
    assert figures_of_three == (
        "N 0.49 D 0.42 G 0.20 C 0.71 A 0.00 H 0.00 M 0.77 O 0.25",
        "N 0.704 D 0.663 G 0.845 C 0.978 A 0.796 H 0.730 M 0.994 O 0.632",
    )
    assert published["odir-11"]["f1_by_label"] == "N 0.54 D 0.51 G 0.32 C 0.78 A 0.22 H 0.20 M 0.75 O 0.43"
    assert published["odir-11"]["auc_by_label"].endswith("H 0.733 M 0.994 O 0.625")
    for name in ("odir-03", "odir-11"):
        for column in ("f1_by_label", "auc_by_label"):
            words = published[name][column].split()
            assert words[::2] == labels and all(0 <= float(word) <= 1 for word in words[1::2])


# ---------------------------------------------------------------- files, damage, speed


def test_help_answers_at_once_and_imports_nothing_heavy():
    heavy = "{'numpy', 'pandas', 'matplotlib', 'PIL', 'jinja2', 'openpyxl', 'torch'}"
    code = f"import sys, report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_files_are_written_before_the_table_is_printed(tmp_path):
    fake_run(tmp_path / "runs", "odir-03")
    command = [sys.executable, ROOT / "report.py", "--runs", tmp_path / "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()  # `| head` that has seen enough
        error = running.stderr.read().decode()
    assert "Traceback" not in error and {"results.csv", "report.html"} <= {
        path.name for path in (tmp_path / "runs").iterdir()
    }


def test_a_latin_1_terminal_gets_its_table(tmp_path):
    fake_run(tmp_path / "runs", "odir-12", flags={"lr": 0.5})
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = [sys.executable, ROOT / "report.py", "--runs", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and b"? lr 0.5 not 0.05" in done.stdout


HOSTILE = {
    "scores as text": ("test_scores.json", {"scores": {"per label": {"final": "0.9"}}}),
    "scores as lists": ("test_scores.json", {"scores": {"per label": [0.9]}}),
    "a score above one": ("test_scores.json", {"scores": {"per label": {"final": 41}}}),
    "intervals of one number": ("test_scores.json", {"intervals": {"per label": {"final": 0.4}}}),
    "labels as a list": ("test_scores.json", {"labels": [0.4]}),
    "label intervals as text": ("test_scores.json", {"label_intervals": {"f1": {"N": "ab"}}}),
    "no split": ("test_scores.json", {"split": None, "threshold": None}),
    "data as a list": ("run.json", {"data": [3]}),
    "patients as a number": ("run.json", {"data": {"patients": 3}}),
    "a seed as a list": (
        "run.json",
        {"args": {"seed": [1], "lr": float("nan"), "labels": {"a": "</script>"}}},
    ),
    "texts as dicts": (
        "run.json",
        {"commit": {"a": 1}, "device": [1], "seconds": "x", "epochs_run": {}, "weights": 4},
    ),
    "half a character": ("run.json", {"command": "\ud800", "args": {"dataset": "\udfff'\"<b>"}}),
    "no numbers but infinity": ("run.json", {"seconds": float("inf"), "best_epoch": float("nan")}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_end_in_a_named_damage_or_in_text(tmp_path, what, capsys):
    file, changes = HOSTILE[what]
    folder = fake_run(tmp_path / "runs", "odir-03")
    add_answers(folder, 0.3)
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) and key in ("data", "args") else value
    (folder / file).write_text(json.dumps(content))
    assert main_of("--runs", tmp_path / "runs") == 0
    page, printed = (tmp_path / "runs/report.html").read_bytes().decode(), capsys.readouterr().out
    assert EVIL not in page and "'\"<b>" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    json.loads(data, parse_constant=pytest.fail)
    if file == "test_scores.json":
        assert "test_scores.json is " in printed and " | 0.45" in printed
    if what in ("data as a list", "patients as a number"):
        assert "run.json is damaged" in printed


def test_hostile_flags_of_an_own_run_are_text(tmp_path):
    for name in ("mine", "mine-seed43"):
        flags = {"self": 1, "labels": {"a": "</script>"}, "lr": [1]}
        fake_run(tmp_path, name, tested=False, line="odir-03", flags=flags)
    assert rows_here(tmp_path)["mine"]["n"] == 2


def test_folders_in_the_place_of_files_are_damage(tmp_path, capsys):
    folder = fake_run(tmp_path / "runs", "odir-03")
    for name in ("run.json", "test_scores.json", "train_results.xlsx"):
        (folder / name).unlink()
        (folder / name).mkdir()
    (folder / "confusion.png").mkdir()
    assert main_of("--runs", tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    assert "run.json is damaged (IsADirectoryError" in printed and "train_results.xlsx is damaged" in printed


def big_pictures(folder):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for stem in report.PICTURES:
        Image.fromarray(noise).save(folder / f"{stem}.png")


def test_pictures_and_sheets_are_made_small_once(tmp_path, monkeypatch):
    folder = fake_run(tmp_path, "odir-03")
    add_answers(folder, 0.3)
    big_pictures(folder)
    made = []
    for name in ("shrink", "sheet_as_json"):
        make = getattr(runfolders, name)
        monkeypatch.setattr(runfolders, name, lambda path, make=make: made.append(path.name) or make(path))
    for expected in (8, 8, 9):
        if expected == 9:
            os.utime(folder / "roc.png", ns=(1, 1))  # drawn anew
        run = runfolders.read_run(folder)
        data = report.page_data([run])
        report.write_page(tmp_path / "report.html", report.make_rows([], LINES, [run]), data)
        assert len(made) == expected and len(run["pictures"]) == 5 and not run["problems"]
        assert len(list((folder / ".report").iterdir())) == 8, "what is of no use any more is removed"
    assert made.count("roc.png") == 2


def test_a_run_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    folder = fake_run(tmp_path / "runs", "odir-03")
    big_pictures(folder)
    (folder / ".report").write_text("no folder")
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    assert page.count('src="data:image/webp') == 5 and "damaged" not in re.sub(
        r"<style.*?</style>|<script.*", "", page, flags=re.S
    )


def test_the_page_compares_the_probabilities_themselves(tmp_path):
    """Tiny ones too: rounded they would tie, and the AUC would be another than the terminal's."""
    folder = fake_run(tmp_path / "runs", "odir-03")
    add_answers(folder, 0.3)
    run = runfolders.read_run(folder)
    run["probs"] = np.float32(run["probs"] * 1e-12)
    (told,) = report.page_data([run])["runs"]
    found = np.frombuffer(base64.b64decode(told["probs"]), "<f4").reshape(run["probs"].shape)
    np.testing.assert_array_equal(found, run["probs"])


def test_the_page_stays_small(tmp_path, monkeypatch):
    for k in range(6):
        folder = fake_run(tmp_path / "runs", f"odir-0{k}")
        add_answers(folder, 0.3, n=400)
        big_pictures(folder)
    monkeypatch.setattr(report, "PAGE_BYTES", 200_000)
    monkeypatch.setattr(report, "PROBS_BYTES", 13_000)
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    assert 5 <= page.count('src="data:image/webp') < 30 and page.count('"probs"') == 3
    assert "lie in the run folder" in page and len(page) < 1_000_000


# ---------------------------------------------------------------- two runs


def two_runs(tmp_path, **second):
    for name in ("odir-03", "odir-11"):
        add_answers(
            fake_run(tmp_path / "runs", name),
            0.3 if name == "odir-03" else 0.5,
            **(second if name == "odir-11" else {}),
        )
    return tmp_path / "runs/odir-03", tmp_path / "runs/odir-11"


def test_compare_prints_flags_differences_and_patients(tmp_path, capsys):
    pair = two_runs(tmp_path)
    truth, first = (
        pd.read_excel(pair[0] / f"{name}.xlsx").drop(columns="ID").to_numpy()
        for name in ("ground_truth", "probs")
    )
    second = pd.read_excel(pair[1] / "probs.xlsx").drop(columns="ID").to_numpy()
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    printed = capsys.readouterr().out
    assert "flags of B: weighted loss True not False" in printed
    for family in ("per label", "challenge"):
        expected = metrics.paired_bootstrap(
            family, truth, first, second, labels=list("NDG"), patients=np.arange(60)
        )
        part = printed.split(f"{family} scores, B less A")[1]
        for score, gap in expected.items():
            line = next(line for line in part.splitlines() if line.startswith(f"  {score} "))
            assert f"{gap['difference']:+.4f}  [{gap['low']:+.4f}, {gap['high']:+.4f}]" in line
    gaps = np.abs(first - second).max(1)
    listed = [int(line.split(":")[0]) for line in printed.split("disagree on most\n")[1].splitlines()[:10]]
    assert listed == list(np.argsort(-gaps, kind="stable")[:10])
    edit(pair[1], "run.json", args={"seed": 7}, data={"digest": "other"})
    edit(pair[1], "test_scores.json", data={"digest": "other"})
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    assert "seed 7 not 42, other data, or another split of them" in capsys.readouterr().out
    page = (tmp_path / "runs/compare.html").read_text()
    assert '"chosen": [0, 1]' in page and not (tmp_path / "runs/report.html").exists()


def test_compare_resamples_patients(tmp_path, capsys):
    ids = [f"{k // 20}_left" if k % 2 else f"{k // 20}_right" for k in range(60)]
    pair = two_runs(tmp_path)
    for folder in pair:
        for name in ("probs", "ground_truth"):
            pd.read_excel(folder / f"{name}.xlsx").assign(ID=ids).to_excel(
                folder / f"{name}.xlsx", index=False
            )
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  final "))
    values = [pd.read_excel(folder / "probs.xlsx").drop(columns="ID").to_numpy() for folder in pair]
    truth = pd.read_excel(pair[0] / "ground_truth.xlsx").drop(columns="ID").to_numpy()
    rules = {"labels": list("NDG"), "patients": np.arange(60) // 20}
    gap = metrics.paired_bootstrap("per label", truth, *values, **rules)["final"]
    assert f"[{gap['low']:+.4f}, {gap['high']:+.4f}]" in line


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"n": 59}, "other rows or labels"),
        ({"labels": "NDC"}, "other rows or labels"),
        ({"truth_seed": 2}, "their truth differs"),
        ({"ids": range(100, 160)}, "other rows or labels"),
    ],
)
def test_compare_says_why_not(tmp_path, capsys, second, why):
    pair = two_runs(tmp_path, **second)
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    printed = capsys.readouterr().out
    assert "no scores are compared: " in printed and why in printed and "B less A" not in printed
    edit(pair[1], "test_scores.json", checkpoint={"epoch": 1})
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    assert "odir-11 has no sound answers" in capsys.readouterr().out
    assert main_of("--runs", tmp_path / "runs", "--compare", pair[0], tmp_path / "none") == 2


@pytest.mark.parametrize("copied", [["probs"], ["probs", "ground_truth"], ["ground_truth"]])
def test_answers_that_are_not_those_of_the_scores_are_not_compared(tmp_path, capsys, copied):
    pair = two_runs(tmp_path, truth_seed=2)
    for name in copied:
        shutil.copy(pair[0] / f"{name}.xlsx", pair[1])
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    printed = capsys.readouterr().out
    assert "with probs.xlsx it gives other scores than test_scores.json has" in printed
    assert "no scores are compared: odir-11 has no sound answers" in printed and "B less A" not in printed
    assert main_of("--runs", tmp_path / "runs") == 0
    page = (tmp_path / "runs/report.html").read_text()
    assert page.count('"probs"') == 1 and "other scores than test_scores.json" in page


def test_pictures_are_shrunk(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.png")
    small = runfolders.shrink(tmp_path / "big.png")
    assert len(small) < (tmp_path / "big.png").stat().st_size / 10
    assert Image.open(io.BytesIO(small)).size == (800, 400)


def test_other_pictures_under_the_same_names_are_not_averaged_nor_compared(tmp_path, capsys):
    """The test part is opened by test.py alone, which tells what it saw; so is the file of --weights."""
    runs = [fake_run(tmp_path / "runs", name) for name in ("odir-03", "odir-03-seed43", "odir-03-seed44")]
    for folder, content in zip(runs, ("a", "b", "a"), strict=True):
        add_answers(folder, 0.4)
        edit(folder, "test_scores.json", data={"contents": {str(row): content for row in range(60)}})
    for folder, weights in zip(runs, ("1", "1", "2"), strict=True):
        edit(folder, "run.json", data={"notes": [f"--weights w.pt has the digest {weights}"]})
    row = rows_here(tmp_path / "runs")["odir-03"]
    assert row["n"] == 1 and row["scored"].startswith("698")
    found = " ".join(report.problems_of(row))
    for name in ("odir-03-seed43", "odir-03-seed44"):
        assert f"{name}: not counted: other data, pictures of the same names, or --weights than" in found
    for other, said in ((runs[1], "other pictures"), (runs[2], "B less A")):
        assert main_of("--runs", tmp_path / "runs", "--compare", runs[0], other) == 0
        printed = capsys.readouterr().out
        assert said in printed and ("B less A" in printed) == (other == runs[2])


def test_compare_shows_the_photographs_that_were_tested(tmp_path, rendered, capsys):
    import tables

    frame = tables.read("odir", rendered("odir")).frame
    ids = list(frame["ID"])
    contents = {}
    for name, files in zip(ids, frame["files"], strict=True):
        found = [hashlib.blake2b(Path(file).read_bytes(), digest_size=10).hexdigest() for file in files]
        contents[str(name)] = cache.digest(found)[:12]
    pair = two_runs(tmp_path)
    for folder, quality in zip(pair, (0.3, 0.5), strict=True):
        add_answers(folder, quality, n=len(ids), ids=ids, labels="NDGCAHMO")
        edit(folder, "run.json", data={"root": str(rendered("odir"))})
        edit(folder, "test_scores.json", data={"contents": contents})

    def compare():
        assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
        page = (tmp_path / "runs/compare.html").read_text()
        return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["photos"]

    page, photos = compare()
    assert "no photographs" not in capsys.readouterr().out
    assert len(photos) == 10 and all(len(pictures) == 2 for pictures in photos.values())
    if CHROMIUM:
        seen, console, _ = browse(page, tmp_path)
        assert not console and seen["scroll"] <= 390 and seen["pictures"] == 20
        assert seen["foundCharts"] == 2 and "per label: paired difference" in seen["found"]
    for folder in pair:  # the pictures of one patient are others by now: hers are not shown
        edit(folder, "test_scores.json", data={"contents": contents | {next(iter(photos)): "other"}})
    assert len(compare()[1]) == 9
    for folder in pair:
        edit(folder, "run.json", data={"root": str(tmp_path / "gone")})
    capsys.readouterr()
    assert main_of("--runs", tmp_path / "runs", "--compare", *pair) == 0
    printed = capsys.readouterr().out
    assert "no photographs: " in printed and "gone" in printed and "B less A" in printed
