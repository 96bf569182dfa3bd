"""Each benchmark runs on tiny settings and prints its line. How fast anything is, no test asks."""

import re
import shutil

import pytest

import benchmark

SMALL = ["--pictures", "16", "--size", "32", "--repeats", "1", "--rows", "1000"]
RATIO = r"plain [\d.e+-]+, ours [\d.e+-]+ {}, ratio [\d.]+ \([\d.]+ to [\d.]+, n=\d\)"
PRINTED = {
    "preprocessing": [RATIO.format("pictures/s")],
    "sampler": ["an epoch of 1000 rows: " + RATIO.format("s")],
    "mrnet": [f"batch {batch}: {RATIO.format('knees/s')}" for batch in (1, 4)],
    "growth": [r"1000 patients: read [\d.]+ s, split [\d.]+ s, sample [\d.]+ s, score [\d.]+ s; [\d.]+ GiB"],
    "head": [r"1000 rows: [\d.]+ s an epoch, [\d.]+ GiB"],
    "report": [rf"200 runs, {when}: [\d.]+ s, [\d.]+ MB" for when in ("first", "again")],
    "finetune": [
        f"batch 64, bf16, channels last: {RATIO.format('pictures/s')}",
        r"preparing a batch takes [\d.]+% of the step on it, with --augment pair [\d.]+%",
    ],
}


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys, rendered):
    """printed(name, *flags) -> what the benchmark prints, run in an empty folder."""

    def run(name, *flags):
        monkeypatch.chdir(tmp_path)
        places = ["--data", rendered("odir"), "--mrnet", rendered("mrnet")]
        places += ["--fullsize", rendered("odir") / "images"]
        assert not benchmark.main([name, *map(str, places), *SMALL, *flags])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", [name for name in PRINTED if name != "report"])
def test_each_benchmark_prints_its_lines(name, printed):
    text = printed(name, "--trunk", "efficientnet-lite0")
    for pattern in PRINTED[name]:
        assert re.search(pattern, text), text


@pytest.mark.parametrize("trunk", ["resnet50", "efficientnet-lite0", "efficientnet-b1"])
def test_extraction_of_each_trunk(trunk, printed, monkeypatch):
    monkeypatch.setattr(benchmark, "FastTrunk", lambda net, precision, compiled: net)  # no minute of compiling
    text = printed("extraction", "--trunk", trunk)
    for how in ("eager", "compiled"):
        assert re.search(f"{trunk}, 32, .*{how}: {RATIO.format('pictures/s')}", text), text
    assert ("of 4096 x 4096 matrices" in text) == (trunk == "resnet50")


def test_the_study_runs_whole_processes(printed, monkeypatch):
    monkeypatch.setattr(benchmark, "EPOCHS", {"03": 1})
    text = printed("run", "--trunk", "efficientnet-lite0")
    for state in ("from nothing", "kept"):
        assert re.search(f"experiments 03 {state}, whole processes: {RATIO.format('s')}", text), text


def test_the_report_of_many_runs(printed, trained, tmp_path):
    run = tmp_path / "one"
    shutil.copytree(trained("odir"), run)
    text = printed("report", "--run", str(run))
    for pattern in PRINTED["report"]:
        assert re.search(pattern, text), text


def test_the_plain_sampler_draws_the_least_sampled_label():
    import numpy as np

    labels = np.eye(4, dtype=np.int64)
    counts = benchmark.plain_draws(labels, 10)
    assert sorted(counts) == [2, 2, 3, 3]


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
