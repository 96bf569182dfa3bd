"""One epoch of training and one pass of prediction, for every study; devices, precision, seeds, processes, signals."""

import math
import os
import random
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm.auto import tqdm

from errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- processes (one unless started by torchrun)

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """This process's place on its own machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def start_processes(device):
    """The device of this process; under torchrun also its place among the others (nccl on GPUs, gloo on CPUs)."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
        # Hours, because the others wait while one decodes pictures for the first time.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
        if rank():  # what there is to say is said once
            sys.stdout = open(os.devnull, "w")
    return device


def rank0(function, *args, **kwargs):
    """Run on rank 0 alone and give every rank its result; its InputError is raised everywhere."""
    if world() == 1:
        return function(*args, **kwargs)
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function(*args, **kwargs)
        except InputError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def all_sum(tensor):
    """A tensor summed over the ranks."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(module):
    """Rank 0's buffers everywhere: BatchNorm statistics that moved apart on CPUs are validated as they are saved."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def merge_record(record):
    """A cut epoch's record over all ranks, step by step: what last.pt holds."""
    ranks = gather([tuple(t.cpu() for t in step) for step in record])
    return [(sum(losses), sum(weights), torch.cat(probs), torch.cat(targets))
            for losses, weights, probs, targets in (zip(*steps, strict=True) for steps in zip(*ranks, strict=True))]


def own_record(record, device):
    """A stored record on this rank: rank 0 has all of it, the others as many steps without rows."""
    return [tuple(t.to(device) if rank() == 0 else t.to(device) * 0 if t.ndim == 0 else t[:0].to(device) for t in step) for step in record]


def distribute(module, device):
    """DistributedDataParallel around what trains, where there are several processes."""
    if world() == 1:
        return module
    if device.type == "cuda" and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()):
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


# ---------------------------------------------------------------- device, precision, seeds

def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: this machine or this torch ({torch.__version__}) has none")
    return torch.device(name)


def pick_precision(name, device, model=""):
    """`auto`: bf16 where the hardware computes it natively, fp16 on older GPUs (with loss scaling), fp32 elsewhere.

    On a CPU EfficientNet stays in fp32: its depthwise convolutions are slower in bf16 there (0.6 of the speed, measured).
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if native and not model.startswith("efficientnet"):
        return "bf16"
    return "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_dropout(seed, epoch, step, device):
    """Seed the generator that dropout draws from. It depends on these and the rank alone: nothing to store for a resume."""
    number = int(np.random.SeedSequence((seed, epoch, step, rank())).generate_state(1, np.uint64)[0] >> 1)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)  # torch.manual_seed walks the stack for CUDA: a millisecond a step


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, _):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __call__(self):
        """Whether any rank was asked."""
        if world() > 1:
            self.number = max(gather(self.number))
        return self.number


def progress(iterable, text, **kwargs):
    """tqdm on a terminal or in a notebook, silent in a log file and on other ranks."""
    notebook = "ipykernel" in sys.modules
    return tqdm(iterable, text, disable=True if rank() else False if notebook else None, leave=False, dynamic_ncols=True, **kwargs)


# ---------------------------------------------------------------- loss

class Criterion:
    """Losses of a batch: (logits, targets) -> (loss of each row, its weight in the mean), both (B,).

    Multi-label: binary cross-entropy with logits, mean over labels, `weight` = pos_weight (L,). Multi-class:
    cross-entropy, `weight` = class weights (K,); the mean divides by the weights, as torch's own does.
    """

    def __init__(self, task, weight=None, device="cpu"):
        self.task = task
        self.weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float32, device=device)

    def __call__(self, logits, targets):
        if self.task == "multilabel":
            losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weight, reduction="none").mean(1)
            return losses, torch.ones_like(losses)
        losses = F.cross_entropy(logits, targets, weight=self.weight, reduction="none")
        return losses, torch.ones_like(losses) if self.weight is None else self.weight[targets]

    def probs(self, logits):
        return logits.sigmoid() if self.task == "multilabel" else logits.softmax(1)


# ---------------------------------------------------------------- the two passes

def train_mode(model, hold_batchnorm):
    """Training mode; with `hold_batchnorm` the BatchNorm statistics stay as they are."""
    model.train()
    if hold_batchnorm:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def train_one_epoch(model, loader, prepare, optimizer, scaler, criterion, autocast, seed, epoch, record, stop=lambda: False):
    """Train on the batches of `loader`; True when the epoch is complete, False when `stop()` ended it early.

    `record` (a list, one entry (sum of losses, sum of weights, probs, targets) per step) goes on where it stands: a run
    stopped in mid-epoch hands back its record and a loader of the remaining batches. Raises FloatingPointError with
    epoch and step when a loss is not finite.
    """
    previous = torch.zeros(())
    for batch in progress(loader, f"epoch {epoch}"):
        step = len(record)
        inputs, targets = prepare(batch)
        seed_dropout(seed, epoch, step, targets.device)
        with autocast:
            logits = model(*inputs)
        losses, weights = criterion(logits.float(), targets)
        # The mean over the global batch: DistributedDataParallel divides the sum of the gradients by the ranks.
        loss = losses.sum() * world() / all_sum(weights.sum())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        record.append((losses.detach().sum(), weights.sum(), criterion.probs(logits.detach().float()), targets))
        # The step before is looked at, so that a GPU is never waited for.
        check_finite(previous, epoch, step - 1)
        previous = loss.detach()
        if stop():
            break
    check_finite(previous, epoch, len(record) - 1)
    return len(record) == loader.sampler.start + len(loader.sampler)


def check_finite(loss, epoch, step):
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {float(loss)} in epoch {epoch}, step {step}: lower --lr, or look at the data")


def summarise(record):
    """An epoch's record over all ranks -> (mean loss, targets, probs)."""
    pieces = gather((sum(float(r[0]) for r in record), sum(float(r[1]) for r in record),
                     torch.cat([r[3] for r in record]).cpu().numpy(), torch.cat([r[2] for r in record]).cpu().numpy()))
    losses, weights, targets, probs = zip(*pieces, strict=True)
    return sum(losses) / sum(weights), np.concatenate(targets), np.concatenate(probs)


@torch.inference_mode()
def predict(model, loader, prepare, criterion, autocast=None):
    """Evaluate a whole part, in the order of its rows: (mean loss, targets, probs (n, K) float32), on every rank."""
    model.eval()
    rows = [index for batch in loader.sampler for index, _ in batch]
    logits, targets = [], []
    for batch in progress(loader, "predicting"):
        inputs, target = prepare(batch)
        with autocast or nullcontext():
            logits.append(model(*inputs).float())
        targets.append(target)
    logits, targets = torch.cat(logits), torch.cat(targets)
    losses, probs = criterion(logits, targets)[0], criterion.probs(logits)
    pieces = gather((np.asarray(rows, dtype=np.int64), *(t.cpu().numpy() for t in (losses, targets, probs))))
    rows, losses, targets, probs = (np.concatenate([piece[i] for piece in pieces]) for i in range(4))
    order = np.argsort(rows)
    return float(losses[order].mean(dtype=np.float64)), targets[order], probs[order]


def make_loader(data, batches, workers=0, device=None):
    """A DataLoader over `data` whose batches are `batches` (samplers.Batches): one indexing call per batch."""
    pin = device is not None and device.type == "cuda"
    return torch.utils.data.DataLoader(data, batch_size=None, sampler=batches, num_workers=workers, pin_memory=pin,
                                       prefetch_factor=4 if workers else None, generator=torch.Generator())
