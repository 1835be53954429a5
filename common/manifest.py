"""What a checkpoint on disk is: its name, the room that it needs, and the manifest that says it is complete.

The manifest has each file's size and SHA-256 and is written last.
"""

import json
import re
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line
from common.files import sha256

MANIFEST = "manifest.json"
TAG = re.compile(r"global_step(\d+)")


def files_of(directory: str | Path) -> list[str]:
    """Paths of a checkpoint's files, relative to it, in the manifest's order."""
    directory = Path(directory)
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in found if path.name != MANIFEST)


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of one file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def read(directory: str | Path) -> dict[str, dict[str, Any]] | None:
    """The manifest of a checkpoint, dict file -> {"size": bytes, "sha256": hex}; None where there is none.

    Raises:
        UserError: it is not readable.
    """
    path = Path(directory) / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        entries = {name: {"size": int(said["size"]), "sha256": str(said["sha256"])} for name, said in files.items()}
        if not entries or not all(name.isprintable() for name in entries):
            raise ValueError("it names no file, or one that cannot be")
        return entries
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest: {one_line(error, 200)}") from error


def dumps(files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


def difference(directory: str | Path, name: str, said: dict[str, Any]) -> str | None:
    """One line on how a file is not what its manifest says; None where it is. Reads the file only if its size is right.

    Args:
        said: the file's entry of the manifest.
    """
    path = Path(directory) / name
    try:
        size = path.stat().st_size
        if size != said["size"]:
            return f"{path} has {size:,} bytes, its checkpoint's manifest says {said['size']:,}"
        found = sha256(path)
    except FileNotFoundError:
        return f"{path} is missing, its checkpoint's manifest names it"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if found != said["sha256"]:
        return f"{path} was changed after it was saved: SHA-256 {found[:12]}…, its manifest says {said['sha256'][:12]}…"
    return None
