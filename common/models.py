"""The model of a run: its files, checks against flags and text, construction, weights and sample text."""

import functools
import re
from argparse import Namespace
from collections.abc import Callable
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
from common.pretrained import PretrainedWeights, WeightsFile, has_tokenizer, resolve_model_directory
from common.sample import is_sample, resolve_sample_model

# Architectures whose logits are a plain matrix product, neither scaled nor capped.
PLAIN_HEADS = ("bloom", "gpt2", "llama", "mistral", "qwen2", "qwen3")


class ModelInfo:
    """What is known about a model before its weights are loaded.

    Attributes:
        directory: with its files.
        name: in logs and file names.
        config, tokenizer: Hugging Face's.
    """

    def __init__(self, directory: Path, name: str, config: PreTrainedConfig, tokenizer: Tokenizer):
        self.directory, self.name, self.config, self.tokenizer = directory, name, config, tokenizer

    @functools.cached_property
    def _counts(self):
        return count_parameters(meta_model(self.config))

    @property
    def parameters(self) -> int:
        """Number of weights; a tied one counts once."""
        return self._counts[0]

    @property
    def non_embedding_parameters(self) -> int:
        """Number of weights in matrix products: all except embeddings that are only looked up."""
        return self._counts[1]


def inspect_model(args: Namespace, default_architecture: str, resume: Any = None) -> ModelInfo:
    """Finds the model of `--model_name`, downloading it if that is a name on the Hub; reads config and tokenizer.

    Args:
        args: model_name (None is the checkpoint's own config and tokenizer if resuming, else the sample), max_length
            and, if the script has them, the flags of the sample text.
        default_architecture: of the sample model.
        resume: `common.checkpoint.Resume` or None.

    Raises:
        UserError: there is no such model, its files cannot be read, or it has too few positions for the rows or the
            sample text.
    """
    directory = model_directory(args.model_name, default_architecture, resume)
    config, tokenizer = load_config_and_tokenizer(directory, args.max_length)
    check_prompt(args, config, tokenizer)
    saved_name = resume.state.get("model_name") if resume and resume.state else None
    return ModelInfo(directory, args.model_name or saved_name or directory.name, config, tokenizer)


def model_directory(model_name: str | None, default_architecture: str, resume: Any = None) -> Path:
    """The local directory of `--model_name`; downloads it where it is a Hub name.

    Args:
        model_name: None stands for the checkpoint's own config and tokenizer when resuming, else for the sample.
        default_architecture: which sample model `sample` is.
        resume: `common.checkpoint.Resume` or None.

    Raises:
        UserError: there is no such model.
    """
    if model_name is None and resume and (resume.directory / "config.json").exists():
        return resume.directory
    model_name = "sample" if model_name is None else model_name
    if is_sample(model_name) and not Path(model_name).is_dir():
        return resolve_sample_model(model_name, default_architecture)
    return resolve_model_directory(model_name)


def load_config_and_tokenizer(directory: Path, max_length: int) -> tuple[PreTrainedConfig, Tokenizer]:
    """(config, tokenizer) of a model directory.

    Raises:
        UserError: either cannot be read, or rows of `max_length` tokens are longer than the model's positions.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers checks a config in as many ways as there are fields
        raise UserError(f"{directory}: no config that transformers can read: {one_line(error, 200)}") from error
    if not has_tokenizer(directory):  # from the config alone transformers would make an empty one
        raise UserError(f"{directory}: no tokenizer files beside config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer file fails in as many ways as there are tokenizers
        raise UserError(f"{directory}: no tokenizer that transformers can read: {one_line(error, 200)}") from error
    check_positions(config, max_length, f"--max_length {max_length} is")
    return config, tokenizer


def check_positions(config: PreTrainedConfig, tokens: int, said: str) -> None:
    """Raises UserError, which begins with `said`, where the model has positions for fewer tokens; BLOOM has for any."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UserError(f"{said} more than the model's {positions} positions")


def check_vocabulary(tokenizer: Tokenizer, highest: int, vocab_size: int) -> None:
    """Raises UserError if a token id has no row in the embedding: on a GPU that would be an assertion."""
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} makes id {highest:,}, the model's embedding has "
            f"{vocab_size:,} rows"
        )


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all parameters, those in matrix products) of an HF model; a tied weight counts once, as the head.

    Embeddings that are only looked up take no part in matrix products.
    """
    sizes = {parameter: getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
    head = model.get_output_embeddings().weight
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    return sum(sizes.values()), sum(size for parameter, size in sizes.items() if parameter not in looked_up)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks: modules of the classes that HF names as not to be split over devices."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The HF model of a config without storage, to count on.

    Raises:
        UserError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a number or name that no layer can have fails wherever it is used first
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise UserError(f"{config.name_or_path}/config.json describes no model of transformers' ({said})") from error


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The Hugging Face model of a config, its parameters uninitialized because files will fill them.

    Hugging Face's own initialization would take longer than reading the files, and fails on parameters that ZeRO-3 has
    partitioned.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # also skipped by `no_init_weights`
    return model


def map_pretrained(
    model: PreTrainedModel, weights: PretrainedWeights | WeightsFile
) -> list[tuple[nn.Parameter, Callable[[], torch.Tensor]]]:
    """Pairs each parameter of an HF model with where its values come from.

    Args:
        model: its parameters may be partitioned by ZeRO-3.
        weights: names may lack the prefix of the model without
            its head, as in GPT-2's and BLOOM's published files.

    Returns:
        A list of (parameter, function that reads its values in its dtype); nothing is read yet.

    Raises:
        UserError: a tensor is missing, left over, of another shape or not of a floating-point type.
    """
    prefix = model.base_model_prefix + "."
    # Some architectures name a tensor otherwise in their files, as GPT-NeoX its head.
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    in_file = {functools.reduce(_renamed, renamings, name): name for name in weights.names}
    names_of = {}  # a tied parameter has several names, of which the files may have any
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).extend((name, name.removeprefix(prefix)))
    stored, pairs = set(in_file), []
    for parameter, names in names_of.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        found = next((name for name in names if name in stored), None)
        if found is None:
            raise UserError(f"{weights.path}: '{names[0]}' of shape {list(shape)} is missing, which the config wants")
        stored -= set(names)
        found = in_file[found]
        if weights.shape(found) != shape:
            raise UserError(
                f"{weights.path}: '{found}' has shape {list(weights.shape(found))}, the config wants {list(shape)}"
            )
        weights.dtype(found)  # refuses the integers of a quantized model
        pairs.append((parameter, functools.partial(weights.read, found, parameter.dtype)))
    legacy = [*(model._keys_to_ignore_on_load_unexpected or ()), r"attn\.(masked_)?bias$"]
    left = sorted(name for name in stored if not any(re.search(pattern, name) for pattern in legacy))
    if left:
        raise UserError(f"{weights.path}: '{left[0]}' has no place in the {model.config.model_type} of the config")
    return pairs


def _renamed(name, renaming):
    return renaming.rename_source_key(name)[0]


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the last hidden states times the head's weight, without bias, scaling or capping."""
    return model.config.model_type in PLAIN_HEADS and getattr(model.get_output_embeddings(), "bias", None) is None


def compile_model(model: PreTrainedModel, packed: bool, blocks_only: bool) -> None:
    """torch.compile: each block on its own, or the whole model except its head.

    Packed rows all have the same length and keep a GPU busy: the blocks share one graph, which compiles in seconds.
    Padded micro-batches have many widths, and are often so small that launching kernels from Python takes longer than
    running them. One graph of all blocks, with dynamic width, launches them fastest; compiling it takes a minute.

    Args:
        packed: whether all rows have the same length.
        blocks_only: if something runs between the blocks: ZeRO-3's hooks, or activation checkpointing.
    """
    if packed or blocks_only:
        for block in blocks(model):
            block.compile(dynamic=not packed)
    else:
        model.base_model.compile(dynamic=True)


# ----------------------------------------------------------------------------------------------- sample text


def check_prompt(
    args: Namespace, config: PreTrainedConfig, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None
) -> None:
    """Raises UserError for a --generation_prompt that the model cannot continue, before training instead of after."""
    prompt = getattr(args, "generation_prompt", None)
    if not prompt:
        return
    tokens, more = len(prompt_ids(tokenizer, prompt, chat_template)), args.max_new_tokens
    if not tokens:
        raise UserError(f"--generation_prompt {prompt!r} is no token to continue from")
    check_positions(config, tokens + more, f"--generation_prompt is {tokens} tokens, with --max_new_tokens {more}")


def prompt_ids(tokenizer: Tokenizer, prompt: str, chat_template: ChatTemplate | None = None) -> list[int]:
    """The tokens that a model continues: the prompt, or with a chat template the prompt as a user's turn."""
    if chat_template:
        text, _ = chat_template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(prompt, verbose=False)["input_ids"]


def sample_text(
    model: PreTrainedModel,
    info: ModelInfo,
    args: Namespace,
    chat_template: ChatTemplate | None,
    synced_gpus: bool = False,
) -> list[str]:
    """The model's continuation of --generation_prompt, or nothing if that is empty.

    Args:
        chat_template: of a model that learns conversations; the prompt is a user's turn then.
        synced_gpus: Hugging Face's: every rank generates until all of them are done.
    """
    if not args.generation_prompt:
        return []
    tokens = model.generate(**generation_inputs(model, info.tokenizer, args, chat_template), synced_gpus=synced_gpus)
    return [info.tokenizer.decode(tokens[0], skip_special_tokens=True)]


def generation_inputs(
    model: PreTrainedModel, tokenizer: Tokenizer, args: Namespace, chat_template: ChatTemplate | None = None
) -> dict[str, Any]:
    """Arguments of Hugging Face's `generate` for the prompt and the sampling that the flags ask for.

    Also prepares the model: no dropout, attention that can use a cache of earlier keys and values, and nothing
    compiled, since each new token would be another shape to compile for.
    """
    torch.compiler.set_stance("force_eager")
    model.eval()
    if model.config._attn_implementation in ("varlen", "sdpa_no_gqa"):
        model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt_ids(tokenizer, args.generation_prompt, chat_template)], device=model.device)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **sampling,
        "max_new_tokens": args.max_new_tokens,
        "pad_token_id": tokenizer.eos_token_id,
    }
