"""Arrays that are costly to make are made once and kept on disk: decoded pictures, a frozen trunk's features.

Each is a .npy file named by a digest of everything it depends on, with a .json beside it that holds its checksum.
Both are written under another name and renamed, so a killed run leaves no half-written array; a damaged one is
noticed by its checksum and made again. The folder can be deleted at any time.
"""

import hashlib
import io
import json
import os
import platform
import zlib
from pathlib import Path

import numpy as np

from errors import InputError

CHUNK = 1 << 24  # bytes read at a time for a checksum


def digest(*parts):
    """SHA-256 in hex of strings, bytes, arrays and JSON-like objects, in this order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).view(np.uint8).data if part.size else b""
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        sha.update(part)
        sha.update(b"\0")
    return sha.hexdigest()


def file_stamps(files):
    """(path name, bytes, time of change) of every file: what a kept array of pictures depends on."""
    stamps = []
    for file in files:
        status = os.stat(file)
        stamps.append((os.path.abspath(file), status.st_size, status.st_mtime_ns))
    return stamps


def replace_file(path, write, mode="wb"):
    """Call `write(stream)` on a temporary file beside `path`, then rename it: `path` is whole or untouched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as stream:
            write(stream)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # on an error or Ctrl-C nothing half-written stays; after the rename it is gone


def remove_leftovers(folder, name="*"):
    """Delete the temporary files that killed processes of this machine left in `folder`; living ones keep theirs."""
    for file in Path(folder).glob(f".{name}.{platform.node()}.*.tmp"):
        try:
            os.kill(int(file.name.split(".")[-2]), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except PermissionError:  # it is there, and another user's
            pass


class Kept:
    """An array (shape, dtype) under `folder`, made by `make(extra)` where it is missing or damaged.

    `make` yields blocks of rows in order and may put JSON-able facts into the dict `extra`, kept beside the array.
    """

    def __init__(self, folder, name, key, shape, dtype, make):
        self.path = Path(folder) / f"{name}-{digest(key)[:20]}.npy"
        self.shape, self.dtype, self.make = tuple(int(n) for n in shape), np.dtype(dtype), make

    def exists(self):
        """Whether array and facts are there and whole, as far as their sizes tell (`whole` compares the checksum)."""
        try:
            facts = json.loads(self.path.with_suffix(".json").read_text())
            return self.path.stat().st_size == facts["bytes"] and set(facts) == {"bytes", "crc", "extra"}
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def whole(self):
        """Whether array and facts are there and the checksum is right."""
        if not self.exists():
            return False
        if self.checksum() == json.loads(self.path.with_suffix(".json").read_text())["crc"]:
            return True
        print(f"{self.path} is damaged (checksum) and is made again")
        return False

    def write(self):
        """Make the array and put it in place, row block by row block (memory holds one block)."""
        extra, crc = {}, 0

        def stream_rows(stream):
            nonlocal crc
            header, rows = io.BytesIO(), 0
            np.lib.format.write_array_header_1_0(
                header, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape})
            crc = zlib.crc32(header.getvalue())
            stream.write(header.getvalue())
            for block in self.make(extra):
                block = np.ascontiguousarray(block, dtype=self.dtype)
                rows += len(block)
                crc = zlib.crc32(block.tobytes(), crc)
                stream.write(block.tobytes())
            if rows != self.shape[0]:
                raise RuntimeError(f"{self.path.name}: {rows} rows were made where {self.shape[0]} were promised")

        try:
            remove_leftovers(self.path.parent, self.path.name)
            replace_file(self.path, stream_rows)
            facts = {"bytes": self.path.stat().st_size, "crc": crc, "extra": extra}
            replace_file(self.path.with_suffix(".json"), lambda stream: json.dump(facts, stream), "w")
        except OSError as error:
            raise InputError(f"the cache {self.path.parent} cannot be written ({error.strerror}): free some space or name "
                             "another folder with --cache") from error

    def extra(self):
        """The facts kept beside the array; makes the array first where it is missing."""
        if not self.exists():
            self.write()
        return json.loads(self.path.with_suffix(".json").read_text())["extra"]

    def load(self, mmap=False):
        """The array, in memory or mapped from disk; its checksum is compared first."""
        if not self.whole():
            self.write()
        return self.read(mmap)

    def read(self, mmap=False):
        """The array as `load` gives it, where `whole` has just been asked."""
        # "c" (copy on write) because torch warns of arrays that it could not write to; the file is never changed
        return np.load(self.path, mmap_mode="c" if mmap else None, allow_pickle=False)

    def checksum(self):
        crc = 0
        with open(self.path, "rb") as stream:
            while block := stream.read(CHUNK):
                crc = zlib.crc32(block, crc)
        return crc
