"""Mistakes in the input rather than in the program: the one exception for them, and the type of an argument."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in a flag, a file or a configuration, told in one line that names both sides.

    Scripts print the message without a traceback and exit with a non-zero code; any other exception is a bug
    and keeps its traceback.

    Args:
        on_all_ranks: every rank raises it at the same place, so that rank 0 can speak for all.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


def one_line(error: object, most: int | None = None) -> str:
    """What `error` says, in one line of at most `most` characters; its type's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def command(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Decorates the `main` of a command: a mistake in the input is one line on standard error, not a traceback.

    The decorated function returns the exit code: what `main` returned or 0, 1 for an error, 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except (UserError, OSError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            message = "the disk is full; nothing was kept" if full else one_line(error)
            print(f"error: {message}", file=sys.stderr)
            return 1

    return run


def directory_name(text: str) -> str:
    """Type of an argument that names a directory; `~`, which shells leave to us in `--output_dir=~/run`, is home."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    return os.path.expanduser(text)
