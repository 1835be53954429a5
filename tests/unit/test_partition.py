"""Which layer goes to which stage, and the costs and memory that decide it."""

import functools
import itertools
import json
import math
import random
import re

import pytest
import torch
from transformers import LlamaConfig

from common import memory
from common.errors import UserError
from helpers.launch import ROOT
from pipeline import partition

LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def brute_force(costs, num_stages):
    """Cost of the slowest stage in the best split in which no stage is idle."""
    results = []
    for inner in itertools.combinations(range(1, len(costs)), num_stages - 1):
        stages = [costs[a:b] for a, b in itertools.pairwise((0, *inner, len(costs)))]
        if all(any(stage) for stage in stages):
            results.append(max(map(sum, stages)))
    return min(results)


@pytest.mark.parametrize("seed", range(40))
def test_balance_finds_the_best_split(seed):
    draw = random.Random(seed)
    count = draw.randint(2, 7)
    costs = [0, *[draw.choice((5, draw.randint(1, 20))) for _ in range(count)], 0, draw.randint(1, 40)]
    for num_stages in range(1, count + 2):
        bounds = memory.balance(costs, num_stages)
        assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == num_stages + 1
        stages = [costs[a:b] for a, b in itertools.pairwise(bounds)]
        assert all(any(stage) for stage in stages)
        assert max(map(sum, stages)) == brute_force(costs, num_stages)


def decoder_layers(bounds, count):
    """Decoder layers per stage, from the bounds."""
    return [sum(1 <= layer <= count for layer in range(a, b)) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("mean_context_len", [1, 60, 128, 512])
def test_partition_llama_1b_on_two_stages_is_10_and_6(mean_context_len):
    bounds = partition.partition(LLAMA_1B, 2, "balanced", mean_context_len)
    assert bounds == [0, 11, 19]
    assert decoder_layers(bounds, 16) == [10, 6]


def peak_of_llama_1b(dtype=torch.float16, micro_batches=16, rows=2, length=1024, num_stages=2):
    return functools.partial(
        memory.stage_peak, LLAMA_1B, memory.layer_sizes(LLAMA_1B), num_stages, dtype=dtype, dp_world_size=1,
        micro_batches=micro_batches, rows=rows, length=length,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "length", "counts", "checkpointing"),
    [
        (78, 1024, [10, 6], False),
        (22.5, 1024, [10, 6], False),
        (13.5, 1024, [8, 8], True),  # two T4s: the README's command
        (13.5, 512, [8, 8], False),  # and the seed's
    ],
)
def test_plan_stages_fits_llama_1b_into_small_gpus(gib, length, counts, checkpointing):
    peak = peak_of_llama_1b(length=length)
    bounds, recompute = partition.plan_stages(LLAMA_1B, 2, "balanced", 60, peak, gib * memory.GIB)
    assert (decoder_layers(bounds, 16), recompute) == (counts, checkpointing)
    assert all(peak(s, *part, recompute) < gib * memory.GIB for s, part in enumerate(itertools.pairwise(bounds)))


def test_plan_stages_keeps_given_choices():
    plan = functools.partial(partition.plan_stages, LLAMA_1B, 2)
    peak, small = peak_of_llama_1b(), 13.5 * memory.GIB
    assert plan("balanced", 60, peak, math.inf) == ([0, 11, 19], False)
    assert plan("balanced", 60, peak, math.inf, checkpointing=True)[1] is True
    assert plan("balanced", 60, peak, small, checkpointing=False) == ([0, 9, 19], False)  # none fits, this one nearly
    assert plan("balanced", 60, peak, 5 * memory.GIB) == ([0, 11, 19], True)
    assert plan("10,6", 60, peak, small) == ([0, 11, 19], True)
    assert plan("balanced", 60, peak, small, bounds=[0, 10, 19]) == ([0, 10, 19], True)
    assert plan("balanced", 60, peak, math.inf, bounds=[0, 10, 19]) == ([0, 10, 19], False)


@pytest.mark.parametrize("seed", range(20))
def test_balance_finds_the_best_split_that_fits(seed):
    draw = random.Random(seed)
    costs = [0, *[draw.randint(1, 20) for _ in range(6)], 0, draw.randint(1, 40)]
    limits = [draw.randint(1, 4) for _ in range(3)]  # layers per stage

    def fits(stage, start, end):
        return end - start <= limits[stage] + 2 * (start == 0 or end == len(costs))

    splits = [
        (0, *inner, len(costs)) for inner in itertools.combinations(range(2, 8), 2)
    ]  # the norm stays with the head
    splits = [split for split in splits if all(fits(s, *part) for s, part in enumerate(itertools.pairwise(split)))]
    best = min((max(sum(costs[a:b]) for a, b in itertools.pairwise(split)) for split in splits), default=None)
    bounds = memory.balance(costs, 3, fits)
    assert (bounds and max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))) == best


MEASURED = json.loads((ROOT / "tests" / "benchmarks" / "results" / "pipeline.json").read_text())


@pytest.mark.parametrize("name", [name for name in MEASURED if name.startswith("as on two T4s")])
def test_stage_peak_equals_the_measured_one(name):
    """`layer_activations` counts the activations of PyTorch's own kernels, which ran there."""
    split = "".join(MEASURED[name]["split"])
    first = int(re.search(r"(\d+) decoder layers", split)[1])
    length = int(re.search(r"(\d+) tokens", name)[1])
    peak = peak_of_llama_1b(length=length)
    checkpointing = "activation checkpointing: on" in split
    for stage, part in enumerate(itertools.pairwise([0, 1 + first, 19])):
        measured = MEASURED[name]["stages"][stage]["gpu_peak_gib"]
        assert peak(stage, *part, checkpointing) / memory.GIB == pytest.approx(measured, rel=0.05)


def test_layer_costs_and_sizes_of_llama_1b():
    untied = LlamaConfig(**{**LLAMA_1B.to_dict(), "tie_word_embeddings": False})
    for config in (LLAMA_1B, untied):
        sizes = memory.layer_sizes(config)
        assert len(sizes) == 19 and sizes[0] == sizes[18] == 128256 * 2048
        assert sum(sizes) == 1_235_814_400 + 128256 * 2048
    costs = memory.layer_costs(LLAMA_1B, 60)
    assert len(costs) == 19
    assert costs[0] == costs[17] == 0
    assert costs[18] / costs[1] == pytest.approx(4.3, abs=0.05)
    # A block: query and output 2048 x 2048, key and value 2048 x 512, three of 2048 x 8192, two norms.
    block = 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    assert costs[1] == 6 * block + 12 * 64 * 32 * 60


@pytest.mark.parametrize(
    ("stages", "method", "expected"),
    [
        (1, "uniform", [16]),
        (2, "uniform", [8, 8]),
        (3, "uniform", [6, 5, 5]),
        (16, "uniform", [1] * 16),
        (2, "11,5", [11, 5]),
        (3, "9, 7, 0", [9, 7, 0]),
        (1, "balanced", [16]),
        (16, "balanced", None),
    ],
)
def test_partition_by_method_gives_decoder_layers_per_stage(stages, method, expected):
    bounds = partition.partition(LLAMA_1B, stages, method, 60)
    assert bounds[0] == 0 and bounds[-1] == 19 and len(bounds) == stages + 1
    assert bounds == sorted(set(bounds))
    if expected:
        assert decoder_layers(bounds, 16) == expected


@pytest.mark.parametrize(
    ("stages", "method", "says"),
    [
        (17, "balanced", ["--num_stages 17", "16 decoder layers"]),
        (17, "uniform", ["--num_stages 17", "16 decoder layers"]),
        (2, "11,6", ["11,6", "17 decoder layers", "16"]),
        (3, "11,5", ["2 stages", "--num_stages is 3"]),
        (2, "17,-1", ["'17,-1'", "balanced, uniform"]),
        (2, "evenly", ["'evenly'", "balanced, uniform"]),
        (2, "", ["''", "balanced, uniform"]),
        (2, "8,8.0", ["'8,8.0'", "balanced, uniform"]),
    ],
)
def test_partition_impossible_split_raises(stages, method, says):
    with pytest.raises(UserError) as caught:
        partition.partition(LLAMA_1B, stages, method, 60)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in says)


def test_describe_partition_has_work_and_bubble():
    lines = partition.describe_partition(LLAMA_1B, [0, 11, 19], 16, 60)
    assert "embedding + 10 decoder layers (0-9)" in lines[0]
    assert "6 decoder layers (10-15) + norm and head" in lines[1]
    shares = [float(line.split("| ")[1].split("%")[0]) for line in lines[:2]]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert shares[0] == pytest.approx(100 * 10 / (16 + 4.3), abs=0.2)
    assert "1 / (16 micro-batches + 1) = 5.9%" in lines[2]
