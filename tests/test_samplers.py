"""Samplers: balance, uniformity, determinism, exactly-once batches, weights against hand-worked ones."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import InputError
from samplers import (
    Batches,
    LabelBalancedSampler,
    class_counts,
    class_weights,
    epoch_order,
    pos_weight,
)

LABELS = list("NDGCAHMO")


def patients(n=2000, seed=0):
    """Labels about as frequent as in ODIR, some together, a few rows without any."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 8)) < [0.33, 0.32, 0.06, 0.06, 0.045, 0.027, 0.05, 0.27]).astype(np.int64)


def plain_order(labels, draws, rng):
    """The sampler as one writes it first; what ours must equal in distribution."""
    counts, order = np.zeros(labels.shape[1], int), []
    for _ in range(draws):
        label = rng.choice(np.flatnonzero(counts == counts.min()))
        order.append(rng.choice(np.flatnonzero(labels[:, label])))
        counts += labels[order[-1]]
    return tuple(order)


def check_balance(labels, order):
    """Replay an order, hold it to the difference in counts that co-occurring labels force; return the counts.

    Claim: count(k) - min <= 1 + forced(k), where forced(k) counts the draws since label k was last among the
    least sampled in which k came along with a label that was. Proof: at that moment t, count(k) = min(t) <=
    min(end); the draw at t adds one at most; every later draw serves a least sampled label, which k is not:
    k can only be company.
    """
    counts, forced = np.zeros(labels.shape[1], int), np.zeros(labels.shape[1], int)
    for row in order:
        least = counts == counts.min()
        served = (labels[row].astype(bool) & least).any()
        assert served
        forced = np.where(least, 0, forced + labels[row] * served)
        counts += labels[row]
    assert (counts - counts.min() <= 1 + forced).all()
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_balance_is_as_good_as_co_occurring_labels_allow(seed):
    labels = patients(seed=seed)
    order = LabelBalancedSampler(labels, seed=seed).order(0)
    counts = check_balance(labels, order)
    assert len(order) == len(labels)
    carried = labels.sum(axis=0)
    assert counts.max() / counts.min() < carried.max() / carried.min() / 4


@pytest.mark.parametrize("draws", [1, 7, 500, 2049])
def test_one_label_per_row_balances_to_within_one(draws):
    classes = np.repeat(np.arange(7), [5, 300, 20, 1, 90, 4, 60])
    order = LabelBalancedSampler(classes, seed=1, num_samples=draws).order(3)
    counts = np.bincount(classes[order], minlength=7)
    assert counts.sum() == draws and counts.max() - counts.min() <= 1
    assert (
        order == LabelBalancedSampler(np.eye(7, dtype=bool)[classes], seed=1, num_samples=draws).order(3)
    ).all()


def test_forced_company_grows_but_no_further():
    labels = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0]])  # label 0 comes along with every other
    counts = check_balance(labels, LabelBalancedSampler(labels, num_samples=300).order(0))
    assert abs(counts[1] - counts[2]) <= 1 and counts[0] >= counts[1] + counts[2]


def test_more_labels_than_a_byte_or_two_holds():
    rng = np.random.default_rng(0)
    for width in (9, 16, 17, 70):
        labels = (rng.random((300, width)) < 0.1).astype(int)
        check_balance(labels, LabelBalancedSampler(labels).order(0))


def test_distribution_is_that_of_the_plain_loop():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]])
    rng, sampler, ours, plain = np.random.default_rng(0), LabelBalancedSampler(labels, num_samples=3), {}, {}
    for epoch in range(1500):
        for found, order in (
            (ours, tuple(sampler.order(epoch).tolist())),
            (plain, plain_order(labels, 3, rng)),
        ):
            found[order] = found.get(order, 0) + 1
    assert set(ours) == set(plain)  # every sequence of three that can occur
    both = np.array([[ours[order], plain[order]] for order in plain])
    chi_square = ((both[:, 0] - both[:, 1]) ** 2 / both.sum(axis=1)).sum()
    assert chi_square < len(both) + 5 * np.sqrt(2 * len(both))


def test_rows_of_a_label_are_drawn_uniformly():
    classes = np.repeat([0, 1], [10, 40])
    counts = np.bincount(LabelBalancedSampler(classes, num_samples=40_000).order(0), minlength=50)
    for each, expected in ((counts[:10], 2000), (counts[10:], 500)):
        assert ((each - expected) ** 2 / expected).sum() < len(each) + 5 * np.sqrt(2 * len(each))


def test_same_seed_same_order_another_epoch_another():
    labels = patients(500)
    sampler = LabelBalancedSampler(labels, seed=3)
    first = sampler.order(0)
    assert first.dtype == np.int64 and first.shape == (500,) and len(sampler) == 500
    assert list(sampler) == first.tolist() == LabelBalancedSampler(labels, seed=3).order(0).tolist()
    others = [sampler.order(1), sampler.order(2), LabelBalancedSampler(labels, seed=4).order(0)]
    assert all((a != b).any() for a, b in pairwise([first, *others]))
    sampler.epoch = 1
    assert list(sampler) == others[0].tolist()
    assert (LabelBalancedSampler(labels, seed=3, num_samples=40).order(0) == first[:40]).all()
    loader = torch.utils.data.DataLoader(range(500), batch_size=100, sampler=sampler)
    assert torch.cat(list(loader)).tolist() == others[0].tolist()


def test_a_label_nobody_carries_is_left_out():
    labels = np.zeros((6, 4), int)
    labels[:3, 1] = labels[3:5, 3] = 1
    sampler = LabelBalancedSampler(labels)
    order = sampler.order(0)
    assert labels[order].sum(axis=0).tolist() == [0, 3, 0, 3] and 5 not in order
    assert sorted(LabelBalancedSampler([0, 0, 2], num_samples=2).order(0) == 2) == [False, True]


@pytest.mark.parametrize("labels", [np.zeros((4, 2)), [[1, 2]], [[1, np.nan]], []])
def test_labels_that_cannot_be_balanced_are_refused(labels):
    with pytest.raises(InputError, match="labels|targets"):
        LabelBalancedSampler(labels)


def test_weights_by_hand():
    targets = np.array([2, 0, 1, 0, 0, 2])
    assert class_weights(targets, 3).tolist() == [1, 3, 1.5] and class_weights(targets, 3).dtype == np.float32
    assert class_counts(targets, 3).tolist() == class_counts(targets).tolist() == [3, 1, 2]
    found = pos_weight(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    assert found.dtype == np.float32 and found.tolist() == [3, np.float32(1 / 3)]


def test_weights_of_what_nobody_has_are_refused():
    with pytest.raises(InputError, match="label 1 has no positives among 2"):
        pos_weight(np.array([[1, 0], [0, 0]]))
    with pytest.raises(InputError, match="label myopia has no positives among 2"):
        pos_weight(np.array([[1, 0], [0, 0]]), ["glaucoma", "myopia"])
    with pytest.raises(InputError, match=r"pictures per class: \[1, 0, 1\]"):
        class_counts(np.array([0, 2]))
    with pytest.raises(InputError, match=r"pictures per class: \[1, 1, 0\]"):
        class_weights(np.array([0, 1]), 3)


def test_epoch_orders():
    classes = np.repeat([0, 1, 2], [300, 60, 12])
    for kind in ("shuffle", "balanced", "weighted"):
        order = epoch_order(kind, classes, seed=1, epoch=4)
        assert order.dtype == np.int64 and order.shape == (372,)
        assert (order == epoch_order(kind, classes, 1, 4)).all()
        assert (order != epoch_order(kind, classes, 1, 5)).any() and (
            order != epoch_order(kind, classes, 2, 4)
        ).any()
        assert (epoch_order(kind, classes, 1, 0) != epoch_order(kind, classes, 0, 1)).any()
    assert sorted(epoch_order("shuffle", classes, 1, 4)) == list(range(372))
    assert (epoch_order("balanced", classes, 1, 4) == LabelBalancedSampler(classes, seed=1).order(4)).all()
    drawn = np.bincount(np.concatenate([classes[epoch_order("weighted", classes, 1, e)] for e in range(20)]))
    assert (abs(drawn / drawn.sum() - 1 / 3) < 0.03).all()
    assert all(epoch_order(kind, patients(50), 0, 0).shape == (50,) for kind in ("shuffle", "balanced"))
    for kind, targets in (("uniform", classes), ("weighted", [0, 2])):
        with pytest.raises(InputError):
            epoch_order(kind, np.asarray(targets), 0, 0)


def test_weighted_is_torchs_sampler():
    classes = np.repeat([0, 1, 2], [30, 6, 2])
    mixed = int(np.random.SeedSequence([7, 2]).generate_state(1)[0])
    theirs = torch.utils.data.WeightedRandomSampler(
        (1 / class_counts(classes, 3)[classes]).tolist(), 38, generator=torch.Generator().manual_seed(mixed)
    )
    assert epoch_order("weighted", classes, 7, 2).tolist() == list(theirs)


@pytest.mark.parametrize(
    "n, batch, world", [(20, 6, 1), (20, 6, 2), (19, 6, 4), (3, 8, 5), (0, 4, 2), (16, 4, 4)]
)
def test_all_ranks_see_every_row_once(n, batch, world):
    order = np.random.default_rng(0).integers(max(n // 2, 1), size=n)
    ranks = [list(Batches(order, batch, rank=rank, world=world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(Batches(order, batch))} == {-(-n // batch)}
    together = []
    for number, parts in enumerate(zip(*ranks, strict=True)):
        joined = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            joined[rank::world] = part
        assert joined == list(Batches(order, batch))[number]
        together += joined
    seen = {}
    for (index, repeat), expected in zip(together, order, strict=True):
        assert index == expected and repeat == seen.get(index, 0)
        seen[index] = repeat + 1


def test_batches_by_hand():
    order = np.array([4, 4, 1, 4, 0, 1, 2])
    assert list(Batches(order, 3)) == [[(4, 0), (4, 1), (1, 0)], [(4, 2), (0, 0), (1, 1)], [(2, 0)]]
    mine = Batches(order, 3, rank=1, world=2)
    expected = [[(4, 1)], [(0, 0)], []]
    assert list(mine) == expected and list(mine) == expected and len(mine) == 3  # it can be read again
    assert list(Batches([], 3)) == [] and len(Batches([], 3)) == 0
    assert list(Batches(order, 7)) == list(Batches(order, 100)) and len(Batches(order, 7)) == 1


def test_numbers_are_those_of_every_run_before():
    """Orders of a seed and epoch, as the first release drew them: a changed one would change every result."""
    assert epoch_order("shuffle", patients(40), 42, 3)[:8].tolist() == [28, 39, 29, 25, 8, 10, 24, 11]
    assert epoch_order("balanced", patients(40), 42, 3)[:8].tolist() == [0, 27, 37, 33, 11, 0, 37, 33]
    assert epoch_order("weighted", np.arange(40) % 5, 42, 3)[:8].tolist() == [26, 16, 14, 3, 35, 16, 18, 1]


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="needs the official annotations (REAL_DATA)")
def test_published_training_part():
    import pandas as pd
    from sklearn.model_selection import train_test_split

    table = pd.read_excel(Path(os.environ["REAL_DATA"]) / "odir" / "annotations.xlsx")
    table = table[~table["ID"].isin([*range(2174, 2183), 2957])]
    labels = train_test_split(table, test_size=0.2, random_state=42)[0][LABELS].to_numpy()
    assert pos_weight(labels).astype(float).round(4).tolist() == [
        2.0184,
        2.0953,
        14.4254,
        15.8193,
        20.9843,
        36.7297,
        18.3889,
        2.6640,
    ]
    check_balance(labels, LabelBalancedSampler(labels, seed=42).order(0))
