"""A frozen trunk sees each picture once: its features are computed, kept on disk and trained on.

Also fits BatchNorm's statistics to the training pictures (`--bn fitted`), once, and keeps them.
"""

import functools
from contextlib import nullcontext

import numpy as np
import torch

from augment import prepare_batch
from cache import Kept, digest
from checkpoint import state_digest
from engine import PRECISIONS, autocast, gather, make_loader, predict, progress, rank, rank0, world
from errors import InputError
from models import FastTrunk, with_fast_trunk
from pictures import FeatureSet, PictureSet, VolumeSet
from preprocess import default_workers
from samplers import Batches

EXTRACT_BATCH = 16  # pictures: small enough that a CPU's caches hold a layer; GPUs get EXTRACT_BATCH_GPU
EXTRACT_BATCH_GPU = 256
BN_PICTURES = 1024  # about what a running mean with momentum 0.1 over batches of 32 pairs remembers


def batchnorms(model):
    return [m for m in model.backbone.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def fit_batchnorm(model, pictures, prepare, device, precision, cache, seed, trunk):
    """Set the trunk's BatchNorm statistics to those of at most BN_PICTURES training pictures, drawn by `seed`.

    Layer by layer means over batches of 64 (torch's cumulative average). The result is kept under the digest `trunk` of
    the weights it belongs to. Where the original's running statistics drifted to, without the drift.
    """
    layers = batchnorms(model)
    total = sum(2 * layer.num_features for layer in layers)
    if not total:
        return
    chosen = np.sort(np.random.default_rng(seed).permutation(pictures.rows.size)[:BN_PICTURES])
    rows = pictures.rows.reshape(-1, 1)[chosen]

    def make(_):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
        model.backbone.to(memory_format=torch.channels_last).train()
        data = PictureSet(pictures.array(), rows, np.zeros(len(rows)))
        batches = Batches(np.random.default_rng(seed).permutation(len(rows)), 64)
        with torch.no_grad(), autocast(device, precision):
            for batch in progress(make_loader(data, batches, device=device), "fitting BatchNorm"):
                if len(batch["images"]) > 1:
                    model.backbone(prepare(batch)[0][0].flatten(0, 1))
        for layer in layers:
            layer.momentum = 0.1
        yield torch.cat([torch.cat([layer.running_mean, layer.running_var]) for layer in layers]).float().cpu().numpy()

    kept = Kept(cache, "batchnorm", digest(pictures.key, trunk, precision, seed, BN_PICTURES, "batchnorm-1"), (total,), np.float32, make)
    values = torch.from_numpy(rank0(kept.load))
    for layer in layers:
        size = layer.num_features
        layer.running_mean.copy_(values[:size])
        layer.running_var.copy_(values[size:2 * size])
        layer.num_batches_tracked.zero_()  # the same whether they were fitted now or kept: it is part of the trunk's digest
        values = values[2 * size:]


class TrunkFeatures:
    """Features (n, P * D) of the rows of `pictures`, from disk where they are kept, else extracted and kept.

    They depend on pictures, preprocessing, size, weights with their BatchNorm statistics, precision, and (`view`) the
    random view's recipe, crop, seed and number.
    """

    def __init__(self, model, precision, compile, device, cache):
        self.model, self.precision, self.compile, self.device, self.cache = model, precision, compile, device, cache
        self.digest = state_digest(model.backbone)
        self.trunk = None  # built when something must be extracted
        self.held = {}  # plain features stay in memory; augmented views come and go

    def __call__(self, pictures, recipe="none", size=None, seed=0, view=None):
        """A float32 tensor (n, P * D) on the device."""
        drawn = (recipe, size, seed, view) if recipe != "none" else None
        key = digest(pictures.key, pictures.rows, self.digest, self.precision, self.compile, drawn, "features-1")
        if key in self.held:
            return self.held[key]
        rows, per_row = pictures.rows.shape
        kept = Kept(self.cache, "features", key, (rows, per_row * self.width()), np.float32,
                    lambda _: self.extract(pictures, recipe, size, seed, view))
        if not rank0(kept.whole):  # all ranks make it again, or none
            if rank() == 0:
                kept.write()
            else:
                for _ in self.extract(pictures, recipe, size, seed, view):
                    pass
        features = torch.from_numpy(rank0(kept.read)).to(self.device)
        if drawn is None:
            self.held[key] = features
        return features

    def width(self):
        last = [m for m in self.model.classifier.modules() if isinstance(m, torch.nn.Linear)][0]
        return last.in_features // (2 if self.model.name in ("v0", "v1", "v2") else 1)

    @torch.inference_mode()
    def extract(self, pictures, recipe, size, seed, view):
        """Blocks of rows in order; every rank computes its share of each block and has the whole."""
        if self.trunk is None:
            self.trunk = FastTrunk(self.model.backbone, PRECISIONS[self.precision], self.compile).to(self.device)
        n, per_row = pictures.rows.shape
        size_of_batch = (EXTRACT_BATCH_GPU if self.device.type == "cuda" else EXTRACT_BATCH) // per_row
        data = PictureSet(pictures.array(), pictures.rows, np.zeros(n), seed, view)
        batches = Batches(np.arange(n), size_of_batch * world(), rank=rank(), world=world())
        workers = 4 if self.device.type == "cuda" else 0
        for batch in progress(make_loader(data, batches, workers, self.device), "extracting features"):
            images = prepare_batch(batch, self.device, recipe, size)[0][0]
            features = self.trunk(images.flatten(0, 1)).reshape(len(images), -1).cpu().numpy()
            shares = gather(features)
            block = np.empty((sum(map(len, shares)), per_row * self.width()), np.float32)
            for i, share in enumerate(shares):
                block[i::world()] = share
            if not np.isfinite(block).all():
                raise InputError(f"the trunk gives features that are not finite in {self.precision}: try --precision fp32")
            yield block


# ---------------------------------------------------------------- what an epoch trains on, and how a part is evaluated

def loader_workers(args, device, data):
    """Processes that load batches: none for kept features, and none where a CPU does the training itself."""
    if isinstance(data, FeatureSet) or device.type == "cpu":
        return 0
    return min(8, default_workers()) if args.workers is None else args.workers


def has_frozen_features(args, pictures):
    """Whether the trunk gives the same features in every epoch as long as it is frozen."""
    return args.bn != "batch" and pictures is not None


def live_data(args, pictures, table, targets, view=None):
    if pictures is None:
        return VolumeSet(table["files"], targets, args.size, args.seed, view)
    return PictureSet(pictures.array(), pictures.rows, targets, args.seed, view)


def training_data(args, frozen, epoch, model, features, pictures, table, targets, precision, device):
    """What an epoch trains on: (data set, module to train, precision context).

    A frozen trunk's features train the classifier alone, in float32; without the cache the same fast trunk runs in
    front of it. Else the whole network runs in the machine's fast precision.
    """
    view = None if args.augment == "none" else epoch % args.views if args.views else epoch
    if not (frozen and has_frozen_features(args, pictures)):
        return live_data(args, pictures, table, targets, view), model.to(memory_format=torch.channels_last), autocast(device, precision)
    if not args.feature_cache:
        return live_data(args, pictures, table, targets, view), with_fast_trunk(model, precision).to(device), nullcontext()
    kept = features(pictures, args.augment, args.crop or args.size, args.seed, view)
    return FeatureSet(kept, targets), model.classifier, nullcontext()


def evaluate(args, model, features, pictures, table, targets, criterion, precision, device):
    """Loss, targets and probabilities of a part, through kept features where the trunk is frozen for good."""
    if has_frozen_features(args, pictures) and not args.fine_tune and args.feature_cache:
        data, module, batch = FeatureSet(features(pictures), targets), model.classifier, 4096
    else:
        data, module = live_data(args, pictures, table, targets), with_fast_trunk(model, precision).to(device)
        batch = args.batch if pictures is None else max(args.batch, 32)
    batches = Batches(np.arange(len(targets)), batch, 0, rank(), world())
    loader = make_loader(data, batches, loader_workers(args, device, data), device)
    return predict(module, loader, functools.partial(prepare_batch, device=device), criterion)
