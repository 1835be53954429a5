"""Attention that keeps packed documents apart, without a mask where the GPU can do without.

A packed row holds several documents one after the other; `position_ids` restarts at 0 with each. Two ways to keep
a token from seeing another document:

- `sdpa`: PyTorch's attention with a boolean mask [B, 1, T, T]. Runs anywhere, costs T² per row. On CUDA it is
  `sdpa_no_gqa`, which repeats grouped key-value heads so that rows without a mask never take the quadratic math kernel.
- `varlen`: `torch.nn.attention.varlen.varlen_attn`, which is told where documents begin and skips what lies
  between them. CUDA, compute capability 8.0 or newer, fp16 or bf16.
"""

import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from common.errors import UserError

# Architectures that tell positions by a bias on the attention that runs through the whole row.
WITHOUT_POSITIONS = ("bloom",)


def choose_attention(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """`varlen` where hardware, precision and config allow it, else `sdpa`; `eager` for BLOOM, which has no other."""
    if config.model_type in WITHOUT_POSITIONS:
        return "eager"
    if device.type != "cuda":
        return "sdpa"
    capable = torch.cuda.get_device_capability(device) >= (8, 0) and dtype in (torch.float16, torch.bfloat16)
    # varlen_attn has no dropout.
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return "varlen" if capable and not dropout else "sdpa_no_gqa"


def choose_packing(config: PreTrainedConfig, flag: bool | None) -> bool:
    """Whether to pack: `flag` where it is not None, otherwise wherever the model can keep packed documents apart.

    Raises:
        UserError: told to pack for a model that cannot.
    """
    able = config.model_type not in WITHOUT_POSITIONS
    if flag and not able:
        raise UserError(
            f"{config.model_type} takes no position ids, so packed documents would see each other: use --no-packing"
        )
    return able if flag is None else flag


def model_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    max_docs: int | None = None,
    max_seqlen: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments for a whole HF model that keep the documents of each row apart.

    Args:
        config: the model's, with `_attn_implementation` as `choose_attention` chose.
        input_ids, position_ids: int64 [B, T].
        max_docs, max_seqlen: see `attention_arguments`.
    """
    if config.model_type in WITHOUT_POSITIONS:
        return {"input_ids": input_ids, "use_cache": False}  # one document a row: causality alone is right
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "use_cache": False,
        **attention_arguments(config._attn_implementation, position_ids, max_docs, max_seqlen),
    }


def attention_arguments(
    implementation: str, position_ids: torch.Tensor, max_docs: int | None = None, max_seqlen: int | None = None
) -> dict[str, Any]:
    """Keyword arguments for HF's decoder layers that keep the documents of each row apart.

    Args:
        implementation: what `choose_attention` chose.
        position_ids: int64 [B, T], 0 at the first token of each document. Padding behind the last document of a
            row counts on as part of it, or as documents of its own: causality keeps it from real tokens.
        max_docs: the largest number of documents in a row; None allows for T.
        max_seqlen: length of the longest document; None allows for T. Without these two limits `varlen`
            takes a fifth longer.

    Returns:
        `{"attention_mask": bool [B, 1, T, T] or None}`, True where a query may look; None where every row is one
        document, which PyTorch's causal kernel handles alone. For `varlen` also `cu_seqlens` (int32, the flat
        index where each document begins, and its end for those that are not there) and `max_seqlen`.
    """
    rows, length = position_ids.shape
    starts = position_ids == 0
    if implementation == "varlen":
        places = rows * (max_docs or length) + 1
        total = rows * length
        # A fixed number of places, filled up with empty documents at the end: `torch.nonzero` would make the
        # host wait for the GPU once a micro-batch.
        flat = torch.arange(total, device=position_ids.device, dtype=torch.int32)
        document = starts.flatten().cumsum(0) - 1
        cu_seqlens = torch.full((places,), total, dtype=torch.int32, device=position_ids.device)
        cu_seqlens.scatter_reduce_(0, document, flat, "amin")
        return {"attention_mask": None, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen or length}
    if not starts[:, 1:].any():
        return {"attention_mask": None}
    document = starts.cumsum(1)
    same_document = document[:, None, :, None] == document[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    return {"attention_mask": same_document & causal}


@functools.cache
def _varlen_attn():
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 takes grouped heads as they are, later versions want to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, window_size=(-1, 0), **grouped)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """HF attention function (`AttentionInterface`) over `varlen_attn`.

    Args:
        query: [B, heads, T, head_dim]; key and value: [B, key-value heads, T, head_dim].

    Returns:
        ([B, T, heads, head_dim], None).
    """
    rows, _, length, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = _varlen_attn()(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling)
    return out.unflatten(0, (rows, length)), None


def sdpa_no_gqa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """HF attention function over PyTorch's SDPA, with grouped key-value heads repeated.

    Without a mask HF leaves grouped heads to SDPA (`enable_gqa`). Only the flash kernels take those, and they need
    compute capability 8.0 and 16 bits; anything else falls back to the math kernel, which keeps T² scores per head. The
    memory-efficient kernel takes equal numbers of heads from compute capability 5.0 on.

    Args:
        query: [B, heads, T, head_dim]; key and value: [B, key-value heads, T, head_dim].

    Returns:
        ([B, T, heads, head_dim], None).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, is_causal=attention_mask is None, scale=scaling
    )
    return out.transpose(1, 2), None


AttentionInterface.register("varlen", varlen_attention)
AttentionInterface.register("sdpa_no_gqa", sdpa_no_gqa_attention)
