"""What offload/ recomputes, fuses and accumulates on the GPU, and how it pins memory."""

import argparse
import resource

import pytest
import torch
from transformers import LlamaConfig

from common.errors import UserError
from common.memory import GIB
from offload import memory_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
PARAMETERS = 1_236_000_000


@pytest.fixture
def gpu(monkeypatch):
    """Returns a function that makes a GPU with the given GiB available."""

    def make(gib):
        properties = argparse.Namespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return make


def make_plan(stage=2, micro_batches=4, tokens=1024, device=CUDA, **flags):
    """Returns the plan for micro-batches of one row, and the lines logged."""
    flags = {"activation_checkpointing": None, "fused_loss": None, "coalesce": None, "gpu_memory": None} | flags
    info = argparse.Namespace(config=CONFIG, parameters=PARAMETERS)
    rows = argparse.Namespace(max_length=tokens)
    train = argparse.Namespace(micro_batch_size=1, rows=rows, gradient_accumulation_steps=micro_batches)
    lines = []
    log = argparse.Namespace(info=lambda *more: lines.extend(more))
    return memory_plan.make_plan(argparse.Namespace(**flags), info, train, stage, device, log), lines


# In GiB: weights 2.30 below stage 3, gradients 2.30, and per 1,024 tokens activations 1.44, logits and gradient 0.49.
@pytest.mark.parametrize(
    ("gib", "stage", "micro_batches", "tokens", "plan"),
    [
        (141, 2, 4, 1024, (False, False, True)),
        (141, 1, 4, 1024, (False, False, True)),
        (141, 3, 4, 1024, (False, False, True)),
        (141, 2, 1, 1024, (False, False, False)),  # one micro-batch has nothing to add up
        (16, 2, 4, 2048, (False, False, True)),
        (16, 2, 4, 4096, (False, True, True)),  # logits of 1.96 GiB are more than a tenth
        (16, 2, 4, 8192, (True, True, True)),  # 2.30 + 2.30 + 11.5 GiB are more than nine tenths
        (16, 3, 4, 8192, (False, True, True)),  # under stage 3 without the weights
        (6, 2, 4, 1024, (False, False, False)),  # gradients of 2.30 GiB are more than a quarter
    ],
)
def test_make_plan_saves_what_would_not_fit(gpu, gib, stage, micro_batches, tokens, plan):
    gpu(gib)
    assert make_plan(stage, micro_batches, tokens)[0] == plan
    gpu(1000)
    assert make_plan(stage, micro_batches, tokens, gpu_memory=gib)[0] == plan


def test_make_plan_logs_sizes_and_trips(gpu):
    gpu(141)
    lines = make_plan()[1]
    assert lines[0] == "activation checkpointing: off (1.44 GiB per micro-batch, this GPU has 141.0)"
    assert lines[1] == "fused loss: off (0.49 GiB per micro-batch, this GPU has 141.0)"
    assert lines[2] == "gradients to the host: once per step (added up on the device over 4 micro-batches)"
    assert make_plan(micro_batches=1)[1][2] == "gradients to the host: once per step"
    gpu(6)
    assert make_plan()[1][2] == "gradients to the host: 4 times per step"


@pytest.mark.parametrize(("gib", "flag"), [(4, False), (141, True)])
def test_make_plan_flags_come_first(gpu, gib, flag):
    gpu(gib)
    plan, lines = make_plan(activation_checkpointing=flag, fused_loss=flag, coalesce=not flag)
    assert plan == (flag, flag, not flag)
    state = "on" if flag else "off"
    assert lines[:2] == [
        f"activation checkpointing: {state} (as the flag says)", f"fused loss: {state} (as the flag says)",
    ]  # fmt: skip


def test_make_plan_without_a_gpu_everything_fits():
    plan, lines = make_plan(device=CPU, tokens=10**7)
    assert plan == (False, False, True)
    assert "no GPU here" in lines[0]


def test_check_host_counts_a_weights_file_only_if_checkpoints_are_saved(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    args = argparse.Namespace(save_checkpoint=False, host_memory=22)  # 18 bytes per parameter and 1 GiB are 20.7 + 3
    with pytest.raises(UserError, match=r"about 23\.7 GiB.*22\.0 GiB \(--host_memory if it has more"):
        memory_plan.check_host(args, PARAMETERS, torch.bfloat16, 2, CUDA)
    args.host_memory = 24
    memory_plan.check_host(args, PARAMETERS, torch.bfloat16, 2, CUDA)
    args.save_checkpoint = True
    with pytest.raises(UserError, match=r"about 26\.0 GiB"):
        memory_plan.check_host(args, PARAMETERS, torch.bfloat16, 2, CUDA)


def test_set_allocators_pins_exactly_only_if_mlock_is_not_limited(gpu, monkeypatch):
    for name in ("DS_PIN_MEMORY_BACKEND", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what is set now is removed after the test
        monkeypatch.delenv(name)
    assert "no GPU" in memory_plan.set_allocators()
    gpu(16)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (65536, 65536))
    assert "ulimit -l" in memory_plan.set_allocators()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    assert memory_plan.set_allocators().endswith("DS_PIN_MEMORY_BACKEND=native")
