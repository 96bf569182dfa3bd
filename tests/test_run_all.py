"""run_all.sh: which runs it starts, with which flags; a stand-in for `python` notes what it is asked."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import arguments

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || exit 0  # setup.sh asks what is installed
echo "$(printf '%q ' "$@")" >> calls  # at once: a test runs beside the next training
[[ ! -f slow || ! "$*" =~ $(cat slow) ]] || exec "$REAL_PYTHON" waits.py "$1"
script=$1 place=$2
while [ $# -gt 0 ]; do case "$1" in --split) part=$2 ;; --name|--resume|--ckpt) folder=runs/${2#runs/} ;; esac; shift; done
case "$script" in
    train.py)
        [ ! -f fail ] || exit "$(cat fail)"
        mkdir -p "$folder"; touch "$folder/best.pt"
        echo '{"status": "finished",' > "$folder/run.json"
        echo ' "best_digest": "'"$(cat digest)"'"}' >> "$folder/run.json" ;;
    render_data.py) mkdir -p "$place"; touch "$place/rendered.json" ;;
    test.py)
        [ ! -f fail_test ] || { echo "error: no eyes"; exit 2; }
        printf '{"digest": "%s",\\n "path": "",\\n "own": true,\\n "split": "'$part'",\\n "tta": false,\\n "threshold": 0.5,\\n}' "$(cat digest)" \\
            > "$folder/test_scores.json" ;;
    spread_labels.py) [ ! -f fail_spread ] || exit "$(cat fail_spread)" ;;
esac
"""
WAITS = f"""
import pathlib, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import errors

def main():
    pathlib.Path(sys.argv[1] + ".pid").write_text(str(os.getpid()))
    time.sleep(60)

sys.exit(errors.guard(main))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with run_all.sh, a data folder for each study and the stand-in -> (folder, environment)."""
    for name in ("run_all.sh", "setup.sh", "published.csv"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "bin" / "getconf").write_text(
        "#!/bin/sh\necho 2\n"
    )  # cores: as many lines of the demo at once
    (tmp_path / "bin" / "getconf").chmod(0o755)
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "digest").write_text("abc")
    for study in arguments.PUBLISHED:
        (tmp_path / "data" / study).mkdir(parents=True)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ours = {"VIRTUAL_ENV": str(tmp_path), "PATH": path, "REAL_PYTHON": sys.executable}
    return tmp_path, {**os.environ, **ours}


@pytest.fixture
def run_all(checkout):
    folder, environment = checkout

    def run(*given, status=0, cwd=folder, script="run_all.sh"):
        (folder / "calls").write_text("")
        options = {"cwd": cwd, "env": environment, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(["bash", script, *given], **options)
        assert done.returncode == status, done.stdout + done.stderr
        calls = [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]
        found = {name: [] for name in ("train", "test", "report", "spread_labels", "render_data")}
        for script_name, *flags in calls:
            found[script_name.removesuffix(".py")].append(flags)
        return found, done

    run.folder = folder
    return run


def names(calls):
    return [call[call.index("--name") + 1] for call in calls["train"]]


def parsed(calls):
    """{name: arguments}; arguments.get_args refuses what does not go together."""
    return {
        name: arguments.get_args(call)[0] for name, call in zip(names(calls), calls["train"], strict=True)
    }


# ---------------------------------------------------------------- which runs, with which flags


@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_every_published_line_is_run_and_tested_with_flags_that_exist(run_all, demo):
    calls, _ = run_all(*demo)
    prefix = "demo-" if demo else ""
    published = set(pd.read_csv(ROOT / "published.csv")["experiment"])
    assert len(names(calls)) == len(set(names(calls))) == len(arguments.experiments())
    assert set(names(calls)) >= {prefix + name for name in published} and len(calls["report"]) == 1
    tested = {}
    for call in calls["test"]:
        tested[Path(call[call.index("--ckpt") + 1]).name] = call[call.index("--split") + 1]
    assert tested == {name: "test" if name.endswith("aptos-1") else "val" for name in names(calls)}
    for name, args in parsed(calls).items():
        assert bool(demo) == bool(args.data) and name.startswith(prefix) and not args.resume
    assert len(calls["render_data"]) == (5 if demo else 0)
    again, done = run_all(*demo)
    assert not again["train"] and not again["test"]
    assert done.stdout.count("finished before") == len(names(calls))


def test_the_demo_goes_on_from_its_own_first_retina_run(run_all):
    args = parsed(run_all("--demo", "retina")[0])
    assert args["demo-retina-2"].weights == "runs/demo-retina-1/best.pt"
    assert args["demo-retina-3"].pseudo_labels == "runs/demo-retina-1/pseudo_labels.csv"


def test_the_demo_learns_from_real_weights(run_all):
    """But for a few ResNets, and for the networks whose weights nobody publishes."""
    args = parsed(run_all("--demo")[0])
    random = sorted(name.removeprefix("demo-") for name, found in args.items() if found.weights == "none")
    expected = [f"retina-{n}" for n in (1, 3, 4, 5)] + [
        f"mrnet-{n}" for n in (1, "abnormal", "acl", "meniscus")
    ]
    assert random == sorted([*expected, "dr-resnet18-scratch", "dr-resnet50-scratch"])
    for name, found in args.items():
        network = found.trunk if name.startswith("demo-odir") else found.model
        assert found.weights != "imagenet" or network.startswith("efficientnet-lite0"), name


def test_the_lines_are_read_as_bash_reads_them(run_all):
    """arguments.experiments, which the report compares with, gives what train.py gets here."""
    args, lines = parsed(run_all()[0]), arguments.experiments()
    for name, line in lines.items():
        assert not arguments.differences(vars(args[name]), line), name


def test_the_lines_of_the_write_up(run_all):
    args = parsed(run_all("odir")[0])
    assert [f"odir-{number:02d}" for number in range(18)] == list(args)[:18]
    three, eleven, twelve = (args[f"odir-{number}"] for number in ("03", "11", "12"))
    found = (three.lr, three.scheduler, three.model, three.epochs, three.patience, three.fine_tune)
    assert found == (0.05, "linear", "v0", 100, 20, False)
    assert eleven.weighted_loss and not three.weighted_loss and twelve.sampler == "balanced"
    assert args["odir-08"].augment == "eyes" and args["odir-14"].augment == "pair"
    assert all(args[f"odir-{n}"].fine_tune for n in range(13, 18)) and args["odir-10"].size == 512


def test_names_come_first_and_the_rest_goes_to_train(run_all):
    calls, _ = run_all(*"3 11 --data eyes --missing drop --trunk resnet18".split())
    assert names(calls) == ["odir-03", "odir-11"]
    for call in calls["train"]:
        assert call[-6:] == ["--data", "eyes", "--missing", "drop", "--trunk", "resnet18"]
    assert [call[0] for call in calls["test"]] == ["--ckpt"] * 2 and "--data" not in calls["test"][0]


def test_values_with_blanks_stay_whole(run_all):
    flags = ["--weighted-loss", "--labels", "glaucoma", "diabetic retinopathy", "--epochs", "3"]
    assert run_all("retina-1", *flags)[0]["train"][0][-6:] == flags


def test_seeds_and_control(run_all):
    calls, _ = run_all("--seeds", "2", "--control", "3")
    assert names(calls) == ["control-odir-03", "control-odir-03-seed43"]
    assert all("--shuffle-labels" in call for call in calls["train"])
    assert calls["train"][1][-2:] == ["--seed", "43"] and "--seed" not in calls["train"][0]
    assert names(run_all("--demo", "--control", "3")[0]) == ["control-demo-odir-03"]


@pytest.mark.parametrize(
    "given",
    ["18", "cifar", "odir-99", "--name x 3", "--resume=runs/x", "--seeds two 3", "--seeds"]
    + ["--seeds 0 3", "odir-0.", "3 --lr 0.1 --demo", "3 --dataset dr", "3 --shuffle-labels"]
    + ["--seeds 2 3 --seed 43", "--seeds 2 3 --seed=43"],  # the same run twice as n = 2
)
def test_what_means_nothing_is_refused(run_all, given):
    calls, done = run_all(*given.split(), status=2)
    assert (
        not calls["train"] and done.stderr.startswith("run_all.sh: ") and len(done.stderr.splitlines()) == 1
    )


def test_one_seed_can_be_chosen(run_all):
    assert run_all("3", "--seed", "43")[0]["train"][0][-2:] == ["--seed", "43"]
    assert run_all("--seeds", "2", "5", "--split-seed", "1")[1].returncode == 0


def test_from_another_folder(run_all):
    script = str(run_all.folder / "run_all.sh")
    assert names(run_all("3", cwd=run_all.folder.parent, script=script)[0]) == ["odir-03"]
    _, done = run_all("--help", cwd=run_all.folder.parent, script=script)
    assert "bash run_all.sh --demo" in done.stdout and "cd " not in done.stdout


def test_without_data_one_sentence_says_what_is_missing(run_all):
    (run_all.folder / "data" / "mrnet").rmdir()
    calls, done = run_all("mrnet", "3")
    assert names(calls) == ["odir-03"]
    assert "4 experiments were not run, as there is no data/mrnet:" in done.stdout
    shutil.rmtree(run_all.folder / "data")
    shutil.rmtree(run_all.folder / "runs")
    calls, done = run_all()
    assert len(done.stdout.splitlines()) == 1 and not done.stderr and not any(calls.values())
    for words in ("data/aptos data/dr data/mrnet data/odir data/retina", "docs/data.md", "--demo"):
        assert words in done.stdout


# ---------------------------------------------------------------- what is there already


def test_what_was_interrupted_goes_on_and_what_had_no_epoch_starts_anew(run_all):
    for name, file in (("odir-03", "last.pt"), ("odir-05", "run.json")):
        (run_all.folder / "runs" / name).mkdir(parents=True)
        (run_all.folder / "runs" / name / file).write_text('{"status": "running"}')
    calls, _ = run_all("3", "5")
    assert calls["train"][0][:2] == ["--resume", "runs/odir-03"]
    assert calls["train"][1][:2] == ["--name", "odir-05"] and len(calls["test"]) == 2


def test_a_folder_with_anything_in_it_is_never_deleted(run_all):
    """A best.pt without last.pt, notes, an empty folder: all stay; train.py says what is wrong with them."""
    kept = {"odir-03/best.pt": "weights", "odir-05/notes.txt": "mine", "odir-06/deep/notes.txt": "mine"}
    for name, text in kept.items():
        path = run_all.folder / "runs" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (run_all.folder / "fail").write_text("2")
    run_all("3", "5", "6", status=1)
    for name, text in kept.items():
        assert (run_all.folder / "runs" / name).read_text() == text
    words = (ROOT / "run_all.sh").read_text().split()
    assert not {"rm", "rmdir", "mv", "unlink"} & set(words)


def test_a_stale_test_is_made_again(run_all):
    """By content: the test names another checkpoint than the run's best, however new the file is."""
    assert len(run_all("3")[0]["test"]) == 1 and not run_all("3")[0]["test"]
    scores = run_all.folder / "runs/odir-03/test_scores.json"
    os.utime(scores, (0, 0))  # a clock that goes backwards changes nothing
    assert not run_all("3")[0]["test"]
    scores.write_text(scores.read_text().replace("abc", "abcd"))
    calls, done = run_all("3")
    assert not calls["train"] and len(calls["test"]) == 1 and "tested again" in done.stdout
    for other in ('"tta": true', '"threshold": 0.4', '"path": "",\n "path": ""'):  # what the report refuses
        name, whole = other.split(":")[0], scores.read_text().splitlines()
        scores.write_text("\n".join([line for line in whole if name not in line] + [f" {other},"]))
        assert len(run_all("3")[0]["test"]) == 1
    scores.unlink()
    assert len(run_all("3")[0]["test"]) == 1 and not run_all("3")[0]["test"]


@pytest.mark.parametrize("old, new", [('"own": true', '"own": false'), ('"split": "val"', '"split": "all"')])
def test_a_test_of_other_rows_is_made_again(run_all, old, new):
    run_all("3")
    scores = run_all.folder / "runs/odir-03/test_scores.json"
    scores.write_text(scores.read_text().replace(old, new))
    assert len(run_all("3")[0]["test"]) == 1 and not run_all("3")[0]["test"]


def test_a_run_is_told_whose_weights_or_labels_were_made_anew(run_all):
    run_all("retina")
    weights = run_all.folder / "runs/retina-1/best.pt"
    os.utime(weights, (0, 0))
    assert "newer" not in run_all("retina")[1].stdout
    os.utime(weights)
    told = [line for line in run_all("retina")[1].stdout.splitlines() if "newer" in line]
    assert len(told) == 1 and told[0].startswith("== retina-2: runs/retina-1/best.pt is newer than this run")


# ---------------------------------------------------------------- failures and signals


def test_a_failure_is_named_and_the_others_run_but_ctrl_c_ends_it(run_all):
    (run_all.folder / "fail").write_text("1")
    (run_all.folder / "runs/x").mkdir(parents=True)
    (run_all.folder / "runs/x/run.json").touch()  # the report has something to say
    calls, done = run_all("3", "5", status=1)
    assert len(calls["train"]) == 2 and not calls["test"] and len(calls["report"]) == 1
    assert "FAILED: odir-03 odir-05" in done.stderr
    (run_all.folder / "fail").write_text("130")
    calls, _ = run_all("3", "5", status=130)
    assert len(calls["train"]) == 1 and not calls["report"]
    (run_all.folder / "fail").unlink()
    (run_all.folder / "fail_spread").write_text("130")
    calls, _ = run_all("retina", status=130)
    assert names(calls) == ["retina-1"] and len(calls["spread_labels"]) == 1


def test_a_failed_test_is_named_with_its_reason(run_all):
    (run_all.folder / "fail_test").touch()
    calls, done = run_all("3", "5", status=1)
    assert len(calls["train"]) == 2 and done.stderr.count("error: no eyes") == 2
    assert "FAILED: test of runs/odir-03 test of runs/odir-05" in done.stderr
    calls, done = run_all("--demo", "3", "5", "6", status=1)
    assert len(calls["train"]) == len(calls["test"]) == 3 and done.stderr.count("error: no eyes") == 3
    assert "FAILED: test of runs/demo-odir-03 test of runs/demo-odir-05 test of" in done.stderr
    (run_all.folder / "fail").write_text("2")
    calls, done = run_all("--demo", "7", status=1)
    assert not calls["test"] and "FAILED: demo-odir-07" in done.stderr


def test_the_demo_waits_for_the_model_that_spreads_labels(run_all):
    run_all("--demo", "retina")
    calls = [line.split() for line in (run_all.folder / "calls").read_text().splitlines()]
    order = [call[0] for call in calls if "retina-1" in " ".join(call[:4])]
    assert order == ["train.py", "test.py", "spread_labels.py"]
    spread = next(i for i, call in enumerate(calls) if call[0] == "spread_labels.py")
    assert not any("demo-retina-2" in call or "demo-retina-3" in call for call in calls[:spread])


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_until(happened, seconds):
    end = time.time() + seconds
    while not happened():
        assert time.time() < end, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc whether a process has ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP])
@pytest.mark.parametrize("demo", [[], ["--demo"]])
def test_its_training_and_its_test_end_with_it(number, demo, checkout):
    """Within two seconds, whatever ends it; the training says how to go on."""
    folder, environment = checkout
    (folder / "slow").write_text("test.py|odir-05")  # the test of 3 runs beside the training of 5
    pids = [folder / "train.py.pid", folder / "test.py.pid"]
    with open(folder / "out", "w") as out:
        command = ["bash", "run_all.sh", *demo, "3", "5", "6"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            wait_until(lambda: all(path.exists() and path.read_text() for path in pids), 20)
            process.send_signal(number)
            wait_until(lambda: not any(is_alive(int(path.read_text())) for path in pids), 2)
            assert process.wait(5) == {signal.SIGINT: 130, signal.SIGKILL: -9}.get(number, 143)
        finally:
            process.kill()
    assert "odir-06" not in (folder / "calls").read_text()
    said = (folder / "out").read_text()
    assert "Go on with:" in (folder / "runs/demo-odir-05.log" if demo else folder / "out").read_text()
    assert number == signal.SIGKILL or "the same command goes on" in said


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc whether a process has ended")
def test_a_script_that_lost_its_parent_before_it_could_look_ends(checkout):
    """While it still imports torch, run_all.sh is killed: it ends once it has come so far."""
    folder, environment = checkout
    (folder / "waits.py").write_text(WAITS.replace("import errors", "time.sleep(1)\nimport errors"))
    (folder / "slow").write_text("train.py")
    process = subprocess.Popen(["bash", "run_all.sh", "3"], cwd=folder, env=environment)
    wait_until(lambda: "train.py" in (folder / "calls").read_text() if (folder / "calls").exists() else 0, 20)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(child), 4)
    assert not (folder / "runs").exists()
