"""Head and loss in one, a slice of tokens at a time, so that the logits of a micro-batch never exist all at once.

The logits are the largest tensor of a training step: 4 GB for 16 rows of 1024 tokens and a vocabulary of 128,256.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from common.errors import UserError
from common.loss import cross_entropy_sum, next_tokens, token_loss
from common.models import has_plain_head

# Tokens whose logits exist at the same time: enough for efficient matrix products.
TOKENS_AT_ONCE = 2048


def patch_loss(model: PreTrainedModel, fused: bool) -> None:
    """Makes `model(**inputs, labels=labels).loss` the sum of the losses of all targets, as in `token_loss`.

    The fused loss must run inside the head, because ZeRO-3 gathers the head's weight only during its forward. Calls
    without labels are unchanged.

    Raises:
        UserError: `fused`, but the head of this model is more than a matrix product.
    """
    head, hf_forward = model.get_output_embeddings(), model.forward
    if fused:
        if not has_plain_head(model):
            raise UserError(f"--fused_loss: the head of {model.config.model_type} is more than a matrix product")
        head.forward = functools.partial(_logits_or_loss, head)

    @functools.wraps(hf_forward)
    def forward(*args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return hf_forward(*args, **inputs)
        if fused:
            return CausalLMOutput(loss=head(model.base_model(*args, **inputs)[0], labels))
        return CausalLMOutput(loss=token_loss(hf_forward(*args, **inputs).logits, labels))

    model.forward = forward


def _logits_or_loss(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, T, V] of hidden states [B, T, H]; with labels [B, T], the sum of their losses, a float32 scalar."""
    if labels is None:
        return nn.functional.linear(hidden, head.weight)
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), head.weight, next_tokens(labels).flatten())


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T`, for hidden [N, H], weight [V, H] and targets [N].

    Forward also computes the gradients of each slice while its logits exist, so that backward needs neither the logits
    nor another matrix product. (liger-kernel's fused loss does the same on CUDA, but makes the host wait for the GPU.)
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if wanted:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            logits = (hidden[part] @ weight.T).requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                part_loss = cross_entropy_sum(logits, targets[part])
            loss += part_loss.detach()
            if wanted:
                (logits_grad,) = torch.autograd.grad(part_loss, logits)
                torch.mm(logits_grad, weight, out=hidden_grad[part])
                weight_grad += logits_grad.T @ hidden[part]
        if wanted:
            ctx.gradients = hidden_grad, weight_grad, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_grad, weight_grad, dtype = ctx.gradients
        ctx.gradients = None
        return hidden_grad.mul_(scale), weight_grad.mul_(scale).to(dtype), None
