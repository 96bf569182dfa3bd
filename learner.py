"""What learns in a run: network, loss, optimiser and schedule, new or as last.pt has them."""

import copy
import functools
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import checkpoint
import engine
import models
import samplers
from augment import prepare_batch
from dataset import FeatureSet, eval_size
from errors import InputError
from features import TrunkFeatures, compiled, fit_batchnorm, training_data

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass
class Learner:
    """The network and all that trains it; `trunk`: digest of a trunk that is frozen for good, else None."""

    model: torch.nn.Module
    trunk: str | None
    features: TrunkFeatures
    criterion: engine.Criterion
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None  # of what trains: the classifier of a frozen trunk, else the model
    cosine: tuple | None  # (warm-up epochs, epochs)
    seed: int
    precision: str
    device: torch.device
    wrapped: tuple = (None, None, None)

    def trained(self):
        """The part that training changes."""
        return self.model.classifier if self.trunk else self.model

    def evaluated(self):
        """The network that is validated and kept: the averaged one, where there is one."""
        if self.ema is None:
            return self.model
        return with_classifier(self.model, self.ema.module) if self.trunk else self.ema.module

    def kept_weights(self):
        """A copy of that network as it stands, without a frozen trunk: {name: tensor} on the CPU."""
        network = self.evaluated()
        if self.trunk:
            network = torch.nn.ModuleDict({"classifier": network.classifier})
        return checkpoint.cpu_state(network, copy=True)

    def set_rate(self, epoch, step, steps):
        """The cosine schedule sets the rate of every step; the others have stepped after the last epoch."""
        if self.cosine is None:
            return
        (warmup, epochs), now = self.cosine, epoch + (step + 1) / steps
        if now <= warmup:
            factor = now / warmup
        else:
            factor = 0.5 + 0.5 * math.cos(math.pi * (now - warmup) / (epochs - warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def average(self):
        if self.ema is not None:
            self.ema.update_parameters(self.trained())

    def distributed(self, module, frozen, compile):
        """`module` compiled and shared among the processes; made anew only when the trunk is set free."""
        if self.wrapped[:2] != (module, frozen):
            fast = compiled(module) if compile and not frozen else module
            self.wrapped = (module, frozen, engine.distribute(fast, self.device))
        return self.wrapped[2]

    def state(self):
        """What last.pt holds: a frozen trunk is named by its digest, everything else is stored."""
        state = {"model": checkpoint.cpu_state(self.trained()), "trunk": self.trunk, "ema": None}
        if self.ema is not None:
            state["ema"] = checkpoint.cpu_state(self.ema)
        # BatchNorm as it was fitted: another precision or torch version would fit it a little otherwise.
        state["buffers"] = {name: buffer.cpu() for name, buffer in self.model.backbone.named_buffers()}
        return state | {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}


def with_classifier(model, classifier):
    """The same network with another classifier; everything else is shared, not copied."""
    shared = {id(child): child for child in model.children()}
    return copy.deepcopy(model, shared | {id(model.classifier): classifier})


def build_model(args, labels, rendered, load=True):
    """The network with its weights; on rendered data random ones, loudly, where ImageNet's cannot be had."""
    engine.seed_everything(args.seed)
    try:
        return models.build_model(args.model, len(labels), args.weights, eval_size(args), args.trunk, load)
    except InputError as error:
        if not (rendered and args.weights == "imagenet"):
            raise
        print(f"!! RANDOM WEIGHTS: {error}.\n!! On rendered data the run goes on; its scores mean nothing.")
    args.weights = "none"
    return build_model(args, labels, rendered)


def build_optimizer(args, model):
    groups = [{"params": list((model if args.fine_tune else model.classifier).parameters())}]
    if args.trunk_lr != 1:
        head = {"params": list(model.classifier.parameters())}
        groups = [{"params": list(model.backbone.parameters()), "lr": args.lr * args.trunk_lr}, head]
    rules = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        rules["momentum"] = args.momentum
    return OPTIMIZERS[args.optimizer](groups, **rules)


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
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)  # none; cosine sets the rate itself, every step


def step_scheduler(args, scheduler, val_loss):
    """The plateau schedule looks at the validation loss."""
    if args.scheduler == "plateau":
        scheduler.step(val_loss)
    else:
        scheduler.step()


def build_ema(args, part):
    if not args.ema:
        return None
    return AveragedModel(part, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)


def build_criterion(args, data, targets, device):
    """The training loss, weighted (--weighted-loss) by pos_weight or class weights of these targets."""
    if not args.weighted_loss:
        return engine.Criterion(data.task, None, device, args.loss)
    if data.task == "multilabel":
        weight = samplers.pos_weight(targets, data.labels)
    else:
        weight = samplers.class_weights(targets, len(data.labels))
    return engine.Criterion(data.task, weight**args.weight_power, device, args.loss)


def build_learner(args, data, precision, device, stored=None):
    """The Learner of a run with these arguments on this dataset.Data, as it starts (`stored`: last.pt)."""
    with engine.together():
        # All weights of a fine-tuned run that goes on are in last.pt; the file of --weights may be gone.
        load = not (stored and args.fine_tune)
        model = build_model(args, data.labels, data.facts["rendered"], load).to(device)
        criterion = build_criterion(args, data, data.train.targets, device)
        if stored:
            model.backbone.load_state_dict(stored["buffers"], strict=False)
    if device.type == "cpu" and args.fine_tune:
        models.depthwise_in_float32(model)
    if args.bn == "fitted" and data.train.pictures is not None and not stored:
        fit_batchnorm(model, data.train.pictures, args, precision, device)
    frozen = not args.fine_tune and args.bn != "batch"
    head_alone = frozen and data.train.pictures is not None  # on kept features, in float32
    features = TrunkFeatures(model, args, precision, device)
    trunk = features.digest if frozen else None
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and not head_alone)
    ema = build_ema(args, model.classifier if frozen else model)
    cosine = (args.warmup_epochs, args.epochs) if args.scheduler == "cosine" else None
    rules = (criterion, optimizer, scheduler, scaler, ema, cosine)
    return Learner(model, trunk, features, *rules, args.seed, precision, device)


def restore(args, stored, learner, folder):
    """Weights and optimiser as last.pt holds them; the schedule follows from its epochs."""
    if stored["trunk"] != learner.trunk:
        raise InputError(f"the frozen trunk is not the one of {folder} (other weights or another seed)")
    path = folder / "last.pt"
    models.load_strict(learner.trained(), stored["model"], path)
    if learner.ema is not None:
        models.load_strict(learner.ema, stored["ema"], path)
    if stored["scaler"] and learner.scaler.is_enabled():  # a run in bf16 or fp32 had none
        learner.scaler.load_state_dict(stored["scaler"])
    # Rates are those of the flags: another --lr or --gamma counts as if it had been given from the start.
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": stored["optimizer"]["state"], "param_groups": groups})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of the schedule
        for row in stored["history"]:
            step_scheduler(args, learner.scheduler, row["val_loss"])


def epoch_batches(args, targets, epoch, rows=None):
    """This rank's batches of an epoch over all rows, or over these alone."""
    rows = np.arange(len(targets)) if rows is None else rows
    order = rows[samplers.epoch_order(args.sampler, targets[rows], args.seed, epoch)]
    if args.drop_last and len(order) >= args.batch:
        order = order[: len(order) // args.batch * args.batch]
    return samplers.Batches(order, args.batch, engine.rank(), engine.world())


def folds_of(args, patients):
    """The fold (n,) of each row: all rows of a patient are in the same one."""
    names, owner = np.unique(patients, return_inverse=True)
    if args.folds > len(names):
        raise InputError(f"--folds {args.folds}: there are {len(names)} training patients")
    return (np.random.default_rng(args.split_seed).permutation(len(names)) % args.folds)[owner]


def out_of_fold(args, data, learner, epochs):
    """Probabilities (n, L) of the training rows, each from a head that was trained without its patient.

    The folds' heads start and learn as the run's own does, for as many epochs as it was kept after; a
    plateau schedule looks at their training loss.
    """
    part, device, plain = data.train, learner.device, engine.Criterion(data.task)
    fold, found = folds_of(args, part.patients()), np.zeros(part.targets.shape, np.float32)
    prepare = functools.partial(prepare_batch, device=device, recipe=args.augment, size=eval_size(args))
    seen = FeatureSet(learner.features(part.pictures), part.targets)
    for number in engine.progress(range(args.folds), "folds"):
        rest, left = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        own = new_head(args, data, learner, rest)
        for epoch in range(epochs):
            batches = epoch_batches(args, part.targets, epoch, rest)
            rows, head, precision = training_data(args, own, part, epoch, batches)
            module = own.distributed(head.train(), True, False)
            loader = engine.make_loader(rows, batches, device=device)
            loss, *_ = engine.train_one_epoch(module, loader, prepare, own, epoch, precision)
            step_scheduler(args, own.scheduler, loss)
        batches = samplers.Batches(left, 4096, engine.rank(), engine.world())
        loader = engine.make_loader(seen, batches, device=device)
        found[left] = engine.predict(own.evaluated().classifier, loader, prepare, plain)[1]
    return found


def new_head(args, data, learner, rows):
    """The Learner of a fresh head on the same trunk, to be trained on these rows alone."""
    engine.seed_everything(args.seed)
    head, own = copy.deepcopy(learner.model.classifier), copy.copy(learner)
    for layer in head.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    own.model, own.wrapped = with_classifier(learner.model, head), (None, None, None)
    targets = data.train.targets[rows]
    targets[0, ~targets.any(0)] = 1  # a label that is left out altogether has no weight, and needs none
    own.criterion = build_criterion(args, data, targets, learner.device)
    own.optimizer = build_optimizer(args, own.model)
    own.scheduler, own.ema = build_scheduler(args, own.optimizer), build_ema(args, head)
    return own
