"""Whole HF models: weights matched to parameters, optimizer groups, counts, packed documents, the fused loss."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from token_rows import ids_in_row, rows_of_documents
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from common import attention, data, models, sample
from common.errors import UserError
from common.pretrained import PretrainedWeights, WeightsFile
from offload import fused_loss
from offload.cpu_adam import param_groups_by_block

ARCHITECTURES = ["gpt2", "llama", "bloom"]


def directory_of(architecture):
    return sample.sample_model_directory(architecture)


def random_model(architecture, seed=1, **fields):
    """Another model of the sample's shape, every parameter random, biases too."""
    config = AutoConfig.from_pretrained(directory_of(architecture), **fields)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.09, generator=generator)
    return model.eval()


def fill(model, weights):
    pairs = models.map_pretrained(model, weights)
    with torch.no_grad():
        for parameter, read in pairs:
            parameter.copy_(read())
    return pairs


# ---------------------------------------------------------------------------------------------- match_weights


def published(architecture, path, **change):
    """The sample's weights in a file as the Hub has them: GPT-2's and BLOOM's without `transformer.` and head."""
    state = load_file(directory_of(architecture) / "model.safetensors")
    if architecture != "llama":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if "lm_head" not in name}
    if architecture == "gpt2":
        state["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # the masks that GPT-2's file brings
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    save_file(state, path / "model.safetensors")
    return PretrainedWeights(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("as_published", [False, True])
def test_every_parameter_gets_its_values(architecture, as_published, tmp_path):
    weights = published(architecture, tmp_path) if as_published else PretrainedWeights(directory_of(architecture))
    model = random_model(architecture)
    assert len(fill(model, weights)) == len(list(model.parameters()))
    truth = AutoModelForCausalLM.from_pretrained(directory_of(architecture)).state_dict()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_values_come_in_the_parameters_type():
    model = random_model("llama").to(torch.bfloat16)
    pairs = models.map_pretrained(model, PretrainedWeights(directory_of("llama")))
    assert all(read().dtype == torch.bfloat16 for _, read in pairs)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_goes_by_any_of_its_names(name, tmp_path):
    state = random_model("llama", seed=5).state_dict()
    value = state["lm_head.weight"].clone()
    for tied in ("lm_head.weight", "model.embed_tokens.weight"):
        del state[tied]
    torch.save({"MODEL_STATE": state | {name: value}}, tmp_path / "a.pt")
    model = random_model("llama", seed=6)
    fill(model, WeightsFile(tmp_path / "a.pt"))
    assert torch.equal(model.lm_head.weight, value) and torch.equal(model.model.embed_tokens.weight, value)


def test_untied_head_is_read_on_its_own(tmp_path):
    source = random_model("llama", seed=2, tie_word_embeddings=False)
    torch.save({"MODEL_STATE": source.state_dict()}, tmp_path / "a.pt")
    model = random_model("llama", seed=3, tie_word_embeddings=False)
    fill(model, WeightsFile(tmp_path / "a.pt"))
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"h.2.ln_1.weight": None}, r"'transformer\.h\.2\.ln_1\.weight' of shape \[128\] is missing"),
        ({"h.9.ln_1.weight": torch.ones(1)}, r"'h\.9\.ln_1\.weight' has no place in the gpt2"),
        ({"wpe.weight": torch.ones(9, 128)}, r"shape \[9, 128\], .* wants \[1024, 128\]"),
        ({"wpe.weight": torch.ones(1024, 128, dtype=torch.int8)}, r"'wpe\.weight' is I8"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, says):
    with pytest.raises(UserError, match=says) as caught:
        models.map_pretrained(random_model("gpt2"), published("gpt2", tmp_path, **change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_directory_without_tokenizer_files(tmp_path):
    """transformers would make an empty tokenizer from GPT-2's config alone."""
    shutil.copy(directory_of("gpt2") / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer"):
        models.load_config_and_tokenizer(tmp_path, 64)


# ----------------------------------------------------------------------------------------- counts and groups


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_are_what_is_outside_the_blocks_and_a_group_a_block(architecture):
    model = random_model(architecture)
    groups = [group["params"] for group in param_groups_by_block(model)]
    assert len(groups) == 5
    for group, block in zip(groups[1:], models.blocks(model), strict=True):
        assert [id(parameter) for parameter in group] == [id(parameter) for parameter in block.parameters()]
    every = [id(parameter) for group in groups for parameter in group]
    assert len(every) == len(set(every))
    assert set(every) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize(
    ("architecture", "looked_up"), [("llama", 0), ("gpt2", 1024 * 128), ("bloom", 0)]
)  # the table of GPT-2's positions is looked up alone; the tied embedding is the head
def test_count_parameters(architecture, looked_up):
    model = models.meta_model(AutoConfig.from_pretrained(directory_of(architecture)))
    every = sum(tensor.numel() for tensor in load_file(directory_of(architecture) / "model.safetensors").values())
    assert models.count_parameters(model) == (every, every - looked_up)


def test_count_parameters_of_an_untied_model():
    model = random_model("llama", tie_word_embeddings=False)
    every = sum(parameter.numel() for parameter in model.parameters())
    assert models.count_parameters(model) == (every, every - 2048 * 128)


# ------------------------------------------------------------------------------------------ packed documents


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_packed_documents_get_the_logits_they_get_alone(architecture):
    model = random_model(architecture)
    model.set_attn_implementation("sdpa")
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 2048, length).astype(np.int32) for length in (9, 20, 5, 3, 30, 2)]
    rows = rows_of_documents(documents, 32)
    assert len(rows) < len(documents)
    batch = rows.collate(range(len(rows)))
    inputs = attention.model_inputs(
        model.config, batch["input_ids"], batch["position_ids"], *data.attention_limits(rows)
    )
    seen = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        for row in range(len(rows)):
            place = 0
            for ids in ids_in_row(rows, row):
                alone = model(torch.tensor(ids).long()[None]).logits[0]
                end = place + len(alone)
                torch.testing.assert_close(logits[row, place:end], alone, rtol=1e-4, atol=1e-5)
                place, seen = end, seen + 1
    assert seen == len(documents)


def test_bloom_takes_one_document_a_row():
    config = AutoConfig.from_pretrained(directory_of("bloom"))
    with pytest.raises(UserError, match="--no-packing"):
        attention.choose_packing(config, True)
    assert attention.choose_packing(config, None) is attention.choose_packing(config, False) is False
    llama = AutoConfig.from_pretrained(directory_of("llama"))
    assert [attention.choose_packing(llama, flag) for flag in (None, True, False)] == [True, True, False]
    ids = torch.arange(6).view(1, 6)
    assert set(attention.model_inputs(config, ids, ids, None)) == {"input_ids", "use_cache"}


# ---------------------------------------------------------------------------------------------- fused loss


def plain_loss(model, ids, labels):
    """HF's logits through PyTorch's own cross entropy, summed."""
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("at_once", [7, 1000])
def test_fused_loss_and_its_gradients(architecture, tied, at_once, monkeypatch):
    monkeypatch.setattr(fused_loss, "TOKENS_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 300, (3, 11), generator=draw)
    labels = ids.clone()
    labels[0, :6], labels[1, -2:], labels[2] = -100, -100, -100  # a head of a row, its end, a whole row
    # 33 tokens, in slices of 7 or all at once.
    small = {"num_hidden_layers": 1, "vocab_size": 300, "tie_word_embeddings": tied}
    plain, fused = (random_model(architecture, **small).double() for _ in range(2))
    fused_loss.patch_loss(fused, fused=True)
    truth = plain_loss(plain, ids, labels) / 4.5
    loss = fused(input_ids=ids, labels=labels, use_cache=False).loss / 4.5
    # The loss is summed up in float32, whatever the model's type.
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    truth.backward()
    loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_fused_loss_without_gradients_without_targets_and_generation():
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


def test_fused_loss_of_bf16_is_no_worse_than_the_plain_one():
    ids = torch.randint(0, 2048, (2, 50), generator=torch.Generator().manual_seed(1))
    exact = plain_loss(random_model("llama"), ids, ids).item()
    plain, fused = (random_model("llama").to(torch.bfloat16) for _ in range(2))
    fused_loss.patch_loss(fused, fused=True)
    loss = fused(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert loss.dtype == torch.float32 and fused.lm_head.weight.grad.dtype == torch.bfloat16
    assert abs(loss.item() - exact) < 2 * abs(plain_loss(plain, ids, ids).item() - exact) + 1e-3 * exact


def test_patch_loss_without_fusion_is_the_same_sum():
    ids = torch.arange(20).view(2, 10)
    plain, patched = random_model("llama"), random_model("llama")
    fused_loss.patch_loss(patched, fused=False)
    truth = plain_loss(plain, ids, ids).item()
    assert patched(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(truth, rel=1e-6)
    assert torch.equal(patched(ids).logits, plain(ids).logits)


def test_fused_loss_is_for_plain_heads():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(UserError, match="--fused_loss: the head of gemma2"):
        fused_loss.patch_loss(models.meta_model(config), fused=True)
