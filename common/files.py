"""Files that appear complete or not at all, their checksums, and the disk space they need."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError


def hidden_path(target: Path, suffix: str) -> Path:
    """The hidden path next to `target` that stands in for it: "partial" while it is written, "old" while replaced."""
    return target.with_name(f".{target.name}.{suffix}")


def remove(path: Path) -> None:
    """Removes a file, a link or a directory tree, as far as possible; never raises an OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Renames `source` to `target`. What had that name is removed only after the rename, and is back if that fails."""
    if not (source.is_dir() and target.is_dir()):
        source.replace(target)
        return
    old = hidden_path(target, "old")  # rename(2) replaces neither a directory that has files nor a link to one
    remove(old)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    sync(target.parent)
    remove(old)


def recover(target: Path) -> None:
    """Undoes a `replace` of a directory that was killed between its two renames."""
    if not target.exists():
        with suppress(OSError):  # there is nothing to undo, or another rank has just done it
            hidden_path(target, "old").rename(target)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yields a hidden path next to `target`, for a file or a directory, that takes its name if the block succeeds.

    If the block fails, the hidden path is removed and `target` is as before. A file is on disk before it is renamed.
    """
    target = Path(target)
    partial = hidden_path(target, "partial")
    remove(partial)  # left by a killed process
    try:
        yield partial
        if partial.is_file():
            sync(partial)
        replace(partial, target)
    finally:
        remove(partial)


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """Makes a file or directory with `make(path)` unless it exists; it appears complete or not at all.

    Of processes that start together, each makes its own in a hidden directory and renames it. The first directory, or
    the last file, stays.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        make(made)
        try:
            made.rename(path)
        except OSError:  # rename(2) does not replace a directory that has files in it
            if not path.exists():
                raise


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(path: str | Path) -> int:
    """Free bytes on the file system of a path, which need not exist yet."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(directory: str | Path, needed: int, what: str) -> None:
    """Raises UserError if the file system of `directory` has fewer than `needed` bytes free; `what` says for what."""
    free = free_space(directory)
    if free < needed:
        raise UserError(f"{directory} has {free / 1e9:.3g} GB free, {needed / 1e9:.3g} GB are needed {what}")
