"""How every script talks: its help, and at its end a clear message and an exit status, never a traceback for what a user can mend."""

import argparse
import errno
import sys


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that there are in brackets, short names for numbers, and the description as it is laid out."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=24)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)

    def _format_action_invocation(self, action):
        name = action.option_strings[0] if isinstance(action, argparse.BooleanOptionalAction) else ""
        return name.replace("--", "--[no-]", 1) or super()._format_action_invocation(action)

    def _get_help_string(self, action):
        bare = action.default in (None, argparse.SUPPRESS) or not action.option_strings
        return action.help if bare else f"{action.help} [%(default)s]"

    def _fill_text(self, text, width, indent):
        return text.strip()


class InputError(ValueError):
    """Input that cannot be trusted. The message says what was given, what was expected and what to do."""


def guard(main, *args):
    """Run `main(*args)` and return its exit status (0 where it returns None).

    InputError and a full or read-only disk give status 2 and their message; running out of memory, a killed worker and
    a loss that is not finite give status 1 and what to change. Everything else is a bug of ours and keeps its traceback.
    """
    try:
        return main(*args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `| head` say, has gone
        sys.stdout = None
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.EEXIST, errno.ENOTDIR):
            raise
        print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}. Nothing that was there before "
              "is lost; free some space or choose another folder, then give the same command again (a training that had begun: "
              "--resume).", file=sys.stderr)
        return 2
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        print("error: BatchNorm cannot normalise a batch of one picture this small: take a larger --batch or --size, --drop-last, "
              "or --bn fitted", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # torch's own types are RuntimeErrors (on a CPU without a name); torch is not imported here just to name them.
        text = str(error).partition("\n")[0]
        if type(error).__name__ == "BrokenProcessPool" or "DataLoader worker" in text:
            print(f"error: a worker process was killed, most often for want of memory ({text}). Try fewer --workers.", file=sys.stderr)
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
            print(f"error: out of memory ({text or 'host memory'}). Try a smaller --batch or --size.", file=sys.stderr)
        else:
            raise
        return 1
