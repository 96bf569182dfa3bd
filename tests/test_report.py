"""The report of fake run folders: figures by hand, damage named, and the page itself in a headless browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import figures
import report
from errors import guard

ROOT = Path(report.__file__).parent
EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def fake_run(runs, name, dataset="odir", status="finished", rendered=False, labels=("N", "D", "G"), tested=True,
             final=0.45, epochs=6, pictures=False, **extra):
    """A run folder as train.py and test.py leave it."""
    folder = runs / name
    folder.mkdir(parents=True)
    keys = ("kappa", "f1", "auc", "final") if dataset == "odir" else ("accuracy", "kappa", "quadratic_kappa", "f1")
    scores = dict.fromkeys(keys, 0.25) | {keys[-1]: final}
    run = {"name": name, "dataset": dataset, "model": "v0", "status": status, "args": {},
           "command": f"python train.py --name {name}", "commit": "0123456789abcdef",
           "device": "cpu", "labels": list(labels), "task": "multilabel", "best_epoch": 3,
           "epochs_run": epochs, "seconds": 75.0, "scores": scores, "shuffled_labels": False,
           "data": {"root": "data", "digest": "abc", "rendered": rendered, "parts": {"train": 80, "val": 20},
                    "left_out": 3, "repaired": 0}} | extra
    (folder / "run.json").write_text(json.dumps(run))
    rng = np.random.default_rng(len(name))
    history = pd.DataFrame({"epoch": range(epochs), "lr": 0.05})
    for part in ("train", "val"):
        history[f"{part}_loss"] = 0.7 * 0.9 ** np.arange(epochs) + 0.02 * rng.random(epochs)
        for key in keys:
            history[f"{part}_{'final_score' if key == 'final' else key}"] = 0.5 - 0.4 * 0.8 ** np.arange(epochs)
    history.to_excel(folder / "train_results.xlsx", index=False)
    if tested:
        families = {"per label": scores, "challenge": {"kappa": 0.3, "f1": 0.86, "auc": 0.85, "final": 0.67}}
        if dataset != "odir":
            families = {"classes": scores}
        first = next(iter(families))
        (folder / "test_scores.json").write_text(json.dumps({
            "split": "val", "n": 20, "scores": families, "intervals": {first: {keys[-1]: [final - 0.05, final + 0.05]}},
            "labels": {"f1": {label: 0.1 + 0.8 * i / len(labels) for i, label in enumerate(labels)},
                       "auc": {label: None if i == 1 else 0.9 for i, label in enumerate(labels)}},
            "trivial": {"all zeros": {first: dict.fromkeys(keys, 0.0), "challenge": {"f1": 0.8524}}},
            "undefined": [f"auc of {labels[1]}"]}))
    if pictures:
        y_true = (np.arange(40)[:, None] % (np.arange(len(labels)) + 2) == 0).astype(int)
        y_prob = np.clip(y_true * 0.3 + rng.random(y_true.shape) * 0.7, 0, 1)
        figures.confusion(y_true, y_prob, labels, "multilabel").savefig(folder / "confusion.png")
        figures.roc(y_true, y_prob, labels, "multilabel").savefig(folder / "roc.png")
    return folder


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
    fake_run(runs, "control-odir-03", shuffled_labels=True, final=0.11)
    fake_run(runs, "mine", labels=("N", EVIL, "G"), pictures=True, command=f"python train.py --name '{EVIL}'")
    fake_run(runs, "aptos-1", dataset="aptos", labels=("0", "1", "2", "3", "4"))
    (runs / "features").mkdir()
    return runs


@pytest.fixture(scope="module")
def made(runs):
    command = [sys.executable, ROOT / "report.py", "--runs", runs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, pd.read_csv(runs / "results.csv").set_index("experiment"), (runs / "report.html").read_text()


def rows_of(page, css_class):
    """The rows of every table of this class, as lists of plain cell texts, trivial answers left out."""
    tables = re.findall(rf'<table class="sortable {css_class}.*?</table>', page, re.S)
    bodies = [re.findall(r"<tbody[^>]*>(.*?)</tbody>", table, re.S)[-1] for table in tables]
    return [[[" ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split())
              for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
             for row in re.findall(r"<tr.*?</tr>", body, re.S)] for body in bodies]


def test_results_csv_by_hand(made):
    _, table, _ = made
    row = table.loc["odir-03"]
    assert (row["status"], row["data"], row["n"], row["part"]) == ("finished", "real", 3, "val")
    assert row["final_published"] == 0.4551 and row["challenge_f1_published"] == 0.8610
    assert row["final_measured"] == pytest.approx(0.43) and row["final_std"] == pytest.approx(0.03)
    assert row["challenge_final_measured"] == pytest.approx(0.67)
    assert (row["final_low"], row["final_high"]) == (pytest.approx(0.35), pytest.approx(0.45))
    assert row["seconds"] == 75 and row["command"] == "python train.py --name odir-03" and row["device"] == "cpu"
    assert table.loc["odir-11", "final_measured"] == 0.5  # not tested: the validation scores of run.json
    assert pd.isna(table.loc["odir-11", "challenge_final_measured"])
    assert table.loc["aptos-1", "accuracy_published"] == 0.71869 and table.loc["aptos-1", "accuracy_measured"] == 0.25


def test_every_line_of_published_has_a_row_and_a_status(made):
    _, table, page = made
    published = pd.read_csv(ROOT / "published.csv")
    assert list(table.index) == [*published["experiment"], "control-odir-03", "mine"]
    expected = {"odir-03": "finished", "odir-05": "rendered", "odir-06": "interrupted", "odir-11": "finished",
                "odir-12": "damaged", "odir-10": "finished", "odir-08": "finished", "control-odir-03": "finished",
                "mine": "finished", "aptos-1": "finished"}
    for name, status in table["status"].items():
        assert status == expected.get(name, "not run"), name
    assert pd.isna(table.loc["odir-06", "final_measured"]), "an interrupted run is no result"
    per_label, challenge, aptos, *others = rows_of(page, "results")
    assert len(per_label) == len(challenge) == 20 and len(aptos) == 1 and [len(rows) for rows in others] == [5, 5, 4]
    assert sum(map(len, rows_of(page, "runs"))) == (table["status"] != "not run").sum(), "how each was run: only what was run"
    assert "33 experiments and 2 more runs" in " ".join(page.split())


def test_damage_is_named_everywhere(made):
    printed, table, page = made
    for name, file in (("odir-12", "run.json"), ("odir-10", "train_results.xlsx"), ("odir-08", "roc.png")):
        what = f"{file} is damaged"
        assert what in table.loc[name, "note"] and f"{name}: {what}" in printed and f"{name}: {what}" in page
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
    assert "Challenge scores (all cells flattened)" in page and "trivial answer: all zeros" in page and "0.8524" in page
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
    fake_run(tmp_path / "runs", "odir-03", shuffled_labels=True, tested=False)
    published = pd.read_csv(report.get_args_parser().parse_args([]).published)
    rows = report.make_rows(published, [report.read_run(tmp_path / "runs/odir-03")])
    assert [(row["n"], row["title"][:8]) for row in rows if row["experiment"] == "odir-03"][1] == (1, "shuffled")
    assert rows[3]["status"] == "not run"


def test_seeds_that_were_not_run_alike_are_named(tmp_path):
    for name, more in (("odir-03", {}), ("odir-03-seed43", {}), ("odir-03-seed44", {"epochs": 1})):
        fake_run(tmp_path, name, tested=False, args={"seed": name, "name": name, "epochs": 100, "weights": "none"} | more)
    runs = [report.read_run(tmp_path / name) for name in ("odir-03", "odir-03-seed43", "odir-03-seed44")]
    entry = {"study": "odir", "experiment": "odir-03", "title": "", "note": ""}
    assert report.make_row(entry, {}, runs[:2])["problems"] == []
    assert report.make_row(entry, {}, runs)["problems"] == ["these runs differ in epochs: their mean says little"]
    assert report.make_row(entry, {}, runs)["facts"] == ["6 epochs", "3 rows left out", "random weights"]


def test_a_run_that_did_not_end_is_unfinished(tmp_path):
    assert report.read_run(fake_run(tmp_path, "odir-03", status="running"))["status"] == "unfinished"


def test_scores_of_training_patients_are_not_shown(tmp_path):
    folder = fake_run(tmp_path, "odir-03")
    tested = json.loads((folder / "test_scores.json").read_text())
    (folder / "test_scores.json").write_text(json.dumps(tested | {"split": "all"}))
    run = report.read_run(folder)
    assert run["scores"]["final"] == 0.45 and "challenge_final" not in run["scores"]
    assert "training patients" in run["problems"][0]
    (folder / "test_scores.json").write_text(json.dumps(tested | {"threshold": 0.3}))
    run = report.read_run(folder)
    assert run["scores"]["final"] == 0.45 and "challenge_final" not in run["scores"] and "--threshold 0.3" in run["problems"][0]


@pytest.mark.parametrize("file", ["run.json", "test_scores.json", "train_results.xlsx", "confusion.png"])
def test_damaged_files_never_end_in_a_traceback(tmp_path, file):
    folder, rng = fake_run(tmp_path, "odir-03", epochs=2, pictures=True), np.random.default_rng(0)
    for other in folder.iterdir():  # only the run and the file in question, to be quick
        if other.name not in ("run.json", file):
            other.unlink()
    whole = (folder / file).read_bytes()
    for trial in range(40):
        cut = trial % 2 == 0
        broken = bytearray(whole[:rng.integers(len(whole) - 20)] if cut else whole)
        for place in rng.integers(len(whole), size=0 if cut else 1 + trial):
            broken[place] = rng.integers(256)
        (folder / file).write_bytes(broken)
        problems = report.read_run(folder)["problems"]
        assert not cut or any(file in problem for problem in problems), f"{file} cut at {len(broken)} bytes passed"


@pytest.mark.parametrize("text", [
    "[]", "null", "{}", '{"status": "done"}', '{"status": "finished", "dataset": "odir", "data": 3}',
    '{"status": "finished", "dataset": "odir", "data": {"rendered": false}, "scores": {"f1": "a"}}'])
def test_run_json_of_another_shape_is_damaged(tmp_path, text):
    folder = fake_run(tmp_path, "odir-03")
    (folder / "run.json").write_text(text)
    run = report.read_run(folder)
    assert run["status"] == "damaged" and run["problems"][0].startswith("run.json is damaged")


@pytest.mark.parametrize("published", [
    "study,experiment\nodir,odir-00\n", "", "study,experiment,title,note,f1\na,b,c,,x\n",
    "study,experiment,title,note,f1\na,b,c,,1\na,b,c,,1\n"])
def test_bad_input_is_a_message(tmp_path, monkeypatch, capsys, published):
    (tmp_path / "p.csv").write_text(published)
    (tmp_path / "runs").mkdir()
    for folder in ("runs", "nowhere"):
        monkeypatch.setattr(sys, "argv", ["report.py", f"--runs={tmp_path / folder}", f"--published={tmp_path}/p.csv"])
        assert guard(report.main) == 2 and capsys.readouterr().err.startswith("error: --")
    assert not list((tmp_path / "runs").iterdir())


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
  const table = document.querySelector("table.results"), body = table.tBodies[table.tBodies.length - 1];
  const names = () => [...body.rows].map(row => row.cells[0].dataset.value);
  const heads = [...table.tHead.rows[1].cells], measured = heads.length - 1;
  window.result = { start: names(), pictures: document.images.length, bodies: table.tBodies.length,
    loaded: [...document.images].filter(image => image.complete && image.naturalWidth > 0).length,
    rows: [...document.querySelectorAll("table.results")].map(t => t.tBodies[t.tBodies.length - 1].rows.length) };
  heads[measured].firstElementChild.click();
  result.up = names();
  result.sorted = heads[measured].getAttribute("aria-sort");
  heads[measured].firstElementChild.click();
  result.down = names();
  heads[0].firstElementChild.click();
  result.byName = names();
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  result.width = document.documentElement.clientWidth;
  result.scroll = document.documentElement.scrollWidth;
});
</script></body>"""
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,"><pre></pre><iframe srcdoc="{page}"
style="width:390px;height:844px;border:0"></iframe><script>addEventListener("load", () =>
{{ document.querySelector("pre").textContent = JSON.stringify(frames[0].result);
   frames[0].frameElement.remove(); }});</script>"""


def browse(page, tmp_path):
    """What the probe saw in the page 390 pixels wide, the lines of the console, the URLs it asked of a network."""
    # Headless Chromium opens no window below 500 pixels, but a frame can be as narrow as a telephone.
    (tmp_path / "frame.html").write_text(FRAME.format(page=html.escape(page.replace("</body>", PROBE))))
    done = subprocess.run([
        CHROMIUM, "--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom",
        (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.S).group(1)))
    net = (tmp_path / "net.json").read_text()
    assert "file:///" in net, "the log of the network is empty"
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line], {
        match[2] for match in re.finditer(r'"initiator":"([^"]*)".*?"url":"((?:http|ws)[^"]*)"', net)
        if match[1] != "not an origin"}  # Chromium's own look-ups have no page behind them


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_in_a_browser_as_wide_as_a_telephone(made, tmp_path):
    _, table, page = made
    seen, console, urls = browse(page, tmp_path)
    assert not console and not urls
    assert seen["pictures"] == seen["loaded"] >= 15
    assert seen["rows"] == [20, 20, 1, 5, 5, 4] and seen["bodies"] == 2
    assert seen["width"] == 390 and seen["scroll"] <= 390
    odir = table[table["study"] == "odir"]["final_measured"]
    assert seen["start"] == list(odir.index) and seen["sorted"] == "ascending" and seen["byName"] == sorted(odir.index)
    count = odir.notna().sum()  # rows without a figure stay at the end either way
    assert list(odir[seen["up"]][:count]) == sorted(odir.dropna())
    assert list(odir[seen["down"]][:count]) == sorted(odir.dropna(), reverse=True)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_what_the_scripts_leave_in_a_browser(trained, script, tmp_path):
    """Two studies as train.py and test.py leave them, under the demo's names: the whole page, with its real pictures."""
    for name, run in (("odir", "demo-odir-03"), ("aptos", "demo-aptos-1")):
        shutil.copytree(trained(name), tmp_path / "runs" / run)
        script("test.py", "--ckpt", f"runs/{run}/best.pt", "--out", f"runs/{run}", "--resamples", 50, "--workers", 0, cwd=tmp_path, status=0)
    script("report.py", cwd=tmp_path, status=0)
    seen, console, urls = browse((tmp_path / "runs/report.html").read_text(), tmp_path)
    assert not console and not urls and seen["scroll"] <= seen["width"] == 390
    assert seen["pictures"] == seen["loaded"] == 2 * 5 + 2, "per run: curves, confusion, ROC, samples, heat maps; a study's curves"
    assert seen["rows"] == [18, 18, 1, 5, 5, 4] and seen["start"][:2] == ["odir-00", "odir-01"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_browser_test_sees_a_broken_page(made, tmp_path):
    broken = made[2].replace("</h1>", '</h1><img src="data:image/png;base64,AAAA"><div style="width:900px">wide</div>'
                             '<script>undefined_name()</script><img src="http://127.0.0.1:9/x.png">', 1)
    seen, console, urls = browse(broken, tmp_path)
    assert any("undefined_name" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
    assert seen["loaded"] == seen["pictures"] - 2 and seen["scroll"] > 390
    assert not urls, "the page's own policy stops the request"
    _, _, urls = browse(re.sub(r"<meta http-equiv[^>]*>", "", broken), tmp_path)
    assert urls == {"http://127.0.0.1:9/x.png"}


def test_pictures_are_shrunk(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.png")
    assert len(report.embed(tmp_path / "big.png")) < (tmp_path / "big.png").stat().st_size / 10
