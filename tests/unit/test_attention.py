"""Attention within documents, and the choice of its implementation."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.attention import attention_arguments, choose_attention
from helpers.token_rows import rows_of_documents


def random_documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 101, (length,), generator=generator, dtype=torch.int32).numpy() for length in lengths]


@pytest.mark.parametrize("limits", [(), (9, 16)])
def test_varlen_offsets_are_the_beginnings_of_documents(limits):
    rows = rows_of_documents(random_documents([16, 5, 5, 2, 3, 9, 2, 2, 2, 2, 16, 12]), 16)
    positions = rows.collate([*range(len(rows)), -1], 0)["position_ids"]
    arguments = attention_arguments("varlen", positions, *limits)
    begins = []
    for row in range(len(positions)):
        for t in range(16):
            if positions[row, t] == 0:
                begins.append(row * 16 + t)
    total = 16 * len(positions)
    places = len(positions) * (limits[0] if limits else 16) + 1
    cu_seqlens = arguments["cu_seqlens"]
    assert cu_seqlens.dtype == torch.int32
    # After the last document come empty ones.
    assert cu_seqlens.tolist() == begins + [total] * (places - len(begins))
    assert len(begins) < places - 1
    assert arguments["max_seqlen"] == 16
    assert arguments["attention_mask"] is None


def test_varlen_offsets_of_documents_of_one_token():
    arguments = attention_arguments("varlen", torch.zeros(2, 3, dtype=torch.int64), 3, 1)
    assert arguments["cu_seqlens"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_sdpa_mask_is_causal_within_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
    mask = attention_arguments("sdpa", positions)["attention_mask"]
    documents = [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    for row, query, key in itertools.product(range(2), range(5), range(5)):
        may = key <= query and documents[row][query] == documents[row][key]
        assert bool(mask[row, 0, query, key]) is may
    assert attention_arguments("sdpa", torch.arange(5)[None])["attention_mask"] is None


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "expected"),
    [
        ((8, 0), torch.bfloat16, 0.0, "varlen"),
        ((9, 0), torch.float16, 0.0, "varlen"),
        ((7, 5), torch.float16, 0.0, "sdpa_no_gqa"),
        ((9, 0), torch.float32, 0.0, "sdpa_no_gqa"),
        ((9, 0), torch.float16, 0.1, "sdpa_no_gqa"),
    ],
)
def test_choose_attention_by_capability(monkeypatch, capability, dtype, dropout, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    config = LlamaConfig(attention_dropout=dropout)
    assert choose_attention(config, torch.device("cuda", 0), dtype) == expected
    assert choose_attention(config, torch.device("cpu"), dtype) == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_no_gqa_equals_hf_without_grouped_heads(monkeypatch, masked):
    """`enable_gqa` is what makes PyTorch fall back to the math kernel below compute capability 8.0."""
    query, (key, value) = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 2, 5, 8)
    mask = attention_arguments("sdpa", torch.tensor([[0, 1, 2, 0, 1]] * 2))["attention_mask"] if masked else None
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.25)
    asked = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        asked.append((key.shape[1], kwargs.get("enable_gqa", False)))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa_no_gqa"](module, query, key, value, mask, scaling=0.25)
    assert asked == [(6, False)]
    torch.testing.assert_close(out, expected)
