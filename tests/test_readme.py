"""Every command in the README's bash blocks runs, typed as it stands or in the small form named here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a command is shortened to; None: as it stands. A command that is not in this table fails the test.
SHORT = {
    "bash run_all.sh --demo": "bash run_all.sh --demo 3",
    "bash tests/run.sh": "bash tests/run.sh -k test_metrics --collect-only",
    "python train.py --lr 0.05 --scheduler linear --model v0": None,
    "python test.py --ckpt best.pt": None,
    "bash run_all.sh": None,  # no data set is there: every line says so, and the table is written
    "python predict.py --ckpt best.pt LEFT.jpg RIGHT.jpg": None,
    "python heatmap.py --ckpt best.pt --split val --per-label 2": "python heatmap.py --ckpt best.pt --split val --per-label 1",
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with a small rendered set where the literal commands look for one."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.iterdir():
        if file.suffix in (".py", ".sh", ".csv", ".html", ".txt", ".toml", ".md"):
            shutil.copy(file, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    render = [sys.executable, "render_data.py", "data/rendered/odir", "--dataset", "odir", "--patients", "24", "--size", "96"]
    subprocess.run(render, cwd=folder, check=True)
    for side in ("left", "right"):
        picture = next((folder / "data/rendered/odir/images").glob(f"*_{side}.jpg"))
        shutil.copy(picture, folder / f"{side.upper()}.jpg")
    return folder


def test_every_command_of_the_readme_runs(checkout):
    assert len(commands()) >= 7
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands():
        assert command in SHORT, f"the README has a command that no test runs: {command}"
        done = subprocess.run(SHORT[command] or command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for file in ("best.pt", "prediction.png", "runs/results.csv", "runs/report.html", "runs/odir-v0-001/probs.xlsx", "runs/demo-odir-03/run.json"):
        assert (checkout / file).stat().st_size > 0, file


def test_the_readme_holds_every_flag_with_its_default():
    import train
    text = (ROOT / "README.md").read_text()
    for action in train.get_args_parser()._actions:
        if action.dest != "help":
            flag, default = action.option_strings[0], "" if action.default is None else f"{action.default}"
            assert f"| `{flag}` | {default} |" in text, f"the README's flag table is not that of train.py: {flag}"
