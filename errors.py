"""How every script ends: a clear message and an exit status, never a traceback for what a user can mend."""

import errno
import sys


class InputError(ValueError):
    """Input that cannot be trusted. The message says what was given, what was expected and what to do."""


def guard(main, *args):
    """Run `main(*args)` and return its exit status (0 where it returns None).

    InputError and a full or read-only disk give status 2 and their message; running out of memory gives status 1
    and what to change. Everything else is a bug of ours and keeps its traceback.
    """
    try:
        return main(*args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT):
            raise
        print(f"error: cannot write {error.filename or 'the output'}: {error.strerror}. Nothing that was there before "
              "is lost; free some space or choose another folder, then give the same command again.", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch.OutOfMemoryError is a RuntimeError; torch is not imported here just to name it.
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
            raise
        print(f"error: out of memory ({str(error).splitlines()[0] if str(error) else 'host memory'}). "
              "Try a smaller --batch or --size.", file=sys.stderr)
        return 1
