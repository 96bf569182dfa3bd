"""A run's folder and its files: written whole or not at all, read back only when they are whole.

best.pt   complete in itself: weights, arguments, labels, rows of each part; test.py needs only the data
last.pt   what the next epoch needs: weights, optimiser, scaler, averaged weights, history, patience
run.json  how the run was made and what came out of it"""

import contextlib
import io
import itertools
import json
import os
import platform
import zipfile
from pathlib import Path

import filelock
import pandas as pd
import torch

from cache import digest, replace_file
from errors import InputError, reading

FORMAT = 5  # raised where a checkpoint holds other things, or what it holds means another network
REQUIRED = {"best": "args model labels task family ordered rows seen data prior epoch loss scores thresholds"}
REQUIRED["last"] = "args model trunk ema buffers optimizer scaler digest epoch history best stale seconds "
REQUIRED["last"] += "changes duplicates seen notes"


def load_file(path):
    """A file of torch.save, checksums compared, nothing unpickled but tensors and plain containers."""
    with reading(path, "a checkpoint"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
                if damaged := archive.testzip():
                    raise InputError(f"{path} is damaged: the checksum of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, kind="best"):
    """best.pt or last.pt as a dict; InputError when it is another file, another format or damaged."""
    state = load_file(path)
    if not isinstance(state, dict) or (state.get("kind"), state.get("format")) != (kind, FORMAT):
        raise InputError(f"{path} is not a {kind}.pt of this repository, in format {FORMAT}")
    if missing := [name for name in REQUIRED[kind].split() if name not in state]:
        raise InputError(f"{path} is incomplete: {', '.join(missing)}")
    return state


def load_last(folder):
    """last.pt of a run, and under "lock" the run's lock, taken before it is read (by rank 0)."""
    if not any(Path(folder, name).exists() for name in ("run.json", "last.pt")):
        raise InputError(f"--resume {folder}: there is no such run folder")
    lock = lock_run(folder) if os.environ.get("RANK", "0") == "0" else None
    try:
        return {**load_checkpoint(Path(folder, "last.pt"), "last"), "lock": lock}
    except InputError as error:
        raise InputError(f"{error}. A whole best.pt there serves test.py or a new run's --weights") from error


def save_checkpoint(path, kind, **state):
    buffer = io.BytesIO()  # torch.save hides the OSError of a full disk
    torch.save({"kind": kind, "format": FORMAT, **state}, buffer)
    replace_file(path, lambda stream: stream.write(buffer.getbuffer()))


def state_digest(*modules):
    """Digest of all parameters and buffers of modules, or of the values of a state_dict."""
    states = [module if isinstance(module, dict) else module.state_dict() for module in modules]
    return digest(*[value.detach().cpu().numpy() for state in states for value in state.values()])


def network_digest(weights, thresholds):
    """What a result belongs to: a network's weights and its learned thresholds."""
    return digest(state_digest(weights), thresholds)


def cpu_state(module, copy=False):
    """A module's state_dict on the CPU; `copy` where it must stay as it is while training goes on."""
    return {key: value.detach().to("cpu", copy=copy) for key, value in module.state_dict().items()}


def home_of(path, digest):
    """Where files about a checkpoint go: the folder of the run it is the best of, else one beside it."""
    best = run_facts(path.parent).get("best_digest")  # none yet while the run is training
    own = (path.parent / "run.json").exists() and best in (None, digest)
    return path.parent if own else path.with_name(f"test-{path.stem}")


def check_name(args):
    """Refuse a --name that is taken, before anything is prepared."""
    if not args.name or args.resume:
        return
    if Path(args.name).name != args.name:
        raise InputError(f"--name {args.name}: expected a plain name, without folders")
    folder = Path(args.runs) / args.name
    found = {file.name for file in folder.glob("[!.]*")}
    # A run that was stopped before its first checkpoint leaves no more than these.
    if folder.is_file() or found - {"run.json", "split.csv", "repaired.txt"}:
        raise InputError(f"{folder} exists, and is never overwritten: choose another --name, or --resume it")


def new_run_folder(args):
    """Make runs/<name>, or take one without a checkpoint; without a name the first free number."""
    check_name(args)
    runs = Path(args.runs)
    runs.mkdir(parents=True, exist_ok=True)
    if args.name:
        (runs / args.name).mkdir(exist_ok=True)
        return runs / args.name
    for number in itertools.count(1):
        folder = runs / f"{args.dataset}-{args.model}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def lock_run(folder):
    """Hold a run's folder until this process ends -> its lock. InputError: another one trains there."""
    try:
        return filelock.FileLock(Path(folder, ".lock"), blocking=False).acquire().lock
    except filelock.Timeout:
        raise InputError(f"{folder} is being trained by another process: wait for it, or stop it") from None


def save_json(path, value):
    """Numpy's numbers and arrays as numbers and lists, paths as text, what is undefined (NaN) as null."""
    text = json.dumps(value, default=lambda one: one.tolist() if hasattr(one, "tolist") else str(one))
    value = json.loads(text, parse_constant=lambda _: None)
    replace_file(path, lambda stream: json.dump(value, stream, indent=1), "w")


def run_facts(folder, name="run.json"):
    """A run's JSON file as a dict; an empty one where it is missing or damaged: it can be written again."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # TypeError: it is JSON, but no dict
        return {**json.loads(Path(folder, name).read_text())}
    return {}


def describe_machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type}, {torch.get_num_threads()} threads, {capability}, {platform.machine()}"


def write_sheet(path, frame):
    """A DataFrame as .xlsx: first row frozen, numbers with four digits, text never taken for a formula."""
    buffer = io.BytesIO()  # a zip archive on a full disk complains twice
    with pd.ExcelWriter(buffer, engine="openpyxl") as writer:
        frame.to_excel(writer, index=False, freeze_panes=(1, 0))
        sheet = writer.book.active
        for column in sheet.columns:
            sheet.column_dimensions[column[0].column_letter].width = max(9, len(str(column[0].value)) + 3)
            for cell in column:
                if cell.data_type == "f":
                    cell.data_type = "s"
                if isinstance(cell.value, float):
                    cell.number_format = "0.0000"
    replace_file(path, lambda stream: stream.write(buffer.getbuffer()))
