"""A trained network that answers for pictures: the same numbers from Python as from the command line.

    net = predictor.load("best.pt")
    net.predict("left.jpg", "right.jpg")  # {"N": 0.07, "D": 0.81, ...}; of a list or a folder a list of these
    net.heatmap("left.jpg", "right.jpg")  # [("left eye", picture, {"N": map, ...}), ("right eye", ...)]

This is not a medical device."""

import argparse
import functools
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFile

import cam
import checkpoint
import engine
import features
import models
import tables
from arguments import check_args
from dataset import Part, eval_size, volume_fault
from decode import GivenPictures, decode_all
from errors import InputError, reading
from preprocess import SHORTEST, prepare, to_rgb

IN_MEMORY = 1 << 28  # bytes of pictures decoded at a time: memory does not grow with what is asked


def load(path, device="auto", precision=None, workers=None):
    """The network of a best.pt or of a run's folder; of a list of them, one that answers with their mean.
    precision: auto, fp32, bf16 or fp16; by default what the run was asked to use. Raises InputError."""
    paths = [Path(one) for one in (path if isinstance(path, list | tuple) else [path])]
    files = [one / "best.pt" if (one / "best.pt").exists() else one for one in paths]
    net, *others = [Predictor(file, device, precision, workers) for file in files]
    for other in others:
        if (other.labels, other.args.dataset) != (net.labels, net.args.dataset):
            raise InputError(f"{other.path} has other labels or another data set than {net.path}")
        if other.digest in [member.digest for member in net.members]:
            raise InputError(f"{other.path} holds a network that was given already: no mean with itself")
        net.members.append(other)
        net.rendered |= other.rendered
        net.thresholds = None  # they belong to one network
    return net


class Predictor:
    """One network with all that its checkpoint says: `.labels`, `.task`, `.thresholds`, `.saved`, `.args`.
    `.members` are the networks whose mean `predict` gives: this one, and those that `load` added."""

    def __init__(self, path, device, precision, workers):
        self.path, self.device, self.members = Path(path), engine.pick_device(device), [self]
        self.saved = checkpoint.load_checkpoint(path)
        with reading(path, "a best.pt of this repository"):
            self.args = argparse.Namespace(**self.saved["args"])
            self.labels, self.task, self.family = (self.saved[key] for key in ("labels", "task", "family"))
            self.thresholds, self.prior = self.saved["thresholds"], np.array(self.saved["prior"])
            self.ordered, self.rendered = self.saved["ordered"], self.saved["data"]["rendered"]
            self.names = tables.full_names(self.args.dataset, self.labels)
            check_args(self.args)
            size, trunk = eval_size(self.args), self.args.trunk
            self.model = models.build_model(self.args.model, len(self.labels), "none", size, trunk)
            models.load_strict(self.model, self.saved["model"], path)
        self.model.to(self.device)
        self.digest = checkpoint.network_digest(self.saved["model"], self.thresholds)
        self.per_row = {"odir": 2, "mrnet": 3}.get(self.args.dataset, 1)  # files of a row
        self.random_trunk = self.args.weights == "none" and not self.args.fine_tune  # it has learned nothing
        # Not the checkpoint's to say: which folder is written, and --compile, which gives other numbers.
        self.args.workers, self.args.cache, self.args.compile = workers, "cache", False
        self.precision = engine.pick_precision(precision or self.args.precision, self.device)

    @functools.cached_property
    def fast(self):
        """The network as it answers: its trunk folded and in `.precision`."""
        return features.with_fast_trunk(self.model, self.precision)

    def title(self):
        """What it is called in lines and captions: the run's name, its data set, network and precision."""
        path = self.path.resolve()  # a run that was moved or copied has its folder's name
        own = checkpoint.home_of(path, self.digest) == path.parent
        name = path.parent.name if own else self.args.name
        mean = f"the mean of {len(self.members)} networks, the first " if len(self.members) > 1 else ""
        squashed = "pictures squashed into squares, " if self.args.preprocess == "none" else ""
        return f"{mean}{name} ({self.args.dataset}, {self.args.model}, {squashed}{self.precision})"

    def limits(self, threshold=0.5, learned=False):
        """A threshold for each label; None for classes that exclude each other: the strongest wins."""
        if not 0 <= threshold <= 1:
            raise InputError(f"--threshold {threshold}: expected 0 to 1")
        if learned and threshold != 0.5:
            raise InputError("--learned has thresholds of its own: leave out --threshold")
        if self.task == "multiclass":
            if learned or threshold != 0.5:
                raise InputError("--threshold, --learned: the classes exclude each other, the strongest wins")
            return None
        if learned and self.thresholds is None:
            raise InputError("--learned needs one network, trained with --folds or --calibration-fraction")
        return self.thresholds if learned else [threshold] * len(self.labels)

    def chosen(self, probs, limits):
        """(n, K) of booleans: what is predicted."""
        return probs == probs.max(1, keepdims=True) if limits is None else probs > limits

    def evaluate(self, part, criterion=None, mirrored=False):
        """(mean loss, probs (n, K)) of a dataset.Part; `mirrored`: probs are the mean of both views."""
        criterion = criterion or engine.Criterion(self.task)
        if features.keeps_features(self.args, part):
            kept = features.TrunkFeatures(self.model, self.args, self.precision, self.device)
            loss, probs = features.evaluate(self.model, kept, part, criterion)
        else:
            loss, probs = features.predict_live(self.args, self.fast, part, criterion, self.device)
        return loss, (probs + self.live(part, mirrored=True)) / 2 if mirrored else probs

    def live(self, part, mirrored=False):
        """probs (n, K) of a part whose pictures all go through the network."""
        criterion = engine.Criterion(self.task)
        return features.predict_live(self.args, self.fast, part, criterion, self.device, mirrored)[1]

    def truth(self, part):
        """(n, K) of booleans: the labels that the rows of a part carry."""
        several = self.task == "multilabel"
        return part.targets == 1 if several else part.targets[:, None] == np.arange(len(self.labels))

    def explain(self, part, row):
        """Heat maps of a row by the network that gave its number: [(name, picture, {label: map (h, w)})]."""
        found = zip(*cam.explain(self.fast, part.dataset().__getitems__([row]), self.device), strict=True)
        return [(name, picture, dict(zip(self.labels, maps, strict=True))) for name, picture, maps in found]

    def map_rows(self, part, row, probs, truth=()):
        """What figures.heatmaps draws of a row: a line per eye or plane. truth: names of its labels."""
        lines = []
        for name, picture, maps in self.explain(part, row):
            line = {"title": f"{part.table['ID'].iloc[row]} {name}".strip(), "picture": picture}
            line["maps"] = list(zip(self.names, probs.tolist(), maps.values(), strict=True))
            lines.append({**line, "truth": list(truth)})
        return lines

    def open_rows(self, rows):
        """Decode rows of pictures: paths, PIL images or arrays -> (Part, {row: why it cannot be read})."""
        size, how, sources = eval_size(self.args), self.args.preprocess, list(chain(*rows))
        if self.args.dataset == "mrnet":
            pictures, reasons = None, list(map(volume_fault, sources))
        else:
            array, reasons = decode_sources(sources, how, size, self.args.workers)
            pictures = GivenPictures(array, np.arange(len(sources)).reshape(len(rows), self.per_row))
        found = np.array(reasons, object).reshape(len(rows), self.per_row)
        faults = {row: "; ".join(filter(None, reasons)) for row, reasons in enumerate(found) if any(reasons)}
        table = pd.DataFrame({"ID": range(len(rows)), "files": list(map(tuple, rows))})
        targets = np.zeros((len(rows), len(self.labels)), np.float32)  # nobody looks at the loss
        part = Part(table, pictures, targets, len(rows), size, how)
        return part.subset([row for row in range(len(rows)) if row not in faults]), faults

    def answer(self, rows, mirrored=False):
        """Mean probabilities (n, K) of rows of pictures, NaN where one cannot be read; {row: why}."""
        probs, faults = np.zeros((len(rows), len(self.labels)), np.float32), {}
        views = [False, True] if mirrored else [False]
        for member in self.members:
            step = max(1, IN_MEMORY // (3 * member.per_row * eval_size(member.args) ** 2))
            for start in range(0, len(rows), step):
                part, unread = member.open_rows(rows[start : start + step])
                faults.update({start + row: reason for row, reason in unread.items()})
                if len(part):
                    found = np.mean([member.live(part, view) for view in views], axis=0)
                    probs[start + part.table["ID"].to_numpy()] += found / len(self.members)
        probs[list(faults)] = np.nan
        return probs, faults

    def predict(self, *given, tta=False):
        """{label: probability} of LEFT, RIGHT of eye pairs, one picture, an exam's folder or its three files;
        of a list or a folder a list of these. Pictures are paths, PIL images or arrays uint8 (H, W, 3), knees
        paths. A large JPEG is decoded at a reduced size: an array of its full size gives slightly other
        numbers. tta: the mean with the mirrored pictures. Raises InputError."""
        rows, many = self.rows_of(given)
        probs, faults = self.answer(rows, tta)
        if faults:
            raise InputError(f"{len(faults)} cannot be read: {'; '.join(list(faults.values())[:3])}")
        answers = [dict(zip(self.labels, row.tolist(), strict=True)) for row in probs]
        return answers if many else answers[0]

    def rows_of(self, given):
        """Sources as `predict` takes them -> (rows of pictures, whether they are many)."""
        if len(given) == 1 and isinstance(given[0], list):
            many = [self.rows_of(one if isinstance(one, tuple | list) else (one,))[0] for one in given[0]]
            return list(chain(*many)), True
        if given and all(isinstance(source, str | Path) for source in given):
            frame, many = tables.given_rows(self.args.dataset, given)
            return list(frame["files"]), many
        if len(given) != self.per_row or self.args.dataset == "mrnet":
            takes = f"expected {self.per_row} of a patient, or a list; of knees paths alone"
            raise InputError(f"{len(given)} picture(s) in memory were given; {takes}")
        return [given], False

    def heatmap(self, *given):
        """[(name, picture uint8 (S, S, 3), {label: map (h, w) in 0..1})] of a patient's eyes or planes."""
        part, faults = self.open_rows(self.rows_of(given)[0][:1])
        if faults:
            raise InputError(faults[0])
        return self.explain(part, 0)


def decode_sources(sources, how, size, workers):
    """Paths, PIL images, arrays -> uint8 (n, size, size, 3), why a file gives none; for others InputError."""
    for place, source in enumerate(sources):  # what Pillow opened and has not decoded is read from its file
        if isinstance(source, ImageFile.ImageFile) and source.tile and source.filename and not source.tell():
            sources[place] = source.filename
    decoded = decode_all([one for one in sources if isinstance(one, str | Path)], how, size, workers)
    array, reasons = np.zeros((len(sources), size, size, 3), np.uint8), [""] * len(sources)
    for place, source in enumerate(sources):
        if isinstance(source, str | Path):
            array[place], _, reason, _, system = next(decoded)
            reasons[place] = reason or system
        else:
            with reading("an array or PIL image in memory", "a picture"):
                image = source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
                if image is not source and np.asarray(source).dtype not in (np.uint8, np.uint16):
                    raise ValueError(f"{np.asarray(source).dtype} numbers; expected uint8")
                if min(image.size) < SHORTEST:
                    raise ValueError(f"{image.size} pixels; at least {SHORTEST} were expected")
                array[place] = prepare(to_rgb(image), how, size)
    return array, reasons
