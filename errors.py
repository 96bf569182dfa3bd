"""How every script talks: its help, and at its end a clear message and an exit status.

A traceback is left for what is a bug of ours. What a user can mend gets a sentence.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import time

# What the system says of a place that cannot be written.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EEXIST,
    errno.ENOTDIR,
)
DISK_ADVICE = (
    "What was there before is whole. Free some space or choose another folder, then give the same command "
    "again (a training that had begun: --resume)."
)


class InputError(ValueError):
    """Input that cannot be trusted. The message says what was given, what was expected and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does: files stay whole, and it says how to go on."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is laid out; a default in square brackets where there is one."""

    def _get_help_string(self, action):
        if action.default in (None, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag gets the closest known one in its message."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        known = re.findall(r"--[a-z][\w-]+", self.format_help())
        if message.startswith("unrecognized arguments"):
            for flag in re.findall(r"--[a-z][\w-]*", message):
                longer = [name for name in known if flag.startswith(f"{name}-")]  # --batch-size: --batch
                close = longer or difflib.get_close_matches(flag, known, 1)
                if close:
                    message += f". {flag}: did you mean {close[0]}?"
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


def end_with_parent():
    """End this process within a second of its parent's end. Initializer of worker processes."""
    # Ctrl-C reaches every process of a terminal. What happens then is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch_parent(lambda: os._exit(1))


def watch_parent(end):
    """Call `end` once this process has lost its parent (a killed process cannot tell its children)."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


def terminate(number, _):
    raise Terminated(number)


def guard(main, *args):
    """Run `main(*args)` and return its exit status (0 where it returns None).

    2: input or a place on disk that the user can mend. 1: a loss that is not finite, or too little memory.
    130, 143: Ctrl-C, SIGTERM. Everything else keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    if "END_WITH_PARENT" in os.environ:  # run_all.sh: its scripts must not outlive it
        watch_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        return main(*args) or 0
    except InputError as error:
        return fail(2, f"error: {error}")
    except FloatingPointError as error:
        return fail(1, f"error: {error}")
    except KeyboardInterrupt as error:
        return fail(143 if isinstance(error, Terminated) else 130, "interrupted")
    except BrokenPipeError:  # the reader of our output, `| head` say, has gone
        sys.stdout = None
        return 141
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = error.filename or "the output"
        return fail(2, f"error: cannot write {place}: {error.strerror}. {DISK_ADVICE}")
    except (MemoryError, RuntimeError) as error:
        # torch's own types are RuntimeErrors, and torch is not imported here just to name them.
        text = str(error).partition("\n")[0] or "host memory"
        if type(error).__name__ == "BrokenProcessPool" or "DataLoader worker" in text:
            return fail(1, f"error: a worker process was killed ({text}). Try fewer --workers.")
        memory = isinstance(error, MemoryError) or "can't allocate memory" in text
        if not memory and type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(1, f"error: out of memory ({text}). Try a smaller --batch or --size.")


def fail(status, message):
    print(message, file=sys.stderr)
    return status
