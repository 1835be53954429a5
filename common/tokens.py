"""Documents to tokens, and tokens to rows.

Documents are tokenized once, into Arrow files; which of their tokens are in which row is computed once, into NumPy
files. All ranks of a host map both into memory and share them.
"""

import os
import tempfile
from argparse import Namespace
from array import array
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase as Tokenizer

from common import chat
from common.chat import ChatTemplate
from common.documents import PLACES, num_proc
from common.errors import UserError
from common.rows import Layout, Rows

# Part of the names of cached files, so that those of another version of the code are not used.
CODE = [Path(module).read_bytes() for module in (__file__, chat.__file__)]
DOCUMENTS_AT_ONCE = 100  # whose tokens exist as Python integers


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
    documents: datasets.Dataset, tokenizer: Tokenizer, args: Namespace, packing: bool, template: ChatTemplate | None
) -> Rows:
    """Tokenizes documents and lays them out in rows, as the flags max_length and loss_on say.

    Raises:
        UserError: see `tokenize` and `choose_loss`; or a conversation cannot be trained on.
    """
    if not len(documents):
        return make_rows(documents, args.max_length, packing)
    loss_on = choose_loss(args.loss_on, args.dataset_name, "answer_start" in documents.column_names, template)
    tokens = tokenize(documents, tokenizer, args.max_length, loss_on, template)
    rows = make_rows(tokens, args.max_length, packing)
    if template:
        bad = np.flatnonzero(tokens.data.column("problem").is_valid())
        if len(bad):
            first, others = tokens[int(bad[0])], f" ({len(bad) - 1:,} other rows are wrong too)" if len(bad) > 1 else ""
            row = f"row {first['row']}{f' of the {documents.split} split' if documents.split else ''} (the first is 0)"
            raise UserError(f"--dataset_name {args.dataset_name}: {row}: {first['problem']}{others}")
        rows.shortened = int(np.count_nonzero(tokens.data.column("lost")))
        rows.left_out = len(tokens) - rows.totals.samples
    return rows


def choose_loss(flag: str | None, dataset_name: str, questions: bool, template: ChatTemplate | None) -> str:
    """Which tokens contribute to the loss: `flag`, by default those of the assistant in conversations, else all."""
    possible = ["assistant", "text"] if template else ["text", "answer"] if questions else ["text"]
    if flag not in (None, *possible):
        kind = "conversations" if template else "questions, contexts and answers" if questions else "plain text"
        raise UserError(f"--loss_on {flag}: --dataset_name {dataset_name} is read as {kind}: {' or '.join(possible)}")
    return flag or possible[0]


def tokenize(
    documents: datasets.Dataset, tokenizer: Tokenizer, max_length: int, loss_on: str, template: ChatTemplate | None
) -> datasets.Dataset:
    """Tokenizes documents, with all cores if there are many.

    A text becomes the tokenizer's ids and an end-of-text token. So does a question, but if it is longer than a row the
    end of its context is left out, so that the answer keeps its question. For conversations see `ChatTemplate.fit`.

    Args:
        documents: as `load_documents` returns them.
        max_length: T, tokens per row.
        loss_on: "text", "answer" or "assistant".
        template: of conversations.

    Returns:
        Columns `ids`, list of int32; unless `loss_on` is "text" `is_target`, list of uint8; of conversations also `row`
        (of the dataset), `lost` (number of turns) and `problem`.

    Raises:
        UserError: the tokenizer has no end-of-text token, or cannot say where in a text its tokens are.
    """
    questions = "answer_start" in documents.column_names
    if not template and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token)")
    if questions and not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} cannot tell where in a text its tokens are")

    run = os.getpid()

    def encode(table):
        if run not in (os.getpid(), os.getppid()):  # this process helps a run that was killed
            os._exit(1)
        more = {}
        if template:
            fitted = [template.fit(text, max_length, loss_on == "assistant") for text in table["messages"].to_pylist()]
            ids, masks, lost, problems = zip(*fitted, strict=True)
            more = {"row": table["row"], "lost": pa.array(lost, pa.int32()), "problem": pa.array(problems, pa.string())}
        elif questions:
            ids, masks = zip(*_encode_questions(table, tokenizer, max_length), strict=True)
        else:
            ids = [ids for ids, _ in _encode_texts(table, tokenizer)]
        if loss_on != "text":
            more["is_target"] = _list_array(masks, np.uint8)
        return pa.table({"ids": _list_array(ids, np.int32), **more})

    fingerprint = Hasher.hash([
        CODE, documents._fingerprint, tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer,
        tokenizer.eos_token_id, loss_on, template and template.template, max_length if template or questions else None,
    ])  # fmt: skip
    tokens = documents.with_format("arrow").map(
        encode, batched=True, remove_columns=documents.column_names, num_proc=num_proc(documents),
        new_fingerprint=fingerprint,
    )  # fmt: skip
    return tokens.with_format(None)


def _encode_texts(table, tokenizer, **options):
    """Yields (ids, where each token is in the text if the options ask for it) of each text."""
    options |= {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    for batch in table.to_batches(DOCUMENTS_AT_ONCE):
        encoded = tokenizer(batch["text"].to_pylist(), add_special_tokens=True, **options)
        for ids, places in zip(encoded["input_ids"], encoded.get("offset_mapping", [None] * len(batch)), strict=True):
            end = [] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
            yield np.array(ids + end, dtype=np.int32), places


def _encode_questions(table, tokenizer, max_length):
    """Yields (ids, whether each belongs to the answer) of each question."""
    texts = _encode_texts(table, tokenizer, return_offsets_mapping=True)
    for (ids, spans), *places in zip(texts, *(table[name].to_pylist() for name in PLACES), strict=True):
        ends = np.array(spans).reshape(-1, 2)[:, 1]
        # The first token that ends behind a place: with many tokenizers the space before it is part of it.
        context_start, context_end, answer = (int(np.argmax(np.append(ends, np.inf) > place)) for place in places)
        excess = min(max(len(ids) - max_length, 0), context_end - context_start)
        ids = np.delete(ids, np.s_[context_end - excess : context_end])
        yield ids, np.arange(len(ids)) >= answer - excess


def _list_array(arrays, dtype):
    values = np.concatenate([np.empty(0, dtype), *(np.asarray(values, dtype) for values in arrays)])
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, arrays)], dtype=np.int32), values)


def make_rows(tokens: datasets.Dataset, max_length: int, packing: bool) -> Rows:
    """Lays out what `tokenize` returned in rows of `max_length` tokens, or finds an earlier layout in the cache."""
    if not len(tokens):
        tokens = datasets.Dataset(pa.table({"ids": _list_array([], np.int32)}))
    ids = tokens.data.column("ids")
    is_target = tokens.data.column("is_target") if "is_target" in tokens.column_names else None
    key = Hasher.hash([CODE, tokens._fingerprint, max_length, packing])
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "rows" / key
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Complete or absent: processes that start together each write their own, and one of them stays.
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            os.mkdir(f"{scratch}/rows")
            for name, values in lay_out(ids, is_target, max_length, packing)._asdict().items():
                np.save(f"{scratch}/rows/{name}.npy", values)
            with suppress(OSError):
                os.rename(f"{scratch}/rows", directory)
    files = [directory / f"{name}.npy" for name in Layout._fields]
    # NumPy does not map a file that holds nothing behind its header of 128 bytes.
    layout = Layout(*(np.load(file, mmap_mode="r" if file.stat().st_size > 128 else None) for file in files))
    return Rows(ids, is_target, layout, max_length)


def lay_out(ids: pa.ChunkedArray, is_target: pa.ChunkedArray | None, max_length: int, packing: bool) -> Layout:
    """Cuts documents into chunks of at most `max_length` tokens and lays them out in rows.

    Chunks of a document overlap by one token; those without a target are left out.

    Args:
        ids, is_target: see `Rows`.
        packing: whether a row holds several chunks, or one.
    """
    columns, begin, highest = [[] for _ in range(4)], 0, 0
    masks = is_target.chunks if is_target else [None] * ids.num_chunks
    for documents, mask in zip(ids.chunks, masks, strict=True):  # parts of the file, each some documents
        size = documents.value_lengths().to_numpy().astype(np.int64)
        count = np.maximum(-(-(size - 1) // (max_length - 1)), 0)  # a document of one token has no target
        document = np.repeat(np.arange(len(size)), count)
        offset = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * (max_length - 1)
        start, length = (np.cumsum(size) - size)[document] + offset, np.minimum(size[document] - offset, max_length)
        targets = length - 1
        if mask:
            before = np.concatenate([[0], np.cumsum(mask.flatten(), dtype=np.int64)])
            targets = before[start + length] - before[start + 1]
        kept = targets > 0
        columns[0].append(begin + start[kept])
        columns[1].append(length[kept].astype(np.int32))
        columns[2].append(targets[kept].astype(np.int32))
        columns[3].append(np.diff(document[kept], prepend=-1) > 0)  # whether it is the first of its document
        begin, highest = begin + size.sum(), max(highest, np.max(documents.flatten(), initial=0))
    begins, lengths, targets, is_first = (np.concatenate([np.empty(0, np.int32), *parts]) for parts in columns)
    row = _pack(lengths, max_length) if packing else np.arange(len(lengths), dtype=np.int32)
    rows = int(row.max(initial=-1)) + 1
    counts = np.zeros((rows + 1, 4), dtype=np.int64)
    for column, weights in enumerate((lengths, targets, is_first, np.square(lengths, dtype=np.float64))):
        counts[:, column] = np.bincount(row, weights, rows + 1)
    order = np.argsort(row, kind="stable")
    row_begins = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return Layout(begins[order].astype(np.int64), lengths[order], row_begins, counts, np.array([highest]))


def _pack(lengths, max_length):
    """For each chunk the number of its row.

    Best fit: each chunk, in the order of the text, goes into the fullest row that still has room for it. If they were
    sorted by length first, the rows would be one percent fuller, but some would hold only short chunks.
    """
    row_of_chunk, below = array("i"), array("i")
    top = [-1] * (max_length + 1)  # the rows with so many places left are a stack: its top, and what is below each row
    occupied = 0  # bit s is set where some row has s places left: the tightest fit is one shift away
    for length in memoryview(lengths):
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
