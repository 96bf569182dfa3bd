"""What only a GPU runs, as far as a machine without one can show it: on `meta` tensors, watched.

A meta tensor lies on a device of its own, holds no numbers, and cannot be read. What a step does to it, it
would do to a GPU's: copies to the device, tensors made in the wrong place, values that the program waits for.
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
import decode  # noqa: E402
import engine  # noqa: E402
import features  # noqa: E402
import models  # noqa: E402
from augment import prepare_batch  # noqa: E402
from dataset import FeatureSet, Part, PictureSet, VolumeSet  # noqa: E402
from decode import GivenPictures  # noqa: E402
from render_data import render  # noqa: E402
from samplers import Batches  # noqa: E402

META, CPU, CUDA = torch.device("meta"), torch.device("cpu"), torch.device("cuda")
READS = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
)  # .item(), float, bool, and what needs a size


class Watch(TorchDispatchMode):
    """Writes down what would hurt on a GPU.

    read: a device tensor's value; float64: one that leaves for the device; made: tensors that a factory makes
    on the CPU, larger than one number; copied: CPU tensors sent to the device.
    """

    def __init__(self):
        super().__init__()
        self.read, self.float64, self.made, self.copied = [], [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__.split(".")[0]
        given = [arg for arg in args if torch.is_tensor(arg)]
        on_device = [tensor for tensor in given if tensor.device.type == "meta"]
        if name in READS and on_device:
            self.read.append(name)
            return True if name != "_local_scalar_dense" else 1.0
        result = function(*args, **kwargs)
        arrived = torch.is_tensor(result) and result.device.type == "meta"
        if arrived and given and not on_device and name == "_to_copy":
            self.copied.append(name)
            if result.dtype == torch.float64 or given[0].dtype == torch.float64:
                self.float64.append(name)
        if torch.is_tensor(result) and not given and result.device.type == "cpu" and result.numel() > 1:
            self.made.append(f"{name} {tuple(result.shape)}")
        return result


def test_the_watch_sees_what_it_is_for():
    """A check that cannot fail is none: each of the four things, done on purpose."""
    tensor = torch.ones(3, device=META)
    with Watch() as watch:
        bool(tensor.sum() > 0)
        float(tensor.sum())
        torch.zeros(2, dtype=torch.float64).to(META)
        torch.arange(4)
    assert watch.read == ["_local_scalar_dense"] * 2 and watch.float64 == ["_to_copy"]
    assert len(watch.made) == 2 and len(watch.copied) == 1


# ---------------------------------------------------------------- batches on their way to the device


def images(rows, per_row, size=32):
    pixels = np.random.default_rng(0).integers(0, 256, (rows * per_row, size, size, 3), dtype=np.uint8)
    return GivenPictures(pixels, np.arange(rows * per_row).reshape(rows, per_row))


@pytest.fixture(scope="module")
def knees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knees") / "mrnet"
    render(folder, "mrnet", 8, 64, 1)
    return [tuple(sorted(map(str, folder.glob("train/*/0000.npy"))))] * 4


def batches_of(kind, knees, recipe):
    """A data set of four rows, with random views where there is a recipe."""
    view = None if recipe == "none" else 0
    if kind == "knees":
        return VolumeSet(knees, np.zeros((4, 3), np.float32), 64, "crop", 1, view)
    if kind == "features":
        return FeatureSet(torch.zeros(4, 8), np.zeros(4, np.int64))
    return PictureSet(images(4, 2 if kind == "eyes" else 1), np.zeros((4, 8), np.float32), 1, view)


CASES = [
    ("eyes", "none"),
    ("eyes", "eyes"),
    ("eyes", "pair"),
    ("photographs", "none"),
    ("photographs", "lab"),
]
CASES += [("knees", "none"), ("knees", "knee"), ("features", "none")]


@pytest.mark.parametrize("kind, recipe", CASES)
def test_no_batch_carries_float64_to_a_device(kind, recipe, knees):
    """Apple's MPS has none: a TypeError in default training (issue 11: 2)."""
    batch = batches_of(kind, knees, recipe).__getitems__([(0, 0), (2, 0), (2, 1)])
    with Watch() as watch:
        inputs, targets = prepare_batch(batch, META, recipe, 28)
    assert not watch.float64 and watch.copied
    assert targets.device == META and targets.dtype in (torch.float32, torch.int64)
    flat = inputs[0] if isinstance(inputs[0], list) else inputs[:1]
    assert all(tensor.device == META and tensor.dtype == torch.float32 for tensor in flat)


@pytest.mark.parametrize("kind, recipe", CASES)
def test_a_prepared_batch_waits_for_nothing(kind, recipe, knees):
    """No value is read on the way, and no tensor made on the CPU: each would be a wait or a copy a batch."""
    batch = batches_of(kind, knees, recipe).__getitems__([(0, 0), (2, 0), (2, 1)])
    with Watch() as watch:
        prepare_batch(batch, META, recipe, 28)
    assert not watch.read and not watch.made
    pieces = 5 if kind == "knees" else len(batch)  # each tensor of the batch once
    assert len(watch.copied) == pieces - (kind == "knees" and recipe == "none")


def test_stand_in_targets_are_float32(monkeypatch, tmp_path):
    """Where only features are wanted, the data sets get zeros as targets: they travel too (issue 11: 2)."""
    seen, make_loader = [], engine.make_loader

    def noted(data, *args, **kwargs):
        seen.append(data.targets.dtype)
        return make_loader(data, *args, **kwargs)

    monkeypatch.setattr(engine, "make_loader", noted)
    pictures = images(6, 1)
    pictures.key = "pictures"
    model = models.build_model("shufflenet_v2_x0_5", 3)
    args = SimpleNamespace(
        augment="none", crop=None, size=32, seed=0, compile=False, workers=0, cache=tmp_path
    )
    features.fit_batchnorm(model, pictures, args, "fp32", CPU)
    features.TrunkFeatures(model, args, "fp32", CPU)(pictures)
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("device, waits", [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_cuda_copies_while_the_program_goes_on(monkeypatch, device, waits):
    """On MPS the source may be freed before the copy ends (pytorch issues 189690, 139550; issue 11: 2)."""
    sent = []

    class Tensor(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                sent.append(kwargs["non_blocking"])
                kwargs = {}
                args = args[:1] + (CPU,)
            return super().__torch_function__(function, types, args, kwargs or {})

    batch = {"features": torch.zeros(2, 3).as_subclass(Tensor), "targets": torch.zeros(2).as_subclass(Tensor)}
    prepare_batch(batch, torch.device(device))
    assert sent == [waits, waits]


# ---------------------------------------------------------------- loaders


def test_what_lies_on_a_device_is_not_pinned():
    """`cannot pin 'torch.cuda.FloatTensor'` ended every CUDA run on kept features (issue 11: 1)."""
    batches = Batches(np.arange(4), 2)
    there = FeatureSet(torch.zeros(4, 8, device=META), np.zeros(4, np.int64))
    assert there.on_device and there.targets.device == META
    assert not engine.make_loader(there, batches, device=CUDA).pin_memory
    here = FeatureSet(torch.zeros(4, 8), np.zeros(4, np.int64))
    assert not here.on_device and engine.make_loader(here, batches, device=CUDA).pin_memory
    pictures = PictureSet(images(4, 2), np.zeros(4, np.float32))
    assert engine.make_loader(pictures, batches, device=CUDA).pin_memory
    for device in (CPU, torch.device("mps"), None):
        assert not engine.make_loader(pictures, batches, device=device).pin_memory


class Resident(GivenPictures):
    """Pictures that a GPU's memory holds; `meta` stands for the GPU."""

    def on(self, device):
        self.resident = torch.from_numpy(self.stored).to(META)
        return self.resident


def test_pictures_in_a_gpus_memory_are_not_sent_again():
    source = images(4, 2)
    data = PictureSet(Resident(source.stored, source.rows), np.zeros((4, 3), np.float32), 1, 0, META)
    assert data.on_device and not engine.make_loader(data, Batches(np.arange(4), 2), device=CUDA).pin_memory
    batch = data.__getitems__([(1, 0), (3, 0)])
    assert batch["images"].device == META and batch["images"].shape == (2, 2, 32, 32, 3)
    assert batch["targets"].device == META and batch["uniforms"].device == CPU
    with Watch() as watch:
        prepare_batch(batch, META, "eyes", 32)
    assert len(watch.copied) == 1  # what draws the views


def test_pictures_go_to_the_gpu_when_a_quarter_of_its_memory_holds_them(monkeypatch, tmp_path):
    free = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80e9))
    pictures = decode.Pictures.__new__(decode.Pictures)
    pictures.shape, pictures.resident, pictures.mapped = (4, 32, 32, 3), None, images(4, 1).stored
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)  # there is no GPU to send them to
    assert pictures.on(CPU) is None
    free["bytes"] = 4 * 4 * 32 * 32 * 3
    assert pictures.on(CUDA) is None
    free["bytes"] += 4
    assert pictures.on(CUDA).shape == pictures.shape
    tensor = torch.zeros(100)
    free["bytes"] = 4 * tensor.nbytes - 4
    assert features.on_device(tensor, CUDA) is tensor


@pytest.mark.parametrize(
    "device, given, ranks, expected",
    [("cuda", None, 1, 8), ("cuda", None, 4, 4), ("cuda", 3, 4, 3), ("cuda", 0, 1, 0), ("cpu", 5, 1, 0)],
)
def test_workers_are_the_flags_or_a_share_of_the_machine(monkeypatch, device, given, ranks, expected):
    """Eight at most, divided by the processes of a machine; none for what lies in memory (issue 11: 6)."""
    monkeypatch.setattr(features, "default_workers", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    args, device = SimpleNamespace(workers=given), torch.device(device)
    assert features.loader_workers(args, device, PictureSet(images(4, 1), np.zeros(4))) == expected
    assert features.loader_workers(args, device, FeatureSet(torch.zeros(4, 2, device=META), np.zeros(4))) == 0


def test_extraction_honours_the_workers_flag_and_scales_its_batch(monkeypatch, tmp_path):
    """256 pictures of 224 pixels on a GPU, fewer of larger ones: memory does not grow with --size."""
    assert [features.extract_rows(size, 1, CUDA) for size in (64, 224, 448, 512)] == [256, 256, 64, 49]
    assert features.extract_rows(512, 2, CUDA) == 24 and features.extract_rows(4096, 2, CUDA) == 1
    largest = max(features.extract_rows(size, 1, CUDA) * size**2 for size in (64, 224, 448, 512, 1024))
    assert largest == 256 * 224**2
    asked = []

    def noted(args, device, data):
        asked.append(args.workers)
        return 0

    monkeypatch.setattr(features, "loader_workers", noted)
    pictures = images(6, 1)
    pictures.key = "pictures"
    model = models.build_model("shufflenet_v2_x0_5", 3)
    args = SimpleNamespace(
        augment="none", crop=None, size=32, seed=0, compile=False, workers=3, cache=tmp_path, batch=2
    )
    features.TrunkFeatures(model, args, "fp32", CPU)(pictures)
    part = Part(None, pictures, np.zeros((6, 3), np.float32))
    features.predict_live(args, features.with_fast_trunk(model), part, engine.Criterion("multilabel"), CPU)
    assert asked == [3, 3]


# ---------------------------------------------------------------- the step


def on_meta(monkeypatch):
    """What follows the steps reads them, and `meta` has neither autocast nor random numbers."""
    monkeypatch.setattr(engine, "seed_dropout", lambda *_: None)
    monkeypatch.setattr(engine, "look_at_losses", lambda *_, **__: None)
    monkeypatch.setattr(engine, "summarise", lambda steps: steps)
    monkeypatch.setattr(engine, "autocast", lambda *_, **__: contextlib.nullcontext())


class Head:
    """What train_one_epoch asks of a Learner, for a network on the device."""

    ema = None

    def __init__(self, model, criterion):
        self.model, self.criterion, self.seed = model, criterion, 1
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def set_rate(self, epoch, step, steps):
        pass


LOSSES = [("multilabel", "bce"), ("multilabel", "asymmetric"), ("multiclass", "bce")]


@pytest.mark.parametrize("task, loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_training_step_reads_nothing_and_makes_nothing_on_the_cpu(monkeypatch, task, loss, weighted):
    """Two steps of the training loop itself, on kept features that lie on the device."""
    on_meta(monkeypatch)
    targets = np.zeros((8, 3), np.float32) if task == "multilabel" else np.zeros(8, np.int64)
    data = FeatureSet(torch.zeros(8, 16, device=META), targets)
    model = models.build_head("v2", 16, 3).to(META)
    criterion = engine.Criterion(task, [1.0, 2.0, 3.0] if weighted else None, META, loss)
    learner = Head(model, criterion)
    loader = list(engine.make_loader(data, Batches(np.arange(8), 4), device=META))
    prepare = functools.partial(prepare_batch, device=META)
    with Watch() as watch:
        steps = engine.train_one_epoch(model, loader, prepare, learner, 0, "fp32")
    assert len(steps) == 2 and not watch.read and not watch.made and not watch.copied
    for sums, targets, probs in steps:
        assert {value.device.type for value in (sums, targets, probs)} == {"meta"}
        assert targets.shape[0] == 4 and probs.shape == (4, 3)


def test_fine_tuning_a_whole_network_reads_nothing_either(monkeypatch):
    on_meta(monkeypatch)
    model = models.build_model("v0", 3, "none", 32, "shufflenet_v2_x0_5").to(META)
    data = PictureSet(images(4, 2), np.zeros((4, 3), np.float32), 1, 0)
    learner = Head(model, engine.Criterion("multilabel", None, META))
    loader = list(engine.make_loader(data, Batches(np.arange(4), 2)))
    prepare = functools.partial(prepare_batch, device=META, recipe="pair", size=32)
    for layer in engine.batchnorms(model.train()):
        layer.eval()
    with Watch() as watch:
        steps = engine.train_one_epoch(model, loader, prepare, learner, 0, "fp32")
    assert len(steps) == 2 and not watch.read and not watch.made and not watch.float64
    assert len(watch.copied) == 6  # pictures, targets and what draws the views, twice


def test_a_frozen_trunk_on_the_device_reads_nothing():
    """The fast trunk as extraction and prediction run it, in bf16, with BatchNorm that is not folded too."""
    for name in ("efficientnet-lite0", "densenet121"):
        fast = features.with_fast_trunk(models.build_model(name, 3, size=64), "bf16").to(META)
        shown = torch.zeros(2, 1, 3, 64, 64, device=META)
        with Watch() as watch, torch.inference_mode():
            found = fast(shown)
        assert found.shape == (2, 3) and found.dtype == torch.float32
        assert not watch.read and not watch.made and not watch.copied


@pytest.mark.parametrize("bad", [None, 1, 31, 32, 34])
def test_a_gpus_losses_are_looked_at_every_32_steps_and_at_the_end(bad, monkeypatch):
    """Each look waits for the steps before it; it names the first step whose loss is not finite."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    looked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda sums: looked.append(step) or stack(sums))
    steps, found = [], contextlib.nullcontext()
    if bad is not None:
        found = pytest.raises(FloatingPointError, match=f"epoch 3, step {bad}:")
    with found:
        for step in range(35):
            loss = float("nan") if step == bad else 0.5
            steps.append((torch.tensor([loss, 1.0]), None, None))
            engine.look_at_losses(steps, 3, last=step == 34)
    assert looked == ([31] if bad in (1, 31) else [31, 34])


def test_a_cpus_losses_are_looked_at_in_every_step():
    steps = [(torch.tensor([float("inf"), 2.0]), None, None)]
    with pytest.raises(FloatingPointError, match="the loss is inf in epoch 0, step 0:"):
        engine.look_at_losses(steps, 0, last=False)


def test_views_are_drawn_on_the_cpu_and_computed_on_the_device():
    uniforms = augment.draw(1, 2, [(0, 0), (5, 1)], 2)
    assert uniforms.device == CPU and uniforms.dtype == torch.float32
    shown = torch.zeros(2, 2, 3, 32, 32, device=META)
    assert augment.augment(shown, uniforms.to(META), "pair", 28).shape == (2, 2, 3, 28, 28)


# ---------------------------------------------------------------- precision, and runs that repeat


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_that_must_repeat_does_not_look_for_the_fastest_algorithm(deterministic, monkeypatch):
    """cuDNN's search takes what is fastest at the moment: another algorithm, other last digits."""
    asked, environment = [], {}
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(engine.os, "environ", environment)
    assert engine.start_processes(CPU, deterministic) == CPU
    assert torch.backends.cudnn.benchmark is not deterministic
    assert asked == [True] * deterministic and ("CUBLAS_WORKSPACE_CONFIG" in environment) is deterministic


def test_autocast_computes_in_the_precision_that_is_named():
    one = torch.ones(2, 2)
    with engine.autocast(CPU, "bf16"):
        assert (one @ one).dtype == torch.bfloat16
    for precision, enabled in (("fp32", True), ("bf16", False)):
        with engine.autocast(CPU, precision, enabled):
            assert (one @ one).dtype == torch.float32


def test_auto_is_the_fast_precision_that_the_hardware_has_itself(monkeypatch):
    for has in (True, False):
        emulated = lambda including_emulation=True, has=has: has or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert engine.pick_precision("auto", CUDA) == ("bf16" if has else "fp16")
        assert engine.pick_precision("auto", CPU) == ("bf16" if has else "fp32")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert engine.pick_precision("auto", CPU) == "bf16"
    assert engine.pick_precision("auto", torch.device("mps")) == "fp32"
    assert engine.pick_precision("fp32", CUDA) == "fp32"  # what is asked for
