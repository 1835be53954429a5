"""Converts this repository's checkpoints to Hugging Face model directories, and these to pipeline checkpoints.

    python -m common.convert to-hf runs/pipeline/global_step100 --output_dir my-model --verify
    python -m common.convert to-hf runs/zero/global_step100 --output_dir my-model --verify
    python -m common.convert to-hf USER/NAME --output_dir my-model --verify
    python -m common.convert to-pipeline my-model --output_dir my-shards

A pipeline's checkpoint is a file a layer. Its tensors are read, converted and written one at a time, by to-hf in
pieces, so memory does not grow with the model. Those of zero/ and offload/ are put together from each rank's part of
the float32 weights; this holds all of them at once under ZeRO stages 1 and 2, the largest under stage 3. All is
checked before the first byte is written, and the output directory appears once it is complete.
"""

import argparse
import errno
import fnmatch
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from common import manifest
from common.cli import ArgumentParser, positive_int
from common.errors import UserError
from common.pretrained import (
    PretrainedWeights,
    copy_side_files,
    has_tokenizer,
    resolve_model_directory,
    write_weights,
)
from common.shards import (
    ShardReader,
    check_tensors,
    find_layer_shards,
    has_layer_shards,
    layer_file_name,
    layer_keys,
    resolve_checkpoint,
)

if TYPE_CHECKING:  # slow to import, so at run time only the functions that need them do
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.zero_checkpoint import Fp32Weight

# All four name their tensors alike; elsewhere the prefixes in `layer_keys` may not hold.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Source(NamedTuple):
    """A tensor in a layer shard."""

    reader: ShardReader
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.tensors[self.key].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.reader.tensors[self.key].dtype

    def stream(self, dtype: torch.dtype) -> Iterator[memoryview]:
        return self.reader.stream(self.key, dtype)


def to_hf(args: argparse.Namespace) -> None:
    """A checkpoint to a directory that `AutoModelForCausalLM.from_pretrained` loads."""
    checkpoint = find_checkpoint(args.checkpoint, args.base_model)
    places = [checkpoint]
    if args.base_model:
        places.append(resolve_model_directory(args.base_model, weights=False))
    configs = [place for place in places if (place / "config.json").is_file()]
    if not configs:
        raise UserError(f"{checkpoint}: expected config.json beside the shards; else name a --base_model")
    if args.prompt is not None and not any(map(has_tokenizer, places)):
        raise UserError(f"{checkpoint}: --prompt needs a tokenizer beside the shards or in --base_model")
    layers = has_layer_shards(checkpoint)
    check_saved(checkpoint, "layer_*.pt" if layers else "*.pt")
    config, shapes, tied = read_model(configs[0], MODEL_TYPES if layers else None)
    if layers:
        allow = args.allow_identical_layers
        paths = find_layer_shards(checkpoint, config.num_hidden_layers, allow_identical_layers=allow)
        sources = match_names(paths, shapes)
        dtype = output_dtype(args.dtype, {source.dtype for source in sources.values()}, checkpoint)
    else:
        sources, dtype = read_zero(args, checkpoint, configs[0], shapes, tied)

    with staged_output(args.output_dir, args.overwrite, places) as staging:
        if layers and tied and not resolve_tied_head(sources, args.head or "keep"):
            config.tie_word_embeddings, tied = False, {}
        stored = {name: source for name, source in sources.items() if name not in tied}
        write_config(config, dtype, staging)
        for place in places:
            copy_side_files(place, staging)
        start = time.perf_counter()
        size = write_weights(staging, stored, dtype, args.max_shard_size)
        seconds = time.perf_counter() - start
        if args.verify or args.prompt is not None:
            model = load_written(staging, dtype)
        if args.verify:
            (verify if layers else verify_weights)(model, sources, dtype)
        if args.prompt is not None:
            print(continue_prompt(model, staging, args.prompt, args.max_new_tokens))
    report(args.output_dir, len(stored), size, dtype, seconds)
    print("    from transformers import AutoModelForCausalLM")
    print(f"    model = AutoModelForCausalLM.from_pretrained({args.output_dir!r})")


def to_pipeline(args: argparse.Namespace) -> None:
    """A Hugging Face directory to layer shards."""
    directory = resolve_model_directory(args.model)
    config, shapes, _ = read_model(directory)
    weights = PretrainedWeights(directory)
    stored = {name: name for name in shapes}
    if config.tie_word_embeddings and HEAD not in weights.names:
        stored[HEAD] = EMBEDDING
    check_tensors(
        directory,
        {name: weights.shape(name) for name in weights.names},
        {name: shapes[name] for name in stored.values()},
    )
    dtype = output_dtype(args.dtype, {weights.dtype(name) for name in stored.values()}, directory)

    with staged_output(args.output_dir, args.overwrite, [directory]) as staging:
        write_config(config, dtype, staging)
        copy_side_files(directory, staging)
        start = time.perf_counter()
        for index in range(config.num_hidden_layers + 3):
            keys = layer_keys(index, stored, config.num_hidden_layers)
            layer = {key: weights.read(stored[name], dtype) for key, name in keys.items()}
            try:
                torch.save(layer, staging / layer_file_name(index))
                del layer  # before the next one is read
            except RuntimeError as error:  # torch's own writer hides the OSError
                raise UserError(f"{args.output_dir}: cannot be written, disk full? {error}") from error
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in staging.glob("layer_*"))
    report(args.output_dir, len(stored), size, dtype, seconds)


def report(directory: str, tensors: int, size: int, dtype: torch.dtype, seconds: float) -> None:
    name = str(dtype).removeprefix("torch.")
    print(f"wrote {directory}: {tensors} tensors, {size / 1e9:.3g} GB of {name}, copied in {seconds:.1f} s")


# ---------------------------------------------------------------------------------------------- what is there


def find_checkpoint(name: str, base_model: str | None = None) -> Path:
    """`resolve_checkpoint` of a local path; else the download of `USER/NAME` or `USER/NAME/global_stepN`.

    Args:
        base_model: --base_model. It replaces config and tokenizer at the root of a repository, so that only the layer
            shards there are downloaded.
    """
    if os.path.exists(os.path.expanduser(name)):
        return resolve_checkpoint(name)
    from common import hub

    repo_and_tag = hub.split_name(name)
    if repo_and_tag is None:
        return resolve_checkpoint(name)
    try:
        choice = hub.choose(*repo_and_tag)
        if base_model is None:
            choice.check_config("--base_model")
        return hub.cached_checkpoint(choice, side_files=base_model is None)
    except UserError as error:
        raise UserError(f"{name}: not a local directory; on the Hub: {error}") from error


def check_saved(checkpoint: Path, pattern: str) -> None:
    """Raises UserError where a file that is read here is not what the checkpoint's manifest, if it has one, says."""
    for name, said in (manifest.read(checkpoint) or {}).items():
        if fnmatch.fnmatch(name, pattern) and (problem := manifest.difference(checkpoint, name, said)):
            raise UserError(problem)


def read_model(
    directory: Path, model_types: tuple[str, ...] | None = MODEL_TYPES
) -> "tuple[PreTrainedConfig, dict[str, tuple[int, ...]], dict[str, str]]":
    """A model directory's config and, without its weights, what tensors the model has.

    Args:
        model_types: that are accepted; None for those of all causal language models.

    Returns:
        (config, dict name -> shape, dict name -> name of the weight that it is tied to). The shapes are those of
        all tensors, tied ones included.

    Raises:
        UserError: no config, an invalid one, or one of another architecture.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a model's config: {error}") from error
    if model_types and model_type not in model_types:
        raise UserError(f"{path}: model_type '{model_type}', expected one of {', '.join(model_types)}")

    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's constructor trips over
        raise UserError(f"{path}: not a valid {model_type} config: {error}") from error
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return config, shapes, dict(model.all_tied_weights_keys)


def write_config(config: "PreTrainedConfig", dtype: torch.dtype, directory: Path) -> None:
    config.dtype = dtype
    config.save_pretrained(directory)


def match_names(paths: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """The tensors by their Hugging Face names; UserError unless every shard holds exactly what its layer needs."""
    sources = {}
    for index, path in enumerate(paths):
        reader = ShardReader(path)
        keys = layer_keys(index, shapes, len(paths) - 3)
        found = {key: info.shape for key, info in reader.tensors.items()}
        check_tensors(path, found, {key: shapes[name] for key, name in keys.items()})
        sources |= {name: Source(reader, key) for key, name in keys.items()}
    return sources


def read_zero(
    args: argparse.Namespace,
    checkpoint: Path,
    model_directory: Path,
    shapes: dict[str, tuple[int, ...]],
    tied: dict[str, str],
) -> "tuple[dict[str, Fp32Weight], torch.dtype]":
    """The weights of a checkpoint of zero/ or offload/ by their Hugging Face names, and the dtype to write.

    Raises:
        UserError: a flag that is for pipelines, a damaged checkpoint, or one that does not fit the config.
    """
    from common.zero_checkpoint import read_masters

    for flag in ("head", "allow_identical_layers"):
        if getattr(args, flag):
            raise UserError(f"--{flag}: for layer shards (layer_*), but {checkpoint} holds none, it is one of ZeRO")
    sources, dtype = read_masters(checkpoint)
    config_path = model_directory / "config.json"
    found = {name: source.shape for name, source in sources.items()}
    check_tensors(f"{checkpoint} does not fit {config_path}", found, shapes)
    for name, first in tied.items():
        one, other = sources[name], sources[first]
        if one.tensor is not other.tensor and not same_bits(one.read(), other.read()):
            raise UserError(f"{checkpoint}: '{name}' and '{first}' differ, but {config_path} ties them")
    return sources, DTYPES[args.dtype] if args.dtype else dtype


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def output_dtype(wanted: str | None, found: set[torch.dtype], directory: Path) -> torch.dtype:
    """The dtype to write: the one `wanted` by name, else the one `found` in all tensors."""
    if wanted:
        return DTYPES[wanted]
    if len(found) != 1 or not found <= set(DTYPES.values()):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise UserError(f"{directory}: found {names}, expected one of {', '.join(DTYPES)}; choose by --dtype")
    return found.pop()


def resolve_tied_head(sources: dict[str, Source], head: str) -> bool:
    """Compares the two copies of a tied weight, and points `sources` at the one that `head` chooses.

    Returns:
        whether embedding and head are one weight still.
    """
    embedding, lm_head = sources[EMBEDDING], sources[HEAD]
    differing, largest, total, count = 0, 0.0, 0.0, 0
    pairs = zip(*(source.reader.chunks(source.key) for source in (embedding, lm_head)), strict=True)
    for a, b in pairs:
        count += len(a)
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            gap = (a.double() - b.double()).abs()
            differing += gap.count_nonzero().item()
            largest, total = max(largest, gap.max().item()), total + gap.sum().item()
    if not differing:
        return True
    consequence = {
        "keep": "both are kept, with tie_word_embeddings=false",
        "embedding": "the embedding is kept for both",
        "head": "the head is kept for both",
    }[head]
    print(
        f"embedding and head, tied by the config, have drifted apart: {differing} of {count} elements "
        f"differ, largest difference {largest:.3g}, mean {total / count:.3g}; {consequence}"
    )
    if head == "embedding":
        sources[HEAD] = embedding
    elif head == "head":
        sources[EMBEDDING] = lm_head
    return head != "keep"


# ----------------------------------------------------------------------------------------------- what is made


@contextmanager
def staged_output(output_dir: str, overwrite: bool, inputs: list[Path]) -> Iterator[Path]:
    """Yields a directory beside `output_dir` that takes its name at the end, or vanishes if anything fails.

    Raises:
        UserError: `output_dir` is in use and not to be overwritten, or one of the `inputs` lies in it.
    """
    target = Path(os.path.expanduser(output_dir)).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file, expected a directory")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: not empty, expected a new directory; --overwrite replaces it")
    for place in inputs:
        if place.resolve().is_relative_to(target):
            raise UserError(f"{target}: holds the input {place}, expected another --output_dir")
    staging, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    staging.mkdir(parents=True)
    try:
        yield staging
        if target.exists():
            target.rename(old)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    if old.exists():
        shutil.rmtree(old)


def load_written(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The converted model, loaded as any user would; UserError for a key missing, left over or misshapen."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise UserError(f"verify: the converted model does not load cleanly: {wrong}")
    return model.eval()


@torch.inference_mode()
def verify(model: "PreTrainedModel", sources: dict[str, Source], dtype: torch.dtype) -> None:
    """Raises UserError unless the written model has exactly the logits of its layers run on the shards' weights.

    One layer at a time, as the stages of a pipeline run them, so that the shards are never all in memory.
    """
    config, decoder = model.config, model.model
    length = min(64, config.max_position_embeddings)
    input_ids = torch.randint(config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids, use_cache=False).logits

    def run(index, layer, *args, **kwargs):
        weights = {}
        for key, name in layer_keys(index, sources, config.num_hidden_layers).items():
            reader, stored_key = sources[name]
            weights[key.split(".", 1)[1]] = reader.read(stored_key).to(dtype)
        return torch.func.functional_call(layer, weights, args, kwargs, strict=True)

    hidden = run(0, decoder.embed_tokens, input_ids)
    position_ids = torch.arange(length).expand(4, -1)
    rotary = {"position_ids": position_ids, "position_embeddings": decoder.rotary_emb(hidden, position_ids)}
    for index, layer in enumerate(decoder.layers, start=1):
        hidden = run(index, layer, hidden, attention_mask=None, **rotary)
    outputs = run(config.num_hidden_layers + 2, model.lm_head, run(config.num_hidden_layers + 1, decoder.norm, hidden))
    difference = (outputs.double() - expected.double()).abs().max().item()
    if not torch.equal(outputs, expected):
        raise UserError(f"verify: logits differ from the pipeline's by up to {difference:.3g}, expected 0.0")
    print(f"verify: logits identical (4 x {length} tokens, max abs difference {difference})")


@torch.inference_mode()
def verify_weights(model: "PreTrainedModel", sources: "dict[str, Fp32Weight]", dtype: torch.dtype) -> None:
    """Demands from the written model the exact weights of a ZeRO checkpoint, in `dtype`."""
    values = 0
    for name, tensor in model.state_dict().items():
        expected = sources[name].read().to(dtype)
        if not same_bits(tensor, expected):
            difference = (tensor.double() - expected.double()).abs().max().item()
            raise UserError(f"verify: '{name}' differs from the checkpoint's by up to {difference:.3g}, expected 0.0")
        values += tensor.numel()
    print(f"verify: weights identical ({len(sources)} tensors, {values:,} values, max abs difference 0.0)")


@torch.inference_mode()
def continue_prompt(model: "PreTrainedModel", directory: Path, prompt: str, max_new_tokens: int) -> str:
    """The prompt and its greedy continuation, as text."""
    from transformers import AutoTokenizer

    from common.models import check_positions

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer file fails in as many ways as there are tokenizers
        raise UserError(f"--prompt: the checkpoint's tokenizer cannot be read: {error!r}"[:300]) from error
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise UserError(f"--prompt {prompt!r} is no token to continue from")
    length = inputs["input_ids"].shape[1]
    said = f"--prompt is {length} tokens, with --max_new_tokens {max_new_tokens}"
    check_positions(model.config, length + max_new_tokens, said)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------- command line


def byte_size(text: str) -> int:
    """Bytes in "2GB" (decimal), "2GiB" (binary) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([KMGT])(i?)B)?", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 2GB, 500MB or 1GiB")
    power = "_KMGT".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m common.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        "never weights. If the checkpoint has its own, those are used, except at the root of a repository on the Hub",
    )  # fmt: skip
    hf.add_argument("--max_shard_size", type=byte_size, default="2GB", metavar="SIZE", help="of a file; default: 2GB")
    hf.add_argument(
        "--head", choices=("keep", "embedding", "head"),
        help="of a pipeline: where the config ties embedding and head, but the two shards differ, keep both and "
        "untie, or keep the one named for both; default: keep",
    )  # fmt: skip
    hf.add_argument(
        "--verify", action="store_true",
        help="load the result and compare, bit for bit, its logits with the pipeline's layers, or its weights with "
        "the ZeRO checkpoint's; nothing is kept if they differ",
    )  # fmt: skip
    hf.add_argument("--prompt", metavar="TEXT", help="print the result's greedy continuation of TEXT")
    hf.add_argument("--max_new_tokens", type=positive_int, default=40, metavar="N", help="its length; default: 40")
    hf.add_argument(
        "--allow_identical_layers", action="store_true",
        help="of a pipeline: accept decoder layers that equal one another, otherwise taken for a file copied by "
        "mistake",
    )  # fmt: skip

    pipeline = commands.add_parser(
        "to-pipeline", help="a Hugging Face directory to layer shards",
        description="Writes a file a layer, with config and tokenizer beside them, from safetensors.",
    )  # fmt: skip
    pipeline.set_defaults(run=to_pipeline)
    pipeline.add_argument("model", help="local directory or Hub name")
    for command, default in ((hf, "as the shards are, or what a ZeRO run computed in"), (pipeline, "as they are")):
        command.add_argument("--output_dir", required=True, metavar="DIR", help="appears once it is complete")
        command.add_argument("--dtype", choices=DTYPES, help=f"of the weights written; default: {default}")
        command.add_argument("--overwrite", action="store_true", help="replace what DIR holds, at the end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a mistake in the input is one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = f"{args.output_dir}: the disk is full, nothing was kept" if full else str(error)
        print("error:", " ".join(message.split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
