"""Values of a model from the files of pretrained weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common import models, sample
from common.errors import UserError
from common.pretrained import PretrainedWeights, WeightsFile

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


def test_values_are_cast_to_the_parameters_type():
    model = random_model("llama").to(torch.bfloat16)
    fill(model, PretrainedWeights(directory_of("llama")))
    truth = AutoModelForCausalLM.from_pretrained(directory_of("llama"), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, truth[name]) for name, tensor in model.state_dict().items())


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
        ({"wpe.weight": torch.ones(1024, 128, dtype=torch.int8)}, r"'wpe\.weight' is torch\.int8"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, says):
    with pytest.raises(UserError, match=says) as caught:
        models.map_pretrained(random_model("gpt2"), published("gpt2", tmp_path, **change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
