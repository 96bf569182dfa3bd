"""The scripts as a stranger meets them: their help, the whole chain, and rules that the source keeps."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import arguments
import metrics

SCRIPTS = (
    "train test predict heatmap spread_labels report benchmark challenge_eval render_data preprocess".split()
)
FILES = sorted(path.stem for path in ROOT.glob("*.py"))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in FILES}
LABELS = list("NDGCAHMO")
YES_NO = argparse.BooleanOptionalAction | argparse._StoreTrueAction
SMALL = ["--size", 32, "--weights", "none", "--device", "cpu", "--precision", "fp32", "--workers", 0]


def parser_of(script):
    """The parser of a script; train.py's lies in arguments.py and has tests of its own."""
    return arguments.get_args_parser() if script == "train" else load(script).get_args_parser()


def load(name):
    if name != "test":  # `test` is also a package of Python's own
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("evaluation_script", ROOT / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(parser):
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


# ---------------------------------------------------------------- help and flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_complete_and_readable(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # two screens of 50 lines, train.py's three
    parser = parser_of(script)
    text = parser.format_help()
    most = 150 if script == "train" else 100
    assert len(text.splitlines()) <= most, f"{script} --help has {len(text.splitlines())} lines"
    assert not parser.allow_abbrev
    for action in flags(parser):
        assert action.help and action.help is not argparse.SUPPRESS, f"{script}: {action.dest} has no help"
        name = action.metavar or action.dest
        if action.option_strings:
            name = action.option_strings[0].removeprefix("--")
        assert name in text, f"{script}: {name} is not in the help"


def test_help_as_typed():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = {}
    for script in ("train", "challenge_eval", "render_data"):
        processes[script] = subprocess.Popen([sys.executable, ROOT / f"{script}.py", "--help"], **pipes)
    for script, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and not err, err
        assert out.startswith("usage: ") and f"{script}.py" in out and "--help" in out


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "train"])
def test_every_flag_is_read(script):
    read = set()
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) == "args":
                read.add(node.attr)
        elif isinstance(node, ast.Call) and "vars(args)" in [ast.unparse(k.value) for k in node.keywords]:
            read |= set(inspect.signature(getattr(load(script), ast.unparse(node.func))).parameters)
    unread = [action.dest for action in flags(parser_of(script)) if action.dest not in read]
    assert not unread, f"{script}: read nowhere: {unread}"


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "train"])
def test_every_default_would_be_accepted_if_typed(script):
    parser, required = parser_of(script), []
    for action in flags(parser):
        if action.required and action.option_strings:
            required += [action.option_strings[0], str(next(iter(action.choices or ["x"])))]
        elif not action.option_strings and action.nargs != "*":
            required.append("x")
    plain = vars(parser.parse_args(required))
    for action in flags(parser):
        default = plain[action.dest]
        if default is None or not action.option_strings or action.required:
            continue
        assert action.type is not bool  # bool("False") is True
        if isinstance(default, bool):
            assert isinstance(action, YES_NO), f"{script}: {action.dest}"
            continue
        words = default if isinstance(default, list | tuple) else [default]
        given = [*required, action.option_strings[0], *map(str, words)]
        typed = vars(parser.parse_args(given))[action.dest]
        where = f"{script}: {action.dest} {default!r} comes back as {typed!r}"
        assert typed == default and type(typed) is type(default), where


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "train"])
def test_an_unknown_flag_ends_with_status_two(script, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(script).parse_args(["--no-such-flag-at-all"])
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


# ---------------------------------------------------------------- the chain, as it is typed


@pytest.fixture(scope="module")
def chain(tmp_path_factory, rendered, script):
    """render -> preprocess -> train -> test -> challenge_eval, each a process, in one working directory."""
    here, drawn, said = tmp_path_factory.mktemp("chain"), rendered("odir"), {}
    command = [sys.executable, ROOT / "preprocess.py", drawn / "images", "data/odir/images"]
    subprocess.run([*command, "--size", "32", "--workers", "1"], cwd=here, check=True)
    for name in ("annotations.xlsx", "rendered.json"):
        shutil.copy(drawn / name, here / "data" / "odir")
    given = ["--model", "v1", "--trunk", "shufflenet_v2_x0_5", "--preprocess", "none", "--epochs", 3, *SMALL]
    given += ["--test-fraction", 0.1]
    said["train"] = script("train.py", *given, cwd=here, status=0).stdout
    run = here / "runs" / "odir-v1-001"
    given = ["--ckpt", run, "--split", "all", "--resamples", 50, "--workers", 0]
    said["test"] = script("test.py", *given, cwd=here, status=0).stdout
    out = run / "test-all"
    given = [out / "ground_truth.xlsx", out / "submission.csv"]
    said["challenge"] = script("challenge_eval.py", *given, cwd=here, status=0).stdout
    return here, said, out


def test_chain_writes_what_is_promised(chain):
    here, said, out = chain
    run = here / "runs" / "odir-v1-001"
    names = {path.name for path in run.iterdir()}
    assert {"best.pt", "last.pt", "run.json", "split.csv", "train_results.xlsx"} <= names
    assert any(name.startswith("events.out") for name in names)
    assert (here / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    sheets = {"probs.xlsx", "ground_truth.xlsx", "test_scores.json", "submission.csv"}
    pictures = {"confusion.png", "roc.png", "samples.png", "heatmaps.png", "reliability.png"}
    assert {path.name for path in out.iterdir()} >= {*sheets, *pictures, "classification_report.txt"}
    scores = [
        f"{part}_{score}" for part in ("train", "val") for score in ("kappa", "f1", "auc", "final_score")
    ]
    table = pd.read_excel(run / "train_results.xlsx")
    assert list(table) == ["epoch", "lr", "train_loss", "val_loss", *scores]
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "finished" and facts["data"]["rendered"]
    assert facts["data"]["parts"] == {"train": 28, "val": 8, "test": 4}
    assert re.fullmatch(r"[0-9a-f]{12,}\+?|unknown", facts["commit"])
    split = pd.read_csv(run / "split.csv")
    assert list(split) == ["ID", "part"]
    assert (
        split.groupby("part").size().to_dict() == {"train": 28, "val": 8, "test": 4} and split["ID"].is_unique
    )
    assert "RENDERED" in said["train"] and "RENDERED" in said["test"]
    assert not list(here.rglob("*.tmp"))


def sheets(out):
    probs = pd.read_excel(out / "probs.xlsx").set_index("ID")
    truth = pd.read_excel(out / "ground_truth.xlsx").set_index("ID")
    assert list(probs) == list(truth) == LABELS and (probs.index == truth.index).all()
    return truth.to_numpy(), probs.to_numpy()


def test_scores_are_those_of_the_sheets(chain):
    here, said, out = chain
    y_true, y_prob = sheets(out)
    annotations = pd.read_excel(here / "data" / "odir" / "annotations.xlsx").set_index("ID")
    ids = pd.read_excel(out / "probs.xlsx")["ID"]
    assert (y_true == annotations.loc[ids, LABELS].to_numpy()).all() and len(y_true) == 40
    result = json.loads((out / "test_scores.json").read_text())
    functions = {"per label": metrics.compute_challenge_metrics, "challenge": metrics.challenge_scores}
    for family, function in functions.items():
        found = result["scores"][family]
        for name, value in function(y_true, y_prob).items():
            assert found[name] is None if np.isnan(value) else found[name] == pytest.approx(value, abs=1e-6)
        low, high = result["intervals"][family]["f1"]
        assert low <= found["f1"] <= high
    # challenge_eval.py, from the two files alone, prints the same four numbers
    row = next(line for line in said["challenge"].splitlines() if line.startswith("these predictions"))
    printed = [float(cell) for cell in row.split()[2:]]
    expected = [result["scores"]["challenge"][key] for key in ("kappa", "f1", "auc", "final")]
    assert printed == pytest.approx(expected, abs=6e-5)
    submission = pd.read_csv(out / "submission.csv")
    assert list(submission) == ["ID", *LABELS]
    assert submission[LABELS].to_numpy() == pytest.approx(y_prob, abs=1e-6)
    for words in ("per label scores", "challenge scores", "95 % interval"):
        assert words in said["test"]


def test_predicting_twice_gives_the_same(chain, tmp_path, monkeypatch):
    here, _, out = chain
    # From another directory and process, from the pictures again: nothing is kept there.
    monkeypatch.chdir(tmp_path)
    given = ["--ckpt", str(here / "best.pt"), "--split", "all", "--resamples", "5", "--workers", "0"]
    given += ["--out", "again", "--data", str(here / "data" / "odir"), "--cache", "cache"]
    script = load("test")
    monkeypatch.setattr(script, "draw_all", lambda *_: {})
    assert not script.main(given)
    first, again = sheets(out)[1], sheets(tmp_path / "again")[1]
    assert again == pytest.approx(first, abs=1e-6) and first.std() > 1e-4


# ---------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def eight(tmp_path_factory, rendered):
    """Eight rendered photographs with grades, all in training, the same eight in validation."""
    root = tmp_path_factory.mktemp("eight")
    table = pd.read_csv(rendered("aptos") / "train.csv", dtype={"id_code": str})
    chosen = table.groupby("diagnosis").head(2).head(8)
    for part in ("train", "val"):
        for name, grade in zip(chosen["id_code"], chosen["diagnosis"], strict=True):
            (root / part / str(grade)).mkdir(parents=True, exist_ok=True)
            shutil.copy(rendered("aptos") / "train_images" / f"{name}.png", root / part / str(grade))
    return root


TUNED = ["--fine-tune", "--lr", "0.01", "--epochs", "8"]


@pytest.mark.parametrize("more", [TUNED, ["--no-fine-tune", "--lr", "0.1", "--epochs", "60"]])
def test_eight_samples_are_learned_by_heart(eight, tmp_path, train_here, more):
    given = [
        "--dataset",
        "aptos",
        "--data",
        eight,
        "--model",
        "resnet18",
        "--optimizer",
        "sgd",
        "--batch",
        "8",
    ]
    given += ["--scheduler", "none", "--sampler", "shuffle", "--size", "64", "--patience", "100"]
    given += ["--duplicates", "keep"]
    run = train_here(tmp_path, *given, "--bn", "batch" if "--fine-tune" in more else "fitted", *more)
    table = pd.read_excel(run / "train_results.xlsx")
    losses = table["train_loss"].tolist()
    assert losses[0] > 0.9 and losses[-1] < 0.1 * losses[0], losses
    assert table["train_accuracy"].iloc[-1] == 1
    assert bool(list((tmp_path / "cache").glob("features-*"))) == ("--no-fine-tune" in more)


# ---------------------------------------------------------------- rules of the source


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_nothing_imports_a_script():
    scripts = set(SCRIPTS) - {"preprocess"}  # which is both
    for name, tree in TREES.items():
        found = set(imports(tree)) & scripts - {name}
        assert not found, f"{name}.py imports {found}"


def test_scripts_are_scripts_and_modules_are_not():
    for name, tree in TREES.items():
        conditions = [node for node in tree.body if isinstance(node, ast.If)]
        guarded = [node for node in conditions if "__name__" in ast.unparse(node.test)]
        assert bool(guarded) == (name in SCRIPTS), name
        if guarded:
            assert ast.unparse(guarded[0].body[0]) == "sys.exit(guard(main))", name
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert {"main", "get_args_parser"} - functions <= (
                {"get_args_parser"} if name == "train" else set()
            )
        assert ast.get_docstring(tree), f"{name}.py says nothing about itself"


def test_importing_does_nothing(tmp_path):
    """Every file at once, in an empty directory: nothing is printed, nothing is written, no flag is read."""
    code = (
        f"import sys, importlib.util; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {FILES!r}:\n"
        "    own_name = 'evaluation_script' if name == 'test' else name\n"
        f"    spec = importlib.util.spec_from_file_location(own_name, {str(ROOT)!r} + '/' + name + '.py')\n"
        "    module = importlib.util.module_from_spec(spec)\n"
        "    sys.modules[spec.name] = module\n"
        "    spec.loader.exec_module(module)\n"
        "import random, torch, signal\n"
        "assert torch.initial_seed() != 42 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    command = [sys.executable, "-B", "-c", code, "--no-such-flag"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_no_bare_except_no_unsafe_load_no_removed_names(name):
    for node in ast.walk(TREES[name]):
        where = f"{name}.py line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: bare except"
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            any_kind = ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (silent and any_kind), f"{where}: an exception of any kind is passed over"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np", "numpy"):
            assert hasattr(np, node.attr), f"{where}: np.{node.attr} is not in numpy {np.__version__}"
            assert node.attr not in ("Inf", "NaN", "float", "int", "bool", "NINF"), where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            loads = (".get_state_dict", ".load_state_dict_from_url")
            if called in ("torch.load", "torch.hub.load_state_dict_from_url") or called.endswith(loads):
                assert keywords.get("weights_only") == "True", f"{where}: {called} without weights_only=True"
            if called == "np.load":
                assert keywords.get("allow_pickle") == "False", f"{where}: np.load that might unpickle"
            assert called not in ("pickle.load", "pickle.loads", "eval", "exec", "os.system"), where
            assert keywords.get("shell") != "True", where
