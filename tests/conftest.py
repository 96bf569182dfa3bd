"""What several test files share, made once per session, by the scripts themselves:

    rendered(name)  the folder of a small rendered data set ("odir", "aptos", "dr", "retina", "mrnet")
    trained(name)   the run folder of a network trained on it for two epochs, small, on the CPU in float32; its cache
                    lies beside runs/, so `test.py` and the others reuse what is kept there
    script(name, *arguments, cwd=...)  runs a script as a user would -> CompletedProcess, its output as text;
                    with status=0 (or another) it also asserts the exit status and shows the output where it differs
    train_here(folder, *flags)  train.main in this process, working in `folder`, small, on the CPU in float32
                    -> the run's folder; flags given win over the small ones

Treat the folders as read-only: give the scripts an --out of your own, or copy the folder.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS = {  # data set -> (patients, pixels of the rendered pictures, flags of train.py)
    "odir": (40, 96, ["--size", "64", "--model", "v0"]),
    "aptos": (36, 96, ["--size", "64", "--batch", "8"]),
    "dr": (40, 96, ["--size", "72", "--crop", "64", "--batch", "8", "--freeze-epochs", "1"]),
    "retina": (60, 96, ["--size", "96", "--batch", "8"]),
    "mrnet": (8, 96, ["--size", "72", "--batch", "2"]),
}


def run_script(name, *arguments, cwd, status=None, timeout=300):
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment)
    assert status is None or done.returncode == status, f"{name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    base, made = tmp_path_factory.mktemp("rendered"), {}

    def folder(name):
        if name not in made:
            patients, size, _ = SETTINGS[name]
            run_script("render_data.py", base / name, "--dataset", name, "--patients", patients, "--size", size, cwd=base, status=0)
            made[name] = base / name
        return made[name]
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, rendered):
    base, made = tmp_path_factory.mktemp("trained"), {}

    def folder(name):
        if name not in made:
            flags = ["--weights", "none", "--epochs", 2, "--device", "cpu", "--precision", "fp32", "--workers", 0]
            run_script("train.py", "--dataset", name, "--data", rendered(name), "--name", name, "--runs", base / "runs", "--cache", base / "cache",
                       *flags, *SETTINGS[name][2], cwd=base, status=0)
            made[name] = base / "runs" / name
        return made[name]
    return folder


@pytest.fixture(scope="session")
def train_here():
    import signal

    import train

    def run(folder, *flags):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"run{len(list((folder / 'runs').glob('*')))}"
        before, handlers = os.getcwd(), [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        os.chdir(folder)
        try:
            status = train.main(["--weights", "none", "--epochs", "2", "--size", "32", "--device", "cpu", "--precision", "fp32",
                                 "--workers", "0", "--name", name, *map(str, flags)])
        finally:
            os.chdir(before)
            for number, handler in handlers:
                signal.signal(number, handler)
        assert not status, f"train.main ended with {status}"
        return folder / "runs" / name
    return run
