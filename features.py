"""A frozen trunk sees each picture once: its features and fitted BatchNorm statistics are kept."""

import copy
import functools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

import engine
from augment import prepare_batch
from cache import digest, is_whole, kept_array
from checkpoint import state_digest
from dataset import FeatureSet, PictureSet, eval_size
from errors import InputError
from preprocess import default_workers
from samplers import Batches

BatchNorm = nn.modules.batchnorm._BatchNorm
EXTRACT_BATCH = {"cpu": 8, "cuda": 256}  # pictures of 224 pixels; a CPU's caches hold a layer of 8
BN_PICTURES = 1024  # about what a running mean with momentum 0.1 over batches of 32 pairs remembers


class Tracer(torch.fx.Tracer):
    """Keeps convolutions and BatchNorms of any subclass whole."""

    def is_leaf_module(self, module, name):
        return isinstance(module, nn.Conv2d | BatchNorm) or super().is_leaf_module(module, name)


def fold_batchnorm(trunk):
    """A copy in evaluation mode, BatchNorms folded into the convolutions that feed them alone, if any do."""
    trunk = copy.deepcopy(trunk).eval()
    if not engine.batchnorms(trunk):
        return trunk
    try:
        graph = Tracer().trace(trunk)
    except (TraceError, TypeError, ValueError):  # the way through the network depends on the numbers
        return trunk
    calls = {node: trunk.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    for node, norm in calls.items():
        if isinstance(norm, BatchNorm):
            source = node.all_input_nodes[0]
            conv = calls.get(source)
            if isinstance(conv, nn.Conv2d) and len(source.users) == 1:
                trunk.set_submodule(source.target, fuse_conv_bn_eval(conv, norm))
                trunk.set_submodule(node.target, nn.Identity())
    return trunk


class FastTrunk(nn.Module):
    """A frozen trunk: BatchNorm folded, reduced precision, channels last. (B, 3, H, W) in, float32 out."""

    def __init__(self, trunk, precision="fp32", compile=False):
        super().__init__()
        self.dtype, self.compile, self.batch = engine.PRECISIONS[precision], compile, 0
        self.net = fold_batchnorm(trunk).requires_grad_(False)
        self.net.to(dtype=self.dtype, memory_format=torch.channels_last)
        for layer in engine.batchnorms(self.net):
            layer.float()  # what could not be folded keeps its precision
        self.run = compiled(self.net) if compile else self.net

    def train(self, mode=True):  # frozen means frozen, whatever the model around it does
        return super().train(False)

    def forward(self, images):
        count = len(images)
        # A compiled trunk is made for one batch size: a short last batch is filled up. So is an empty one.
        self.batch = max(1, count, self.batch if self.compile else 0)
        if count < self.batch:
            images = torch.cat([images, images.new_zeros((self.batch - count, *images.shape[1:]))])
        images = images.to(dtype=self.dtype, memory_format=torch.channels_last)
        return self.run(images).float()[:count]


def with_fast_trunk(model, precision="fp32", compile=False):
    """`model` with its trunk replaced by a FastTrunk; everything else is shared, not copied."""
    fast = copy.deepcopy(model, {id(child): child for child in model.children()})
    made = functools.partial(FastTrunk, precision=precision, compile=compile)
    planes = isinstance(model.backbone, nn.ModuleList)
    fast.backbone = nn.ModuleList(map(made, model.backbone)) if planes else made(model.backbone)
    return fast


def compiled(module):
    """`torch.compile(module)`, which may pack the weights of a frozen trunk once. InputError: no compiler."""
    import torch._inductor.config as inductor

    compilers = (inductor.cpp.cxx[1] or "", "g++", "clang++", "cl")
    if not next(module.parameters()).is_cuda and not any(map(shutil.which, compilers)):
        raise InputError("--compile needs a C++ compiler (g++, clang++ or cl): install one or leave it out")
    inductor.freezing = True
    return torch.compile(module)


def fit_batchnorm(model, pictures, args, precision, device):
    """Set the trunk's BatchNorm statistics to kept means over up to BN_PICTURES training pictures."""
    layers = engine.batchnorms(model.backbone)
    if not layers:
        return
    order = np.random.default_rng(args.seed).permutation(pictures.rows.size)
    chosen = pictures.chosen(pictures.rows.reshape(-1, 1)[np.sort(order[:BN_PICTURES])])
    trunk = state_digest(model.normalise, model.backbone)
    key = digest(pictures.key, trunk, precision, args.seed, BN_PICTURES, "batchnorm-2")
    path, sizes = Path(args.cache) / f"batchnorm-{key[:20]}.npy", [2 * layer.num_features for layer in layers]
    fill = functools.partial(run_batchnorm, model, chosen, args.seed, precision, device)
    kept = engine.from_rank0(kept_array, path, (sum(sizes),), np.float32, fill)
    for layer, statistics in zip(layers, torch.from_numpy(np.array(kept)).split(sizes), strict=True):
        layer.running_mean[:], layer.running_var[:] = statistics.chunk(2)
        layer.num_batches_tracked.zero_()  # the same whether fitted now or kept: it is part of the digest


def run_batchnorm(model, pictures, seed, precision, device, array):
    """Fill `array` with the statistics of pictures that go through with BatchNorm alone in training mode."""
    trunk = copy.deepcopy(model.backbone).to(memory_format=torch.channels_last).eval()
    for layer in engine.batchnorms(trunk):
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    order = np.random.default_rng(seed).permutation(len(pictures.rows))
    data = PictureSet(pictures, np.zeros(len(order), np.float32))
    loader = engine.make_loader(data, Batches(order, 64), device=device)
    with torch.no_grad(), engine.autocast(device, precision):
        for batch in engine.progress(loader, "fitting BatchNorm"):
            images = prepare_batch(batch, device)[0][0].flatten(0, 1)
            if len(images) > 1:
                trunk(model.normalise(images))
    values = [torch.cat([layer.running_mean, layer.running_var]) for layer in engine.batchnorms(trunk)]
    array[:] = torch.cat(values).float().cpu().numpy()


class TrunkFeatures:
    """Features (n, D) of the rows of some pictures, from disk where they lie, else extracted and kept: of
    these pictures, size, weights with BatchNorm, normalisation, precision, and (`view`) random view."""

    def __init__(self, model, args, precision, device):
        self.model, self.args, self.precision, self.device = model, args, precision, device
        self.digest = state_digest(model.normalise, model.backbone)
        self.fast = None  # built when something must be extracted
        self.held = {}  # plain features stay; augmented views come and go

    def __call__(self, pictures, view=None, keys=None):
        """Features float32 (n, D), on the GPU where a quarter of its free memory holds them.
        `keys`: the (row, repeat) pairs of a random view that are wanted; None: every row once."""
        args = self.args
        drawn = None if view is None else (args.augment, eval_size(args), args.seed, view)
        keys = [(row, 0) for row in range(len(pictures.rows))] if keys is None else keys
        about = (self.digest, self.precision, args.compile, drawn, "features-2")
        key = digest(pictures.key, pictures.rows, np.array(keys), *about)
        if key in self.held:
            return self.held[key]
        head = next(layer for layer in self.model.classifier.modules() if isinstance(layer, nn.Linear))
        path, shape = Path(args.cache) / f"features-{key[:20]}.npy", (len(keys), head.in_features)
        fill = functools.partial(self.extract, pictures, view, keys)
        if engine.world() > 1 and not engine.from_rank0(is_whole, path, shape, np.float32):
            # Each process extracts its share; rank 0 keeps all: other machines do not see its disk.
            mine, whole = slice(engine.rank(), None, engine.world()), np.empty(shape, np.float32)
            with engine.together():
                self.extract(pictures, view, keys[mine], whole[mine])
            for number, share in enumerate(engine.gather(whole[mine])):
                whole[number :: engine.world()] = share
            fill = functools.partial(np.copyto, src=whole)
        kept = engine.from_rank0(kept_array, path, shape, np.float32, fill)
        features = on_device(torch.from_numpy(kept), self.device)
        if drawn is None:
            self.held[key] = features
        return features

    @torch.inference_mode()
    def extract(self, pictures, view, keys, array):
        """Fill `array` (len(keys), D) with the features of `keys`."""
        args = self.args
        if self.fast is None:
            self.fast = with_fast_trunk(self.model, self.precision, args.compile).to(self.device)
        data = PictureSet(pictures, np.zeros(len(pictures.rows), np.float32), args.seed, view, self.device)
        rows = extract_rows(pictures.size, pictures.rows.shape[1], self.device)
        batches = [keys[start : start + rows] for start in range(0, len(keys), rows)]
        loader = engine.make_loader(data, batches, loader_workers(args, self.device, data), self.device)
        recipe = "none" if view is None else args.augment
        for number, batch in enumerate(engine.progress(loader, "extracting features")):
            images = prepare_batch(batch, self.device, recipe, eval_size(args))[0][0]
            found = self.fast.features(images).cpu().numpy()
            if not np.isfinite(found).all():
                raise InputError(f"features are not finite in {self.precision}: try --precision fp32")
            array[number * rows : number * rows + len(found)] = found


def extract_rows(size, pictures_per_row, device):
    """Rows of one batch of extraction: fewer of larger pictures, so that memory does not grow."""
    pictures = EXTRACT_BATCH.get(device.type, EXTRACT_BATCH["cpu"]) * min(1, 224 / size) ** 2
    return max(1, int(pictures) // pictures_per_row)


def on_device(tensor, device):
    """On a GPU where a quarter of its free memory holds it, else where it is."""
    fits = device.type != "cuda" or tensor.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
    return tensor.to(device) if fits else tensor


def loader_workers(args, device, data):
    """Processes that load batches: none where they lie in memory, or a CPU does the training itself."""
    if device.type == "cpu" or data.on_device:
        return 0
    automatic = min(8, default_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return automatic if args.workers is None else args.workers


def predict_live(args, fast, part, criterion, device, mirrored=False):
    """(mean loss, probs (n, K)) of a part whose pictures go through `fast` (with_fast_trunk)."""
    data = part.dataset(device=device)
    rows = extract_rows(part.size, data.per_row, device) if part.pictures is not None else args.batch
    batches = Batches(np.arange(len(data)), rows * engine.world(), engine.rank(), engine.world())
    loader = engine.make_loader(data, batches, loader_workers(args, device, data), device)
    prepare = functools.partial(prepare_batch, device=device, mirrored=mirrored)
    return engine.predict(fast, loader, prepare, criterion)


def keeps_features(args, part):
    """Whether a part is evaluated through kept features: its trunk stays as it is for good."""
    return args.feature_cache and not args.fine_tune and args.bn != "batch" and part.pictures is not None


def evaluate(model, features, part, criterion, rows=slice(None)):
    """(mean loss, probs (n, K)) of a part, through kept features (of `rows`) where the trunk stays frozen."""
    args, device = features.args, features.device
    if not keeps_features(args, part):
        fast = with_fast_trunk(model, features.precision).to(device)
        return predict_live(args, fast, part, criterion, device)
    data = FeatureSet(features(part.pictures), part.targets)
    batches = Batches(np.arange(len(data))[rows], 4096, engine.rank(), engine.world())
    loader = engine.make_loader(data, batches, device=device)
    prepare = functools.partial(prepare_batch, device=device)
    return engine.predict(model.classifier, loader, prepare, criterion)
