"""The model of a run: its files, their checks, its weights, and the text that it generates."""

import functools
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights

from common.chat import ChatTemplate
from common.errors import UserError, one_line
from common.hub_client import resolve_model_directory
from common.pretrained import Weights, has_tokenizer
from common.sample import full_name, is_sample, sample_model_directory
from common.shards import LLAMA_FAMILY

# Architectures whose logits are a plain matrix product, neither scaled nor capped.
PLAIN_HEADS = ("bloom", "gpt2", *LLAMA_FAMILY)


@dataclass
class ModelInfo:
    """A model before its weights are loaded.

    Attributes:
        directory: holds its files.
        name: for logs and file names.
    """

    directory: Path
    name: str
    config: PreTrainedConfig
    tokenizer: Tokenizer

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        return count_parameters(meta_model(self.config))

    @property
    def parameters(self) -> int:
        """Number of weights; a tied weight counts once."""
        return self._counts[0]

    @property
    def non_embedding_parameters(self) -> int:
        """Number of weights in matrix products: all except embeddings that are only looked up."""
        return self._counts[1]


def inspect_model(args: Namespace, default_architecture: str, resume: Any = None) -> ModelInfo:
    """Finds the model of `--model_name`, see `model_directory`, and reads its config and tokenizer."""
    directory = model_directory(args.model_name, default_architecture, resume)
    config, tokenizer = load_config_and_tokenizer(directory, args.max_length)
    saved_name = resume.state.get("model_name") if resume and resume.state else None
    return ModelInfo(directory, args.model_name or saved_name or directory.name, config, tokenizer)


def model_directory(model_name: str | None, default_architecture: str, resume: Any = None) -> Path:
    """Returns the local directory of `--model_name`; a name on the Hub is downloaded.

    Args:
        model_name: None means the checkpoint's own config and tokenizer when resuming, otherwise the sample model.
        default_architecture: of the sample model.
        resume: `common.checkpoint.Resume` or None.
    """
    if model_name is None and resume and (resume.directory / "config.json").exists():
        return resume.directory
    model_name = "sample" if model_name is None else model_name
    if is_sample(model_name) and not Path(model_name).is_dir():
        return sample_model_directory(full_name(model_name, default_architecture))
    return resolve_model_directory(model_name)


def load_config(directory: Path) -> PreTrainedConfig:
    """Reads `config.json`; raises UserError if it is missing or invalid."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: not a model directory, it has no config.json")
    return _from_pretrained(AutoConfig, directory, f"{directory}/config.json: transformers cannot read it")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Reads the tokenizer of a model directory; raises UserError if it is missing or invalid."""
    if not has_tokenizer(directory):  # transformers would make an empty one from the config
        raise UserError(f"{directory}: no tokenizer files next to config.json")
    return _from_pretrained(AutoTokenizer, directory, f"{directory}: transformers cannot read the tokenizer")


def _from_pretrained(auto_class: Any, directory: Path, message: str) -> Any:
    try:
        return auto_class.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of exceptions for invalid files
        raise UserError(f"{message}: {one_line(error, 200)}") from error


def load_config_and_tokenizer(directory: Path, max_length: int) -> tuple[PreTrainedConfig, Tokenizer]:
    """Reads config and tokenizer; raises UserError if the model has fewer than `max_length` positions."""
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    check_positions(config, max_length, f"--max_length {max_length} is")
    return config, tokenizer


def check_positions(config: PreTrainedConfig, tokens: int, subject: str) -> None:
    """Raises UserError about `subject` if the model has fewer than `tokens` positions; BLOOM has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UserError(f"{subject} more than the model's {positions} positions")


def check_vocabulary(tokenizer: Tokenizer, max_id: int, vocab_size: int) -> None:
    """Raises UserError if a token id has no row in the embedding; on a GPU that would be a device-side assertion."""
    if max_id >= vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} makes id {max_id:,}, but the model's embedding has "
            f"{vocab_size:,} rows"
        )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the HF model of a config on the meta device, to count parameters and to look up names and shapes."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # an impossible value fails wherever it is first used
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise UserError(f"{config.name_or_path}/config.json does not describe a model: {reason}") from error


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the HF model of a config without initializing its parameters, to fill them from files.

    HF's initialization takes longer than reading the files, and fails on parameters that ZeRO-3 has partitioned.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # also skipped by `no_init_weights`
    return model


def map_pretrained(model: PreTrainedModel, weights: Weights) -> list[tuple[nn.Parameter, Callable[[], torch.Tensor]]]:
    """Pairs each parameter of an HF model with the tensor in the files that it is loaded from.

    Args:
        model: its parameters may be partitioned by ZeRO-3.
        weights: names may lack the base model's prefix, as in the published files of GPT-2 and BLOOM.

    Returns:
        A list of (parameter, function that reads its values in their stored dtype); nothing is read yet.

    Raises:
        UserError: a tensor is missing, left over, of another shape or not of a floating-point type.
    """
    prefix = model.base_model_prefix + "."
    # Some architectures, such as GPT-NeoX, store tensors under other names.
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]

    def parameter_name(stored: str) -> str:
        return functools.reduce(lambda name, renaming: renaming.rename_source_key(name)[0], renamings, stored)

    stored = {parameter_name(name): name for name in weights.names}
    # A tied parameter has several names, and the files may have any of them.
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).extend((name, name.removeprefix(prefix)))
    pairs: list[tuple[nn.Parameter, Callable[[], torch.Tensor]]] = []
    unused = set(stored)
    for parameter, names in names_of.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            raise UserError(f"{weights.path}: '{names[0]}' of shape {list(shape)} is missing")
        if weights.shape(found) != shape:
            has = list(weights.shape(found))
            raise UserError(f"{weights.path}: '{found}' has shape {has}, the config wants {list(shape)}")
        weights.dtype(found)  # raises for the integers of a quantized model
        unused.difference_update(names)
        pairs.append((parameter, functools.partial(weights.read, found)))
    ignored = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), r"attn\.(masked_)?bias$"])
    for name in sorted(unused):
        if not re.search(ignored, name):
            model_type = model.config.model_type
            raise UserError(f"{weights.path}: '{name}' has no place in the {model_type} that the config describes")
    return pairs


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Returns (all parameters, those in matrix products) of an HF model; a tied weight counts once, as the head."""
    sizes = {parameter: getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
    head = model.get_output_embeddings().weight
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    return sum(sizes.values()), sum(size for parameter, size in sizes.items() if parameter not in looked_up)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the transformer blocks: modules of the classes that HF never splits over devices."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def has_plain_head(model: PreTrainedModel) -> bool:
    """Returns whether the logits are a matrix product of the last hidden states, without bias, scaling or capping."""
    return model.config.model_type in PLAIN_HEADS and getattr(model.get_output_embeddings(), "bias", None) is None


def compile_model(model: PreTrainedModel, packed: bool, blocks_only: bool) -> None:
    """Applies torch.compile to each block, or to the whole model except its head.

    Packed rows all have the same length and keep a GPU busy: the blocks share one graph, which compiles in seconds.
    Padded micro-batches have many widths, and are often so small that launching kernels takes longer than running
    them. One graph of all blocks, with dynamic width, has the least overhead, but compiles for a minute.

    Args:
        packed: whether all rows have the same length.
        blocks_only: whether something runs between the blocks, such as ZeRO-3's hooks or activation checkpointing.
    """
    if packed or blocks_only:
        for block in blocks(model):
            block.compile(dynamic=not packed)
    else:
        model.base_model.compile(dynamic=True)


# ------------------------------------------------------------------------------------------- generated text


def prompt_ids(tokenizer: Tokenizer, prompt: str, chat_template: ChatTemplate | None = None) -> list[int]:
    """Returns the token ids of the prompt, or with a chat template those of a user turn with the prompt."""
    if chat_template:
        text, _ = chat_template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(prompt, verbose=False)["input_ids"]


def check_prompt(
    flag: str,
    prompt: str,
    max_new_tokens: int,
    config: PreTrainedConfig,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None = None,
) -> None:
    """Raises UserError for a prompt that the model cannot continue: empty, too long, or with unknown ids."""
    ids = prompt_ids(tokenizer, prompt, chat_template)
    if not ids:
        raise UserError(f"{flag} {prompt!r} has no tokens to continue from")
    subject = f"{flag} is {len(ids)} tokens, with --max_new_tokens {max_new_tokens}"
    check_positions(config, len(ids) + max_new_tokens, subject)
    check_vocabulary(tokenizer, max(ids), config.vocab_size)


def continue_prompt(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 50,
    top_p: float = 1.0,
    chat_template: ChatTemplate | None = None,
    include_prompt: bool = True,
    synced_gpus: bool = False,
) -> str:
    """Returns a continuation of `prompt` as text; the caller sets the random seed.

    Args:
        model: stays in eval mode and uncompiled afterwards, because each new token is a new shape.
        temperature: 0 is greedy decoding; otherwise tokens are sampled, restricted by `top_k` and `top_p`.
        chat_template: of a model trained on conversations; the prompt becomes a user turn.
        include_prompt: whether the text starts with the prompt.
        synced_gpus: every rank generates until all are done, as ZeRO-3 requires.
    """
    torch.compiler.set_stance("force_eager")
    model.eval()
    if model.config._attn_implementation in ("varlen", "sdpa_no_gqa"):  # these cannot use a key-value cache
        model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt_ids(tokenizer, prompt, chat_template)], device=model.device)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=bool(sampling),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        synced_gpus=synced_gpus,
        **sampling,
    )[0]
    return tokenizer.decode(tokens if include_prompt else tokens[ids.shape[1] :], skip_special_tokens=True)


def sample_text(
    model: PreTrainedModel,
    info: ModelInfo,
    args: Namespace,
    chat_template: ChatTemplate | None,
    synced_gpus: bool = False,
) -> list[str]:
    """Returns the continuation of --generation_prompt as lines to log; none if the prompt is empty."""
    if not args.generation_prompt:
        return []
    return [
        continue_prompt(
            model, info.tokenizer, args.generation_prompt, args.max_new_tokens, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, chat_template=chat_template, synced_gpus=synced_gpus,
        )
    ]  # fmt: skip
