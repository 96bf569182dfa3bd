"""Two processes (gloo, CPU) give one process's curve, see every picture once, write once, and end together."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from forked import EYES, ONE, ROOT, SMALL, load, same, train, train_together

FROZEN = [*ONE, "--no-fine-tune", "--optimizer", "sgd"]
TUNED = [*ONE, "--fine-tune", "--bn", "pretrained", "--optimizer", "sgd", "--lr", "0.001"]
CASES = {  # aptos has 26 training rows: a last batch of 2, of one row, and none
    "frozen": [*FROZEN, "--sampler", "shuffle"],
    "frozen, one row last": [*FROZEN, "--sampler", "shuffle", "--batch", "5", "--no-feature-cache"],
    "frozen, augmented": [*FROZEN, "--sampler", "shuffle", "--augment", "eyes"],
    "frozen, balanced": [*FROZEN, "--sampler", "balanced", "--weighted-loss"],
    "fine-tuned": [*TUNED, "--sampler", "shuffle"],
    "fine-tuned, balanced, one row last": [*TUNED, "--sampler", "balanced", "--batch", "5", "--weighted-loss"],
    "eyes, balanced": [*EYES, "--sampler", "balanced", "--weighted-loss", "--batch", "9"],
}


@pytest.fixture
def flags(rendered):
    def of(case):
        return [*SMALL, *case, "--data", rendered(case[1]), "--name", "x", "--epochs", "2"]
    return of


def results(cwd):
    assert [folder.name for folder in (cwd / "runs").iterdir()] == ["x"]
    return pd.read_excel(cwd / "runs/x/train_results.xlsx")


@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_two_processes_is_that_of_one(case, tmp_path, flags):
    train(flags(CASES[case]), tmp_path / "one")
    said = train_together(flags(CASES[case]), tmp_path / "two")
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
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) == ("kept" not in case and "frozen" in case and "one row" not in case or "eyes" in case)
    for name in kept[0]:
        np.testing.assert_allclose(kept[1][name], kept[0][name], atol=1e-4, rtol=1e-4)
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
    from dataset import read, split, targets_of
    from samplers import Batches
    model = models.build_model("alexnet", 5, "none", 72)
    model.load_state_dict(best["model"])
    table, labels, _ = read("aptos", best["args"]["data"])
    val = split("aptos", table)["val"]
    shown = pictures.Pictures(list(val["files"]), "fov" if best["args"]["preprocess"] == "fov" else "none", 72, tmp_path / "cache")
    data = pictures.PictureSet(shown.array(), shown.rows, targets_of(val, labels))
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


def test_a_dying_rank_ends_the_run_and_one_process_goes_on(tmp_path, flags):
    """The real torchrun: one rank is killed in mid-run; then SIGTERM in mid-epoch; then one process ends the run."""
    slow = tmp_path / "slow.py"  # train.py with steps that leave time to hit it
    slow.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); sys.path.insert(0, {str(ROOT)!r})\n"
                    "from forked import train_main\n"
                    "if __name__ == '__main__': sys.exit(train_main(sys.argv[1:], {'SLOW_STEPS': '0.2'}))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(slow)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train([*flags(CASES["fine-tuned"]), "--cache", tmp_path / "cache"], tmp_path / "whole")

    def begin(*argv):
        process = subprocess.Popen([*torchrun, *map(str, argv)], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = ""
        while "step 1 1\n" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        return process
    process = begin(*flags(CASES["fine-tuned"]), "--cache", tmp_path / "cache")
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    ended = time.time()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.time() - ended < 45, said
    assert load(tmp_path / "runs/x/last.pt")["epoch"] == 1

    process = begin("--resume", "runs/x")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "--resume runs/x" in said, said
    last = load(tmp_path / "runs/x/last.pt")
    assert last["epoch"] == 1 and 2 <= len(last["record"]) < 4
    assert [len(step[3]) for step in last["record"]] == [8] * len(last["record"])  # of both ranks

    train(["--resume", "runs/x"], tmp_path)
    one, other = (pd.read_excel(place / "runs/x/train_results.xlsx") for place in (tmp_path / "whole", tmp_path))
    for column in one:
        np.testing.assert_allclose(other[column], one[column], rtol=0, atol=1e-4, err_msg=column)
