"""Converts this repository's checkpoints to Hugging Face model directories, and these to pipeline checkpoints.

    python -m common.convert to-hf runs/pipeline/global_step100 --output_dir my-model --verify
    python -m common.convert to-hf runs/zero/global_step100 --output_dir my-model --verify
    python -m common.convert to-hf USER/NAME --output_dir my-model --verify
    python -m common.convert to-pipeline my-model --output_dir my-shards

A pipeline's checkpoint has one file per layer. Files are mapped into memory and written from there, one output file at
a time, so memory does not grow with the model. The checkpoints of zero/ and offload/ have each rank's shard of the
float32 weights; under ZeRO stages 1 and 2, merging them takes the memory of all. Everything is checked before the first
byte is written, and the output directory appears once it is complete.
"""

import argparse
import fnmatch
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common import manifest
from common.cli import ArgumentParser, positive_int
from common.errors import UserError, command, directory_name
from common.files import atomic_path

if TYPE_CHECKING:  # the functions that need torch and transformers import them, so that --help does not
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.zero_checkpoint import Master

DTYPES = ("float32", "float16", "bfloat16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def to_hf(args: argparse.Namespace) -> None:
    """Converts a checkpoint to a directory that `AutoModelForCausalLM.from_pretrained` loads."""
    from common import hub_client, models, pretrained, shards

    checkpoint = find_checkpoint(args.checkpoint, args.base_model)
    places = [checkpoint]
    if args.base_model:
        places.append(hub_client.resolve_model_directory(args.base_model, weights=False))
    config_directory = next((place for place in places if (place / "config.json").is_file()), None)
    if config_directory is None:
        raise UserError(f"{checkpoint}: expected config.json next to the shards; otherwise pass --base_model")
    is_pipeline = shards.has_layer_shards(checkpoint)
    check_manifest(checkpoint, "layer_*.pt" if is_pipeline else "*.pt")
    config, shapes, tied = read_model(config_directory, llama_family=is_pipeline)
    if args.prompt is not None:
        place = next((place for place in places if pretrained.has_tokenizer(place)), None)
        if place is None:
            raise UserError(f"{checkpoint}: --prompt needs a tokenizer next to the shards or in --base_model")
        tokenizer = models.load_tokenizer(place)
        models.check_prompt("--prompt", args.prompt, args.max_new_tokens, config, tokenizer)
    if is_pipeline:
        tensors = read_pipeline(checkpoint, config, shapes, args.allow_identical_layers)
        dtype = choose_dtype(args.dtype, (tensor.dtype for tensor in tensors.values()), checkpoint)
        if tied and not resolve_tied_head(tensors, args.head):
            config.tie_word_embeddings, tied = False, {}
    else:
        for flag in ("head", "allow_identical_layers"):
            if getattr(args, flag):
                raise UserError(f"--{flag} is for layer shards (layer_*), but {checkpoint} has none: it is from ZeRO")
        tensors, dtype = read_zero(checkpoint, config_directory, shapes, tied)
        dtype = choose_dtype(args.dtype, [dtype], checkpoint)

    with new_model_directory(args, places, config, dtype) as partial:
        stored = {name: tensor for name, tensor in tensors.items() if name not in tied}
        start = time.perf_counter()
        size = pretrained.write_weights(partial, stored, dtype, args.max_shard_size)
        seconds = time.perf_counter() - start
        if args.verify or args.prompt is not None:
            model = load_written(partial, dtype)
        if args.verify:
            verify(model, tensors, dtype)
        if args.prompt is not None:
            print(models.continue_prompt(model, tokenizer, args.prompt, args.max_new_tokens))
    report(args.output_dir, len(stored), size, dtype, seconds)
    print("    from transformers import AutoModelForCausalLM")
    print(f"    model = AutoModelForCausalLM.from_pretrained({args.output_dir!r})")


def to_pipeline(args: argparse.Namespace) -> None:
    """Converts a Hugging Face directory to layer shards."""
    import torch

    from common import hub_client, pretrained, shards

    directory = hub_client.resolve_model_directory(args.model)
    config, shapes, _ = read_model(directory, llama_family=True)
    weights = pretrained.PretrainedWeights(directory)
    stored = {name: name for name in shapes}
    if config.tie_word_embeddings and HEAD not in weights.names:
        stored[HEAD] = EMBEDDING
    found = {name: weights.shape(name) for name in weights.names}
    shards.check_tensors(directory, found, {name: shapes[name] for name in stored.values()})
    dtype = choose_dtype(args.dtype, map(weights.dtype, stored.values()), directory)

    with new_model_directory(args, [directory], config, dtype) as partial:
        start = time.perf_counter()
        for index in range(config.num_hidden_layers + 3):
            keys = shards.layer_keys(index, stored, config.num_hidden_layers)
            layer = {key: weights.read(stored[name]).to(dtype) for key, name in keys.items()}
            try:
                torch.save(layer, partial / shards.layer_file_name(index))
                del layer  # before the next one is read
            except RuntimeError as error:  # torch's own writer hides the OSError
                raise UserError(f"{args.output_dir}: cannot be written, disk full? {error}") from error
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in partial.glob("layer_*"))
    report(args.output_dir, len(stored), size, dtype, seconds)


def report(directory: str, tensors: int, size: int, dtype: "torch.dtype", seconds: float) -> None:
    print(f"wrote {directory}: {tensors} tensors, {size / 1e9:.3g} GB of {name_of(dtype)}, copied in {seconds:.1f} s")


def name_of(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------- input


def find_checkpoint(name: str, base_model: str | None = None) -> Path:
    """The directory of a local checkpoint, or of the download of `USER/NAME` or `USER/NAME/global_stepN`."""
    from common import shards

    if not os.path.exists(os.path.expanduser(name)):
        from common import hub

        if choice := hub.find(name):
            if base_model is None:
                choice.check_config("--base_model")
            return hub.cached_checkpoint(choice)
    return shards.resolve_checkpoint(name)


def check_manifest(checkpoint: Path, pattern: str) -> None:
    """Raises UserError if a file that is used does not match the checkpoint's manifest, if there is one."""
    for name, entry in (manifest.read(checkpoint) or {}).items():
        if fnmatch.fnmatch(name, pattern) and (problem := manifest.difference(checkpoint, name, entry)):
            raise UserError(problem)


def read_model(
    directory: Path, llama_family: bool
) -> "tuple[PreTrainedConfig, dict[str, tuple[int, ...]], dict[str, str]]":
    """Reads a model directory's config, and what tensors such a model has.

    Args:
        llama_family: whether to refuse other architectures.

    Returns:
        (config, dict name -> shape of all tensors, dict name -> name of the weight that it is tied to).
    """
    from common import models, shards

    config = models.load_config(directory)
    if llama_family and config.model_type not in shards.LLAMA_FAMILY:
        expected = ", ".join(shards.LLAMA_FAMILY)
        raise UserError(f"{directory}/config.json: model_type '{config.model_type}', expected one of {expected}")
    model = models.meta_model(config)
    config.architectures = [type(model).__name__]
    return config, shards.shapes_of(model.state_dict()), dict(model.all_tied_weights_keys)


def read_pipeline(
    checkpoint: Path, config: "PreTrainedConfig", shapes: dict[str, tuple[int, ...]], allow_identical_layers: bool
) -> "dict[str, torch.Tensor]":
    """The tensors of layer shards by their Hugging Face names, mapped into memory.

    Raises:
        UserError: see `find_layer_shards`, or a shard does not have exactly the tensors that its layer needs.
    """
    from common import shards

    tensors: dict[str, torch.Tensor] = {}
    num_layers = config.num_hidden_layers
    paths = shards.find_layer_shards(checkpoint, num_layers, allow_identical_layers=allow_identical_layers)
    for index, path in enumerate(paths):
        layer = shards.read_shard(path)
        keys = shards.layer_keys(index, shapes, num_layers)
        shards.check_tensors(path, shards.shapes_of(layer), {key: shapes[name] for key, name in keys.items()})
        tensors |= {name: layer[key] for key, name in keys.items()}
    return tensors


def read_zero(
    checkpoint: Path, config_directory: Path, shapes: dict[str, tuple[int, ...]], tied: dict[str, str]
) -> "tuple[dict[str, Master], torch.dtype]":
    """The weights of a checkpoint of zero/ or offload/, and the dtype that the run computed in.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the config.
    """
    from common import shards, zero_checkpoint

    masters, dtype = zero_checkpoint.read_masters(checkpoint)
    config_path = config_directory / "config.json"
    found = {name: tuple(master.shape) for name, master in masters.items()}
    shards.check_tensors(f"{checkpoint} does not fit {config_path}", found, shapes)
    for name, first in tied.items():
        if not shards.same_bits(masters[name].contiguous(), masters[first].contiguous()):
            raise UserError(f"{checkpoint}: '{name}' and '{first}' differ, but {config_path} ties them")
    return masters, dtype


def choose_dtype(wanted: str | None, found: "Iterable[torch.dtype]", directory: Path) -> "torch.dtype":
    """The dtype to write: `wanted`, otherwise the one `found` in all tensors."""
    import torch

    names = {name_of(dtype) for dtype in found}
    if wanted is None and (len(names) > 1 or not names <= set(DTYPES)):
        expected = ", ".join(DTYPES)
        raise UserError(f"{directory}: found {', '.join(sorted(names))}, expected one of {expected}; pass --dtype")
    return getattr(torch, wanted or names.pop())


def resolve_tied_head(tensors: "dict[str, torch.Tensor]", head: str | None) -> bool:
    """Compares the two copies of a tied weight, and replaces one by the other if `head` says so.

    Returns:
        Whether embedding and head are still one weight.
    """
    from common import shards

    pairs = zip(*(tensors[name].reshape(-1).split(1 << 20) for name in (EMBEDDING, HEAD)), strict=True)
    differing, largest, total = 0, 0.0, 0.0
    for embedding, lm_head in pairs:
        if not shards.same_bits(embedding, lm_head):
            gap = (embedding.double() - lm_head.double()).abs()
            differing += gap.count_nonzero().item()
            largest, total = max(largest, gap.max().item()), total + gap.sum().item()
    if not differing:
        return True
    count = tensors[EMBEDDING].numel()
    consequence = {
        "embedding": "the embedding is kept for both",
        "head": "the head is kept for both",
    }.get(head or "keep", "both are kept, with tie_word_embeddings=false")
    print(
        f"embedding and head, tied by the config, have drifted apart: {differing} of {count} elements "
        f"differ, largest difference {largest:.3g}, mean {total / count:.3g}; {consequence}"
    )
    if head == "embedding":
        tensors[HEAD] = tensors[EMBEDDING]
    elif head == "head":
        tensors[EMBEDDING] = tensors[HEAD]
    return head in ("embedding", "head")


# --------------------------------------------------------------------------------------------------- output


@contextmanager
def new_model_directory(
    args: argparse.Namespace, inputs: list[Path], config: "PreTrainedConfig", dtype: "torch.dtype"
) -> Iterator[Path]:
    """Yields a directory with config, tokenizer and generation config that becomes --output_dir if the block succeeds.

    Args:
        inputs: directories with side files, the first of which have precedence.

    Raises:
        UserError: --output_dir is in use, or one of the `inputs` is in it.
    """
    from common import pretrained

    target = Path(args.output_dir).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file, expected a directory")
    if target.exists() and any(target.iterdir()) and not args.overwrite:
        raise UserError(f"{target}: not empty, expected a new directory; --overwrite replaces it")
    for place in inputs:
        if place.resolve().is_relative_to(target):
            raise UserError(f"{target}: holds the input {place}, expected another --output_dir")
    with atomic_path(target) as partial:
        partial.mkdir(parents=True)
        config.dtype = dtype
        config.save_pretrained(partial)
        for place in inputs:
            pretrained.copy_side_files(place, partial)
        yield partial


def load_written(directory: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """Loads the converted model as any user would; raises UserError if a key is missing, left over or misshapen."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise UserError(f"verify: the converted model does not load cleanly: {wrong}")
    return model


def verify(model: "PreTrainedModel", tensors: "Mapping[str, Master]", dtype: "torch.dtype") -> None:
    """Raises UserError unless the written model has exactly the checkpoint's weights, in `dtype`."""
    from common import shards

    values = 0
    for name, tensor in model.state_dict().items():
        expected = tensors[name].contiguous().detach().to(dtype)
        if not shards.same_bits(tensor, expected):
            difference = (tensor.double() - expected.double()).abs().max().item()
            raise UserError(f"verify: '{name}' differs from the checkpoint's by up to {difference:.3g}, expected 0.0")
        values += tensor.numel()
    print(f"verify: weights identical ({len(tensors)} tensors, {values:,} values, max abs difference 0.0)")


# ---------------------------------------------------------------------------------------------- command line


def byte_size(text: str) -> int:
    """Bytes in "2GB" (decimal), "2GiB" (binary) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(i?)B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 2GB, 500MB or 1GiB")
    power = "_KMGT".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def build_parser() -> ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="python -m common.convert", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="{to-hf,to-pipeline}")
    hf = commands.add_parser(
        "to-hf", help="a checkpoint to a Hugging Face directory",
        description="Writes config, safetensors, tokenizer and generation config from a checkpoint of pipeline/, "
        "zero/ or offload/. No file gets to run code: pickles that ask for more than tensors are refused.",
    )  # fmt: skip
    hf.set_defaults(run=to_hf)
    hf.add_argument(
        "checkpoint",
        help="a global_stepN directory, or its parent, whose file `latest` names the checkpoint; or on the Hub "
        "USER/NAME (its newest complete checkpoint, or layer shards at the root) or USER/NAME/global_stepN",
    )
    hf.add_argument(
        "--base_model", metavar="NAME",
        help="Hub name or local directory of the model that training started from; supplies config and tokenizer, "
        "never weights. If the checkpoint has its own, those are used",
    )  # fmt: skip
    hf.add_argument(
        "--max_shard_size", type=byte_size, default="1GB", metavar="SIZE",
        help="of a file; tensors that are converted to another dtype take that much memory; default: %(default)s",
    )  # fmt: skip
    hf.add_argument(
        "--head", choices=("keep", "embedding", "head"),
        help="for layer shards: if the config ties embedding and head, but the two shards differ, keep both and "
        "untie, or keep the one named for both; default: keep",
    )  # fmt: skip
    hf.add_argument(
        "--verify", action="store_true",
        help="load the result and compare all weights with the checkpoint's, bit for bit; nothing is kept if they "
        "differ",
    )  # fmt: skip
    hf.add_argument("--prompt", metavar="TEXT", help="print the result's greedy continuation of TEXT")
    hf.add_argument(
        "--max_new_tokens", type=positive_int, default=40, metavar="N", help="length of the continuation; default: 40"
    )
    hf.add_argument(
        "--allow_identical_layers", action="store_true",
        help="for layer shards: accept decoder layers with the same weights, usually files copied by mistake",
    )  # fmt: skip

    pipeline = commands.add_parser(
        "to-pipeline", help="a Hugging Face directory to layer shards",
        description="Writes one file per layer from safetensors, and config and tokenizer next to them.",
    )  # fmt: skip
    pipeline.set_defaults(run=to_pipeline)
    pipeline.add_argument("model", help="local directory or Hub name")
    for each, default in ((hf, "as stored in layer shards, or what a ZeRO run computed in"), (pipeline, "as stored")):
        each.add_argument(
            "--output_dir", required=True, type=directory_name, metavar="DIR", help="appears once it is complete"
        )
        each.add_argument("--dtype", choices=DTYPES, help=f"of the weights written; default: {default}")
        each.add_argument("--overwrite", action="store_true", help="replace DIR if it exists, at the end")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
