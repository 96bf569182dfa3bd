"""Scripts as processes of their own, without paying the imports each time: forked from one that has made
them. Each has one thread, so that nothing depends on the machine, its own working directory and output.
"""

import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--weights", "none", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
EYES = ["--dataset", "odir", "--size", "32", "--batch", "8", "--bn", "fitted"]
EYES += ["--trunk", "shufflenet_v2_x0_5"]
ONE = ["--dataset", "aptos", "--model", "alexnet", "--size", "72", "--batch", "8"]  # the smallest network
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
PRELOAD = ["pytest", "forked", "train", "records", "torch.utils.tensorboard", "sklearn.metrics"]
PRELOAD += ["openpyxl", "predictor"]
_context = multiprocessing.get_context("forkserver")


def begin(target, out, error, *args):
    """Runs in the child: output to files, one thread, then `target(*args)` as a script would end."""
    os.chdir(args[-1])
    sys.stdout = sys.stderr = open(out, "a", buffering=1)
    if error != out:
        sys.stderr = open(error, "a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(target(*args[:-1]))


def train_main(argv, environment):
    import train
    from errors import guard

    os.environ.update(environment)
    if "HOOK" in environment:  # a function of hooks.py changes the program before it runs
        import hooks

        getattr(hooks, environment["HOOK"])()
    if "LARGEST_FILE" in environment:  # bytes; the kernel refuses to write further
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["LARGEST_FILE"]), resource.RLIM_INFINITY))
    sys.argv = ["train.py", *argv]
    return guard(train.main, argv)


def script_main(argv, environment):
    """Runs in the child: a script from its first line to its last, as `python script.py` does."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def start(argv, cwd, environment=None, out=None):
    """Start `train.py *argv` in `cwd` -> process; its output goes to cwd/out.txt."""
    cwd = Path(cwd)
    cwd.mkdir(parents=True, exist_ok=True)
    out = out or cwd / "out.txt"
    return fork(begin, train_main, out, out, [str(a) for a in argv], environment or {}, cwd)


def fork(target, *args):
    """A process of the server, which is started with the first one."""
    if "forked_server" not in os.environ:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        os.environ.update(forked_server="1", OMP_NUM_THREADS="1", PYTHONPATH=path)
        _context.set_forkserver_preload(PRELOAD)
    process = _context.Process(target=target, args=args)
    process.start()
    return process


def script(name, *arguments, cwd, status=None, timeout=300):
    """Run a script as a user would -> CompletedProcess, its output as text; `status`: asserted if given.

    Not with --workers: a process that the server has forked waits for its own pool of processes for ever.
    """
    argv = [str(ROOT / name), *map(str, arguments)]
    ranks = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        process = fork(begin, script_main, out, error, argv, environment, Path(cwd))
        join(process, timeout)
        done = subprocess.CompletedProcess(argv, process.exitcode, out.read_text(), error.read_text())
    said = f"{name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert status is None or done.returncode == status, said
    return done


def join(process, timeout):
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()


def train(argv, cwd, status=0, environment=None, timeout=120):
    """Run `train.py *argv` to its end, assert its exit status -> what it printed."""
    out = Path(cwd) / "out.txt"
    before = out.stat().st_size if out.exists() else 0
    process = start(argv, cwd, environment)
    join(process, timeout)
    text = out.read_text()[before:]
    assert process.exitcode == status, f"exit {process.exitcode}, expected {status}\n{text}"
    return text


def wait_for(cwd, pattern, process, after=0, timeout=60):
    """Wait until what a started process printed, in a file or out.txt of a folder, matches `pattern`."""
    out, end = Path(cwd) / "out.txt" if Path(cwd).is_dir() else Path(cwd), time.time() + timeout
    while time.time() < end:
        if out.exists() and re.search(pattern, out.read_text()[after:]):
            return
        assert process.exitcode is None, out.read_text()[after:]
        time.sleep(0.01)
    raise AssertionError(f"no {pattern!r} within {timeout} s: {out.read_text() if out.exists() else ''}")


def start_together(argv, cwd, ranks=2, environment=None, machines=1, own=()):
    """Start `ranks` processes as torchrun does, on one machine or each on its own -> (processes, outputs).

    `own`: what each rank's command line and environment have beside the common ones: [(flags, {...})].
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cwd, processes, outs = Path(cwd), [], []
    for rank in range(ranks):
        flags, more = own[rank] if own else ([], {})
        place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"LOCAL_RANK": rank if machines == 1 else 0}
        place |= {"LOCAL_WORLD_SIZE": ranks if machines == 1 else 1}
        place = {key: str(value) for key, value in place.items()} | (environment or {}) | more
        outs.append(cwd / f"rank{rank}.txt")
        processes.append(start([*argv, *flags], cwd, place, outs[-1]))
    return processes, outs


def train_together(argv, cwd, ranks=2, status=0, timeout=120, **kwargs):
    """Run `ranks` processes to their end, assert their exit status -> what each printed."""
    processes, outs = start_together(argv, cwd, ranks, **kwargs)
    end = time.time() + timeout
    for process in processes:
        join(process, max(0, end - time.time()))
    texts = [out.read_text() for out in outs]
    assert [p.exitcode for p in processes] == [status] * ranks, "\n".join(texts)
    return texts


# ---------------------------------------------------------------- comparing runs


def load(path):
    return torch.load(path, weights_only=True)


def scalars(folder):
    """{tag: [(epoch, value)]} of all event files of a run, without the final table of arguments."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, found = EventAccumulator(str(folder), size_guidance={"scalars": 0}), {}
    events.Reload()
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("best/"):
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


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
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert np.array_equal(a.numpy(), b.numpy(), equal_nan=True), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} and {b}"


def content(file):
    """A checkpoint without what may differ between a run and the same run in pieces."""
    return {key: value for key, value in load(file).items() if key not in ("args", "seconds")}


def same_runs(one, other):
    """Assert that two run folders hold the same result: weights, optimiser, history, table, TensorBoard."""
    for name in ("last.pt", "best.pt"):
        same(content(one / name), content(other / name), name)
    tables = [pd.read_excel(folder / "train_results.xlsx") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    epochs = list(range(len(tables[0])))
    assert tables[0]["epoch"].tolist() == epochs
    values = [scalars(folder) for folder in (one, other)]
    assert values[0] and values[0].keys() == values[1].keys()
    for tag, points in values[0].items():
        assert [step for step, _ in points] == epochs, tag
        assert np.array_equal(points, values[1][tag], equal_nan=True), tag
    assert (one / "split.csv").read_bytes() == (other / "split.csv").read_bytes()
    for folder in (one, other):
        assert [file.name for file in folder.glob(".*")] in ([], [".lock"])
