"""The layer shards of a pipeline checkpoint: finding them, checking them, reading them tensor by tensor.

A model of L decoder layers is L + 3 files `layer_XX-model_states.pt`: 00 the embedding, 01 to L the decoder
layers, L + 1 the final norm, L + 2 the head. Each is a flat dict of tensors, whose keys differ from the
Hugging Face names in their prefix only.
"""

import hashlib
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import UserError

# Values read at a time: enough that system calls cost little, few enough that they are still in the
# processor's cache when they are converted and written.
CHUNK = 1 << 18

# Older models saved the rotary frequencies; today they are computed from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

# What `common.zero_checkpoint` reads; those of a pipeline are beside its layer shards, and not needed.
ZERO_FILES = "*mp_rank_*_states.pt"
CHECKPOINT_FILES = f"layer shards (layer_*) or files of ZeRO ({ZERO_FILES})"


class TensorInfo(NamedTuple):
    shape: tuple
    dtype: torch.dtype


def layer_file_name(index: int) -> str:
    """File name of layer shard `index`, as DeepSpeed writes it without tensor parallelism."""
    return f"layer_{index:02d}-model_states.pt"


def layer_keys(index: int, names: Iterable[str], num_layers: int) -> dict[str, str]:
    """The keys of one shard and the Hugging Face names they stand for.

    Args:
        index: of the shard, 0 to num_layers + 2.
        names: all tensor names of the model.

    Returns:
        Name of each key, for those `names` that belong in the shard.
    """
    ours, theirs = {
        0: ("embed_tokens.", "model.embed_tokens."),
        num_layers + 1: ("norm.", "model.norm."),
        num_layers + 2: ("lm_head.", "lm_head."),
    }.get(index, ("layer.", f"model.layers.{index - 1}."))
    return {ours + name.removeprefix(theirs): name for name in names if name.startswith(theirs)}


def resolve_checkpoint(path: str | Path) -> Path:
    """The directory with a checkpoint's files: `path` itself, or the one that the file `latest` in it names.

    Raises:
        UserError: there is no such directory, or it holds neither layer shards nor the files of ZeRO.
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
        raise UserError(f"{latest} names '{tag}', but {directory / tag} holds no {CHECKPOINT_FILES}")
    return directory / tag


def has_layer_shards(directory: str | Path) -> bool:
    return any(Path(directory).glob("layer_*"))


def _has_checkpoint(directory):
    return has_layer_shards(directory) or any(directory.glob(ZERO_FILES))


def find_layer_shards(directory: str | Path, num_layers: int, *, allow_identical_layers: bool = False) -> list[Path]:
    """The num_layers + 3 layer shards of `directory`, in order.

    Raises:
        UserError: a `layer_*` file is missing, doubled or foreign. Also, unless `allow_identical_layers`, two
            decoder layers hold the same tensors: one file copied over another would load without complaint.
    """
    directory = Path(directory)
    expected = f"num_hidden_layers={num_layers} makes {num_layers + 3}, 00 to {num_layers + 2:02d}"
    found = {}
    for path in sorted(directory.glob("layer_*")):
        number = re.match(r"layer_(\d+)", path.name)
        if number is None:
            raise UserError(f"{path}: not a layer shard; expected names such as {layer_file_name(0)}")
        index = int(number[1])
        if index in found:
            raise UserError(f"{path}: layer {index} is there twice, the other is {found[index].name}")
        found[index] = path
    for index, path in found.items():
        # DeepSpeed adds -model_00 where the topology has an axis for tensor parallelism.
        if not re.fullmatch(r"layer_\d+(-model_00)?-model_states\.pt", path.name):
            raise UserError(f"{path}: not the name of a layer shard; expected {layer_file_name(index)}")
        if index > num_layers + 2:
            raise UserError(f"{path}: past the last layer; found {len(found)} shards, {expected}")
    for index in range(num_layers + 3):
        if index not in found:
            missing = directory / layer_file_name(index)
            raise UserError(f"{missing}: missing; found {len(found)} shards, {expected}")
    shards = [found[index] for index in range(num_layers + 3)]
    if not allow_identical_layers:
        _check_layers_differ(shards[1 : num_layers + 1])
    return shards


class ShardReader:
    """One layer shard, opened without reading its tensors.

    The file is read with plain reads, not mapped: resident memory stays small, however large the shard.

    Attributes:
        path: the file.
        tensors: dict key -> TensorInfo(shape, dtype), without rotary frequencies.

    Raises:
        UserError: the file is truncated or unreadable, not a flat dict of tensors, or a pickle that asks for
            more than tensors. Nothing of such a pickle is executed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = _load(self.path, fake=True)
        self.tensors = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in content.items()}
        records = _stored_records(self.path)
        self._offsets = {}
        for key, tensor in content.items():
            start = tensor.storage_offset() * tensor.element_size()
            # torch may compute where a record should lie instead of looking; the zip directory settles it.
            record = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
            if tensor.is_contiguous() and start + tensor.nbytes <= records.get(record, -1):
                self._offsets[key] = record + start
        # Pickles from before the zip format, repacked zips, transposed tensors: rare, so simply loaded.
        self._loaded = {} if len(self._offsets) == len(content) else _load(self.path, fake=False)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, in its stored shape and dtype."""
        tensor = torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        flat, start = tensor.view(-1), 0
        for chunk in self.chunks(name):
            flat[start : start + len(chunk)] = chunk
            start += len(chunk)
        return tensor

    def stream(self, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        """Yields the bytes of tensor `name` in `dtype`, a memoryview at a time, each valid until the next."""
        for chunk in self.chunks(name):
            yield as_bytes(chunk.to(dtype))

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """Yields tensor `name` in 1-D pieces of its stored dtype, each valid until the next.

        Raises:
            UserError: the file ends early.
        """
        if name in self._loaded:
            yield from self._loaded[name].reshape(-1).split(CHUNK)
            return
        shape, dtype = self.tensors[name]
        length = math.prod(shape)
        buffer = torch.empty(min(CHUNK, length), dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self._offsets[name])
            for start in range(0, length, CHUNK):
                chunk = buffer[: length - start]
                if file.readinto(as_bytes(chunk)) != chunk.nbytes:
                    raise UserError(f"{self.path}: truncated in '{name}', expected {length} values")
                yield chunk


def check_tensors(path: str | Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Compares the tensors that `path` holds with those that the model needs, by their shapes.

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
        shape = list(found[unknown[0]])
        raise UserError(f"{path}: found '{unknown[0]}' of shape {shape}, expected no such key")


def load_layer(path: str | Path, module: torch.nn.Module) -> None:
    """Copies one shard into `module`: every key of its state dict and no other, cast to the module's dtype.

    Raises:
        UserError: as `ShardReader`, and where keys or shapes differ.
    """
    reader, targets = ShardReader(path), module.state_dict()
    check_tensors(
        reader.path,
        {key: info.shape for key, info in reader.tensors.items()},
        {key: tuple(tensor.shape) for key, tensor in targets.items()},
    )
    for key, tensor in targets.items():
        tensor.copy_(reader.read(key))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor."""
    return memoryview(tensor.view(torch.uint8).numpy())


def load_tensors_only(path: str | Path, **options: Any) -> Any:
    """`torch.load` of a file that asks for nothing but tensors and plain values, on the CPU.

    Raises:
        UserError: the file is truncated or unreadable, or its pickle asks for more; nothing of it is then executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickle that asks for {asked[1]}" if asked else "a damaged pickle or one of other objects"
        raise UserError(f"{path}: refused, {what}; expected nothing but tensors") from error
    except Exception as error:  # a damaged file can make it raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: truncated, damaged or no checkpoint at all: {reason}") from error


def _load(path, fake):
    """The dict of tensors in `path`, without their values if `fake`."""
    with FakeTensorMode() if fake else nullcontext():
        content = load_tensors_only(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    for key, value in content.items():
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not dense:
            raise UserError(f"{path}: {key!r} is a {type(value).__name__}, expected names and dense tensors")
    return {key: value for key, value in content.items() if not key.endswith(IGNORED_SUFFIX)}


def _zip_entries(path):
    """The zip directory of a shard; empty for a pickle from before torch wrote zips."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except zipfile.BadZipFile:
        return []


def _stored_records(path):
    """Dict offset -> size, in bytes, of the data of every uncompressed entry of the zip."""
    records = {}
    with open(path, "rb") as file:
        for entry in _zip_entries(path):
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset)
                header = file.read(30)
                records[entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))] = entry.file_size
    return records


def _check_layers_differ(paths):
    """Raises UserError if two shards hold the same tensors.

    The zip directory has a CRC32 of each tensor's bytes, so only shards that agree there need to be read.
    Older pickles have none and are hashed whole.
    """
    groups = {}
    for path in paths:
        entries = [entry for entry in _zip_entries(path) if "/data/" in entry.filename]
        checksums = tuple((entry.CRC, entry.file_size) for entry in entries) or _file_hash(path)
        groups.setdefault(checksums, []).append(path)
    for group in groups.values():
        for first, second in combinations(group, 2):
            if _same_tensors(ShardReader(first), ShardReader(second)):
                raise UserError(
                    f"{second}: the same tensors as {first.name}, expected layers that differ; "
                    "if they are equal by intent, pass --allow_identical_layers"
                )


def _file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _same_tensors(a, b):
    return a.tensors == b.tensors and all(
        torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        for key in a.tensors
        for left, right in zip(a.chunks(key), b.chunks(key), strict=True)
    )
