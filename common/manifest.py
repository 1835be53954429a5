"""The name of a checkpoint directory, and its `manifest.json`: size and SHA-256 of each file, written last."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import UserError, one_line
from common.files import sha256

MANIFEST = "manifest.json"
TAG = re.compile(r"global_step(\d+)")


def files_of(directory: str | Path) -> list[str]:
    """Sorted paths of a checkpoint's files, relative to its directory, without the manifest."""
    directory = Path(directory)
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in found if path.name != MANIFEST)


def entry(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def read(directory: str | Path) -> dict[str, dict[str, Any]] | None:
    """Reads a checkpoint's manifest, {file name: {"size": bytes, "sha256": hex}}; None if it has no manifest.

    Raises:
        UserError: the manifest is not valid.
    """
    path = Path(directory) / MANIFEST
    try:
        entries = {
            name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
            for name, entry in json.loads(path.read_text())["files"].items()
        }
        if not entries or not all(map(_is_inside, entries)):
            raise ValueError("it lists no file, or one outside the checkpoint")
        return entries
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest: {one_line(error, 200)}") from error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts


def dumps(files: dict[str, dict[str, Any]]) -> str:
    """The content of a manifest file."""
    return json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n"


def difference(directory: str | Path, name: str, expected: dict[str, Any]) -> str | None:
    """Describes in one line how a file differs from its entry; None if it does not.

    A file of the wrong size is not read. A SHA-256 of None is not compared.
    """
    path = Path(directory) / name
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path} has {size:,} bytes, expected {expected['size']:,}"
        digest = sha256(path) if expected["sha256"] else None
    except FileNotFoundError:
        return f"{path} is missing, but its checkpoint's manifest names it"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest != expected["sha256"]:
        return f"{path} differs from what was saved: SHA-256 {digest[:12]}…, expected {expected['sha256'][:12]}…"
    return None
