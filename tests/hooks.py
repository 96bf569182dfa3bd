"""Changes that tests/forked.py makes to the program in a process of its own: tests hit moments by them."""

import errno
import os
import signal
import time


def slow_steps():
    """Every training step says where it is and takes its time; last.pt is written after every epoch."""
    import engine
    import records

    seed_dropout = engine.seed_dropout

    def slowly(seed, epoch, step, device):
        print("step", epoch, step)
        time.sleep(0.15)
        seed_dropout(seed, epoch, step, device)

    engine.seed_dropout, records.SHARE = slowly, 0


def save_every_epoch():
    """last.pt and best.pt are written after every epoch, however slow the disk is."""
    import records

    records.SHARE = 0


def stop_in(owner, name, times=1):
    """Send this process SIGTERM when `owner.name` is called for the `times`-th time."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(owner, name, stopping)


def decode_slowly(file, kind, size):
    print("decoding in", os.getpid(), flush=True)
    time.sleep(1)
    return original_decode(file, kind, size)


def slow_decode():
    global original_decode
    import decode

    original_decode, decode.decode = decode.decode, decode_slowly


def stop_at_decode():
    import decode

    stop_in(decode, "decode", 5)


def stop_at_extract():
    import features

    stop_in(features, "prepare_batch", 2)


def stop_at_fit_batchnorm():
    import features

    stop_in(features, "with_fast_trunk")
    stop_in(features.Batches, "__iter__")


def stop_at_train_step():
    import engine

    stop_in(engine, "seed_dropout", 6)


def stop_at_validate():
    import engine

    stop_in(engine, "predict", 2)


def stop_at_save_best():
    import checkpoint

    save = checkpoint.torch.save

    def stopping(state, stream):
        if state["kind"] == "best":
            checkpoint.torch.save = save
            stream.write(b"half of it")
            signal.raise_signal(signal.SIGTERM)
        save(state, stream)

    checkpoint.torch.save = stopping


def stop_at_save_last():
    import records

    stop_in(records.RunRecords, "save_last", 2)


def stop_at_end():
    import checkpoint

    stop_in(checkpoint, "write_sheet")


# ---------------------------------------------------------------- errors that meet one machine alone


def failing(owner, name, error, times=1):
    """Let `owner.name` raise `error` when it is called for the `times`-th time."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def fail_no_data():
    import tables
    from errors import InputError

    failing(tables, "read", InputError("data/x cannot be read, there is no data here"))


def fail_unreadable_file():
    import decode

    load_picture = decode.load_picture

    def damaged(file, kind, size):
        from errors import InputError

        if not seen:
            seen.append(file)
            raise InputError(f"{file} is damaged")
        return load_picture(file, kind, size)

    seen, decode.load_picture = [], damaged


def fail_weights():
    import models
    from errors import InputError

    failing(models, "build_model", InputError("no weights on this machine"))


def fail_full_disk_decoding():
    import cache

    failing(cache, "reserve", OSError(errno.ENOSPC, "No space left on device"))


def fail_full_disk_features():
    import cache

    failing(cache, "reserve", OSError(errno.ENOSPC, "No space left on device"), times=3)  # after the pictures


def fail_extracting():
    import features

    features.np = NotFinite(features.np)


class NotFinite:
    """numpy for a machine whose trunk overflows."""

    def __init__(self, numpy):
        self.numpy = numpy

    def __getattr__(self, name):
        return getattr(self.numpy, name)

    def isfinite(self, array):
        return self.numpy.zeros(1, bool)


def fail_run_folder():
    import checkpoint
    from errors import InputError

    failing(checkpoint, "new_run_folder", InputError("--runs runs cannot be made (Read-only file system)"))


def fail_full_disk_last():
    import records

    failing(records.RunRecords, "save_last", OSError(errno.ENOSPC, "No space left on device"))


def fail_nan_rows():
    import features

    on_device = features.on_device
    features.on_device = lambda tensor, device: on_device(tensor * float("nan"), device)


def start_late():
    time.sleep(4)
