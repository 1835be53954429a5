"""The layer shards of a pipeline checkpoint: finding, checking and reading them.

A model of L decoder layers is L + 3 files `layer_XX-model_states.pt`: 00 the embedding, 01 to L the decoder layers,
L + 1 the final norm, L + 2 the head. Each is a flat dict of tensors, whose keys differ from the Hugging Face names only
in their prefix.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, one_line

# `model_type` of the architectures with the same tensor names and the same decoder layer interface.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

# Older models saved the rotary frequencies; today they are computed from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

# Read by `common.zero_checkpoint`. A pipeline has such files next to its layer shards, but they are not needed.
ZERO_FILES = "*mp_rank_*_states.pt"
CHECKPOINT_FILES = f"layer shards (layer_*) or files of ZeRO ({ZERO_FILES})"


def layer_file_name(index: int) -> str:
    """File name of layer shard `index`, as DeepSpeed writes it without tensor parallelism."""
    return f"layer_{index:02d}-model_states.pt"


def layer_keys(index: int, names: Iterable[str], num_layers: int) -> dict[str, str]:
    """The keys of one shard and the Hugging Face names they stand for.

    Args:
        index: of the shard, 0 to num_layers + 2.
        names: all tensor names of the model.

    Returns:
        A dict key -> name, of those `names` that belong in the shard.
    """
    ours, theirs = {
        0: ("embed_tokens.", "model.embed_tokens."),
        num_layers + 1: ("norm.", "model.norm."),
        num_layers + 2: ("lm_head.", "lm_head."),
    }.get(index, ("layer.", f"model.layers.{index - 1}."))
    return {ours + name.removeprefix(theirs): name for name in names if name.startswith(theirs)}


def resolve_checkpoint(path: str | Path) -> Path:
    """The directory with a checkpoint's files: `path` itself, or the one named by the file `latest` in it.

    Raises:
        UserError: there is no such directory, or it has neither layer shards nor files of ZeRO.
    """
    directory = Path(os.path.expanduser(path))
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory")
    if _has_checkpoint(directory):
        return directory
    latest = directory / "latest"
    if not latest.is_file():
        raise UserError(f"{directory}: expected {CHECKPOINT_FILES} or a file `latest`, found none of them")
    tag = latest.read_text(errors="replace").strip()
    if not tag or not _has_checkpoint(directory / tag):
        raise UserError(f"{latest} names '{tag}', but {directory / tag} has no {CHECKPOINT_FILES}")
    return directory / tag


def has_layer_shards(directory: str | Path) -> bool:
    return any(Path(directory).glob("layer_*"))


def _has_checkpoint(directory: Path) -> bool:
    return has_layer_shards(directory) or any(directory.glob(ZERO_FILES))


def find_layer_shards(directory: str | Path, num_layers: int, *, allow_identical_layers: bool = False) -> list[Path]:
    """The num_layers + 3 layer shards of `directory`, in order.

    Raises:
        UserError: a `layer_*` file is missing, duplicated or foreign. Also, unless `allow_identical_layers`, if two
            decoder layers have the same tensors: one file copied over another would load without complaint.
    """
    directory = Path(directory)
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("layer_*")):
        # DeepSpeed adds -model_00 if the topology has an axis for tensor parallelism.
        match = re.fullmatch(r"layer_(\d+)(-model_00)?-model_states\.pt", path.name)
        if match is None:
            raise UserError(f"{path}: not the name of a layer shard; expected names such as {layer_file_name(0)}")
        index = int(match[1])
        if index in found:
            raise UserError(f"{path}: layer {index} is there twice, the other is {found[index].name}")
        found[index] = path
    claim = f"found {len(found)} shards, num_hidden_layers={num_layers} makes {num_layers + 3}"
    for index in range(num_layers + 3):
        if index not in found:
            raise UserError(f"{directory / layer_file_name(index)}: missing; {claim}")
    if len(found) > num_layers + 3:
        raise UserError(f"{found[max(found)]}: past the last layer; {claim}")
    shards = [found[index] for index in range(num_layers + 3)]
    if not allow_identical_layers:
        _check_layers_differ(shards[1:-2])
    return shards


def _check_layers_differ(paths: list[Path]) -> None:
    layers = [(path, read_shard(path)) for path in paths]
    for (first, one), (second, other) in combinations(layers, 2):
        # The comparison stops at the first value that differs, so hardly anything is read.
        if one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one):
            raise UserError(
                f"{second}: the same tensors as {first.name}, expected layers that differ; "
                "if that is intended, convert with --allow_identical_layers"
            )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and signs of zeros included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


def read_shard(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a layer shard, mapped into memory: nothing is read until it is used.

    Raises:
        UserError: the file is truncated or unreadable, not a flat dict of tensors, or a pickle that asks for more than
            tensors. Nothing of such a pickle is executed.
    """
    content = load_tensors_only(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    for key, value in content.items():
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not dense:
            raise UserError(f"{path}: {key!r} is a {type(value).__name__}, expected names and dense tensors")
    return {key: value.detach() for key, value in content.items() if not key.endswith(IGNORED_SUFFIX)}


def load_tensors_only(path: str | Path) -> Any:
    """Maps a file of `torch.save` into memory, on the CPU, if it has nothing but tensors and plain values.

    Raises:
        UserError: the file is truncated or unreadable, or its pickle asks for more; nothing of it is then executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch would map compressed bytes as if they were values
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickle that asks for {asked[1]}" if asked else "a damaged pickle or one of other objects"
        raise UserError(f"{path}: refused, {what}; expected nothing but tensors") from error
    except Exception as error:  # a damaged file can make it raise anything
        reason = one_line(error, 200)
        raise UserError(f"{path}: truncated, damaged, or not a plain zip file of torch.save: {reason}") from error


def check_tensors(path: str | Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Compares the shapes of the tensors in `path` with those that the model needs.

    Raises:
        UserError: a key is missing, unknown or of another shape.
    """
    unknown = [key for key in found if key not in expected]
    for key, shape in expected.items():
        if key not in found:
            instead = f"; found '{unknown[0]}' of shape {list(found[unknown[0]])}" if unknown else ""
            raise UserError(f"{path}: expected '{key}' of shape {list(shape)}, which is missing{instead}")
        if found[key] != shape:
            raise UserError(f"{path}: '{key}' has shape {list(found[key])}, expected {list(shape)}")
    if unknown:
        raise UserError(f"{path}: found '{unknown[0]}' of shape {list(found[unknown[0]])}, expected no such key")


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_layer(path: str | Path, module: torch.nn.Module) -> None:
    """Copies one shard into `module`: every key of its state dict and no other, cast to the module's dtype.

    Raises:
        UserError: as `read_shard`, and if keys or shapes differ.
    """
    tensors, targets = read_shard(path), module.state_dict()
    check_tensors(path, shapes_of(tensors), shapes_of(targets))
    for key, target in targets.items():
        target.copy_(tensors[key])
