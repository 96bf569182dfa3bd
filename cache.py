"""Files written whole or not at all, and arrays that are costly to make and therefore kept on disk.
Kept arrays are .npy files named by a digest of what they are made from; their folder can be deleted."""

import contextlib
import hashlib
import json
import math
import os
import platform
from pathlib import Path

import numpy as np

from errors import InputError, reading


def digest(*parts):
    """SHA-256 in hex of strings, bytes, arrays and JSON-like objects, in this order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode())
            part = part.tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        sha.update(part + b"\0")
    return sha.hexdigest()


def fingerprint(data):
    """Twenty hex digits by which a picture is known: of its file's bytes, or of its pixels'."""
    return hashlib.blake2b(data, digest_size=10).hexdigest()


@contextlib.contextmanager
def replacing(path):
    """A hidden file beside `path`, by machine and process, then renamed: `path` is whole or untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error or Ctrl-C; after the rename it is gone already


def replace_file(path, write, mode="wb"):
    """`write(stream)` a file that appears as a whole or not at all."""
    encoding = None if "b" in mode else "utf-8"
    with replacing(Path(path)) as temporary, open(temporary, mode, encoding=encoding) as stream:
        write(stream)


def remove_leftovers(folder, name="*"):
    """Delete the temporary files that killed processes of this machine left in `folder`."""
    for file in Path(folder).glob(f".{name}.{platform.node()}.*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except PermissionError:
            continue  # it is there, and another user's


def is_whole(path, shape, dtype):
    """Whether `path` is a .npy file of this shape and dtype, as long as it has to be."""
    with contextlib.suppress(InputError), reading(path, "an array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array.shape == shape and array.dtype == dtype
    return False  # missing, cut short, or a damaged header


def kept_array(path, shape, dtype, fill):
    """The array of `path`, mapped; `fill(array)` makes a missing or short one. InputError: no room for it."""
    if not is_whole(path, shape, dtype):
        try:
            with replacing(path) as temporary:
                remove_leftovers(path.parent, path.name)
                reserve(temporary, math.prod(shape) * np.dtype(dtype).itemsize)
                array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
                fill(array)
                array.flush()
                del array  # Windows renames no mapped file
        except OSError as error:
            text = f"the cache {path.parent} cannot be written ({error.strerror})"
            raise InputError(f"{text}: make room, or name another folder with --cache") from error
    # "c" (copy on write) because torch warns of arrays that it could not write to. The file is never changed.
    return np.load(path, mmap_mode="c", allow_pickle=False)


def reserve(path, size):
    """Take the space first: writing to a mapped file on a full disk would kill the process, not raise."""
    with open(path, "wb") as stream:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(stream.fileno(), 0, size)
