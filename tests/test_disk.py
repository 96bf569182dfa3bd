"""Full and read-only disks, memory that runs out, a loss that is not finite: a clear message, and nothing is lost."""

import errno
import json
import os
import platform
import re
import subprocess
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pandas as pd
import pytest
import torch
from forked import ONE, SMALL, load, same_runs, train

import cache
import checkpoint
from errors import InputError, guard

FROZEN = [*SMALL, *ONE, "--no-fine-tune", "--optimizer", "sgd", "--lr", "0.001", "--name", "x", "--epochs"]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith("events")}


@pytest.mark.parametrize("kind", [["--no-fine-tune"], ["--fine-tune"]], ids=["frozen", "fine-tuned"])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(kind, tmp_path, rendered):
    """The limit stands for a full disk: what is larger cannot be written to its end."""
    given = [*SMALL, *ONE, *kind, "--optimizer", "sgd", "--lr", "0.001", "--name", "x", "--data", rendered("aptos"), "--cache", tmp_path / "cache"]
    train([*given, "--epochs", "3"], tmp_path / "whole")
    train([*given, "--epochs", "1"], tmp_path / "full")
    folder = tmp_path / "full/runs/x"
    before = contents(folder)
    said = train(["--resume", "runs/x", "--epochs", "3"], tmp_path / "full", 2, {"LARGEST_FILE": "1000000"})
    assert re.search(r"error: cannot write .*File too large.*Nothing that was there before is lost", said) and "Traceback" not in said
    after = contents(folder)
    assert after["best.pt"] == before["best.pt"] and after.keys() == before.keys()
    assert kind == ["--no-fine-tune"] or after["last.pt"] == before["last.pt"]
    checkpoint.load_checkpoint(folder / "last.pt", "last")
    train(["--resume", "runs/x", "--epochs", "3"], tmp_path / "full")
    same_runs(tmp_path / "whole/runs/x", folder)


def test_a_cache_that_cannot_be_written(tmp_path, rendered):
    given = [*FROZEN, "1", "--data", rendered("aptos")]
    said = train(given, tmp_path / "a", 2, {"LARGEST_FILE": "100000"})
    assert "cache cannot be written (File too large)" in said and "--cache" in said
    assert not list((tmp_path / "a/cache").iterdir()) and not (tmp_path / "a/runs").exists()
    train(given, tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in train([*given, "--cache", tmp_path / "file/cache"], tmp_path / "b", 2)
    assert "--runs" in train([*given, "--runs", tmp_path / "file/runs"], tmp_path / "b", 2)
    assert "--runs" in train([*given, "--runs", tmp_path / "file"], tmp_path / "b", 2)


WRITES = {
    "best.pt": lambda folder: checkpoint.save_checkpoint(folder / "best.pt", "best", model={"a": torch.ones(9)}),
    "run.json": lambda folder: checkpoint.save_json(folder / "run.json", {"a": 1}),
    "train_results.xlsx": lambda folder: checkpoint.write_sheet(folder / "train_results.xlsx", pd.DataFrame({"a": [1]})),
    "kept array": lambda folder: cache.Kept(folder, "kept", "k", (3,), np.float32, lambda extra: [np.zeros(3)]).write(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_every_writer_says_what_is_wrong_and_leaves_nothing_behind(name, number, tmp_path, monkeypatch, capsys):
    WRITES[name](tmp_path)
    before = contents(tmp_path)

    def full(path, mode="r"):
        return Full(open(path, mode), number) if "w" in mode else open(path, mode)
    monkeypatch.setattr(cache, "open", full, raising=False)
    assert guard(WRITES[name], tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No room" in said and "Traceback" not in said
    assert contents(tmp_path) == before


class Full:
    """A file on a full or read-only disk."""

    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, _):
        raise OSError(self.number, "No room")


def test_a_read_only_runs_folder(tmp_path, monkeypatch, capsys):
    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))
    monkeypatch.setattr(checkpoint.Path, "mkdir", read_only)
    assert guard(checkpoint.new_run_folder, tmp_path / "runs", None, "odir-v0") == 2
    assert "--runs" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_is_never_taken_twice(tmp_path):
    first, second = (checkpoint.new_run_folder(tmp_path / "runs", None, "odir-v0") for _ in range(2))
    assert (first.name, second.name) == ("odir-v0-001", "odir-v0-002")
    with pytest.raises(InputError, match="never overwritten"):
        checkpoint.new_run_folder(tmp_path / "runs", "odir-v0-001", "")
    with pytest.raises(InputError, match="plain name"):
        checkpoint.new_run_folder(tmp_path / "runs", "../x", "")


def raiser(error):
    def main():
        raise error
    return main


def allocate():
    torch.empty(1 << 50)


@pytest.mark.parametrize("main", [allocate, raiser(MemoryError()), raiser(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
                                  raiser(BrokenProcessPool("A process was terminated abruptly")),
                                  raiser(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))])
def test_memory_that_runs_out(main, capsys):
    assert guard(main) == 1
    said = capsys.readouterr().err
    assert "memory" in said and ("--batch" in said or "--workers" in said) and len(said.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(errno.EIO, "Input/output error"),
    KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        guard(raiser(error))


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_epoch_stays(tmp_path, rendered):
    given = [*FROZEN, "1", "--data", rendered("aptos")]
    train(given, tmp_path)
    before = load(tmp_path / "runs/x/best.pt")
    said = train(["--resume", "runs/x", "--epochs", "9", "--lr", "1e37"], tmp_path, 1)
    assert re.search(r"error: the loss is (nan|inf) in epoch \d, step \d: lower --lr", said) and "Traceback" not in said
    assert load(tmp_path / "runs/x/last.pt")["epoch"] >= 1 and load(tmp_path / "runs/x/best.pt")["epoch"] == before["epoch"]
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["status"] == "running"


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = tmp_path / f".last.pt.{platform.node()}.{ended.pid}.tmp"
    living = tmp_path / f".last.pt.{platform.node()}.{os.getpid()}.tmp"
    elsewhere = tmp_path / f".last.pt.another-machine.{ended.pid}.tmp"
    for file in (dead, living, elsewhere):
        file.write_text("")
    cache.remove_leftovers(tmp_path)
    assert not dead.exists() and living.exists() and elsewhere.exists()
