"""The loss that every script trains on."""

import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn

IGNORE = -100  # label of a token without a loss, as in Hugging Face's models


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of all target tokens, in nats, as a float32 scalar.

    Args:
        logits: [B, T, V].
        labels: int64 [B, T], in Hugging Face's convention: the label of a token is the token itself, or -100.
    """
    # Shifting the labels instead of the logits avoids a copy of the logits.
    return cross_entropy_sum(logits.flatten(0, 1), next_tokens(labels).flatten())


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Returns targets [B, T]: position t predicts the label of token t + 1, and the last position predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of logits [N, V] for targets [N], in float32 without a float32 copy of the logits."""
    return chunked_cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
