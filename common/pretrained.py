"""Hugging Face model directories: finding or downloading one, safetensors tensor by tensor."""

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError, one_line
from common.shards import IGNORED_SUFFIX

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*",
)  # fmt: skip
GENERATION_FILES = ("generation_config.json",)

# Not *.safetensors: some repositories hold the weights a second time, as consolidated.safetensors.
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

# Values of a tensor that are read at a time on the way to another type.
VALUES_AT_ONCE = 1 << 24

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def resolve_model_directory(model_name: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: `model_name` itself, or a download of that repository on the Hub.

    Config and tokenizer are downloaded and, if `weights`, the safetensors.

    Raises:
        UserError: the path is not there, or the repository is unknown, unreachable or gated.
    """
    directory, name = Path(os.path.expanduser(model_name)), str(model_name)
    if name and directory.is_dir():
        return directory
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model directory")

    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    from common import hub

    patterns = ["config.json", *TOKENIZER_FILES, *GENERATION_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        login = "" if get_token() else ", then run `hf auth login` or set HF_TOKEN"
        raise UserError(f"{name}: gated; ask for access at {hub.address(name)}{login}") from error
    except Exception as error:  # the errors of the HTTP library and the Hub's have no common base
        raise UserError(f"{name}: no local directory, and the Hub does not give it: {hub.reason(error)}") from error


class PretrainedWeights:
    """The safetensors of a model directory, opened without reading their tensors.

    Raises:
        UserError: the directory has no safetensors, a file that the index names is missing or lacks a tensor,
            or a file is truncated.
    """

    def __init__(self, directory: str | Path):
        self.path = self.directory = directory = Path(directory)
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        self._files, self._headers = {}, {}
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                self._files = {name: directory / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: expected a safetensors index with a weight_map") from error
        elif not single.is_file():
            others = ", ".join(sorted(path.name for path in directory.glob("*.bin"))) or "no weights"
            raise UserError(f"{directory}: expected {single.name} or {index.name}, found {others}")
        for path in sorted(set(self._files.values())) or [single]:
            if not path.is_file():
                raise UserError(f"{path}: missing, but {index.name} names it")
            try:
                self._read_header(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: truncated or no safetensors file: {error}") from error
        for name, path in self._files.items():
            if name not in self._headers:
                raise UserError(f"{path}: '{name}' is missing, {index.name} places it there")

    def _read_header(self, path):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if self._files.setdefault(name, path) == path:
                    part = file.get_slice(name)
                    self._headers[name] = tuple(part.get_shape()), part.get_dtype()

    @property
    def names(self) -> list[str]:
        """Of all tensors but rotary frequencies."""
        return [name for name in self._files if not name.endswith(IGNORED_SUFFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a type that only quantized models have."""
        dtype = self._headers[name][1]
        if dtype not in _DTYPES:
            raise UserError(f"{self._files[name]}: '{name}' is {dtype}, expected {', '.join(_DTYPES)}")
        return _DTYPES[dtype]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name` in its stored shape, in `dtype` or as stored; of the file nothing else is read.

        A tensor to be converted is read in slices of rows, so that it is never there in both types at once.
        """
        shape = self.shape(name)
        if dtype in (None, self.dtype(name)) or not shape:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name).to(dtype or self.dtype(name))
        converted = torch.empty(shape, dtype=dtype)
        rows = max(1, VALUES_AT_ONCE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            # Opened anew for every slice: closing the file is what gives its mapped pages back.
            with safe_open(self._files[name], framework="pt") as file:
                converted[start : start + rows] = file.get_slice(name)[start : start + rows]
        return converted


class WeightsFile:
    """A file of all weights, `{"MODEL_STATE": state dict}`, mapped into memory: what is not read costs nothing.

    The same interface as `PretrainedWeights`.

    Raises:
        UserError: no such file, truncated, not such a dict, or a pickle that asks for more than tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file")
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged file can make it raise anything
            raise UserError(f"{self.path}: truncated, damaged or no weights file: {one_line(error, 200)}") from error
        state = content.get("MODEL_STATE") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{self.path}: expected a dict of tensors under MODEL_STATE")
        self._state = state

    @property
    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a type that is not floating-point."""
        dtype = self._state[name].dtype
        if not dtype.is_floating_point:
            raise UserError(f"{self.path}: '{name}' is {dtype}, expected a floating-point type")
        return dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._state[name].to(dtype or self._state[name].dtype)


def open_weights(directory: str | Path, file: str | Path | None = None) -> PretrainedWeights | WeightsFile:
    """The `PretrainedWeights` of a model directory, or the `WeightsFile` that takes their place."""
    return PretrainedWeights(directory) if file is None else WeightsFile(file)


def write_weights(directory: Path, sources: dict[str, Any], dtype: torch.dtype, max_shard_size: int) -> int:
    """Writes `model.safetensors`, or, where that would be too large, several files and their index.

    The library's own writer wants all tensors in memory; here they pass through in chunks.

    Args:
        sources: by tensor name, objects with `shape` and `stream(dtype)`, which yields the tensor's bytes.
        dtype: of all tensors written.
        max_shard_size: of a file, in bytes; only a single tensor may exceed it.

    Returns:
        Bytes of all tensors.
    """
    sizes = {name: math.prod(source.shape) * dtype.itemsize for name, source in sources.items()}
    groups, room = [], 0
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = max_shard_size
        groups[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        path = directory / f"model{part}.safetensors"
        _write_safetensors(path, {name: sources[name] for name in names}, sizes, dtype)
        weight_map |= dict.fromkeys(names, path.name)
    total = sum(sizes.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_safetensors(path, sources, sizes, dtype):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, source in sources.items():
        start, end = end, end + sizes[name]
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": source.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    # Padded so that the data begins aligned; with one dtype a file it stays so.
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for source in sources.values():
            for chunk in source.stream(dtype):
                file.write(chunk)


def has_tokenizer(directory: str | Path) -> bool:
    return bool(_matches(directory, TOKENIZER_FILES))


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copies tokenizer files (chat template included) and generation config between model directories.

    The tokenizer files are copied together or, where `target` already has some, not at all: those of two
    tokenizers do not mix. The same holds for the generation config.
    """
    for patterns in (TOKENIZER_FILES, GENERATION_FILES):
        if not _matches(target, patterns):
            for path in _matches(source, patterns):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, Path(target) / path.name)


def _matches(directory, patterns):
    return [path for pattern in patterns for path in sorted(Path(directory).glob(pattern)) if path.exists()]
