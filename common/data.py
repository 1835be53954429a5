"""Loads the text of a run as rows of tokens. The rows are the same for every technique; each rank takes its share.

How a text becomes rows: see `common.documents`.
"""

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
    """The three splits of a run.

    Attributes:
        packing: whether rows hold several documents.
        state: what decides which rows a step trains on; a resumed run must have the same.
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
    """Loads, tokenizes and packs the text that the flags name.

    Args:
        sample_kind: which text `--dataset_name sample` is.
        ds_config: with the three batch keys.
        dp_rank: of this rank among the data-parallel ranks.
        first_epoch: number of the run's first epoch.
        test: whether to load the test split too.

    Raises:
        UserError: see the functions called here; or no document has a target, or a token has no embedding.
    """
    log.info(describe_batch(ds_config, args.max_length))
    packing = attention.choose_packing(info.config, args.packing)
    try:
        documents = load_documents(
            args.dataset_name, args.dataset_config, args.text_column, args.start_idx, args.end_idx, sample_kind, test
        )
        template = find_template(args, info.tokenizer, documents.train)
        loss_on = choose_loss(args.loss_on, args.dataset_name, documents.train, template)
        parts = documents[: 3 if test else 2]
        for name, part in zip(("held-out", "test"), parts[1:], strict=False):
            if part.column_names != documents.train.column_names:
                raise UserError(
                    f"--dataset_name {args.dataset_name}: the {name} documents are of another kind than those to train "
                    f"on: {', '.join(part.column_names)} instead of {', '.join(documents.train.column_names)}"
                )
        splits = [tokenize_and_pack(part, info.tokenizer, args, packing, loss_on, template) for part in parts]
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the cache in {cache_directory()} cannot be written, or is damaged: delete it ({one_line(error)})"
        ) from error
    if not len(splits[0]):
        why = f": all {splits[0].num_left_out:,} conversations are longer than --max_length" if template else ""
        raise UserError(
            f"--dataset_name {args.dataset_name}: no training document has a token that contributes to the loss{why}"
        )
    for name, rows in zip(("train", "held out", "test"), splits, strict=False):
        models.check_vocabulary(info.tokenizer, rows.max_token_id, info.config.vocab_size)
        if len(rows) or name != "test":
            log.info(describe(name, rows))
    if template and (prompt := getattr(args, "generation_prompt", None)):
        models.check_prompt("--generation_prompt", prompt, args.max_new_tokens, info.config, info.tokenizer, template)
    limits = attention_limits(*splits)
    loaders = [
        RowLoader(rows, info.config, ds_config, device, dp_rank, *limits, args.seed, first_epoch) for rows in splits
    ]
    state = data_state(args, packing, loss_on, splits[0], ds_config["train_batch_size"], template)
    name = sample.full_name(args.dataset_name, sample_kind)
    train, held_out, test_split = loaders if test else (*loaders, None)
    return TextData(train, held_out, test_split, packing, state, name, documents.num_documents, template)


def find_template(args: Namespace, tokenizer: Tokenizer, documents: Dataset) -> ChatTemplate | None:
    """Returns the chat template if the documents are conversations, otherwise None.

    Raises:
        UserError: see `ChatTemplate`; or --chat_template is given for other documents.
    """
    if "messages" in documents.column_names:
        return ChatTemplate(tokenizer, args.chat_template)
    if args.chat_template:
        raise UserError(
            f"--chat_template {args.chat_template}: --dataset_name {args.dataset_name} contains no conversations"
        )
    return None


def choose_loss(flag: str | None, name: str, documents: Dataset, template: ChatTemplate | None) -> str:
    """Which tokens contribute to the loss: --loss_on, by default those of the assistant in conversations, else all.

    Raises:
        UserError: --loss_on does not fit the kind of documents.
    """
    kind, possible = "plain text", ["text"]
    if template:
        kind, possible = "conversations", ["assistant", "text"]
    elif "answer_start" in documents.column_names:
        kind, possible = "questions, contexts and answers", ["text", "answer"]
    if flag not in (None, *possible):
        raise UserError(
            f"--loss_on {flag}: --dataset_name {name} is read as {kind}, which allows {' or '.join(possible)}"
        )
    return flag or possible[0]


def attention_limits(*splits: Rows) -> tuple[int, int]:
    """(max_docs, max_seqlen) of `common.attention`, over all splits: the most documents in a row, the longest chunk.

    `Rows.collate` numbers padding that is longer than its split's longest chunk as further documents, which count.
    """
    splits = [rows for rows in splits if len(rows)]
    most = max(int(np.diff(rows.layout.row_begins).max()) + -(-rows.max_length // rows.longest) for rows in splits)
    return most, max(rows.longest for rows in splits)


def data_state(
    args: Namespace,
    packing: bool,
    loss_on: str,
    rows: Rows,
    global_batch_size: int,
    chat_template: ChatTemplate | None,
) -> dict[str, Any]:
    """What decides which rows a step trains on; a run can only be resumed if it is unchanged."""
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
    """One line for the start of the log."""
    tokens, targets, documents, _ = rows.totals
    line = f"{name}: nothing, no evaluation"
    if len(rows):
        fill = tokens / (len(rows) * rows.max_length)
        line = (
            f"{name}: {documents:,} documents, {tokens:,} tokens in {len(rows):,} rows of {rows.max_length} "
            f"({fill:.1%} filled)"
        )
    if rows.has_loss_mask:
        line += f", {targets / max(tokens, 1):.1%} of the tokens contribute to the loss"
    if rows.num_truncated:
        line += f"; {rows.num_truncated:,} conversations were longer than a row and lost turns"
        line += f" ({rows.num_left_out:,} lost all)"
    return line
