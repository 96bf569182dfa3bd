"""Two and three processes (gloo, CPU) give one process's curve, write once, and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from forked import EYES, ONE, ROOT, SMALL, join, load, same, start_together, train, train_together, wait_for

import dataset
import engine
import models
import split
import tables
from augment import prepare_batch
from decode import Pictures
from samplers import Batches, epoch_order

SGD = ["--optimizer", "sgd", "--lr", "0.001"]
FROZEN = [*ONE, "--no-fine-tune", *SGD, "--sampler", "shuffle"]
TUNED = [*ONE, "--fine-tune", "--bn", "pretrained", *SGD]
COSINE = ["--optimizer", "adamw", "--scheduler", "cosine", "--ema", "0.9", "--lr", "0.01"]
CASES = {
    "frozen": FROZEN,
    "frozen, one row last": [*FROZEN, "--no-feature-cache"],
    "frozen, augmented": [*FROZEN, "--augment", "eyes", "--sampler", "balanced", "--weighted-loss"],
    "fine-tuned, one row last": [*TUNED, "--sampler", "balanced", "--weighted-loss"],
    "fine-tuned, averaged": [*TUNED, "--sampler", "shuffle", *COSINE, "--lr", "0.0001", "--trunk-lr", "0.1"],
    "eyes, folds, one row last": [*EYES, *COSINE, "--weighted-loss", "--folds", "2"],
}


@pytest.fixture
def flags(rendered):
    def of(case):
        return [*SMALL, *case, "--data", rendered(case[1]), "--name", "x", "--epochs", "2"]

    return of


def parts_of(flags):
    name, root = flags[flags.index("--dataset") + 1], flags[flags.index("--data") + 1]
    return split.split(name, tables.read(name, root).frame)


def one_row_last(flags):
    """A batch size whose last batch is a single row, so that all ranks but one have none."""
    rows = len(parts_of(flags)["train"])
    return ["--batch", str(next(batch for batch in range(8, rows) if rows % batch == 1))]


def results(cwd):
    assert [folder.name for folder in (cwd / "runs").iterdir()] == ["x"]
    return pd.read_excel(cwd / "runs/x/train_results.xlsx")


def check_curve(cwd, other):
    one, two = results(cwd), results(other)
    assert list(one) == list(two) and len(one) == len(two) == 2
    for column in one:
        np.testing.assert_allclose(two[column], one[column], rtol=0, atol=1e-4, err_msg=column)


def check_networks(cwd, other):
    a, b = (load(place / "runs/x/best.pt") for place in (cwd, other))
    same(a["rows"], b["rows"])
    for key, value in a["model"].items():
        np.testing.assert_allclose(b["model"][key], value, atol=1e-4, rtol=1e-3, err_msg=key)
    if a["thresholds"]:
        assert b["thresholds"] == pytest.approx(a["thresholds"], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_two_processes_is_that_of_one(case, tmp_path, flags):
    given = flags(CASES[case])
    if "one row last" in case:
        given += one_row_last(given)
    train(given, tmp_path / "one")
    ranks = 3 if case == "fine-tuned, one row last" else 2
    said = train_together(given, tmp_path / "two", ranks)
    check_curve(tmp_path / "one", tmp_path / "two")
    check_networks(tmp_path / "one", tmp_path / "two")
    assert "epoch 1" in said[0] and "best epoch" in said[0] and set(said[1:]) == {""}
    # Features extracted in shares are those of one process.
    kept = []
    for place in ("one", "two"):
        files = (tmp_path / place / "cache").glob("features-*.npy")
        kept.append({file.name: np.load(file) for file in files})
    expected = "fine" not in case and "--no-feature-cache" not in given
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) == expected
    for name in kept[0]:
        np.testing.assert_allclose(kept[1][name], kept[0][name], atol=1e-3, rtol=1e-3)
    for file in ("last.pt", "best.pt", "run.json", "split.csv", "train_results.xlsx"):
        assert (tmp_path / "two/runs/x" / file).exists()
    assert not list((tmp_path / "two").rglob("*.tmp"))
    assert json.loads((tmp_path / "two/runs/x/run.json").read_text())["processes"] == ranks


@pytest.mark.parametrize("batch, ranks", [(8, 2), (5, 2), (7, 3), (2, 4), (64, 2)])
def test_each_row_of_an_epoch_is_seen_once_over_all_ranks(batch, ranks):
    order = epoch_order("shuffle", np.zeros((26, 2)), 0, 3)
    shares = [list(Batches(order, batch, rank=rank, world=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # as many steps on every rank
    steps = []
    for step in range(len(shares[0])):
        steps.append(sorted(key for share in shares for key in share[step]))
    assert steps == [sorted(batch) for batch in Batches(order, batch)]
    assert sorted(index for step in steps for index, _ in step) == list(range(26))


def test_moving_statistics_on_a_cpu_say_so_and_are_saved_as_validated(tmp_path, flags):
    said = train_together(flags([*TUNED, "--bn", "batch", "--ema", "0.5"]), tmp_path)
    assert said[0].count("a CPU has no synchronised BatchNorm") == 1
    best = load(tmp_path / "runs/x/best.pt")
    model = models.build_model("alexnet", 5, "none", 72)
    model.load_state_dict(best["model"])
    table = tables.read("aptos", best["args"]["data"])
    val = split.split("aptos", table.frame)["val"]
    shown = Pictures(list(val["files"]), best["args"]["preprocess"], 72, tmp_path / "cache")
    data = dataset.PictureSet(shown, tables.targets_of(val, table.labels))
    loader = engine.make_loader(data, Batches(np.arange(len(val)), 32))
    loss, _ = engine.predict(model, loader, lambda b: prepare_batch(b, "cpu"), engine.Criterion("multiclass"))
    assert loss == pytest.approx(best["loss"], rel=1e-4)


def test_features_that_are_cut_short_are_made_again_together(tmp_path, flags):
    train_together(flags(FROZEN), tmp_path / "a")
    kept = {file: file.read_bytes() for file in (tmp_path / "a/cache").glob("features-*.npy")}
    assert len(kept) == 2
    for file, data in kept.items():
        file.write_bytes(data[:-5])
    train_together([*flags(FROZEN), "--cache", tmp_path / "a/cache"], tmp_path / "b")
    assert {file: file.read_bytes() for file in kept} == kept
    same(load(tmp_path / "a/runs/x/best.pt")["model"], load(tmp_path / "b/runs/x/best.pt")["model"])


# ---------------------------------------------------------------- errors and signals of one rank

ERRORS = {  # where rank 1 alone, or rank 0 alone, meets its error -> (rank, status of both, words)
    "no_data": (1, 2, "cannot be read, there is no data here"),
    "unreadable_file": (1, 2, "file\\(s\\) cannot be read"),
    "weights": (1, 2, "no weights on this machine"),
    "full_disk_decoding": (1, 2, "cache .* cannot be written"),
    "full_disk_features": (0, 2, "cache .* cannot be written"),
    "extracting": (1, 2, "features are not finite"),
    "run_folder": (0, 2, "cannot be made"),
    "full_disk_last": (0, 2, "No space left"),
    "nan_rows": (1, 1, "the loss is nan in epoch 0, step 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_ends_all_with_its_message(name, tmp_path, flags):
    """Each process is a machine of its own, with a cache of its own; the error meets one of them."""
    rank, status, words = ERRORS[name]
    own = []
    for number in range(2):
        hook = {"HOOK": f"fail_{name}"} if number == rank else {}
        own.append((["--cache", tmp_path / f"cache{number}"], hook))
    began = time.time()
    given = flags([*FROZEN, "--bn", "pretrained"])
    said = train_together(given, tmp_path, status=status, timeout=30, machines=2, own=own)
    assert time.time() - began < 30
    for text in said:
        assert len(re.findall(words, text)) == 1 and "Traceback" not in text, text
    if name != "nan_rows":
        assert f"process {rank} of 2 cannot go on" in said[1 - rank]


def test_processes_that_start_at_different_times_find_each_other(tmp_path, flags):
    own = [([], {}), ([], {"HOOK": "start_late"})]
    train_together(flags(FROZEN), tmp_path, own=own)
    assert len(results(tmp_path)) == 2


def test_a_signal_to_one_rank_ends_all_and_any_number_goes_on(tmp_path, flags):
    given = [*flags(CASES["fine-tuned, averaged"]), "--cache", tmp_path / "cache"]
    train(given, tmp_path / "whole")
    processes, outs = start_together(given, tmp_path / "cut", environment={"HOOK": "slow_steps"})
    wait_for(outs[0], r"step 1 1\n", processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        join(process, 20)
    said = [out.read_text() for out in outs]
    assert [process.exitcode for process in processes] == [1, 143], "\n".join(said)
    assert "another process of this run has ended" in said[0] and "Traceback" not in "".join(said)
    for text in said:
        assert text.rstrip().endswith("python train.py --resume runs/x")
    assert load(tmp_path / "cut/runs/x/last.pt")["epoch"] == 1
    assert json.loads((tmp_path / "cut/runs/x/run.json").read_text())["status"] == "interrupted"
    shutil.copytree(tmp_path / "cut", tmp_path / "three")
    train(["--resume", "runs/x"], tmp_path / "cut")
    check_curve(tmp_path / "whole", tmp_path / "cut")
    train_together(["--resume", "runs/x"], tmp_path / "three", ranks=3)
    check_curve(tmp_path / "whole", tmp_path / "three")
    check_networks(tmp_path / "whole", tmp_path / "three")


def test_a_dying_rank_ends_the_run_under_torchrun(tmp_path, flags):
    slow = tmp_path / "slow.py"  # train.py with steps that leave time to hit it
    slow.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n"
        "from forked import train_main\n"
        "if __name__ == '__main__':\n    sys.exit(train_main(sys.argv[1:], {'HOOK': 'slow_steps'}))\n"
    )
    given = [*flags(CASES["fine-tuned, averaged"]), "--cache", tmp_path / "cache"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--monitor-interval", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = [*torchrun, str(slow), *map(str, given)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    said = ""
    while "step 1 1\n" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    killed = time.time()
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.time() - killed < 40, said
    train(["--resume", "runs/x"], tmp_path)
    train(given, tmp_path / "whole")
    check_curve(tmp_path / "whole", tmp_path)


# ---------------------------------------------------------------- a rank without rows, and phases


class Watched(torch.nn.Module):
    """Notes the type that its layer computes in."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 2), []

    def forward(self, inputs):
        outputs = self.layer(inputs)
        self.seen.append((len(inputs), outputs.dtype))
        return outputs


class Plain:
    """As much of a Learner as an epoch needs."""

    seed, criterion, ema = 0, engine.Criterion("multilabel"), None
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def __init__(self, module):
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def set_rate(self, *_):
        pass


def test_a_rank_without_rows_computes_in_float32(monkeypatch):
    """SyncBatchNorm adds up the ranks' statistics: those of an empty batch must not be in bf16."""
    module, targets = Watched(), torch.zeros(4, 2)
    data = dataset.FeatureSet(torch.ones(4, 3), targets)
    batches = Batches(np.arange(4), 3, rank=1, world=2)  # of rows 0..2 and 3: [1], []
    assert [len(batch) for batch in batches] == [1, 0]
    loader = engine.make_loader(data, batches)

    def prepare(batch):
        return (batch["features"],), batch["targets"]

    monkeypatch.setattr(engine, "all_sum", lambda sums: sums + 1)  # the other rank has rows
    engine.train_one_epoch(module, loader, prepare, Plain(module), 0, "bf16")
    assert module.seen == [(1, torch.bfloat16), (0, torch.float32)]


def test_a_network_is_shared_once_a_phase(tmp_path, monkeypatch, train_here, rendered):
    shared, distribute = [], engine.distribute

    def counting(module, device):
        shared.append(type(module).__name__)
        return distribute(module, device)

    monkeypatch.setattr(engine, "distribute", counting)
    given = [*ONE, "--data", rendered("aptos"), "--fine-tune", "--bn", "fitted"]
    train_here(tmp_path, *given, "--freeze-epochs", 2, "--epochs", 4)
    assert len(shared) == 2 and shared[0] != shared[1]  # the head for two epochs, the network for two
