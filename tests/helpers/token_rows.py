"""Rows of tokens for tests: of token ids that a test makes up, or of a text as the scripts load it."""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.documents import load_documents
from common.rows import Rows
from common.tokens import lay_out, tokenize_and_pack


def rows_of_documents(
    documents: Sequence[Sequence[int] | np.ndarray],
    max_length: int,
    packing: bool = True,
    loss_start: Sequence[int] | None = None,
) -> Rows:
    """Lays out documents in rows. Their tokens are in three parts, like those of a large file.

    Args:
        documents: token ids of each document.
        loss_start: index of each document's first target; None makes all tokens targets, except a document's first.
    """
    loss_mask = None
    if loss_start is not None:
        masks = [np.arange(len(ids)) >= start for ids, start in zip(documents, loss_start, strict=True)]
        loss_mask = _in_parts(masks, pa.uint8())
    ids = _in_parts(documents, pa.int32())
    return Rows(ids, loss_mask, lay_out(ids, loss_mask, max_length, packing), max_length)


def _in_parts(lists, dtype):
    whole = pa.array([np.asarray(values, dtype.to_pandas_dtype()) for values in lists], pa.list_(dtype))
    third = len(whole) // 3
    return pa.chunked_array([whole[:third], whole[third : 2 * third], whole[2 * third :]])


def ids_in_row(rows: Rows, row: int) -> list[np.ndarray]:
    """Token ids of each chunk of a row; row -1, which fills up a batch, has none."""
    return [ids for _, ids, _ in rows.chunks(row)] if row >= 0 else []


def load_rows(
    dataset_name: str,
    tokenizer: Tokenizer,
    max_length: int,
    packing: bool,
    loss_on: str = "text",
) -> tuple[Rows, Rows]:
    """(training, held-out) rows of a dataset of texts or questions."""
    documents = load_documents(dataset_name)
    args = Namespace(dataset_name=dataset_name, max_length=max_length)
    train, held_out = (tokenize_and_pack(split, tokenizer, args, packing, loss_on, None) for split in documents[:2])
    return train, held_out
