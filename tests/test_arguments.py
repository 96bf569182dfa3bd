"""The flags of train.py: their help, defaults and rules, and the experiments of run_all.sh."""

import argparse
import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import arguments
import checkpoint
from errors import InputError

PARSERS = {name: arguments.get_args_parser(name) for name in arguments.PUBLISHED}
ACTIONS = [action for action in PARSERS["odir"]._actions if action.dest != "help"]
FREE = {"data", "labels", "pseudo_labels", "cache", "runs", "name", "resume", "model", "trunk", "weights"}
YES_NO = argparse.BooleanOptionalAction | argparse._StoreTrueAction


def test_every_flag_is_read():
    """By an attribute `args.x` outside arguments.py, whose rules do not count."""
    read = set()
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                read.add((file.name, node.attr))
    modules = "train learner records features dataset decode checkpoint split".split()
    elsewhere = {name for file, name in read if file.removesuffix(".py") in modules}
    unread = {action.dest for action in ACTIONS} - elsewhere
    assert not unread, f"read nowhere: {sorted(unread)}"


@pytest.mark.parametrize("name", PARSERS)
def test_every_default_would_be_accepted_if_typed(name):
    parser = PARSERS[name]
    plain = vars(parser.parse_args([]))
    for action in ACTIONS:
        default, flag = plain[action.dest], action.option_strings[0]
        if isinstance(action, YES_NO):
            assert isinstance(default, bool)
            assert vars(parser.parse_args([flag]))[action.dest] is True
            if isinstance(action, argparse.BooleanOptionalAction):
                assert vars(parser.parse_args([f"--no-{flag[2:]}"]))[action.dest] is False
        elif default is not None:
            typed = vars(parser.parse_args([flag, str(default)]))[action.dest]
            assert typed == default and type(typed) is type(default), f"{flag} {default!r}: {typed!r}"


def test_strings_of_a_closed_set_have_choices_and_every_flag_its_help():
    text = PARSERS["odir"].format_help()
    for action in ACTIONS:
        assert action.help and action.option_strings[0] in text, action.dest
        assert action.type is not bool  # bool("False") is True
        if action.type is None and not isinstance(action, YES_NO):
            assert action.choices or action.dest in FREE, f"{action.dest} takes any string"


def test_help_and_a_wrong_flag_answer_without_torch():
    """Seconds on a slow disk, where torch is read: so neither it nor pandas nor numpy is imported."""
    code = (
        "import sys, train\nfrom errors import guard\nheavy = {'torch', 'pandas', 'numpy', 'sklearn'}\n"
        "try:\n    print(guard(train.main, sys.argv[1:]))\nexcept SystemExit as end:\n    print(end.code)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for argv, status in ([["--help"], 0], [["--batch-size", "8"], 2], [["--lr", "0"], 2]):
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(status)


UNKNOWN = {
    "--batch-size 8": "--batch-size: did you mean --batch?",
    "--epoch 8": "--epoch: did you mean --epochs?",
    "--learning-rate 1": "unrecognized arguments: --learning-rate",
    "--finetune": "--finetune: did you mean --fine-tune?",
    "--no-finetune": "--no-finetune: did you mean --no-fine-tune?",
    "--sched none": "unrecognized arguments: --sched",  # no abbreviation
    "--scheduler cosin": "invalid choice: 'cosin'",
    "--lr fast": "invalid float",
    "--epochs 1.5": "invalid int",
    "--dataset cifar": "invalid choice: 'cifar'",
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_wrong_flags_are_refused_by_name(words, capsys):
    with pytest.raises(SystemExit) as ended:
        arguments.get_args(words.split())
    assert ended.value.code == 2 and UNKNOWN[words] in capsys.readouterr().err


RULES = {
    "--lr 0": "--lr 0.0: expected",
    "--lr nan": "--lr nan: expected",
    "--lr inf": "--lr inf: expected",
    "--batch -1": "--batch -1: expected 1 or more",
    "--epochs 0": "--epochs 0: expected 1 or more",
    "--momentum 5": "--momentum 5.0: expected 0 to 1",
    "--ema 1": "--ema 1.0: expected 0 to 0.99999",
    "--calibration-fraction 0.6": "--calibration-fraction 0.6: expected 0 to 0.5",
    "--size 1000000": "(3e+03 GB a picture): expected 16 to 4096",
    "--labels N N": "a label is named twice",
    "--pseudo-labels x.csv": "--pseudo-labels belongs to --dataset retina",
    "--min-confidence 0.5": "--min-confidence to --pseudo-labels",
    "--crop 196": "--crop 196 needs --augment",
    "--augment pair --crop 300": "a --size (224) that it fits into",
    "--dataset mrnet --crop 200": "--crop 200 needs",
    "--augment knee": "odir takes none or eyes or pair",
    "--dataset aptos --augment pair": "aptos takes none or eyes or lab",
    "--views 2": "--views needs --augment",
    "--dataset mrnet --preprocess fov": "--preprocess fov: mrnet takes crop or none",
    "--preprocess crop": "odir takes fov or none or centre",
    "--dataset mrnet --size 300": "--size 300: expected 64 (for AlexNet) to 256 (MRNet's slices)",
    "--dataset mrnet --size 32": "--size 32: expected 64 (for AlexNet)",
    "--model resnet18": "--model resnet18 does not take odir; expected v0",
    "--dataset aptos --model v0": "--model v0 does not take aptos; expected a network for one photograph",
    "--dataset aptos --model mrnet": "--model mrnet does not take aptos",
    "--dataset mrnet --model resnet18": "--model resnet18 does not take mrnet; expected mrnet",
    "--dataset aptos --trunk resnet18": "give --model resnet18",
    "--freeze-epochs 2": "--freeze-epochs, --trunk-lr: without --fine-tune",
    "--trunk-lr 0.1": "--freeze-epochs, --trunk-lr: without --fine-tune",
    "--folds 5 --fine-tune": "and kept features of eye pairs",
    "--folds 5 --bn batch": "and kept features of eye pairs",
    "--folds 5 --no-feature-cache": "and kept features of eye pairs",
    "--dataset mrnet --no-fine-tune --folds 5": "and kept features of eye pairs",
    "--folds 5 --calibration-fraction 0.1": "; or --calibration-fraction",
    "--folds 1": "--folds needs 2 or more",
    "--dataset aptos --calibration-fraction 0.1": "no thresholds to learn",
    "--schedule-epochs 3 --scheduler none": "--schedule-epochs: not with --scheduler none --optimizer sgd",
    "--gamma 0.5 --scheduler cyclic": "--gamma: not with --scheduler cyclic",
    "--gamma 1.5": "--gamma 1.5: expected 1e-06 to 0.999999",
    "--max-lr 0.2": "--max-lr: not with --scheduler linear",
    "--scheduler cyclic --lr 0.5": "expected --lr 0.5 below --max-lr 0.1",
    "--scheduler cyclic --lr 0.01 --fine-tune --trunk-lr 0.1": "and no --trunk-lr",
    "--warmup-epochs 2": "--warmup-epochs: not with --scheduler linear",
    "--warmup-epochs 9 --scheduler cosine --epochs 3": "expected --epochs 3 or less",
    "--optimizer adam --momentum 0.5": "--momentum: not with --scheduler linear --optimizer adam",
    "--sampler weighted": "use balanced",
    "--dataset dr --loss asymmetric": "--loss bce alone",
    "--loss asymmetric --weighted-loss": "not with --loss asymmetric",
    "--weight-power 0.5": "--weight-power needs it",
    "--resume nowhere": "--resume nowhere: there is no such run folder",
}


@pytest.mark.parametrize("words", RULES)
def test_flags_that_do_not_go_together_are_refused(words):
    with pytest.raises(InputError, match=re.escape(RULES[words])):
        arguments.get_args(words.split())


def test_every_rule_has_its_test():
    """Each `raise InputError` of arguments.py is reached by a line of RULES, but for those of a resume."""
    source = (ROOT / "arguments.py").read_text()
    raised = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)}
    reached = set()
    for words in RULES:
        try:
            arguments.get_args(words.split())
        except InputError as error:
            trace = error.__traceback__
            while trace:
                if trace.tb_frame.f_code.co_filename.endswith("arguments.py"):
                    reached.add(trace.tb_lineno)
                trace = trace.tb_next
    missing = [source.splitlines()[line - 1].strip() for line in sorted(raised - reached)]
    resume = ["a resumed run keeps its {kept}: start a new run to change it"]
    resume += ["--epochs {args.epochs} --patience {args.patience}: expected {had} or more"]
    assert missing == [f'raise InputError(f"{message}")' for message in resume]


# data set -> flags, values as published
DEFAULTS = {
    "odir": {
        "model": "v0",
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 0.05,
        "scheduler": "linear",
        "batch": 32,
    }
    | {"epochs": 100, "patience": 20, "size": 224, "seed": 42, "preprocess": "fov", "fine_tune": False}
    | {"augment": "none", "sampler": "shuffle", "bn": "fitted", "schedule_epochs": 50, "gamma": 0.1},
    "aptos": {"model": "efficientnet-b1", "optimizer": "adam", "lr": 0.01, "scheduler": "step", "batch": 30}
    | {"epochs": 50, "sampler": "weighted", "fine_tune": True, "momentum": None, "gamma": 0.7},
    "dr": {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4, "batch": 64, "freeze_epochs": 5, "epochs": 25}
    | {"size": 256, "crop": 224, "drop_last": True, "scheduler": "none", "gamma": None},
    "retina": {"model": "alexnet", "optimizer": "adam", "lr": 0.001, "epochs": 50, "weights": "none"},
    "mrnet": {"optimizer": "adam", "lr": 1e-5, "weight_decay": 0.01, "batch": 1, "scheduler": "plateau"}
    | {"weighted_loss": True, "augment": "knee", "schedule_epochs": 3, "gamma": 0.3},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_experiment_three_and_the_other_studies(name):
    args = vars(arguments.get_args(["--dataset", name])[0])
    assert {key: args[key] for key in DEFAULTS[name]} == DEFAULTS[name]
    json.dumps(args)


def test_what_is_typed_wins_over_what_is_stored_over_what_is_published(monkeypatch):
    stored = vars(arguments.get_args(["--dataset", "aptos", "--lr", "0.2", "--batch", "4"])[0])
    last = {"args": stored, "epoch": 3, "changes": []}
    monkeypatch.setattr(checkpoint, "load_last", lambda folder: last)
    args, state = arguments.get_args(["--resume", "runs/x", "--lr", "0.3"])
    assert (args.dataset, args.lr, args.batch, args.epochs) == ("aptos", 0.3, 4, 50)
    assert state["changes"] == ["lr was 0.2 for 3 epochs"]


def test_the_experiments_are_the_lines_of_run_all():
    found = arguments.experiments()
    assert {"odir-00", "odir-17", "aptos-1", "dr-resnet50-weighted", "retina-5", "mrnet-acl"} <= set(found)
    assert not arguments.differences(vars(arguments.get_args([])[0]), found["odir-03"])
    assert found["odir-14"].crop == 196 and found["dr-resnet18"].drop_last and found["retina-4"].labels
    changed = vars(arguments.get_args(["--lr", "0.5", "--batch", "64", "--seed", "7", "--name", "a"])[0])
    assert arguments.differences(changed, found["odir-03"]) == ["lr 0.5 not 0.05", "batch 64 not 32"]


@pytest.mark.parametrize(
    ("name", "weights", "same"),
    [
        ("retina-2", "/disk/runs/retina-1/best.pt", True),
        ("mine", "runs/retina-1-seed43/best.pt", True),
        ("demo-retina-2", "runs/demo-retina-1/best.pt", True),
        ("retina-2", "runs/demo-retina-1/best.pt", False),  # drawn pictures are no start of a real run
        ("retina-2", "runs/control-retina-1/best.pt", False),
        ("demo-retina-2", "runs/control-demo-retina-1/best.pt", False),
        ("retina-2", "elsewhere/my-retina-1/best.pt", False),
        ("retina-2", "runs/retina-1/last.pt", False),
    ],
)
def test_a_run_starts_from_the_run_that_its_line_names(name, weights, same):
    line = arguments.experiments()["retina-2"]
    told = arguments.differences({**vars(line), "name": name, "weights": weights}, line)
    assert told == ([] if same else [f"weights {weights} not runs/retina-1/best.pt"])


def test_a_run_that_is_older_than_a_flag_goes_on():
    args = arguments.get_args([])[0]
    stored = {name: value for name, value in vars(args).items() if name != "views"}
    arguments.compare_with_stored(args, {"args": stored, "epoch": 1, "changes": (changes := [])})
    assert not changes
