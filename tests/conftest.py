"""What several test files share, made once for all workers of a session, by the scripts themselves:

    rendered(name)  the folder of a small rendered data set ("odir", "aptos", "dr", "retina", "mrnet")
    trained(name)   the run folder of a network trained on it for two epochs, small, on the CPU in float32;
                    its cache lies beside runs/, so `test.py` and the others reuse what is kept there
    script(name, *arguments, cwd=...)  runs a script as a user would -> CompletedProcess, its output as text;
                    with status=0 (or another) it also asserts the exit status and shows the output
    train_here(folder, *flags)  train.main in this process, working in `folder`, small, on the CPU in float32
                    -> the run's folder; flags given win over the small ones

Treat the folders as read-only: give the scripts an --out of your own, or copy the folder.
"""

import contextlib
import fcntl
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS = {  # data set -> (patients, pixels of the rendered pictures, flags of train.py)
    "odir": (40, 96, ["--size", "64", "--model", "v0", "--trunk", "shufflenet_v2_x0_5", "--bn", "fitted"]),
    "aptos": (36, 96, ["--size", "64", "--batch", "8", "--model", "mobilenet_v3_small"]),
    "dr": (40, 96, ["--size", "72", "--crop", "64", "--batch", "8", "--freeze-epochs", "1"]),
    "retina": (60, 96, ["--size", "96", "--batch", "8"]),
    "mrnet": (8, 96, ["--size", "72", "--batch", "2"]),
}
SMALL = ["--weights", "none", "--epochs", "2", "--size", "32", "--device", "cpu"]
SMALL += ["--precision", "fp32", "--workers", "0"]

# The files that take longest come first, so that no worker is left alone with one at the end.
LONGEST = "readme test report resume distributed trunks predictor scripts predict kill models"


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONGEST.split()]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(scope="session")
def script():
    import forked  # here, because it imports torch

    return forked.script


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(place, make): `place`, a path in a folder of all workers, after the first of them has called `make`."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    common /= "common"
    common.mkdir(exist_ok=True)

    def made(place, make):
        with open(common / f"{place.replace('/', '-')}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock.fileno()).st_size:
                make(common)
                lock.write("made")
        return common / place

    return made


@pytest.fixture(scope="session")
def rendered(once, script):
    def folder(name):
        def make(common):
            patients, size, _ = SETTINGS[name]
            flags = ["--dataset", name, "--patients", patients, "--size", size]
            script("render_data.py", common / "rendered" / name, *flags, cwd=common, status=0)

        return once(f"rendered/{name}", make)

    return folder


@pytest.fixture(scope="session")
def trained(once, rendered, train_here):
    def folder(name):
        def make(common):
            flags = ["--dataset", name, "--data", rendered(name), "--name", name]
            flags += ["--runs", common / "runs", "--cache", common / "cache", *SETTINGS[name][2]]
            train_here(common, *flags)

        return once(f"runs/{name}", make)

    return folder


@pytest.fixture(scope="session")
def train_here():
    import train

    def run(folder, *flags):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flags = list(map(str, flags))
        if "--resume" in flags:
            given, home = flags, folder / value_of(flags, "--resume")
        else:
            name = value_of(flags, "--name", f"run{len(list((folder / 'runs').glob('*')))}")
            given, home = [*SMALL, "--name", name, *flags], folder / value_of(flags, "--runs", "runs") / name
        with contextlib.chdir(folder):
            status = train.main(given)
        assert not status, f"train.main ended with {status}"
        return home

    return run


def value_of(flags, name, default=None):
    return flags[flags.index(name) + 1] if name in flags else default
