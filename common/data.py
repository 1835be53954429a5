"""The text of a run, as rows of tokens: the same documents, cut and packed the same way, for every technique.

1. `common.documents` loads a dataset, finds its text, questions or conversations, takes the slice of the flags, and
   holds out the validation split or every fiftieth document.
2. `common.tokens.tokenize`: a text becomes the tokenizer's ids and an end-of-text token, which is a target too. Of a
   question only the answer may be a target. A conversation is rendered by a chat template (`common.chat`); only what
   the assistant says is a target. The ids are in Arrow files that all ranks map into memory.
3. `common.tokens.lay_out`: a document longer than `max_length` is cut into chunks that overlap by one token, so every
   token but a document's first is a target once. Packing puts several chunks into a row; padding gives each its own.
4. `common.rows`: the order of rows in an epoch, each rank's share of a step, and the tensors of its micro-batches.
"""

from argparse import Namespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from common import attention, models, sample
from common.chat import ChatTemplate
from common.deepspeed_config import describe_batch
from common.documents import load_documents
from common.errors import UserError
from common.rows import RowLoader, Rows
from common.tokens import make_rows, tokenize
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


def find_template(args: Namespace, tokenizer: Tokenizer, documents: datasets.Dataset) -> ChatTemplate | None:
    """The template that renders the documents if they are conversations.

    Raises:
        UserError: see `ChatTemplate`; or --chat_template is given for other documents.
    """
    if "messages" in documents.column_names:
        return ChatTemplate(tokenizer, args.chat_template)
    if args.chat_template:
        raise UserError(f"--chat_template {args.chat_template}: {args.dataset_name} holds no conversations")
    return None


def rows_of(
    documents: datasets.Dataset, tokenizer: Tokenizer, args: Namespace, packing: bool, chat: ChatTemplate | None
) -> Rows:
    """Tokenizes documents and lays them out in rows, as the flags max_length and loss_on say.

    Raises:
        UserError: see `tokenize` and `choose_loss`; or a conversation cannot be trained on.
    """
    if not len(documents):
        return make_rows(documents, args.max_length, packing)
    loss_on = choose_loss(args.loss_on, args.dataset_name, "answer_start" in documents.column_names, chat)
    tokens = tokenize(documents, tokenizer, args.max_length, loss_on, chat)
    rows = make_rows(tokens, args.max_length, packing)
    if chat:
        bad = np.flatnonzero(tokens.data.column("problem").is_valid())
        if len(bad):
            first, others = tokens[int(bad[0])], f" ({len(bad) - 1:,} other rows are wrong too)" if len(bad) > 1 else ""
            raise UserError(f"--dataset_name {args.dataset_name}: row {first['row']}: {first['problem']}{others}")
        rows.shortened = int(np.count_nonzero(tokens.data.column("lost")))
        rows.left_out = len(tokens) - rows.count(np.arange(len(rows))).samples
    return rows


def choose_loss(flag: str | None, dataset_name: str, questions: bool, chat: ChatTemplate | None) -> str:
    """Which tokens contribute to the loss: `flag`, by default those of the assistant in conversations, else all."""
    possible = ["assistant", "text"] if chat else ["text", "answer"] if questions else ["text"]
    if flag not in (None, *possible):
        kind = "conversations" if chat else "questions, contexts and answers" if questions else "plain text"
        raise UserError(f"--loss_on {flag}: --dataset_name {dataset_name} is read as {kind}: {' or '.join(possible)}")
    return flag or possible[0]


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
    tokens, targets, documents, _ = rows.count(np.arange(len(rows)))
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
