"""What a run leaves in its folder: checkpoints, results, TensorBoard, run.json; and what it prints."""

import functools
import shutil
import time
from pathlib import Path

import pandas as pd
import torch

import checkpoint
import engine
import learner as learning
import metrics
import tables
from cache import remove_leftovers, replace_file
from errors import InputError

SHARE = 20  # a checkpoint is written as often as costs less than a twentieth of the time


def print_data(args, data, device, precision):
    for note in data.facts["notes"]:
        print(f"note: {note}")
    if data.facts["duplicates"]:
        print(f"note: {data.facts['duplicates']} validation row(s) are trained on too (--duplicates keep)")
    rendered = " (RENDERED)" if data.facts["rendered"] else ""
    found = f"{data.facts['unreadable']} unreadable left out, {len(data.facts['repaired'])} repaired"
    print(
        f"{args.dataset}{rendered}: {len(data.train)} training and {len(data.val)} validation rows, {found}; "
        f"{args.model} on {device} in {precision}",
        flush=True,
    )


def open_run(args, stored, data, learner):
    """A new run folder and a fresh state, or those of the run that goes on -> (folder, state)."""
    if not stored:
        state = {"epoch": 0, "history": [], "best": None, "stale": 0, "seconds": 0.0}
        return engine.from_rank0(checkpoint.new_run_folder, args), state | {"digest": data.facts["digest"]}
    folder = Path(args.resume)
    if stored["digest"] != data.facts["digest"]:
        root = data.facts["root"]
        raise InputError(
            f"the data in {root} are not those of {folder}: a resumed run needs the same rows and labels"
        )
    learning.restore(args, stored, learner, folder)
    names = ("epoch", "history", "best", "stale", "seconds", "digest")
    return folder, {name: stored[name] for name in names}


def is_over(args, state):
    patience_ended = args.keep == "best" and state["stale"] >= args.patience
    return state["epoch"] >= args.epochs or patience_ended


def history_row(epoch, lr, train_loss, val_loss, train_scores, val_scores):
    """A row of train_results.xlsx."""
    row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
    for part, scores in (("train", train_scores), ("val", val_scores)):
        for name, value in scores.items():
            row[f"{part}_{'final_score' if name == 'final' else name}"] = value
    return row


class RunRecords:
    """The files of one run, written by rank 0. `state` and `learner` are the training loop's own, read as
    they stand.
    """

    def __init__(self, folder, args, data, learner, state):
        self.folder, self.args, self.data, self.learner, self.state = folder, args, data, learner, state
        self.lock = checkpoint.lock_run(folder)
        self.written = {
            "best": (0.0, 0.0),
            "last": (0.0, 0.0),
        }  # when each was written, and how long that took
        self.best_digest = None
        facts = {**data.facts, "repaired": len(data.facts["repaired"])}
        self.about = {
            **{"name": folder.name, "dataset": args.dataset, "model": args.model, "args": vars(args)},
            **{"trunk_name": learner.model.trunk_name, "labels": data.labels, "task": data.task},
            **{"family": data.family, "ordered": data.ordered, "data": facts, "started": checkpoint.now()},
            **{"weights": {"given": args.weights, "trunk": learner.features.digest}},
            **{"command": checkpoint.command_line(folder), "commit": checkpoint.commit()},
            **{"versions": checkpoint.versions(), "device": checkpoint.describe_machine(learner.device)},
            **{"precision": learner.precision, "processes": engine.world()},
            **{"shuffled_labels": args.shuffle_labels},
        }
        remove_leftovers(folder)
        self.split = {part: [str(i) for i in frame["ID"]] for part, frame in data.frames.items()}
        rows = [(i, part) for part, ids in self.split.items() for i in ids]
        table = pd.DataFrame(rows, columns=["ID", "part"])
        replace_file(folder / "split.csv", functools.partial(table.to_csv, index=False), "w")
        if data.facts["repaired"]:
            (folder / "repaired.txt").write_text("\n".join(data.facts["repaired"]) + "\n")
        checkpoint.save_json(folder / "run.json", {**self.about, "status": "running"})
        self.tensorboard = self.open_tensorboard()
        self.save_last()

    # ---------------------------------------------------------------- checkpoints

    def is_due(self, name):
        at, cost = self.written[name]
        return time.time() - at > SHARE * cost

    def save_last(self):
        """last.pt: everything that the next epoch needs."""
        began = time.time()
        path, state = self.folder / "last.pt", self.learner.state()
        checkpoint.save_checkpoint(path, "last", args=vars(self.args), **state, **self.state)
        self.written["last"] = time.time(), time.time() - began

    def save_best(self):
        """best.pt: the network as it was in the kept epoch, and all that test.py needs to rebuild the rest."""
        began, best, data = time.time(), self.state["best"], self.data
        weights = checkpoint.cpu_state(self.learner.evaluated())
        weights.update({f"classifier.{key}": value for key, value in (best["classifier"] or {}).items()})
        self.best_digest = checkpoint.state_digest(weights)
        frames = data.frames.items()
        targets = {part: torch.from_numpy(tables.targets_of(frame, data.labels)) for part, frame in frames}
        origin = {
            name: data.facts[name] for name in ("rendered", "digest", "parts", "patients", "duplicates")
        }
        checkpoint.save_checkpoint(
            self.folder / "best.pt",
            "best",
            **{"model": weights, "args": vars(self.args), "digest": self.best_digest},
            **{name: best[name] for name in ("epoch", "loss", "scores", "thresholds")},
            **{"labels": data.labels, "task": data.task, "family": data.family, "ordered": data.ordered},
            **{"prior": data.prior(), "split": self.split, "targets": targets},
            data={"root": str(Path(data.facts["root"]).resolve()), **origin},
        )
        self.written["best"] = time.time(), time.time() - began

    # ---------------------------------------------------------------- TensorBoard

    def open_tensorboard(self):
        """A fresh event file that begins with all epochs so far: after a resume no epoch is there twice."""
        from torch.utils.tensorboard import SummaryWriter

        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = SummaryWriter(self.folder)
        flags = sorted(vars(self.args).items())
        writer.add_text("arguments", "\n".join(f"    --{name} {value}" for name, value in flags))
        for row in self.state["history"]:
            log_scalars(writer, row)
        return writer

    def finish_tensorboard(self):
        """Confusion matrices of the best epoch, and the arguments beside the final scores."""
        import figures

        data, best = self.data, self.state["best"]
        names = tables.full_names(self.args.dataset, data.labels)
        figure = figures.confusion(data.val.targets, best["probs"].numpy(), names, data.task)
        if data.facts["rendered"]:
            figures.mark_rendered(figure)
        figure.set_dpi(60)
        self.tensorboard.add_figure("confusion", figure, best["epoch"])
        flags = {}
        for name, value in vars(self.args).items():
            flags[name] = value if isinstance(value, bool | int | float | str) else str(value)
        scores = {f"best/{name}": value for name, value in best["scores"].items()}
        self.tensorboard.add_hparams(flags, scores, run_name=".")
        self.tensorboard.close()

    # ---------------------------------------------------------------- after every epoch, and at the end

    def epoch(self, kept, silent):
        """Write what an epoch leaves; returns its line, and prints it unless a progress bar shows it."""
        row = self.state["history"][-1]
        main = next(name for name in ("val_accuracy", "val_final_score", "val_auc") if name in row)
        line = f"loss {row['train_loss']:.4f} / {row['val_loss']:.4f}  {main.removeprefix('val_')} {row[main]:.4f}"
        if not silent:
            print(f"epoch {row['epoch']}  lr {row['lr']:.3g}  {line}{'  *' if kept else ''}", flush=True)
        log_scalars(self.tensorboard, row)
        # A frozen trunk never changes and its best head is in last.pt too, so best.pt may be late. A trunk
        # that learns is stored at once, before last.pt: after a kill no better epoch is missing.
        if kept and (not self.learner.trunk or self.is_due("best")):
            self.save_best()
        if self.is_due("last"):
            self.save_last()
        return line

    def interrupted(self):
        """Say how to go on: last.pt holds the last whole epoch that was written."""
        checkpoint.save_json(
            self.folder / "run.json", {**self.about, **self.summary(), "status": "interrupted"}
        )
        print(f"\nstopped in epoch {self.state['epoch']}, which a resume repeats from its start. Go on with:")
        print(f"    python train.py --resume {self.folder}", flush=True)
        self.unlock()

    def unlock(self):
        self.lock.close()
        (self.folder / ".lock").unlink(missing_ok=True)

    def summary(self):
        state, best = self.state, self.state["best"] or {}
        return {
            **{
                "seconds": round(state["seconds"], 1),
                "epochs_run": state["epoch"],
                "best_digest": self.best_digest,
            },
            **{"best_epoch": best.get("epoch"), "best_loss": best.get("loss"), "scores": best.get("scores")},
            **{"thresholds": best.get("thresholds"), "last_epoch": (state["history"] or [None])[-1]},
        }

    def end(self, seconds):
        """The last files, the copy of best.pt in the working directory, and the last line."""
        state, best = self.state, self.state["best"]
        if self.learner.trunk or best["thresholds"] or not self.best_digest:
            self.save_best()
        self.save_last()
        checkpoint.write_sheet(self.folder / "train_results.xlsx", pd.DataFrame(state["history"]))
        self.finish_tensorboard()
        facts = {**self.about, **self.summary(), "status": "finished", "seconds_in_all": round(seconds, 1)}
        checkpoint.save_json(self.folder / "run.json", facts)
        family, probs = self.data.family, best["probs"].numpy()
        for sentence in metrics.undefined_scores(self.data.val.targets, probs, self.data.labels, family):
            print(f"undefined: {sentence}")
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items())
        place = f"best epoch {best['epoch']} of {state['epoch']}, validation loss {best['loss']:.4f}"
        print(f"{self.folder}: {place}, {family} scores: {scores}", flush=True)
        self.unlock()
        self.copy_best()

    def copy_best(self):
        """best.pt of this folder: last, because a folder that cannot be written must not cost the scores."""
        try:
            with open(self.folder / "best.pt", "rb") as source:
                replace_file("best.pt", functools.partial(shutil.copyfileobj, source))
        except PermissionError:
            print(f"note: best.pt could not be copied into {Path.cwd()}; it is {self.folder / 'best.pt'}")


def log_scalars(writer, row):
    for name, value in row.items():
        if name != "epoch":
            part, _, score = name.partition("_")
            writer.add_scalar(f"{score}/{part}" if score else name, value, row["epoch"])
    writer.flush()
