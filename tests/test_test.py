"""test.py: what it writes where, about which checkpoint, rows and data; thresholds; means of networks."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import checkpoint
import figures
import metrics
import predictor
import test
from dataset import load_part
from errors import InputError, guard

REAL = Path(os.environ.get("REAL_DATA", "absent"))
SHEETS = ["probs.xlsx", "ground_truth.xlsx", "classification_report.txt", "test_scores.json"]
PICTURES = ["confusion.png", "roc.png", "samples.png", "heatmaps.png", "reliability.png"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """test.py in this process and an empty folder -> its exit status; pictures are drawn only where asked for."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments, pictures=False):
        if not pictures:
            monkeypatch.setattr(test, "draw_all", lambda *_: {})
        flags = ["--device", "cpu", "--workers", 0, "--resamples", 20, "--cache", tmp_path / "cache"]
        return guard(test.main, list(map(str, [*arguments, *flags])))

    return main


def copied(folder, place):
    """A run's folder, copied: a test may write into it."""
    shutil.copytree(folder, place)
    return place


def scores_of(folder):
    return json.loads((folder / "test_scores.json").read_text())


def changed(folder, path, **changes):
    checkpoint.save_checkpoint(path, **{**checkpoint.load_checkpoint(folder / "best.pt"), **changes})
    return path


# ---------------------------------------------------------------- whose result it is


def test_the_run_is_the_folder_that_the_checkpoint_lies_in(trained, run, tmp_path):
    """`mv runs/a runs/b`, then another run `a`: testing b leaves a alone; so does a copied run."""
    b = copied(trained("odir"), tmp_path / "runs/b")
    a = copied(trained("odir"), tmp_path / "runs/odir")  # the name that the checkpoint of b stores
    before = {file: file.read_bytes() for file in a.iterdir()}
    assert run("--ckpt", b / "best.pt") == 0
    assert scores_of(b)["rows"] == 8
    assert {file: file.read_bytes() for file in a.iterdir()} == before


def test_a_checkpoint_in_another_runs_folder_keeps_its_name(trained, run, tmp_path, capsys):
    """`cp runs/b/best.pt runs/a/`: what a had is left alone, and nothing is called a's."""
    a = copied(trained("odir"), tmp_path / "runs/a")
    assert run("--ckpt", a) == 0 and "a (odir, v0, fp32)" in capsys.readouterr().out
    before = scores_of(a)
    changed(a, a / "best.pt", thresholds=[0.4] * 8)
    assert run("--ckpt", a) == 0 and "odir (odir, v0, fp32)" in capsys.readouterr().out
    assert scores_of(a) == before and scores_of(a / "test-best")["checkpoint"] != before["checkpoint"]


def test_a_lone_checkpoint_gets_a_folder_beside_it(trained, run, tmp_path):
    shutil.copyfile(trained("odir") / "best.pt", tmp_path / "best.pt")
    shutil.copyfile(trained("odir") / "best.pt", tmp_path / "mine.pt")
    before = sorted(trained("odir").rglob("*"))
    assert run("--ckpt", "best.pt") == 0 and run("--ckpt", tmp_path / "mine.pt", "--threshold", 0.3) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "best.pt",
        "cache",
        "mine.pt",
        "test-best",
        "test-mine",
    ]
    assert (tmp_path / "test-best/test_scores.json").exists()
    assert (tmp_path / "test-mine/test-val-0.3/test_scores.json").exists()
    assert sorted(trained("odir").rglob("*")) == before


def test_a_hostile_checkpoint_chooses_no_folder(trained, run, tmp_path):
    """Name, runs and cache of a best.pt point elsewhere: nothing is written there."""
    victim = tmp_path / "victim"
    args = checkpoint.load_checkpoint(trained("odir") / "best.pt")["args"]
    args = {
        **args,
        "runs": str(victim),
        "name": "../victim/x",
        "cache": str(victim / "cache"),
        "resume": str(victim),
    }
    (tmp_path / "home").mkdir()
    assert run("--ckpt", changed(trained("odir"), tmp_path / "home/best.pt", args=args)) == 0
    assert not victim.exists() and not (trained("odir") / "test_scores.json").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "home"]
    assert sorted(file.name for file in (tmp_path / "home").iterdir()) == ["best.pt", "test-best"]


def test_scores_say_what_they_are_of(trained, run, tmp_path):
    folder = copied(trained("odir"), tmp_path / "run")
    assert run("--ckpt", folder) == 0
    found, saved = scores_of(folder), checkpoint.load_checkpoint(folder / "best.pt")
    info = json.loads((folder / "run.json").read_text())
    expected = {
        "digest": checkpoint.network_digest(saved["model"], saved["thresholds"]),
        "epoch": saved["epoch"],
        "loss": saved["loss"],
    }
    assert found["checkpoint"] == expected == {name: info[f"best_{name}"] for name in expected}
    contents = {name: content[:12] for name, (_, content) in saved["rows"]["val"].items()}
    assert found["data"] == {
        "contents": contents,
        "root": saved["data"]["root"],
        "rendered": True,
        "own": True,
        "digest": info["data"]["digest"],
    }
    assert (found["split"], found["threshold"], found["tta"], found["precision"]) == (
        "val",
        0.5,
        False,
        "fp32",
    )
    assert (found["rows"], found["expected_rows"], found["patients"], found["weights"]) == (8, 8, 8, "none")
    assert found["loss"] == pytest.approx(saved["loss"], abs=1e-6)
    assert list(found["scores"]) == ["per label", "challenge"] and found["thresholds"] is None
    for name, value in found["scores"]["per label"].items():
        stored = saved["scores"][name]
        assert value is None if np.isnan(stored) else value == pytest.approx(stored, abs=1e-6)
    run("--ckpt", folder, "--precision", "bf16")
    assert scores_of(folder)["precision"] == "bf16"


def test_eyes_of_one_patient_are_counted_and_resampled_together(trained, run, tmp_path, capsys, monkeypatch):
    seen, intervals = [], metrics.bootstrap_intervals
    monkeypatch.setattr(
        metrics, "bootstrap_intervals", lambda *a, **k: seen.append(k["patients"]) or intervals(*a, **k)
    )
    folder = copied(trained("dr"), tmp_path / "dr")
    assert run("--ckpt", folder) == 0
    found = scores_of(folder)
    assert (found["rows"], found["patients"]) == (16, 8) and "16 rows, 8 patients" in capsys.readouterr().out
    ids = checkpoint.load_checkpoint(folder / "best.pt")["rows"]["val"]
    assert list(seen[0]) == [name.rsplit("_", 1)[0] for name in ids]


def test_every_file_is_there_and_marked(trained, run, tmp_path, capsys, monkeypatch):
    folder = copied(trained("odir"), tmp_path / "moved")  # to a folder of another name
    marked, mark = [], figures.mark_rendered
    monkeypatch.setattr(
        figures, "mark_rendered", lambda figure, *words: marked.append(figure) or mark(figure, *words)
    )
    said, caption = [], figures.caption
    monkeypatch.setattr(
        figures, "caption", lambda figure, words: said.append(words) or caption(figure, words)
    )
    assert run("--ckpt", folder, pictures=True) == 0
    text = capsys.readouterr().out
    about = "moved (odir, v0, fp32), val (RENDERED): 8 rows, 8 patients"
    captions = [f"{about}, threshold 0.5", about, about, f"{about}, threshold 0.5", about]
    assert [words for words in said if "rows" in words] == captions and about in text
    for name in [*SHEETS, *PICTURES, "submission.csv"]:
        assert (folder / name).stat().st_size > 0 and name in text, name
    assert len(marked) == 5 and "(RENDERED)" in text
    probs = pd.read_excel(folder / "probs.xlsx", dtype={"ID": str})
    truth = pd.read_excel(folder / "ground_truth.xlsx", dtype={"ID": str})
    saved = checkpoint.load_checkpoint(folder / "best.pt")
    assert list(probs["ID"]) == list(truth["ID"]) == list(saved["rows"]["val"])
    targets = [json.loads(target) for target, _ in saved["rows"]["val"].values()]
    assert truth[saved["labels"]].to_numpy().tolist() == targets
    about, report = (folder / "classification_report.txt").read_text().split("\n\n", 1)
    assert report in text and about.endswith("val (RENDERED): 8 rows, 8 patients, threshold 0.5")


def test_a_network_of_rendered_pictures_marks_what_it_says_of_others(trained, rendered, run, tmp_path):
    data = copied(rendered("odir"), tmp_path / "real")
    (data / "rendered.json").unlink()
    assert run("--ckpt", trained("odir"), "--data", data, "--out", tmp_path / "out") == 0
    assert scores_of(tmp_path / "out")["data"]["rendered"]


# ---------------------------------------------------------------- which rows


def test_edited_labels_are_noticed(trained, rendered, run, tmp_path, capsys):
    data = copied(rendered("odir"), tmp_path / "data")
    ckpt = changed(
        trained("odir"), tmp_path / "best.pt", data={**facts_of(trained("odir")), "root": str(data)}
    )
    assert run("--ckpt", ckpt) == 0
    sheet = pd.read_excel(data / "annotations.xlsx")
    labels = checkpoint.load_checkpoint(ckpt)["labels"]
    sheet[labels] = 1 - sheet[labels]
    sheet.to_excel(data / "annotations.xlsx", index=False)
    capsys.readouterr()
    assert run("--ckpt", ckpt) == 2
    said = capsys.readouterr().err
    assert "8 row(s)" in said and "other labels than in training" in said and "--data" in said
    assert run("--ckpt", trained("odir"), "--data", data, "--out", tmp_path / "out") == 0
    assert "other rows or labels than the run's" in capsys.readouterr().out
    found = scores_of(tmp_path / "out")["data"]
    assert not found["own"] and found["digest"] != facts_of(trained("odir"))["digest"]


def facts_of(folder):
    return checkpoint.load_checkpoint(folder / "best.pt")["data"]


def test_what_is_missing_stands_beside_what_should_be_there(trained, rendered, run, tmp_path, capsys):
    data = copied(rendered("odir"), tmp_path / "data")
    state = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    for patient in list(state["rows"]["val"])[:5]:
        (data / "images" / f"{patient}_left.jpg").unlink()
    ckpt = changed(trained("odir"), tmp_path / "best.pt", data={**state["data"], "root": str(data)})
    assert run("--ckpt", ckpt) == 2
    assert "5 row(s) have no picture" in capsys.readouterr().err
    assert run("--ckpt", ckpt, "--missing", "drop", "--out", tmp_path / "out") == 0
    assert "3 rows, 3 patients, 5 of 8 left out" in capsys.readouterr().out
    found = scores_of(tmp_path / "out")
    assert (found["rows"], found["expected_rows"], found["patients"]) == (3, 8, 3)


def test_data_folders_get_a_folder_each(trained, rendered, run, tmp_path):
    """Two folders of one name, and one of the run's own rows: nothing collides, nothing lies in the run's own place."""
    folder = copied(trained("odir"), tmp_path / "run")
    one, two = (copied(rendered("odir"), tmp_path / name / "eyes") for name in ("a", "b"))
    for data in (one, two):
        sheet = pd.read_excel(data / "annotations.xlsx")
        sheet.assign(ID=sheet["ID"] + 10**6).to_excel(data / "annotations.xlsx", index=False)
        assert run("--ckpt", folder, "--split", "all", "--data", data) == 0
    assert run("--ckpt", folder, "--split", "all") == 0
    made = sorted(path.name for path in folder.glob("test-*"))
    assert (
        len(made) == 3
        and made[0] == "test-all"
        and all(name.startswith("test-all-eyes-") for name in made[1:])
    )
    roots = {scores_of(folder / name)["data"]["root"] for name in made}
    assert roots == {facts_of(folder)["root"], str(one), str(two)}
    assert not (folder / "test_scores.json").exists()


def test_the_published_part_goes_into_the_runs_folder(trained, run, tmp_path, capsys):
    folder = copied(trained("aptos"), tmp_path / "aptos")
    assert run("--ckpt", folder, "--split", "test") == 0 and scores_of(folder)["split"] == "test"
    assert run("--ckpt", folder) == 0 and scores_of(folder / "test-val")["split"] == "val"
    assert scores_of(folder)["split"] == "test"
    folder = copied(trained("odir"), tmp_path / "odir")
    assert run("--ckpt", trained("odir"), "--out", folder) == 2
    assert "is a run's folder" in capsys.readouterr().err
    assert run("--ckpt", folder, "--tta") == 0 and run("--ckpt", folder, "--threshold", 0.25) == 0
    assert run("--ckpt", folder) == 0 and scores_of(folder)["split"] == "val"
    assert sorted(path.name for path in folder.glob("test-*")) == ["test-val-0.25", "test-val-mirrored"]


def test_refused(trained, run, tmp_path, capsys):
    for arguments, said in (
        ([trained("odir"), "--split", "test"], "no test part"),
        ([trained("retina"), "--threshold", 0.4], "exclude each other"),
        ([trained("odir"), "--threshold", 1.4], "0 to 1"),
        ([trained("odir"), trained("retina")], "other labels"),
        ([tmp_path / "none"], "none is missing"),
        ([trained("odir") / "last.pt"], "not a best.pt"),
    ):
        assert run("--ckpt", *arguments) == 2
        assert said in capsys.readouterr().err


# ---------------------------------------------------------------- thresholds


def test_learned_thresholds_are_a_family_of_their_own(trained, run, tmp_path, capsys):
    """Beside the rule at 0.5, which they do not change, nor its submission; another one has 0.5 mean them."""
    plain = copied(trained("odir"), tmp_path / "plain")
    learned = copied(trained("odir"), tmp_path / "learned")
    limits = [0.02, 0.001, 0.3, 0.05, 0.7, 1e-6, 0.01, 0.999]
    changed(learned, learned / "best.pt", thresholds=limits)
    (learned / "run.json").write_text("{}")  # else another best.pt than its run's
    assert run("--ckpt", plain) == 0 and run("--ckpt", learned) == 0
    first, second = scores_of(plain), scores_of(learned)
    for family in ("per label", "challenge"):
        assert first["scores"][family] == second["scores"][family]
        assert first["intervals"][family] == second["intervals"][family]
    labels = checkpoint.load_checkpoint(plain / "best.pt")["labels"]
    assert second["thresholds"] == dict(zip(labels, limits, strict=True)) and first["thresholds"] is None
    assert "thresholds that were learned on training patients" in capsys.readouterr().out
    sheets = [pd.read_excel(learned / name) for name in ("probs.xlsx", "ground_truth.xlsx")]
    probs, truth = (sheet[labels].to_numpy() for sheet in sheets)
    by_hand = metrics.compute_challenge_metrics(truth, probs, np.array(limits))
    found = second["scores"]["per label, learned thresholds"]
    for name, value in by_hand.items():
        assert found[name] is None if np.isnan(value) else found[name] == pytest.approx(value)
    assert found["f1"] != second["scores"]["per label"]["f1"]
    submission = pd.read_csv(learned / "submission-learned.csv")[labels].to_numpy()
    assert ((submission > 0.5) == (probs > limits)).all() and (submission > 0.5).any()
    plain_one = (plain / "submission.csv").read_bytes()
    assert (learned / "submission.csv").read_bytes() == plain_one
    assert not (plain / "submission-learned.csv").exists()
    answers = pd.read_csv(learned / "submission.csv")[labels].to_numpy()
    assert metrics.challenge_scores(truth, answers) == pytest.approx(
        second["scores"]["challenge"], nan_ok=True
    )
    assert set(pd.read_csv(plain / "submission.csv")[labels].round(6).stack()) == set(probs.round(6).ravel())
    assert run("--ckpt", learned, "--threshold", 0.4) == 0
    assert list(scores_of(learned / "test-val-0.4")["scores"]) == ["per label", "challenge"]
    assert not (learned / "test-val-0.4/submission-learned.csv").exists()
    assert (learned / "test-val-0.4/submission.csv").read_bytes() == plain_one
    out = tmp_path / "one place"  # what another network left there goes
    for folder in (learned, plain):
        assert run("--ckpt", folder, "--out", out) == 0
    assert (out / "submission.csv").exists() and not (out / "submission-learned.csv").exists()


def test_what_training_noted_is_said_again(trained, run, tmp_path, capsys):
    data = checkpoint.load_checkpoint(trained("odir") / "best.pt")["data"]
    noted = {**data, "notes": ["--weights was trained on 3 of the val patients, by their names"]}
    assert run("--ckpt", changed(trained("odir"), tmp_path / "best.pt", data=noted)) == 0
    assert "note: in training: --weights was trained on 3 of the val patients" in capsys.readouterr().out


def test_the_shift_to_half_keeps_the_order_of_each_labels_rows():
    """Else the area under the curve of a submission would not be the network's."""
    probs, limits = np.array([[0, 0.1], [0.2, 0.3], [0.4, 0.6], [0.6, 0.8], [1, 1]]), np.array([0.2, 0.6])
    by_hand = np.array([[0, 1 / 12], [0.5, 0.25], [0.625, 0.5], [0.75, 0.75], [1, 1]])
    np.testing.assert_allclose(test.shifted_to_half(probs, limits), by_hand, atol=1e-12)


@pytest.mark.parametrize("limit", [0.0, 1e-300, 1e-9, 0.1, 0.5, 0.7, 1 - 1e-12, 1.0])
def test_the_shift_keeps_order_and_decisions(limit):
    rng = np.random.default_rng(0)
    near = np.float32(limit) * (1 + np.arange(-3, 4) * np.float32(1e-7))
    probs = np.clip(np.concatenate([[0, 1, limit], near, rng.random(200) ** 4]), 0, 1)
    probs = np.sort(probs.astype(np.float32)).astype(float)[:, None]
    shifted = test.shifted_to_half(probs, np.array([limit]))
    assert (np.diff(shifted[:, 0]) >= 0).all() and shifted.min() >= 0 and shifted.max() <= 1
    assert ((shifted > 0.5) == (probs > limit)).all()
    apart = np.diff(probs[:, 0]) > 1e-6
    assert (np.diff(shifted[:, 0])[apart] > 0).all(), "different probabilities stay different"


# ---------------------------------------------------------------- means


def test_mirrored_views_and_several_checkpoints_give_means(trained, run, tmp_path, capsys):
    one, labels = copied(trained("odir"), tmp_path / "run"), list("NDGCAHMO")
    state = checkpoint.load_checkpoint(one / "best.pt")
    model = {
        name: value * 0.5 if name.startswith("classifier") else value
        for name, value in state["model"].items()
    }
    (tmp_path / "two").mkdir()
    two = changed(one, tmp_path / "two/best.pt", model=model, thresholds=[0.1] * 8)
    found = {}
    for name, arguments in {"one": [one], "two": [two], "both": [one, two], "tta": [one, "--tta"]}.items():
        assert run("--ckpt", *arguments, "--out", tmp_path / name) == 0
        found[name] = pd.read_excel(tmp_path / name / "probs.xlsx")[labels].to_numpy()
    np.testing.assert_allclose(found["both"], (found["one"] + found["two"]) / 2, atol=1e-6)
    assert np.abs(found["tta"] - found["one"]).max() > 1e-6
    result = scores_of(tmp_path / "both")
    assert [entry["digest"] for entry in result["networks"]] == [
        scores_of(tmp_path / name)["checkpoint"]["digest"] for name in ("one", "two")
    ]
    assert (
        result["thresholds"] is None
        and result["loss"] is None
        and scores_of(tmp_path / "tta")["loss"] is None
    )
    # Another split: rows of one's validation part were trained on by the other.
    train = list(state["rows"]["train"].items())
    rows = {**state["rows"], "val": dict(train[:8]), "train": {**state["rows"]["val"], **dict(train[8:])}}
    other = changed(one, tmp_path / "two/other.pt", rows=rows, thresholds=[0.1] * 8)
    assert run("--ckpt", one, other) == 2
    assert "another val part" in capsys.readouterr().err
    # A network and its copy are one network, not two.
    assert run("--ckpt", one, two, copied(one, tmp_path / "copy")) == 2
    assert "given already" in capsys.readouterr().err


def test_a_mean_is_as_trained_as_any_of_its_networks(trained, run, tmp_path, capsys):
    one = copied(trained("odir"), tmp_path / "one")
    net = predictor.load(one, "cpu")
    part, _ = load_part(net.args, net.saved, "val")
    seen = set(net.saved["seen"])
    for files in part.contents:
        seen.update(*files)
    (tmp_path / "two").mkdir()
    half = set(net.saved["seen"])
    for files in part.contents[: len(part) // 2]:
        half.update(*files)
    two = changed(one, tmp_path / "two/best.pt", seen=sorted(half), thresholds=[0.1] * 8)
    other_half = sorted((seen - half) | set(net.saved["seen"]))
    three = changed(one, tmp_path / "two/other.pt", seen=other_half, thresholds=[0.2] * 8)
    for number, order in enumerate(([one, two, three], [three, two, one])):
        assert run("--ckpt", *order, "--out", tmp_path / str(number)) == 0
        assert f"{len(part)} row(s) hold a picture that the network was trained on" in capsys.readouterr().out
        assert scores_of(tmp_path / str(number))["duplicates"] == len(part)


# ---------------------------------------------------------------- while things change


def test_while_best_pt_is_rewritten(trained, run, tmp_path):
    """The scores are of the checkpoint whose digest they name, whichever of the two it was."""
    folder = copied(trained("odir"), tmp_path / "run")
    (folder / "run.json").write_text("{}")  # while a run is training it names no best network
    state = checkpoint.load_checkpoint(folder / "best.pt")
    other = {
        **state,
        "model": {
            name: value * 0.5 if name.startswith("classifier") else value
            for name, value in state["model"].items()
        },
    }
    expected = {}
    for version in (state, other):
        path = tmp_path / "alone.pt"
        checkpoint.save_checkpoint(path, **version)
        assert run("--ckpt", path, "--out", tmp_path / "alone") == 0
        result = scores_of(tmp_path / "alone")
        expected[result["checkpoint"]["digest"]] = result["scores"]
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for version in (other, state):
                checkpoint.save_checkpoint(folder / "best.pt", **version)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(3):
            assert run("--ckpt", folder) == 0
            result = scores_of(folder)
            assert result["scores"] == expected[result["checkpoint"]["digest"]]
    finally:
        stop.set()
        thread.join()


def test_a_read_only_working_folder(trained, run, tmp_path, monkeypatch):
    """Everything goes into the run's folder and the cache: nothing is written here."""
    folder = copied(trained("retina"), tmp_path / "run")
    here = tmp_path / "here"
    here.mkdir(mode=0o500)
    monkeypatch.chdir(here)
    assert run("--ckpt", folder) == 0 and not list(here.iterdir())


def test_a_run_of_repeated_views(trained, rendered, train_here, run, tmp_path, capsys):
    """--views: what is tested is the network that was validated."""
    flags = [
        "--data",
        rendered("odir"),
        "--augment",
        "pair",
        "--views",
        2,
        "--epochs",
        3,
        "--cache",
        tmp_path / "cache",
    ]
    folder = train_here(tmp_path, *flags)
    assert run("--ckpt", folder) == 0
    best = checkpoint.load_checkpoint(folder / "best.pt")
    assert scores_of(folder)["loss"] == pytest.approx(best["loss"], abs=1e-6)


# ---------------------------------------------------------------- pictures of the scores


def test_samples_and_maps_show_one_row_of_each_label(trained, run, tmp_path, monkeypatch):
    seen = {}
    for name in ("samples", "heatmaps"):
        drawn = getattr(figures, name)
        monkeypatch.setattr(
            figures,
            name,
            lambda rows, *more, name=name, drawn=drawn: seen.update({name: rows}) or drawn(rows, *more),
        )
    folder = copied(trained("retina"), tmp_path / "run")
    assert run("--ckpt", folder, pictures=True) == 0
    probs = pd.read_excel(folder / "probs.xlsx", dtype={"ID": str}).set_index("ID")
    truth = pd.read_excel(folder / "ground_truth.xlsx", dtype={"ID": str}).set_index("ID")
    assert [row["truth"] for row in seen["samples"]] == [[label] for label in probs.columns]
    for sample, line in zip(seen["samples"], seen["heatmaps"], strict=True):
        row = probs.loc[sample["title"]]
        assert line["title"] == sample["title"] and line["truth"] == sample["truth"]
        assert truth.loc[sample["title"], sample["truth"][0]] == 1
        assert sample["prediction"] == [row.idxmax()]
        assert sample["probs"] == pytest.approx(row.to_dict(), abs=1e-6)
        for name, prob, cam in line["maps"]:
            assert prob == pytest.approx(row[name], abs=1e-6) and cam.ndim == 2


def test_the_report_is_at_the_threshold_of_the_scores(trained, run, tmp_path):
    """scikit-learn's report counts, at each threshold, the rows that are above it."""
    for threshold in (0.5, 0.01):
        assert run("--ckpt", trained("odir"), "--threshold", threshold, "--out", tmp_path / "out") == 0
        text = (tmp_path / "out/classification_report.txt").read_text()
        probs = pd.read_excel(tmp_path / "out/probs.xlsx")
        truth = pd.read_excel(tmp_path / "out/ground_truth.xlsx")
        recall = float(re.search(r"C cataract +\S+ +(\S+)", text)[1])
        assert recall == pytest.approx((probs["C"] > threshold)[truth["C"] == 1].mean(), abs=1e-4)


def test_one_label_alone(trained, rendered, train_here, run, tmp_path):
    flags = [
        "--dataset",
        "mrnet",
        "--data",
        rendered("mrnet"),
        "--labels",
        "abnormal",
        "--size",
        72,
        "--epochs",
        1,
    ]
    folder = train_here(tmp_path, *flags)
    assert run("--ckpt", folder, pictures=True) == 0
    assert list(scores_of(folder)["scores"]["auc"]) == ["auc_abnormal", "auc"]


@pytest.mark.skipif(not (REAL / "idrid").is_dir(), reason="REAL_DATA is not set")
def test_real_photographs(train_here, run, tmp_path):
    flags = [
        "--dataset",
        "aptos",
        "--data",
        REAL / "idrid",
        "--model",
        "alexnet",
        "--size",
        72,
        "--epochs",
        1,
    ]
    folder = train_here(tmp_path, *flags, "--duplicates", "keep")
    assert run("--ckpt", folder, "--split", "test", pictures=True) == 0
    found = scores_of(folder)
    assert (
        found["rows"] == found["expected_rows"] == 66
        and not found["data"]["rendered"]
        and found["duplicates"] >= 0
    )


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "val", "test")])
def test_class_folders_are_scored_on_test_where_they_have_one(parts, rendered, train_here, run, tmp_path):
    """In the run's folder, where the report looks."""
    pictures = iter(sorted((rendered("aptos") / "train_images").iterdir()))
    for part in parts:
        for name in ("a", "b"):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for _ in range(4):
                shutil.copy(next(pictures), tmp_path / "mine" / part / name)
    flags = [
        "--dataset",
        "aptos",
        "--data",
        tmp_path / "mine",
        "--model",
        "mobilenet_v3_small",
        "--epochs",
        1,
    ]
    folder = train_here(tmp_path, *flags)
    assert run("--ckpt", folder) == 0 and run("--ckpt", folder, "--split", "all") == 0
    home = folder if "test" not in parts else folder / "test-val"
    assert scores_of(home)["split"] == "val" and (folder / "test-all").is_dir()
    if "test" in parts:
        assert run("--ckpt", folder, "--split", "test") == 0 and scores_of(folder)["split"] == "test"


# ---------------------------------------------------------------- whose pictures these are


def test_pictures_that_were_trained_on_are_counted_in_any_part(trained, rendered, run, tmp_path):
    """A validation patient whose photographs are now copies of a training patient's."""
    root, folder = tmp_path / "copy", copied(trained("odir"), tmp_path / "run")
    shutil.copytree(rendered("odir"), root)
    saved = checkpoint.load_checkpoint(folder / "best.pt")
    for side in ("left", "right"):
        source = root / "images" / f"{list(saved['rows']['train'])[0]}_{side}.jpg"
        shutil.copyfile(source, root / "images" / f"{list(saved['rows']['val'])[0]}_{side}.jpg")
    assert run("--ckpt", folder, "--data", root) == 0
    assert not (folder / "test_scores.json").exists(), "other pictures: no score of the run's own part"
    (found,) = [scores_of(place) for place in folder.glob("test-val-*")]
    assert found["duplicates"] == 1 and not found["data"]["own"]


def test_the_same_pictures_in_another_folder_are_the_runs_own(trained, rendered, run, tmp_path):
    root, folder = tmp_path / "copy", copied(trained("odir"), tmp_path / "run")
    shutil.copytree(rendered("odir"), root)
    assert run("--ckpt", folder, "--data", root) == 0
    found = scores_of(folder)
    assert found["data"]["own"] and found["duplicates"] == 0 and found["resamples"] == 20
    saved = checkpoint.load_checkpoint(folder / "best.pt")
    rows = {**saved["rows"], "test": {key: (row[0], "") for key, row in saved["rows"]["val"].items()}}
    rows["val"] = {}  # as those of a test part, its pictures were not opened in training
    assert (
        run("--ckpt", changed(folder, tmp_path / "test.pt", rows=rows), "--data", root, "--split", "test")
        == 0
    )
    assert not scores_of(next((tmp_path / "test-test").glob("test-test-*")))["data"]["own"]
    (root / "images" / f"{list(saved['rows']['val'])[0]}_left.jpg").unlink()
    (folder / "test_scores.json").unlink()
    assert run("--ckpt", folder, "--data", root, "--missing", "drop") == 0
    assert not (folder / "test_scores.json").exists(), "a part of the part does not replace the whole"


def test_a_test_that_is_stopped_leaves_no_scores_of_an_earlier_one(trained, run, tmp_path, monkeypatch):
    folder = copied(trained("odir"), tmp_path / "run")
    assert run("--ckpt", folder) == 0 and (folder / "test_scores.json").exists()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(test, "write_files", stop)
    assert run("--ckpt", folder) == 130
    assert not (folder / "test_scores.json").exists()


def test_weights_that_saw_the_validation_patients_stop_the_run(trained, rendered, train_here, tmp_path):
    weights = trained("odir") / "best.pt"
    args = checkpoint.load_checkpoint(weights)["args"]
    given = [
        "--data",
        rendered("odir"),
        "--size",
        args["size"],
        "--trunk",
        args["trunk"],
        "--weights",
        weights,
    ]
    with pytest.raises(InputError, match="hold a picture that is in training too"):
        train_here(tmp_path, *given, "--split-seed", 7)
