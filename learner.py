"""What learns in a run: the network with its weights, its loss, optimiser and schedule, new or as last.pt holds them."""

import functools
import warnings
from dataclasses import dataclass

import torch

import augment
import checkpoint
import engine
import models
import samplers
from errors import InputError
from features import TrunkFeatures, fit_batchnorm

# scheduler -> (epochs, gamma): what --schedule-epochs and --gamma mean to it when they are not given (all published)
SCHEDULES = {"none": (None, None), "linear": (50, 0.1), "cyclic": (10, None), "step": (1, 0.7), "plateau": (3, 0.3)}
SCHEDULE_FLAGS = ("lr", "momentum", "weight_decay", "schedule_epochs", "gamma", "max_lr")


@dataclass
class Learner:
    """The network and all that trains it; `trunk` is the digest of a trunk that is frozen for good, else None."""
    model: torch.nn.Module
    trunk: str
    features: TrunkFeatures
    criterion: engine.Criterion
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler


def build(args, labels, rendered):
    """The network with its weights; random ones, loudly, where ImageNet's cannot be had and the data are rendered."""
    engine.seed_everything(args.seed)
    try:
        return models.build_model(args.model, len(labels), args.weights, args.crop or args.size)
    except InputError as error:
        if not (rendered and args.weights == "imagenet"):
            raise
        print(f"!! RANDOM WEIGHTS: {error}.\n!! On rendered data the run goes on with a random trunk; its scores mean nothing.")
        args.weights = "none"
        return build(args, labels, rendered)


def build_optimizer(args, model):
    parameters = list((model if args.fine_tune else model.classifier).parameters())
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)


def build_scheduler(args, optimizer):
    epochs, gamma = (given if given is not None else usual for given, usual in
                     zip((args.schedule_epochs, args.gamma), SCHEDULES[args.scheduler], strict=True))
    lr = torch.optim.lr_scheduler
    return {
        "none": lambda: lr.LambdaLR(optimizer, constant),
        "linear": lambda: lr.LinearLR(optimizer, start_factor=1.0, end_factor=gamma, total_iters=epochs),
        "cyclic": lambda: lr.CyclicLR(optimizer, base_lr=args.lr, max_lr=args.max_lr, step_size_up=epochs, mode="triangular2"),
        "step": lambda: lr.StepLR(optimizer, step_size=epochs, gamma=gamma),
        "plateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=epochs, factor=gamma, threshold=1e-4),
    }[args.scheduler]()


def constant(_):
    return 1.0


def restore(args, stored, optimizer, scheduler):
    """Optimiser and schedule as last.pt holds them; where --lr (...) is another now, as if it had been so from the start."""
    groups = optimizer.state_dict()["param_groups"]
    if all(vars(args)[name] == stored["args"][name] for name in SCHEDULE_FLAGS):
        optimizer.load_state_dict(stored["optimizer"])
        scheduler.load_state_dict(stored["scheduler"])
        return
    optimizer.load_state_dict({"state": stored["optimizer"]["state"], "param_groups": groups})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of the schedule
        for row in stored["history"]:
            scheduler.step(*([row["val_loss"]] if args.scheduler == "plateau" else []))


def loss_weight(args, task, targets, labels):
    """pos_weight or class weights of the training part; None without --weighted-loss."""
    if not args.weighted_loss:
        return None
    return samplers.pos_weight(targets, labels) if task == "multilabel" else samplers.class_weights(targets, len(labels))


def build_learner(args, data, device, precision):
    """The Learner of a run with these arguments on this train.Data; says so in args.bn which BatchNorm it took."""
    model = build(args, data.labels, data.facts["rendered"]).to(device)
    args.bn = args.bn or ("batch" if args.fine_tune else "fitted")
    if args.bn == "fitted" and data.train:
        fit_batchnorm(model, data.train, functools.partial(augment.prepare_batch, device=device), device, precision, args.cache, args.seed,
                      checkpoint.state_digest(model.backbone))
    optimizer = build_optimizer(args, model)
    return Learner(model, checkpoint.state_digest(model.backbone) if not args.fine_tune and args.bn != "batch" else None,
                   TrunkFeatures(model, precision, args.compile, device, args.cache),
                   engine.Criterion(data.task, loss_weight(args, data.task, data.train_targets, data.labels), device),
                   optimizer, build_scheduler(args, optimizer),
                   torch.amp.GradScaler(device.type, enabled=precision == "fp16" and args.fine_tune))
