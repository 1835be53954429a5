"""Rows, their order, and the micro-batches of each rank."""

import argparse
import random
from collections import Counter

import numpy as np
import pytest
import torch

from common import data
from common.attention import attention_arguments
from common.rows import Batch, RowLoader, epoch_order, eval_batches, steps_in_epoch
from helpers.token_rows import ids_in_row, rows_of_documents


def test_padded_rows_of_a_step_are_sorted_by_length_and_cut_to_the_longest():
    rows = rows_of_documents([range(2 + 4 * (i * 7 % 40)) for i in range(40)], 192, packing=False)
    plain = np.random.default_rng([3, 1]).permutation(len(rows))
    for step_rows, same in zip(epoch_order(rows, 10, 3, 1), plain.reshape(-1, 10), strict=True):
        assert sorted(step_rows) == sorted(same)
        lengths = [len(ids) for row in step_rows for ids in ids_in_row(rows, row)]
        assert lengths == sorted(lengths)
        assert rows.width(step_rows) == min(192, -(-lengths[-1] // 64) * 64)
        assert rows.width(step_rows[:1]) >= lengths[0]
    assert rows.width(np.array([-1, -1])) == 64
    packed = rows_of_documents([range(9)] * 40, 192)
    assert packed.width(np.array([0])) == 192


EOS = 0


LAYOUTS = [(length, packing) for length in (2, 3, 16, 50) for packing in (True, False)]


def random_documents(seed, count=60, longest=120):
    """Documents of distinct tokens, with the same last one."""
    draw = random.Random(seed)
    ids = iter(range(1, 1_000_000))
    lengths = [1, 2, 3, longest, *(draw.randint(1, draw.choice((8, longest))) for _ in range(count))]
    return [np.array([*(next(ids) for _ in range(length - 1)), EOS], dtype=np.int32) for length in lengths]


def pairs_of(documents):
    return Counter(pair for ids in documents for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))


def everything(rows, extra=0):
    """All rows collated, with `extra` filler rows at the end, as lists; pad = eos."""
    batch = rows.collate([*range(len(rows)), *[-1] * extra], pad_id=EOS)
    return zip(*(batch[key].tolist() for key in ("input_ids", "position_ids", "labels")), strict=True)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
@pytest.mark.parametrize("seed", range(2))
def test_every_token_but_a_documents_first_is_a_target_once(seed, length, packing):
    documents = random_documents(seed)
    learned, expected = Counter(), pairs_of(documents)
    for ids, positions, labels in everything(rows_of_documents(documents, length, packing), extra=2):
        assert len(ids) == len(positions) == len(labels) == length
        for t in range(length - 1):
            if labels[t + 1] != -100:
                assert labels[t + 1] == ids[t + 1]
                assert positions[t + 1] == positions[t] + 1  # both in one document, as attention sees it
                learned[ids[t], labels[t + 1]] += 1
        assert labels[0] == -100
    assert learned == expected
    # With pad = eos, the end of every document that has anything to predict it from is a target.
    assert sum(n for (_, target), n in learned.items() if target == EOS) == sum(len(ids) > 1 for ids in documents)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
def test_chunks_without_a_target_are_left_out(length, packing):
    documents, draw = random_documents(8), random.Random(8)
    starts = [draw.randint(0, len(ids)) for ids in documents]
    taught = [ids[max(start - 1, 0) :] for ids, start in zip(documents, starts, strict=True)]
    rows = rows_of_documents(documents, length, packing, starts)
    learned, whole = Counter(), np.concatenate(documents)
    for ids, _, labels in everything(rows):
        learned.update((ids[t - 1], labels[t]) for t in range(1, length) if labels[t] != -100)
    assert learned == pairs_of(taught)
    assert rows.totals[1:3] == (learned.total(), sum(len(ids) > 1 for ids in taught))
    for begin, ids, loss_mask in (chunk for row in range(len(rows)) for chunk in rows.chunks(row)):
        assert (ids == whole[begin : begin + len(ids)]).all()
        assert loss_mask[1:].any()


def test_packed_documents_that_fit_keep_their_own_positions():
    documents = random_documents(1, longest=30)
    place = {int(token): i for ids in documents for i, token in enumerate(ids[:-1])}
    rows = rows_of_documents(documents, 30)
    assert len(rows) < len(documents)
    seen = [
        (token, position)
        for ids, positions, _ in everything(rows)
        for token, position in zip(ids, positions, strict=True)
        if token != EOS
    ]
    assert all(place[token] == position for token, position in seen)
    assert len(seen) == len({token for token, _ in seen}) == len(place)


def test_filler_rows_have_no_target():
    rows = rows_of_documents(random_documents(2), 16)
    batch = rows.collate([-1, -1, -1], pad_id=7)
    assert (batch["labels"] == -100).all()
    assert (batch["input_ids"] == 7).all()
    assert batch["input_ids"].shape == batch["position_ids"].shape == (3, 16)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
def test_count_totals(length, packing):
    documents = random_documents(3)
    rows = rows_of_documents(documents, length, packing)
    every = np.arange(len(rows))
    tokens, targets, begun, squares = rows.count(every)
    assert targets == sum(pairs_of(documents).values())
    assert begun == sum(len(ids) > 1 for ids in documents)
    # Chunks overlap by a token: one more each, except for a document's first.
    chunks = sum(-(-(len(ids) - 1) // (length - 1)) for ids in documents)
    assert tokens == targets + chunks
    by_hand = 0
    for ids in documents:
        left = len(ids) - 1
        while left > 0:
            by_hand += (min(left, length - 1) + 1) ** 2
            left -= length - 1
    assert squares == by_hand
    assert rows.mean_context_len == pytest.approx(by_hand / tokens / 2)
    # Row by row they add up, a filler row adds nothing, and the targets are those in the labels.
    assert tuple(np.sum([rows.count([row]) for row in every], axis=0)) == (tokens, targets, begun, squares)
    assert rows.count([*every, -1, -1]) == rows.totals == (tokens, targets, begun, squares)
    assert rows.count([-1]) == (0, 0, 0, 0)
    some = every[::3]
    assert rows.count(some)[1] == int((rows.collate(some, EOS)["labels"] != -100).sum())


@pytest.mark.parametrize("one_width", [False, True])
def test_micro_batches_are_the_rows_of_a_rank(one_width):
    documents = [range(1, length + 1) for length in (10, 70, 30, 64, 200, 128, 65, 5)]
    rows = rows_of_documents(documents, 256, packing=False)
    step_rows = np.array([0, 1, 2, 3, 4, 5, 6, -1])
    widths = []
    for rank in range(2):
        batches = list(Batch(loader(rows, 2, 2, rank), step_rows).micro_batches(one_width))
        for number, batch in enumerate(batches):
            mine = step_rows[4 * number + 2 * rank :][:2]  # micro-batch by micro-batch, in it rank by rank
            expected = rows.collate(mine)
            width = batch["input_ids"].shape[1]
            widths.append(width)
            assert all(torch.equal(batch[key], expected[key][:, :width]) for key in expected)
            assert all(tensor.is_contiguous() for tensor in batch.values())
            assert (expected["labels"][:, width:] == -100).all()
    assert widths == ([256] * 4 if one_width else [128, 256, 64, 128])


def test_packing_takes_few_rows():
    documents = random_documents(4, count=2000, longest=50)
    rows = rows_of_documents(documents, 64)
    real = sum(len(ids) for ids in documents if len(ids) > 1)
    assert real <= len(rows) * 64 < 1.05 * real


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [(120, 9), (9, 120), (10, 3), (50, 50)], ids=str)
def test_attention_limits_hold_in_every_row(lengths, packing):
    splits = [
        rows_of_documents(random_documents(i, count=count, longest=longest), 50, packing)
        for i, (count, longest) in enumerate(zip((60, 4), lengths, strict=True))
    ]
    most, longest = data.attention_limits(*splits)
    for rows in splits:
        for row in [*range(len(rows)), -1]:
            positions = rows.collate([row], EOS)["position_ids"]
            assert int(positions.max()) < min(longest, rows.longest)
            assert int((positions == 0).sum()) <= most
            # So `varlen` has a place for each document and its kernel looks at no token too few.
            cu_seqlens = attention_arguments("varlen", positions, most, longest)["cu_seqlens"]
            assert cu_seqlens.diff().max() <= longest


def test_attention_limits_without_held_out_rows():
    rows = rows_of_documents(random_documents(0), 50)
    assert data.attention_limits(rows, rows_of_documents([], 50)) == data.attention_limits(rows)


def test_order_depends_only_on_seed_and_epoch():
    rows = rows_of_documents(random_documents(5), 16)

    def order(batch, *arguments):
        numbers = epoch_order(rows, batch, *arguments)
        assert numbers.shape == (steps_in_epoch(rows, batch), batch)
        real, filler = numbers.flatten()[: len(rows)], numbers.flatten()[len(rows) :]
        assert sorted(real) == list(range(len(rows)))
        assert len(filler) < batch and (filler == -1).all()
        return real.tolist()

    first = order(8, 42, 0)
    assert first == order(8, 42, 0) == order(3, 42, 0) == order(len(rows), 42, 0) == order(len(rows) + 5, 42, 0)
    random.seed(1)
    np.random.seed(1)
    assert first == order(8, 42, 0)  # whatever the global generators' state
    orders = [first, order(8, 42, 1), order(8, 43, 0), order(8, 43, 1), list(range(len(rows)))]
    assert len(set(map(tuple, orders))) == len(orders)
    assert order(8) == list(range(len(rows)))


@pytest.mark.parametrize(("accumulation", "ranks", "micro"), [(1, 1, 1), (4, 1, 2), (1, 4, 2), (3, 2, 5), (16, 8, 2)])
def test_ranks_partition_a_global_batch(accumulation, ranks, micro):
    rows = rows_of_documents([[number, number] for number in range(1000)], 2, packing=False)
    step = np.random.default_rng(0).permutation(1000)[: accumulation * ranks * micro]
    batches = [Batch(loader(rows, accumulation, ranks, rank, micro), step) for rank in range(ranks)]
    # Each row's first token is its number.
    shares = [[tensors["input_ids"][:, 0].numpy() for tensors in batch.micro_batches()] for batch in batches]
    assert all(np.shape(share) == (accumulation, micro) for share in shares)
    assert sorted(np.ravel(shares)) == sorted(step)
    # Each micro-step is the same stretch of the batch whatever the number of ranks.
    for number in range(accumulation):
        stretch = step[number * ranks * micro : (number + 1) * ranks * micro]
        assert sorted(np.concatenate([share[number] for share in shares])) == sorted(stretch)


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (4, 3), (7, 100), (1000, 2)])
def test_evaluation_sees_every_row_once(at_once, most):
    rows = rows_of_documents(random_documents(6), 16)
    batches = eval_batches(rows, at_once, most)
    assert all(len(batch) % at_once == 0 and len(batch) <= most * at_once for batch in batches)
    assert [row for row in np.concatenate(batches) if row >= 0] == list(range(len(rows)))
    assert sum(map(len, batches)) - len(rows) < at_once


def loader(rows, accumulation, ranks, rank, micro=2, first_epoch=0):
    config = argparse.Namespace(model_type="llama", _attn_implementation="sdpa")
    ds_config, limits = batches_of(micro, accumulation, ranks), data.attention_limits(rows)
    return RowLoader(rows, config, ds_config, torch.device("cpu"), rank, *limits, seed=42, first_epoch=first_epoch)


def batches_of(micro, accumulation, ranks):
    """The batch keys of a DeepSpeed JSON."""
    return {
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * ranks,
    }  # fmt: skip


def test_loader_batch_is_a_function_of_the_step():
    rows = rows_of_documents(random_documents(7), 16)
    loaded = loader(rows, accumulation=2, ranks=2, rank=0)
    steps = 2 * loaded.steps_per_epoch + 3
    orders = np.concatenate([epoch_order(rows, 8, 42, epoch) for epoch in range(3)])
    samples = 0
    for step in range(steps):
        batch = loaded[step]
        assert (batch.row_numbers == orders[step]).all()
        samples += rows.count(orders[step]).samples
        assert batch.samples_seen == samples
        assert batch.targets_per_micro_batch == rows.count(orders[step]).targets / 4
    later = loader(rows, accumulation=2, ranks=2, rank=0)[steps - 1]  # without the steps before it
    assert (later.row_numbers == batch.row_numbers).all() and later.samples_seen == samples
    shifted = loader(rows, accumulation=2, ranks=2, rank=0, first_epoch=1)[0]
    assert (shifted.row_numbers == orders[loaded.steps_per_epoch]).all()


def test_loader_ranks_have_the_micro_batches_of_a_step_together():
    rows = rows_of_documents(random_documents(7), 16)
    tokens = 0
    for rank in range(3):
        batch = loader(rows, accumulation=2, ranks=3, rank=rank)[1]
        micro_batches = list(batch)
        assert len(micro_batches) == batch.num_micro_batches == 2
        for inputs, labels in micro_batches:
            assert inputs["input_ids"].shape == labels.shape == (2, 16)
            tokens += int((labels != -100).sum())
    assert tokens == batch.counts.targets


def test_loader_eval_batches_are_all_rows_or_the_first():
    rows = rows_of_documents(random_documents(7), 16)
    loaded = loader(rows, accumulation=3, ranks=2, rank=1)
    numbers = np.concatenate([batch.row_numbers for batch in loaded.eval_batches()])
    assert [number for number in numbers if number >= 0] == list(range(len(rows)))
    assert [len(batch.row_numbers) for batch in loaded.eval_batches(limit=2)] == [12, 12]
