"""An interrupted run equals an uninterrupted one, bit for bit: weights, optimiser, tables, TensorBoard."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from forked import EYES, ONE, SIGNALS, SMALL, join, load, same, same_runs, scalars, train, wait_for
from forked import start as begin
from PIL import Image

import checkpoint
import engine
import samplers
from checkpoint import run_facts
from dataset import PictureSet
from decode import Pictures

FROZEN = [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--scheduler", "linear"]
TUNED = [*ONE, "--fine-tune", "--optimizer", "sgd", "--lr", "0.001"]
AVERAGED = ["--optimizer", "adamw", "--ema", "0.5"]
CASES = {
    "kept features": [*FROZEN, "--epochs", "2"],
    "augmented": [*FROZEN, "--epochs", "3", "--augment", "eyes", "--views", "2"],
    "augmented, not kept": [
        *FROZEN,
        "--epochs",
        "2",
        "--augment",
        "eyes",
        "--crop",
        "68",
        "--no-feature-cache",
    ],
    "plateau": [*FROZEN, "--epochs", "4", "--scheduler", "plateau", "--schedule-epochs", "1", "--lr", "1"],
    "cyclic, weighted": [*FROZEN, "--epochs", "4", "--scheduler", "cyclic", "--schedule-epochs", "2"]
    + ["--sampler", "weighted", "--drop-last"],
    "patience": [*FROZEN, "--epochs", "9", "--patience", "2", "--lr", "3"],
    "fine-tuned": [*ONE, "--epochs", "2", "--fine-tune"],
    "fine-tuned, no new best": [*ONE, "--epochs", "3", "--fine-tune", "--bn", "pretrained", "--lr", "0.003"]
    + ["--scheduler", "none", "--augment", "lab"],
    "fine-tuned, averaged": [*TUNED, "--epochs", "2", *AVERAGED, "--trunk-lr", "0.1", "--keep", "last"],
    "head first": [*ONE, "--epochs", "2", "--fine-tune", "--freeze-epochs", "1", "--bn", "fitted"],
    "moving statistics": [*FROZEN, "--epochs", "2", "--bn", "batch"],
    "eyes, calibration": [*EYES, "--epochs", "2", "--sampler", "balanced", "--weighted-loss"]
    + ["--weight-power", "0.5", "--drop-last", "--calibration-fraction", "0.25"],
    "eyes, folds": [*EYES, "--epochs", "2", "--model", "v2", *AVERAGED, "--folds", "2"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(rendered, cache):
    def of(case):
        return [*SMALL, *case, "--data", rendered(case[1]), "--name", "x", "--cache", cache]

    return of


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rendered, cache):
    """The run folder of a case that nothing disturbed."""
    made = {}

    def folder(name, case):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole")
            given = [*SMALL, *case, "--data", rendered(case[1]), "--name", "x", "--cache", cache]
            train(given, made[name])
        return made[name] / "runs/x"

    return folder


def check_best(folder):
    """run.json, best.pt and last.pt speak of one network."""
    facts, best = (
        json.loads((folder / "run.json").read_text()),
        checkpoint.load_checkpoint(folder / "best.pt"),
    )
    assert (
        facts["best_digest"] == best["digest"] == checkpoint.network_digest(best["model"], best["thresholds"])
    )
    assert (facts["best_epoch"], facts["best_loss"]) == (best["epoch"], best["loss"])
    stored = load(folder / "last.pt")["best"]
    same(stored["weights"], {name: best["model"][name] for name in stored["weights"]})
    assert stored["thresholds"] == best["thresholds"] == facts["thresholds"]


@pytest.mark.parametrize("case", CASES)
def test_all_but_one_epoch_and_the_last_equal_all_at_once(case, tmp_path, flags, whole):
    given, there = flags(CASES[case]), tmp_path / "halves"
    epochs = int(CASES[case][CASES[case].index("--epochs") + 1])
    first = 2 if case == "patience" else epochs - 1
    train([*given, "--epochs", first], there)
    assert load(there / "runs/x/last.pt")["epoch"] == first
    check_best(there / "runs/x")
    train(["--resume", "runs/x", "--epochs", epochs], there)
    same_runs(whole(case, CASES[case]), there / "runs/x")
    check_best(there / "runs/x")
    assert (there / "best.pt").read_bytes() == (there / "runs/x/best.pt").read_bytes()
    last = load(there / "runs/x/last.pt")
    if case == "patience":
        assert 2 < last["epoch"] < 9
    if case == "fine-tuned, no new best":
        assert last["best"]["epoch"] < last["epoch"] - 1
        kept, now = last["best"]["weights"], last["model"]
        assert any(not value.equal(kept[name]) for name, value in now.items()), "they must differ"


COSINE = [*EYES, "--epochs", "2", "--scheduler", "cosine", "--optimizer", "adamw", "--lr", "0.01"]
CUT = {
    "kept features": CASES["kept features"],
    "augmented, not kept": CASES["augmented, not kept"],
    "fine-tuned": CASES["fine-tuned"],
    "cosine, averaged, folds": [*COSINE, "--ema", "0.9", "--folds", "2"],
}


@pytest.mark.parametrize("case, number", [*zip(CUT, [15, 2, 15, 2], strict=True)])
def test_a_signal_in_mid_epoch_ends_the_run_at_once_and_the_epoch_is_repeated(
    case, number, tmp_path, flags, whole
):
    cwd = tmp_path / "cut"
    process = begin(flags(CUT[case]), cwd, {"HOOK": "slow_steps"})
    wait_for(cwd, r"step 1 1\n", process)
    began = time.time()
    os.kill(process.pid, number)
    join(process, 20)
    assert time.time() - began < 3
    said = (cwd / "out.txt").read_text()
    assert process.exitcode == SIGNALS[number], said
    assert said.rstrip().endswith("python train.py --resume runs/x") and "Traceback" not in said, said
    assert load(cwd / "runs/x/last.pt")["epoch"] == 1
    assert json.loads((cwd / "runs/x/run.json").read_text())["status"] == "interrupted"
    check_best(cwd / "runs/x")
    assert len(scalars(cwd / "runs/x")["loss/train"]) == 1
    train(["--resume", "runs/x"], cwd)
    same_runs(whole(case, CUT[case]), cwd / "runs/x")
    check_best(cwd / "runs/x")
    assert json.loads((cwd / "runs/x/run.json").read_text())["status"] == "finished"


MOMENTS = ["decode", "extract", "fit_batchnorm", "train_step", "validate", "save_best", "save_last", "end"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_leaves_what_goes_on(moment, tmp_path, flags, whole):
    """The process kills itself (SIGTERM) at the given moment; the command that it names then goes on."""
    given = flags(CASES["kept features"])
    given[given.index("--cache") + 1] = tmp_path / "cache"
    said = train(given, tmp_path, 143, {"HOOK": f"stop_at_{moment}"})
    assert "interrupted. Go on with:" in said and "Traceback" not in said
    command = said.rstrip().splitlines()[-1].split()
    assert command[:2] == ["python", "train.py"]
    assert not list(tmp_path.rglob("*.tmp"))
    train(command[2:], tmp_path)
    same_runs(whole("kept features", CASES["kept features"]), tmp_path / "runs/x")
    check_best(tmp_path / "runs/x")


def test_a_stopped_run_leaves_the_best_network_so_far(tmp_path, flags):
    """Checkpoints are not written after every epoch; when the run is stopped, best.pt is."""
    given = [*flags([*FROZEN, "--epochs", "5000", "--keep", "last"])]  # each epoch is the kept one
    process = begin(given, tmp_path)
    wait_for(tmp_path, r"(epoch \d.*\s+){20}", process)
    os.kill(process.pid, signal.SIGTERM)
    join(process, 60)
    assert process.exitcode == 143
    stopped = int(re.search(r"stopped after (\d+) whole", (tmp_path / "out.txt").read_text())[1])
    best = checkpoint.load_checkpoint(tmp_path / "runs/x/best.pt")
    assert (
        best["epoch"] == stopped - 1 >= 19 and run_facts(tmp_path / "runs/x")["best_digest"] == best["digest"]
    )


def test_the_command_line_wins_except_over_shapes(tmp_path, flags):
    train([*flags(CASES["kept features"]), "--epochs", "1"], tmp_path)
    before = (tmp_path / "runs/x/last.pt").read_bytes()
    refused = [["--model", "resnet18"], ["--size", "80"], ["--optimizer", "adam"], ["--dataset", "dr"]]
    for words in [*refused, ["--fine-tune"], ["--name", "y"], ["--ema", "0.5"]]:
        said = train(["--resume", "runs/x", *words], tmp_path, 2)
        assert "a resumed run keeps its" in said and words[0] in said.replace("_", "-")
    assert (tmp_path / "runs/x/last.pt").read_bytes() == before
    more = ["--epochs", "3", "--lr", "0.2", "--weight-decay", "0.5", "--gamma", "0.5"]
    train(["--resume", "runs/x", *more], tmp_path)
    last = load(tmp_path / "runs/x/last.pt")
    assert last["args"]["lr"] == 0.2 and last["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    # linear from 1 to 0.5 over 50 epochs, as if --lr had been 0.2 from the start
    rates = [row["lr"] for row in last["history"]]
    assert rates == pytest.approx([0.01, 0.2 * (1 - 0.01), 0.2 * (1 - 0.02)])


def test_flags_of_the_stored_schedule_are_accepted(tmp_path, flags):
    train([*flags(CASES["cyclic, weighted"]), "--epochs", "1"], tmp_path)
    train(
        ["--resume", "runs/x", "--max-lr", "0.3", "--epochs", "2"], tmp_path
    )  # linear, the default, has none
    assert load(tmp_path / "runs/x/last.pt")["args"]["max_lr"] == 0.3


def test_resuming_a_finished_run_changes_nothing(tmp_path, flags):
    train(flags(CASES["kept features"]), tmp_path)
    shutil.copytree(tmp_path / "runs/x", tmp_path / "before")
    assert "is finished: 2 epochs" in train(["--resume", "runs/x"], tmp_path)
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "runs/x" / file.name).read_bytes(), file.name
    # Killed between its last epoch and its last files: they are written.
    (tmp_path / "runs/x/run.json").unlink()
    train(["--resume", "runs/x"], tmp_path)
    same_runs(tmp_path / "before", tmp_path / "runs/x")
    assert '"finished"' in (tmp_path / "runs/x/run.json").read_text()
    train(["--resume", "runs/x", "--epochs", "9"], tmp_path)
    train(["--resume", "runs/x", "--epochs", "10"], tmp_path)
    commands = json.loads((tmp_path / "runs/x/run.json").read_text())["command"].split(" ; ")
    assert [words.split()[-1] for words in commands[-2:]] == ["9", "10"]


def test_a_finished_run_can_learn_its_thresholds_later(tmp_path, flags):
    train([*flags(EYES), "--epochs", "1"], tmp_path)
    before = load(tmp_path / "runs/x/best.pt")
    train(["--resume", "runs/x", "--folds", "2"], tmp_path)
    after = load(tmp_path / "runs/x/best.pt")
    same(after["model"], before["model"])
    assert before["thresholds"] is None and len(after["thresholds"]) == 8
    check_best(tmp_path / "runs/x")


def test_a_fine_tuned_run_goes_on_without_the_file_of_its_weights(tmp_path, flags):
    """It knows what that network had seen, and where it started from."""
    train([*flags(CASES["fine-tuned"]), "--epochs", "1"], tmp_path / "a")
    given = tmp_path / "given.pt"
    (tmp_path / "a/runs/x/best.pt").rename(given)
    state = load(given)
    torch.save({**state, "seen": [*state["seen"], "another"]}, given)
    train([*flags(CASES["fine-tuned"]), "--epochs", "1", "--weights", str(given)], tmp_path / "b")
    started = run_facts(tmp_path / "b/runs/x")["trunk_digest"]
    given.unlink()
    train(["--resume", "runs/x", "--epochs", "2"], tmp_path / "b")
    assert "another" in load(tmp_path / "b/runs/x/best.pt")["seen"]
    assert run_facts(tmp_path / "b/runs/x")["trunk_digest"] == started


def test_fewer_epochs_or_less_patience_than_a_run_had_are_refused(tmp_path, flags):
    """A report would take its long training for a short one."""
    train(flags(CASES["kept features"]), tmp_path)
    for less in (["--epochs", "1"], ["--patience", "3"]):
        assert "expected --epochs 2 --patience" in train(["--resume", "runs/x", *less], tmp_path, 2)


def test_a_finished_run_gets_its_lost_best_pt_back(tmp_path, flags):
    train(flags(CASES["kept features"]), tmp_path)
    best = tmp_path / "runs/x/best.pt"
    before = load(best)
    best.unlink()
    train(["--resume", "runs/x"], tmp_path)
    same(load(best)["model"], before["model"])
    assert load(best)["digest"] == before["digest"]


def test_a_missing_or_damaged_last_pt_is_refused_and_best_pt_named(tmp_path, flags):
    train(flags(CASES["kept features"]), tmp_path)
    folder = tmp_path / "runs/x"
    whole = (folder / "last.pt").read_bytes()
    (tmp_path / "notes").mkdir()
    assert "no such run folder" in train(["--resume", "notes"], tmp_path, 2)
    assert not list((tmp_path / "notes").iterdir())  # not a lock either
    assert "no such run folder" in train(["--resume", "runs/none"], tmp_path, 2)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (None, b"", whole[: len(whole) // 2], flipped, b"no checkpoint"):
        (folder / "last.pt").unlink(missing_ok=True)
        if damaged is not None:
            (folder / "last.pt").write_bytes(damaged)
        said = train(["--resume", "runs/x"], tmp_path, 2)
        assert "A whole best.pt there serves test.py" in said and "Traceback" not in said
        assert damaged is None or (folder / "last.pt").read_bytes() == damaged


def test_what_was_noted_of_the_weights_is_kept(tmp_path, flags, trained):
    """A resume does not read them again; drawn pictures, and patients that they know, stay noted."""
    given = flags([*EYES, "--epochs", "1", "--bn", "pretrained", "--duplicates", "keep", "--split-seed", "7"])
    weights = tmp_path / "weights.pt"
    shutil.copy(trained("odir") / "best.pt", weights)
    train([*given, "--weights", weights], tmp_path)
    before = run_facts(tmp_path / "runs/x")["data"]["notes"]
    assert any("RENDERED" in note for note in before) and any("by their names" in note for note in before)
    weights.unlink()
    shutil.copy(trained("odir") / "best.pt", weights)
    train(["--resume", "runs/x", "--epochs", "2"], tmp_path)
    assert run_facts(tmp_path / "runs/x")["data"]["notes"] == before
    assert load(tmp_path / "runs/x/best.pt")["data"]["notes"] == before


def test_other_data_or_another_trunk_is_refused(tmp_path, flags, rendered):
    train([*flags(CASES["kept features"]), "--epochs", "1"], tmp_path)
    other = tmp_path / "other"
    shutil.copytree(rendered("aptos"), other)
    sheet = pd.read_csv(other / "train.csv")
    sheet.loc[0, "diagnosis"] = 4 - sheet.loc[0, "diagnosis"] or 3
    sheet.to_csv(other / "train.csv", index=False)
    go_on = ["--resume", "runs/x", "--epochs", "2"]
    assert "are not those of" in train([*go_on, "--data", other], tmp_path, 2)
    noise = tmp_path / "noise"
    shutil.copytree(rendered("aptos"), noise)
    for file in (noise / "train_images").iterdir():
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
        break
    said = train([*go_on, "--data", noise, "--missing", "drop"], tmp_path, 2)
    assert "are not those of" in said, "other pictures under the same names"
    last = load(tmp_path / "runs/x/last.pt")
    torch.save({**last, "trunk": "another"}, tmp_path / "runs/x/last.pt")
    assert "frozen trunk is not the one" in train(go_on, tmp_path, 2)


def test_what_a_resume_changes_is_told_and_what_would_rename_the_run_is_refused(tmp_path, flags):
    train([*flags(CASES["kept features"]), "--epochs", "1"], tmp_path)
    for words in (["--seed", "7"], ["--sampler", "balanced"], ["--batch", "7"], ["--augment", "lab"]):
        assert f"a resumed run keeps its {words[0]}" in train(["--resume", "runs/x", *words], tmp_path, 2)
    train(["--resume", "runs/x", "--epochs", "2", "--lr", "0.2"], tmp_path)
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["changes"] == ["lr was 0.01 for 1 epochs"]


@pytest.mark.parametrize("case", ["fine-tuned", "kept features"])
def test_a_resume_in_another_precision(case, tmp_path, flags):
    """A run begun in bf16 goes on in fp32, then in fp16: scaler, fitted BatchNorm and features fit."""
    given = flags(CASES[case])
    given[given.index("--cache") + 1] = tmp_path / "cache"
    train([*given, "--precision", "bf16", "--epochs", "1", "--bn", "fitted"], tmp_path)
    before = load(tmp_path / "runs/x/last.pt")
    assert before["scaler"] == {}
    for number, precision in enumerate(["fp32", "fp16"], 2):
        train(["--resume", "runs/x", "--precision", precision, "--epochs", str(number)], tmp_path)
        last = load(tmp_path / "runs/x/last.pt")
        assert last["epoch"] == number and np.isfinite(last["history"][-1]["val_loss"])
        same(last["buffers"], before["buffers"])
        assert json.loads((tmp_path / "runs/x/run.json").read_text())["precision"] == precision
    check_best(tmp_path / "runs/x")


@pytest.mark.parametrize("case", ["augmented", "cosine, averaged, folds"])
def test_the_same_seed_gives_the_same_files(case, tmp_path, flags):
    case = {**CASES, **CUT}[case]
    for place in "ab":
        given = flags(case)
        given[given.index("--cache") + 1] = "cache"  # each makes its own
        train([*given, "--deterministic"], tmp_path / place)
    same_runs(tmp_path / "a/runs/x", tmp_path / "b/runs/x")
    assert (tmp_path / "a/best.pt").read_bytes() == (tmp_path / "b/best.pt").read_bytes()
    runs = [json.loads((tmp_path / place / "runs/x/run.json").read_text()) for place in "ab"]
    for run in runs:
        for key in ("started", "seconds", "seconds_in_all"):
            run.pop(key)
    assert runs[0] == runs[1]
    kept = []
    for place in "ab":
        kept.append(sorted(file.read_bytes() for file in (tmp_path / place / "cache").glob("*.npy")))
    assert kept[0] and list(map(len, kept[0])) == list(map(len, kept[1]))
    train([*flags(case), "--seed", "43"], tmp_path / "c")
    assert load(tmp_path / "c/best.pt")["loss"] != load(tmp_path / "a/best.pt")["loss"]


def test_any_number_of_workers_gives_the_same_pictures_and_batches(tmp_path, rendered):
    files = [(str(file),) for file in sorted((rendered("odir") / "images").iterdir())]
    assert len(files) > 64  # fewer are decoded without a pool
    made = [Pictures(files, "fov", 32, tmp_path / str(workers), workers) for workers in (0, 4)]
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    assert made[0].repaired == made[1].repaired and made[0].contents == made[1].contents
    data = PictureSet(made[0], np.arange(len(files)), seed=3, view=5)
    order = samplers.Batches(np.random.default_rng(0).integers(0, len(files), 100), 8)
    batches = [list(engine.make_loader(data, order, workers)) for workers in (0, 4)]
    assert len(batches[0]) == 13
    same(*batches)


def test_the_best_pt_of_the_run_whose_folder_one_works_in_stays(tmp_path, flags):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "best.pt").write_text("theirs")
    said = train([*flags(CASES["kept features"])], tmp_path)
    assert "another run's" in said and (tmp_path / "best.pt").read_text() == "theirs"
    assert (tmp_path / "runs/x/best.pt").exists()


def test_two_runs_of_one_folder_exclude_each_other(tmp_path, flags):
    """--resume of a run that is training, and a second run of the same --name, are refused by name."""
    given = flags(CASES["kept features"])
    process = begin([*given, "--epochs", "99"], tmp_path, {"HOOK": "slow_steps"})
    wait_for(tmp_path, r"step 1 1\n", process)
    said = train(["--resume", "runs/x"], tmp_path, 2)
    assert "runs/x is being trained by another process: wait for it, or stop it" in said
    assert "never overwritten" in train(given, tmp_path, 2)
    os.kill(process.pid, signal.SIGKILL)  # the system lets go of the lock
    join(process, 20)
    epoch = load(tmp_path / "runs/x/last.pt")["epoch"]
    train(["--resume", "runs/x", "--epochs", str(epoch + 1)], tmp_path)
    assert load(tmp_path / "runs/x/last.pt")["epoch"] == epoch + 1


def test_two_runs_of_one_name_that_begin_together(tmp_path, flags):
    """The second finds the folder of a run that has not written its first checkpoint."""
    folder = tmp_path / "runs/x"
    folder.mkdir(parents=True)
    lock = checkpoint.lock_run(folder)
    said = train(flags(CASES["kept features"]), tmp_path, 2)
    assert "being trained by another process" in said
    lock.release()
    train(flags(CASES["kept features"]), tmp_path)


def test_a_run_is_locked_before_it_is_read(tmp_path, monkeypatch):
    """Else another process could write a newer last.pt in between, which this one would overwrite."""

    def load_checkpoint(*_):
        with pytest.raises(checkpoint.InputError, match="being trained by another process"):
            checkpoint.lock_run(tmp_path)
        return {"epoch": 1}

    monkeypatch.setattr(checkpoint, "load_checkpoint", load_checkpoint)
    (tmp_path / "run.json").touch()
    state = checkpoint.load_last(tmp_path)
    assert state["epoch"] == 1 and state["lock"].is_locked
