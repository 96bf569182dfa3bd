"""Which picture comes when: an epoch's order (plain, balanced, weighted), its batches; class weights.
Every order follows from its arguments alone, so a resumed run draws what an uninterrupted one draws."""

import numpy as np
import pandas as pd
import torch

from errors import InputError

ROUNDS = 256  # drawn at once: their random numbers stay in the cache


class LabelBalancedSampler(torch.utils.data.Sampler):
    """Draw from the label sampled least so far (ties at random), then any of its rows (with replacement).
    A draw raises the count of every label its row carries. labels: (n, L) of 0/1 or (n,) class numbers; one
    that nobody carries is left out. All draws at one count are one pass over the labels in random order."""

    def __init__(self, labels, seed=0, num_samples=None):
        labels = np.asarray(labels)
        if labels.ndim == 1:
            labels = labels[:, None] == np.unique(labels)
        if labels.ndim != 2 or not np.any(labels) or not ((labels == 0) | (labels == 1)).all():
            raise InputError(f"labels {labels.shape} must be (n, L) of 0/1 with a 1, or (n,) class numbers")
        self.seed, self.epoch, self.num_samples = seed, 0, num_samples or len(labels)
        labels = np.ascontiguousarray(labels[:, labels.any(axis=0)], dtype=bool)
        columns, self.members = np.nonzero(labels.T)  # the rows of the first label, of the second, ...
        self.sizes = np.bincount(columns)
        self.starts = np.cumsum(self.sizes) - self.sizes
        # Rows with the same labels share one tuple: the counting loop touches a handful of objects, not n.
        packed = np.packbits(labels, axis=1)
        rows = packed.view(f"V{packed.shape[1]}").ravel()  # one value a row, whatever the number of labels
        _, first, self.kind_of_row = np.unique(rows, return_index=True, return_inverse=True)
        self.kinds = [tuple(np.flatnonzero(labels[row]).tolist()) for row in first]

    def order(self, epoch):
        """Row numbers (num_samples,) int64 of an epoch, the same for the same seed and epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        counts, level, found, order = [0] * len(self.sizes), 0, 0, [np.empty(0, np.int64)]
        while found < self.num_samples:
            line = rng.permuted(np.tile(np.arange(len(counts)), (ROUNDS, 1)), axis=1)  # (rounds, labels)
            rows = self.members[self.starts[line] + rng.integers(self.sizes[line])]
            place, taken = 0, []
            for turn, kinds in zip(line.tolist(), self.kind_of_row[rows].tolist(), strict=True):
                for label, kind in zip(turn, kinds, strict=True):
                    if counts[label] == level:  # otherwise a row drawn earlier carried it to this count
                        taken.append(place)
                        for carried in self.kinds[kind]:
                            counts[carried] += 1
                    place += 1
                level += 1
            order.append(rows.ravel()[taken])
            found += len(taken)
        return np.concatenate(order)[: self.num_samples]

    def __iter__(self):
        return iter(self.order(self.epoch).tolist())

    def __len__(self):
        return self.num_samples


class Batches:
    """The batches of an epoch's `order` as lists of (index, repeat): a rank takes rows rank::world of each.
    `repeat`: how often the index came before; a picture drawn twice in an epoch is augmented in two ways."""

    def __init__(self, order, batch, rank=0, world=1):
        self.order, self.batch, self.rank, self.world = np.asarray(order, np.int64), batch, rank, world
        repeats = pd.Series(self.order).groupby(self.order).cumcount()
        self.keys = list(zip(self.order.tolist(), repeats.tolist(), strict=True))

    def __iter__(self):
        for start in range(0, len(self.keys), self.batch):
            yield self.keys[start + self.rank : start + self.batch : self.world]

    def __len__(self):
        return -(-len(self.order) // self.batch)  # rounded up


def epoch_order(kind, targets, seed, epoch):
    """Row numbers (n,) int64 of an epoch; targets (n, L) 0/1 or class numbers (n,); weighted needs these."""
    if kind == "shuffle":
        return np.random.default_rng([seed, epoch]).permutation(len(targets))
    if kind == "balanced":
        return LabelBalancedSampler(targets, seed=seed).order(epoch)
    if kind != "weighted":
        raise InputError(f"sampler {kind!r} must be one of shuffle, balanced, weighted")
    weights = torch.from_numpy(1 / class_counts(targets)[targets])
    (mixed,) = np.random.SeedSequence([seed, epoch]).generate_state(1)  # seed + epoch would repeat orders
    generator = torch.Generator().manual_seed(int(mixed))
    return torch.multinomial(weights, len(weights), replacement=True, generator=generator).numpy()


def pos_weight(targets, labels=None):
    """Negatives / positives (L,) float32 of targets (n, L) 0/1; InputError for a label without positives."""
    positives = np.asarray(targets).sum(axis=0, dtype=np.int64)
    if not positives.all():
        name = (labels or range(len(positives)))[np.argmin(positives)]
        raise InputError(f"label {name} has no positives among {len(targets)} rows: no pos_weight")
    return ((len(targets) - positives) / positives).astype(np.float32)


def class_weights(targets, num_classes):
    """count(class 0) / count(class k) (K,) float32, in the order of the classes (the DR grading lab's)."""
    counts = class_counts(targets, num_classes)
    return (counts[0] / counts).astype(np.float32)


def class_counts(targets, num_classes=0):
    """Pictures of each class (K,) of targets (n,), at least `num_classes`; InputError for one without any."""
    counts = np.bincount(targets, minlength=num_classes)
    if not counts.all():
        raise InputError(f"a class without a picture has no weight; pictures per class: {counts.tolist()}")
    return counts
