"""Text to rows of tokens: load, slice, hold out, tokenize, pack, and hand out in an order that ranks cannot change.

A *sample* is a document, a *row* is `max_length` tokens. Every token of a document but its first is a target
exactly once, whatever the row it lands in:

- each document is the tokenizer's ids and an end-of-text token, which is a target too;
- a question with its context and answer (SQuAD's columns) is one such document; if it is longer than a row, the end of
  the context is left out;
- a document longer than a row is cut into chunks that overlap by one token, so that the first token of a chunk is only
  context and nothing is predicted from nothing;
- packing puts several whole chunks into a row; padding gives each chunk a row of its own. Labels, positions and
  therefore the loss of a document are the same either way.
"""

import functools
import glob
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from common import attention, models, sample
from common.deepspeed_config import describe_batch
from common.errors import UserError, one_line
from common.loss import IGNORE
from common.tracking import RunLog

# Every fiftieth document is held out, whatever slice is trained on, so that perplexities of runs over different
# slices compare and no slice has seen the others' evaluation text.
HELD_OUT_EVERY = 50
# Where in the text of a question its context begins and ends, and its answer begins.
PLACES = ("context_start", "context_end", "answer_start")
# Bare names from older tutorials; the Hub's current client accepts only namespace/name.
HUB_NAMES = {"wikitext": "Salesforce/wikitext", "squad": "rajpurkar/squad"}
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}

# ------------------------------------------------------------------------------------------------- documents


def load_documents(
    dataset_name: str,
    dataset_config: str | None = None,
    text_column: str | None = None,
    start_idx: int = 0,
    end_idx: int | None = None,
    sample_kind: str = "abstracts",
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The documents to train on and those to evaluate on.

    Args:
        dataset_name: "sample", "sample-abstracts", "sample-questions", "sample-paragraphs", a local file or directory
            (.jsonl .json .csv .parquet .txt), or NAMESPACE/NAME on the Hub (or a key of `HUB_NAMES`).
        dataset_config: the Hub dataset's configuration name.
        text_column: column that holds the text; by default `text`, or the only column of strings, or what
            `render_questions` makes of SQuAD's columns.
        start_idx, end_idx: slice of the non-blank training documents, end exclusive; None is the last.
        sample_kind: which sample text "sample" stands for.

    Returns:
        (train, held_out), with the column `text`, for questions also with `PLACES`. Held out is the validation split if
        there is one, otherwise every fiftieth non-blank document of the whole training split.

    Raises:
        UserError: nothing there, an unknown column, a slice that is empty or out of range.
    """
    splits = _load_splits(dataset_name, dataset_config, sample_kind)
    if "train" not in splits:
        raise UserError(f"--dataset_name {dataset_name} has no train split; it has {', '.join(splits)}")
    train = _text_only(splits["train"], text_column, dataset_name)
    if not len(train):
        raise UserError(f"--dataset_name {dataset_name}: every document is blank")
    last = len(train) if end_idx is None else end_idx
    if not 0 <= start_idx <= len(train) or not 0 <= last <= len(train):
        raise UserError(
            f"--start_idx {start_idx} --end_idx {last} reach outside {dataset_name}, which has {len(train):,} "
            "non-blank documents"
        )
    if start_idx >= last:
        raise UserError(f"--start_idx {start_idx} --end_idx {last} leave no document to train on: the slice is empty")
    chosen = np.arange(start_idx, last)
    validation = next((splits[name] for name in ("validation", "dev", "valid") if name in splits), None)
    if validation is not None:
        held_out = _text_only(validation, text_column, dataset_name)
    else:
        fiftieth = np.arange(HELD_OUT_EVERY - 1, len(train), HELD_OUT_EVERY)
        held_out = train.select(fiftieth)
        chosen = chosen[chosen % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    if not len(chosen):
        raise UserError(
            f"--start_idx {start_idx} --end_idx {last} leave no document to train on (every fiftieth is held out)"
        )
    return train.select(chosen), held_out


def load_test_documents(
    dataset_name: str,
    dataset_config: str | None = None,
    text_column: str | None = None,
    sample_kind: str = "abstracts",
) -> datasets.Dataset:
    """The non-blank documents of the test split as `load_documents` returns them, none where there is no such split."""
    splits = _load_splits(dataset_name, dataset_config, sample_kind)
    return _text_only(splits["test"] if "test" in splits else splits["train"].select([]), text_column, dataset_name)


@functools.lru_cache(maxsize=1)  # training, held-out and test documents are asked for one after another
def _load_splits(name, config, sample_kind):
    if sample.is_sample(name):
        name = str(sample.resolve_sample_dataset(name, sample_kind))
    path = Path(os.path.expanduser(name))
    if not name:
        raise UserError("--dataset_name is empty")
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise UserError(f"--dataset_name {name}: cannot read '{path.suffix}' files, only {' '.join(FORMATS)}")
            if not path.stat().st_size:
                raise UserError(f"--dataset_name {name}: the file is empty, not one document")
            return datasets.load_dataset(FORMATS[path.suffix], data_files={"train": glob.escape(str(path))})
        if path.is_dir():
            if (path / "dataset_dict.json").exists():
                return datasets.load_from_disk(str(path))
            if (path / "state.json").exists():
                return {"train": datasets.load_from_disk(str(path))}
            return datasets.load_dataset(str(path))
        if name.startswith((".", "/", "~")) or path.suffix in FORMATS:
            raise UserError(f"--dataset_name {name}: no such file or directory")
        if not re.fullmatch("[^/]+/[^/]+", HUB_NAMES.get(name, name)):
            raise UserError(
                f"--dataset_name {name}: no such file or directory, and datasets on the Hub are named NAMESPACE/NAME, "
                "such as Salesforce/wikitext"
            )
        return datasets.load_dataset(HUB_NAMES.get(name, name), config)
    except UserError:
        raise
    except Exception as error:
        # `datasets` wraps what went wrong; the innermost message names the line or the column.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(cause)
        if "corresponds to no data" in reason:
            reason = "there is not one document in it"
        raise UserError(f"--dataset_name {name} cannot be read: {reason}") from error


def _text_only(split, column, name):
    """The split's text column, renamed to `text`, or its questions rendered as text; without blank documents."""
    strings = [
        key for key, feature in split.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if column is None and "text" not in split.column_names and {"question", "context"} <= set(split.column_names):
        answers = next((key for key in ("answers", "answer") if key in split.column_names), None)
        if answers:
            for part in ("question", "context"):
                if part not in strings:
                    raise UserError(f"--dataset_name {name}: its {part}s are {split.features[part]}, not text")
            split = split.select_columns(["question", "context", answers])
            rendered = split.map(
                render_questions, batched=True, input_columns=split.column_names, remove_columns=split.column_names
            )
            return rendered.filter(_not_blank, batched=True)
    if column is None:
        column = "text" if "text" in split.column_names else strings[0] if len(strings) == 1 else None
        if column is None:
            raise UserError(
                f"--dataset_name {name}: say which column holds the text with --text_column; it has "
                f"{', '.join(split.column_names)}"
            )
    if column not in split.column_names:
        raise UserError(f"--text_column {column} is not in {name}, which has {', '.join(split.column_names)}")
    if column not in strings:
        raise UserError(f"--text_column {column} of {name} holds {split.features[column]}, not text")
    split = split.select_columns([column])
    if column != "text":
        split = split.rename_column(column, "text")
    return split.filter(_not_blank, batched=True)


def render_questions(questions: list[str | None], contexts: list[str | None], answers: list) -> dict[str, list]:
    """SQuAD's columns as text to learn from: `Question: … Context: … Answer: …`.

    Args:
        answers: one for each question: a string, a list of strings, or SQuAD's `{"text": [...]}`. The first counts.

    Returns:
        Columns `text`, empty where question or answer is blank (SQuAD 2 has questions without an answer), and `PLACES`.
    """
    columns = {name: [] for name in ("text", *PLACES)}
    for question, context, answer in zip(questions, contexts, answers, strict=True):
        question, context, answer = ((part or "").strip() for part in (question, context, _first_answer(answer)))
        asked = f"Question: {question} Context:"
        given = f"{asked} {context}"
        text = f"{given} Answer: {answer}" if question and answer else ""
        for column, value in zip(columns, (text, len(asked), len(given), len(text) - len(answer)), strict=True):
            columns[column].append(value)
    return columns


def _first_answer(answers):
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list):
        return _first_answer(answers[0]) if answers else ""
    if isinstance(answers, int | float):  # which a column of nothing but numbers is read as
        return "" if answers != answers else f"{answers:.15g}"
    if not isinstance(answers, str | None):
        raise UserError(f"an answer is {one_line(answers)}: neither text, nor a list of texts, nor SQuAD's answers")
    return answers


def _not_blank(batch):
    return [bool(text and text.strip()) for text in batch["text"]]


# -------------------------------------------------------------------------------------------------- tokenize


def tokenize(documents: datasets.Dataset, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, int32, the end-of-text token last."""
    return [ids for ids, *_ in _tokenize(documents, tokenizer)]


def tokenize_questions(
    documents: datasets.Dataset, tokenizer: Tokenizer, max_length: int
) -> list[tuple[np.ndarray, int]]:
    """(token ids as `tokenize` gives them, index of the answer's first token) for each question.

    If a question is longer than a row, the end of its context is left out, so that the answer keeps its question.

    Args:
        documents: with the columns `PLACES`.
        max_length: T, tokens per row.
    """
    questions = []
    for ids, context_start, context_end, answer_start in _tokenize(documents, tokenizer):
        excess = min(max(len(ids) - max_length, 0), context_end - context_start)
        questions.append((np.delete(ids, np.s_[context_end - excess : context_end]), answer_start - excess))
    return questions


def _tokenize(documents, tokenizer):
    """For each document its ids, and for a question the index of the token at each of `PLACES`."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token (eos_token)")
    places = [name for name in PLACES if name in documents.column_names]
    if places and not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} cannot tell where in a text its tokens are")

    def ids(batch):
        tokens = tokenizer(batch["text"], add_special_tokens=True, verbose=False, return_offsets_mapping=bool(places))
        columns = {
            "ids": [
                row if row[-1:] == [tokenizer.eos_token_id] else [*row, tokenizer.eos_token_id]
                for row in tokens["input_ids"]
            ]
        }
        for name in places:
            # The first token that ends behind the place: with many tokenizers the space before it is part of it.
            columns[f"{name}_token"] = [
                next((number for number, (_, end) in enumerate(offsets) if end > place), len(offsets))
                for offsets, place in zip(tokens["offset_mapping"], batch[name], strict=True)
            ]
        return columns

    tokenized = documents.map(ids, batched=True, remove_columns=documents.column_names)
    tokenized.set_format("numpy")
    for batch in tokenized.iter(1000):
        for row, *numbers in zip(*batch.values(), strict=True):
            yield np.asarray(row, dtype=np.int32), *map(int, numbers)


# ------------------------------------------------------------------------------------------------------ rows


class Counts(NamedTuple):
    """What some rows hold.

    Attributes:
        tokens: real ones, without padding.
        targets: tokens that have a loss.
        samples: documents that begin there.
        squared_lengths: the sum over chunks of their length squared; attention looks at half as many pairs.
    """

    tokens: int
    targets: int
    samples: int
    squared_lengths: int


@dataclass
class Rows:
    """Documents cut into chunks and laid out in rows.

    Attributes:
        chunks: token ids of each chunk, int32.
        is_first: for each chunk whether it is the first of its document.
        loss_start: for each chunk the index of its first target: 1, or where the answer to a question begins.
        row_chunks: for each row the numbers of its chunks, in order.
        max_length: T, tokens per row.
    """

    chunks: list[np.ndarray]
    is_first: list[bool]
    loss_start: list[int]
    row_chunks: list[list[int]]
    max_length: int

    def __post_init__(self) -> None:
        # Per row: tokens, targets, documents, sum of squared chunk lengths. The last row, which -1 selects, is zeros.
        counts = np.zeros((len(self.row_chunks) + 1, 4), dtype=np.int64)
        for row, numbers in enumerate(self.row_chunks):
            lengths = np.array([len(self.chunks[number]) for number in numbers])
            begun = sum(self.is_first[number] for number in numbers)
            untaught = sum(self.loss_start[number] for number in numbers)
            counts[row] = lengths.sum(), lengths.sum() - untaught, begun, (lengths**2).sum()
        self._counts = counts
        self.longest = max(map(len, self.chunks), default=0)
        self.padded = all(len(numbers) == 1 for numbers in self.row_chunks)

    def __len__(self) -> int:
        return len(self.row_chunks)

    def count(self, rows: np.ndarray | list[int]) -> Counts:
        """Totals over those rows. A row number of -1 is an empty row."""
        return Counts(*(int(total) for total in self._counts[rows].sum(axis=0)))

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens each of those rows holds, an array of the same shape."""
        return self._counts[rows, 0]

    def width(self, rows: np.ndarray) -> int:
        """How many columns of those rows are worth computing: where each row is one document, those that hold a token
        of any, rounded up to a multiple of 64."""
        if not self.padded:
            return self.max_length
        return min(self.max_length, max(64, -(-int(self.lengths(rows).max()) // 64) * 64))

    @property
    def mean_context_len(self) -> float:
        """How many tokens a token attends to on average: half of its own chunk's length."""
        tokens, _, _, squares = self._counts.sum(axis=0)
        return float(squares / tokens / 2)

    def collate(self, rows: np.ndarray | Sequence[int], pad_id: int = 0) -> dict[str, torch.Tensor]:
        """Tensors of those rows, int64 [len(rows), T] each.

        `input_ids`; `position_ids`, 0 where a document begins; `labels` in HF's convention (the label of a token
        is the token), -100 for what comes before a chunk's first target and for padding. Padding is recognized by its
        place, never by its id: with pad = eos the end-of-text token is still a target. A row number of -1 gives a row
        of padding, so that a last batch keeps its shape and adds nothing to the loss.
        """
        shape = (len(rows), self.max_length)
        input_ids = np.full(shape, pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        position_ids = np.tile(np.arange(self.max_length), (len(rows), 1))
        for i, row in enumerate(rows):
            place = 0
            for number in self.row_chunks[row] if row >= 0 else ():
                chunk = self.chunks[number]
                end = place + len(chunk)
                input_ids[i, place:end] = chunk
                loss_start = self.loss_start[number]
                labels[i, place + loss_start : end] = chunk[loss_start:]
                position_ids[i, place:] -= position_ids[i, place]
                place = end
            # Behind the last document positions count on, but no further than the longest document goes.
            position_ids[i] %= self.longest
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "labels": torch.from_numpy(labels),
        }


def make_rows(
    documents: list[np.ndarray], max_length: int, packing: bool = True, loss_start: list[int] | None = None
) -> Rows:
    """Cuts documents into chunks of at most `max_length` tokens and lays them out in rows.

    Packing is best-fit: each chunk, in the order of the text, goes into the fullest row that still has room for it.
    If they were sorted by length first, the rows would be one percent fuller, but some would hold only short chunks.

    Args:
        documents: token ids of each document (see `tokenize`).
        loss_start: for each document the index of its first target; None is 1, all tokens but the first.
    """
    chunks, is_first, firsts = [], [], []
    for ids, first in zip(documents, loss_start or [1] * len(documents), strict=True):
        begun = False
        # Chunks overlap by one token; a document of one token has no target.
        for start in range(0, len(ids) - 1, max_length - 1):
            chunk = ids[start : start + max_length]
            if first - start >= len(chunk):
                continue  # it has no target
            chunks.append(chunk)
            is_first.append(not begun)
            firsts.append(max(first - start, 1))
            begun = True
    if not packing:
        return Rows(chunks, is_first, firsts, [[number] for number in range(len(chunks))], max_length)
    row_chunks = []
    rows_by_space = [[] for _ in range(max_length + 1)]
    occupied = 0  # bit s is set where some row has s places left: the tightest fit is one shift away
    for number, chunk in enumerate(chunks):
        length = len(chunk)
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                occupied &= ~(1 << space)
        else:
            space, row = max_length, len(row_chunks)
            row_chunks.append([])
        row_chunks[row].append(number)
        rows_by_space[space - length].append(row)
        occupied |= 1 << (space - length)
    return Rows(chunks, is_first, firsts, row_chunks, max_length)


# ------------------------------------------------------------------------------------------------------ order


def steps_in_epoch(rows: Rows, global_batch_size: int) -> int:
    return -(-len(rows) // global_batch_size)


def epoch_order(rows: Rows, global_batch_size: int, seed: int | None = None, epoch: int = 0) -> np.ndarray:
    """Row numbers of every optimizer step of an epoch, [steps, global_batch_size], the last filled up with -1.

    Depends on the seed and the epoch alone, not on the number of ranks. Without a seed the rows stay in order. Where
    each row is one document, those of a step are sorted by length, so that a micro-batch has little padding.
    """
    order = np.arange(len(rows))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    steps = _fill_up(order, global_batch_size).reshape(-1, global_batch_size)
    if not rows.padded:
        return steps
    return np.take_along_axis(steps, rows.lengths(steps).argsort(axis=1, kind="stable"), axis=1)


def _fill_up(order, multiple):
    """Row numbers followed by as many -1 as make their number a multiple."""
    return np.append(order, np.full(-len(order) % multiple, -1))


class RowDataset(torch.utils.data.Dataset):
    """Rows by their number, for PyTorch's DataLoader; an item is (rows, number)."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Rows, int]:
        return self.rows, number


class EpochOrder(torch.utils.data.Sampler):
    """`epoch_order` for PyTorch's DataLoader: every row number of an epoch, and -1 that fill up the last step."""

    def __init__(self, rows: Rows, global_batch_size: int, seed: int):
        self.arguments, self.epoch = (rows, global_batch_size, seed), 0

    def __len__(self) -> int:
        rows, global_batch_size, _ = self.arguments
        return steps_in_epoch(rows, global_batch_size) * global_batch_size

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(*self.arguments, self.epoch).flatten().tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def rows_of_rank(step_rows: np.ndarray, accumulation_steps: int, dp_world_size: int, dp_rank: int) -> np.ndarray:
    """This data-parallel rank's rows of a global batch, [accumulation_steps, micro-batch size]."""
    return step_rows.reshape(accumulation_steps, dp_world_size, -1)[:, dp_rank]


def micro_batches(
    rows: Rows,
    step_rows: np.ndarray,
    count: int,
    dp_world_size: int,
    dp_rank: int,
    device: torch.device,
    one_width: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's share of a global batch in `count` micro-batches, on the device, one after the other.

    There is no DataLoader with a sampler: every rank knows the order of all rows and takes its own. Row -1, which fills
    up an epoch's last step, is an empty one.

    Args:
        one_width: whether all micro-batches are `max_length` wide, otherwise each as its longest row (`Rows.width`).

    Yields:
        What `Rows.collate` makes of its rows, int64 [micro-batch size, T] each.
    """
    mine = rows_of_rank(step_rows, count, dp_world_size, dp_rank)
    # All of a step's rows go to the device in one copy: a copy a micro-batch would make the host wait each time.
    batch = {key: tensor.to(device) for key, tensor in rows.collate(mine.flatten()).items()}
    size = mine.shape[1]
    for number, micro_rows in enumerate(mine):
        width = rows.max_length if one_width else rows.width(micro_rows)
        here = slice(number * size, (number + 1) * size), slice(width)
        # A part that is only sometimes the whole width would be compiled for twice, once as contiguous.
        yield {key: tensor[here].contiguous() for key, tensor in batch.items()}


def eval_batches(rows: Rows, rows_at_once: int, most: int) -> list[np.ndarray]:
    """Row numbers for evaluation in batches of at most `most` x `rows_at_once`, a multiple of the latter each."""
    filled = _fill_up(np.arange(len(rows)), rows_at_once)
    return [filled[start : start + most * rows_at_once] for start in range(0, len(filled), most * rows_at_once)]


class Batch:
    """Rows that all data-parallel ranks process together: those of a training step, or some of the held-out ones.

    Iterating yields this rank's micro-batches, on its device, as (keyword arguments for a Hugging Face model,
    labels [B, T]).

    Attributes:
        counts: `Counts` of all ranks' rows.
        num_micro_batches: per rank.
        samples_seen: documents begun in the run up to and including this step; None for held-out rows.
    """

    def __init__(self, loader: "RowLoader", row_numbers: np.ndarray, samples_seen: int | None = None):
        self.loader, self.row_numbers, self.samples_seen = loader, row_numbers, samples_seen
        self.counts = loader.rows.count(row_numbers)
        self.num_micro_batches = len(row_numbers) // (loader.micro_batch_size * loader.dp_world_size)

    @property
    def targets_per_micro_batch(self) -> float:
        """Mean number of target tokens of a micro-batch, over all ranks."""
        return self.counts.targets / (self.num_micro_batches * self.loader.dp_world_size)

    def micro_batches(self, one_width: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches as tensors, see `micro_batches`."""
        loader = self.loader
        return micro_batches(
            loader.rows, self.row_numbers, self.num_micro_batches, loader.dp_world_size, loader.dp_rank, loader.device,
            one_width,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        loader = self.loader
        for tensors in self.micro_batches():
            inputs = attention.model_inputs(
                loader.config, tensors["input_ids"], tensors["position_ids"], loader.max_docs, loader.max_seqlen
            )
            yield inputs, tensors["labels"]


class RowLoader:
    """Gives a data-parallel rank its share of every batch of a split; `loader[step]` is the batch of an optimizer step.

    There is no DataLoader with a sampler: every rank computes the order of all rows, and takes its own.

    Args:
        rows: of the split.
        config: the model's, with `_attn_implementation` set before batches are iterated over.
        ds_config: with the three batch keys.
        max_docs, max_seqlen: see `attention_limits`.
        seed: of the order of rows.
        first_epoch: number of the run's first epoch; rows are shuffled differently in each epoch.
    """

    def __init__(
        self,
        rows: Rows,
        config: PreTrainedConfig,
        ds_config: dict,
        device: torch.device,
        dp_rank: int,
        max_docs: int,
        max_seqlen: int,
        seed: int,
        first_epoch: int = 0,
    ):
        self.rows, self.config, self.device, self.dp_rank = rows, config, device, dp_rank
        self.micro_batch_size = ds_config["train_micro_batch_size_per_gpu"]
        self.gradient_accumulation_steps = ds_config["gradient_accumulation_steps"]
        self.global_batch_size = ds_config["train_batch_size"]
        self.dp_world_size = self.global_batch_size // (self.micro_batch_size * self.gradient_accumulation_steps)
        self.max_docs, self.max_seqlen, self.seed, self.first_epoch = max_docs, max_seqlen, seed, first_epoch
        self.steps_per_epoch = steps_in_epoch(rows, self.global_batch_size)
        self._cached_epoch = functools.lru_cache(maxsize=1)(self._epoch)

    def _epoch(self, epoch):
        """(row numbers of each step of an epoch, documents begun up to and including each step)."""
        order = epoch_order(self.rows, self.global_batch_size, self.seed, self.first_epoch + epoch)
        return order, np.cumsum([self.rows.count(row_numbers).samples for row_numbers in order])

    def __getitem__(self, step: int) -> Batch:
        """The rows of an optimizer step, counted from 0: a pure function of rows, seed and step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, samples = self._cached_epoch(epoch)
        return Batch(self, order[step_in_epoch], epoch * int(samples[-1]) + int(samples[step_in_epoch]))

    def eval_batches(self, limit: int | None = None) -> list[Batch]:
        """All rows, in order; each batch has at most as many micro-batches as a training step.

        Args:
            limit: maximum number of batches; None for all.
        """
        rows_at_once = self.micro_batch_size * self.dp_world_size
        batches = eval_batches(self.rows, rows_at_once, self.gradient_accumulation_steps)
        return [Batch(self, row_numbers) for row_numbers in batches[:limit]]


# ------------------------------------------------------------------------------------------- for the scripts


class TextData(NamedTuple):
    """The three splits of a run.

    Attributes:
        packing: whether rows hold several documents.
        state: what decides which rows a step trains on; a resumed run must have the same.
        sample_kind: which text `--dataset_name sample` is.
        name: of the dataset; for the sample, which text it is.
    """

    train: RowLoader
    held_out: RowLoader
    test: RowLoader | None
    packing: bool
    state: dict[str, Any]
    sample_kind: str
    name: str


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
        UserError: see `load_documents` and `attention.choose_packing`; or the model has no embedding for a token.
    """
    log.info(describe_batch(ds_config, args.max_length))
    packing = attention.choose_packing(info.config, args.packing)
    splits = load_rows(args, info.tokenizer, sample_kind, packing, test)
    models.check_vocabulary(info.tokenizer, splits, info.config.vocab_size)
    for name, rows in zip(("train", "held out", "test"), splits, strict=False):
        if len(rows) or name != "test":
            log.info(describe(name, rows))
    limits = attention_limits(*splits)
    loaders = [
        RowLoader(rows, info.config, ds_config, device, dp_rank, *limits, args.seed, first_epoch) for rows in splits
    ]
    state = data_state(args, packing, splits[0], ds_config["train_batch_size"])
    name = sample.full_name(args.dataset_name, sample_kind)
    train, held_out, test_split = loaders if test else (*loaders, None)
    return TextData(train, held_out, test_split, packing, state, sample_kind, name)


def load_rows(
    args: Namespace, tokenizer: Tokenizer, sample_kind: str, packing: bool, test: bool = False
) -> tuple[Rows, ...]:
    """(training, held-out) rows of the text that the flags name, and with `test` those of its test split.

    There may be no rows held out, and none to test on.
    """
    parts = load_documents(
        args.dataset_name, args.dataset_config, args.text_column, args.start_idx, args.end_idx, sample_kind
    )
    if test:
        parts += (load_test_documents(args.dataset_name, args.dataset_config, args.text_column, sample_kind),)
    return tuple(rows_of(part, tokenizer, args, packing) for part in parts)


def rows_of(documents: datasets.Dataset, tokenizer: Tokenizer, args: Namespace, packing: bool) -> Rows:
    """Tokenizes documents and lays them out in rows, as the flags max_length and loss_on say."""
    if "answer_start" in documents.column_names:
        questions = tokenize_questions(documents, tokenizer, args.max_length)
        documents, answers = [ids for ids, _ in questions], [answer for _, answer in questions]
        return make_rows(documents, args.max_length, packing, answers if args.loss_on == "answer" else None)
    if args.loss_on == "answer":
        raise UserError(
            f"--loss_on answer: --dataset_name {args.dataset_name} is read as plain text, not as questions, contexts "
            "and answers"
        )
    return make_rows(tokenize(documents, tokenizer), args.max_length, packing)


def count_documents(args: Namespace, sample_kind: str) -> int:
    """Non-blank documents of the training split that the flags name: where a slice without --end_idx ends."""
    splits = _load_splits(args.dataset_name, args.dataset_config, sample_kind)
    return len(_text_only(splits["train"], args.text_column, args.dataset_name))


def attention_limits(*splits: Rows) -> tuple[int, int]:
    """(max_docs, max_seqlen) of `common.attention`: the most documents in a row, and the longest, over all splits.

    The padding behind a row's last document counts as more documents where it is longer than its split's longest.
    """
    splits = [rows for rows in splits if len(rows)]
    most = max(max(map(len, rows.row_chunks)) - (-rows.max_length // rows.longest) for rows in splits)
    return most, max(rows.longest for rows in splits)


def data_state(args: Namespace, packing: bool, rows: Rows, global_batch_size: int) -> dict[str, Any]:
    """What decides which rows a step trains on; a run can only be resumed if it is unchanged."""
    names = (
        "dataset_name",
        "dataset_config",
        "text_column",
        "start_idx",
        "end_idx",
        "max_length",
        "packing",
        "loss_on",
    )
    values = vars(args) | {"packing": packing, "rows": len(rows), "global_batch_size": global_batch_size}
    return {name: values[name] for name in (*names, "seed", "rows", "global_batch_size")}


def describe(name: str, rows: Rows) -> str:
    """One line for the run's head."""
    if not len(rows):
        return f"{name}: nothing, no evaluation"
    tokens, _, documents, _ = rows.count(np.arange(len(rows)))
    fill = tokens / (len(rows) * rows.max_length)
    return (
        f"{name}: {documents:,} documents, {tokens:,} tokens in {len(rows):,} rows of {rows.max_length} "
        f"({fill:.1%} filled)"
    )
