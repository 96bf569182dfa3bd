"""An interrupted run equals an uninterrupted one, bit for bit: weights, optimiser, tables, TensorBoard."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from forked import EYES, ONE, SIGNALS, SMALL, load, same, same_runs, scalars, train, wait_for
from forked import start as begin

import engine
import pictures
import samplers

FROZEN = [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--scheduler", "linear"]
CASES = {
    "kept features": [*FROZEN, "--epochs", "2"],
    "no kept features": [*FROZEN, "--epochs", "2", "--no-feature-cache"],
    "augmented": [*FROZEN, "--epochs", "3", "--augment", "eyes", "--views", "2"],
    "augmented, not kept": [*FROZEN, "--epochs", "2", "--augment", "eyes", "--crop", "68", "--no-feature-cache"],
    "weighted": [*FROZEN, "--epochs", "2", "--sampler", "weighted", "--drop-last"],
    "plateau": [*FROZEN, "--epochs", "4", "--scheduler", "plateau", "--schedule-epochs", "1", "--lr", "1"],
    "cyclic": [*FROZEN, "--epochs", "4", "--scheduler", "cyclic", "--schedule-epochs", "2"],
    "patience": [*FROZEN, "--epochs", "9", "--patience", "2", "--lr", "3"],
    "fine-tuned": [*ONE, "--epochs", "2", "--fine-tune"],
    "fine-tuned, augmented": [*ONE, "--epochs", "2", "--fine-tune", "--bn", "pretrained", "--augment", "lab", "--optimizer", "sgd"],
    "head first": [*ONE, "--epochs", "2", "--fine-tune", "--freeze-epochs", "1", "--bn", "fitted"],
    "moving statistics": [*FROZEN, "--epochs", "2", "--bn", "batch"],
    "eyes, balanced": [*EYES, "--epochs", "2", "--sampler", "balanced", "--weighted-loss"],
    "eyes, dropout": [*EYES, "--epochs", "2", "--model", "v2"],
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

    def folder(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole")
            train([*SMALL, *CASES[case], "--data", rendered(CASES[case][1]), "--name", "x", "--cache", cache], made[case])
        return made[case] / "runs/x"
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_epoch_and_the_rest_equal_all_at_once(case, tmp_path, flags, whole):
    given = flags(CASES[case])
    epochs = CASES[case][CASES[case].index("--epochs") + 1]
    train([*given, "--epochs", "1"], tmp_path / "halves")
    assert load(tmp_path / "halves/runs/x/last.pt")["epoch"] == 1
    train(["--resume", "runs/x", "--epochs", epochs], tmp_path / "halves")
    same_runs(whole(case), tmp_path / "halves/runs/x")
    assert (tmp_path / "halves/best.pt").read_bytes() == (tmp_path / "halves/runs/x/best.pt").read_bytes()
    if case == "patience":
        assert 2 < load(whole(case) / "last.pt")["epoch"] < 9


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("case", ["kept features", "augmented, not kept", "fine-tuned"])
def test_a_signal_in_mid_epoch_saves_and_the_epoch_goes_on(case, number, tmp_path, flags, whole):
    given = flags(CASES[case])
    cwd = tmp_path / "cut"
    process = begin(given, cwd, {"SLOW_STEPS": "0.15"})
    wait_for(cwd, r"step 1 1\n", process)
    os.kill(process.pid, number)
    process.join(60)
    said = (cwd / "out.txt").read_text()
    assert process.exitcode == SIGNALS[number], said
    assert said.rstrip().endswith("python train.py --resume runs/x"), said
    last = load(cwd / "runs/x/last.pt")
    assert last["epoch"] == 1 and 2 <= len(last["record"]) < 4
    assert json.loads((cwd / "runs/x/run.json").read_text())["status"] == "interrupted"
    assert len(scalars(cwd / "runs/x")["loss/train"]) == 1
    train(["--resume", "runs/x"], cwd)
    same_runs(whole(case), cwd / "runs/x")
    assert json.loads((cwd / "runs/x/run.json").read_text())["status"] == "finished"


def test_a_cut_epoch_is_ended_as_it_was_begun(tmp_path, flags):
    process = begin(flags(CASES["kept features"]), tmp_path, {"SLOW_STEPS": "0.15"})
    wait_for(tmp_path, r"step 0 1\n", process)
    os.kill(process.pid, 15)
    process.join(60)
    said = train(["--resume", "runs/x", "--batch", "4"], tmp_path, 2)
    assert "stopped within epoch 0, and --batch" in said and "--epochs 1" in said
    train(["--resume", "runs/x", "--epochs", "1"], tmp_path)
    train(["--resume", "runs/x", "--batch", "4", "--epochs", "2"], tmp_path)
    assert load(tmp_path / "runs/x/last.pt")["args"]["batch"] == 4


def test_the_command_line_wins_except_over_shapes(tmp_path, flags):
    train([*flags(CASES["kept features"]), "--epochs", "1"], tmp_path)
    before = (tmp_path / "runs/x/last.pt").read_bytes()
    for refused in (["--model", "resnet18"], ["--size", "80"], ["--optimizer", "adam"], ["--dataset", "dr"], ["--fine-tune"], ["--name", "y"]):
        said = train(["--resume", "runs/x", *refused], tmp_path, 2)
        assert "a resumed run keeps its" in said and refused[0] in said.replace("_", "-")
    assert (tmp_path / "runs/x/last.pt").read_bytes() == before
    train(["--resume", "runs/x", "--epochs", "3", "--lr", "0.2", "--weight-decay", "0.5", "--gamma", "0.5"], tmp_path)
    last = load(tmp_path / "runs/x/last.pt")
    assert last["args"]["lr"] == 0.2 and last["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    # linear from 1 to 0.5 over 50 epochs, as if --lr had been 0.2 from the start
    assert [row["lr"] for row in last["history"]] == pytest.approx([0.01, 0.2 * (1 - 0.01), 0.2 * (1 - 0.02)])


def test_resuming_a_finished_run_changes_nothing(tmp_path, flags):
    train(flags(CASES["kept features"]), tmp_path)
    shutil.copytree(tmp_path / "runs/x", tmp_path / "before")
    train(["--resume", "runs/x"], tmp_path)
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "runs/x" / file.name).read_bytes(), file.name
    (tmp_path / "runs/x/run.json").unlink()  # killed between its last epoch and its last files: they are written
    train(["--resume", "runs/x"], tmp_path)
    same_runs(tmp_path / "before", tmp_path / "runs/x")
    assert '"finished"' in (tmp_path / "runs/x/run.json").read_text()
    train(["--resume", "runs/x", "--epochs", "9"], tmp_path)
    train(["--resume", "runs/x", "--epochs", "10"], tmp_path)
    first, *last = json.loads((tmp_path / "runs/x/run.json").read_text())["command"].split(" ; ")
    assert len(last) == 1, "the command that began it and the last one that went on"


def test_a_missing_or_damaged_last_pt_is_refused_and_the_last_good_epoch_named(tmp_path, flags):
    train(flags(CASES["kept features"]), tmp_path)
    folder = tmp_path / "runs/x"
    best, whole = load(folder / "best.pt")["epoch"], (folder / "last.pt").read_bytes()
    assert "no such run folder" in train(["--resume", "runs/none"], tmp_path, 2)
    for damaged in (None, b"", whole[:len(whole) // 2], whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:], b"no checkpoint"):
        (folder / "last.pt").unlink(missing_ok=True)
        if damaged is not None:
            (folder / "last.pt").write_bytes(damaged)
        said = train(["--resume", "runs/x"], tmp_path, 2)
        assert f"last good epoch is {best}" in said and "best.pt" in said and "Traceback" not in said
        assert damaged is None or (folder / "last.pt").read_bytes() == damaged
    (folder / "best.pt").write_bytes(b"")
    said = train(["--resume", "runs/x"], tmp_path, 2)
    assert "No epoch of this run can be trusted" in said


def test_other_data_or_another_trunk_is_refused(tmp_path, flags, rendered):
    train([*flags(CASES["kept features"]), "--epochs", "1"], tmp_path)
    other = tmp_path / "other"
    shutil.copytree(rendered("aptos"), other)
    sheet = pd.read_csv(other / "train.csv")
    sheet.loc[0, "diagnosis"] = 4 - sheet.loc[0, "diagnosis"] or 3
    sheet.to_csv(other / "train.csv", index=False)
    assert "not those that" in train(["--resume", "runs/x", "--data", other, "--epochs", "2"], tmp_path, 2)
    assert "frozen trunk is not the one" in train(["--resume", "runs/x", "--seed", "7", "--epochs", "2"], tmp_path, 2)


def test_the_same_seed_gives_the_same_files(tmp_path, flags):
    for place in "ab":
        given = flags(CASES["augmented"])
        given[given.index("--cache") + 1] = "cache"  # each makes its own
        train(given, tmp_path / place)
    same_runs(tmp_path / "a/runs/x", tmp_path / "b/runs/x")
    assert (tmp_path / "a/best.pt").read_bytes() == (tmp_path / "b/best.pt").read_bytes()
    runs = [json.loads((tmp_path / place / "runs/x/run.json").read_text()) for place in "ab"]
    for run in runs:
        for key in ("started", "seconds", "seconds_in_all"):
            run.pop(key)
    assert runs[0] == runs[1]
    kept = [{file.name: file.read_bytes() for file in (tmp_path / place / "cache").glob("*.npy")} for place in "ab"]
    assert sorted(map(len, kept[0].values())) == sorted(map(len, kept[1].values()))
    train([*flags(CASES["augmented"]), "--seed", "43"], tmp_path / "c")
    assert load(tmp_path / "c/best.pt")["loss"] != load(tmp_path / "a/best.pt")["loss"]


def test_any_number_of_workers_gives_the_same_pictures_and_batches(tmp_path, rendered):
    files = [(str(file),) for file in sorted((rendered("odir") / "images").iterdir())]
    assert len(files) > 64  # fewer are decoded without a pool
    made = [pictures.Pictures(files, "fov", 32, tmp_path / str(workers), workers) for workers in (0, 4)]
    assert made[0].kept.path.read_bytes() == made[1].kept.path.read_bytes() and made[0].repaired == made[1].repaired
    data = pictures.PictureSet(made[0].array(), made[0].rows, np.arange(len(files)), seed=3, view=5)
    order = samplers.Batches(np.random.default_rng(0).integers(0, len(files), 100), 8)
    batches = [list(engine.make_loader(data, order, workers)) for workers in (0, 4)]
    assert len(batches[0]) == 13
    same(*batches)
