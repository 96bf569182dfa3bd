"""Pictures decoded once, in parallel, and kept on disk as uint8."""

import copy
import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from cache import digest, fingerprint, kept_array, replace_file
from engine import progress
from errors import InputError, reading
from preprocess import in_processes, load_picture

FACTS = ("failed", "repaired", "contents")  # what is known of kept pictures


def decode(file, kind, size):
    """One picture -> (uint8 (size, size, 3), repaired, why there is none, its content, system's error)."""
    nothing = np.zeros((size, size, 3), np.uint8)
    try:
        picture, repaired = load_picture(file, kind, size)
        data = Path(file).read_bytes()
    except InputError as error:
        return nothing, False, str(error), [], ""
    except OSError as error:  # what the system says may be different tomorrow
        return nothing, False, "", [], f"{file}: {error.strerror}"
    return picture, repaired, "", [fingerprint(data), fingerprint(picture.tobytes())], ""


def decode_all(files, kind, size, workers=None):
    """Yields `decode` of every file, in order, by all cores; a few are not worth the processes."""
    work = functools.partial(decode, kind=kind, size=size)
    return in_processes(work, files, workers if len(files) > 64 else 1)


class Pictures:
    """Pictures decoded once and kept: `.rows` (n, P) points into `.array()`, uint8 (m, S, S, 3).
    `.failed` {file: reason}, `.repaired` [file] and `.contents` [[digest of bytes, of pixels] of each file]
    say what was found. Raises InputError where the system refuses to read a file."""

    def __init__(self, files, kind, size, cache, workers=None):
        self.files = [file for row in files for file in row]
        self.rows = np.arange(len(self.files)).reshape(len(files), -1)
        self.kind, self.size, self.workers = kind, size, workers
        # ctime cannot be set: it tells of a file that was moved here, or whose mtime was set back.
        found = [(os.path.abspath(file), os.stat(file)) for file in self.files]
        stamps = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found]
        self.key = digest(stamps, kind, size, "pictures-2")
        self.path = Path(cache) / f"pictures-{self.key[:20]}.npy"
        self.shape, self.facts = (len(self.files), size, size, 3), self.path.with_suffix(".json")
        self.mapped = self.resident = None
        try:
            with reading(self.facts, "facts about pictures"):
                facts = json.loads(self.facts.read_text())
                self.failed, self.repaired, self.contents = (facts[name] for name in FACTS)
        except InputError:  # missing or damaged: what was found, and the pictures, are made again
            self.path.unlink(missing_ok=True)
        kept_array(self.path, self.shape, np.uint8, self.fill)

    def fill(self, array):
        """Decode into `array`, and keep what was found beside it."""
        found, decoded = [], decode_all(self.files, self.kind, self.size, self.workers)
        bar = progress(decoded, f"pictures {self.kind} {self.size}", total=len(self.files))
        for number, (picture, *rest) in enumerate(bar):
            array[number] = picture
            found.append((self.files[number], *rest))
        self.repaired = [file for file, repaired, *_ in found if repaired]
        self.failed = {file: reason for file, _, reason, *_ in found if reason}
        self.contents = [content for *_, content, _ in found]
        if refused := [system for *_, system in found if system]:
            first = "; ".join(refused[:3])
            raise InputError(f"the system refuses {len(refused)} file(s): {first}. Mend it, then run again")
        facts = {name: getattr(self, name) for name in FACTS}
        replace_file(self.facts, lambda stream: json.dump(facts, stream), "w")

    def array(self):
        """The kept array, mapped from disk by each process that asks."""
        if self.mapped is None:
            self.mapped = np.load(self.path, mmap_mode="c", allow_pickle=False)
        return self.mapped

    def __getstate__(self):  # a worker process gets the path, not a copy of the pictures
        return {**self.__dict__, "mapped": None, "resident": None}

    def on(self, device):
        """All pictures as one tensor on a GPU where a quarter of its free memory holds them, else None."""
        if self.resident is None and device.type == "cuda":
            if math.prod(self.shape) < torch.cuda.mem_get_info(device)[0] / 4:
                self.resident = torch.from_numpy(self.array()).to(device)
        return self.resident

    def chosen(self, rows):
        """The same pictures with other rows (n, P)."""
        other = copy.copy(self)
        other.rows = rows
        return other


class GivenPictures(Pictures):
    """Pictures that lie in memory, uint8 (m, S, S, 3)."""

    def __init__(self, array, rows):
        self.stored, self.rows, self.shape, self.size = array, rows, array.shape, array.shape[1]
        self.resident = None

    def array(self):
        return self.stored
