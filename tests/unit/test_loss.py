"""The loss that every script trains on."""

import pytest
import torch
from torch.nn import functional as F

from common import loss


def test_token_loss_is_the_sum_over_targets_of_the_next_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (2, 6), generator=generator)
    labels[0, 2:4] = -100
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert loss.token_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    # Targets: 5 per row, without the two that are masked. The last position predicts nothing.
    assert (loss.next_tokens(labels) != loss.IGNORE).sum() == 8
    assert (loss.next_tokens(labels)[:, -1] == loss.IGNORE).all()


def test_token_loss_without_targets_is_zero():
    assert loss.token_loss(torch.randn(1, 4, 5), torch.full((1, 4), -100)) == 0
