"""A training process killed (SIGKILL) at twenty random moments, resumed each time, ends as if nothing had happened."""

import os
import random
import shutil
import signal
import time

import pytest
from forked import ONE, SMALL, same_runs, start, train, wait_for

from checkpoint import load_checkpoint

KILLS = 20
RUNS = {
    "frozen": (17, [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--epochs", "400", "--patience", "400"]),
    "fine-tuned": (3, [*ONE, "--fine-tune", "--optimizer", "sgd", "--lr", "0.001", "--epochs", "8"]),
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
        process = start(["--resume", "runs/x"] if resumed else flags, cwd)
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
        elif folder.exists():  # nothing was trained yet: begun again
            shutil.rmtree(folder)
    assert epochs == sorted(epochs) and epochs[-1] > 0
    train(["--resume", "runs/x"] if (folder / "last.pt").exists() else flags, cwd)
    same_runs(tmp_path / "whole/runs/x", folder)
    print(f"{case}: {kills} kills after the epochs {epochs}")
