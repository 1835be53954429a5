"""The fused loss of offload/ equals the plain one."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from common import models, sample
from common.errors import UserError
from offload import fused_loss

ARCHITECTURES = ["gpt2", "llama", "bloom"]


def random_model(architecture, seed=1, **fields):
    """A model of the sample's shape with random parameters, biases included."""
    config = AutoConfig.from_pretrained(sample.sample_model_directory(architecture), **fields)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.09, generator=generator)
    return model.eval()


def plain_loss(model, ids, labels):
    """The sum of PyTorch's own cross entropy over Hugging Face's logits."""
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("at_once", [7, 1000])
def test_fused_loss_has_loss_and_gradients_of_the_plain_one(architecture, tied, at_once, monkeypatch):
    monkeypatch.setattr(fused_loss, "TOKENS_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 300, (3, 11), generator=draw)
    labels = ids.clone()
    labels[0, :6], labels[1, -2:], labels[2] = -100, -100, -100  # the start of a row, its end, a whole row
    # 33 tokens, in slices of 7 or all at once.
    small = {"num_hidden_layers": 1, "vocab_size": 300, "tie_word_embeddings": tied}
    plain, fused = (random_model(architecture, **small).double() for _ in range(2))
    fused_loss.patch_loss(fused, fused=True)
    truth = plain_loss(plain, ids, labels) / 4.5
    loss = fused(input_ids=ids, labels=labels, use_cache=False).loss / 4.5
    # The loss is added up in float32 for any dtype of the model.
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    truth.backward()
    loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_fused_loss_keeps_evaluation_and_generation():
    ids = torch.arange(20).view(2, 10)
    plain, fused = random_model("llama"), random_model("llama")
    fused_loss.patch_loss(fused, fused=True)
    with torch.no_grad():
        truth = plain_loss(plain, ids, ids)
        assert fused(input_ids=ids, labels=ids).loss.item() == pytest.approx(truth.item(), 1e-6)
        assert torch.equal(fused(ids).logits, plain(ids).logits)
    nothing = fused(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing.item() == 0
    assert all(not parameter.grad.any() for parameter in fused.parameters())
    written = [
        model.generate(ids[:, :4], do_sample=False, max_new_tokens=8, pad_token_id=0) for model in (plain, fused)
    ]
    assert torch.equal(*written)


def test_fused_loss_bf16_is_as_precise_as_the_plain_one():
    ids = torch.randint(0, 2048, (2, 50), generator=torch.Generator().manual_seed(1))
    exact = plain_loss(random_model("llama"), ids, ids).item()
    plain, fused = (random_model("llama").to(torch.bfloat16) for _ in range(2))
    fused_loss.patch_loss(fused, fused=True)
    loss = fused(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert loss.dtype == torch.float32 and fused.lm_head.weight.grad.dtype == torch.bfloat16
    assert abs(loss.item() - exact) < 2 * abs(plain_loss(plain, ids, ids).item() - exact) + 1e-3 * exact


def test_patch_loss_unfused_is_the_same_sum():
    ids = torch.arange(20).view(2, 10)
    plain, patched = random_model("llama"), random_model("llama")
    fused_loss.patch_loss(patched, fused=False)
    truth = plain_loss(plain, ids, ids).item()
    assert patched(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(truth, rel=1e-6)
    assert torch.equal(patched(ids).logits, plain(ids).logits)


def test_patch_loss_fused_with_another_head_raises():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(UserError, match="--fused_loss: the head of gemma2"):
        fused_loss.patch_loss(models.meta_model(config), fused=True)
