"""What a run leaves in its folder: checkpoints, results, TensorBoard, run.json; and what it prints."""

import datetime
import functools
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision

import checkpoint
import engine
import learner as learning
import metrics
import tables
from arguments import EYE_MODELS
from cache import file_stamps, remove_leftovers, replace_file
from errors import InputError

SHARE = 20  # a checkpoint is written as often as costs less than a twentieth of the time
NEW_STATE = {"epoch": 0, "history": [], "best": None, "stale": 0, "seconds": 0.0, "changes": []}


def print_data(args, data, device, precision):
    facts = data.facts
    for note in facts["notes"]:
        print(f"note: {note}")
    if facts["duplicates"]:
        print(f"note: {facts['duplicates']} validation row(s) are trained on too (--duplicates keep)")
    rendered = " (RENDERED)" if facts["rendered"] else ""
    rows = f"{len(data.train)} training and {len(data.val)} validation rows"
    found = f"{facts['unreadable']} unreadable left out, {len(facts['repaired'])} repaired"
    if args.weights == "none" and not args.fine_tune:
        print("note: the trunk's weights are random and stay so; --fine-tune trains them")
    network = args.model if args.model not in EYE_MODELS else f"{args.model} on {args.trunk}"
    print(f"{args.dataset}{rendered}: {rows}, {found}")
    print(
        f"{network}, weights {args.weights}, on {device} in {precision}; loss: training / validation",
        flush=True,
    )


def claim_run(args, stored):
    """Refuse a name that is taken, lock a run that goes on -> its lock, else None."""
    checkpoint.check_name(args)
    if not args.resume or engine.rank():
        return None
    lock = checkpoint.lock_run(args.resume)
    if stored["stamps"] != file_stamps([Path(args.resume) / "last.pt"]):
        raise InputError(f"{args.resume} went on while it was read: give the command again")
    return lock


def open_run(args, stored, data, learner, lock):
    """A new run folder and a fresh state, or those of the run that goes on -> (folder, state, lock)."""
    if not stored:
        folder = engine.from_rank0(checkpoint.new_run_folder, args)
        lock = checkpoint.lock_run(folder) if engine.rank() == 0 else None
        return folder, {**NEW_STATE, "history": [], "digest": data.facts["digest"]}, lock
    folder = Path(args.resume)
    with engine.together():
        if stored["digest"] != data.facts["digest"]:
            raise InputError(
                f"the data in {data.facts['root']} are not those of {folder}: give the same ones"
            )
        learning.restore(args, stored, learner, folder)
    return folder, {name: stored[name] for name in (*NEW_STATE, "digest")}, lock


def is_over(args, state):
    patience_ended = args.keep == "best" and state["stale"] >= args.patience
    return state["epoch"] >= args.epochs or patience_ended


def is_finished(args, stored, folder):
    """Whether a resume has nothing to do: no epoch, no thresholds, no last files."""
    written = checkpoint.run_facts(folder).get("status") == "finished"
    return written and is_over(args, stored) and args.folds == stored["args"]["folds"]


def history_row(epoch, lr, train_loss, val_loss, train_scores, val_scores):
    """A row of train_results.xlsx."""
    row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
    for part, scores in (("train", train_scores), ("val", val_scores)):
        for name, value in scores.items():
            row[f"{part}_{'final_score' if name == 'final' else name}"] = value
    return row


class RunRecords:
    """The files of one run, written by rank 0; `state` and `learner` are the training loop's own."""

    def __init__(self, folder, args, data, learner, state):
        self.folder, self.args, self.data, self.learner, self.state = folder, args, data, learner, state
        self.task = {name: getattr(data, name) for name in ("labels", "task", "family", "ordered")}
        self.written = {}  # name -> (when it was written, how long that took)
        self.best_digest = None  # of state["best"], once best.pt holds it
        remove_leftovers(folder)
        rows = [(name, part) for part, names in data.rows.items() for name in names]
        table = pd.DataFrame(rows, columns=["ID", "part"])
        replace_file(folder / "split.csv", functools.partial(table.to_csv, index=False), "w")
        if data.facts["repaired"]:
            (folder / "repaired.txt").write_text("\n".join(data.facts["repaired"]) + "\n")
        commands = [checkpoint.run_facts(folder).get("command"), shlex.join(["python", *sys.argv])]
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
        versions["python"] = platform.python_version()
        about = {"name": folder.name, "dataset": args.dataset, "model": args.model, "args": vars(args)}
        about |= {"command": " ; ".join(filter(None, commands)), "commit": checkpoint.commit()}
        about |= {"versions": versions, "device": checkpoint.describe_machine(learner.device)}
        about |= {"precision": learner.precision, "processes": engine.world(), **self.task}
        about |= {"weights": {"given": args.weights, "trunk": learner.features.digest}}
        about |= {"trunk_name": learner.model.trunk_name, "shuffled_labels": args.shuffle_labels}
        about |= {"data": {**data.facts, "repaired": len(data.facts["repaired"])}}
        about |= {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        self.about = about  # what run.json says of how the run was made
        checkpoint.save_json(folder / "run.json", {**about, "status": "running"})
        self.save_last()
        from torch.utils.tensorboard import SummaryWriter  # late, as figures below: rank 0 alone draws

        # A fresh event file that begins with all epochs so far: after a resume no epoch is there twice.
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.tensorboard = SummaryWriter(folder)
        flags = "\n".join(f"    --{name} {value}" for name, value in sorted(vars(args).items()))
        self.tensorboard.add_text("arguments", flags)
        for row in state["history"]:
            self.log(row)

    def is_due(self, name):
        at, cost = self.written.get(name, (-float("inf"), 0.0))
        return time.perf_counter() - at > SHARE * cost

    def save(self, name, **state):
        began = time.perf_counter()
        checkpoint.save_checkpoint(self.folder / f"{name}.pt", name, **state)
        self.written[name] = time.perf_counter(), time.perf_counter() - began

    def save_last(self):
        """last.pt: everything that the next epoch needs, the best network so far included."""
        self.save("last", args=vars(self.args), **self.learner.state(), **self.state)

    def save_best(self):
        """best.pt: the network as it was in the kept epoch, and all else that test.py needs."""
        best, data, facts = self.state["best"], self.data, self.data.facts
        weights = {**checkpoint.cpu_state(self.learner.model), **best["weights"]}
        told = ("rendered", "digest", "parts", "patients", "duplicates")
        origin = {name: facts[name] for name in told}
        origin["root"] = str(Path(facts["root"]).resolve())
        found = {name: best[name] for name in ("epoch", "loss", "scores", "thresholds")}
        about = {
            "args": vars(self.args),
            "digest": checkpoint.network_digest(weights, best["thresholds"]),
            **found,
            **self.task,
        }
        about |= {"prior": data.prior(), "rows": data.rows, "seen": sorted(data.seen), "data": origin}
        self.save("best", model=weights, **about)
        self.best_digest = about["digest"]

    def log(self, row):
        for name, value in row.items():
            if name != "epoch":
                part, _, score = name.partition("_")
                self.tensorboard.add_scalar(f"{score}/{part}" if score else name, value, row["epoch"])
        self.tensorboard.flush()

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

    def epoch(self, kept):
        """Print an epoch's line and write what it leaves."""
        row = self.state["history"][-1]
        main = next(name for name in ("val_accuracy", "val_final_score", "val_auc") if name in row)
        line = (
            f"epoch {row['epoch']}  lr {row['lr']:.3g}  loss {row['train_loss']:.4f} / {row['val_loss']:.4f}"
        )
        print(f"{line}  {main.removeprefix('val_')} {row[main]:.4f}{'  *' if kept else ''}", flush=True)
        self.log(row)
        # The best network is in last.pt too, so either file may be some epochs late.
        if kept:
            self.best_digest = None
        if not self.best_digest and self.is_due("best"):
            self.save_best()
        if self.is_due("last"):
            self.save_last()

    def interrupted(self):
        """Bring best.pt and run.json up to date: last.pt holds the last whole epoch that was written."""
        if self.state["best"] and not self.best_digest:
            self.save_best()
        self.save_facts(status="interrupted")
        whole = self.state["epoch"]
        print(f"\nstopped after {whole} whole epoch(s); a resume repeats the one under way", flush=True)

    def save_facts(self, **more):
        """run.json"""
        state, best = self.state, self.state["best"] or {}
        told = {"seconds": round(state["seconds"], 1), "epochs_run": state["epoch"]}
        told |= {"best_epoch": best.get("epoch"), "best_loss": best.get("loss"), "scores": best.get("scores")}
        told |= {"best_digest": self.best_digest, "thresholds": best.get("thresholds")}
        told["changes"] = state["changes"]
        told["last_epoch"] = state["history"][-1] if state["history"] else None
        checkpoint.save_json(self.folder / "run.json", {**self.about, **told, **more})

    def end(self, seconds):
        """The last files, the last line, and the copy of best.pt in the working directory."""
        state, best = self.state, self.state["best"]
        self.save_best()
        self.save_last()
        checkpoint.write_sheet(self.folder / "train_results.xlsx", pd.DataFrame(state["history"]))
        self.finish_tensorboard()
        self.save_facts(status="finished", seconds_in_all=round(seconds, 1))
        family, probs = self.data.family, best["probs"].numpy()
        for sentence in metrics.undefined_scores(self.data.val.targets, probs, self.data.labels, family):
            print(f"undefined: {sentence}")
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items())
        place = f"{'last' if self.args.keep == 'last' else 'best'} epoch {best['epoch']} of {state['epoch']}"
        place += f", validation loss {best['loss']:.4f}"
        if state["epoch"] < self.args.epochs:
            print(f"stopped: {state['stale']} epochs without a lower validation loss (--patience)")
        print(f"{self.folder}: {place}, {family} scores: {scores}", flush=True)
        try:  # last, because a folder that cannot be written must not cost the scores
            with open(self.folder / "best.pt", "rb") as source:
                replace_file("best.pt", functools.partial(shutil.copyfileobj, source))
            print("best.pt here is a copy of this run's")
        except OSError as error:
            place = f"{Path.cwd()} ({error.strerror})"
            print(f"note: best.pt could not be copied into {place}; it is {self.folder / 'best.pt'}")
