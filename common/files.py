"""Files that appear complete or not at all, their checksums, and the disk space they need."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def remove(path: Path) -> None:
    """Removes a file, a link or a directory tree; nothing happens if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Renames `source` to `target`. What had that name is removed only after the rename, and is back if that fails."""
    if not target.is_dir() or target.is_symlink():
        source.replace(target)
        return
    old = target.with_name(f".{target.name}.old")  # rename(2) does not replace a directory that has files in it
    remove(old)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yields a hidden path next to `target`, for a file or a directory, that takes its name if the block succeeds.

    If the block fails, the hidden path is removed and `target` is as before.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # left by a killed process
    try:
        yield partial
        replace(partial, target)
    finally:
        remove(partial)


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """Makes a file or directory with `make(path)` unless it exists; it appears complete or not at all.

    Of processes that start together, each makes its own in a hidden directory, and the first to finish wins.
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


def check_space(directory: str | Path, needed: int, what: str) -> None:
    """Raises UserError if the file system of `directory` has fewer than `needed` bytes free; `what` says for what."""
    place = Path(directory).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{directory} has {free / 1e9:.3g} GB free, {needed / 1e9:.3g} GB are needed {what}")
