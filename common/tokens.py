"""Tokenizes documents and lays out their tokens in rows.

Token ids are cached in Arrow files, the layout of rows in a PyTorch file. All ranks of a host memory-map both, so that
they share one copy.
"""

from argparse import Namespace
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from numpy.typing import DTypeLike
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.chat import ChatTemplate
from common.documents import CHAR_OFFSETS, CODE, cache_directory, in_batches
from common.errors import UserError
from common.files import make_once
from common.rows import Layout, Rows

DOCUMENTS_AT_ONCE = 100  # tokenized per call, to limit how many ids exist as Python integers


def tokenize_and_pack(
    split: Dataset,
    tokenizer: Tokenizer,
    args: Namespace,
    packing: bool,
    loss_on: str,
    template: ChatTemplate | None,
) -> Rows:
    """Makes rows of --max_length tokens from the documents of a split, see `tokenize` and `lay_out`."""
    if not len(split):
        ids = pa.chunked_array([], pa.list_(pa.int32()))
        return Rows(ids, None, lay_out(ids, None, args.max_length, packing), args.max_length)
    tokens = tokenize(split, tokenizer, args.max_length, loss_on, template)
    rows = load_rows(tokens, args.max_length, packing)
    if template:
        invalid = np.flatnonzero(tokens.data.column("error").is_valid())
        if len(invalid):
            first = tokens[int(invalid[0])]
            others = f" (and {len(invalid) - 1:,} more invalid rows)" if len(invalid) > 1 else ""
            row = f"row {first['row']} of the {split.split or 'train'} split (counting from 0)"
            raise UserError(f"--dataset_name {args.dataset_name}: {row}: {first['error']}{others}")
        rows.num_truncated = int(np.count_nonzero(tokens.data.column("dropped_turns")))
        rows.num_left_out = len(tokens) - rows.totals.samples
    return rows


def tokenize(
    documents: Dataset, tokenizer: Tokenizer, max_length: int, loss_on: str, template: ChatTemplate | None
) -> Dataset:
    """Tokenizes documents.

    A text ends with an end-of-text token. If a question is longer than a row, its context loses its end, so that
    question and answer stay together. For conversations see `ChatTemplate.encode`.

    Args:
        documents: a split of `common.documents.Documents`.
        max_length: T, tokens per row.
        loss_on: "text", "answer" or "assistant".
        template: for conversations.

    Returns:
        A dataset with columns `ids`, list of int32; unless `loss_on` is "text" `loss_mask`, list of uint8; for
        conversations also `row`, `dropped_turns` and `error`, see `ChatTemplate.encode_row`.
    """
    questions = "answer_start" in documents.column_names
    if not template and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token)")
    if questions and not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no character offsets: it is not a fast one")

    def encode(table: pa.Table) -> pa.Table:
        columns: dict[str, Any] = {}
        if template:
            texts, assistant_only = table["messages"].to_pylist(), loss_on == "assistant"
            rows = [template.encode_row(text, max_length, assistant_only) for text in texts]
            ids, masks, dropped, errors = zip(*rows, strict=True)
            columns = {"row": table["row"], "dropped_turns": pa.array(dropped), "error": pa.array(errors, pa.string())}
        elif questions:
            ids, masks = zip(*_encode_questions(table, tokenizer, max_length), strict=True)
        else:
            ids = [ids for ids, _ in _encode_texts(table, tokenizer)]
        if loss_on != "text":
            columns["loss_mask"] = _list_array(masks, np.uint8)
        return pa.table({"ids": _list_array(ids, np.int32), **columns})

    key = [tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer, tokenizer.eos_token_id, loss_on]
    if template or questions:
        key += [max_length, template and [template.source, tokenizer.special_tokens_map]]
    documents = documents.with_format("arrow")
    return in_batches(documents.map, encode, key, remove_columns=documents.column_names).with_format(None)


def _encode_texts(table: pa.Table, tokenizer: Tokenizer, **options: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields (token ids, character spans of the tokens if requested) for each text."""
    options |= {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    for batch in table.to_batches(DOCUMENTS_AT_ONCE):
        encoded = tokenizer(batch["text"].to_pylist(), add_special_tokens=True, **options)
        for ids, spans in zip(encoded["input_ids"], encoded.get("offset_mapping", [None] * len(batch)), strict=True):
            end = [] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            yield np.array(ids + end, dtype=np.int32), spans


def _encode_questions(
    table: pa.Table, tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (token ids, mask of the answer) for each question."""
    texts = _encode_texts(table, tokenizer, return_offsets_mapping=True)
    for (ids, spans), *offsets in zip(texts, *(table[name].to_pylist() for name in CHAR_OFFSETS), strict=True):
        ends = np.array(spans).reshape(-1, 2)[:, 1]
        # The first token that ends after each offset; it often includes the space before the word.
        context_start, context_end, answer = (int(np.argmax(np.append(ends, np.inf) > offset)) for offset in offsets)
        excess = min(max(len(ids) - max_length, 0), context_end - context_start)
        ids = np.delete(ids, np.s_[context_end - excess : context_end])
        yield ids, np.arange(len(ids)) >= answer - excess


def _list_array(arrays: Iterable[Sequence], dtype: DTypeLike) -> pa.ListArray:
    values = np.concatenate([np.empty(0, dtype), *(np.asarray(values, dtype) for values in arrays)])
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, arrays)], dtype=np.int32), values)


def load_rows(tokens: Dataset, max_length: int, packing: bool) -> Rows:
    """Lays out the dataset that `tokenize` returned in rows of `max_length` tokens; the layout is cached as well."""
    ids = tokens.data.column("ids")
    loss_mask = tokens.data.column("loss_mask") if "loss_mask" in tokens.column_names else None

    def save(path: Path) -> None:
        layout = lay_out(ids, loss_mask, max_length, packing)
        torch.save({name: torch.from_numpy(values) for name, values in layout._asdict().items()}, path)

    path = cache_directory() / f"{Hasher.hash([CODE, tokens._fingerprint, max_length, packing])}.pt"
    make_once(path, save)
    try:
        layout = torch.load(path, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise OSError(f"{path} is damaged: {error}") from error
    return Rows(ids, loss_mask, Layout(**{name: values.numpy() for name, values in layout.items()}), max_length)


def lay_out(ids: pa.ChunkedArray, loss_mask: pa.ChunkedArray | None, max_length: int, packing: bool) -> Layout:
    """Splits documents into chunks of at most `max_length` tokens and assigns the chunks to rows.

    Chunks of a document overlap by one token; chunks without a target are dropped.

    Args:
        ids, loss_mask: see `Rows`.
        packing: whether a row may hold several chunks.
    """
    columns: tuple[list[np.ndarray], ...] = ([], [], [], [])
    tokens, highest = 0, 0
    masks = loss_mask.chunks if loss_mask else [None] * ids.num_chunks
    for part, mask in zip(ids.chunks, masks, strict=True):  # one record batch of the file at a time
        size = part.value_lengths().to_numpy().astype(np.int64)
        count = np.maximum(-(-(size - 1) // (max_length - 1)), 0)  # a document of one token has no target
        document = np.repeat(np.arange(len(size)), count)
        offset = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * (max_length - 1)
        begin, length = (np.cumsum(size) - size)[document] + offset, np.minimum(size[document] - offset, max_length)
        found = length - 1
        if mask:
            before = np.concatenate([[0], np.cumsum(mask.flatten(), dtype=np.int64)])
            found = before[begin + length] - before[begin + 1]
        kept = found > 0
        is_first = np.diff(document[kept], prepend=-1) > 0  # of its document
        for column, values in zip(columns, (tokens + begin[kept], length[kept], found[kept], is_first), strict=True):
            column.append(values)
        tokens, highest = tokens + size.sum(), max(highest, np.max(part.flatten(), initial=0))
    begins, lengths, targets, firsts = (np.concatenate([np.empty(0, np.int32), *parts]) for parts in columns)
    lengths = lengths.astype(np.int32)
    row = _pack(lengths, max_length) if packing else np.arange(len(lengths), dtype=np.int32)
    num_rows = int(row.max(initial=-1)) + 1
    counts = np.zeros((num_rows + 1, 4), dtype=np.int64)
    for i, weights in enumerate((lengths, targets, firsts, np.square(lengths, dtype=np.float64))):
        counts[:, i] = np.bincount(row, weights, num_rows + 1)
    order = np.argsort(row, kind="stable")
    row_begins = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))])
    return Layout(begins[order].astype(np.int64), lengths[order], row_begins, counts, np.array([highest]))


def _pack(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Assigns chunks to rows; returns row numbers, int32 [chunks].

    Best fit: each chunk, in the order of the text, goes into the fullest row that still has room for it. Sorting them
    by length first would fill rows one percent better, but leave some rows with short chunks only.
    """
    row_of_chunk, below = array("i"), array("i")
    top = [-1] * (max_length + 1)  # the rows with s free places are a stack: its top, and the row below each row
    occupied = 0  # bit s: some row has s free places; the lowest bit from `length` up is the tightest fit
    for length in lengths.data:
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = top[space]
            top[space] = below[row]
            if top[space] < 0:
                occupied &= ~(1 << space)
        else:
            space, row = max_length, len(below)
            below.append(-1)
        row_of_chunk.append(row)
        space -= length
        below[row], top[space] = top[space], row
        occupied |= 1 << space
    return np.array(row_of_chunk, dtype=np.int32)
