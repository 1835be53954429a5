"""Faster kernels for the parts of a transformer block that PyTorch runs as many small ones."""

import importlib.util

from common.errors import UserError


def choose_kernels(config, device, flag=None, compiled=False):
    """Puts liger-kernel's RMSNorm, SwiGLU and rotary embedding into HF's modelling code, before a model is built.

    Args:
        flag: --liger; None means where it can run: on CUDA, installed, with kernels for the architecture.
        compiled: --compile; torch.compile fuses the same operations, and cannot see into liger's kernels.

    Returns:
        One line that says what runs and why.
    """
    if flag and compiled:
        raise UserError("--liger and --compile fuse the same operations: choose one")
    if compiled:
        return "kernels: torch.compile's, made on first use"
    installed = importlib.util.find_spec("liger_kernel") is not None
    if flag and device.type != "cuda":
        raise UserError("--liger: its kernels run on CUDA, and there is no GPU")
    if flag and not installed:
        raise UserError("--liger: liger-kernel is not installed (pip install liger-kernel)")
    if flag is False or device.type != "cuda":
        return "kernels: PyTorch's"
    if not installed:
        return "kernels: PyTorch's (pip install liger-kernel for faster ones)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if flag:
            raise UserError(f"--liger: liger-kernel has nothing for {config.model_type}")
        return f"kernels: PyTorch's (liger-kernel has nothing for {config.model_type})"
    # The loss stays ours: it is weighted by the tokens of the whole global batch.
    MODEL_TYPE_TO_APPLY_LIGER_FN[config.model_type](
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return "kernels: liger-kernel's RMSNorm, SwiGLU and rotary embedding"
