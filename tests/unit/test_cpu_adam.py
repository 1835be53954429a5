"""Parameter groups of the CPU optimizer."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import models, sample
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
