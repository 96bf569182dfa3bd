"""A trained network that answers for pictures, the same from Python as from the command line.

    net = predictor.load("best.pt") net.predict("left.jpg", "right.jpg")     # {"N": 0.07, "D": 0.81, ...};
    lists of pairs, a folder, arrays too net.heatmap("left.jpg", "right.jpg")     # [("left eye", picture,
    {"N": map, ...}), ...]

This is not a medical device.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import cam
import checkpoint
import engine
import features
import models
import tables
from arguments import LARGEST_SIZE
from dataset import Part, eval_size, volume_fault
from decode import GivenPictures, decode_all
from errors import InputError, reading
from preprocess import prepare

ROWS = 256  # decoded at a time: what lies in memory does not grow with what is asked
PER_ROW = {"odir": 2, "mrnet": 3}  # files of a row; else one


def load(path, device="auto", precision=None, workers=None):
    """The network of a best.pt, or of a run's folder, or the mean of several (a list) -> Predictor or
    Ensemble.

    precision: auto, fp32, bf16 or fp16; by default what the run was asked to use. Raises InputError.
    """
    if isinstance(path, list | tuple) and len(path) > 1:
        return Ensemble([load(one, device, precision, workers) for one in path])
    path = path[0] if isinstance(path, list | tuple) else path
    return Predictor(checkpoint.find_checkpoint(path), device, precision, workers)


class Predictor:
    """One network with all that its checkpoint says: `.labels`, `.task`, `.thresholds`, `.saved`, `.args`."""

    def __init__(self, path, device, precision, workers):
        self.path, self.device = Path(path), engine.pick_device(device)
        self.saved = checkpoint.load_checkpoint(path)
        with reading(path, "a best.pt of this repository"):
            self.args = argparse.Namespace(**self.saved["args"])
            self.labels, self.task, self.family = (self.saved[key] for key in ("labels", "task", "family"))
            self.thresholds, self.prior = self.saved["thresholds"], np.array(self.saved["prior"])
            self.ordered, self.rendered = self.saved["ordered"], self.saved["data"]["rendered"]
            size = eval_size(self.args)
            if not 16 <= size <= LARGEST_SIZE:
                raise InputError(f"{path} asks for pictures of {size} pixels; expected 16 to {LARGEST_SIZE}")
            model = models.build_model(self.args.model, len(self.labels), "none", size, self.args.trunk)
            models.load_strict(model, self.saved["model"], path)
            self.digest = checkpoint.state_digest(self.saved["model"])
        self.args.workers, self.args.cache = workers, "cache"
        self.precision = engine.pick_precision(precision or self.args.precision, self.device, self.args.model)
        self.model = model.to(self.device)
        self.fast = features.with_fast_trunk(self.model, self.precision)
        self.names = tables.full_names(self.args.dataset, self.labels)

    @property
    def random_trunk(self):
        """Whether the maps are of a trunk that has learned nothing."""
        return self.args.weights == "none" and not self.args.fine_tune

    def evaluate(self, part, criterion=None, mirrored=False):
        """(mean loss, probs (n, K)) of a dataset.Part; `mirrored`: the mean with that of the mirrored
        pictures.
        """
        criterion = criterion or engine.Criterion(self.task)
        kept = features.TrunkFeatures(self.model, self.args, self.precision, self.device)
        loss, probs = features.evaluate(
            self.args, self.model, kept, part, criterion, self.precision, self.device
        )
        if mirrored:
            other = features.predict_live(self.args, self.fast, part, criterion, self.device, mirrored=True)[
                1
            ]
            probs = (probs + other) / 2
        return loss, probs

    def explain(self, part, row):
        """Heat maps of a row by the network that gave its number -> [(name, picture, {label: map (h, w)}),
        ...].
        """
        batch = part.dataset().__getitems__([row])
        names, pictures, maps = cam.explain(self.fast, batch, self.device)
        found = []
        for name, picture, one in zip(names, pictures, maps, strict=True):
            found.append((name, picture, dict(zip(self.labels, one, strict=True))))
        return found

    def map_rows(self, part, row, probs, truth=()):
        """What figures.heatmaps draws of a row: a line for each eye, photograph or plane."""
        lines, title = [], str(part.table["ID"].iloc[row])
        for name, picture, maps in self.explain(part, row):
            answers = list(zip(self.names, probs.tolist(), maps.values(), strict=True))
            line = {
                "title": f"{title} {name}".strip(),
                "picture": picture,
                "maps": answers,
                "truth": list(truth),
            }
            lines.append(line | {"aspect": part.aspect(row)})
        return lines

    def open_rows(self, rows):
        """Decode rows of pictures (paths, arrays uint8 (H, W, 3) or PIL images) -> (Part, {row: why it
        cannot be read}).
        """
        size, kind, faults = eval_size(self.args), self.args.preprocess, {}
        files = [source for row in rows for source in row]
        per_row = PER_ROW.get(self.args.dataset, 1)
        if self.args.dataset == "mrnet":
            reasons, pictures = [volume_fault(file) for file in files], None
        else:
            paths = [source for source in files if isinstance(source, str | Path)]
            decoded, array, reasons = decode_all(paths, kind, size, self.args.workers), [], []
            for source in files:
                picture, reason = decode_given(source, kind, size, decoded)
                array.append(picture)
                reasons.append(reason)
            pictures = GivenPictures(np.stack(array), np.arange(len(files)).reshape(len(rows), per_row))
        for place, reason in enumerate(reasons):
            if reason:
                row = place // per_row
                faults[row] = "; ".join([*([faults[row]] if row in faults else []), reason])
        targets = np.zeros((len(rows), len(self.labels)), np.float32)  # not looked at
        if self.task == "multiclass":
            targets = np.zeros(len(rows), np.int64)
        table = pd.DataFrame({"ID": range(len(rows)), "files": list(map(tuple, rows))})
        part = Part(table, pictures, targets, len(rows), size, kind)
        return part.subset([row for row in range(len(rows)) if row not in faults]), faults

    def answer(self, rows, mirrored=False):
        """Probabilities (n, K) of rows of pictures, NaN for what cannot be read, and {row: why}."""
        probs, faults = np.full((len(rows), len(self.labels)), np.nan, np.float32), {}
        for start in range(0, len(rows), ROWS):
            part, unread = self.open_rows(rows[start : start + ROWS])
            faults.update({start + row: reason for row, reason in unread.items()})
            if len(part):
                found = self.answer_part(part, mirrored)
                probs[start + part.table["ID"].to_numpy()] = found
        return probs, faults

    def answer_part(self, part, mirrored):
        criterion = engine.Criterion(self.task)
        probs = features.predict_live(self.args, self.fast, part, criterion, self.device)[1]
        if mirrored:
            other = features.predict_live(self.args, self.fast, part, criterion, self.device, mirrored=True)[
                1
            ]
            probs = (probs + other) / 2
        return probs

    def predict(self, *given, tta=False):
        """{label: probability} of one patient, photograph or exam; a list of them for a list, a folder or a
        CSV.

        given: LEFT, RIGHT for eye pairs, one picture, or an exam's folder. Pictures are paths, PIL images
        or arrays uint8 (H, W, 3); paths alone for knees. Raises InputError for what cannot be read.
        """
        rows, many = self.rows_of(given)
        probs, faults = self.answer(rows, tta)
        if faults:
            raise InputError(f"{len(faults)} cannot be read: {'; '.join(list(faults.values())[:3])}")
        answers = [dict(zip(self.labels, row.tolist(), strict=True)) for row in probs]
        return answers if many else answers[0]

    def rows_of(self, given):
        if len(given) == 1 and isinstance(given[0], list):
            rows = []
            for one in given[0]:
                rows += self.rows_of(one if isinstance(one, tuple | list) else (one,))[0]
            return rows, True
        if all(isinstance(source, str | Path) for source in given):
            frame, many = tables.given_rows(self.args.dataset, given)
            return list(frame["files"]), many
        wanted = PER_ROW.get(self.args.dataset, 1)
        if len(given) != wanted or self.args.dataset == "mrnet":
            raise InputError(
                f"{len(given)} picture(s) were given; this network takes {wanted} at a time, knees as files"
            )
        return [tuple(given)], False

    def heatmap(self, *given):
        """[(name, picture uint8 (S, S, 3), {label: map (h, w) in 0..1})] of one patient: a picture per eye
        or plane.
        """
        rows, _ = self.rows_of(given)
        part, faults = self.open_rows(rows[:1])
        if faults:
            raise InputError(faults[0])
        return self.explain(part, 0)


def decode_given(source, kind, size, decoded):
    """A picture as the network sees it (size, size, 3), and why there is none; paths come from `decoded` in
    turn.
    """
    if isinstance(source, str | Path):
        picture, _, reason, _, system = next(decoded)
        return picture, reason or system
    try:
        image = source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
        return prepare(image.convert("RGB"), kind, size), ""
    except (InputError, TypeError, ValueError) as error:
        return np.zeros((size, size, 3), np.uint8), f"a picture in memory: {error}"


class Ensemble:
    """Several networks for the same labels: the mean of their probabilities."""

    def __init__(self, members):
        self.members, first = members, members[0]
        for other in members[1:]:
            if (other.labels, other.args.dataset) != (first.labels, first.args.dataset):
                raise InputError(f"{other.path} has other labels or another data set than {first.path}")
        self.first, self.labels = first, first.labels

    def predict(self, *given, tta=False):
        """As Predictor.predict."""
        answers = [member.predict(*given, tta=tta) for member in self.members]
        if not isinstance(answers[0], list):
            return self.mean(answers)
        return [self.mean(row) for row in zip(*answers, strict=True)]

    def mean(self, answers):
        return {label: float(np.mean([answer[label] for answer in answers])) for label in self.labels}

    def heatmap(self, *given):
        """The first network's maps."""
        return self.first.heatmap(*given)
