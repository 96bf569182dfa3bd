"""Training runs as processes of their own, without paying the imports each time: forked from one that has made them.

Each has one thread, so that nothing depends on the machine, and its own working directory and output file.
"""

import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--weights", "none", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
EYES = ["--dataset", "odir", "--size", "32", "--batch", "8"]
ONE = ["--dataset", "aptos", "--model", "alexnet", "--size", "72", "--batch", "8"]  # the smallest network there is
_context = multiprocessing.get_context("forkserver")


def begin(target, out, *args):
    """Runs in the child: output to a file, one thread, then `target(*args)` as a script would end."""
    os.chdir(args[-1])
    stream = open(out, "a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    torch.set_num_threads(1)
    sys.exit(target(*args[:-1]))


def train_main(argv, environment):
    from matplotlib.figure import Figure

    import engine
    import figures
    import train
    from errors import guard
    figures.confusion = figures.samples = lambda *_: Figure(figsize=(1, 1))  # half of such a small run's time
    os.environ.update(environment)
    if "SLOW_STEPS" in environment:  # so that a test can hit the middle of an epoch
        seed_dropout = engine.seed_dropout

        def slowly(seed, epoch, step, device):
            print("step", epoch, step)
            time.sleep(float(environment["SLOW_STEPS"]))
            seed_dropout(seed, epoch, step, device)
        engine.seed_dropout = slowly
    if "LARGEST_FILE" in environment:  # bytes; the kernel refuses to write further
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["LARGEST_FILE"]), resource.RLIM_INFINITY))
    sys.argv = ["train.py", *argv]
    return guard(train.main, argv)


def start(argv, cwd, environment=None, out=None):
    """Start `train.py *argv` in `cwd` -> process; its output goes to cwd/out.txt."""
    cwd = Path(cwd)
    cwd.mkdir(parents=True, exist_ok=True)
    if "forked_server" not in os.environ:
        os.environ.update(forked_server="1", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        _context.set_forkserver_preload(["pytest", "forked", "train", "figures", "torch.utils.tensorboard", "sklearn.metrics", "openpyxl"])
    process = _context.Process(target=begin, args=(train_main, out or cwd / "out.txt", [str(a) for a in argv], environment or {}, cwd))
    process.start()
    return process


def train(argv, cwd, status=0, environment=None, timeout=120):
    """Run `train.py *argv` to its end, assert its exit status -> what it printed."""
    out = Path(cwd) / "out.txt"
    before = out.stat().st_size if out.exists() else 0
    process = start(argv, cwd, environment)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    text = out.read_text()[before:]
    assert process.exitcode == status, f"exit {process.exitcode}, expected {status}\n{text}"
    return text


def wait_for(cwd, pattern, process, after=0, timeout=60):
    """Wait until the output of a started process, in a file or in out.txt of a folder, matches `pattern`."""
    out, end = Path(cwd) / "out.txt" if Path(cwd).is_dir() else Path(cwd), time.time() + timeout
    while time.time() < end:
        if out.exists() and re.search(pattern, out.read_text()[after:]):
            return
        assert process.exitcode is None, out.read_text()[after:]
        time.sleep(0.01)
    raise AssertionError(f"no {pattern!r} within {timeout} s: {out.read_text() if out.exists() else ''}")


def start_together(argv, cwd, ranks=2, environment=None):
    """Start `ranks` processes as torchrun does -> (processes, their output files)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})} for rank in range(ranks)]
    outs = [Path(cwd) / f"rank{rank}.txt" for rank in range(ranks)]
    return [start(argv, cwd, place, out) for place, out in zip(places, outs, strict=True)], outs


def train_together(argv, cwd, ranks=2, status=0, timeout=120):
    """Run `ranks` processes to their end, assert their exit status -> what each printed."""
    processes, outs = start_together(argv, cwd, ranks)
    end = time.time() + timeout
    while any(p.exitcode is None for p in processes) and time.time() < end and all(p.exitcode in (None, status) for p in processes):
        time.sleep(0.02)
    for process in processes:
        if process.exitcode is None:  # the others have failed, or it hangs
            process.kill()
            process.join()
    texts = [out.read_text() for out in outs]
    assert [p.exitcode for p in processes] == [status] * ranks, "\n".join(texts)
    return texts


# ---------------------------------------------------------------- comparing runs

def load(path):
    return torch.load(path, weights_only=True)


def scalars(folder):
    """{tag: [(epoch, value)]} of all event files of a run, those of the final table of arguments left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if not tag.startswith("best/")}


def same(a, b, where=""):
    """Assert that two nested containers are equal to the bit (NaN equals NaN)."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}/{i}")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy(), equal_nan=True), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} and {b}"


def same_runs(one, other):
    """Assert that two run folders hold the same result: weights, optimiser, history, table, TensorBoard values."""
    for name in ("last.pt", "best.pt"):
        a, b = ({key: value for key, value in load(folder / name).items() if key not in ("args", "seconds")} for folder in (one, other))
        for state in (a, b):
            state.get("data", {}).pop("root", None)
        same(a, b, name)
    tables = [pd.read_excel(folder / "train_results.xlsx") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["epoch"].tolist() == list(range(len(tables[0])))
    values = [scalars(folder) for folder in (one, other)]
    assert values[0] and values[0].keys() == values[1].keys()
    for tag, points in values[0].items():
        assert [step for step, _ in points] == list(range(len(tables[0]))), tag
        assert np.array_equal(points, values[1][tag], equal_nan=True), tag
    assert (one / "split.csv").read_bytes() == (other / "split.csv").read_bytes()
    assert not list(one.glob(".*")) and not list(other.glob(".*"))


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
