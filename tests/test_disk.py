"""Full and read-only disks, memory that runs out, a loss that is not finite: a message, and nothing lost."""

import errno
import json
import os
import platform
import re
import subprocess
from argparse import Namespace
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import openpyxl
import pandas as pd
import pytest
import torch
from forked import ONE, SMALL, load, same, same_runs, train

import cache
import checkpoint
from errors import InputError, guard

KIND = {"frozen": ["--no-fine-tune"], "fine-tuned": ["--fine-tune"]}
BEGIN = [*SMALL, *ONE, "--optimizer", "sgd", "--lr", "0.001", "--name", "x"]


def contents(folder):
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return {file.name: file.read_bytes() for file in files if not file.name.startswith("events")}


@pytest.mark.parametrize("kind", KIND)
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(kind, tmp_path, rendered):
    """The limit stands for a full disk: what is larger cannot be written to its end."""
    given = [*BEGIN, *KIND[kind], "--data", rendered("aptos"), "--cache", tmp_path / "cache"]
    train([*given, "--epochs", "3"], tmp_path / "whole")
    train([*given, "--epochs", "1"], tmp_path / "full")
    folder, limit = tmp_path / "full/runs/x", {"LARGEST_FILE": "1000000"}
    before = contents(folder)
    said = train(["--resume", "runs/x", "--epochs", "3"], tmp_path / "full", 2, limit)
    words = r"error: cannot write .*File too large.*What was there before is whole.*--resume"
    assert re.search(words, said) and "Traceback" not in said
    after = contents(folder)
    assert after["best.pt"] == before["best.pt"] and after.keys() == before.keys()
    assert kind == "frozen" or after["last.pt"] == before["last.pt"]
    checkpoint.load_checkpoint(folder / "last.pt", "last")
    train(["--resume", "runs/x", "--epochs", "3"], tmp_path / "full")
    same_runs(tmp_path / "whole/runs/x", folder)


def test_a_cache_or_a_folder_of_runs_that_cannot_be_written(tmp_path, rendered):
    given = [*BEGIN, "--no-fine-tune", "--epochs", "1", "--data", rendered("aptos")]
    said = train(given, tmp_path / "a", 2, {"LARGEST_FILE": "100000"})
    assert "cache cannot be written (File too large)" in said and "--cache" in said
    assert not list((tmp_path / "a/cache").iterdir()) and not (tmp_path / "a/runs").exists()
    train(given, tmp_path / "a")
    (tmp_path / "file").write_text("")
    said = train([*given, "--cache", tmp_path / "file/cache"], tmp_path / "b", 2)
    assert "cannot write" in said and "Not a directory" in said and "Traceback" not in said
    said = train([*given, "--runs", tmp_path / "file/runs"], tmp_path / "b", 2)
    assert f"cannot write {tmp_path / 'file/runs'}: Not a directory" in said and "Traceback" not in said


def test_a_working_folder_that_cannot_be_written_costs_no_scores(tmp_path, train_here, rendered, capsys):
    """The copy of best.pt is refused: the run is whole, its scores are printed, and it ended well."""
    (tmp_path / "best.pt").mkdir()  # what cannot be replaced stands for what cannot be written
    run = train_here(tmp_path, *ONE, "--no-fine-tune", "--data", rendered("aptos"), "--epochs", 1)
    said = capsys.readouterr().out
    assert "best epoch 0 of 1" in said and "note: best.pt could not be copied into" in said
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert not list(tmp_path.glob(".*"))


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def save_best(folder):
    checkpoint.save_checkpoint(folder / "best.pt", "best", model={"a": torch.ones(9)})


def save_json(folder):
    checkpoint.save_json(folder / "run.json", {"a": 1})


def save_sheet(folder):
    checkpoint.write_sheet(folder / "train_results.xlsx", pd.DataFrame({"a": [1]}))


def keep_array(folder):
    cache.kept_array(
        folder / f"{len(list(folder.iterdir()))}.npy", (3,), np.float32, lambda array: array.fill(1)
    )


REFUSED = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT]


@pytest.mark.parametrize("write", [save_best, save_json, save_sheet, keep_array])
@pytest.mark.parametrize("number", REFUSED, ids=errno.errorcode.get)
def test_every_writer_says_what_is_wrong_and_leaves_nothing_behind(
    write, number, tmp_path, monkeypatch, capsys
):
    write(tmp_path)
    before = contents(tmp_path)

    def full(path, mode="r", **kwargs):
        return Full(open(path, mode, **kwargs), number) if "w" in mode else open(path, mode, **kwargs)

    def no_space(*_):
        raise OSError(number, "No room")

    monkeypatch.setattr(cache, "open", full, raising=False)
    monkeypatch.setattr(cache.os, "posix_fallocate", no_space)
    assert guard(write, tmp_path) == 2
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


def test_a_kept_array_that_is_cut_short_or_another_is_made_again(tmp_path):
    path, fills = tmp_path / "a.npy", []

    def fill(array):
        fills.append(1)
        array[:] = np.arange(6).reshape(2, 3)

    for damage in (None, lambda data: data[:-1], lambda data: b"", lambda data: b"x" * len(data)):
        if damage:
            path.write_bytes(damage(path.read_bytes()))
        found = cache.kept_array(path, (2, 3), np.float32, fill)
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]] and found.dtype == np.float32
        cache.kept_array(path, (2, 3), np.float32, fill)  # found, not filled
    assert len(fills) == 4
    cache.kept_array(path, (2, 3), np.float64, fill)  # another type is another array
    assert len(fills) == 5 and [file.name for file in tmp_path.iterdir()] == ["a.npy"]
    found[0, 0] = 7  # what the caller writes stays with the caller
    assert cache.kept_array(path, (2, 3), np.float64, fill)[0, 0] == 0


def run_of(runs, name=None):
    return Namespace(runs=str(runs), name=name, dataset="odir", model="v0", resume=None)


def test_a_read_only_runs_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.Path, "mkdir", refuse)
    assert guard(checkpoint.new_run_folder, run_of(tmp_path / "runs")) == 2
    assert "error: cannot write " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_is_never_taken_twice(tmp_path):
    first, second = (checkpoint.new_run_folder(run_of(tmp_path / "runs")) for _ in range(2))
    assert (first.name, second.name) == ("odir-v0-001", "odir-v0-002")
    for kept in ("last.pt", "best.pt", "notes.txt"):
        (first / kept).write_text("")
        with pytest.raises(InputError, match="never overwritten"):
            checkpoint.new_run_folder(run_of(tmp_path / "runs", "odir-v0-001"))
        (first / kept).unlink()
    with pytest.raises(InputError, match="plain name"):
        checkpoint.new_run_folder(run_of(tmp_path / "runs", "../x"))
    # What a run left that was stopped before its first checkpoint is no obstacle.
    for begun in ("run.json", "split.csv", ".last.pt.here.1.tmp"):
        (first / begun).write_text("")
    assert checkpoint.new_run_folder(run_of(tmp_path / "runs", "odir-v0-001")) == first


def test_text_in_a_sheet_is_never_a_formula(tmp_path):
    frame = pd.DataFrame({"ID": ["=1+1", "+2", "-3", "@x", "plain"], "=A1": [0.5, 1.0, np.nan, 2.0, 3.0]})
    checkpoint.write_sheet(tmp_path / "a.xlsx", frame)
    cells = [cell for row in openpyxl.load_workbook(tmp_path / "a.xlsx").active for cell in row]
    assert "f" not in {cell.data_type for cell in cells}
    pd.testing.assert_frame_equal(pd.read_excel(tmp_path / "a.xlsx"), frame)


def raiser(error):
    def main():
        raise error

    return main


def allocate():
    torch.empty(1 << 50)


MEMORY = [
    allocate,
    raiser(MemoryError()),
    raiser(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    raiser(BrokenProcessPool("A process was terminated abruptly")),
    raiser(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")),
]


@pytest.mark.parametrize("main", MEMORY)
def test_memory_that_runs_out(main, capsys):
    assert guard(main) == 1
    said = capsys.readouterr().err
    assert "memory" in said or "worker" in said
    assert ("--batch" in said or "--workers" in said) and len(said.splitlines()) == 1


BUGS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")]


@pytest.mark.parametrize("error", [*BUGS, OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        guard(raiser(error))


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_epoch_stays(tmp_path, rendered):
    train([*BEGIN, "--no-fine-tune", "--epochs", "1", "--data", rendered("aptos")], tmp_path)
    before = load(tmp_path / "runs/x/best.pt")
    said = train(["--resume", "runs/x", "--epochs", "9", "--lr", "1e37"], tmp_path, 1)
    assert re.search(r"error: the loss is (nan|inf) in epoch \d, step \d: lower --lr", said)
    assert "Traceback" not in said
    last, best = load(tmp_path / "runs/x/last.pt"), load(tmp_path / "runs/x/best.pt")
    assert last["epoch"] >= 1 and best["epoch"] == before["epoch"]
    same(best["model"], before["model"])
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["status"] == "interrupted"


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
