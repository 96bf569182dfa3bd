"""Scores against hand-worked matrices, scikit-learn on thousands of random cases, and the published figures."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

import metrics
from errors import InputError

LABELS = list("NDGCAHMO")


def close(ours, theirs):
    assert ours == pytest.approx(theirs, abs=1e-12, rel=1e-12, nan_ok=True), (ours, theirs)


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def sk_auc(y_true, y_prob, weights=None):
    return sk.roc_auc_score(y_true, y_prob, sample_weight=weights) if 0 < y_true.sum() < len(y_true) else np.nan


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
    # Label a: truth 1 1 0 0, predicted 1 0 0 0: kappa 1 - .25 / .5, F1 2/3; the pairs (.6 and .4 over .4, .1): 3.5 / 4.
    # Label b: truth 1 0 0 0, predicted 1 1 0 0: kappa 1 - .25 / .5, F1 2/3; .9 over .8, .2, .2: 3 / 3.
    y_true = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    y_prob = np.array([[.6, .9], [.4, .8], [.4, .2], [.1, .2]])
    auc = (2 * 3.5 / 4 + 1 * 1) / 3
    close(metrics.compute_challenge_metrics(y_true, y_prob),
          {"kappa": .5, "f1": 2 / 3, "auc": auc, "final": (.5 + 2 / 3 + auc) / 3})
    each = metrics.per_label_scores(y_true, y_prob)
    close(each["precision"], [1, .5])
    close(each["recall"], [.5, 1])
    close(each["auc"], [3.5 / 4, 1])
    assert each["support"] == [2, 1]


def test_challenge_by_hand():
    # 8 cells: 3 positive, predicted 3 of which 2 right: accuracy 6/8, chance (3*3 + 5*5)/64, kappa (.75 - p)/(1 - p).
    # Positives .9 .6 .4 over .8 .4 .2 .2 .1: 5 + 4 + 3.5 of 15 pairs.
    y_true = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    y_prob = np.array([[.6, .9], [.4, .8], [.4, .2], [.1, .2]])
    chance = 34 / 64
    kappa, auc = (.75 - chance) / (1 - chance), 12.5 / 15
    close(metrics.challenge_scores(y_true, y_prob),
          {"kappa": kappa, "f1": .75, "auc": auc, "final": (kappa + .75 + auc) / 3})


def test_classes_by_hand():
    # Truth 0 0 1 2, predicted 0 1 1 0: chance (2*2 + 1*2 + 1*0) / 16; squared distances observed: 1 + 4.
    y_prob = np.eye(3)[[0, 1, 1, 0]]
    chance = (2 * 2 + 1 * 2 + 1 * 0) / 16
    expected = (2 * 2 * 1 + 1 * 2 * 1 + 1 * 2 * 4 + 1 * 2 * 1) / 4  # truth x prediction x distance squared
    close(metrics.compute_class_metrics([0, 0, 1, 2], y_prob),
          {"accuracy": .5, "kappa": (.5 - chance) / (1 - chance), "quadratic_kappa": 1 - 5 / expected,
           "f1": (.5 + 2 / 3 + 0) / 3})
    assert metrics.confusion_matrix([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_lists_frames_and_tensors_score_alike():
    import pandas as pd
    import torch
    y_true, y_prob = random_case(np.random.default_rng(8))
    for family in ("per label", "challenge"):
        one = [(metrics.scores(family, *pair), metrics.bootstrap_intervals(family, *pair, n_resamples=9))
               for pair in ([make(array) for array in (y_true, y_prob.astype(float))]
                            for make in (np.asarray, np.ndarray.tolist, pd.DataFrame, torch.from_numpy))]
        assert len(set(map(str, one))) == 1


def test_prediction_is_strictly_above_the_threshold():
    y_true, y_prob = [[1, 0], [0, 1]], [[.5, .4], [.2, .5]]
    assert metrics.challenge_scores(y_true, y_prob)["f1"] == .5
    assert metrics.challenge_scores(y_true, y_prob, threshold=.45)["f1"] == 1


def test_multilabel_parity_with_scikit_learn():
    rng, undefined = np.random.default_rng(0), 0
    for _ in range(90):
        y_true, y_prob = random_case(rng)
        ours = metrics.compute_challenge_metrics(y_true, y_prob)
        undefined += np.isnan(ours["auc"])
        close(ours, sk_per_label(y_true, y_prob))
        close(metrics.challenge_scores(y_true, y_prob), sk_challenge(y_true, y_prob))
        names = [str(i) for i in range(y_true.shape[1])]
        areas = [sk_auc(y_true[:, i], y_prob[:, i]) for i in range(y_true.shape[1])]
        close(metrics.compute_auc_metrics(y_true, y_prob, names),
              {**{f"auc_{name}": area for name, area in zip(names, areas, strict=True)}, "auc": np.mean(areas)})
        assert all(type(value) is float for value in ours.values())
    assert 10 < undefined < 80  # the sweep saw both


def test_each_label_parity_with_scikit_learn():
    rng = np.random.default_rng(1)
    for _ in range(40):
        y_true, y_prob = random_case(rng)
        each = metrics.per_label_scores(y_true, y_prob)
        for i in range(y_true.shape[1]):
            truth, prediction = y_true[:, i], y_prob[:, i] > .5
            close(each["kappa"][i], quiet(sk.cohen_kappa_score, truth, prediction))
            close(each["auc"][i], sk_auc(truth, y_prob[:, i]))
            close(each["f1"][i], sk.f1_score(truth, prediction, zero_division=0))
            close(each["precision"][i], sk.precision_score(truth, prediction, zero_division=np.nan))
            close(each["recall"][i], sk.recall_score(truth, prediction, zero_division=np.nan))
            assert each["support"][i] == truth.sum()


def test_class_parity_with_scikit_learn():
    rng = np.random.default_rng(2)
    for _ in range(150):
        n, size = int(rng.integers(1, 40)), int(rng.integers(2, 7))
        y_true = rng.integers(rng.integers(1, size + 1), size=n)
        y_prob = np.round(rng.random((n, size)), int(rng.integers(1, 9)))
        y_pred, names = y_prob.argmax(axis=1), range(size)
        close(metrics.compute_class_metrics(y_true, y_prob), {
            "accuracy": sk.accuracy_score(y_true, y_pred),
            "kappa": quiet(sk.cohen_kappa_score, y_true, y_pred, labels=names),
            "quadratic_kappa": quiet(sk.cohen_kappa_score, y_true, y_pred, labels=names, weights="quadratic"),
            "f1": sk.f1_score(y_true, y_pred, labels=names, average="macro", zero_division=0)})
        theirs = sk.confusion_matrix(y_true, y_pred, labels=names)
        assert (metrics.confusion_matrix(y_true, y_pred, size) == theirs).all()


def test_undefined_is_nan_and_named():
    y_true = np.array([[0, 1], [0, 0], [0, 1]])
    y_prob = np.array([[.1, .9], [.2, .3], [.6, .8]])
    found = metrics.compute_challenge_metrics(y_true, y_prob)
    assert np.isnan(found["auc"]) and np.isnan(found["final"]) and found["kappa"] == .5
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"]) == [
        "auc of glaucoma: only one class among 3 patients"]
    y_prob[2, 0] = .2
    assert np.isnan(metrics.compute_challenge_metrics(y_true, y_prob)["kappa"])
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"]) == [
        "auc of glaucoma: only one class among 3 patients",
        "kappa of glaucoma: truth and prediction are all 0 among 3 patients"]
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"], "auc") == [
        "auc of glaucoma: only one class among 3 patients"]
    assert metrics.undefined_scores(y_true, y_prob, ["glaucoma", "myopia"], "challenge") == []
    assert np.isnan(metrics.compute_auc_metrics(y_true, y_prob, ["a", "b"])["auc"])
    assert metrics.undefined_scores([1, 1], [[.2, .8], [.1, .9]], ["a", "b"], "classes") == [
        "kappa of all classes: truth and prediction are all 1 among 2 patients"]


def test_undefined_scores_names_exactly_what_is_nan():
    rng = np.random.default_rng(3)
    for _ in range(300):
        y_true, y_prob = random_case(rng)
        names = LABELS[:y_true.shape[1]]
        each = metrics.per_label_scores(y_true, y_prob)
        nan = {f"{key} of {name}" for key in ("auc", "kappa") for name, value in zip(names, each[key], strict=True)
               if np.isnan(value)}
        assert {line.split(":")[0] for line in metrics.undefined_scores(y_true, y_prob, names)} == nan


def plain_resamples(y_true, y_prob, count, seed, score):
    """The bootstrap as one writes it first: take the rows, score them."""
    drawn = np.random.default_rng(seed).integers(len(y_true), size=(count, len(y_true)))
    return [score(y_true[rows], y_prob[rows]) for rows in drawn]


@pytest.mark.parametrize("family", metrics.FAMILIES)
@pytest.mark.parametrize("chunk", [100, metrics.CHUNK])
def test_bootstrap_equals_scoring_every_resample(family, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    rng = np.random.default_rng(4)
    y_true, y_prob = (rng.random((30, 3)) < .1).astype(int), np.round(rng.random((30, 3)), 1)
    if family == "classes":
        y_true = rng.integers(3, size=30)
    names = ["a", "b", "c"]
    every = plain_resamples(y_true, y_prob, 60, 5, lambda t, p: metrics.scores(family, t, p, names))
    got = metrics.bootstrap_intervals(family, y_true, y_prob, n_resamples=60, seed=5, labels=names, level=.9)
    left_out = 0
    for key, interval in got.items():
        values = np.array([one[key] for one in every])
        left_out += np.isnan(values).sum()
        close(interval, np.quantile(values[~np.isnan(values)], [.05, .95]).tolist())
    assert set(got) == set(every[0])
    assert (left_out > 0) == (family in ("per label", "auc"))  # resamples without a positive occurred


def test_bootstrap_covers_the_score_and_follows_the_seed():
    rng = np.random.default_rng(6)
    y_true = (rng.random((200, 8)) < .3).astype(int)
    y_prob = np.clip(.3 * y_true + .7 * rng.random((200, 8)), 0, 1)
    first = metrics.bootstrap_intervals("per label", y_true, y_prob)
    for key, value in metrics.compute_challenge_metrics(y_true, y_prob).items():
        assert first[key][0] < value < first[key][1]
    assert first == metrics.bootstrap_intervals("per label", y_true, y_prob)
    assert first != metrics.bootstrap_intervals("per label", y_true, y_prob, seed=1)
    narrow = metrics.bootstrap_intervals("per label", y_true, y_prob, level=.5)
    assert first["final"][0] < narrow["final"][0] < narrow["final"][1] < first["final"][1]


def test_bootstrap_of_a_score_undefined_everywhere_is_nan():
    got = metrics.bootstrap_intervals("per label", np.zeros((9, 2)), np.full((9, 2), .2), n_resamples=20)
    assert np.isnan(got["auc"]).all() and np.isnan(got["kappa"]).all() and got["f1"] == [0, 0]


def test_trivial_answers_of_classes_and_knees():
    got = metrics.trivial_scores([0, 1, 1, 2], [0.2, 0.5, 0.3], "classes")["largest class"]
    assert got["accuracy"] == 0.5 and got["kappa"] == 0 and got["f1"] == pytest.approx((2 / 3) / 3)
    got = metrics.trivial_scores([[0, 1], [1, 0]], [0.2, 0.5], "auc", ["acl", "meniscus"])
    assert got == {"class priors": {"auc_acl": 0.5, "auc_meniscus": 0.5, "auc": 0.5}}


def test_trivial_answers():
    y_true = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
    got = metrics.trivial_scores(y_true, [.75, .25], "challenge")
    # The priors predict label 1 for everybody: 3 + 3 of 8 cells right; 3 of the 4 positives are above 3 of 4 negatives.
    assert got["all zeros"]["f1"] == .5 and got["all zeros"]["kappa"] == 0 and got["all zeros"]["auc"] == .5
    assert got["class priors"]["f1"] == .75
    close(got["class priors"]["auc"], (3 * (3 + .5) + 1 * 1.5) / 16)
    each = metrics.trivial_scores(y_true, [.75, .25], "per label")
    assert each["class priors"]["auc"] == .5 and each["all zeros"]["f1"] == 0


@pytest.mark.parametrize("y_true, y_prob, message", [
    ([[1, 0]], [[.5, .5], [.1, .2]], r"\(1, 2\).*\(2, 2\)"),
    ([1, 0], [.5, .5], r"\(2,\)"),
    (np.zeros((0, 2)), np.zeros((0, 2)), r"\(0, 2\)"),
    ([[1, 0], [0, 1]], [[.5, np.nan], [.1, .2]], "1 values .* nan in row 0"),
    ([[1, 0], [0, 1]], [[.5, .5], [1.5, -.2]], "2 values .* 1.5 in row 1"),
    ([[1, 0], [0, 2]], [[.5, .5], [.1, .2]], "0 to 1: 1 values .* 2 in row 1"),
    ([[1, 0], [0, .5]], [[.5, .5], [.1, .2]], "0.5 in row 1"),
    ([[1, 0], [0, np.nan]], [[.5, .5], [.1, .2]], "nan in row 1"),
    ([["1", "0"]], [[.5, .5]], "must hold numbers"),
])
def test_bad_input_is_refused_with_what_was_given(y_true, y_prob, message):
    for function in (metrics.compute_challenge_metrics, metrics.challenge_scores, metrics.per_label_scores):
        with pytest.raises(InputError, match=message):
            function(y_true, y_prob)
    with pytest.raises(InputError, match=message):
        metrics.bootstrap_intervals("challenge", y_true, y_prob)


def test_other_bad_input():
    good = np.array([[1, 0], [0, 1]]), np.array([[.5, .5], [.1, .9]])
    for call, message in [
        (lambda: metrics.compute_class_metrics([0, 2], good[1]), "0 to 1: 1 values .* 2 in row 1"),
        (lambda: metrics.compute_class_metrics([0, 1, 1], good[1]), r"\(3,\)"),
        (lambda: metrics.compute_auc_metrics(*good, ["a"]), "1 label names"),
        (lambda: metrics.scores("auc", *good), "labels"),
        (lambda: metrics.scores("challenges", *good), "'challenges'"),
        (lambda: metrics.bootstrap_intervals("challenge", *good, n_resamples=0), "n_resamples 0"),
        (lambda: metrics.bootstrap_intervals("challenge", *good, level=95), "level 95"),
        (lambda: metrics.trivial_scores(good[0], [.5], "challenge"), r"\(1,\)"),
        (lambda: metrics.trivial_scores(good[0], [.5, .5], "auc"), "labels"),
        (lambda: metrics.confusion_matrix([0, 3], [0, 1], 3), "0..2"),
        (lambda: metrics.confusion_matrix([0, 1], [0], 3), r"\(1,\)"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_nothing_slow_is_imported():
    code = "import sys, metrics; print([name for name in ('sklearn', 'pandas', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(metrics.__file__).parent)
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
