"""Every score as a pure function: arrays in, Python floats out (numpy only, so training starts fast).

    python -c "import metrics; print(metrics.challenge_scores([[0, 1], [1, 0]], [[.2, .9], [.7, .4]]))"

Definitions: scikit-learn's, Cohen (1960) for kappa, the ODIR-5K challenge's own script. An undefined score
(0/0: one class only) is NaN, makes its means NaN and is named by `undefined_scores`; F1 is 0, as published.
All is computed from weights, how often each row counts, so an interval has the formula of its score.
n rows (pairs, photographs, exams), L labels, K classes, B resamples; `threshold` is a number, or (L,)."""

import itertools
import math

import numpy as np

from errors import InputError

FAMILIES = ("per label", "challenge", "classes", "auc", "each label")  # never under one name
CHUNK = 4_000_000  # cells of one block of resamples: 32 MB, whatever the number of rows


def compute_challenge_metrics(y_true, y_prob, threshold=0.5):
    """{"kappa", "f1", "auc", "final"} of y_true (n, L) 0/1 and y_prob (n, L); predicted: y_prob > threshold.
    kappa: unweighted mean over labels; f1, auc: scikit-learn's average="weighted"; final: mean of the three.
    A label of one class has no AUC: auc and final are NaN (scikit-learn skips a label that nobody has)."""
    return scores("per label", y_true, y_prob, threshold=threshold)


def challenge_scores(y_true, y_prob, threshold=0.5):
    """The same keys of the flattened matrix (ODIR-5K challenge); f1 is micro F1, which is cell accuracy."""
    return scores("challenge", y_true, y_prob, threshold=threshold)


def scores(family, y_true, y_prob, labels=None, threshold=0.5, ordered=True):
    """Scores of one of FAMILIES: as above; "auc" (knees): {"auc_<label>" of all `labels`, "auc": their mean};
    "classes" (y_true (n,), by argmax): {"accuracy", "kappa", "quadratic_kappa" (ordered), "f1": macro};
    "each label": {"kappa", "f1", "auc", "accuracy", "support" in rows}, lists of L floats."""
    tables = _tables(family, y_true, y_prob, labels, threshold, ordered)
    return {key: value[0].tolist() for key, value in _weigh(tables, np.ones((1, len(y_true)))).items()}


def undefined_scores(y_true, y_prob, labels, family="per label", threshold=0.5):
    """What is NaN in `scores` and why, in words: ["auc of glaucoma: only one class among 12 rows"]."""
    y_true, y_prob, predicted = _checked(family, y_true, y_prob, threshold)
    if family in ("challenge", "classes"):  # one score over everything
        y_true, predicted = y_true.reshape(-1, 1), predicted.reshape(-1, 1)
        labels = ["all classes"] if family == "classes" else ["all labels"]
    among = f"among {len(y_true)} {'cells' if family == 'challenge' else 'rows'}"
    found = []
    for label, truth, prediction in zip(labels, y_true.T, predicted.T, strict=True):
        one_class = (truth == truth[0]).all()
        if one_class and family != "classes":
            found.append(f"auc of {label}: only one class {among}")
        if one_class and family != "auc" and (prediction == truth[0]).all():
            found.append(f"kappa of {label}: truth and prediction are all {int(truth[0])} {among}")
    return found


def trivial_scores(y_true, prior, family, labels=None, **rules):
    """Scores of what needs no picture: {"all zeros": {...} (eye pairs), "class priors": {...}}.
    The latter answers `prior` (L,), the labels' shares of the training part; classes: "largest class"."""
    prior, shape = np.asarray(prior, dtype=np.float64), (len(y_true), len(prior))
    answers = {"all zeros": np.zeros(len(prior))} if family in ("per label", "challenge") else {}
    answers["largest class" if family == "classes" else "class priors"] = prior
    for name, answer in answers.items():
        answers[name] = scores(family, y_true, np.broadcast_to(answer, shape), labels, **rules)
    return answers


def bootstrap_intervals(family, y_true, y_prob, n_resamples=1000, seed=0, patients=None, **rules):
    """{score: [low, high]}, 95 %, percentile bootstrap (Efron 1979); rules: `scores`' labels, threshold,
    ordered. `patients` (n,) are drawn with all their rows, for two eyes are alike. NaN: so in every draw."""
    tables = _tables(family, y_true, y_prob, **rules)
    resamples = _resamples(tables["shape"], n_resamples, seed, patients)
    return _intervals([_weigh(tables, weights) for weights in resamples])


def paired_bootstrap(family, y_true, prob_a, prob_b, n_resamples=1000, seed=0, patients=None, **rules):
    """{score: {"difference": b - a, "low", "high": 95 %}}, with the same draws for both."""
    pair = [_tables(family, y_true, prob, **rules) for prob in (prob_a, prob_b)]
    blocks, resamples = [], _resamples(pair[0]["shape"], n_resamples, seed, patients)
    for weights in itertools.chain([np.ones((1, len(y_true)))], resamples):
        a, b = (_weigh(tables, weights) for tables in pair)
        blocks.append({key: b[key] - a[key] for key in a})
    whole, ends = blocks[0], _intervals(blocks[1:])  # the first block is of all rows once
    return {key: dict(difference=float(whole[key][0]), low=ends[key][0], high=ends[key][1]) for key in ends}


def learned_thresholds(y_true, y_prob):
    """Thresholds (L,) float64 with the highest "per label" final score; to be learned on training rows.
    A label adds kappa / L + f1 * support / all supports, so each is maximised alone, over all midpoints of
    neighbouring distinct probabilities; ties: closest to 0.5. One class: 0.5."""
    y_true, y_prob, _ = _checked("per label", y_true, y_prob)
    n, support, thresholds = len(y_true), y_true.sum(axis=0), np.full(y_true.shape[1], 0.5)
    predicted = np.arange(n + 1)  # how many every cut predicts: the k highest
    for label in np.flatnonzero((support > 0) & (support < n)):
        order, positive = np.argsort(y_prob[:, label])[::-1], support[label]
        prob = np.concatenate([[2.0], y_prob[order, label], [0.0]])
        below = np.nextafter(prob[:-1], 0)  # a midpoint may round up to its neighbour
        cuts = np.minimum((prob[:-1] + prob[1:]) / 2, below).clip(max=1)
        both = np.append(0, np.cumsum(y_true[order, label]))
        chance = predicted * (n - positive) + positive * (n - predicted)
        kappa = 2 * (n * both - predicted * positive) / chance
        gain = kappa / len(support) + 2 * both / (predicted + positive) * positive / support.sum()
        gain[prob[:-1] == prob[1:]] = -np.inf  # no threshold parts equal probabilities
        best = cuts[gain >= gain.max() - 1e-12]  # equal scores may differ in their last bits
        thresholds[label] = best[np.argmin(np.abs(best - 0.5))]
    return thresholds


def reliability(y_true, y_prob, bins=15):
    """(confidence, accuracy, count), (bins,) each, of equal bins (low, high]; NaN where empty. y_true (n, L):
    every cell; (n,): the top class (Guo et al. 2017, "On Calibration of Modern Neural Networks")."""
    y_true, y_prob, top = _checked("classes" if np.ndim(y_true) == 1 else "challenge", y_true, y_prob)
    if y_true.ndim == 1:
        y_true, y_prob = top == y_true, y_prob.max(axis=1)
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], y_prob.ravel())
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, values.ravel(), minlength=bins) for values in (y_prob, y_true))
    return *(_ratio(one, count) for one in sums), count


def expected_calibration_error(y_true, y_prob, bins=15):
    """ECE (Guo et al. 2017): |accuracy - confidence| of `reliability`, bins weighted by their counts."""
    confidence, accuracy, count = reliability(y_true, y_prob, bins)
    return float(np.nansum(np.abs(accuracy - confidence) * count) / count.sum())


def _checked(family, y_true, y_prob, threshold=0.5):
    """y_true (n, L) bool, or (n,) int64 for "classes"; y_prob as given; what is predicted, shaped as y_true.
    A number as the threshold is compared in y_prob's precision, an array in float64."""
    y_true, y_prob, classes = np.asarray(y_true), np.asarray(y_prob), family == "classes"
    if family not in FAMILIES:
        raise InputError(f"score family {family!r} must be one of {FAMILIES}")
    shape, wanted = (y_prob.shape[:1], "(n,), (n, K)") if classes else (y_prob.shape, "(n, labels), the same")
    numbers = y_true.dtype.kind in "biuf" and y_prob.dtype.kind in "biuf"
    if y_prob.ndim != 2 or not y_prob.size or y_true.shape != shape or not numbers:
        given = f"y_true {y_true.shape} {y_true.dtype} and y_prob {y_prob.shape} {y_prob.dtype}"
        raise InputError(f"for {family!r}, {given} must hold numbers, {wanted}, and not be empty")
    top = y_prob.shape[1] - 1 if classes else 1
    rules = {f"y_true must be whole, 0 to {top}": (y_true, np.isin(y_true, np.arange(top + 1)))}
    rules["y_prob must be 0-1"] = y_prob, (y_prob >= 0) & (y_prob <= 1)  # NaN is neither
    for rule, (values, right) in rules.items():
        if not right.all():
            at = tuple(np.argwhere(~right)[0].tolist())
            raise InputError(f"{rule}: {(~right).sum()} values are not, as {values[at]} in row {at[0]}")
    if classes:
        return y_true.astype(np.int64), y_prob, np.argmax(y_prob, axis=1)
    threshold = np.asarray(threshold, dtype=np.float64) if np.ndim(threshold) else float(threshold)
    if np.ndim(threshold) and (threshold.shape != y_prob.shape[1:] or np.isnan(threshold).any()):
        raise InputError(f"threshold {threshold} must be a number, or {y_prob.shape[1]}: one a label")
    return y_true.astype(bool), y_prob, y_prob > threshold


def _tables(family, y_true, y_prob, labels=None, threshold=0.5, ordered=True):
    """What the weights do not change, done once for any number of resamples."""
    y_true, y_prob, predicted = _checked(family, y_true, y_prob, threshold)
    tables = {"family": family, "shape": y_prob.shape, "labels": labels, "ordered": ordered, "size": 1}
    if family == "classes":
        return {**tables, "cells": y_true * y_prob.shape[1] + predicted}
    counts = {"positive": y_true, "predicted": predicted, "both": y_true & predicted}
    if family == "challenge":  # flattened: a row is `size` cells of one column
        counts = {name: cells.sum(axis=1, keepdims=True) for name, cells in counts.items()}
        tables["size"] = y_prob.shape[1]
        y_true, y_prob = y_true.reshape(-1, 1), y_prob.reshape(-1, 1)
    ranks = []  # rows of positive and of negative cells; how many negatives each positive beats, and ties
    for truth, prob in zip(y_true.T, y_prob.T, strict=True):
        order = np.argsort(prob)
        negative, positive = order[~truth[order]], order[truth[order]]
        beaten = [np.searchsorted(prob[negative], prob[positive], side) for side in ("left", "right")]
        ranks.append((positive // tables["size"], negative // tables["size"], *beaten))
    return {**tables, **counts, "ranks": ranks}


def _resamples(shape, n_resamples, seed, patients):
    """How often each row counts, (b, n) float64, block by block: patients are drawn with all their rows."""
    numbers, names = {}, range(shape[0]) if patients is None else np.asarray(patients).tolist()
    owner = np.array([numbers.setdefault(name, len(numbers)) for name in names])  # in order of appearance
    rng, count, block = np.random.default_rng(seed), len(numbers), max(1, CHUNK // math.prod(shape))
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = rng.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield times.take(owner, axis=1).astype(np.float64)


def _intervals(blocks):
    """{key: [low, high], or L of them} of blocks of resamples {key: (b,) or (b, L)}."""
    intervals = {}
    for key in blocks[0]:
        values = np.concatenate([block[key] for block in blocks])
        nowhere = np.isnan(values).all(axis=0)  # numpy warns of quantiles of nothing
        ends = np.nanquantile(np.where(nowhere, 0, values), [(1 - 0.95) / 2, (1 + 0.95) / 2], axis=0)
        intervals[key] = np.where(nowhere, np.nan, ends).T.tolist()
    return intervals


def _weigh(tables, weights):
    """Scores {key: (B,)} of a family's tables under weights (B, n); of "each label" (B, L)."""
    if tables["family"] == "classes":
        size = tables["shape"][1]
        counts = [np.bincount(tables["cells"], one, minlength=size**2) for one in weights]
        matrix = np.reshape(counts, (-1, size, size))
        right = np.diagonal(matrix, axis1=1, axis2=2)  # (B, K)
        f1 = _ratio(2 * right, matrix.sum(axis=1) + matrix.sum(axis=2), undefined=0.0).mean(axis=1)
        found = {"accuracy": right.sum(axis=1) / matrix.sum(axis=(1, 2)), "kappa": _kappa(matrix)}
        if tables["ordered"]:
            found["quadratic_kappa"] = _kappa(matrix, power=2)
        return {**found, "f1": f1}
    if tables["family"] == "auc":
        auc = _auc(tables, weights)
        named = {f"auc_{label}": one for label, one in zip(tables["labels"], auc.T, strict=True)}
        return {**named, "auc": auc.mean(axis=1)}
    both, predicted, support = (weights @ tables[name] for name in ("both", "predicted", "positive"))
    total = weights.sum(axis=1, keepdims=True) * tables["size"]
    neither = total - predicted - support + both  # (B, L), or (B, 1) where the matrix is flattened
    matrix = np.stack([neither, predicted - both, support - both, both], axis=-1)
    kappa, auc = _kappa(matrix.reshape(*both.shape, 2, 2)), _auc(tables, weights)
    f1, accuracy = _ratio(2 * both, predicted + support, undefined=0.0), (both + neither) / total
    if tables["family"] == "each label":
        return {"kappa": kappa, "auc": auc, "f1": f1, "support": support, "accuracy": accuracy}
    if tables["family"] == "per label":
        f1 = _ratio((f1 * support).sum(axis=1), support.sum(axis=1), undefined=0.0)
        auc = _ratio((auc * support).sum(axis=1), support.sum(axis=1))
    else:
        f1, auc = accuracy[:, 0], auc[:, 0]
    kappa = kappa.mean(axis=1)
    return {"kappa": kappa, "f1": f1, "auc": auc, "final": (kappa + f1 + auc) / 3}


def _kappa(matrix, power=0):
    """Cohen's kappa (...) of confusion matrices (..., K, K); a disagreement costs |i - j| ** power."""
    distance = np.abs(np.arange(matrix.shape[-1])[:, None] - np.arange(matrix.shape[-1]))
    cost = (distance > 0) * distance.astype(np.float64) ** power
    rows, columns = matrix.sum(axis=-1), matrix.sum(axis=-2)
    expected = (cost * rows[..., :, None] * columns[..., None, :]).sum(axis=(-2, -1))
    return 1 - _ratio((cost * matrix).sum(axis=(-2, -1)) * rows.sum(axis=-1), expected)


def _auc(tables, weights):
    """Area under the ROC curve (B, L): weighted share of (positive, negative) pairs in order, ties half."""
    areas = []
    for positive, negative, beaten, tied in tables["ranks"]:
        below = np.zeros((len(weights), len(negative) + 1))
        np.cumsum(weights[:, negative], axis=1, out=below[:, 1:])
        gain = weights[:, positive]
        won = (gain * (below[:, beaten] + below[:, tied])).sum(axis=1) / 2
        areas.append(_ratio(won, gain.sum(axis=1) * below[:, -1]))
    return np.stack(areas, axis=1)


def _ratio(above, below, undefined=np.nan):
    return np.divide(above, below, out=np.full(below.shape, undefined), where=below != 0)
