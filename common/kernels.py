"""Faster kernels for the parts of a transformer block that PyTorch runs as many small ones."""

import importlib.util
import logging
from argparse import Namespace

import torch
from transformers import PreTrainedConfig

from common import attention
from common.errors import UserError
from common.tracking import RunLog


def choose_kernels(
    args: Namespace, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, log: RunLog
) -> None:
    """Chooses attention and kernels; call it before building the model.

    Patches liger-kernel's RMSNorm, SwiGLU and rotary embedding into Hugging Face's modeling code.

    Args:
        args: liger (None uses it on CUDA if installed and if it has kernels for the architecture) and compile
            (torch.compile fuses the same operations, and cannot see into liger's kernels).
        config: receives `_attn_implementation`.

    Raises:
        UserError: --liger cannot run, or is combined with --compile.
    """
    config._attn_implementation = attention.choose_attention(config, device, dtype)
    log.info(f"kernels: {_patch_liger(config, device, args.liger, args.compile)}")
    log.info(f"attention: {config._attn_implementation}")


def _patch_liger(config: PreTrainedConfig, device: torch.device, liger: bool | None, compiled: bool) -> str:
    """Applies liger-kernel if it can; returns which kernels run, and why."""
    if liger and compiled:
        raise UserError("--liger and --compile fuse the same operations: choose one")
    if compiled:
        return "torch.compile's, made on first use"
    if liger and device.type != "cuda":
        raise UserError("--liger: its kernels run on CUDA, and there is no GPU")
    if liger is False or device.type != "cuda":
        return "PyTorch's"
    if importlib.util.find_spec("liger_kernel") is None:
        if liger:
            raise UserError("--liger: liger-kernel is not installed (pip install liger-kernel)")
        return "PyTorch's (pip install liger-kernel for faster ones)"
    # On import it warns about every other kind of hardware.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if liger:
            raise UserError(f"--liger: liger-kernel has none for {config.model_type}")
        return f"PyTorch's (liger-kernel has none for {config.model_type})"
    # The loss stays ours: it is weighted by the tokens of the whole global batch.
    MODEL_TYPE_TO_APPLY_LIGER_FN[config.model_type](
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return "liger-kernel's RMSNorm, SwiGLU and rotary embedding"
