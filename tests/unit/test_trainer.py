"""Where the baseline's Trainer differs from the stock one: rows, their order, and evaluation over tokens."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from baseline import trainer
from common.rows import epoch_order, steps_in_epoch
from helpers.token_rows import rows_of_documents


def test_mean_over_tokens_weights_batches_by_their_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 8), generator=generator)
    labels[2, 2:] = -100  # a short batch: the last row has a single target
    batches = [trainer.sum_by_row(logits[:2], labels[:2]), trainer.sum_by_row(logits[2:], labels[2:])]
    metrics = trainer.mean_over_tokens(SimpleNamespace(predictions=torch.cat(batches).numpy()))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert metrics == {"loss": pytest.approx(expected.item(), rel=1e-6), "tokens": 15}
    mean_of_means = sum(sums.sum(0)[0] / sums.sum(0)[1] for sums in batches) / 2
    assert abs(mean_of_means - expected) > 0.1


@pytest.mark.parametrize("pad_to_max_length", [False, True])
def test_row_dataset_gives_the_rows_of_the_epochs_order(pad_to_max_length):
    documents = [torch.full((length,), length, dtype=torch.int32).numpy() for length in (3, 70, 5, 9, 30)]
    rows = rows_of_documents(documents, 256, packing=False)
    train = SimpleNamespace(rows=rows, global_batch_size=4, seed=7, steps_per_epoch=steps_in_epoch(rows, 4))
    order = trainer.EpochOrder(train)
    loader = DataLoader(
        trainer.RowDataset(rows, False, pad_to_max_length), batch_size=2, sampler=order, collate_fn=lambda batch: batch
    )
    for epoch in (0, 1):
        order.set_epoch(epoch)
        numbers = epoch_order(rows, 4, 7, epoch).reshape(-1, 2)
        batches = list(loader)
        assert len(batches) == len(order) // 2 == len(numbers)
        for batch, expected in zip(batches, numbers, strict=True):
            width = batch["input_ids"].shape[1]
            assert width == (256 if pad_to_max_length else rows.width(expected))
            assert batch.keys() == {"input_ids", "labels"}
            assert torch.equal(batch["labels"], rows.collate(expected)["labels"][:, :width])
