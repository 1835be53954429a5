"""Attention within documents: tokens of a packed row do not see the row's other documents.

`position_ids` restart at 0 with each document of a packed row. Two implementations:

- `sdpa`: PyTorch's attention with a boolean mask [B, 1, T, T]. Runs anywhere, costs T² per row. On CUDA it is
  `sdpa_no_gqa`, which repeats grouped key-value heads so that rows without a mask never take the quadratic math kernel.
- `varlen`: PyTorch's `varlen_attn`, which takes the offsets of the documents and computes nothing between them. CUDA,
  compute capability 8.0 or newer, fp16 or bf16.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from common.errors import UserError

# Architectures with an attention bias by distance (ALiBi), which takes no position ids.
WITHOUT_POSITIONS = ("bloom",)


def choose_attention(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Returns `varlen` if GPU, precision and config support it, otherwise `sdpa`; BLOOM has only `eager`."""
    if config.model_type in WITHOUT_POSITIONS:
        return "eager"
    if device.type != "cuda":
        return "sdpa"
    supported = torch.cuda.get_device_capability(device) >= (8, 0) and dtype in (torch.float16, torch.bfloat16)
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)  # varlen_attn has none
    return "varlen" if supported and not dropout else "sdpa_no_gqa"


def choose_packing(config: PreTrainedConfig, flag: bool | None) -> bool:
    """Returns `flag`, or if it is None whether the model can keep packed documents apart."""
    can_pack = config.model_type not in WITHOUT_POSITIONS
    if flag and not can_pack:
        raise UserError(
            f"{config.model_type} takes no position ids, so packed documents would see each other: use --no-packing"
        )
    return can_pack if flag is None else flag


def model_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    max_docs: int | None = None,
    max_seqlen: int | None = None,
) -> dict[str, Any]:
    """Returns keyword arguments for an HF model, with which each document of a row sees only itself.

    See `attention_arguments`; `config` has the `_attn_implementation` that `choose_attention` returned.
    """
    inputs = {"input_ids": input_ids, "use_cache": False}
    if config.model_type in WITHOUT_POSITIONS:
        return inputs  # one document per row
    arguments = attention_arguments(config._attn_implementation, position_ids, max_docs, max_seqlen)
    return {**inputs, "position_ids": position_ids, **arguments}


def attention_arguments(
    implementation: str, position_ids: torch.Tensor, max_docs: int | None = None, max_seqlen: int | None = None
) -> dict[str, Any]:
    """Returns keyword arguments for HF's decoder layers, with which each document of a row sees only itself.

    Args:
        implementation: returned by `choose_attention`.
        position_ids: int64 [B, T], 0 at the first token of each document. Padding at the end of a row counts as part
            of its last document or as further documents; real tokens do not see it, because attention is causal.
        max_docs, max_seqlen: upper limits of the documents in a row and of their lengths, by default T. `varlen` is a
            fifth slower without them.

    Returns:
        `attention_mask`: bool [B, 1, T, T], True where a query may look, or None if each row is one document, for
        which PyTorch's causal kernel needs no mask. For `varlen` also `max_seqlen` and `cu_seqlens`: int32, where each
        document begins in the flattened batch, filled up with the end of the batch.
    """
    rows, length = position_ids.shape
    starts = position_ids == 0
    if implementation == "varlen":
        total = rows * length
        flat = torch.arange(total, device=position_ids.device, dtype=torch.int32)
        document = starts.flatten().cumsum(0) - 1
        # A fixed size, filled up with empty documents: `torch.nonzero` would make the host wait for the GPU.
        cu_seqlens = flat.new_full((rows * (max_docs or length) + 1,), total)
        cu_seqlens.scatter_reduce_(0, document, flat, "amin")
        return {"attention_mask": None, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen or length}
    if not starts[:, 1:].any():
        return {"attention_mask": None}
    document = starts.cumsum(1)
    same_document = document[:, None, :, None] == document[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    return {"attention_mask": same_document & causal}


@functools.cache
def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 supports grouped heads without this argument, later versions only with it.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
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
    """Calls `varlen_attn` as an HF attention function (`AttentionInterface`).

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
    """Calls PyTorch's SDPA as an HF attention function, with grouped key-value heads repeated.

    Without a mask HF leaves grouped heads to SDPA (`enable_gqa`). Only the flash kernels support them, from compute
    capability 8.0 and in 16 bits; otherwise SDPA falls back to the math kernel, which stores T² scores per head. With
    repeated heads it uses the memory-efficient kernel. Shapes are those of `varlen_attention`.
    """
    key, value = (repeat_kv(x, query.shape[1] // key.shape[1]) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, is_causal=attention_mask is None, scale=scaling
    )
    return out.transpose(1, 2), None


AttentionInterface.register("varlen", varlen_attention)
AttentionInterface.register("sdpa_no_gqa", sdpa_no_gqa_attention)
