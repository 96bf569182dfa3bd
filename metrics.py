"""Every score as a pure function: arrays in, a dict of Python floats out (imports numpy only, so training starts fast).

    python -c "import metrics; print(metrics.compute_challenge_metrics([[0, 1], [1, 0]], [[.2, .9], [.7, .4]]))"

Four families, never under one name: "per label" and "challenge" (eye pairs), "classes" (one class a picture), "auc"
(knees). Definitions: scikit-learn's, Cohen (1960) for kappa, the ODIR-5K challenge's evaluation script for "challenge".
An undefined score (0/0: one class only) is NaN, makes every mean it enters NaN and is named by `undefined_scores`; only
F1 has the published zero_division=0. InputError: shapes that differ, no rows, y_true not 0/1, y_prob not in 0-1.

All is computed from weights, how often each patient counts: once for the score, as often as drawn for a bootstrap
resample, so an interval cannot come from another formula than its score. n patients, L labels, K classes, B resamples.
"""

import numpy as np

from errors import InputError

FAMILIES = ("per label", "challenge", "classes", "auc")
CHUNK = 4_000_000  # cells of one block of resamples: 32 MB, whatever the number of patients


def compute_challenge_metrics(y_true, y_prob, threshold=0.5):
    """{"kappa", "f1", "auc", "final"} per label of y_true (n, L) 0/1, y_prob (n, L); predicted where prob > threshold.

    kappa: unweighted mean of the labels' Cohen kappas; f1, auc: scikit-learn's average="weighted"; final: their mean.
    A label of one class has no AUC, so auc and final are NaN (scikit-learn passes over a label that nobody has).
    """
    return scores("per label", y_true, y_prob, threshold=threshold)


def challenge_scores(y_true, y_prob, threshold=0.5):
    """The same keys on the flattened (n, L) matrix (ODIR-5K challenge); f1 is micro F1, which is cell accuracy."""
    return scores("challenge", y_true, y_prob, threshold=threshold)


def compute_class_metrics(y_true, y_prob):
    """{"accuracy", "kappa", "quadratic_kappa", "f1": macro over all K} of y_true (n,) and y_prob (n, K), by argmax."""
    return scores("classes", y_true, y_prob)


def compute_auc_metrics(y_true, y_prob, labels):
    """{"auc_<label>" for each of the L labels, "auc": their mean} of y_true, y_prob (n, L)."""
    return scores("auc", y_true, y_prob, labels)


def scores(family, y_true, y_prob, labels=None, threshold=0.5):
    """The scores of one of FAMILIES, as above; "auc" names its scores after `labels`."""
    tables = _tables(family, y_true, y_prob, labels, threshold)
    return {key: float(value[0]) for key, value in _weigh(tables, np.ones((1, len(y_true)))).items()}


def per_label_scores(y_true, y_prob, threshold=0.5):
    """{"kappa", "f1", "auc", "precision", "recall" (0/0 is NaN), "support" in patients}: a list of L floats each."""
    tables = _tables("per label", y_true, y_prob, None, threshold)
    each = _label_scores(tables, np.ones((1, len(y_true))))
    return {key: each[key][0].tolist() for key in ("kappa", "f1", "auc", "precision", "recall", "support")}


def undefined_scores(y_true, y_prob, labels, family="per label", threshold=0.5):
    """What is NaN in `scores` and why, in words: ["auc of glaucoma: only one class among 12 patients"]."""
    y_true, y_prob = _checked(family, y_true, y_prob, labels)
    predicted = np.argmax(y_prob, axis=1) if family == "classes" else y_prob > threshold
    if family in ("challenge", "classes"):  # one score over everything
        y_true, predicted = y_true.reshape(-1, 1), predicted.reshape(-1, 1)
        labels = ["all labels" if family == "challenge" else "all classes"]
    found, among = [], f"among {len(y_true)} {'cells' if family == 'challenge' else 'patients'}"
    for label, truth, prediction in zip(labels, y_true.T, predicted.T, strict=True):
        if (truth == truth[0]).all():
            found += [f"auc of {label}: only one class {among}"] * (family != "classes")
            if family != "auc" and (prediction == truth[0]).all():
                found.append(f"kappa of {label}: truth and prediction are all {int(truth[0])} {among}")
    return found


def trivial_scores(y_true, prior, family, labels=None, threshold=0.5):
    """Scores of what needs no picture, by name: {"all zeros": {...}, "class priors": {...}}.

    "class priors" answers every patient with `prior` (L,), the labels' frequencies in the training part; for "classes",
    with y_true (n,) and prior (K,), that is always the largest class. "all zeros" stands for the eye pairs' families only.
    """
    y_true, prior = np.asarray(y_true), np.asarray(prior, dtype=np.float64)
    if prior.ndim != 1 or y_true.ndim == 2 and y_true.shape[1:] != prior.shape:
        raise InputError(f"prior {prior.shape} does not fit y_true {y_true.shape}")
    answers = {"all zeros": np.zeros(len(prior))} if family in FAMILIES[:2] else {}
    answers["largest class" if family == "classes" else "class priors"] = prior
    return {name: scores(family, y_true, np.broadcast_to(answer, (len(y_true), len(prior))), labels, threshold)
            for name, answer in answers.items()}


def bootstrap_intervals(family, y_true, y_prob, n_resamples=1000, seed=0, labels=None, level=0.95, threshold=0.5):
    """{score: [low, high]}: percentile bootstrap over patients, all labels of one together (Efron 1979); by seed.

    Resamples in which a score is undefined are left out of its interval; undefined in all, it is [NaN, NaN].
    """
    if n_resamples < 1 or not 0 < level < 1:
        raise InputError(f"n_resamples {n_resamples} must be 1 or more and level {level} between 0 and 1")
    tables, n = _tables(family, y_true, y_prob, labels, threshold), len(y_true)
    block, rng, blocks = max(1, CHUNK // np.asarray(y_prob).size), np.random.default_rng(seed), []
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = rng.integers(n, size=(size, n)) + np.arange(size)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        blocks.append(_weigh(tables, weights.astype(np.float64)))
    intervals = {}
    for key in blocks[0]:
        values = np.concatenate([part[key] for part in blocks])
        values = values[np.isfinite(values)] if np.isfinite(values).any() else [np.nan]
        intervals[key] = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return intervals


def confusion_matrix(y_true, y_pred, num_classes):
    """Counts (K, K) int64, truth in rows, prediction in columns, of y_true, y_pred (n,) whole numbers in 0..K-1."""
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    if y_true.shape != y_pred.shape or y_true.ndim != 1 or not np.isin([y_true, y_pred], np.arange(num_classes)).all():
        raise InputError(f"y_true {y_true.shape} and y_pred {y_pred.shape} must both be (n,) in 0..{num_classes - 1}")
    cells = y_true.astype(np.int64) * num_classes + y_pred.astype(np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _checked(family, y_true, y_prob, labels):
    """y_true (n, L) bool, or (n,) int64 for "classes", and y_prob as it was given: float32 is compared as float32."""
    y_true, y_prob, classes = np.asarray(y_true), np.asarray(y_prob), family == "classes"
    if family not in FAMILIES or (family == "auc" and labels is None):
        raise InputError(f"score family {family!r} must be one of {FAMILIES}, and 'auc' needs the labels' names")
    if y_prob.ndim != 2 or not y_prob.size or y_true.shape != y_prob.shape[:2 - classes]:
        raise InputError(f"for {family!r}, y_true {y_true.shape} must be {'(n,)' if classes else '(n, labels)'} and "
                         f"y_prob {y_prob.shape} must be (n, {'classes' if classes else 'labels'}), and not empty")
    if not classes and labels is not None and len(labels) != y_prob.shape[1]:
        raise InputError(f"{len(labels)} label names were given for {y_prob.shape[1]} columns")
    if y_true.dtype.kind not in "biuf" or y_prob.dtype.kind not in "biuf":
        raise InputError(f"y_true ({y_true.dtype}) and y_prob ({y_prob.dtype}) must hold numbers")
    top = y_prob.shape[1] - 1 if classes else 1
    whole = (y_true >= 0) & (y_true <= top) & (y_true == np.floor(y_true))
    for name, values, wrong in ((f"y_true must be whole numbers, 0 to {top}", y_true, ~whole),
                                ("y_prob must lie in 0-1", y_prob, ~((y_prob >= 0) & (y_prob <= 1)))):  # NaN does not
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0].tolist())
            raise InputError(f"{name}: {np.sum(wrong)} values are not, the first is {values[at]} in row {at[0]}")
    return y_true.astype(np.int64 if classes else bool), y_prob


def _tables(family, y_true, y_prob, labels, threshold):
    """What the weights do not change, done once for any number of resamples."""
    y_true, y_prob = _checked(family, y_true, y_prob, labels)
    width = y_prob.shape[1]
    if family == "classes":
        return {"family": family, "size": width, "cells": y_true * width + np.argmax(y_prob, axis=1)}
    predicted = y_prob > float(threshold)
    counts = {"positive": y_true, "predicted": predicted, "both": y_true & predicted}
    if family == "challenge":  # flattened: a patient is L cells of one column
        counts = {name: cells.sum(axis=1, keepdims=True) for name, cells in counts.items()}
        return {"family": family, "size": width, "auc": [_ranked(y_true.ravel(), y_prob.ravel(), width)], **counts}
    ranks = [_ranked(truth, prob, 1) for truth, prob in zip(y_true.T, y_prob.T, strict=True)]
    return {"family": family, "size": 1, "labels": labels, "auc": ranks, **counts}


def _ranked(truth, prob, width):
    """Patients of the positive and the negative cells; how many negatives each positive beats, without, with ties."""
    negative, positive = np.flatnonzero(~truth), np.flatnonzero(truth)
    negative, positive = negative[np.argsort(prob[negative])], positive[np.argsort(prob[positive])]
    beaten = [np.searchsorted(prob[negative], prob[positive], side) for side in ("left", "right")]
    return positive // width, negative // width, *beaten


def _weigh(tables, weights):
    """Scores {key: (B,)} of a family's tables under weights (B, n)."""
    if tables["family"] == "classes":
        size = tables["size"]
        matrix = np.stack([np.bincount(tables["cells"], weights=one, minlength=size**2) for one in weights])
        matrix = matrix.reshape(-1, size, size)
        right = np.diagonal(matrix, axis1=1, axis2=2)  # (B, K)
        f1 = _ratio(2 * right, matrix.sum(axis=1) + matrix.sum(axis=2), undefined=0.0)
        return {"accuracy": right.sum(axis=1) / matrix.sum(axis=(1, 2)), "kappa": _kappa(matrix),
                "quadratic_kappa": _kappa(matrix, power=2), "f1": f1.mean(axis=1)}
    if tables["family"] == "auc":
        auc = _auc(tables, weights)
        named = {f"auc_{label}": one for label, one in zip(tables["labels"], auc.T, strict=True)}
        return {**named, "auc": auc.mean(axis=1)}
    each = _label_scores(tables, weights)
    kappa, f1, auc, support = each["kappa"].mean(axis=1), each["accuracy"][:, 0], each["auc"][:, 0], each["support"]
    if tables["family"] == "per label":
        f1 = _ratio((each["f1"] * support).sum(axis=1), support.sum(axis=1), undefined=0.0)
        auc = _ratio((each["auc"] * support).sum(axis=1), support.sum(axis=1))
    return {"kappa": kappa, "f1": f1, "auc": auc, "final": (kappa + f1 + auc) / 3}


def _label_scores(tables, weights):
    """Scores {key: (B, L)} of every label; of one column where the matrix is flattened."""
    both, predicted, positive = (weights @ tables[name] for name in ("both", "predicted", "positive"))  # (B, L)
    total = weights.sum(axis=1, keepdims=True) * tables["size"]
    neither = total - predicted - positive + both
    matrix = np.stack([neither, predicted - both, positive - both, both], axis=-1).reshape(*both.shape, 2, 2)
    return {"kappa": _kappa(matrix), "f1": _ratio(2 * both, predicted + positive, undefined=0.0),
            "auc": _auc(tables, weights), "precision": _ratio(both, predicted), "recall": _ratio(both, positive),
            "support": positive, "accuracy": (both + neither) / total}


def _kappa(matrix, power=0):
    """Cohen's kappa (...) of confusion matrices (..., K, K); a disagreement costs |i - j| ** power."""
    distance = np.abs(np.subtract.outer(*[np.arange(matrix.shape[-1])] * 2))
    cost = (distance > 0) * distance.astype(np.float64) ** power
    rows, columns = matrix.sum(axis=-1), matrix.sum(axis=-2)
    expected = (cost * rows[..., :, None] * columns[..., None, :]).sum(axis=(-2, -1))
    return 1 - _ratio((cost * matrix).sum(axis=(-2, -1)) * rows.sum(axis=-1), expected)


def _auc(tables, weights):
    """Area under the ROC curve (B, L): weighted share of (positive, negative) pairs in order, ties counting half."""
    areas = []
    for positive, negative, beaten, tied in tables["auc"]:
        below = np.zeros((len(weights), len(negative) + 1))
        np.cumsum(weights[:, negative], axis=1, out=below[:, 1:])
        gain = weights[:, positive]
        won = (gain * (below[:, beaten] + below[:, tied])).sum(axis=1) / 2
        areas.append(_ratio(won, gain.sum(axis=1) * below[:, -1]))
    return np.stack(areas, axis=1)


def _ratio(above, below, undefined=np.nan):
    return np.divide(above, below, out=np.full(below.shape, undefined), where=below != 0)
