"""Errors that the input causes, not a bug: their exception, how commands print them, and an argument type."""

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """An error in a flag, a file or a configuration. Its message is one line: what was given and what was expected.

    Scripts print the message without a traceback and exit with a non-zero code; any other exception is a bug and keeps
    its traceback.

    Args:
        on_all_ranks: whether every rank raises it at the same place, so that only rank 0 needs to print it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


def one_line(error: object, most: int | None = None) -> str:
    """Returns the message of `error` as one line of at most `most` characters, or the name of its type if empty."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Decorates the `main` of a command, so that an error that the input causes is one line, not a traceback.

    The decorated function takes the arguments, by default those of the command line, and returns the exit code: what
    `main` returned or 0, 1 for an error, 130 for Ctrl-C.
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
    """Type of an argument that names a directory. Expands `~`, which shells do not expand in `--output_dir=~/run`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    return os.path.expanduser(text)
