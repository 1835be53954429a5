"""Parameter groups of the CPU optimizer."""

import pytest
from transformers import AutoConfig

from common import models, sample
from offload.cpu_adam import param_groups_by_block


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bloom"])
def test_param_groups_by_block_have_every_parameter_once(architecture):
    model = models.meta_model(AutoConfig.from_pretrained(sample.sample_model_directory(architecture)))
    groups = [group["params"] for group in param_groups_by_block(model)]
    for group, block in zip(groups[1:], models.blocks(model), strict=True):  # the first is outside the blocks
        assert [id(parameter) for parameter in group] == [id(parameter) for parameter in block.parameters()]
    every = [id(parameter) for group in groups for parameter in group]
    assert len(every) == len(set(every))
    assert set(every) == {id(parameter) for parameter in model.parameters()}
