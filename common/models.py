"""Config and tokenizer of the model at hand, whatever its name stands for."""

import functools
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights

from common.errors import UserError, one_line
from common.pretrained import has_tokenizer, resolve_model_directory
from common.sample import is_sample, resolve_sample_model


def model_directory(model_name, default_architecture, resume=None):
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


def load_config_and_tokenizer(directory, max_length):
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


def check_positions(config, tokens, said):
    """Raises UserError, which begins with `said`, where the model has positions for fewer tokens; BLOOM has for any."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UserError(f"{said} more than the model's {positions} positions")


def check_vocabulary(tokenizer, splits, vocab_size):
    """Raises UserError if a token id has no row in the embedding: on a GPU that would be an assertion."""
    highest = max((int(np.max(piece)) for rows in splits for piece in rows.pieces), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} makes id {highest:,}, the model's embedding has "
            f"{vocab_size:,} rows"
        )


def count_parameters(model):
    """(all parameters, those in matrix products) of an HF model; a tied weight counts once, as the head.

    Embeddings that are only looked up take no part in matrix products.
    """
    sizes = {parameter: getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()}
    head = model.get_output_embeddings().weight
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    return sum(sizes.values()), sum(size for parameter, size in sizes.items() if parameter not in looked_up)


def blocks(model):
    """The transformer blocks: modules of the classes that HF names as not to be split over devices."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def on_meta(config):
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


def without_weights(build):
    """The HF model that `build` returns, its parameters left as memory happened to be, since files will fill them.

    HF's own initialisation would take longer than reading the files, and fails on parameters that ZeRO-3 has cut up.
    """
    with no_init_weights():
        model = build()
    model.tie_weights()  # part of what was skipped
    return model


def match_weights(model, weights):
    """Pairs each parameter of an HF model with where its values come from.

    Args:
        model: its parameters may be cut up by ZeRO-3.
        weights: `common.pretrained.PretrainedWeights` or `WeightsFile`. Names may lack the prefix of the model without
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


def groups_by_block(model):
    """The model's parameters as optimizer groups: first those outside the blocks, then a group a block.

    ZeRO-Offload updates one group after another, and while it updates one, the new weights of the one before are on
    their way to the GPU.
    """
    groups = [list(block.parameters()) for block in blocks(model)]
    inside = {parameter for group in groups for parameter in group}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    return [{"params": group} for group in (outside, *groups) if group]


def _renamed(name, renaming):
    return renaming.rename_source_key(name)[0]


def compile_model(model, packed, blocks_alone):
    """torch.compile: each block by itself, or the whole model but its head and loss.

    Packed rows are all of one length and keep a GPU busy: the blocks share one graph, which is made in seconds. Padded
    micro-batches are of many widths, and often so small that starting kernels from Python takes longer than running
    them. One graph of all blocks, its width left open, starts them fastest; making it takes a minute.

    Args:
        packed: whether all rows are of one length.
        blocks_alone: something comes between the blocks: ZeRO-3's hooks, or activation checkpointing.
    """
    if packed or blocks_alone:
        for block in blocks(model):
            block.compile(dynamic=not packed)
    else:
        model.base_model.compile(dynamic=True)
