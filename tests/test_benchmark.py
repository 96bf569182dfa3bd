"""Each benchmark runs on tiny settings and prints its line. How fast anything is, no test asks."""

import contextlib
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import benchmark
import train

SMALL = [
    "--pictures",
    "4",
    "--size",
    "32",
    "--repeats",
    "1",
    "--rows",
    "1000",
    "--trunk",
    "efficientnet-lite0",
]
RATIO = r"plain [\d.e+-]+, ours [\d.e+-]+ {}, ratio [\d.]+ \([\d.]+ to [\d.]+, n=\d\)"
PRINTED = {
    "preprocessing": ["preprocessing: " + RATIO.format("pictures/s")],
    "sampler": ["an epoch of 1000 rows: " + RATIO.format("s")],
    "finetune": [
        "batch 4, (fp32|bf16|fp16): " + RATIO.format("pictures/s"),
        r"preparing a batch takes [\d.]+% of the step on it, with --augment pair [\d.]+%",
    ],
}


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys, rendered):
    """printed(name, *flags) -> what the benchmark prints, run in an empty folder; scripts in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=here, DEVNULL=None))
    monkeypatch.setattr(benchmark, "MATRIX", {"cpu": 64})
    photographs = tmp_path / "fullsize"
    photographs.mkdir()
    for file in sorted((rendered("odir") / "images").glob("*.jpg"))[:2]:
        shutil.copy(file, photographs)

    def run(name, *flags):
        places = ["--data", str(rendered("odir")), "--fullsize", str(photographs)]
        assert not benchmark.main([name, *places, *SMALL, *flags])
        return capsys.readouterr().out

    return run


def here(command, cwd, check, stdout):
    """A script's main in this process: importing torch once more would take longer than all the rest."""
    python, script, *flags = map(str, command)
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        assert python == sys.executable and script == str(benchmark.HERE / "train.py") and not train.main()


def assert_printed(text, patterns):
    for pattern in patterns:
        assert re.search(pattern, text), f"no {pattern!r} in\n{text}"


@pytest.mark.parametrize("name", PRINTED)
def test_each_benchmark_prints_its_lines(name, printed):
    assert_printed(printed(name), PRINTED[name])


@pytest.mark.parametrize("trunk", ["resnet50", "efficientnet-lite0"])
def test_extraction(trunk, printed, monkeypatch):
    asked = []

    def fast_trunk(net, precision, compiled):  # a real compiler would take a minute
        asked.append(compiled)
        return net

    monkeypatch.setattr(benchmark, "FastTrunk", fast_trunk)
    text = printed("extraction", "--trunk", trunk)
    assert asked == [False, True]
    assert_printed(
        text, [f"{trunk}, 32, .*, {how}: {RATIO.format('pictures/s')}" for how in ("eager", "compiled")]
    )
    assert ("of 64 x 64 matrices" in text) == (trunk == "resnet50")


def test_the_study_trains_each_experiment_twice(printed, monkeypatch, tmp_path):
    trained = []

    def counted(command, cwd, **rules):
        here(command, cwd, **rules)
        trained.append([path.name for path in sorted((benchmark.Path(cwd) / "runs").iterdir())])

    monkeypatch.setattr(benchmark, "EPOCHS", {"03": 1})
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=counted, DEVNULL=None))
    text = printed("run")
    assert trained == [["03 from nothing"], ["03 from nothing", "03 kept"]]
    assert_printed(
        text,
        [
            f"experiments 03 {state}, whole processes: {RATIO.format('s')}"
            for state in ("from nothing", "kept")
        ],
    )


def test_every_experiment_of_the_study_stands_in_run_all():
    lines = (benchmark.HERE / "run_all.sh").read_text()
    for number in benchmark.EPOCHS:
        assert len(re.findall(f"^run odir-{number} ", lines, re.M)) == 1


def test_the_plain_sampler_draws_the_least_sampled_label():
    counts = benchmark.plain_draws(np.eye(4, dtype=np.int64), 10)
    assert sorted(counts) == [2, 2, 3, 3]


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
