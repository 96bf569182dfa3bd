"""Scores against hand-worked matrices, scikit-learn on thousands of random cases, and published figures."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

import metrics
from errors import InputError

LABELS = list("NDGCAHMO")
OF_ALL = [family for family in metrics.FAMILIES if family != "each label"]  # one number a score


def each_label(y_true, y_prob, threshold=0.5):
    return metrics.scores("each label", y_true, y_prob, threshold=threshold)


def close(ours, theirs):
    assert ours == pytest.approx(theirs, abs=1e-12, rel=1e-12, nan_ok=True), (ours, theirs)


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def sk_auc(y_true, y_prob, weights=None):
    return (
        sk.roc_auc_score(y_true, y_prob, sample_weight=weights) if 0 < y_true.sum() < len(y_true) else np.nan
    )


def sk_per_label(y_true, y_prob):
    y_pred = (y_prob > 0.5).astype(int)
    columns = range(y_true.shape[1])
    kappa = np.mean([quiet(sk.cohen_kappa_score, y_true[:, i], y_pred[:, i]) for i in columns])
    f1 = sk.f1_score(y_true, y_pred, average="weighted", zero_division=0)
    areas = [sk_auc(y_true[:, i], y_prob[:, i]) for i in columns]
    auc = np.nan if np.isnan(areas).any() else sk.roc_auc_score(y_true, y_prob, average="weighted")
    return {"kappa": kappa, "f1": f1, "auc": auc, "final": (kappa + f1 + auc) / 3}


def sk_challenge(y_true, y_prob):
    truth, prob = y_true.ravel(), y_prob.ravel()
    kappa = quiet(sk.cohen_kappa_score, truth, prob > 0.5)
    f1, auc = sk.f1_score(truth, prob > 0.5, average="micro"), sk_auc(truth, prob)
    return {"kappa": kappa, "f1": f1, "auc": auc, "final": (kappa + f1 + auc) / 3}


def random_case(rng):
    """Ties, constant columns, labels of one class, float32: everything that scores go wrong on."""
    n, width = int(rng.integers(1, 40)), int(rng.integers(2, 9))
    y_true = (rng.random((n, width)) < rng.random(width)).astype(rng.choice([np.int64, np.float64, np.uint8]))
    y_prob = rng.random((n, width)).astype(rng.choice([np.float64, np.float32]))
    if rng.random() < 0.5:
        y_prob = np.round(y_prob, int(rng.integers(0, 2)))
    if rng.random() < 0.3:
        y_prob[:, 0] = y_prob[0, 0]
    if rng.random() < 0.2:
        y_true[:, 1] = rng.integers(2)
    return y_true, y_prob


def test_per_label_by_hand():
    # Label a: truth 1 1 0 0, predicted 1 0 0 0: kappa 1 - .25 / .5, F1 2/3; .6, .4 over .4, .1: 3.5 / 4.
    # Label b: truth 1 0 0 0, predicted 1 1 0 0: kappa 1 - .25 / .5, F1 2/3; .9 over .8, .2, .2: 3 / 3.
    y_true = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    y_prob = np.array([[0.6, 0.9], [0.4, 0.8], [0.4, 0.2], [0.1, 0.2]])
    auc = (2 * 3.5 / 4 + 1 * 1) / 3
    close(
        metrics.compute_challenge_metrics(y_true, y_prob),
        {"kappa": 0.5, "f1": 2 / 3, "auc": auc, "final": (0.5 + 2 / 3 + auc) / 3},
    )
    each = each_label(y_true, y_prob)
    close(each["accuracy"], [0.75, 0.75])
    close(each["auc"], [3.5 / 4, 1])
    assert each["support"] == [2, 1]


def test_challenge_by_hand():
    # 8 cells: 3 positive, 3 predicted, 2 of them right: right 6/8, chance (3*3 + 5*5)/64; (.75 - p)/(1 - p).
    # Positives .9 .6 .4 over .8 .4 .2 .2 .1: 5 + 4 + 3.5 of 15 pairs.
    y_true = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    y_prob = np.array([[0.6, 0.9], [0.4, 0.8], [0.4, 0.2], [0.1, 0.2]])
    chance = 34 / 64
    kappa, auc = (0.75 - chance) / (1 - chance), 12.5 / 15
    close(
        metrics.challenge_scores(y_true, y_prob),
        {"kappa": kappa, "f1": 0.75, "auc": auc, "final": (kappa + 0.75 + auc) / 3},
    )


def test_classes_by_hand():
    # Truth 0 0 1 2, predicted 0 1 1 0: chance (2*2 + 1*2 + 1*0) / 16; squared distances observed: 1 + 4.
    y_prob = np.eye(3)[[0, 1, 1, 0]]
    chance = (2 * 2 + 1 * 2 + 1 * 0) / 16
    expected = (2 * 2 * 1 + 1 * 2 * 1 + 1 * 2 * 4 + 1 * 2 * 1) / 4  # truth x prediction x distance squared
    close(
        metrics.scores("classes", [0, 0, 1, 2], y_prob),
        {
            "accuracy": 0.5,
            "kappa": (0.5 - chance) / (1 - chance),
            "quadratic_kappa": 1 - 5 / expected,
            "f1": (0.5 + 2 / 3 + 0) / 3,
        },
    )


def test_lists_frames_and_tensors_score_alike():
    import pandas as pd
    import torch

    y_true, y_prob = random_case(np.random.default_rng(8))
    for family in ("per label", "challenge"):
        one = [
            (metrics.scores(family, *pair), metrics.bootstrap_intervals(family, *pair, n_resamples=9))
            for pair in (
                [make(array) for array in (y_true, y_prob.astype(float))]
                for make in (np.asarray, np.ndarray.tolist, pd.DataFrame, torch.from_numpy)
            )
        ]
        assert len(set(map(str, one))) == 1


def test_prediction_is_strictly_above_the_threshold():
    y_true, y_prob = [[1, 0], [0, 1]], [[0.5, 0.4], [0.2, 0.5]]
    assert metrics.challenge_scores(y_true, y_prob)["f1"] == 0.5
    assert metrics.challenge_scores(y_true, y_prob, threshold=0.45)["f1"] == 1


def test_multilabel_parity_with_scikit_learn():
    rng, undefined = np.random.default_rng(0), 0
    for _ in range(40):
        y_true, y_prob = random_case(rng)
        ours = metrics.compute_challenge_metrics(y_true, y_prob)
        undefined += np.isnan(ours["auc"])
        close(ours, sk_per_label(y_true, y_prob))
        close(metrics.challenge_scores(y_true, y_prob), sk_challenge(y_true, y_prob))
        names = [str(i) for i in range(y_true.shape[1])]
        areas = [sk_auc(y_true[:, i], y_prob[:, i]) for i in range(y_true.shape[1])]
        close(
            metrics.scores("auc", y_true, y_prob, names),
            {**{f"auc_{name}": area for name, area in zip(names, areas, strict=True)}, "auc": np.mean(areas)},
        )
        assert all(type(value) is float for value in ours.values())
    assert 5 < undefined < 35  # the sweep saw both


def test_each_label_parity_with_scikit_learn():
    rng = np.random.default_rng(1)
    for _ in range(15):
        y_true, y_prob = random_case(rng)
        each = each_label(y_true, y_prob)
        for i in range(y_true.shape[1]):
            truth, prediction = y_true[:, i], y_prob[:, i] > 0.5
            close(each["kappa"][i], quiet(sk.cohen_kappa_score, truth, prediction))
            close(each["auc"][i], sk_auc(truth, y_prob[:, i]))
            close(each["f1"][i], sk.f1_score(truth, prediction, zero_division=0))
            close(each["accuracy"][i], sk.accuracy_score(truth, prediction))
            assert each["support"][i] == truth.sum()


def test_class_parity_with_scikit_learn():
    rng = np.random.default_rng(2)
    for _ in range(60):
        n, size = int(rng.integers(1, 40)), int(rng.integers(2, 7))
        y_true = rng.integers(rng.integers(1, size + 1), size=n)
        y_prob = np.round(rng.random((n, size)), int(rng.integers(1, 9)))
        y_pred, names = y_prob.argmax(axis=1), range(size)
        close(
            metrics.scores("classes", y_true, y_prob),
            {
                "accuracy": sk.accuracy_score(y_true, y_pred),
                "kappa": quiet(sk.cohen_kappa_score, y_true, y_pred, labels=names),
                "quadratic_kappa": quiet(
                    sk.cohen_kappa_score, y_true, y_pred, labels=names, weights="quadratic"
                ),
                "f1": sk.f1_score(y_true, y_pred, labels=names, average="macro", zero_division=0),
            },
        )


def test_undefined_is_nan_and_named():
    y_true = np.array([[0, 1], [0, 0], [0, 1]])
    y_prob = np.array([[0.1, 0.9], [0.2, 0.3], [0.6, 0.8]])
    found = metrics.compute_challenge_metrics(y_true, y_prob)
    assert np.isnan(found["auc"]) and np.isnan(found["final"]) and found["kappa"] == 0.5
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"]) == [
        "auc of glaucoma: only one class among 3 rows"
    ]
    y_prob[2, 0] = 0.2
    assert np.isnan(metrics.compute_challenge_metrics(y_true, y_prob)["kappa"])
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"]) == [
        "auc of glaucoma: only one class among 3 rows",
        "kappa of glaucoma: truth and prediction are all 0 among 3 rows",
    ]
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"], "auc") == [
        "auc of glaucoma: only one class among 3 rows"
    ]
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"], "challenge") == []
    assert np.isnan(metrics.scores("auc", y_true, y_prob, ["a", "b"])["auc"])
    assert metrics.undefined_scores([1, 1], [[0.2, 0.8], [0.1, 0.9]], ["a", "b"], "classes") == [
        "kappa of all classes: truth and prediction are all 1 among 2 rows"
    ]


def test_undefined_scores_names_exactly_what_is_nan():
    rng = np.random.default_rng(3)
    for _ in range(300):
        y_true, y_prob = random_case(rng)
        names = LABELS[: y_true.shape[1]]
        each = each_label(y_true, y_prob)
        nan = {
            f"{key} of {name}"
            for key in ("auc", "kappa")
            for name, value in zip(names, each[key], strict=True)
            if np.isnan(value)
        }
        assert {line.split(":")[0] for line in metrics.undefined_scores(y_true, y_prob, names)} == nan


def plain_resamples(y_true, y_prob, count, seed, score):
    """The bootstrap as one writes it first: take the rows, score them."""
    drawn = np.random.default_rng(seed).integers(len(y_true), size=(count, len(y_true)))
    return [score(y_true[rows], y_prob[rows]) for rows in drawn]


@pytest.mark.parametrize("family", OF_ALL)
@pytest.mark.parametrize("chunk", [100, metrics.CHUNK])
def test_bootstrap_equals_scoring_every_resample(family, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    rng = np.random.default_rng(4)
    y_true, y_prob = (rng.random((30, 3)) < 0.1).astype(int), np.round(rng.random((30, 3)), 1)
    if family == "classes":
        y_true = rng.integers(3, size=30)
    names = ["a", "b", "c"]
    every = plain_resamples(y_true, y_prob, 60, 5, lambda t, p: metrics.scores(family, t, p, names))
    got = metrics.bootstrap_intervals(family, y_true, y_prob, n_resamples=60, seed=5, labels=names)
    left_out = 0
    for key, interval in got.items():
        values = np.array([one[key] for one in every])
        left_out += np.isnan(values).sum()
        close(interval, np.quantile(values[~np.isnan(values)], [0.025, 0.975]).tolist())
    assert set(got) == set(every[0])
    assert (left_out > 0) == (family in ("per label", "auc"))  # resamples without a positive occurred


def test_bootstrap_covers_the_score_and_follows_the_seed():
    rng = np.random.default_rng(6)
    y_true = (rng.random((200, 8)) < 0.3).astype(int)
    y_prob = np.clip(0.3 * y_true + 0.7 * rng.random((200, 8)), 0, 1)
    first = metrics.bootstrap_intervals("per label", y_true, y_prob)
    for key, value in metrics.compute_challenge_metrics(y_true, y_prob).items():
        assert first[key][0] < value < first[key][1]
    assert first == metrics.bootstrap_intervals("per label", y_true, y_prob)
    assert first != metrics.bootstrap_intervals("per label", y_true, y_prob, seed=1)


def test_bootstrap_of_a_score_undefined_everywhere_is_nan():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics.bootstrap_intervals("per label", np.zeros((9, 2)), np.full((9, 2), 0.2), n_resamples=20)
        pair = [[0, 1], [0, 0]] * 9, [[0.2, 0.7], [0.6, 0.1]] * 9
        labels = metrics.bootstrap_intervals("each label", *pair, n_resamples=20)
    assert np.isnan(got["auc"]).all() and np.isnan(got["kappa"]).all() and got["f1"] == [0, 0]
    assert np.isnan(labels["auc"][0]).all() and labels["auc"][1] == [1, 1]


# ---------------------------------------------------------------- patients with several rows


def plain_patients(patients, count, seed):
    """Rows of each resample, as one writes it first: draw patients, take all rows of each."""
    names = list(dict.fromkeys(patients))
    drawn = np.random.default_rng(seed).integers(len(names), size=(count, len(names)))
    rows_of = {name: np.flatnonzero(np.asarray(patients) == name) for name in names}
    return [np.concatenate([rows_of[names[i]] for i in one]) for one in drawn]


@pytest.mark.parametrize("family", OF_ALL)
@pytest.mark.parametrize("chunk", [100, metrics.CHUNK])
def test_bootstrap_draws_patients_with_all_their_rows(family, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    rng = np.random.default_rng(14)
    y_true, y_prob = (rng.random((30, 3)) < 0.4).astype(int), np.round(rng.random((30, 3)), 1)
    if family == "classes":
        y_true = rng.integers(3, size=30)
    patients = [
        f"p{number}" for number in rng.integers(12, size=30)
    ]  # one to several rows each, not in order
    names = ["a", "b", "c"]
    every = [
        metrics.scores(family, y_true[rows], y_prob[rows], names) for rows in plain_patients(patients, 60, 5)
    ]
    got = metrics.bootstrap_intervals(family, y_true, y_prob, 60, 5, patients, labels=names)
    assert set(got) == set(every[0])
    for key, interval in got.items():
        values = np.array([one[key] for one in every])
        close(interval, np.quantile(values[~np.isnan(values)], [0.025, 0.975]).tolist())


def test_rows_that_are_patients_are_drawn_as_ever():
    rng = np.random.default_rng(15)
    y_true, y_prob = (rng.random((50, 4)) < 0.3).astype(int), rng.random((50, 4))
    plain = metrics.bootstrap_intervals("per label", y_true, y_prob, 50)
    for patients in (np.arange(50), rng.permutation(50), [f"patient {i * 37 % 50}" for i in range(50)]):
        assert metrics.bootstrap_intervals("per label", y_true, y_prob, 50, patients=patients) == plain
    close(plain["auc"], [0.41712246953927545, 0.5803221716808997])  # as before patients could be given
    close(plain["kappa"], [-0.10928716611893873, 0.08943944820211457])


def test_eyes_that_are_alike_have_the_interval_of_their_patients():
    rng = np.random.default_rng(16)
    y_true = rng.integers(3, size=300)
    y_prob = np.eye(3)[np.where(rng.random(300) < 0.6, y_true, rng.integers(3, size=300))]
    twice, owner = np.repeat(np.arange(300), 2), np.repeat(np.arange(300), 2)
    one = metrics.bootstrap_intervals("classes", y_true, y_prob)
    both = metrics.bootstrap_intervals("classes", y_true[twice], y_prob[twice], patients=owner)
    assert both == {key: pytest.approx(interval, abs=1e-12) for key, interval in one.items()}
    apart = metrics.bootstrap_intervals(
        "classes", y_true[twice], y_prob[twice]
    )  # too narrow by the root of two
    assert np.diff(apart["accuracy"]) == pytest.approx(np.diff(one["accuracy"]) / np.sqrt(2), rel=0.1)


def test_label_intervals_equal_scoring_every_resample():
    rng = np.random.default_rng(17)
    y_true, y_prob = (rng.random((40, 3)) < 0.2).astype(int), np.round(rng.random((40, 3)), 1)
    patients, threshold = np.arange(40) // 2, [0.5, 0.3, 0.7]
    got = metrics.bootstrap_intervals("each label", y_true, y_prob, 50, 3, patients, threshold=threshold)
    every = [each_label(y_true[rows], y_prob[rows], threshold) for rows in plain_patients(patients, 50, 3)]
    assert {"kappa", "f1", "auc"} <= set(got) and set(got["f1"][0]) != {0.0}
    for key in ("kappa", "f1", "auc"):
        for label in range(3):
            values = np.array([one[key][label] for one in every])
            close(got[key][label], np.quantile(values[~np.isnan(values)], [0.025, 0.975]).tolist())


def test_paired_bootstrap_equals_scoring_every_resample_twice():
    rng = np.random.default_rng(18)
    y_true = (rng.random((60, 3)) < 0.3).astype(int)
    prob_a, prob_b = rng.random((60, 3)), np.clip(0.4 * y_true + 0.6 * rng.random((60, 3)), 0, 1)
    patients = np.arange(60) // 2
    for threshold in (0.4, [0.6, 0.5, 0.3]):
        rules = {"threshold": threshold}
        got = metrics.paired_bootstrap("per label", y_true, prob_a, prob_b, 50, 3, patients, **rules)
        whole_a = metrics.scores("per label", y_true, prob_a, **rules)
        whole_b = metrics.scores("per label", y_true, prob_b, **rules)
        drawn = plain_patients(patients, 50, 3)
        first = [metrics.scores("per label", y_true[rows], prob_a[rows], **rules) for rows in drawn]
        second = [metrics.scores("per label", y_true[rows], prob_b[rows], **rules) for rows in drawn]
        assert set(got) == set(whole_a)
        for key, found in got.items():
            close(found["difference"], whole_b[key] - whole_a[key])
            values = np.array([b[key] - a[key] for a, b in zip(first, second, strict=True)])
            ends = np.quantile(values[~np.isnan(values)], [0.025, 0.975]).tolist()
            close([found["low"], found["high"]], ends)
    assert got["auc"]["low"] > 0  # b is better
    same = metrics.paired_bootstrap("challenge", y_true, prob_a, prob_a)
    assert same["final"] == {"difference": 0, "low": 0, "high": 0}


def test_paired_differences_of_classes_and_knees():
    rng = np.random.default_rng(19)
    grades, prob_a, prob_b = rng.integers(3, size=40), rng.random((40, 3)), rng.random((40, 3))
    got = metrics.paired_bootstrap("classes", grades, prob_a, prob_b, ordered=False)
    assert set(got) == {"accuracy", "kappa", "f1"} and got["kappa"]["low"] < got["kappa"]["high"]
    got = metrics.paired_bootstrap("auc", np.eye(3)[grades], prob_a, prob_b, labels=["a", "b", "c"])
    assert set(got) == {"auc_a", "auc_b", "auc_c", "auc"}


def test_pairing_is_narrower_than_two_intervals():
    rng = np.random.default_rng(20)
    y_true = (rng.random((200, 4)) < 0.3).astype(int)
    prob_a = np.clip(0.3 * y_true + 0.7 * rng.random((200, 4)), 0, 1)
    prob_b = np.clip(prob_a + 0.02 * rng.standard_normal((200, 4)), 0, 1)
    paired = metrics.paired_bootstrap("per label", y_true, prob_a, prob_b)["auc"]
    alone = metrics.bootstrap_intervals("per label", y_true, prob_a)["auc"]
    assert paired["high"] - paired["low"] < (alone[1] - alone[0]) / 2


# ---------------------------------------------------------------- a threshold for each label


def test_a_threshold_for_each_label():
    y_true, y_prob = random_case(np.random.default_rng(8))
    cuts = np.linspace(0.2, 0.8, y_true.shape[1])
    each = each_label(y_true, y_prob, cuts)
    for label, cut in enumerate(cuts):
        one = each_label(y_true, y_prob.astype(float), float(cut))
        close({key: each[key][label] for key in each}, {key: one[key][label] for key in one})
    hard = np.where(y_prob > cuts, y_prob / 2 + 0.5, y_prob / 2)  # the same answers at 0.5
    for family in ("per label", "challenge"):
        shifted = metrics.scores(family, y_true, y_prob, threshold=cuts.tolist())
        assert shifted["kappa"] == metrics.scores(family, y_true, hard)["kappa"]
        assert shifted["f1"] == metrics.scores(family, y_true, hard)["f1"]
        assert shifted["auc"] == metrics.scores(family, y_true, y_prob)["auc"]
        same = np.full(len(cuts), 0.5)
        assert metrics.scores(family, y_true, y_prob, threshold=same) == metrics.scores(
            family, y_true, y_prob
        )
    trivial = metrics.trivial_scores(y_true, np.full(len(cuts), 0.5), "challenge", threshold=cuts)[
        "class priors"
    ]
    assert trivial["f1"] == np.mean((cuts < 0.5) == y_true)


def test_undefined_scores_follow_the_threshold_of_each_label():
    y_true, y_prob = np.zeros((3, 2)), np.full((3, 2), 0.4)
    y_true[0] = 1
    y_true[:, 1] = 0
    kappas = [
        line
        for line in metrics.undefined_scores(y_true, y_prob, ["a", "b"], threshold=[0.3, 0.3])
        if "kappa" in line
    ]
    assert kappas == []
    kappas = [
        line
        for line in metrics.undefined_scores(y_true, y_prob, ["a", "b"], threshold=[0.3, 0.5])
        if "kappa" in line
    ]
    assert kappas == ["kappa of b: truth and prediction are all 0 among 3 rows"]


def brute_thresholds(y_true, y_prob):
    """Every cut of every label by scikit-learn -> (gain of every cut, cuts) per label; None for one class."""
    found = []
    for label in range(y_true.shape[1]):
        truth, prob = y_true[:, label], y_prob[:, label].astype(np.float64)
        if truth.min() == truth.max():
            found.append(None)
            continue
        levels = np.unique(np.concatenate([[0.0], prob, [1.0]]))
        # Neighbours, and 1 where nothing is to be predicted. Between 0 and the lowest all is predicted.
        cuts = np.append((levels[:-1] + levels[1:]) / 2, 1.0)
        gains = []
        for cut in cuts:
            predicted = prob > cut
            kappa = quiet(sk.cohen_kappa_score, truth, predicted) / y_true.shape[1]
            gains.append(kappa + sk.f1_score(truth, predicted, zero_division=0) * truth.sum() / y_true.sum())
        found.append((np.array(gains), cuts))
    return found


def check_thresholds(y_true, y_prob):
    learned = metrics.learned_thresholds(y_true, y_prob)
    assert learned.dtype == np.float64 and learned.shape == (y_true.shape[1],)
    for label, (cut, brute) in enumerate(zip(learned, brute_thresholds(y_true, y_prob), strict=True)):
        if brute is None:
            assert cut == 0.5
            continue
        gains, cuts = brute
        best = cuts[gains >= gains.max() - 1e-12]
        # What is predicted is what counts: the outermost cuts may stand elsewhere.
        prob = y_prob[:, label].astype(np.float64)
        assert any(((prob > cut) == (prob > other)).all() for other in best)
        inner = best[(best > prob.min()) & (best < prob.max())]
        if len(inner) == len(best):
            assert abs(cut - 0.5) == pytest.approx(abs(best - 0.5).min(), abs=1e-15)
            assert cut in best
    return learned


def test_learned_thresholds_against_brute_force():
    rng, kept = np.random.default_rng(21), 0
    for _ in range(10):
        y_true, y_prob = random_case(rng)
        learned = check_thresholds(y_true, y_prob)
        kept += (learned == 0.5).sum()
        final = metrics.compute_challenge_metrics(y_true, y_prob, learned)
        plain = metrics.compute_challenge_metrics(y_true, y_prob)
        if not np.isnan(plain["kappa"]) and not np.isnan(final["kappa"]):
            assert final["kappa"] + final["f1"] >= plain["kappa"] + plain["f1"] - 1e-9
    assert kept > 5  # labels of one class occurred


def test_learned_thresholds_by_hand():
    # Label 1 is parted by all of .3 to .6. Label 2 is best where all are predicted. Nobody has label 3.
    y_true = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    y_prob = np.array([[0.9, 0.1, 0.2], [0.6, 0.4, 0.2], [0.3, 0.2, 0.2], [0.2, 0.3, 0.2]])
    assert metrics.learned_thresholds(y_true, y_prob).tolist() == pytest.approx([0.45, 0.05, 0.5])
    # A tie. The first one: kappa .4 / 3 + F1 2 / 3; all three: kappa 0 + F1 4 / 5. Both are 0.8.
    y_true = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0]])
    for column, nearest in (([0.9, 0.6, 0.3], 0.75), ([0.99, 0.9, 0.7], 0.35)):
        y_prob = np.repeat(np.array(column)[:, None], 3, axis=1)
        assert metrics.learned_thresholds(y_true, y_prob).tolist() == pytest.approx([nearest, 0.5, 0.5])
    # Adjacent numbers: the midpoint rounds to one of them, the answer must not.
    low = np.nextafter(np.float64(0.5), 0)
    for pair in ([low, 0.5], [0.5, np.nextafter(0.5, 1)]):
        cut = metrics.learned_thresholds([[0], [1]], np.array(pair)[:, None])
        assert each_label([[0], [1]], np.array(pair)[:, None], cut)["f1"] == [1]
    # float32 probabilities, compared as they are: the cut parts them still.
    pair = np.array([[0.3], [np.nextafter(np.float32(0.3), np.float32(1))]], np.float32)
    assert each_label([[0], [1]], pair, metrics.learned_thresholds([[0], [1]], pair))["f1"] == [1]


def test_where_every_prediction_is_wrong_nothing_is_predicted():
    # No threshold in 0-1 predicts the one positive, so every cut but the last has a kappa below 0 and F1 0.
    y_true = np.array([[1]] + [[0]] * 99)
    y_prob = np.linspace(0, 1, 100)[:, None]
    assert metrics.learned_thresholds(y_true, y_prob).tolist() == [1]
    # One number up it can be predicted: all are, with kappa 0 and F1 2 / 101.
    cut = metrics.learned_thresholds(y_true, y_prob + 0.01 * (y_prob == 0))
    assert cut.tolist() == pytest.approx([0.005])


# ---------------------------------------------------------------- calibration


def test_calibration_by_hand():
    # Two bins: .2, .4, .5: mean 1.1 / 3, and one of three is there; .9, .9: mean .9, and one of two is there.
    y_true, y_prob = np.array([[0], [1], [0], [1], [0]]), np.array([[0.2], [0.4], [0.5], [0.9], [0.9]])
    confidence, accuracy, count = metrics.reliability(y_true, y_prob, 2)
    assert count.tolist() == [3, 2]  # (low, high]: .5 belongs to the first
    close(confidence.tolist(), [1.1 / 3, 0.9])
    close(accuracy.tolist(), [1 / 3, 0.5])
    close(metrics.expected_calibration_error(y_true, y_prob, 2), 3 / 5 * (0.1 / 3) + 2 / 5 * 0.4)
    # Classes: only the top one counts. .6 right, .8 wrong, .8 right.
    y_prob = np.array([[0.6, 0.4], [0.2, 0.8], [0.2, 0.8]])
    close(metrics.expected_calibration_error([0, 0, 1], y_prob, 2), abs(2 / 3 - 2.2 / 3))
    confidence, accuracy, count = metrics.reliability([0, 0, 1], y_prob, 10)
    assert count.tolist() == [0, 0, 0, 0, 0, 1, 0, 2, 0, 0] and np.isnan(confidence[[0, 4, 6]]).all()
    assert accuracy[5] == 1 and accuracy[7] == 0.5
    assert metrics.expected_calibration_error([[0, 1]], [[0.0, 1.0]]) == 0  # the ends belong to a bin


def test_calibration_parity_with_scikit_learn():
    rng = np.random.default_rng(23)
    for _ in range(30):
        y_true, y_prob = random_case(rng)
        bins = int(rng.integers(1, 20))
        confidence, accuracy, count = metrics.reliability(y_true, y_prob, bins)
        assert confidence.shape == accuracy.shape == count.shape == (bins,) and count.sum() == y_true.size
        theirs = calibration_curve(y_true.ravel(), y_prob.ravel().astype(float), n_bins=bins)
        close(accuracy[count > 0].tolist(), theirs[0].tolist())
        close(confidence[count > 0].tolist(), theirs[1].tolist())
        gap = np.abs(theirs[0] - theirs[1])
        close(
            metrics.expected_calibration_error(y_true, y_prob, bins),
            float((gap * count[count > 0]).sum() / y_true.size),
        )


def test_probabilities_that_are_right_are_calibrated_and_sure_ones_are_not():
    rng = np.random.default_rng(24)
    y_prob = rng.random((20_000, 4))
    y_true = rng.random((20_000, 4)) < y_prob
    assert metrics.expected_calibration_error(y_true, y_prob) < 0.01
    assert metrics.expected_calibration_error(y_true, (y_prob > 0.5).astype(float)) == pytest.approx(
        0.25, abs=0.01
    )


def test_classes_that_are_no_grades_have_no_quadratic_kappa():
    grades, y_prob = [0, 0, 1, 2], np.eye(3)[[0, 1, 1, 0]]
    whole = metrics.scores("classes", grades, y_prob)
    found = metrics.scores("classes", grades, y_prob, ordered=False)
    assert list(whole) == ["accuracy", "kappa", "quadratic_kappa", "f1"] and list(found) == [
        "accuracy",
        "kappa",
        "f1",
    ]
    assert found == {key: whole[key] for key in found}
    assert set(metrics.bootstrap_intervals("classes", grades, y_prob, 9, ordered=False)) == set(found)
    assert set(
        metrics.trivial_scores(grades, [0.5, 0.3, 0.2], "classes", ordered=False)["largest class"]
    ) == set(found)


def test_trivial_answers_of_classes_and_knees():
    got = metrics.trivial_scores([0, 1, 1, 2], [0.2, 0.5, 0.3], "classes")["largest class"]
    assert got["accuracy"] == 0.5 and got["kappa"] == 0 and got["f1"] == pytest.approx((2 / 3) / 3)
    got = metrics.trivial_scores([[0, 1], [1, 0]], [0.2, 0.5], "auc", ["acl", "meniscus"])
    assert got == {"class priors": {"auc_acl": 0.5, "auc_meniscus": 0.5, "auc": 0.5}}


def test_trivial_answers():
    y_true = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    got = metrics.trivial_scores(y_true, [0.75, 0.25], "challenge")
    # The priors predict label 1 for all: 3 + 3 of 8 cells right; 3 of 4 positives above 3 of 4 negatives.
    assert got["all zeros"]["f1"] == 0.5 and got["all zeros"]["kappa"] == 0 and got["all zeros"]["auc"] == 0.5
    assert got["class priors"]["f1"] == 0.75
    close(got["class priors"]["auc"], (3 * (3 + 0.5) + 1 * 1.5) / 16)
    each = metrics.trivial_scores(y_true, [0.75, 0.25], "per label")
    assert each["class priors"]["auc"] == 0.5 and each["all zeros"]["f1"] == 0


@pytest.mark.parametrize(
    "y_true, y_prob, message",
    [
        ([[1, 0]], [[0.5, 0.5], [0.1, 0.2]], r"\(1, 2\).*\(2, 2\)"),
        ([1, 0], [0.5, 0.5], r"\(2,\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), r"\(0, 2\)"),
        ([[1, 0], [0, 1]], [[0.5, np.nan], [0.1, 0.2]], "1 values .* nan in row 0"),
        ([[1, 0], [0, 1]], [[0.5, 0.5], [1.5, -0.2]], "2 values .* 1.5 in row 1"),
        ([[1, 0], [0, 2]], [[0.5, 0.5], [0.1, 0.2]], "0 to 1: 1 values .* 2 in row 1"),
        ([[1, 0], [0, 0.5]], [[0.5, 0.5], [0.1, 0.2]], "0.5 in row 1"),
        ([[1, 0], [0, np.nan]], [[0.5, 0.5], [0.1, 0.2]], "nan in row 1"),
        ([["1", "0"]], [[0.5, 0.5]], "must hold numbers"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(y_true, y_prob, message):
    for function in (metrics.compute_challenge_metrics, metrics.challenge_scores, each_label):
        with pytest.raises(InputError, match=message):
            function(y_true, y_prob)
    with pytest.raises(InputError, match=message):
        metrics.bootstrap_intervals("challenge", y_true, y_prob)


def test_other_bad_input():
    good = np.array([[1, 0], [0, 1]]), np.array([[0.5, 0.5], [0.1, 0.9]])
    for call, message in [
        (lambda: metrics.scores("classes", [0, 2], good[1]), "0 to 1: 1 values .* 2 in row 1"),
        (lambda: metrics.scores("classes", [0, 1, 1], good[1]), r"\(3,\)"),
        (lambda: metrics.scores("challenges", *good), "'challenges'"),
        (lambda: metrics.trivial_scores(good[0], [0.5], "challenge"), r"\(2, 1\)"),
        (lambda: metrics.challenge_scores(*good, threshold=[0.5, 0.5, 0.5]), "threshold .* 2"),
        (lambda: each_label(*good, threshold=[0.5, np.nan]), "threshold .* 2"),
        (lambda: metrics.paired_bootstrap("challenge", *good, np.ones((3, 2))), r"\(2, 2\).*\(3, 2\)"),
        (lambda: metrics.learned_thresholds(good[0], good[1] * 3), "1.5 in row 0"),
        (lambda: metrics.expected_calibration_error([0, 2], good[1]), "0 to 1: 1 values .* 2 in row 1"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_nothing_slow_is_imported():
    code = (
        "import sys, metrics; print([name for name in ('sklearn', 'pandas', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(metrics.__file__).parent,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="needs the official annotations (REAL_DATA)")
def test_trivial_answers_on_the_published_validation_part():
    import pandas as pd
    from sklearn.model_selection import train_test_split

    table = pd.read_excel(Path(os.environ["REAL_DATA"]) / "odir" / "annotations.xlsx")
    table = table[~table["ID"].isin([*range(2174, 2183), 2957])]
    train, val = train_test_split(table, test_size=0.2, random_state=42)
    assert (len(train), len(val), val["ID"].tolist()[:4]) == (2792, 698, [296, 4308, 4556, 1710])
    got = metrics.trivial_scores(val[LABELS], train[LABELS].mean(), "challenge")
    assert round(got["all zeros"]["f1"], 4) == 0.8524 and got["all zeros"]["kappa"] == 0
    assert [round(got["class priors"][key], 3) for key in ("auc", "kappa", "final")] == [0.749, 0, 0.534]


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="needs the official annotations (REAL_DATA)")
def test_thresholds_of_the_published_labels():
    import pandas as pd

    table = pd.read_excel(Path(os.environ["REAL_DATA"]) / "odir" / "annotations.xlsx")
    y_true = table[LABELS].to_numpy()
    rng = np.random.default_rng(25)
    y_prob = np.clip(y_true.mean(axis=0) + 0.2 * y_true + 0.15 * rng.standard_normal(y_true.shape), 0, 1)
    learned = check_thresholds(y_true, np.round(y_prob, 2))
    assert (learned[3:7] < 0.4).all()  # rare labels
    learned = metrics.learned_thresholds(y_true[::2], y_prob[::2])
    other = metrics.compute_challenge_metrics(y_true[1::2], y_prob[1::2], learned)
    plain = metrics.compute_challenge_metrics(y_true[1::2], y_prob[1::2])
    assert other["final"] > plain["final"] + 0.05 and other["auc"] == plain["auc"]
