"""Mistakes in the input rather than in the program: the one exception for them, and the type of an argument."""

import argparse
import os


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


def directory_name(text: str) -> str:
    """Type of an argument that names a directory; `~`, which shells leave to us in `--output_dir=~/run`, is home."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    return os.path.expanduser(text)
