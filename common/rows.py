"""Rows of tokens: what they hold, their order (a function of seed and epoch), and each rank's share."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedConfig

from common import attention
from common.loss import IGNORE


class Counts(NamedTuple):
    """What some rows hold.

    Attributes:
        tokens: real ones, without padding.
        targets: tokens that contribute to the loss.
        samples: documents that begin in these rows.
        squared_lengths: the sum over chunks of their length squared; attention looks at half as many pairs.
    """

    tokens: int
    targets: int
    samples: int
    squared_lengths: int


class Layout(NamedTuple):
    """Which tokens are in which row. A chunk is a document, or a part of one that is longer than a row.

    Attributes:
        begins: int64 [chunks], row by row: the index of each chunk's first token among all tokens of the split.
        lengths: int32 [chunks], in tokens.
        row_begins: int64 [rows + 1]; row r consists of the chunks from row_begins[r] up to row_begins[r + 1].
        counts: int64 [rows + 1, 4], `Counts` of each row. The last row, which -1 selects, is zeros.
        max_token_id: int64 [1].
    """

    begins: np.ndarray
    lengths: np.ndarray
    row_begins: np.ndarray
    counts: np.ndarray
    max_token_id: np.ndarray


class Rows:
    """Documents cut into chunks and laid out in rows of tokens.

    Attributes:
        longest: tokens of the longest chunk.
        padded: whether each row is one chunk, without packing or by chance.
        num_truncated, num_left_out: conversations that lost turns to fit into a row, and those of them with none left.

    Args:
        ids: token ids of each document, lists of int32.
        loss_mask: for each token whether it contributes to the loss, lists of uint8; None is all tokens.
        layout: which of them are in which row.
        max_length: T, tokens per row.
    """

    num_truncated = num_left_out = 0

    def __init__(self, ids: pa.ChunkedArray, loss_mask: pa.ChunkedArray | None, layout: Layout, max_length: int):
        self.layout, self.max_length = layout, max_length
        self.longest = int(layout.lengths.max(initial=0))
        self.padded = len(layout.begins) == len(self)
        self._ids, self._loss_mask = _values(ids), loss_mask and _values(loss_mask)
        self._ends = np.cumsum([len(values) for values in self._ids])

    def __len__(self) -> int:
        return len(self.layout.row_begins) - 1

    def chunks(self, row: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Yields (index among all tokens, token ids, whether each contributes to the loss or None) of a row's chunks.

        A chunk's first token is never a target: nothing comes before it.
        """
        here = slice(*self.layout.row_begins[row : row + 2])
        begins, lengths = self.layout.begins[here], self.layout.lengths[here]
        for part, begin, length in zip(np.searchsorted(self._ends, begins, side="right"), begins, lengths, strict=True):
            start = begin - (self._ends[part] - len(self._ids[part]))
            stretch = slice(start, start + length)
            yield int(begin), self._ids[part][stretch], self._loss_mask and self._loss_mask[part][stretch]

    def count(self, rows: np.ndarray | list[int]) -> Counts:
        """Totals over those rows. A row number of -1 is an empty row."""
        return Counts(*(int(total) for total in self.layout.counts[rows].sum(axis=0)))

    @property
    def totals(self) -> Counts:
        """What all rows hold."""
        return Counts(*(int(total) for total in self.layout.counts.sum(axis=0)))

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """How many tokens each of those rows holds, an array of the same shape."""
        return self.layout.counts[rows, 0]

    def width(self, rows: np.ndarray) -> int:
        """Number of columns to compute: max_length, or if each row is one chunk the longest of these rows, rounded up
        to a multiple of 64."""
        if not self.padded:
            return self.max_length
        return min(self.max_length, max(64, -(-int(self.lengths(rows).max()) // 64) * 64))

    @property
    def has_loss_mask(self) -> bool:
        """Whether not every token contributes to the loss."""
        return self._loss_mask is not None

    @property
    def max_token_id(self) -> int:
        """The highest token id in the split."""
        return int(self.layout.max_token_id[0])

    @property
    def mean_context_len(self) -> float:
        """How many tokens a token attends to on average: half of its own chunk's length."""
        totals = self.totals
        return totals.squared_lengths / totals.tokens / 2

    def collate(self, rows: np.ndarray | Sequence[int], pad_id: int = 0) -> dict[str, torch.Tensor]:
        """Tensors of those rows, int64 [len(rows), T] each.

        `input_ids`; `position_ids`, 0 where a document begins; `labels` in HF's convention (the label of a token
        is the token), -100 for tokens that are not targets and for padding. Padding is recognized by its place, never
        by its id: with pad = eos the end-of-text token is still a target. A row number of -1 gives a row of padding, so
        that a last batch keeps its shape and adds nothing to the loss.
        """
        shape = (len(rows), self.max_length)
        input_ids = np.full(shape, pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        position_ids = np.tile(np.arange(self.max_length), (len(rows), 1))
        for i, row in enumerate(rows):
            place = 0
            for _, ids, loss_mask in self.chunks(row) if row >= 0 else ():
                end = place + len(ids)
                input_ids[i, place:end] = ids
                labels[i, place:end] = ids if loss_mask is None else np.where(loss_mask, ids, IGNORE)
                labels[i, place] = IGNORE
                position_ids[i, place:] -= position_ids[i, place]
                place = end
            # Positions continue into the padding, but stay below the longest chunk's length.
            position_ids[i] %= self.longest
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "labels": torch.from_numpy(labels),
        }


def _values(lists):
    """The values of all lists, an array for each part of the file that is mapped into memory."""
    return [part.flatten().to_numpy() for part in lists.chunks]


# ----------------------------------------------------------------------------------------- order and batches


def steps_in_epoch(rows: Rows, global_batch_size: int) -> int:
    return -(-len(rows) // global_batch_size)


def epoch_order(rows: Rows, global_batch_size: int, seed: int | None = None, epoch: int = 0) -> np.ndarray:
    """Row numbers of every optimizer step of an epoch, [steps, global_batch_size], the last filled up with -1.

    Depends only on the seed and the epoch, not on the number of ranks. Without a seed the rows stay in order. If each
    row is one chunk, those of a step are sorted by length, so that a micro-batch has little padding.
    """
    order = np.arange(len(rows))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    steps = _fill_up(order, global_batch_size).reshape(-1, global_batch_size)
    if not rows.padded:
        return steps
    return np.take_along_axis(steps, rows.lengths(steps).argsort(axis=1, kind="stable"), axis=1)


def _fill_up(order, multiple):
    """Row numbers, padded with -1 to a multiple of `multiple`."""
    return np.append(order, np.full(-len(order) % multiple, -1))


def eval_batches(rows: Rows, rows_at_once: int, most: int) -> list[np.ndarray]:
    """Row numbers for evaluation, in batches of up to `most` times `rows_at_once` rows."""
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
        """This rank's micro-batches on its device, one after the other, as `Rows.collate` makes them.

        Args:
            one_width: whether all are `max_length` wide, otherwise each as its longest row (`Rows.width`).
        """
        loader, rows = self.loader, self.loader.rows
        # [micro-batch, rank, row]: neighbors in the order run at the same time on different ranks.
        mine = self.row_numbers.reshape(self.num_micro_batches, loader.dp_world_size, -1)[:, loader.dp_rank]
        # All of a step's rows go to the device in one copy: with one per micro-batch the host would wait each time.
        batch = {key: tensor.to(loader.device) for key, tensor in rows.collate(mine.flatten()).items()}
        for number, micro_rows in enumerate(mine):
            width = rows.max_length if one_width else rows.width(micro_rows)
            here = slice(number * len(micro_rows), (number + 1) * len(micro_rows)), slice(width)
            # A full-width slice is contiguous, others are not; torch.compile would compile for both.
            yield {key: tensor[here].contiguous() for key, tensor in batch.items()}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        loader = self.loader
        for tensors in self.micro_batches():
            inputs = attention.model_inputs(
                loader.config, tensors["input_ids"], tensors["position_ids"], loader.max_docs, loader.max_seqlen
            )
            yield inputs, tensors["labels"]


class RowLoader:
    """Gives a data-parallel rank its share of every batch of a split; `loader[step]` is the batch of an optimizer step.

    It needs no DataLoader with a sampler: every rank computes the order of all rows and takes its share.

    Args:
        rows: of the split.
        config: the model's, with `_attn_implementation` set before batches are iterated over.
        ds_config: with the three batch keys.
        max_docs, max_seqlen: see `common.data.attention_limits`.
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
        return order, self.rows.layout.counts[order, 2].sum(axis=1).cumsum()

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
