"""Two processes (gloo, CPU) give one process's curve, see every picture once, write once, and end together."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from forked import EYES, ONE, ROOT, SMALL, load, same, start_together, train, train_together, wait_for

import dataset

FROZEN = [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--lr", "0.001"]
TUNED = [*ONE, "--fine-tune", "--bn", "pretrained", "--optimizer", "sgd", "--lr", "0.001"]
CASES = {
    "frozen": [*FROZEN, "--sampler", "shuffle"],
    "frozen, one row last": [*FROZEN, "--sampler", "shuffle", "--no-feature-cache"],
    "frozen, augmented": [*FROZEN, "--sampler", "shuffle", "--augment", "eyes"],
    "frozen, balanced": [*FROZEN, "--sampler", "balanced", "--weighted-loss"],
    "fine-tuned": [*TUNED, "--sampler", "shuffle"],
    "fine-tuned, balanced, one row last": [*TUNED, "--sampler", "balanced", "--weighted-loss"],
    "eyes, balanced, one row last": [*EYES, "--sampler", "balanced", "--weighted-loss", "--lr", "0.01"],
}


@pytest.fixture
def flags(rendered):
    def of(case):
        return [*SMALL, *case, "--data", rendered(case[1]), "--name", "x", "--epochs", "2"]
    return of


def one_row_last(flags):
    """A batch size whose last batch is a single row, so that one of the ranks has none."""
    name, root = flags[flags.index("--dataset") + 1], flags[flags.index("--data") + 1]
    rows = len(dataset.split(name, dataset.read(name, root)[0])["train"])
    return ["--batch", str(next(batch for batch in range(8, rows) if rows % batch == 1))]


def results(cwd):
    assert [folder.name for folder in (cwd / "runs").iterdir()] == ["x"]
    return pd.read_excel(cwd / "runs/x/train_results.xlsx")


@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_two_processes_is_that_of_one(case, tmp_path, flags):
    given = flags(CASES[case])
    if "one row last" in case:
        given += one_row_last(given)
    train(given, tmp_path / "one")
    said = train_together(given, tmp_path / "two")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert list(one) == list(two) and len(one) == len(two) == 2
    for column in one:
        np.testing.assert_allclose(two[column], one[column], rtol=0, atol=1e-4, err_msg=column)
    assert "epoch 1" in said[0] and "best epoch" in said[0] and said[1] == ""
    a, b = (load(tmp_path / place / "runs/x/best.pt") for place in ("one", "two"))
    same(a["split"], b["split"])
    for key, value in a["model"].items():
        np.testing.assert_allclose(b["model"][key], value, atol=1e-4, rtol=1e-3, err_msg=key)
    # Features extracted in shares are those of one process.
    kept = [{file.name: np.load(file) for file in (tmp_path / place / "cache").glob("features-*.npy")} for place in ("one", "two")]
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) == ("fine" not in case and "--no-feature-cache" not in given)
    for name in kept[0]:
        np.testing.assert_allclose(kept[1][name], kept[0][name], atol=1e-3, rtol=1e-3)
    for file in ("last.pt", "best.pt", "run.json", "split.csv", "train_results.xlsx"):
        assert (tmp_path / "two/runs/x" / file).exists()
    assert not list((tmp_path / "two").rglob("*.tmp"))


@pytest.mark.parametrize("batch, ranks", [(8, 2), (5, 2), (7, 3), (2, 4), (64, 2)])
def test_each_row_of_an_epoch_is_seen_once_over_all_ranks(batch, ranks):
    from samplers import Batches, epoch_order
    order = epoch_order("shuffle", np.zeros((26, 2)), 0, 3)
    shares = [list(Batches(order, batch, rank=rank, world=ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # as many steps on every rank
    steps = [sorted(key for share in shares for key in share[step]) for step in range(len(shares[0]))]
    assert steps == [sorted(batch) for batch in Batches(order, batch)]
    assert sorted(index for step in steps for index, _ in step) == list(range(26))


def test_moving_statistics_on_a_cpu_say_so_and_are_saved_as_validated(tmp_path, flags):
    said = train_together(flags([*TUNED, "--bn", "batch"]), tmp_path)
    assert said[0].count("a CPU has no synchronised BatchNorm") == 1
    best = load(tmp_path / "runs/x/best.pt")
    import engine
    import models
    import pictures
    from augment import prepare_batch
    from samplers import Batches
    model = models.build_model("alexnet", 5, "none", 72)
    model.load_state_dict(best["model"])
    table, labels, _ = dataset.read("aptos", best["args"]["data"])
    val = dataset.split("aptos", table)["val"]
    shown = pictures.Pictures(list(val["files"]), "fov" if best["args"]["preprocess"] == "fov" else "none", 72, tmp_path / "cache")
    data = pictures.PictureSet(shown.array(), shown.rows, dataset.targets_of(val, labels))
    loss, *_ = engine.predict(model, engine.make_loader(data, Batches(np.arange(len(val)), 32)), lambda b: prepare_batch(b, "cpu"),
                              engine.Criterion("multiclass"))
    assert loss == pytest.approx(best["loss"], rel=1e-4)


def test_damaged_features_are_made_again_together(tmp_path, flags):
    train_together(flags(CASES["frozen"]), tmp_path / "a")
    for file in (tmp_path / "a/cache").glob("features-*.npy"):
        data = bytearray(file.read_bytes())
        data[-5] ^= 255
        file.write_bytes(data)
    given = [*flags(CASES["frozen"]), "--cache", tmp_path / "a/cache"]
    said = train_together(given, tmp_path / "b")
    assert said[0].count("is damaged (checksum)") == 2
    same(load(tmp_path / "a/runs/x/best.pt")["model"], load(tmp_path / "b/runs/x/best.pt")["model"])


def test_an_error_of_one_rank_reaches_all(tmp_path, flags):
    given = flags(CASES["frozen"])
    given[given.index("--data") + 1] = tmp_path / "absent"
    said = train_together(given, tmp_path / "x", status=2)
    assert all("is no folder" in text and "Traceback" not in text for text in said)


def check_curve(cwd, other):
    one, two = results(cwd), results(other)
    for column in one:
        np.testing.assert_allclose(two[column], one[column], rtol=0, atol=1e-4, err_msg=column)


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(tmp_path, flags):
    given = [*flags(CASES["fine-tuned"]), "--cache", tmp_path / "cache"]
    train(given, tmp_path / "whole")
    processes, outs = start_together(given, tmp_path / "cut", 2, {"SLOW_STEPS": "0.15"})
    wait_for(outs[0], r"step 1 1\n", processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143], outs[0].read_text()
    assert "--resume runs/x" in outs[0].read_text()
    last = load(tmp_path / "cut/runs/x/last.pt")
    assert last["epoch"] == 1 and 2 <= len(last["record"]) < 4
    assert [len(step[3]) for step in last["record"]][:2] == [8, 8]  # of both ranks
    shutil.copytree(tmp_path / "cut", tmp_path / "three")
    train(["--resume", "runs/x"], tmp_path / "cut")
    check_curve(tmp_path / "whole", tmp_path / "cut")
    train_together(["--resume", "runs/x"], tmp_path / "three", ranks=3)
    check_curve(tmp_path / "whole", tmp_path / "three")


def test_a_dying_rank_ends_the_run_under_torchrun(tmp_path, flags):
    slow = tmp_path / "slow.py"  # train.py with steps that leave time to hit it
    slow.write_text(f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n"
                    "from forked import train_main\n"
                    "if __name__ == '__main__':\n    sys.exit(train_main(sys.argv[1:], {'SLOW_STEPS': '0.15'}))\n")
    given = [*flags(CASES["fine-tuned"]), "--cache", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(slow), *map(str, given)],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = ""
    while "step 1 1\n" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    ranks = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    killed = time.time()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.time() - killed < 40, said
    train(["--resume", "runs/x"], tmp_path)
    train(given, tmp_path / "whole")
    check_curve(tmp_path / "whole", tmp_path)
