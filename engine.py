"""One epoch of training and one pass of prediction, for every study; devices, precision, seeds, processes."""

import contextlib
import functools
import math
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from errors import InputError, end_with_parent

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = timedelta(minutes=10)  # the other processes wait this long for a step
LOOK = 32  # steps of a GPU between two looks at its losses: each look waits for it
ASYMMETRY = 2  # gamma of the asymmetric loss's negatives, by cross-validation on training patients
_patient_group = None


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))  # on its own machine


def start_processes(device, deterministic=False):
    """The device of this process; under torchrun also its place among the others."""
    global _patient_group
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not deterministic  # sizes are fixed: the fastest is looked for once
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        # nccl adds up gradients; gloo carries messages on the CPU, so that they never wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=SHORT)
        _patient_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))  # while one decodes
        if rank():  # rank 0 speaks for all
            sys.stdout = open(os.devnull, "w")
    return device


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group=_patient_group)
    return values


@contextlib.contextmanager
def together():
    """A step without exchange between processes: an error of one ends all of them, with its message."""
    try:
        yield
    except Exception as error:
        gather(str(error) if isinstance(error, InputError) else repr(error))
        raise
    for number, message in enumerate(gather("")):
        if message:
            raise InputError(f"process {number} of {world()} cannot go on: {message}")


def from_rank0(function, *args):
    """Run on rank 0 alone and give every rank its result or its error."""
    with together():
        result = function(*args) if rank() == 0 else None
    return gather(result)[0]


def all_sum(tensor):
    if world() > 1:
        dist.all_reduce(tensor)  # in place
    return tensor


def share_buffers(*modules):
    """Rank 0's buffers everywhere, so that BatchNorm statistics are validated as they are saved."""
    for buffer in torch.nn.ModuleList(modules).buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)


def batchnorms(module):
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]


def distribute(module, device):
    if world() == 1:
        return module
    if device.type == "cuda" and any(layer.training for layer in batchnorms(module)):
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    devices = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=devices)


def pick_device(name):
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    if name not in ("auto", *there):
        raise InputError(f"--device {name}: this machine or this torch ({torch.__version__}) has none")
    return torch.device(there[0] if name == "auto" else name)


def pick_precision(name, device):
    """`auto`: bf16 where the hardware has it, fp16 with loss scaling on older GPUs, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and native else "fp32"


def autocast(device, precision, enabled=True):
    return torch.autocast(device.type, PRECISIONS[precision], enabled=enabled and precision != "fp32")


def seed_dropout(seed, epoch, step, device):
    """Seed what dropout draws from. It depends on these and the rank alone, so a resume stores nothing."""
    number = int(np.random.SeedSequence((seed, epoch, step, rank())).generate_state(1, np.uint64)[0] >> 1)
    # Not torch.manual_seed, which takes a millisecond a step.
    source = torch.default_generator if device.type == "cpu" else getattr(torch, device.type)
    source.manual_seed(number)


def progress(iterable, text, **kwargs):
    """tqdm on a terminal or in a notebook, silent in a log file and on other ranks."""
    shown = "ipykernel" in sys.modules or sys.stderr.isatty()
    return tqdm(iterable, text, disable=rank() > 0 or not shown, leave=False, dynamic_ncols=True, **kwargs)


class Criterion:
    """(logits, targets) -> (loss of each row, its weight in the mean), both (B,). Several labels: the mean of
    their binary cross-entropies (`weight`: pos_weight (L,)) or asymmetric losses (Ridnik et al. 2021, gamma
    ASYMMETRY, not 4, shift 0.05). One class: cross-entropy, `weight`: class weights (K,), the mean's too."""

    def __init__(self, task, weight=None, device="cpu", loss="bce"):
        self.task, self.loss = task, loss
        self.probs = torch.sigmoid if task == "multilabel" else functools.partial(torch.softmax, dim=1)
        self.weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32, device=device)

    def __call__(self, logits, targets):
        if self.task == "multiclass":
            losses = F.cross_entropy(logits, targets, weight=self.weight, reduction="none")
            return losses, torch.ones_like(losses) if self.weight is None else self.weight[targets]
        if self.loss == "bce":
            each = torch.nn.BCEWithLogitsLoss(pos_weight=self.weight, reduction="none")(logits, targets)
        else:
            shifted = (logits.sigmoid() - 0.05).clamp(min=0)
            negative = (1 - targets) * torch.log(1 - shifted) * shifted**ASYMMETRY
            each = -targets * F.logsigmoid(logits) - negative
        losses = each.mean(1)  # (B, L) -> (B,)
        return losses, torch.ones_like(losses)


def check_finite(loss, epoch, step=" (validation)"):
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} in epoch {epoch}{step}: lower --lr")


def look_at_losses(steps, epoch, last):
    """FloatingPointError where a loss of the newest steps is not finite, on every rank at the same step."""
    every = LOOK if steps[-1][0].is_cuda else 1
    if len(steps) % every == 0 or last:
        first = max(0, len(steps) - every)
        losses, weights = torch.stack([sums for sums, *_ in steps[first:]]).unbind(1)
        for step, loss in enumerate((losses / weights).tolist(), first):
            check_finite(loss, epoch, f", step {step}")


def train_one_epoch(module, loader, prepare, learner, epoch, precision):
    """Train `module` on a `loader` -> (mean loss, targets, probs) of the epoch, over all ranks."""
    steps = []
    for step, batch in enumerate(progress(loader, f"epoch {epoch}")):
        inputs, targets = prepare(batch)
        seed_dropout(learner.seed, epoch, step, targets.device)
        learner.set_rate(epoch, step, len(loader))
        # A rank without rows computes in float32: SyncBatchNorm's statistics must have one type everywhere.
        with autocast(targets.device, precision, enabled=len(targets) > 0):
            logits = module(*inputs)
        losses, weights = learner.criterion(logits.float(), targets)
        # The mean over the global batch: DistributedDataParallel divides the sum of gradients by the ranks.
        sums = all_sum(torch.stack([losses.detach().sum(), weights.sum()]))
        loss = losses.sum() * world() / sums[1]
        learner.optimizer.zero_grad(set_to_none=True)
        learner.scaler.scale(loss).backward()
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        if learner.ema is not None:
            learner.ema.update_parameters(learner.trained)
        steps.append((sums, targets, learner.criterion.probs(logits.detach().float())))
        look_at_losses(steps, epoch, last=step + 1 == len(loader))
    return summarise(steps)


def summarise(steps):
    """(sums of losses and weights over all ranks, targets, probs) of each step -> what the epoch returns."""
    sums, *outputs = zip(*steps, strict=True)
    losses, weights = zip(*torch.stack(sums).tolist(), strict=True)
    shares = gather([torch.cat(output).cpu().numpy() for output in outputs])
    targets, probs = map(np.concatenate, zip(*shares, strict=True))
    return sum(losses) / sum(weights), targets, probs


@torch.inference_mode()
def predict(model, loader, prepare, criterion):
    """A whole part in the order of its rows -> (mean loss, probs (n, K) float32), on every rank."""
    model.eval()
    order = np.array([index for batch in loader.batch_sampler for index, _ in batch], dtype=np.int64)
    batches = map(prepare, progress(loader, "predicting"))
    seen = [(model(*inputs).float(), targets) for inputs, targets in batches]
    logits, targets = map(torch.cat, zip(*seen, strict=True))
    losses, probs = criterion(logits, targets)[0], criterion.probs(logits)
    pieces = gather((order, losses.cpu().numpy(), probs.cpu().numpy()))
    order, losses, probs = map(np.concatenate, zip(*pieces, strict=True))
    back = np.argsort(order)
    return float(losses[back].mean(dtype=np.float64)), probs[back]


def make_loader(data, batches, workers=0, device=None):
    """A DataLoader over `data` with these batches (samplers.Batches): one indexing call per batch."""
    # What lies on a GPU already cannot be pinned; `dict` leaves the batches of a data set as they are.
    pin = device is not None and device.type == "cuda" and not data.on_device
    own = dict(num_workers=workers, worker_init_fn=end_with_parent, prefetch_factor=4 if workers else None)
    rules = dict(batch_sampler=batches, collate_fn=dict, pin_memory=pin, generator=torch.Generator())
    return torch.utils.data.DataLoader(data, **rules, **own)
