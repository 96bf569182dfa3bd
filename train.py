"""Train one network of the five studies.

    python train.py --lr 0.05 --scheduler linear --model v0

is experiment 3 of the eye-pair study: a linear head on a frozen ResNet-50, on data/odir (or, where that is missing, on
rendered stand-ins, which is said loudly). Writes runs/<name>/ (best.pt, last.pt, run.json, split.csv,
train_results.xlsx, TensorBoard events) and a copy of best.pt here; ends with the best epoch's validation scores.
"""

import argparse
import functools
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import augment
import checkpoint
import dataset
import engine
import metrics
import models
import pictures
import records
import samplers
from errors import Formatter, InputError, guard
from features import evaluate, loader_workers, training_data
from learner import SCHEDULES, build_learner, restore

# The other studies' published settings: what --dataset changes in the defaults below.
PUBLISHED = {
    "odir": {},
    "aptos": dict(model="efficientnet-b1", optimizer="adam", lr=0.01, scheduler="step", batch=30, epochs=50, patience=50,
                  preprocess="none", fine_tune=True, sampler="weighted"),
    "dr": dict(model="resnet18", lr=0.001, weight_decay=5e-4, scheduler="none", batch=64, epochs=25, patience=25, fine_tune=True,
               freeze_epochs=5, preprocess="centre", size=256, crop=224, augment="lab", drop_last=True),
    # Only network, optimiser and loss are published; the rest is ours.
    "retina": dict(model="alexnet", optimizer="adam", lr=0.001, scheduler="none", epochs=50, fine_tune=True, weights="none"),
    "mrnet": dict(model="mrnet", optimizer="adam", lr=1e-5, weight_decay=0.01, scheduler="plateau", batch=1, epochs=50, patience=50,
                  fine_tune=True, augment="knee", weighted_loss=True, preprocess="none"),
}
# A resumed run keeps these: they decide shapes, the rows, or what the optimiser and the schedule hold.
FIXED = ("dataset", "freeze_epochs", "model", "labels", "size", "crop", "preprocess", "fine_tune", "bn", "weights", "optimizer", "scheduler",
         "split_seed", "val_fraction", "test_fraction", "pseudo_labels", "min_confidence", "shuffle_labels", "name", "runs")
LEAST = {"size": 16, "batch": 1, "epochs": 1, "patience": 1, "freeze_epochs": 0, "views": 0, "seed": 0, "split_seed": 0, "lr": 1e-12, "max_lr": 1e-12,
         "weight_decay": 0, "momentum": 0, "min_confidence": 0, "schedule_epochs": 1, "workers": 0}
MOST = {"momentum": 1, "min_confidence": 1}
ORDER_FLAGS = ("batch", "sampler", "drop_last", "seed")  # a cut epoch is ended as it was begun


def get_args_parser(dataset_name="odir"):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, usage="python train.py [--flag value ...]",
                                     epilog="In square brackets: the default; in round ones: where it comes from.")
    yes_no = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=dataset.DATASETS, default="odir", help="data set; sets the published defaults below")
    group.add_argument("--data", help="its folder (default: data/<dataset>, else rendered stand-ins)")
    group.add_argument("--missing", choices=["stop", "drop"], default="stop", help="missing pictures: stop, or drop their rows")
    group.add_argument("--labels", nargs="+", help="retina, mrnet: which labels (default: the study's)")
    group.add_argument("--val-fraction", type=float, help="validation patients (published: 0.2; aptos 733/3662)")
    group.add_argument("--test-fraction", type=float, help="patients kept away (published: 0; aptos 583/3662)")
    group.add_argument("--split-seed", type=int, default=42, help="seed of the split (write-up)")
    group.add_argument("--shuffle-labels", action="store_true", help="control: the training patients' labels, shuffled")
    group.add_argument("--pseudo-labels", metavar="FILE", help="retina: spread_labels.py's CSV joins the training part")
    group.add_argument("--min-confidence", type=float, default=0.0, help="least confidence of a pseudo-label")

    group = parser.add_argument_group("pictures")
    group.add_argument("--preprocess", choices=["fov", "none", "centre"], default="fov",
                       help="fov: the eye alone (write-up); centre: shorter side, centre crop")
    group.add_argument("--size", type=int, default=224, help="pixels a side (write-up)")
    group.add_argument("--crop", type=int, help="pixels a side of a random crop in training; evaluation resizes to it")
    group.add_argument("--augment", choices=["none", *augment.RECIPES], default="none",
                       help="eyes: experiments 8, 9; pair: 14-17; lab: dr; knee: mrnet")
    group.add_argument("--views", type=int, default=0, help="cycle through N augmented views; 0: a fresh one per epoch (write-up)")

    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=models.MODELS, default="v0", help="v0, v1, v2: heads on the dual ResNet-50")
    group.add_argument("--weights", default="imagenet", help="imagenet, none, or a best.pt or state_dict")
    group.add_argument("--fine-tune", action=yes_no, default=False, help="train the trunk too (13-17, the other studies)")
    group.add_argument("--freeze-epochs", type=int, default=0, help="of --fine-tune: the head alone first (dr lab: 5)")
    group.add_argument("--bn", choices=["fitted", "pretrained", "batch"], help="BatchNorm statistics: fitted once (default), the weights' "
                       "own, or moving with each batch (default with --fine-tune)")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd", help="(write-up)")
    group.add_argument("--lr", type=float, default=0.05, help="learning rate (experiment 3); cyclic: lower end")
    group.add_argument("--momentum", type=float, default=0.9, help="of sgd (write-up)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="(write-up: none)")
    group.add_argument("--scheduler", choices=SCHEDULES, default="linear", help="stepped once an epoch (experiment 3)")
    group.add_argument("--schedule-epochs", type=int, help="linear: length (50); cyclic: rise (10); step: period (1); plateau: wait (3)")
    group.add_argument("--gamma", type=float, help="factor: linear (0.1), step (0.7), plateau (0.3)")
    group.add_argument("--max-lr", type=float, default=0.1, help="cyclic: upper end (experiment 4)")
    group.add_argument("--batch", type=int, default=32, help="rows of one step, all processes (write-up)")
    group.add_argument("--epochs", type=int, default=100, help="at most (write-up)")
    group.add_argument("--patience", type=int, default=20, help="epochs without a lower loss (write-up)")
    group.add_argument("--weighted-loss", action=yes_no, default=False, help="pos_weight or class weights of the training part (experiment 11)")
    group.add_argument("--sampler", choices=samplers.SAMPLERS, default="shuffle", help="balanced: experiment 12; weighted: aptos")
    group.add_argument("--drop-last", action=yes_no, default=False, help="leave out a short last batch (dr lab)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    group.add_argument("--precision", choices=["auto", *engine.PRECISIONS], default="auto",
                       help="auto: the fastest native one")
    group.add_argument("--compile", action=yes_no, default=False, help="torch.compile; pays off in long runs")
    group.add_argument("--workers", type=int, help="processes that read pictures (default: all cores)")
    group.add_argument("--feature-cache", action=yes_no, default=True, help="keep a frozen trunk's features on disk")
    group.add_argument("--cache", default="cache", help="folder of kept pictures and features")

    group = parser.add_argument_group("run")
    group.add_argument("--runs", default="runs", help="folder of the run folders")
    group.add_argument("--name", help="of the run folder (default: a number)")
    group.add_argument("--resume", metavar="RUN", help="go on with runs/<name>; flags given here win")
    group.add_argument("--seed", type=int, default=42, help="of weights, order, dropout, views (write-up)")
    parser.set_defaults(**PUBLISHED[dataset_name])
    return parser


def get_args(argv=None):
    """Parsed flags; with --resume the stored ones, overruled by what is given here -> (args, last.pt or None)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=dataset.DATASETS, default="odir")
    parser = get_args_parser(first.parse_known_args(argv)[0].dataset)
    args = parser.parse_args(argv)
    state = None
    if args.resume:
        given = get_args_parser()
        for action in given._actions:
            action.default = argparse.SUPPRESS
        given._defaults.clear()
        given = vars(given.parse_args(argv))
        state = checkpoint.load_last(args.resume)
        refused = [name for name in FIXED if name in given and given[name] != state["args"].get(name)]
        if refused:
            raise InputError("a resumed run keeps its " + ", ".join(f"--{name.replace('_', '-')} {state['args'].get(name)}" for name in refused)
                             + ": start a new run to change it")
        changed = [name for name in ORDER_FLAGS if name in given and given[name] != state["args"][name]]
        if changed and state["record"]:
            raise InputError(f"the run stopped within epoch {state['epoch']}, and --{changed[0].replace('_', '-')} can change between epochs "
                             f"only: end this epoch first, with --resume {args.resume} --epochs {state['epoch'] + 1}")
        args = argparse.Namespace(**{**vars(args), **state["args"], **given})
    check_args(args)
    return args, state


def check_args(args):
    """Flags that do not go together are refused, not ignored."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {least:g} or more")
        if value is not None and value > MOST.get(name, math.inf):
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {MOST[name]} or less")
    name, task = args.dataset, dataset.DATASETS[args.dataset]["task"]
    recipes = {"odir": ("eyes", "pair"), "mrnet": ("knee",)}.get(name, ("eyes", "lab"))
    takes_schedule = [flag for flag, usual in zip(("schedule_epochs", "gamma"), SCHEDULES[args.scheduler], strict=True) if usual is not None]
    for wrong, message in (
        (name not in models.MODELS[args.model],
         f"--model {args.model} does not take {name}; these do: {', '.join(model for model, sets in models.MODELS.items() if name in sets)}"),
        (args.labels and len(set(args.labels)) < len(args.labels), f"--labels {' '.join(args.labels or [])}: a label is named twice"),
        (args.pseudo_labels and name != "retina", "--pseudo-labels belongs to --dataset retina"),
        (args.min_confidence and not args.pseudo_labels, "--min-confidence needs --pseudo-labels"),
        (args.crop and (args.augment == "none" or not 16 <= args.crop <= args.size or name == "mrnet"),
         f"--crop {args.crop} needs --augment and a --size (here {args.size}) that it fits into"),
        (args.augment not in ("none", *recipes), f"--augment {args.augment}: {name} takes {' or '.join(recipes)}"),
        (args.views and args.augment == "none", "--views needs --augment: without it every epoch sees the same pictures"),
        (name == "mrnet" and args.size > 256, f"--size {args.size}: MRNet's slices are 256 x 256"),
        (name == "mrnet" and args.size < 64, f"--size {args.size} is too small for MRNet's AlexNet trunks: 64 or more"),
        (args.freeze_epochs and not args.fine_tune, "--freeze-epochs needs --fine-tune: without it the trunk is frozen all along"),
        (args.sampler == "weighted" and task != "multiclass",
         f"--sampler weighted needs one class a picture; {name} has several labels a row: use balanced"),
        (args.schedule_epochs is not None and "schedule_epochs" not in takes_schedule, f"--schedule-epochs: --scheduler {args.scheduler} has none"),
        (args.gamma is not None and "gamma" not in takes_schedule, f"--gamma: --scheduler {args.scheduler} has none"),
        (args.gamma is not None and not 0 < args.gamma < 1, f"--gamma {args.gamma}: expected a factor between 0 and 1"),
        (args.max_lr != 0.1 and args.scheduler != "cyclic", "--max-lr belongs to --scheduler cyclic"),
        (args.scheduler == "cyclic" and args.lr >= args.max_lr, f"--lr {args.lr} is cyclic's lower end: expected less than --max-lr {args.max_lr}"),
        (args.momentum != 0.9 and args.optimizer != "sgd", "--momentum belongs to --optimizer sgd"),
    ):
        if wrong:
            raise InputError(message)


# ---------------------------------------------------------------- data

def find_data(name, given):
    """The data folder: --data as given, data/<name>, or rendered stand-ins, drawn here when they are wanted first."""
    root = Path(given or Path("data") / name)
    if given or root.is_dir():
        return root
    root = Path("data") / "rendered" / name
    line = "!" * 78
    print(f"{line}\n!! There is no data/{name}. This run takes RENDERED STAND-INS from {root}:\n"
          f"!! its scores say nothing about real eyes or knees. Real data: README, Data.\n{line}", flush=True)
    script = Path(__file__).parent / "render_data.py"
    if not dataset.is_rendered(root) and subprocess.run([sys.executable, script, root, "--dataset", name, "--patients", "160"]).returncode:
        raise InputError(f"the stand-ins could not be rendered into {root}")
    return root


def load_parts(args):
    """Read, split, leave out what is missing -> (parts, labels, facts for run.json)."""
    root = engine.rank0(find_data, args.dataset, args.data)
    table, labels, notes = dataset.read(args.dataset, root, args.labels)
    parts = dataset.split(args.dataset, table, args.val_fraction, args.test_fraction, args.split_seed)
    if args.pseudo_labels:
        parts["train"], added = dataset.add_pseudo_labels(parts["train"], labels, root, args.pseudo_labels, args.min_confidence)
        if set(parts["train"]["ID"]) & (set(parts["val"]["ID"]) | set(parts["test"]["ID"])):
            raise InputError(f"{args.pseudo_labels} names pictures of the validation or test part: they must never be trained on")
        if not added:
            raise InputError(f"{args.pseudo_labels} holds no label of a confidence of {args.min_confidence} or more")
        notes.append(f"{added} pseudo-labelled picture(s) join the training part")
    parts, left_out = dataset.drop_missing(parts, args.missing)
    if left_out:
        notes.append(f"{left_out} row(s) without a picture are left out (--missing drop)")
    return parts, labels, {"root": str(root), "rendered": dataset.is_rendered(root), "notes": notes, "left_out": left_out}


@dataclass
class Data:
    """What a run trains and validates on; `facts` go into run.json, `rebuild` into best.pt."""
    parts: dict  # {"train", "val", "test"}: tables
    labels: list
    task: str
    family: str
    train: object  # Pictures, None for volumes
    val: object
    train_targets: np.ndarray
    val_targets: np.ndarray
    facts: dict
    rebuild: dict


def train_prior(targets, num_labels):
    """Share of the training rows that carry each label."""
    return (targets.mean(0) if targets.ndim == 2 else np.bincount(targets, minlength=num_labels) / len(targets)).tolist()


def load_data(args):
    """Everything about the data, in sentences too; InputError where nothing is left to train on."""
    parts, labels, facts = load_parts(args)
    task, family = (dataset.DATASETS[args.dataset][key] for key in ("task", "family"))
    kind = None if args.dataset == "mrnet" else args.preprocess
    parts["train"], train, bad_train = pictures.open_part(parts["train"], kind, args.size, args.cache, args.workers, args.missing)
    parts["val"], val, bad_val = pictures.open_part(parts["val"], kind, args.crop or args.size, args.cache, args.workers, args.missing)
    train_targets, val_targets = (dataset.targets_of(parts[part], labels) for part in ("train", "val"))
    if not len(train_targets) or not len(val_targets):
        raise InputError(f"{len(train_targets)} training and {len(val_targets)} validation rows are left: there is nothing to train on")
    if args.shuffle_labels:
        train_targets = train_targets[np.random.default_rng(args.seed).permutation(len(train_targets))]
    facts.update(digest=dataset.data_digest(parts, labels), unreadable=bad_train + bad_val,
                 repaired=sorted({file for part in (train, val) if part for file in part.repaired}),
                 parts={part: len(table) for part, table in parts.items()})
    rebuild = {"labels": labels, "task": task, "family": family, "prior": train_prior(train_targets, len(labels)),
               "split": {part: [str(i) for i in table["ID"]] for part, table in parts.items()},
               "data": {name: facts[name] for name in ("root", "rendered", "digest", "parts")}}
    return Data(parts, labels, task, family, train, val, train_targets, val_targets, facts, rebuild)


def open_run(args, stored, data, learner, device):
    """A new run folder and a fresh state, or the folder and state of the run that goes on -> (folder, state)."""
    state = {"epoch": 0, "history": [], "best": None, "stale": 0, "record": [], "digest": data.facts["digest"], "seconds": 0.0}
    if not stored:
        return engine.rank0(checkpoint.new_run_folder, args.runs, args.name, f"{args.dataset}-{args.model}"), state
    folder = Path(args.resume)
    if stored["digest"] != data.facts["digest"]:
        raise InputError(f"the data in {data.facts['root']} are not those that {folder} was trained on: a resumed run needs the same rows and labels")
    if stored["trunk"] != learner.trunk:
        raise InputError(f"the frozen trunk is not the one that {folder} was trained on (other weights, precision or torch version)")
    models.load_strict(learner.model.classifier if learner.trunk else learner.model, stored["model"], folder / "last.pt")
    restore(args, stored, learner.optimizer, learner.scheduler)
    learner.scaler.load_state_dict(stored["scaler"])
    state = {key: stored[key] for key in state}
    state["record"] = engine.own_record(state["record"], device)
    return folder, state


def epoch_batches(args, targets, epoch, start):
    """This rank's batches of an epoch, from batch number `start` on."""
    order = samplers.epoch_order(args.sampler, targets, args.seed, epoch)
    if args.drop_last and len(order) >= args.batch:
        order = order[:len(order) // args.batch * args.batch]
    return samplers.Batches(order, args.batch, start, engine.rank(), engine.world())


def is_over(args, state):
    return state["epoch"] >= args.epochs or state["stale"] >= args.patience


# ---------------------------------------------------------------- main

def main(argv=None):
    # Arguments, data, network, run folder
    started = time.time()
    args, stored = get_args(argv)
    device = engine.start_processes(engine.pick_device(args.device))
    precision = engine.pick_precision(args.precision, device, args.model)
    data = load_data(args)
    records.print_data(args, data, device, precision)
    learner = build_learner(args, data, device, precision)
    folder, state = open_run(args, stored, data, learner, device)
    if stored and not state["record"] and is_over(args, state) and checkpoint.run_facts(folder).get("status") == "finished":
        print(f"{folder} is finished: {state['epoch']} epochs, {state['stale']} of them since the best. To go on, raise --epochs or --patience")
        return 0
    args.name = folder.name
    writer = records.RunRecords(folder, args, data, learner, state, device, precision) if engine.rank() == 0 else None
    val_criterion = engine.Criterion(data.task)
    prepare = functools.partial(augment.prepare_batch, device=device, recipe=args.augment, size=args.crop or args.size)

    # Epochs
    if args.bn == "batch" and engine.world() > 1 and device.type != "cuda":
        print("BatchNorm statistics move, and a CPU has no synchronised BatchNorm: each process normalises by its own share")
    stop = engine.StopSignal()
    before = time.time() - state["seconds"]
    epochs = engine.progress(range(state["epoch"], args.epochs), folder.name, initial=state["epoch"], total=args.epochs)
    for epoch in epochs:
        if is_over(args, state):
            break
        frozen = not args.fine_tune or epoch < args.freeze_epochs
        learner.model.backbone.requires_grad_(not frozen)
        rows, module, context = training_data(args, frozen, epoch, learner.model, learner.features, data.train, data.parts["train"],
                                              data.train_targets, precision, device)
        engine.train_mode(module, hold_batchnorm=args.bn != "batch")
        module = engine.distribute(models.compiled(module) if args.compile and not frozen else module, device)
        loader = engine.make_loader(rows, epoch_batches(args, data.train_targets, epoch, len(state["record"])),
                                    loader_workers(args, device, rows), device)
        lr = learner.optimizer.param_groups[0]["lr"]
        complete = engine.train_one_epoch(module, loader, prepare, learner.optimizer, learner.scaler, learner.criterion, context,
                                          args.seed, epoch, state["record"], stop)
        state["seconds"] = time.time() - before
        engine.share_buffers(learner.model)
        if not complete:
            state["record"] = engine.merge_record(state["record"])
            break
        train_loss, *train_outputs = engine.summarise(state["record"])
        val_loss, _, probs = evaluate(args, learner.model, learner.features, data.val, data.parts["val"], data.val_targets,
                                      val_criterion, precision, device)
        engine.check_finite(val_loss, epoch, "validation")

        # Scores, schedule, best epoch, files
        scores = metrics.scores(data.family, data.val_targets, probs, data.labels)
        row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
        for part, values in (("train", metrics.scores(data.family, *train_outputs, data.labels)), ("val", scores)):
            row.update({f"{part}_{'final_score' if name == 'final' else name}": value for name, value in values.items()})
        state["history"].append(row)
        state["record"], state["epoch"] = [], epoch + 1
        learner.scheduler.step(*([val_loss] if args.scheduler == "plateau" else []))
        improved = state["best"] is None or val_loss < state["best"]["loss"]
        state["stale"] = 0 if improved else state["stale"] + 1
        if improved:
            state["best"] = {"epoch": epoch, "loss": val_loss, "scores": scores, "probs": torch.from_numpy(probs),
                             "classifier": checkpoint.cpu_state(learner.model.classifier, copy=True) if learner.trunk else None}
        if writer:
            epochs.set_postfix_str(writer.epoch(row, improved, silent=not epochs.disable))
    epochs.close()

    # End: finished, or stopped by a signal
    status = "interrupted" if stop.number and (state["record"] or not is_over(args, state)) else "finished"
    if writer:
        writer.end(status, time.time() - started)
    return 128 + stop.number if status == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(guard(main))
