"""run_all.sh itself: which runs it starts, with which flags; a stand-in for `python` notes what it is asked to do."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || exit 0  # setup.sh asks what is installed
printf '%q ' "$@" >> calls; echo >> calls
script=$1
while [ $# -gt 0 ]; do case "$1" in --name|--resume|--out) folder=runs/${2#runs/} ;; esac; shift; done
case "$script" in
    train.py)
        [ ! -f fail ] || exit "$(cat fail)"
        mkdir -p "$folder"; echo '{"status": "finished"}' > "$folder/run.json"; touch "$folder/best.pt" ;;
    test.py) touch "$folder/test_scores.json" ;;
    spread_labels.py) [ ! -f fail_spread ] || exit "$(cat fail_spread)" ;;
esac
"""


@pytest.fixture
def run_all(tmp_path):
    for name in ("run_all.sh", "setup.sh", "published.csv"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    for study in train.PUBLISHED:
        (tmp_path / "data" / study).mkdir(parents=True)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def run(*arguments, status=0):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", "run_all.sh", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr
        calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return {script: [call[1:] for call in calls if call[0] == f"{script}.py"] for script in ("train", "test", "report", "spread_labels")}, done
    run.folder = tmp_path
    return run


def names(calls):
    return [call[call.index("--name") + 1] for call in calls["train"]]


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_every_published_line_is_run_and_tested_with_flags_that_exist(run_all, demo):
    calls, _ = run_all(*demo)
    prefix, published = "demo-" if demo else "", pd.read_csv(ROOT / "published.csv")["experiment"]
    assert sorted(names(calls)) == sorted(prefix + name for name in published) and len(calls["report"]) == 1
    tested = {Path(call[call.index("--ckpt") + 1]).parent.name: call[call.index("--split") + 1] for call in calls["test"]}
    assert tested == {name: "test" if name.endswith("aptos-1") else "val" for name in names(calls)}
    for call in calls["train"]:
        args, _ = train.get_args(call)  # refuses what does not go together
        assert args.name == f"{prefix}{args.name.removeprefix('demo-')}" and bool(demo) == bool(args.data)
        assert not demo or args.weights == ("runs/demo-retina-1/best.pt" if args.name == "demo-retina-2" else "none")
    again, done = run_all(*demo)
    assert not again["train"] and not again["test"] and done.stdout.count("finished before") == len(published)


def test_the_lines_of_the_write_up(run_all):
    args = {call[call.index("--name") + 1]: train.get_args(call)[0] for call in run_all("odir")[0]["train"]}
    assert len(args) == 18
    three, eleven, twelve = (args[f"odir-{number}"] for number in ("03", "11", "12"))
    assert (three.lr, three.scheduler, three.model, three.epochs, three.patience, three.fine_tune) == (0.05, "linear", "v0", 100, 20, False)
    assert eleven.weighted_loss and not three.weighted_loss and twelve.sampler == "balanced" and args["odir-10"].size == 512
    assert args["odir-08"].augment == "eyes" and args["odir-14"].augment == "pair" and all(args[f"odir-{n}"].fine_tune for n in range(13, 18))


@pytest.mark.parametrize("arguments", ["3 11 --missing drop --data eyes", "--missing drop 3 --data=eyes 11", "3 --data eyes 11 --missing drop"])
def test_flags_go_through_wherever_they_stand(run_all, arguments):
    calls, _ = run_all(*arguments.split())
    assert names(calls) == ["odir-03", "odir-11"]
    for call in calls["train"] + calls["test"]:
        assert call[call.index("--missing") + 1] == "drop" and call[call.index("--data") + 1] == "eyes"


def test_labels_take_all_that_follow_and_switches_take_nothing(run_all):
    calls, _ = run_all("retina-1", "--weighted-loss", "--labels", "glaucoma", "diabetic retinopathy", "--epochs", "3")
    call = calls["train"][0]
    assert call[call.index("--labels"):] == ["--labels", "glaucoma", "diabetic retinopathy", "--epochs", "3"] and "--weighted-loss" in call


def test_seeds_and_control(run_all):
    calls, _ = run_all("--seeds", "2", "--control", "3")
    assert names(calls) == ["control-odir-03", "control-odir-03-seed43"]
    assert all("--shuffle-labels" in call for call in calls["train"]) and calls["train"][1][-2:] == ["--seed", "43"]


def test_what_was_interrupted_goes_on_and_what_had_no_epoch_starts_anew(run_all):
    for name, file in (("odir-03", "last.pt"), ("odir-05", "run.json")):
        (run_all.folder / "runs" / name).mkdir(parents=True)
        (run_all.folder / "runs" / name / file).write_text('{"status": "running"}')
    calls, _ = run_all("3", "5")
    assert calls["train"][0][:2] == ["--resume", "runs/odir-03"] and calls["train"][1][:2] == ["--name", "odir-05"] and len(calls["test"]) == 2


def test_a_failure_is_named_and_the_others_run_but_ctrl_c_ends_it(run_all):
    (run_all.folder / "fail").write_text("1")
    calls, done = run_all("3", "5", status=1)
    assert len(calls["train"]) == 2 and not calls["test"] and len(calls["report"]) == 1 and "FAILED: odir-03 odir-05" in done.stderr
    (run_all.folder / "fail").write_text("130")
    calls, _ = run_all("3", "5", status=130)
    assert len(calls["train"]) == 1 and not calls["report"]
    (run_all.folder / "fail").unlink()
    (run_all.folder / "fail_spread").write_text("130")
    calls, _ = run_all("retina", status=130)
    assert names(calls) == ["retina-1"] and len(calls["spread_labels"]) == 1


@pytest.mark.parametrize("arguments", ["18", "cifar", "odir-99", "--name x 3", "--resume=runs/x", "3 --lr", "--seeds two 3", "--seeds", "odir-0."])
def test_arguments_that_mean_nothing_are_refused(run_all, arguments):
    calls, done = run_all(*arguments.split(), status=2)
    assert not calls["train"] and "run_all.sh: " in done.stderr


def test_a_study_without_its_folder_is_not_run(run_all):
    (run_all.folder / "data" / "mrnet").rmdir()
    calls, done = run_all("mrnet", "3")
    assert names(calls) == ["odir-03"] and done.stdout.count("not run, data/mrnet is missing") == 4
