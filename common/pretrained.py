"""Hugging Face model directories: reading and writing safetensors tensor by tensor, copying the files next to them."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, one_line
from common.shards import IGNORED_SUFFIX, load_tensors_only

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*",
)  # fmt: skip
GENERATION_FILES = ("generation_config.json",)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Not *.safetensors: some repositories hold the weights a second time, as consolidated.safetensors.
WEIGHT_FILES = ("model*.safetensors", INDEX)


class Weights:
    """The tensors of a model by name, none of them read yet.

    Attributes:
        path: of the file or directory, for messages.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]):
        self.path = path
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        """Names of all tensors except rotary frequencies."""
        return [name for name in self._tensors if not name.endswith(IGNORED_SUFFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; raises UserError for an integer type, as in quantized models."""
        dtype = self._tensors[name].dtype
        if not dtype.is_floating_point:
            raise UserError(f"{self.path}: '{name}' is {dtype}, expected a floating-point type")
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` as stored, mapped into memory."""
        return self._tensors[name]


class WeightsFile(Weights):
    """A weights file, `{"MODEL_STATE": state dict}`.

    Raises:
        UserError: no such file, truncated, not such a dict, or a pickle that asks for more than tensors.
    """

    def __init__(self, path: str | Path):
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        content = load_tensors_only(path)
        state = content.get("MODEL_STATE") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise UserError(f"{path}: expected a dict of tensors under MODEL_STATE")
        super().__init__(path, state)


class PretrainedWeights(Weights):
    """The safetensors of a model directory.

    Raises:
        UserError: the directory has no safetensors, a file that the index names is missing or lacks a tensor, or a
            file is truncated.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self._files = _weight_map(directory)
        super().__init__(directory, {})
        for path in sorted(set(self._files.values())) or [directory / WEIGHTS]:
            try:
                with safe_open(path, framework="pt") as file:
                    found = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: missing, truncated or not a safetensors file: {error}") from error
            self._tensors |= {name: info for name, info in found.items() if self._files.setdefault(name, path) == path}
        for name, path in self._files.items():
            if name not in self._tensors:
                raise UserError(f"{path}: '{name}' is missing, {INDEX} places it there")

    def read(self, name: str) -> torch.Tensor:
        # The file is opened for each tensor: its pages are returned when that tensor is freed.
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _weight_map(directory: Path) -> dict[str, Path]:
    """The file of each tensor according to the index; empty if the directory has a single file."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: expected a safetensors index with a weight_map") from error
    if not (directory / WEIGHTS).is_file():
        others = ", ".join(sorted(path.name for path in directory.glob("*.bin"))) or "no weights"
        raise UserError(f"{directory}: expected {WEIGHTS} or {INDEX}, found {others}")
    return {}


def open_weights(directory: str | Path, file: str | Path | None = None) -> Weights:
    """The weights of a model directory, or those of the weights file that replaces them."""
    return PretrainedWeights(directory) if file is None else WeightsFile(file)


def write_weights(directory: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, max_shard_size: int) -> int:
    """Writes `model.safetensors`, or several files and their index if that would be too large.

    Args:
        directory: holds the config already.
        tensors: mapped into memory, or stand-ins that `contiguous()` turns into tensors. They take memory only if they
            are stand-ins or of another dtype, those of one file at a time.
        dtype: of all tensors written.
        max_shard_size: of a file, in bytes; only a single tensor may exceed it.

    Returns:
        Bytes of all tensors.

    Raises:
        UserError: a file cannot be written.
    """
    meta = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
    for file_name, names in split.filename_to_tensors.items():
        path = directory / file_name
        content = {name: tensors[name].contiguous().detach().to(dtype) for name in names}
        try:
            save_file(content, path, metadata={"format": "pt"})
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} cannot be written: {one_line(error, 200)}") from error
        del content  # before the tensors of the next file are converted
        shutil.copymode(directory / "config.json", path)  # safetensors 0.8 lets nobody else read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return split.metadata["total_size"]


def has_tokenizer(directory: str | Path) -> bool:
    return bool(_matches(directory, TOKENIZER_FILES))


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copies tokenizer files (including the chat template) and generation config between model directories.

    The tokenizer files are copied together or, if `target` already has some, not at all: files of two tokenizers do
    not mix. The same holds for the generation config.
    """
    for patterns in (TOKENIZER_FILES, GENERATION_FILES):
        if not _matches(target, patterns):
            for path in _matches(source, patterns):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, Path(target) / path.name)


def _matches(directory: str | Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(Path(directory).glob(pattern)) if path.exists()]
