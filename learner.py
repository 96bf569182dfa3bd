"""What learns in a run: the network with its weights, its loss, optimiser and schedule, new or as last.pt
has them.
"""

import copy
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import checkpoint
import engine
import metrics
import models
import samplers
from augment import prepare_batch
from dataset import FeatureSet
from errors import InputError
from features import TrunkFeatures, compiled, fit_batchnorm

SCHEDULE_FLAGS = (
    "lr",
    "momentum",
    "weight_decay",
    "schedule_epochs",
    "gamma",
    "max_lr",
    "warmup_epochs",
    "epochs",
)


@dataclass
class Learner:
    """The network and all that trains it; `trunk` is the digest of a trunk that is frozen for good, else
    None.
    """

    model: torch.nn.Module
    trunk: str | None
    features: TrunkFeatures
    criterion: engine.Criterion
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    cosine: tuple | None  # (warm-up epochs, epochs)
    seed: int
    precision: str
    device: torch.device
    wrapped: tuple = field(default=(None, None, None))

    def set_rate(self, epoch, step, steps):
        """The cosine schedule sets the rate of every step; the others have stepped after the last epoch."""
        if self.cosine is None:
            return
        warmup, epochs = self.cosine
        now = epoch + (step + 1) / steps
        factor = (
            now / warmup
            if now < warmup
            else 0.5 + 0.5 * math.cos(math.pi * (now - warmup) / (epochs - warmup))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def average(self):
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def evaluated(self):
        """The network that is validated and kept: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def distributed(self, module, frozen, compile):
        """`module` compiled and shared among the processes, built once and again when the trunk is set
        free.
        """
        if self.wrapped[:2] != (module, frozen):
            fast = compiled(module) if compile and not frozen else module
            self.wrapped = (module, frozen, engine.distribute(fast, self.device))
        return self.wrapped[2]

    def state(self):
        """What last.pt holds: a frozen trunk is named by its digest, everything else is stored."""
        part = self.model.classifier if self.trunk else self.model
        state = {"model": checkpoint.cpu_state(part), "ema": None, "trunk": self.trunk}
        if self.ema is not None:
            average = self.ema.module.classifier if self.trunk else self.ema.module
            state["ema"] = {"steps": int(self.ema.n_averaged), "model": checkpoint.cpu_state(average)}
        for name in ("optimizer", "scheduler", "scaler"):
            state[name] = getattr(self, name).state_dict()
        return state


def build_model(args, labels, rendered):
    """The network with its weights; random ones, loudly, where ImageNet's cannot be had and the data are
    rendered.
    """
    engine.seed_everything(args.seed)
    size = args.crop or args.size
    try:
        return models.build_model(args.model, len(labels), args.weights, size, args.trunk)
    except InputError as error:
        if not (rendered and args.weights == "imagenet"):
            raise
        print(f"!! RANDOM WEIGHTS: {error}.\n!! On rendered data the run goes on; its scores mean nothing.")
        args.weights = "none"
    engine.seed_everything(args.seed)
    return models.build_model(args.model, len(labels), "none", size, args.trunk)


def build_optimizer(args, model):
    groups = [{"params": list((model if args.fine_tune else model.classifier).parameters())}]
    if args.trunk_lr != 1:
        head = {"params": list(model.classifier.parameters())}
        groups = [{"params": list(model.backbone.parameters()), "lr": args.lr * args.trunk_lr}, head]
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
    elif args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=args.lr, weight_decay=args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    return optimizer


def build_scheduler(args, optimizer):
    """Stepped once an epoch. To add one: a name in arguments.SCHEDULES, a line here."""
    epochs, gamma = args.schedule_epochs, args.gamma
    if args.scheduler == "linear":
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=gamma, total_iters=epochs)
    if args.scheduler == "cyclic":
        cycle = dict(base_lr=args.lr, max_lr=args.max_lr, step_size_up=epochs)
        return lr_scheduler.CyclicLR(optimizer, mode="triangular2", **cycle)
    if args.scheduler == "step":
        return lr_scheduler.StepLR(optimizer, step_size=epochs, gamma=gamma)
    if args.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=epochs, factor=gamma, threshold=1e-4)
    return lr_scheduler.LambdaLR(optimizer, constant)  # none; cosine sets the rate itself, every step


def constant(_):
    return 1.0


def step_scheduler(args, scheduler, val_loss):
    if args.scheduler == "plateau":
        scheduler.step(val_loss)
    else:
        scheduler.step()


def loss_weight(args, data):
    """pos_weight or class weights of the training part; None without --weighted-loss."""
    if not args.weighted_loss:
        return None
    targets = data.train.targets
    if data.task == "multilabel":
        weight = samplers.pos_weight(targets, data.labels)
    else:
        weight = samplers.class_weights(targets, len(data.labels))
    return weight if args.weight_power == 1 else weight**args.weight_power


def build_learner(args, data, precision, device):
    """The Learner of a run with these arguments on this dataset.Data."""
    model = build_model(args, data.labels, data.facts["rendered"]).to(device)
    if args.bn == "fitted" and data.train.pictures is not None:
        fit_batchnorm(model, data.train.pictures, args, precision, device)
    frozen = not args.fine_tune and args.bn != "batch"
    optimizer = build_optimizer(args, model)
    ema = None
    if args.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    return Learner(
        model=model,
        trunk=checkpoint.state_digest(model.normalise, model.backbone) if frozen else None,
        features=TrunkFeatures(model, args, precision, device),
        criterion=engine.Criterion(data.task, loss_weight(args, data), device, args.loss),
        optimizer=optimizer,
        scheduler=build_scheduler(args, optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16" and args.fine_tune),
        ema=ema,
        cosine=(args.warmup_epochs, args.epochs) if args.scheduler == "cosine" else None,
        seed=args.seed,
        precision=precision,
        device=device,
    )


def restore(args, stored, learner, folder):
    """Weights, optimiser and schedule as last.pt holds them.

    Where --lr (...) is another now, the schedule is as if it had been so from the start.
    """
    if stored["trunk"] != learner.trunk:
        reason = "other weights, precision or torch version"
        raise InputError(f"the frozen trunk is not the one that {folder} was trained on ({reason})")
    path = folder / "last.pt"
    models.load_strict(learner.model.classifier if learner.trunk else learner.model, stored["model"], path)
    if learner.ema is not None:
        average = learner.ema.module.classifier if learner.trunk else learner.ema.module
        models.load_strict(average, stored["ema"]["model"], path)
        learner.ema.n_averaged.fill_(stored["ema"]["steps"])
    if stored["scaler"] and learner.scaler.is_enabled():  # a run in bf16 or fp32 had none
        learner.scaler.load_state_dict(stored["scaler"])
    groups = learner.optimizer.state_dict()["param_groups"]
    if all(getattr(args, name) == stored["args"][name] for name in SCHEDULE_FLAGS if name != "epochs"):
        learner.optimizer.load_state_dict(stored["optimizer"])
        learner.scheduler.load_state_dict(stored["scheduler"])
        return
    learner.optimizer.load_state_dict({"state": stored["optimizer"]["state"], "param_groups": groups})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of the schedule
        for row in stored["history"]:
            step_scheduler(args, learner.scheduler, row["val_loss"])


# ---------------------------------------------------------------- thresholds, learned on training patients


def out_of_fold(args, data, learner, epochs):
    """Probabilities (n, L) of the training rows, each from a head that was trained without its patient.

    The folds' heads start and learn as the run's own does, for as many epochs as it was kept after.
    """
    part, device = data.train, learner.device
    features = learner.features(part.pictures)
    patients, owner = np.unique(part.patients(), return_inverse=True)
    fold_of = np.random.default_rng(args.split_seed).permutation(len(patients)) % args.folds
    fold, found = fold_of[owner], np.zeros(part.targets.shape, np.float32)
    rows_set, prepare = FeatureSet(features, part.targets), Prepare(device)
    for number in engine.progress(range(args.folds), "folds"):
        own = new_head(args, data, learner)
        rest, left = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        module = engine.distribute(own.model.classifier.train(), device)
        for epoch in range(epochs):
            order = rest[samplers.epoch_order(args.sampler, part.targets[rest], args.seed, epoch)]
            batches = samplers.Batches(order, args.batch, engine.rank(), engine.world())
            loader = engine.make_loader(rows_set, batches, device=device)
            result = engine.train_one_epoch(module, loader, prepare, own, epoch, "fp32")
            step_scheduler(args, own.scheduler, result[0])
        batches = samplers.Batches(left, 4096, engine.rank(), engine.world())
        loader = engine.make_loader(rows_set, batches, device=device)
        head = own.evaluated().classifier
        found[left] = engine.predict(head, loader, prepare, engine.Criterion(data.task))[1]
    return found


class Prepare:
    """prepare_batch on a device, without random views."""

    def __init__(self, device):
        self.device = device

    def __call__(self, batch):
        return prepare_batch(batch, self.device)


def new_head(args, data, learner):
    """A Learner of a fresh head on the same trunk, as build_learner would make it."""
    engine.seed_everything(args.seed)
    size = args.crop or args.size
    fresh = models.build_model(args.model, len(data.labels), "none", size, args.trunk).classifier.to(
        learner.device
    )
    own = copy.copy(learner)
    own.model = torch.nn.Module()
    own.model.classifier = fresh
    own.optimizer = build_optimizer(args, own.model)
    own.scheduler = build_scheduler(args, own.optimizer)
    if learner.ema is not None:
        own.ema = AveragedModel(own.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    return own


def epoch_batches(args, targets, epoch):
    """This rank's batches of an epoch."""
    order = samplers.epoch_order(args.sampler, targets, args.seed, epoch)
    if args.drop_last and len(order) >= args.batch:
        order = order[: len(order) // args.batch * args.batch]
    return samplers.Batches(order, args.batch, engine.rank(), engine.world())


def learn_thresholds(args, data, learner, epochs):
    """A threshold per label (L,) from out-of-fold probabilities of the training patients."""
    return metrics.learned_thresholds(data.train.targets, out_of_fold(args, data, learner, epochs)).tolist()
