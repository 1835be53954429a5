"""The text of a run: its splits as rows of tokens, the same for every technique, of which each rank takes its share."""

from argparse import Namespace
from typing import Any, NamedTuple

import numpy as np
import torch

from common import attention, models, sample
from common.chat import ChatTemplate
from common.deepspeed_config import describe_batch
from common.documents import load_documents
from common.errors import UserError
from common.rows import RowLoader, Rows
from common.tokens import find_template, rows_of
from common.tracking import RunLog


class TextData(NamedTuple):
    """The three splits of a run.

    Attributes:
        packing: whether rows hold several documents.
        state: what decides which rows a step trains on; a resumed run must have the same.
        name: of the dataset; for the sample, which text it is.
        num_documents: in the whole training split, where a slice without --end_idx ends.
        chat: the template of conversations; None for other documents.
    """

    train: RowLoader
    held_out: RowLoader
    test: RowLoader | None
    packing: bool
    state: dict[str, Any]
    name: str
    num_documents: int
    chat: ChatTemplate | None


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
        test: whether to load the test split.

    Raises:
        UserError: see `load_documents`, `rows_of` and `attention.choose_packing`; or the model has no embedding for a
            token.
    """
    log.info(describe_batch(ds_config, args.max_length))
    packing = attention.choose_packing(info.config, args.packing)
    documents = load_documents(
        args.dataset_name, args.dataset_config, args.text_column, args.start_idx, args.end_idx, sample_kind
    )
    chat = find_template(args, info.tokenizer, documents.train)
    parts = documents[: 3 if test else 2]
    splits = [rows_of(part, info.tokenizer, args, packing, chat) for part in parts]
    for name, rows in zip(("train", "held out", "test"), splits, strict=False):
        models.check_vocabulary(info.tokenizer, rows.highest, info.config.vocab_size)
        if len(rows) or name != "test":
            log.info(describe(name, rows))
    if not len(splits[0]):
        raise UserError(f"--dataset_name {args.dataset_name}: no document has a token to learn from")
    if chat:
        models.check_prompt(args, info.config, info.tokenizer, chat)
    limits = attention_limits(*splits)
    loaders = [
        RowLoader(rows, info.config, ds_config, device, dp_rank, *limits, args.seed, first_epoch) for rows in splits
    ]
    state = data_state(args, packing, splits[0], ds_config["train_batch_size"], chat)
    name = sample.full_name(args.dataset_name, sample_kind)
    train, held_out, test_split = loaders if test else (*loaders, None)
    return TextData(train, held_out, test_split, packing, state, name, documents.count, chat)


def attention_limits(*splits: Rows) -> tuple[int, int]:
    """(max_docs, max_seqlen) of `common.attention`: the most documents in a row, and the longest, over all splits.

    The padding behind a row's last document counts as more documents where it is longer than its split's longest.
    """
    splits = [rows for rows in splits if len(rows)]
    most = max(int(np.diff(rows.layout.row_begins).max()) - (-rows.max_length // rows.longest) for rows in splits)
    return most, max(rows.longest for rows in splits)


def data_state(
    args: Namespace, packing: bool, rows: Rows, global_batch_size: int, chat: ChatTemplate | None
) -> dict[str, Any]:
    """What decides which rows a step trains on; a run can only be resumed if it is unchanged."""
    names = "dataset_name", "dataset_config", "text_column", "start_idx", "end_idx", "max_length"
    return {
        **{name: getattr(args, name) for name in names},
        "packing": packing,
        "loss_on": args.loss_on or ("assistant" if chat else "text"),
        "seed": args.seed,
        "rows": len(rows),
        "global_batch_size": global_batch_size,
        **(chat.state if chat else {}),
    }


def describe(name: str, rows: Rows) -> str:
    """One line for the run's head."""
    if not len(rows):
        return f"{name}: nothing, no evaluation"
    tokens, targets, documents, _ = rows.totals
    fill = tokens / (len(rows) * rows.max_length)
    line = (
        f"{name}: {documents:,} documents, {tokens:,} tokens in {len(rows):,} rows of {rows.max_length} "
        f"({fill:.1%} filled)"
    )
    if rows.has_targets:
        line += f", {targets / tokens:.1%} of the tokens contribute to the loss"
    if rows.shortened:
        line += f"; too long for a row: {rows.shortened:,} conversations lost turns, {rows.left_out:,} of them all"
    return line
