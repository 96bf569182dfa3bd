"""What a run leaves in its folder: checkpoints, results, TensorBoard, run.json, and what it prints."""

import functools
import shutil
import time

import pandas as pd

import checkpoint
import dataset
import engine
import metrics
import pictures
from cache import remove_leftovers, replace_file


def print_data(args, data, device, precision):
    if engine.rank() == 0:
        for note in data.facts["notes"]:
            print(f"note: {note}")
        print(f"{args.dataset}{' (RENDERED)' if data.facts['rendered'] else ''}: {len(data.train_targets)} training and {len(data.val_targets)} "
              f"validation rows, {data.facts['unreadable']} unreadable left out, {len(data.facts['repaired'])} repaired; "
              f"{args.model} on {device} in {precision}", flush=True)


class RunRecords:
    """The files of one run, written by rank 0. `state` and `learner` are the training loop's own, read as they stand."""

    def __init__(self, folder, args, data, learner, state, device, precision):
        self.folder, self.args, self.data, self.learner, self.state = folder, args, data, learner, state
        self.best_written = self.best_seconds = 0.0  # when best.pt was written last, and how long that took
        facts = {**data.facts, "repaired": len(data.facts["repaired"])}
        self.about = {"name": folder.name, "dataset": args.dataset, "model": args.model, "args": vars(args),
                      "command": checkpoint.command_line(folder), "commit": checkpoint.commit(),
                      "versions": checkpoint.versions(), "device": checkpoint.describe_machine(device), "precision": precision,
                      "processes": engine.world(), "labels": data.labels, "task": data.task, "data": facts,
                      "shuffled_labels": args.shuffle_labels, "started": checkpoint.now()}
        remove_leftovers(folder)
        split = [(i, part) for part, ids in data.rebuild["split"].items() for i in ids]
        table = pd.DataFrame(split, columns=["ID", "part"])
        replace_file(folder / "split.csv", functools.partial(table.to_csv, index=False), "w")
        if data.facts["repaired"]:
            (folder / "repaired.txt").write_text("\n".join(data.facts["repaired"]) + "\n")
        checkpoint.save_json(folder / "run.json", {**self.about, "status": "running"})
        self.tensorboard = self.open_tensorboard()
        self.save_last()

    # ---------------------------------------------------------------- checkpoints

    def save_last(self):
        """last.pt: a frozen trunk is named by its digest, everything else is stored."""
        learner = self.learner
        checkpoint.save_checkpoint(
            self.folder / "last.pt", "last", args=vars(self.args), trunk=learner.trunk,
            model=checkpoint.cpu_state(learner.model.classifier if learner.trunk else learner.model),
            optimizer=learner.optimizer.state_dict(), scheduler=learner.scheduler.state_dict(), scaler=learner.scaler.state_dict(), **self.state)

    def save_best(self):
        """best.pt: the whole network as it was in the best epoch, and all that test.py needs to rebuild the rest."""
        began = time.time()
        best, weights = self.state["best"], checkpoint.cpu_state(self.learner.model)
        weights.update({f"classifier.{key}": value for key, value in (best["classifier"] or {}).items()})
        checkpoint.save_checkpoint(self.folder / "best.pt", "best", model=weights, args=vars(self.args), epoch=best["epoch"],
                                   loss=best["loss"], scores=best["scores"], **self.data.rebuild)
        self.best_written, self.best_seconds = time.time(), time.time() - began

    # ---------------------------------------------------------------- TensorBoard

    def open_tensorboard(self):
        """A fresh event file that begins with all epochs so far: after a resume no epoch is there twice."""
        from torch.utils.tensorboard import SummaryWriter
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = SummaryWriter(self.folder)
        writer.add_text("arguments", "\n".join(f"    --{name} {value}" for name, value in sorted(vars(self.args).items())))
        for row in self.state["history"]:
            log_scalars(writer, row)
        return writer

    def finish_tensorboard(self):
        """Confusion matrices and sample patients of the best epoch, and the arguments beside the final scores."""
        import figures
        data, best = self.data, self.state["best"]
        probs = best["probs"].numpy()
        examples = pictures.examples((data.val, data.parts["val"]), data.val_targets, probs, data.labels, data.task)
        names = dataset.full_names(self.args.dataset, data.labels)
        for name, figure in (("confusion", figures.confusion(data.val_targets, probs, names, data.task)), ("samples", figures.samples(examples))):
            self.tensorboard.add_figure(name, figures.mark_rendered(figure) if data.facts["rendered"] else figure, best["epoch"])
        flags = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in vars(self.args).items()}
        self.tensorboard.add_hparams(flags, {f"best/{name}": value for name, value in best["scores"].items()}, run_name=".")
        self.tensorboard.close()

    # ---------------------------------------------------------------- after every epoch, and at the end

    def epoch(self, row, improved, silent):
        """Write what an epoch leaves; returns its line, and prints it unless a progress bar shows it."""
        scores = self.state["best"]["scores"]
        name = "accuracy" if "accuracy" in scores else "final_score" if "final" in scores else "auc"
        line = f"loss {row['train_loss']:.4f} / {row['val_loss']:.4f}  {name} {row[f'val_{name}']:.4f}"
        if not silent:
            print(f"epoch {row['epoch']}  lr {row['lr']:.5f}  {line}{'  *' if improved else ''}", flush=True)
        log_scalars(self.tensorboard, row)
        # A frozen trunk is 94 MB that never change, and its best head is in last.pt too: then best.pt is renewed
        # only as often as costs less than a twentieth of the time, and at the end. Else it precedes last.pt.
        if improved and (not self.learner.trunk or time.time() - self.best_written > 20 * self.best_seconds):
            self.save_best()
        self.save_last()
        return line

    def end(self, status, seconds):
        """The last files, the copy of best.pt in the working directory, and the last line."""
        state, best = self.state, self.state["best"]
        self.save_last()
        if best:
            if self.learner.trunk:
                self.save_best()
            checkpoint.write_sheet(self.folder / "train_results.xlsx", pd.DataFrame(state["history"]))
        if status == "finished":
            self.finish_tensorboard()
        checkpoint.save_json(self.folder / "run.json", {
            **self.about, "status": status, "seconds": round(state["seconds"], 1), "seconds_in_all": round(seconds, 1),
            "epochs_run": state["epoch"], "best_epoch": best and best["epoch"], "best_loss": best and best["loss"],
            "scores": best and best["scores"], "last_epoch": state["history"][-1] if state["history"] else None})
        if best:
            with open(self.folder / "best.pt", "rb") as source:
                replace_file("best.pt", functools.partial(shutil.copyfileobj, source))
        if status == "interrupted":
            print(f"stopped in epoch {state['epoch']} after step {len(state['record'])}; everything is saved. Go on with:\n"
                  f"    python train.py --resume {self.folder}")
            return
        for sentence in metrics.undefined_scores(self.data.val_targets, best["probs"].numpy(), self.data.labels, self.data.family):
            print(f"undefined: {sentence}")
        print(f"{self.folder}: best epoch {best['epoch']} of {state['epoch']}, validation loss {best['loss']:.4f}, {self.data.family} scores: "
              + ", ".join(f"{name} {value:.4f}" for name, value in best["scores"].items()))


def log_scalars(writer, row):
    for name, value in row.items():
        if name != "epoch":
            part, _, score = name.partition("_")
            writer.add_scalar(f"{score}/{part}" if score else name, value, row["epoch"])
    writer.flush()
