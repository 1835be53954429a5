"""Loads the text of a run as rows of tokens, the same for every technique; each rank takes its share.

From text to rows: see `common.documents`.
"""

import math
from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from common import attention, models, sample
from common.chat import ChatTemplate
from common.deepspeed_config import describe_batch
from common.documents import cache_directory, load_documents
from common.errors import UserError, one_line
from common.rows import RowLoader, Rows
from common.tokens import tokenize_and_pack
from common.tracking import RunLog


class TextData(NamedTuple):
    """The splits of a run.

    Attributes:
        packing: whether rows may hold several documents.
        state: what determines the rows of each step; a resumed run must have the same.
        name: of the dataset; for the sample, which text it is.
        num_documents: in the whole training split, where a slice without --end_idx ends.
        chat_template: of conversations; None for other documents.
    """

    train: RowLoader
    held_out: RowLoader
    test: RowLoader | None
    packing: bool
    state: dict[str, Any]
    name: str
    num_documents: int
    chat_template: ChatTemplate | None


def load(
    args: Namespace,
    info: models.ModelInfo,
    sample_kind: str,
    ds_config: dict,
    device: torch.device,
    dp_rank: int,
    log: RunLog,
    first_epoch: int = 0,
    test: bool = True,
) -> TextData:
    """Loads, tokenizes and packs the text that the flags select.

    Args:
        sample_kind: which text `--dataset_name sample` is.
        ds_config: with the three batch keys.
        dp_rank: this rank among the data-parallel ranks.
        first_epoch: number of the run's first epoch.
        test: whether to load the test split too.
    """
    log.info(describe_batch(ds_config, args.max_length))
    packing = attention.choose_packing(info.config, args.packing)
    try:
        documents = load_documents(
            args.dataset_name, args.dataset_config, args.text_column, args.start_idx, args.end_idx, sample_kind, test
        )
        template = find_template(args, info.tokenizer, documents.train)
        if prompt := getattr(args, "generation_prompt", None):
            models.check_prompt(
                "--generation_prompt", prompt, args.max_new_tokens, info.config, info.tokenizer, template
            )
        loss_on = choose_loss(args.loss_on, args.dataset_name, documents.train, template)
        splits = {}
        for name, part in zip(
            ("train", "held out", "test") if test else ("train", "held out"), documents, strict=False
        ):
            if part.column_names != documents.train.column_names:
                raise UserError(
                    f"--dataset_name {args.dataset_name}: the {name} documents are of another kind than the training "
                    f"documents: {', '.join(part.column_names)} instead of {', '.join(documents.train.column_names)}"
                )
            splits[name] = tokenize_and_pack(part, info.tokenizer, args, packing, loss_on, template)
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the cache in {cache_directory()} cannot be written, or is damaged: delete it ({one_line(error)})"
        ) from error
    train_rows = splits["train"]
    if not len(train_rows):
        why = f": all {train_rows.num_left_out:,} conversations are longer than --max_length" if template else ""
        raise UserError(
            f"--dataset_name {args.dataset_name}: no training document has a token that contributes to the loss{why}"
        )
    for name, rows in splits.items():
        models.check_vocabulary(info.tokenizer, rows.max_token_id, info.config.vocab_size)
        if len(rows) or name != "test":
            log.info(describe(name, rows))
    limits = attention_limits(*splits.values())
    loaders = [
        RowLoader(rows, info.config, ds_config, device, dp_rank, *limits, args.seed, first_epoch)
        for rows in splits.values()
    ]
    state = data_state(args, packing, loss_on, train_rows, ds_config["train_batch_size"], template)
    name = sample.full_name(args.dataset_name, sample_kind)
    test_split = loaders[2] if test else None
    return TextData(loaders[0], loaders[1], test_split, packing, state, name, documents.num_documents, template)


def find_template(args: Namespace, tokenizer: Tokenizer, documents: Dataset) -> ChatTemplate | None:
    """Returns the chat template for conversations, None for other documents, which allow no --chat_template."""
    if "messages" in documents.column_names:
        return ChatTemplate(tokenizer, args.chat_template)
    if args.chat_template:
        raise UserError(
            f"--chat_template {args.chat_template}: --dataset_name {args.dataset_name} contains no conversations"
        )
    return None


def choose_loss(flag: str | None, name: str, documents: Dataset, template: ChatTemplate | None) -> str:
    """Returns --loss_on, which tokens contribute to the loss: by default the assistant's in conversations, else all."""
    if template:
        kind, possible = "conversations", ["assistant", "text"]
    elif "answer_start" in documents.column_names:
        kind, possible = "questions, contexts and answers", ["text", "answer"]
    else:
        kind, possible = "plain text", ["text"]
    if flag not in (None, *possible):
        raise UserError(
            f"--loss_on {flag}: --dataset_name {name} is read as {kind}, which allows {' or '.join(possible)}"
        )
    return flag or possible[0]


def attention_limits(*splits: Rows) -> tuple[int, int]:
    """Returns the `max_docs` and `max_seqlen` of `common.attention`, over all rows of all splits.

    Padding longer than its split's longest chunk counts as further documents, see `Rows.collate`.
    """
    splits = tuple(rows for rows in splits if len(rows))
    max_docs = [np.diff(rows.layout.row_begins).max() + math.ceil(rows.max_length / rows.longest) for rows in splits]
    return int(max(max_docs)), max(rows.longest for rows in splits)


def data_state(
    args: Namespace,
    packing: bool,
    loss_on: str,
    rows: Rows,
    global_batch_size: int,
    chat_template: ChatTemplate | None,
) -> dict[str, Any]:
    """Returns what determines the rows of each step; a run can only be resumed if it is unchanged."""
    names = "dataset_name", "dataset_config", "text_column", "start_idx", "end_idx", "max_length"
    return {
        **{name: getattr(args, name) for name in names},
        "packing": packing,
        "loss_on": loss_on,
        "seed": args.seed,
        "rows": len(rows),
        "global_batch_size": global_batch_size,
        **(chat_template.state if chat_template else {}),
    }


def describe(name: str, rows: Rows) -> str:
    """Returns one line for the start of the log."""
    tokens, targets, documents, _ = rows.totals
    line = f"{name}: nothing, no evaluation"
    if len(rows):
        filled = tokens / (len(rows) * rows.max_length)
        line = f"{name}: {documents:,} documents, {tokens:,} tokens in {len(rows):,} rows of {rows.max_length}"
        line += f" ({filled:.1%} filled)"
    if rows.has_loss_mask:
        line += f", {targets / max(tokens, 1):.1%} of the tokens contribute to the loss"
    if rows.num_truncated:
        line += f"; {rows.num_truncated:,} conversations were longer than a row and lost turns"
        line += f" ({rows.num_left_out:,} lost all)"
    return line
