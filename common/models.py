"""Config and tokenizer of the model at hand, whatever its name stands for."""

from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from common.errors import UserError, one_line
from common.pretrained import resolve_model_directory
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
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers checks a config in as many ways as there are fields
        raise UserError(f"{directory}: no config that transformers can read: {one_line(error, 200)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a broken tokenizer file fails in as many ways as there are tokenizers
        raise UserError(f"{directory}: no tokenizer that transformers can read: {one_line(error, 200)}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"--max_length {max_length} is more than the model's {positions} positions")
    return config, tokenizer


def check_vocabulary(tokenizer, splits, vocab_size):
    """Raises UserError if a token id has no row in the embedding: on a GPU that would be an assertion."""
    highest = max((int(np.max(piece)) for rows in splits for piece in rows.pieces), default=0)
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} makes id {highest:,}, the model's embedding has "
            f"{vocab_size:,} rows"
        )
