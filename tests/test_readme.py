"""README, docs/ and the notebooks do what they say: every command and every Python block of them runs.

A command runs as it stands, or in the small form that SHORT names. `python script.py` runs in one process for
all, in which the imports are paid once; the commands of the README's start run as a shell runs them.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--data data/small --size 32 --epochs 2"
LITE0 = f"python train.py --trunk efficientnet-lite0 {SMALL}"
IDRID = "python train.py --dataset aptos --data data/idrid --model efficientnet-lite0 --duplicates keep"
# A command -> what it is shortened to; None: as it stands. One that is not here fails the test.
SHORT = {
    # README
    "bash run_all.sh --demo": "bash run_all.sh --demo 3 --epochs 1",
    "bash tests/run.sh": "bash tests/run.sh -k test_metrics --collect-only",
    "python train.py --lr 0.05 --scheduler linear --model v0": None,
    "python test.py --ckpt best.pt": None,
    "python train.py --trunk efficientnet-lite0 --name first": f"{LITE0} --name first",
    "python test.py --ckpt runs/first": None,
    "python train.py --trunk efficientnet-lite0 --weighted-loss --lr 0.01 --name second": (
        f"{LITE0} --weighted-loss --lr 0.01 --name second"
    ),
    "python test.py --ckpt runs/second": None,
    "python report.py --compare runs/first runs/second": None,
    "python predict.py --ckpt best.pt LEFT.jpg RIGHT.jpg": None,
    "python predict.py --ckpt best.pt FOLDER --out answers": None,
    "python heatmap.py --ckpt runs/first --split val --per-label 2": (
        "python heatmap.py --ckpt runs/first --split val --per-label 1"
    ),
    "python train.py --dataset clinic --name clinic": "python train.py --dataset clinic --name clinic --size 32 --epochs 2",
    "python test.py --ckpt runs/clinic": None,
    "python train.py --trunk tiny --weights none --fine-tune": f"python train.py --trunk tiny --weights none --fine-tune {SMALL}",
    "python train.py --trunk mobilenet_v3_small --weights none --fine-tune --lr 0.01": (
        f"python train.py --trunk mobilenet_v3_small --weights none --fine-tune --lr 0.01 {SMALL}"
    ),
    # docs/data.md
    "python render_data.py data/rendered/mrnet --dataset mrnet --patients 24 --size 96": (
        "python render_data.py data/rendered/mrnet --dataset mrnet --patients 8 --size 64"
    ),
    "python preprocess.py data/odir/images data/odir-224 --size 224": (
        "python preprocess.py data/small/images data/small-224 --size 224"
    ),
    "python train.py --resume runs/first --epochs 120": "python train.py --resume runs/first --epochs 3",
    "python challenge_eval.py runs/first/ground_truth.xlsx runs/first/submission.csv": None,
    "python report.py": None,
    "tensorboard --logdir runs": "python -m tensorboard.main --version",  # without an end it would serve
    # docs/hardware.md
    "torchrun --nproc-per-node 2 train.py --trunk efficientnet-lite0 --epochs 3": (
        "python -m torch.distributed.run --nproc-per-node 2 train.py --trunk efficientnet-lite0 --epochs 1 "
        "--data data/small --size 32"
    ),
    # docs/results.md
    f"{IDRID} --name idrid": f"{IDRID} --size 32 --epochs 1 --name idrid",
    "python test.py --ckpt runs/idrid --split test": None,
}
# One process does all pieces of work, a script's main or a block of Python, each with its output in a file.
RUNNER = """
import contextlib, importlib, json, pathlib, sys, traceback
from errors import guard

answers = sys.stdout
for line in sys.stdin:
    kind, text = json.loads(line)
    status = 1
    with open("out.txt", "w", buffering=1) as out:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                if kind == "script":
                    sys.argv = text
                    status = guard(importlib.import_module(text[0].removesuffix(".py")).main)
                else:
                    exec(compile(text, kind, "exec"), {"__name__": kind})
                    status = 0
            except (Exception, SystemExit):
                traceback.print_exc()
    print("status", status, file=answers, flush=True)
"""


def small_form(command):
    """What is run of a command; None for one that nobody thought of."""
    if command.startswith("bash run_all.sh") and not {"--demo", "--data"} & set(command.split()):
        return command  # there is no data set: it checks the names, says what is missing, writes the table
    return (SHORT[command] or command) if command in SHORT else None


def commands(page):
    """The commands of a page's bash blocks, without their comments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        lines = [line.split("#")[0].strip() for line in block.splitlines()]
        found += [line for line in lines if line]
    return found


def python_blocks(page):
    """[(the sentence before, the code)] of a page's Python blocks."""
    return re.findall(r"([^\n]*)\n\n```python\n(.*?)```", page.read_text(), re.S)


def file_of(sentence):
    """(file, function) that a sentence says to write a block into: at its end where there is no function."""
    end = re.search(r"[Aa]t the end of `(\w+\.py)`", sentence)
    top = re.search(r"at the top of `(\w+)` in `(\w+\.py)`", sentence)
    if end:
        return end[1], None
    return (top[2], top[1]) if top else (None, None)


def cells(name):
    notebook = json.loads((ROOT / name).read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def render(folder, place, *flags):
    command = [sys.executable, "render_data.py", place, *flags]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository as the README's recipes change it, with small rendered data where it looks."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.iterdir():
        if file.suffix in (".py", ".sh", ".csv", ".html", ".txt", ".toml", ".md", ".ipynb"):
            shutil.copy(file, folder)
    (folder / "tests").mkdir()
    for name in ("run.sh", "conftest.py", "test_metrics.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    add_recipes(folder)
    render(folder, "data/rendered/odir", "--dataset", "odir", "--patients", "16", "--size", "96")
    render(folder, "data/small", "--dataset", "odir", "--patients", "64", "--size", "64")
    shutil.copytree(folder / "data/small", folder / "data/demo/odir")
    render(folder, "data/idrid", "--dataset", "aptos", "--patients", "60", "--size", "64")
    eyes = sorted((folder / "data/rendered/odir/images").glob("*_left.jpg"))
    (folder / "FOLDER").mkdir()
    for left in eyes[:3]:
        right = left.with_name(left.name.replace("left", "right"))
        shutil.copy(left, folder / "LEFT.jpg")
        shutil.copy(right, folder / "RIGHT.jpg")
        shutil.copy(left, folder / "FOLDER")
        shutil.copy(right, folder / "FOLDER")
    clinic = folder / "data/clinic"
    shutil.copytree(folder / "data/idrid/train_images", clinic / "photos")
    sheet = pd.read_csv(folder / "data/idrid/train.csv")
    grades = pd.DataFrame({"photo": sheet["id_code"], "grade": (sheet["diagnosis"] + 1) // 2})
    grades.to_csv(clinic / "grades.csv", index=False)
    return folder


def add_recipes(folder):
    """What the README says to write into a file, written there; every other block is left to be run."""
    for sentence, code in python_blocks(ROOT / "README.md"):
        name, function = file_of(sentence)
        if not name:
            continue
        text = (folder / name).read_text()
        place, gap = len(text), "\n\n"
        if function:  # below its docstring
            gap = ""
            place = re.search(rf'def {function}\(.*?""".*?"""\n', text, re.S).end()
        (folder / name).write_text(text[:place] + gap + code + text[place:])


def environment(folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours}


@pytest.fixture(scope="module")
def runner(checkout):
    """runner(kind, text) does a piece of work in a process of the checkout, and asserts that all went well."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    place = dict(cwd=checkout, env=environment(checkout))
    with open(checkout / "said.txt", "w") as said:
        process = subprocess.Popen([sys.executable, "-c", RUNNER], stderr=said, **pipes, **place)

    def run(kind, text):
        print(json.dumps([kind, text]), file=process.stdin, flush=True)
        answer = "none"
        while answer and not answer.startswith("status "):
            answer = process.stdout.readline()
        said = (checkout / ("out.txt" if answer else "said.txt")).read_text()
        assert answer == "status 0\n", f"{text}\n{said[-3000:]}"

    yield run
    process.communicate()


def run_page(folder, page, runner):
    """Run all commands of a page in their order, and its Python blocks after them."""
    for command in commands(page):
        short = small_form(command)
        if short.startswith("python ") and " -m " not in short:
            runner("script", short.split()[1:])
            continue
        done = subprocess.run(
            short, shell=True, cwd=folder, env=environment(folder), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for sentence, code in python_blocks(page):
        if file_of(sentence) == (None, None):
            runner("block", code)


def test_every_command_is_known_and_none_is_forgotten():
    found = [command for page in PAGES for command in commands(page)]
    forgotten = [command for command in found if small_form(command) is None]
    assert not forgotten, f"no test runs {forgotten}"
    assert not set(SHORT) - set(found), "SHORT names a command that no page has"
    literal = "python train.py --lr 0.05 --scheduler linear --model v0"
    assert all(command in found for command in ("bash run_all.sh --demo", literal, "bash run_all.sh"))


def test_every_command_and_block_of_the_pages_runs(checkout, runner):
    for page in PAGES:
        run_page(checkout, page, runner)
    made = "best.pt prediction.png answers/predictions.csv test-best/probs.xlsx runs/results.csv"
    made += " runs/report.html runs/compare.html runs/odir-v0-001/run.json runs/demo-odir-03/run.json"
    made += " runs/idrid/probs.xlsx"
    for file in made.split():
        assert (checkout / file).stat().st_size > 0, file
    clinic = checkout / "runs/clinic/run.json"
    assert json.loads(clinic.read_text())["labels"] == ["0", "1", "2"]


def test_explore_runs_and_the_python_call_says_what_the_command_line_says(checkout, runner):
    assert "predictor.load" in python_blocks(ROOT / "README.md")[0][1]
    code = "import pandas, predictor\nnet = predictor.load('runs/explore-plain')\n"
    code += "sheet = pandas.read_csv('same/predictions.csv')\n"
    code += "found = pandas.DataFrame(net.predict('FOLDER'))\nassert len(found) == 3\n"
    code += "assert abs(found - sheet[net.labels]).max().max() < 1e-6"
    cell_lines = "\n".join(cells("explore.ipynb"))
    assert cell_lines.count('"--epochs", "40"') == 1
    predict = "predict.py --ckpt runs/explore-plain FOLDER --out same".split()
    explore = cell_lines.replace('"--epochs", "40"', '"--epochs", "2"')
    runner("explore", explore)
    runner("script", predict)
    runner("block", code)
    for name in ("explore-plain", "explore-weighted"):
        assert (checkout / "runs" / name / "test_scores.json").exists()


@pytest.mark.parametrize("name", ["explore.ipynb", "colab.ipynb"])
def test_a_notebook_holds_no_output_and_its_cells_parse(name):
    notebook = json.loads((ROOT / name).read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(
        notebook["cells"]
    )
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    for text in cells(name):
        ast.parse("\n".join(line for line in text.splitlines() if not line.startswith(("!", "%"))))


def test_colab_calls_scripts_with_flags_that_exist():
    lines = [line[1:] for text in cells("colab.ipynb") for line in text.splitlines() if line.startswith("!")]
    scripts = [line.split() for line in lines if line.startswith("python ")]
    assert len(scripts) == 3
    for _, script, *flags in scripts:
        module = __import__("arguments" if script == "train.py" else script.removesuffix(".py"))
        module.get_args_parser().parse_args([flag.replace("$DATA", "data") for flag in flags])


def test_the_readme_is_short_and_every_link_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for page in PAGES[1:]:
        first = [line for line in page.read_text().splitlines() if line and not line.startswith("#")][0]
        assert first.startswith("For those who "), f"{page.name} does not say for whom it is"


def test_the_map_of_the_code_names_every_file_once():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The map of the code") : text.index("**One picture:**")]
    named = re.findall(
        r"`(\w+\.py)`", "".join(line.split("|")[1] for line in table.splitlines() if "| `" in line)
    )
    assert sorted(named) == sorted(file.name for file in ROOT.glob("*.py"))


def test_requirements_name_every_import():
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    wanted = set()
    for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted.add(node.module.partition(".")[0])
    own = {file.stem for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]}
    wanted = {names.get(name, name) for name in wanted - own - set(sys.stdlib_module_names)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert not wanted - pinned, f"requirements.txt lacks {wanted - pinned}"
