"""What learns in a run: network, loss, optimiser and schedule, new or as last.pt has them."""

import copy
import functools
import math
import warnings

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
from features import TrunkFeatures, compiled, evaluate, fit_batchnorm, loader_workers, with_fast_trunk


class Learner:
    """The network and all that trains it; `frozen_trunk`: digest of one that never learns, else None."""

    def __init__(self, args, model, features):
        self.args, self.model, self.features = args, model, features
        self.frozen_trunk = None if args.fine_tune or args.bn == "batch" else features.digest
        self.seed, self.precision, self.device = args.seed, features.precision, features.device

    def start(self, data, targets):
        """Loss, optimiser, schedule, averaged weights: as before the first epoch, to learn these targets."""
        args, self.wrapped = self.args, (None, None, None)
        self.trained = self.model.classifier if self.frozen_trunk else self.model  # what training changes
        self.criterion = build_criterion(args, data, targets, self.device)
        self.optimizer = build_optimizer(args, self.model)
        self.scheduler = build_scheduler(args, self.optimizer)
        head_alone = self.frozen_trunk is not None and data.train.pictures is not None  # it learns in float32
        half = self.precision == "fp16" and not head_alone
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        rule = get_ema_multi_avg_fn(args.ema)
        self.ema = AveragedModel(self.trained, multi_avg_fn=rule, use_buffers=True) if args.ema else None

    def evaluated(self):
        """The network that is validated and kept: the averaged one, where there is one."""
        if self.ema is None:
            return self.model
        return with_classifier(self.model, self.ema.module) if self.frozen_trunk else self.ema.module

    def kept_weights(self):
        """A copy of that network as it stands, without a frozen trunk: {name: tensor} on the CPU."""
        whole = self.evaluated()
        kept = torch.nn.ModuleDict({"classifier": whole.classifier}) if self.frozen_trunk else whole
        return checkpoint.cpu_state(kept, copy=True)

    def set_rate(self, epoch, step, steps):
        """The cosine schedule sets the rate of every step; the others step after each epoch."""
        if self.args.scheduler != "cosine":
            return
        now, warmup = epoch + (step + 1) / steps, self.args.warmup_epochs
        past, whole = now - warmup, self.args.epochs - warmup
        factor = now / warmup if past <= 0 else 0.5 + 0.5 * math.cos(math.pi * past / whole)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def train_epoch(self, part, epoch, rows=slice(None)):
        """Train on these rows of a part -> (mean loss, targets, probs); a frozen trunk's head in float32."""
        args, device = self.args, self.device
        frozen = not args.fine_tune or epoch < args.freeze_epochs
        self.model.backbone.requires_grad_(not frozen)
        batches = epoch_batches(args, part.targets, epoch, rows)
        view = None
        if args.augment != "none":
            view = epoch % args.views if args.views else epoch
        if not frozen or args.bn == "batch" or part.pictures is None:
            data, precision = part.dataset(args.seed, view, device), self.precision
            module = self.model.to(memory_format=torch.channels_last)
        elif not args.feature_cache:
            data, precision = part.dataset(args.seed, view, device), "fp32"
            module = with_fast_trunk(self.model, self.precision).to(device)
        else:
            # Of a random view every drawn (row, repeat) is a picture of its own, with features of its own.
            keys = None if view is None else sorted(set(batches.keys))
            data = FeatureSet(self.features(part.pictures, view, keys), part.targets, keys)
            module, precision = self.model.classifier, "fp32"
        module.train()
        for layer in engine.batchnorms(module) if args.bn != "batch" else ():
            layer.eval()  # their statistics stay as they are
        if self.wrapped[:2] != (module, frozen):  # made anew when another module trains
            fast = compiled(module) if args.compile and not frozen else module
            self.wrapped = (module, frozen, engine.distribute(fast, device))
        loader = engine.make_loader(data, batches, loader_workers(args, device, data), device)
        prepare = functools.partial(prepare_batch, device=device, recipe=args.augment, size=eval_size(args))
        return engine.train_one_epoch(self.wrapped[2], loader, prepare, self, epoch, precision)

    def state(self):
        """What last.pt holds: a frozen trunk is named by its digest, everything else is stored."""
        # BatchNorm as it was fitted: another precision or torch version would fit it a bit differently.
        buffers = {name: buffer.cpu() for name, buffer in self.model.backbone.named_buffers()}
        ema = None if self.ema is None else checkpoint.cpu_state(self.ema)
        own = dict(trunk=self.frozen_trunk, ema=ema, buffers=buffers, scaler=self.scaler.state_dict())
        return own | dict(model=checkpoint.cpu_state(self.trained), optimizer=self.optimizer.state_dict())


def with_classifier(model, classifier):
    """The same network with another classifier; everything else is shared, not copied."""
    shared = {id(child): child for child in model.children()}
    return copy.deepcopy(model, shared | {id(model.classifier): classifier})


def build_optimizer(args, model):
    groups = [{"params": list(model.classifier.parameters())}]
    if args.fine_tune:
        groups.insert(0, {"params": list(model.backbone.parameters()), "lr": args.lr * args.trunk_lr})
    own = {"momentum": args.momentum} if args.optimizer == "sgd" else {}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(groups, lr=args.lr, weight_decay=args.weight_decay, **own)


def build_scheduler(args, optimizer):
    """Stepped once an epoch. To add one: a name in arguments.SCHEDULES, a line here."""
    epochs, gamma = args.schedule_epochs, args.gamma
    if args.scheduler == "linear":
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=gamma, total_iters=epochs)
    if args.scheduler == "cyclic":
        rules = dict(base_lr=args.lr, max_lr=args.max_lr, step_size_up=epochs, mode="triangular2")
        return lr_scheduler.CyclicLR(optimizer, **rules)
    if args.scheduler == "step":
        return lr_scheduler.StepLR(optimizer, step_size=epochs, gamma=gamma)
    if args.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=epochs, factor=gamma)
    if args.scheduler in ("none", "cosine"):  # cosine sets the rate itself, every step
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    raise InputError(f"--scheduler {args.scheduler}: build_scheduler has no branch for it")


def step_scheduler(args, scheduler, val_loss):
    if args.scheduler == "plateau":
        scheduler.step(val_loss)
    else:
        scheduler.step()


def build_criterion(args, data, targets, device):
    """The training loss, weighted (--weighted-loss) by pos_weight or class weights of these targets."""
    weight = None
    if args.weighted_loss and data.task == "multilabel":
        weight = samplers.pos_weight(targets, data.labels) ** args.weight_power
    elif args.weighted_loss:
        weight = samplers.class_weights(targets, len(data.labels)) ** args.weight_power
    return engine.Criterion(data.task, weight, device, args.loss)


def build_learner(args, data, precision, device, stored=None):
    """The Learner of a run as it starts (`stored`: last.pt). On rendered data its weights may be random."""
    with engine.together():
        settings = dict(size=eval_size(args), trunk=args.trunk, labels=data.labels)
        settings["load"] = not (stored and args.fine_tune)  # of which last.pt holds all weights
        torch.manual_seed(args.seed)
        try:
            model = models.build_model(args.model, len(data.labels), args.weights, **settings)
        except InputError as error:
            if not (data.facts["rendered"] and args.weights == "imagenet"):
                raise
            print(f"!! RANDOM WEIGHTS: {error}.\n!! On rendered data the run goes on; scores mean nothing.")
            args.weights = "none"
            torch.manual_seed(args.seed)
            model = models.build_model(args.model, len(data.labels), "none", **settings)
        model.to(device)
        if stored:
            model.backbone.load_state_dict(stored["buffers"], strict=False)
    if device.type == "cpu" and args.fine_tune:
        models.depthwise_in_float32(model)
    if args.bn == "fitted" and data.train.pictures is not None and not stored:
        fit_batchnorm(model, data.train.pictures, args, precision, device)
    learner = Learner(args, model, TrunkFeatures(model, args, precision, device))
    with engine.together():
        learner.start(data, data.train.targets)
    return learner


def restore(args, stored, learner, folder):
    """Weights and optimiser as last.pt holds them; the schedule follows from its epochs."""
    if stored["trunk"] != learner.frozen_trunk:
        raise InputError(f"the frozen trunk is not the one of {folder} (other weights or another seed)")
    models.load_strict(learner.trained, stored["model"], folder / "last.pt")
    if learner.ema is not None:
        models.load_strict(learner.ema, stored["ema"], folder / "last.pt")
    if stored["scaler"] and learner.scaler.is_enabled():  # a run in bf16 or fp32 had none
        learner.scaler.load_state_dict(stored["scaler"])
    # Rates are those of the flags: another --lr or --gamma counts as if it had been given from the start.
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": stored["optimizer"]["state"], "param_groups": groups})
    with warnings.catch_warnings(action="ignore"):  # torch warns: no step of the optimiser came before
        for row in stored["history"]:
            step_scheduler(args, learner.scheduler, row["val_loss"])


def epoch_batches(args, targets, epoch, rows=slice(None)):
    """This rank's batches of an epoch over all rows, or over these alone."""
    rows = np.arange(len(targets))[rows]
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
    """Probabilities (n, L) of the training rows by heads that are trained as the run's, on other patients."""
    part, plain = data.train, engine.Criterion(data.task)
    fold, found = folds_of(args, part.patients()), np.zeros(part.targets.shape, np.float32)
    for number in engine.progress(range(args.folds), "folds"):
        rest, left = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        torch.manual_seed(args.seed)  # of a fresh head on the same trunk
        head, own = copy.deepcopy(learner.model.classifier), copy.copy(learner)
        for layer in head.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        own.model, targets = with_classifier(learner.model, head), part.targets[rest]
        targets[0, ~targets.any(0)] = 1  # a label that is left out altogether has no weight, and needs none
        own.start(data, targets)
        for epoch in range(epochs):
            loss, *_ = own.train_epoch(part, epoch, rest)
            step_scheduler(args, own.scheduler, loss)  # a plateau schedule looks at its training loss
        _, found[left] = evaluate(own.evaluated(), learner.features, part, plain, left)
    return found
