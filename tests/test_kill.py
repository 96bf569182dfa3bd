"""A training process killed (SIGKILL) at twenty random moments and resumed ends as if nothing had been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import EYES, ONE, ROOT, SIGNALS, SMALL, same_runs, start, train, wait_for

from checkpoint import load_checkpoint

KILLS = 20
RUNS = {
    "frozen": (17, [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--epochs", "250", "--patience", "250"]),
    "fine-tuned": (3, [*ONE, "--fine-tune", "--optimizer", "sgd", "--lr", "0.001", "--epochs", "14"]),
}
assert sum(kills for kills, _ in RUNS.values()) == KILLS


@pytest.mark.parametrize("case", RUNS)
def test_killed_at_random_moments(case, tmp_path, rendered):
    kills, flags = RUNS[case]
    flags = [*SMALL, *flags, "--data", rendered("aptos"), "--name", "x", "--cache", tmp_path / "cache"]
    train(flags, tmp_path / "whole")
    rng, cwd, epochs = random.Random(0), tmp_path / "killed", []
    folder = cwd / "runs/x"
    for number in range(kills):
        resumed = (folder / "last.pt").exists()
        given = ["--resume", "runs/x"] if resumed else flags
        process = start(given, cwd, {"HOOK": "save_every_epoch"})  # else a slow disk saves the first alone
        said = (cwd / "out.txt").stat().st_size if number else 0
        # A third at any moment of the start, the others while epochs are trained and saved.
        if number % 3:
            wait_for(cwd, r"(epoch \d.*\s+){2}", process, said)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 0.5))
        assert process.exitcode is None, "the run ended before it was killed: give it more epochs"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (folder / "last.pt").exists():
            epochs.append(load_checkpoint(folder / "last.pt", "last")["epoch"])
            if (folder / "best.pt").exists():
                load_checkpoint(folder / "best.pt")
    assert epochs == sorted(epochs) and epochs[-1] > 0
    train(["--resume", "runs/x"] if (folder / "last.pt").exists() else flags, cwd)
    same_runs(tmp_path / "whole/runs/x", folder)
    print(f"{case}: {kills} kills after the epochs {epochs}")


# ---------------------------------------------------------------- workers and scripts end with their parent


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
    except FileNotFoundError:
        return False


def wait_until(condition, seconds, what):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"{what} after {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_pictures_are_decoded_leaves_no_workers(number, tmp_path, rendered):
    given = [*SMALL, *EYES, "--data", rendered("odir"), "--workers", "2"]
    given += ["--val-fraction", "0.1"]  # 72 pictures in training: 64 are decoded without a pool
    process = start(given, tmp_path, {"HOOK": "slow_decode"})
    wait_for(tmp_path, r"decoding in \d+[^$]*decoding in \d+", process)
    workers = {int(pid) for pid in re.findall(r"decoding in (\d+)", (tmp_path / "out.txt").read_text())}
    assert len(workers) == 2 and process.pid not in workers
    os.kill(process.pid, number)
    process.join(2)
    assert process.exitcode == {**SIGNALS, signal.SIGKILL: -9}[number]
    wait_until(lambda: not any(map(is_alive, workers)), 2, "the workers are there")
    said = (tmp_path / "out.txt").read_text()
    assert number == signal.SIGKILL or "Go on with:\n    python train.py" in said, said
    assert "Traceback" not in said and not (tmp_path / "runs").exists()


WAITING = """
import os, sys, time
sys.path.insert(0, {root!r})
import errors

def main():
    print(os.getpid(), flush=True)
    time.sleep(60)

sys.exit(errors.guard(main))
"""


def test_a_script_of_run_all_ends_with_it(tmp_path):
    """A killed run_all.sh cannot tell its training, which therefore looks after its parent."""
    (tmp_path / "waits.py").write_text(WAITING.format(root=str(ROOT)))
    command = f"export END_WITH_PARENT=$$; {sys.executable} waits.py > out.txt 2>&1 & wait"
    parent = subprocess.Popen(["bash", "-c", command], cwd=tmp_path)
    out = tmp_path / "out.txt"
    wait_until(lambda: out.exists() and out.read_text().strip(), 20, "not started")
    script = int(out.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(script), 2, "the script is there")
    assert "interrupted. Go on with:\n    python waits.py" in out.read_text()


def test_a_terminal_that_lacks_a_character_shows_a_question_mark(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import errors\n"
    code += "sys.exit(errors.guard(print, 'a \\u2013 b \\u2713'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ? b ?\n", b"")
