"""Faster kernels for the parts of a transformer block that PyTorch runs as many small ones."""

import functools
import importlib.util
import logging
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn
from torch.utils.cpp_extension import _get_build_directory
from transformers.modeling_outputs import CausalLMOutput

from common.errors import UserError

# Architectures whose head is a plain matrix product, without scaling or capping of the logits behind it.
PLAIN_HEADS = ("bloom", "gpt2", "llama", "mistral", "qwen2", "qwen3")

# Tokens whose logits are there at once: enough that the matrix products stay efficient.
TOKENS_AT_ONCE = 2048


def free_build_lock(name):
    """Removes the lock on an extension that DeepSpeed compiles, where the process that had it is dead. Not collective.

    PyTorch's lock is a file, and one that was killed while it compiled or loaded leaves it: every later run would wait
    for ever. Who has the lock keeps the file open; one made since this process started may be another host's.
    """
    lock = Path(_get_build_directory(name, verbose=False), "lock")
    try:
        if lock.stat().st_mtime > psutil.Process().create_time():
            return
    except FileNotFoundError:
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(lock.resolve()) in (file.path for file in process.open_files()):
                return
    lock.unlink(missing_ok=True)


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
    # It warns of every hardware that this is not.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
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


def fuse_loss(model):
    """Lets `model(labels=..., num_items_in_batch=N)` compute head and loss together, a slice of tokens at a time.

    The logits of a micro-batch, the largest tensors of a training step, are then never there whole. Calls without
    labels, from `generate` say, are HF's own.

    Raises:
        UserError: a model whose logits are more than a matrix product.
    """
    head, hf_forward = model.get_output_embeddings(), model.forward
    if model.config.model_type not in PLAIN_HEADS or getattr(head, "bias", None) is not None:
        raise UserError(f"--fused_loss: the head of {model.config.model_type} is more than a matrix product")
    # Computed by the head itself, since ZeRO-3 has its weights there only while it is called.
    head.forward = functools.partial(_logits_or_loss, head)

    @functools.wraps(hf_forward)
    def forward(*args, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return hf_forward(*args, **inputs)
        hidden = model.base_model(*args, **inputs)[0]
        return CausalLMOutput(loss=head(hidden, labels) / num_items_in_batch)

    model.forward = forward


def _logits_or_loss(head, hidden, labels=None):
    """Logits [B, T, V] of hidden states [B, T, H], or with labels [B, T] the sum of their losses, float32 []."""
    if labels is None:
        return nn.functional.linear(hidden, head.weight)
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), head.weight, targets.flatten())


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T`, for hidden [N, H], weight [V, H] and targets [N].

    While the logits of a slice are there, forward also computes its gradients, so that backward needs neither them
    nor a second product. (liger-kernel's fused loss does the same on CUDA; there the host waits for the GPU.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wanted = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if wanted:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            logits = (hidden[part] @ weight.T).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                part_loss = chunked_cross_entropy(logits, targets[part], ignore_index=-100, reduction="sum")
            loss += part_loss.detach()
            if wanted:
                (logits_grad,) = torch.autograd.grad(part_loss, logits)
                torch.mm(logits_grad, weight, out=hidden_grad[part])
                weight_grad += logits_grad.T @ hidden[part]
        if wanted:
            ctx.gradients = hidden_grad, weight_grad, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, scale):
        hidden_grad, weight_grad, dtype = ctx.gradients
        ctx.gradients = None
        return hidden_grad.mul_(scale), weight_grad.mul_(scale).to(dtype), None
