"""What learns, and what is kept of it: losses, schedules, averages, thresholds, the best network."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from forked import EYES, ONE, load, same

import arguments
import dataset
import engine
import learner
import models
import predictor
import records
import samplers
import split
from errors import InputError

# ---------------------------------------------------------------- losses

LOGITS = torch.tensor([[-3.0, 0.0, 2.0], [0.5, -120.0, 120.0]])
TARGETS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
WEIGHT = np.array([2.0, 3.0, 0.5], np.float32)


def row_losses(loss, weight=None):
    found, ones = engine.Criterion("multilabel", weight, loss=loss)(LOGITS, TARGETS)
    assert ones.tolist() == [1, 1]
    return found


def test_binary_cross_entropy_is_torchs():
    weight = torch.from_numpy(WEIGHT)
    expected = F.binary_cross_entropy_with_logits(LOGITS, TARGETS, pos_weight=weight, reduction="none")
    torch.testing.assert_close(row_losses("bce", WEIGHT), expected.mean(1))


def test_the_asymmetric_loss_is_the_papers():
    """Ridnik et al. 2021, equations 4 to 7: positives -log p, negatives -p_m^gamma log(1 - p_m), margin 0.05."""
    expected = np.zeros((2, 3))
    for row, column in np.ndindex(2, 3):
        p = 1 / (1 + math.exp(-float(LOGITS[row, column])))
        shifted = max(p - 0.05, 0)
        negative = -(shifted**2) * math.log(1 - shifted)  # gamma 2: learned here, 4 in the paper
        expected[row, column] = -math.log(p) if TARGETS[row, column] else negative
    torch.testing.assert_close(row_losses("asymmetric"), torch.tensor(expected.mean(1)).float())
    logits = torch.full((1, 3), -120.0, requires_grad=True)  # far off: the gradient stays
    engine.Criterion("multilabel", loss="asymmetric")(logits, torch.ones(1, 3))[0].sum().backward()
    torch.testing.assert_close(logits.grad, torch.full((1, 3), -1 / 3))


def test_class_weights_divide_the_mean_as_torchs_do():
    logits, targets, weight = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1]), torch.tensor([1.0, 2.0, 4.0])
    losses, weights = engine.Criterion("multiclass", weight)(logits, targets)
    expected = F.cross_entropy(logits, targets, weight=weight)
    torch.testing.assert_close(losses.sum() / weights.sum(), expected)


def criterion(targets, words, task="multilabel"):
    args = arguments.get_args(words.split())[0]
    return learner.build_criterion(args, SimpleNamespace(task=task, labels=["a", "b"]), targets, "cpu")


def test_weights_of_the_training_part_and_their_power():
    targets = np.array([[1, 0], [0, 0], [0, 1], [0, 1]], np.float32)
    assert criterion(targets, "").weight is None
    assert criterion(targets, "--weighted-loss").weight.tolist() == [3, 1]
    softer = criterion(targets, "--weighted-loss --weight-power 0.5").weight
    assert softer.tolist() == pytest.approx([math.sqrt(3), 1])
    grades = criterion(np.array([0, 0, 0, 1]), "--dataset dr --weighted-loss", "multiclass")
    assert grades.weight.tolist() == [1, 3]


# ---------------------------------------------------------------- optimisers and schedules

CYCLES = ["--scheduler", "cyclic", "--lr", "0.001"]
SCHEDULES = {  # flags -> the rate of six epochs; the validation loss never falls after the first
    "--scheduler none": [0.05] * 6,
    "--scheduler linear": [0.05 * (1 - 0.9 * epoch / 50) for epoch in range(6)],
    "--scheduler linear --schedule-epochs 2": [0.05, 0.0275, 0.005, 0.005, 0.005, 0.005],
    "--scheduler cyclic --lr 0.001": [0.001 + 0.099 * epoch / 10 for epoch in range(6)],
    # triangular2 halves
    "--scheduler cyclic --lr 0.001 --schedule-epochs 1": [0.001, 0.1, 0.001, 0.0505, 0.001, 0.02575],
    "--scheduler step": [0.05 * 0.7**epoch for epoch in range(6)],
    "--scheduler plateau --schedule-epochs 1": [0.05, 0.05, 0.05, 0.015, 0.015, 0.0045],
}


def small_net():
    return SimpleNamespace(classifier=torch.nn.Linear(2, 2), backbone=torch.nn.Linear(3, 2))


@pytest.mark.parametrize("words", SCHEDULES)
def test_schedules(words):
    args = arguments.get_args(words.split())[0]
    optimizer = learner.build_optimizer(args, small_net())
    scheduler, found = learner.build_scheduler(args, optimizer), []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        learner.step_scheduler(args, scheduler, 1.0)
    assert found == pytest.approx(SCHEDULES[words])


def cosine_rates(warmup, epochs, steps):
    group = {"initial_lr": 0.1}
    args = SimpleNamespace(scheduler="cosine", warmup_epochs=warmup, epochs=epochs)
    own = SimpleNamespace(args=args, optimizer=SimpleNamespace(param_groups=[group]))
    found = []
    for epoch in range(epochs):
        for step in range(steps):
            learner.Learner.set_rate(own, epoch, step, steps)
            found.append(group["lr"])
    return found


def test_cosine_rises_linearly_and_falls_to_zero():
    # Half of the first epoch, all of it, then half a cosine over two epochs at 1/4, 1/2, 3/4 and its end.
    by_hand = [0.05, 0.1, 0.0853553, 0.05, 0.0146447, 0]
    assert cosine_rates(1, 3, 2) == pytest.approx(by_hand, abs=1e-7)
    assert cosine_rates(0, 1, 2) == pytest.approx([0.05, 0], abs=1e-9)
    assert cosine_rates(1, 1, 2) == pytest.approx([0.05, 0.1])  # all warm-up


def test_what_each_optimiser_learns_with():
    net = small_net()
    sgd = learner.build_optimizer(arguments.get_args([])[0], net)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9
    assert sgd.param_groups[0]["params"] == list(net.classifier.parameters())
    net = torch.nn.ModuleDict(vars(net))
    net.classifier, net.backbone = net["classifier"], net["backbone"]
    words = "--optimizer adamw --fine-tune --trunk-lr 0.1 --lr 0.01 --weight-decay 0.02"
    adamw = learner.build_optimizer(arguments.get_args(words.split())[0], net)
    assert isinstance(adamw, torch.optim.AdamW)
    trunk, head = adamw.param_groups
    assert (trunk["lr"], head["lr"]) == pytest.approx((0.001, 0.01)) and trunk["weight_decay"] == 0.02
    assert trunk["params"] == list(net.backbone.parameters()) and len(head["params"]) == 2


# ---------------------------------------------------------------- runs


@pytest.fixture
def prepared(tmp_path, rendered):
    """(args, data, learner) of a run as train.py prepares them."""

    def prepare(flags):
        small = ["--weights", "none", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
        given = [*small, *flags, "--data", rendered(flags[1]), "--cache", tmp_path / "cache"]
        args = arguments.get_args([str(word) for word in given])[0]
        data = dataset.load(args)
        return args, data, learner.build_learner(args, data, "fp32", torch.device("cpu"))

    return prepare


def test_averaged_weights_are_those_of_the_formula(prepared):
    _, _, own = prepared([*EYES, "--ema", "0.9"])
    weight, expected = next(own.model.classifier.parameters()), None
    for value in (1.0, 3.0, -2.0):
        with torch.no_grad():
            weight.fill_(value)
        own.ema.update_parameters(own.trained)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    network = own.evaluated()
    found = next(network.classifier.parameters())
    torch.testing.assert_close(found, torch.full_like(found, expected))
    assert network.backbone is own.model.backbone  # a frozen trunk is shared, not averaged
    assert (weight == -2).all()  # what trains goes on as it was
    assert own.kept_weights().keys() == {f"classifier.{name}" for name in network.classifier.state_dict()}


SCALED = {  # in fp16: whatever trains in it; a head on kept features trains in float32
    "kept features": ([*ONE, "--no-fine-tune"], False),
    "a whole network": ([*ONE, "--fine-tune"], True),
    "knees, whose features are not kept": (["--dataset", "mrnet", "--no-fine-tune", "--size", "72"], True),
}


@pytest.mark.parametrize("case", SCALED)
def test_the_loss_is_scaled_where_half_precision_trains(case, prepared):
    flags, scaled = SCALED[case]
    args, data, own = prepared(flags)
    assert not own.scaler.is_enabled()  # fp32
    half = learner.build_learner(args, data, "fp16", torch.device("cpu"))
    assert half.scaler.is_enabled() is scaled


KEPT = {
    "frozen": [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--lr", "3", "--epochs", "3", "--patience", "9"],
    "frozen, weighted, averaged": [*EYES, "--weighted-loss", "--lr", "5", "--epochs", "4", "--ema", "0.5"],
    "fine-tuned": [*ONE, "--fine-tune", "--bn", "pretrained", "--lr", "0.003", "--epochs", "3"]
    + ["--scheduler", "none", "--augment", "lab"],
    "last": [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--lr", "3", "--epochs", "3", "--keep", "last"],
}


@pytest.mark.parametrize("case", KEPT)
def test_best_pt_is_the_network_of_the_kept_epoch(case, tmp_path, train_here, rendered):
    """Its unweighted validation loss, computed again, is that of its epoch and of no other."""
    run = train_here(tmp_path, *KEPT[case], "--data", rendered(KEPT[case][1]))
    table = pd.read_excel(run / "train_results.xlsx")
    net = predictor.load(run, "cpu", "fp32", 0)
    losses, epoch = table["val_loss"].tolist(), net.saved["epoch"]
    assert epoch == (len(losses) - 1 if case == "last" else int(np.argmin(losses)))
    others = losses[:epoch] + losses[epoch + 1 :]
    assert min(abs(other - losses[epoch]) for other in others) > 1e-3 * losses[epoch], losses
    net.args.cache = str(tmp_path / "cache")
    part, _ = dataset.load_part(net.args, net.saved, "val")
    loss, probs = net.evaluate(part)
    assert loss == pytest.approx(losses[epoch], rel=1e-4) == net.saved["loss"]
    stored = load(run / "last.pt")["best"]
    np.testing.assert_allclose(stored["probs"], probs, atol=1e-5)
    if case == "frozen":
        assert epoch < len(losses) - 1, "the last epoch must be another"


def test_a_plateau_schedule_looks_at_the_validation_loss(tmp_path, train_here, rendered, monkeypatch):
    seen, step = [], learner.step_scheduler

    def watched(args, scheduler, loss):
        seen.append(loss)
        step(args, scheduler, loss)

    monkeypatch.setattr(learner, "step_scheduler", watched)
    given = [*ONE, "--no-fine-tune", "--optimizer", "sgd", "--scheduler", "plateau", "--epochs", "3"]
    run = train_here(tmp_path, *given, "--data", rendered("aptos"))
    history = load(run / "last.pt")["history"]
    assert seen == [row["val_loss"] for row in history] != [row["train_loss"] for row in history]


def test_a_trunk_does_not_learn_while_the_head_alone_should(tmp_path, train_here, rendered):
    given = [*ONE, "--fine-tune", "--freeze-epochs", "1", "--bn", "pretrained", "--weight-decay", "0.1"]
    given += ["--data", rendered("aptos"), "--name", "x"]
    run = train_here(tmp_path, *given, "--epochs", 1)
    torch.manual_seed(42)
    start = models.build_model("alexnet", 5, "none", 72).state_dict()
    after_one = load(run / "last.pt")["model"]
    train_here(tmp_path, "--resume", "runs/x", "--epochs", 2)
    after_two = load(run / "last.pt")["model"]
    for name, value in start.items():
        head = name.startswith("classifier.")
        assert value.equal(after_one[name]) is not head, name
        if name.startswith("backbone.") and value.ndim > 1:
            assert not value.equal(after_two[name]), name


# ---------------------------------------------------------------- thresholds


FOLDS = [*EYES, "--folds", "3", "--weighted-loss", "--lr", "0.01"]


def test_each_patients_probability_comes_from_a_head_that_never_saw_the_patient(prepared):
    args, data, own = prepared(FOLDS)
    fold = learner.folds_of(args, data.train.patients())
    assert sorted(np.bincount(fold)) == [10, 11, 11]
    before = learner.out_of_fold(args, data, own, 2)
    assert before.shape == data.train.targets.shape and 0 < before.min() < before.max() < 1
    np.testing.assert_array_equal(learner.out_of_fold(args, data, own, 2), before)
    data.train.targets[fold == 1] = 1 - data.train.targets[fold == 1]  # of these patients, everything
    own.criterion = learner.build_criterion(
        args, data, data.train.targets, "cpu"
    )  # the run's, as it would be
    after = learner.out_of_fold(args, data, own, 2)
    np.testing.assert_array_equal(after[fold == 1], before[fold == 1])
    assert not (after[fold != 1] == before[fold != 1]).any()


def test_all_rows_of_a_patient_are_in_one_fold():
    args = arguments.get_args(["--folds", "3"])[0]
    patients = np.array(["a", "b", "a", "c", "c", "d", "b"])
    fold = learner.folds_of(args, patients)
    assert all(len(set(fold[patients == name])) == 1 for name in "abcd") and set(fold) == {0, 1, 2}
    with pytest.raises(InputError, match="there are 2 training patients"):
        learner.folds_of(args, patients[:2])
    assert sorted(learner.folds_of(args, np.array(["a", "b", "c"]))) == [0, 1, 2]  # each patient alone


def test_the_folds_train_on_the_other_rows_with_the_runs_own_sampler():
    args = arguments.get_args(["--batch", "2", "--sampler", "balanced", "--drop-last"])[0]
    targets, rows = np.eye(2, dtype=np.float32)[np.arange(9) % 2], np.array([1, 2, 5, 6, 8])
    batches = learner.epoch_batches(args, targets, 0, rows)
    assert len(batches.order) == 4 and set(batches.order) <= set(rows)
    order = samplers.epoch_order("balanced", targets[rows], args.seed, 0)
    assert batches.order.tolist() == rows[order][:4].tolist()


THRESHOLDS = {
    "folds": [*EYES, "--folds", "2", "--optimizer", "adamw", "--ema", "0.9", "--scheduler", "cosine"],
    "calibration": [*EYES, "--fine-tune", "--bn", "pretrained", "--calibration-fraction", "0.3"],
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_nothing_is_learned_from_validation(case, tmp_path, train_here, rendered):
    """The validation patients' labels shuffled: not a bit of the weights or thresholds changes."""
    other = tmp_path / "other"
    shutil.copytree(rendered("odir"), other)
    sheet = pd.read_excel(other / "annotations.xlsx")
    _, val = split.split_patients(sheet)
    rows, labels = sheet.index[sheet["ID"].isin(val["ID"])], list("NDGCAHMO")
    sheet.loc[rows, labels] = np.roll(sheet.loc[rows, labels].to_numpy(), 1, 0)
    sheet.to_excel(other / "annotations.xlsx", index=False)
    found = []
    for root in (rendered("odir"), other):
        given = [*THRESHOLDS[case], "--keep", "last", "--data", root]
        found.append(load(train_here(tmp_path, *given, "--epochs", 2) / "best.pt"))
    same(found[0]["model"], found[1]["model"])
    assert found[0]["thresholds"] == found[1]["thresholds"] and len(set(found[0]["thresholds"])) > 1
    assert found[0]["loss"] != found[1]["loss"] and found[0]["epoch"] == found[1]["epoch"] == 1
    if case == "calibration":  # the gradient never saw its patients
        ids = found[0]["rows"]
        assert len(ids["calibration"]) == 10 and not set(ids["calibration"]) & {*ids["train"], *ids["val"]}


# ---------------------------------------------------------------- when a run is over


def test_when_a_run_is_over():
    args = arguments.get_args(["--epochs", "10", "--patience", "3"])[0]
    assert records.is_over(args, {"epoch": 10, "stale": 0}) and records.is_over(
        args, {"epoch": 4, "stale": 3}
    )
    assert not records.is_over(args, {"epoch": 9, "stale": 2})
    args.keep = "last"  # a fixed number of epochs does not look at validation
    assert not records.is_over(args, {"epoch": 9, "stale": 9})


@pytest.mark.parametrize("bn, fitted", [("fitted", True), ("pretrained", False)])
def test_statistics_are_fitted_where_that_is_asked(bn, fitted, rendered, tmp_path):
    """Random weights come with means of 0 and variances of 1."""
    flags = [
        "--data",
        str(rendered("odir")),
        "--cache",
        str(tmp_path),
        *EYES,
        "--weights",
        "none",
        "--bn",
        bn,
    ]
    args = arguments.get_args([*flags, "--workers", "0", "--device", "cpu"])[0]
    built = learner.build_learner(args, dataset.load(args), "fp32", torch.device("cpu"))
    means = [value for name, value in built.model.state_dict().items() if name.endswith("running_mean")]
    assert means and all(bool(value.any()) == fitted for value in means)


# ---------------------------------------------------------------- what a run says as it begins


RANDOM = "the trunk's weights are random and stay so"


@pytest.mark.parametrize(
    "words, network, note",
    [
        ("", "v0 on resnet50, weights imagenet", False),
        ("--weights none", "v0 on resnet50, weights none", True),
        ("--weights none --fine-tune", "v0 on resnet50, weights none", False),
        ("--dataset aptos --model alexnet", "alexnet, weights imagenet", False),
    ],
)
def test_the_network_is_named_and_a_random_trunk_noted(words, network, note, capsys):
    facts = dict(notes=[], duplicates=0, rendered=False, unreadable=0, repaired={})
    data = SimpleNamespace(train=range(7), val=range(2), facts=facts)
    records.print_data(arguments.get_args(words.split())[0], data, "cpu", "fp32")
    said = capsys.readouterr().out
    assert f"\n{network}, on cpu in fp32" in said and (RANDOM in said) is note


def test_a_schedule_without_a_branch_is_refused():
    with pytest.raises(InputError, match="--scheduler spiral: build_scheduler has no branch"):
        learner.build_scheduler(SimpleNamespace(scheduler="spiral", schedule_epochs=1, gamma=1), None)
