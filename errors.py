"""How every script talks: its help, an exit status, a sentence on what to mend; a traceback is our bug."""

import argparse
import contextlib
import difflib
import errno
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time

DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}
DISK_ERRORS |= {errno.EFBIG, errno.EEXIST, errno.ENOTDIR}  # what is said of a place that cannot be written
# How gloo and nccl say that a process they share a run with is no longer there.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "remote process exited")


class InputError(ValueError):
    """Input that cannot be trusted. The message says what was given, what was expected and what to do."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is laid out; a default in square brackets where there is one."""

    def _get_help_string(self, action):
        shown = action.option_strings and action.default not in (None, argparse.SUPPRESS)
        return f"{action.help} [%(default)s]" if shown else action.help


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag gets the closest known one in its message."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = message.startswith("unrecognized arguments")
        for flag in re.findall(r"--[a-z][\w-]*", message) if unknown else ():
            for close in difflib.get_close_matches(flag, re.findall(r"--[a-z][\w-]*", self.format_help()), 1):
                message += f". {flag}: did you mean {close}?"
        super().error(message)


@contextlib.contextmanager
def reading(path, what):
    """Turn whatever a library raises on damaged bytes into an InputError that names the file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as error:  # torch, zip, pickle, pandas and Pillow raise a dozen types on damaged bytes
        text = " ".join(str(error).split())[:120]
        raise InputError(f"{path} cannot be read as {what} ({type(error).__name__}: {text})") from error


def end_with_parent(*_):
    """End this process when its parent ends. Initializer of worker processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def exit_after_parent():
    with contextlib.suppress(OSError):  # raised where this process is ending by itself
        multiprocessing.parent_process().join()  # of workers from a fork server os.getppid() is that server
        os._exit(1)


def terminate_without(parent):
    """SIGTERM to this process once it is no child of process `parent` (which cannot say it was killed)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def terminate(number, _):
    raise KeyboardInterrupt(number)  # SIGTERM ends a script as Ctrl-C does: files stay whole


def guard(main, *args):
    """Run `main(*args)` and return its exit status (0 where it returns None).
    2: input or a place on disk that the user can mend. 1: a loss that is not finite, too little memory, or
    another process has ended. 130, 143: Ctrl-C, SIGTERM. An exception's `go_on`: the command that goes on."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)  # "?" for what a terminal lacks
    signal.signal(signal.SIGTERM, terminate)
    try:
        if "END_WITH_PARENT" in os.environ:  # run_all.sh: its scripts must not outlive it, nor theirs them
            parent, os.environ["END_WITH_PARENT"] = int(os.environ["END_WITH_PARENT"]), str(os.getpid())
            threading.Thread(target=terminate_without, args=[parent], daemon=True).start()
        return main(*args) or 0
    except (InputError, FloatingPointError) as error:
        status, message = 2 if isinstance(error, InputError) else 1, f"error: {error}"
    except KeyboardInterrupt as error:
        threading.excepthook = lambda _: None  # Python 3.11's pool complains of workers that it loses
        for worker in multiprocessing.active_children():
            worker.kill()  # at its exit Python would wait for the pictures that they decode
        status, message = 143 if error.args else 130, f"interrupted. {how_to_go_on(error)}"
    except BrokenPipeError:  # the reader of our output, `| head` say, has gone
        sys.stdout = None
        return 141
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        status, place = 2, error.filename or "the output"
        message = f"error: cannot write {place}: {error.strerror}. What was there before is whole. Make room "
        message += "or take another folder, then run again (a begun training: --resume)."
    except (MemoryError, RuntimeError) as error:  # torch's types by name: it is not imported just for them
        status, kinds = 1, {kind.__name__ for kind in type(error).__mro__}
        text = str(error).partition("\n")[0] or "host memory"
        if any(words in text for words in LOST):
            message = f"error: another process of this run has ended ({text}). {how_to_go_on(error)}"
        elif "BrokenProcessPool" in kinds or "DataLoader worker" in text:
            message = f"error: a worker process was killed ({text}). Try fewer --workers."
        elif kinds & {"MemoryError", "OutOfMemoryError"} or "can't allocate memory" in text:
            message = f"error: out of memory ({text}). Try a smaller --batch or --size."
        else:
            raise
    print(message, file=sys.stderr)
    return status


def how_to_go_on(error):
    return f"Go on with:\n    {getattr(error, 'go_on', None) or shlex.join(['python', *sys.argv])}"
