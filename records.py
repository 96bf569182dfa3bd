"""What a run leaves in its folder: checkpoints, results, TensorBoard, run.json; and what it prints."""

import contextlib
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pandas as pd

import checkpoint
import engine
import learner as learning
import metrics
from arguments import EYE_MODELS
from cache import remove_leftovers, replace_file, replacing
from errors import InputError

SHARE = 20  # a checkpoint is written as often as costs less than a twentieth of the time
NEW_STATE = {"epoch": 0, "history": [], "best": None, "stale": 0, "seconds": 0.0, "changes": []}


def print_data(args, data, device, precision):
    facts, notes = data.facts, [*data.facts["notes"]]
    if facts["duplicates"]:
        notes.append(f"{facts['duplicates']} validation row(s) are trained on too (--duplicates keep)")
    if args.weights == "none" and not args.fine_tune:
        notes.append("the trunk's weights are random and stay so; --fine-tune trains them")
    for note in notes:
        print(f"note: {note}")
    name = f"{args.dataset} (RENDERED)" if facts["rendered"] else args.dataset
    rows = f"{len(data.train)} training and {len(data.val)} validation rows"
    print(f"{name}: {rows}, {facts['unreadable']} unreadable left out, {len(facts['repaired'])} repaired")
    network = args.model if args.model not in EYE_MODELS else f"{args.model} on {args.trunk}"
    print(f"{network}, weights {args.weights}, on {device} in {precision}; loss: training / validation")


def open_run(args, stored, data, learner):
    """A new run folder and a fresh state, or those of the run that goes on -> (folder, state, lock)."""
    if not stored:
        folder = engine.from_rank0(checkpoint.new_run_folder, args)
        lock = checkpoint.lock_run(folder) if engine.rank() == 0 else None
        known = {name: data.facts[name] for name in ("digest", "duplicates", "notes")}
        return folder, {**NEW_STATE, "history": [], **known, "seen": sorted(data.seen)}, lock
    folder = Path(args.resume)
    with engine.together():
        if stored["digest"] != data.facts["digest"]:
            raise InputError(f"the data in {data.facts['root']} are not those of {folder}: give those")
        learning.restore(args, stored, learner, folder)
    data.facts |= {name: stored[name] for name in ("duplicates", "notes")}  # --weights may be gone by now
    state = {name: stored[name] for name in (*NEW_STATE, "digest", "duplicates", "notes", "seen")}
    return folder, state, stored["lock"]


def is_over(args, state):
    return state["epoch"] >= args.epochs or args.keep == "best" and state["stale"] >= args.patience


def is_finished(args, stored, folder):
    """Whether a resume has nothing to do: no epoch, no thresholds, no last files."""
    whole = checkpoint.run_facts(folder).get("status") == "finished" and Path(folder, "best.pt").exists()
    return whole and is_over(args, stored) and args.folds == stored["args"]["folds"]


class RunRecords:
    """The files of one run, written by rank 0; `state` and `learner` are the training loop's own."""

    def __init__(self, folder, args, data, learner, state):
        self.folder, self.args, self.data, self.learner, self.state = folder, args, data, learner, state
        self.task = {name: getattr(data, name) for name in ("labels", "task", "family", "ordered")}
        self.due = 0.0  # when checkpoints are written again
        self.saved_best = self.best_digest = None  # what best.pt holds, and its digest
        remove_leftovers(folder)
        rows = [(name, part) for part, names in data.rows.items() for name in names]
        table = pd.DataFrame(rows, columns=["ID", "part"])
        replace_file(folder / "split.csv", lambda stream: table.to_csv(stream, index=False), "w")
        if files := data.facts["repaired"]:
            replace_file(folder / "repaired.txt", lambda stream: stream.write("\n".join(files) + "\n"), "w")
        before = checkpoint.run_facts(folder) if args.resume else {}
        commands = [before.get("command"), shlex.join(["python", *sys.argv])]
        # The commit of the code that runs, with + when files differ from it.
        git, commit = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"], ""
        with contextlib.suppress(OSError):  # git may not be there
            asked = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
            commit = subprocess.run(git, **asked).stdout.strip()
        versions = {name: metadata.version(name) for name in ("numpy", "torch", "torchvision")}
        versions["python"] = platform.python_version()
        self.about = {"args": vars(args), "command": " ; ".join(filter(None, commands)), **self.task}
        self.about |= {"commit": commit or "unknown", "versions": versions, "precision": learner.precision}
        self.about |= {"device": checkpoint.describe_machine(learner.device), "processes": engine.world()}
        # What it started from: a fine-tuned run that goes on has other weights by now.
        trunk = learner.frozen_trunk if args.resume else learner.features.digest
        trunk = before.get("trunk_digest", trunk)
        self.about |= {"trunk_name": learner.model.trunk_name, "trunk_digest": trunk}
        self.about["data"] = {**data.facts, "repaired": len(data.facts["repaired"])}
        self.about["started"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.save_facts(status="running")
        self.save_last()
        from torch.utils.tensorboard import SummaryWriter  # late: rank 0 alone needs it

        # A fresh event file that begins with all epochs so far: after a resume no epoch is there twice.
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.tensorboard = SummaryWriter(folder)
        flags = [f"    --{name} {value}" for name, value in sorted(vars(args).items())]
        self.tensorboard.add_text("arguments", "\n".join(flags))
        for row in state["history"]:
            self.log(row)

    def save_last(self):
        """last.pt: everything that the next epoch needs, the best network so far included."""
        state = dict(args=vars(self.args), **self.learner.state(), **self.state)
        checkpoint.save_checkpoint(self.folder / "last.pt", "last", **state)
        self.saved_epoch = self.state["epoch"]

    def save_best(self):
        """best.pt: the network as it was in the kept epoch, and all else that test.py needs."""
        best, data, facts = self.state["best"], self.data, self.data.facts
        weights = {**checkpoint.cpu_state(self.learner.model), **best["weights"]}
        about = {name: best[name] for name in ("epoch", "loss", "scores", "thresholds")} | self.task
        known = {name: facts[name] for name in "rendered digest parts patients duplicates notes".split()}
        about["data"] = known | {"root": str(Path(facts["root"]).resolve())}
        about |= {"args": vars(self.args), "prior": data.prior(), "rows": data.rows}
        digest = checkpoint.network_digest(weights, best["thresholds"])
        about |= {"model": weights, "digest": digest, "seen": self.state["seen"]}
        checkpoint.save_checkpoint(self.folder / "best.pt", "best", **about)
        self.saved_best, self.best_digest = best, digest

    def log(self, row):
        for name, value in row.items():
            if name != "epoch":
                part, _, score = name.partition("_")
                self.tensorboard.add_scalar(f"{score}/{part}" if score else name, value, row["epoch"])
        self.tensorboard.flush()

    def epoch(self, kept):
        """Print an epoch's line and write what it leaves."""
        row = self.state["history"][-1]
        main = next(name for name in ("accuracy", "final_score", "auc") if f"val_{name}" in row)
        loss = f"loss {row['train_loss']:.4f} / {row['val_loss']:.4f}"
        line = f"epoch {row['epoch']}  lr {row['lr']:.3g}  {loss}  {main} {row[f'val_{main}']:.4f}"
        print(f"{line}  *" if kept else line)
        self.log(row)
        # The best network is in last.pt too, so either file may be some epochs late.
        if (began := time.perf_counter()) > self.due:
            if self.state["best"] is not self.saved_best:
                self.save_best()
            self.save_last()
            self.due = time.perf_counter() + SHARE * (time.perf_counter() - began)

    def interrupted(self):
        """Bring best.pt and run.json up to date: last.pt holds the last whole epoch that was written."""
        if self.state["best"] is not self.saved_best:
            self.save_best()
        self.save_facts(status="interrupted")
        whole = f"stopped after {self.state['epoch']} whole epoch(s)"
        print(f"\n{whole}; a resume goes on after {self.saved_epoch} of them, which last.pt holds")

    def save_facts(self, **more):
        """run.json: how the run was made and what came of it so far."""
        state, best = self.state, self.state["best"] or {}
        told = {"seconds": round(state["seconds"], 1), "epochs_run": state["epoch"]}
        told |= {"best_epoch": best.get("epoch"), "best_loss": best.get("loss"), "changes": state["changes"]}
        told |= {"scores": best.get("scores"), "thresholds": best.get("thresholds")}
        told["best_digest"] = self.best_digest
        checkpoint.save_json(self.folder / "run.json", {**self.about, **told, **more})

    def end(self, seconds):
        """The last files, the last line, and the copy of best.pt in the working directory."""
        state, best = self.state, self.state["best"]
        self.save_best()
        self.save_last()
        checkpoint.write_sheet(self.folder / "train_results.xlsx", pd.DataFrame(state["history"]))
        self.tensorboard.close()
        self.save_facts(status="finished", seconds_in_all=round(seconds, 1))
        family, probs = self.data.family, best["probs"].numpy()
        for sentence in metrics.undefined_scores(self.data.val.targets, probs, self.data.labels, family):
            print(f"undefined: {sentence}")
        if state["epoch"] < self.args.epochs:
            print(f"stopped: {state['stale']} epochs without a lower validation loss (--patience)")
        place = f"{self.folder}: {self.args.keep} epoch {best['epoch']} of {state['epoch']}"
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items())
        print(f"{place}, validation loss {best['loss']:.4f}, {family} scores: {scores}")
        if Path("run.json").exists():  # the working folder is a run's own
            print("the best.pt here stays: it is another run's")
            return
        try:  # last, because a folder that cannot be written must not cost the scores
            with replacing(Path("best.pt")) as temporary:
                shutil.copyfile(self.folder / "best.pt", temporary)
            print("best.pt here is a copy of this run's")
        except OSError as error:
            print(f"note: best.pt could not be copied into {Path.cwd()} ({error.strerror})")
