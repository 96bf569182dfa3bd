"""A run's folder and its files: written whole or not at all, read back only when they are whole.

best.pt   complete in itself: weights, arguments, labels, split; `test.py` needs nothing else
last.pt   what the next epoch needs: weights, optimiser, schedule, scaler, history, patience, and a cut epoch's record
run.json  how the run was made and what came out of it
"""

import datetime
import functools
import io
import json
import pickle
import platform
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from cache import digest, replace_file
from errors import InputError

FORMAT = 1


def load_file(path):
    """A file written by torch.save, checksums compared, nothing unpickled but tensors and plain containers."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch does not compare the checksums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise InputError(f"{path} is damaged: the checksum of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds code or is no checkpoint ({str(error)[:120].partition(chr(10))[0]})") from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError, AttributeError, TypeError, NotImplementedError,
            UnicodeDecodeError, MemoryError, OverflowError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:120].partition(chr(10))[0]})") from error


def load_checkpoint(path, kind="best"):
    """best.pt or last.pt as a dict; InputError when it is another file, another format or damaged."""
    state = load_file(path)
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise InputError(f"{path} is not a {kind}.pt of this repository")
    if state.get("format") != FORMAT:
        raise InputError(f"{path} has format {state.get('format')}, this code reads {FORMAT}")
    return state


def load_last(folder):
    """last.pt of a run; where it is missing or damaged, InputError names the epoch that best.pt still holds."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--resume {folder}: there is no such run folder")
    try:
        return load_checkpoint(folder / "last.pt", "last")
    except InputError as error:
        try:
            epoch = load_checkpoint(folder / "best.pt")["epoch"]
        except InputError as other:
            raise InputError(f"{error}. No epoch of this run can be trusted ({other}): delete {folder} and start it again") from error
        raise InputError(f"{error}. The last good epoch is {epoch}, the best so far: {folder / 'best.pt'} holds it for test.py. "
                         f"This run cannot go on; a new one can start from that epoch with --weights {folder / 'best.pt'}") from error


def save_checkpoint(path, kind, **state):
    replace_file(path, functools.partial(save_to, {"kind": kind, "format": FORMAT, **state}))


def save_to(state, stream):
    """torch.save, whose own error would hide the OSError of a full disk."""
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def state_digest(*modules):
    """Digest of all parameters and buffers."""
    return digest(*(value.detach().cpu().numpy() for module in modules for value in module.state_dict().values()))


def cpu_state(module, copy=False):
    """A module's state_dict on the CPU; `copy` where it must stay as it is while training goes on."""
    return {key: value.detach().to("cpu", copy=copy) for key, value in module.state_dict().items()}


# ---------------------------------------------------------------- what a checkpoint's run had

def choose_rows(table, saved, split, given_data=None, missing="stop"):
    """The rows of the asked part, in the order the run had them; `all` is every row of the table."""
    if split == "all":
        return table
    wanted = saved["split"][split]
    if not wanted:
        raise InputError(f"this run has no {split} part: train with --test-fraction to keep one, or use --split val or all")
    by_id = table.set_index(table["ID"].astype(str))
    there = [i for i in wanted if i in by_id.index]
    if len(there) < len(wanted) and (missing == "stop" or not there):
        raise InputError(f"{len(wanted) - len(there)} of the {len(wanted)} rows of the run's {split} part are not in this data set. "
                         + ("Use --split all for other patients, or --missing drop" if given_data else "The data have changed since training"))
    return by_id.loc[there].reset_index(drop=True)


def home_of(run, ckpt):
    """Where the files about a run go: its folder, or, where that is elsewhere, a new one beside the checkpoint."""
    home = Path(run.runs) / run.name
    return home if home.is_dir() else Path(ckpt).with_name(f"test-{run.name}")


# ---------------------------------------------------------------- the run folder

def new_run_folder(runs, name, default):
    """Make and return runs/<name>; without a name the first free runs/<default>-<number>. Never an existing one."""
    runs = Path(runs)
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--runs {runs} cannot be made ({error.strerror}): name a folder that can be written") from error
    if name:
        if Path(name).name != name:
            raise InputError(f"--name {name}: expected a plain name, without folders")
        folder = runs / name
        if folder.exists():
            raise InputError(f"{folder} exists and is never overwritten: choose another --name, or go on with --resume {folder}")
        folder.mkdir(parents=True)
        return folder
    number = 1
    while True:
        folder = runs / f"{default}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def plain(value):
    """Numbers and containers as JSON takes them: NaN becomes null, numpy scalars become Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def save_json(path, value):
    replace_file(path, lambda stream: json.dump(plain(value), stream, indent=1, allow_nan=False), "w")


def run_facts(folder):
    """run.json as a dict; an empty one where it is missing or damaged: what it says can be written again."""
    try:
        facts = json.loads((Path(folder) / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def versions():
    import torchvision
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__}


def describe_machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


def commit():
    """The commit of the code that runs, with + when files differ from it; "unknown" outside a git checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line(folder):
    """The command that began the run in `folder`, and, where it goes on, the one that did that last."""
    began = str(run_facts(folder).get("command", "")).split(" ; ")[0]
    return " ; ".join([*([began] if began else []), shlex.join(["python", *sys.argv])])


def now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_sheet(path, frame):
    """A DataFrame as .xlsx, whole or not at all."""
    buffer = io.BytesIO()  # a zip archive on a full disk complains twice
    frame.to_excel(buffer, index=False, engine="openpyxl")
    replace_file(path, lambda stream: stream.write(buffer.getbuffer()))
