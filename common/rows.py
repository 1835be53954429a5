"""Rows of tokens: their content, their order (a function of seed and epoch), and each rank's share."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedConfig

from common import attention
from common.loss import IGNORE


class Counts(NamedTuple):
    """Totals over some rows.

    Attributes:
        tokens: real ones, without padding.
        targets: tokens that contribute to the loss.
        samples: documents that begin in these rows.
        squared_lengths: sum of the squared lengths of all chunks; attention computes half as many pairs.
    """

    tokens: int
    targets: int
    samples: int
    squared_lengths: int


class Layout(NamedTuple):
    """Which tokens are in which row. A chunk is a document, or part of one that is longer than a row.

    Attributes:
        begins: int64 [chunks], row by row: the index of each chunk's first token among all tokens of the split.
        lengths: int32 [chunks], in tokens.
        row_begins: int64 [rows + 1]; row r consists of chunks row_begins[r] to row_begins[r + 1] - 1.
        counts: int64 [rows + 1, 4], `Counts` of each row. The last row, which -1 selects, is zeros.
        max_token_id: int64 [1], of the split.
    """

    begins: np.ndarray
    lengths: np.ndarray
    row_begins: np.ndarray
    counts: np.ndarray
    max_token_id: np.ndarray


class Rows:
    """Documents laid out in rows of tokens.

    Attributes:
        longest: tokens of the longest chunk.
        padded: whether each row is one chunk, because of --no-packing or by chance.
        has_loss_mask: whether some tokens do not contribute to the loss.
        num_truncated, num_left_out: conversations that lost turns to fit into a row, and those that lost all.

    Args:
        ids: token ids of each document, lists of int32.
        loss_mask: for each token whether it contributes to the loss, lists of uint8; None if all do.
        max_length: T, tokens per row.
    """

    num_truncated = num_left_out = 0

    def __init__(self, ids: pa.ChunkedArray, loss_mask: pa.ChunkedArray | None, layout: Layout, max_length: int):
        self.layout, self.max_length, self.has_loss_mask = layout, max_length, loss_mask is not None
        self.max_token_id, self.longest = int(layout.max_token_id[0]), int(layout.lengths.max(initial=0))
        self.padded = len(layout.begins) == len(self)
        # One array per record batch of the memory-mapped file.
        self._ids = [part.flatten().to_numpy() for part in ids.chunks]
        self._loss_mask = loss_mask and [part.flatten().to_numpy() for part in loss_mask.chunks]
        self._ends = np.cumsum([len(values) for values in self._ids])

    def __len__(self) -> int:
        return len(self.layout.row_begins) - 1

    def chunks(self, row: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Yields each chunk of a row: (index among all tokens, token ids, loss mask or None).

        A chunk's first token is never a target, because nothing precedes it.
        """
        here = slice(*self.layout.row_begins[row : row + 2])
        begins, lengths = self.layout.begins[here], self.layout.lengths[here]
        for part, begin, length in zip(np.searchsorted(self._ends, begins, side="right"), begins, lengths, strict=True):
            start = begin - (self._ends[part] - len(self._ids[part]))
            tokens = slice(start, start + length)
            yield int(begin), self._ids[part][tokens], self._loss_mask[part][tokens] if self._loss_mask else None

    def count(self, rows: np.ndarray | Sequence[int] | slice) -> Counts:
        """Returns totals over those rows. Row -1 is empty."""
        return Counts(*map(int, self.layout.counts[rows].sum(axis=0)))

    @property
    def totals(self) -> Counts:
        """Totals over all rows."""
        return self.count(slice(None))

    @property
    def mean_context_len(self) -> float:
        """The number of tokens that a token attends to, on average: half the length of its chunk."""
        return self.totals.squared_lengths / self.totals.tokens / 2

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens in each of those rows, in the same shape."""
        return self.layout.counts[rows, 0]

    def width(self, rows: np.ndarray) -> int:
        """Returns the number of columns to compute for those rows: `max_length`, or in padded rows fewer.

        There it is the length of the longest, rounded up to a multiple of 64.
        """
        if not self.padded:
            return self.max_length
        return min(self.max_length, max(64, math.ceil(self.lengths(rows).max() / 64) * 64))

    def collate(self, rows: np.ndarray | Sequence[int], pad_id: int = 0) -> dict[str, torch.Tensor]:
        """Returns the tensors of those rows, int64 [len(rows), T] each.

        `input_ids`; `position_ids`, 0 where a document begins; and `labels` in HF's convention (the label of a token is
        the token itself), -100 for padding and other tokens that are not targets. Padding is defined by position, not
        by id: with pad = eos the end-of-text token is still a target. Row -1 is all padding; it fills up the last
        batch, without adding to the loss.
        """
        shape = (len(rows), self.max_length)
        input_ids = np.full(shape, pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        position_ids = np.tile(np.arange(self.max_length), (len(rows), 1))
        for i, row in enumerate(rows):
            begin = 0
            for _, ids, loss_mask in self.chunks(row) if row >= 0 else ():
                end = begin + len(ids)
                input_ids[i, begin:end] = ids
                labels[i, begin:end] = ids if loss_mask is None else np.where(loss_mask, ids, IGNORE)
                labels[i, begin] = IGNORE
                position_ids[i, begin:] -= position_ids[i, begin]
                begin = end
            # Positions continue into the padding, but stay below the longest chunk's length.
            position_ids[i] %= self.longest
        tensors = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in tensors.items()}


# ----------------------------------------------------------------------------------------- order and batches


def steps_in_epoch(rows: Rows, global_batch_size: int) -> int:
    return math.ceil(len(rows) / global_batch_size)


def epoch_order(rows: Rows, global_batch_size: int, seed: int | None = None, epoch: int = 0) -> np.ndarray:
    """Returns the row numbers of each step of an epoch, [steps, global_batch_size], the last filled up with -1.

    They depend on the seed and the epoch, not on the number of ranks. Without a seed the rows stay in order. Padded
    rows of a step are sorted by length, so that a micro-batch has little padding.
    """
    order = np.arange(len(rows))
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    steps = _fill_up(order, global_batch_size).reshape(-1, global_batch_size)
    if not rows.padded:
        return steps
    return np.take_along_axis(steps, rows.lengths(steps).argsort(axis=1, kind="stable"), axis=1)


def _fill_up(order: np.ndarray, multiple: int) -> np.ndarray:
    return np.append(order, np.full(-len(order) % multiple, -1))


def eval_batches(rows: Rows, rows_at_once: int, most: int) -> list[np.ndarray]:
    """Returns all row numbers in order, in batches of up to `most` times `rows_at_once`, filled up with -1."""
    filled, size = _fill_up(np.arange(len(rows)), rows_at_once), most * rows_at_once
    return [filled[start : start + size] for start in range(0, len(filled), size)]


class Batch:
    """Rows that all data-parallel ranks process together: those of a training step, or some held-out ones.

    Attributes:
        counts: totals over the rows of all ranks.
        num_micro_batches: per rank.
        samples_seen: documents begun from the start of the run to the end of this step; None for held-out rows.
    """

    def __init__(self, loader: "RowLoader", row_numbers: np.ndarray, samples_seen: int | None = None):
        self.loader, self.row_numbers, self.samples_seen = loader, row_numbers, samples_seen
        self.counts = loader.rows.count(row_numbers)
        self.num_micro_batches = len(row_numbers) // (loader.micro_batch_size * loader.dp_world_size)

    @property
    def targets_per_micro_batch(self) -> float:
        """The mean number of target tokens per micro-batch, over all ranks."""
        return self.counts.targets / (self.num_micro_batches * self.loader.dp_world_size)

    def micro_batches(self, one_width: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the tensors of `Rows.collate` for each of this rank's micro-batches, on its device.

        Args:
            one_width: all are `max_length` wide, instead of `Rows.width`.
        """
        loader, rows = self.loader, self.loader.rows
        # [micro-batch, rank, row]: neighbors in the order run at the same time on different ranks.
        mine = self.row_numbers.reshape(self.num_micro_batches, loader.dp_world_size, -1)[:, loader.dp_rank]
        # All rows of a step go to the device in one copy; the host would wait for each copy of a micro-batch.
        batch = {key: tensor.to(loader.device) for key, tensor in rows.collate(mine.flatten()).items()}
        for number, micro_rows in enumerate(mine):
            width = rows.max_length if one_width else rows.width(micro_rows)
            here = slice(number * len(micro_rows), (number + 1) * len(micro_rows)), slice(width)
            # A full-width slice is contiguous, others are not; torch.compile would compile for both.
            yield {key: tensor[here].contiguous() for key, tensor in batch.items()}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Yields (keyword arguments for a Hugging Face model, labels [B, T]) for each of this rank's micro-batches."""
        limits = self.loader.max_docs, self.loader.max_seqlen
        for tensors in self.micro_batches():
            ids, positions = tensors["input_ids"], tensors["position_ids"]
            yield attention.model_inputs(self.loader.config, ids, positions, *limits), tensors["labels"]


class RowLoader:
    """A data-parallel rank's share of a split; `loader[step]` is the batch of an optimizer step.

    Each rank computes the order of all rows and takes its share, so there is no sampler to resume.

    Args:
        config: the model's; `_attn_implementation` must be set before iterating over batches.
        ds_config: with the three batch keys.
        max_docs, max_seqlen: see `common.data.attention_limits`.
        seed: of the order of rows.
        first_epoch: number of the run's first epoch; each epoch has its own order.
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

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (row numbers of each step of an epoch, documents begun by the end of each step)."""
        order = epoch_order(self.rows, self.global_batch_size, self.seed, self.first_epoch + epoch)
        return order, self.rows.layout.counts[order, 2].sum(axis=1).cumsum()

    def __getitem__(self, step: int) -> Batch:
        """Returns the rows of an optimizer step, counted from 0: a pure function of rows, seed and step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        order, samples = self._cached_epoch(epoch)
        return Batch(self, order[step_in_epoch], epoch * int(samples[-1]) + int(samples[step_in_epoch]))

    def eval_batches(self, limit: int | None = None) -> list[Batch]:
        """Returns all rows in order, or the first `limit` batches, each with at most the micro-batches of a step."""
        rows_at_once = self.micro_batch_size * self.dp_world_size
        batches = eval_batches(self.rows, rows_at_once, self.gradient_accumulation_steps)
        return [Batch(self, row_numbers) for row_numbers in batches[:limit]]
