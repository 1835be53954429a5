"""What offload/ recomputes, fuses and accumulates on the GPU."""

import argparse

import pytest
import torch
from transformers import AutoConfig

from common import memory, sample
from common.memory import GIB
from offload import memory_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU of so many GiB appear; it returns the fractions that were set."""
    fractions = []

    def appear(gib):
        properties = argparse.Namespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
        return fractions

    return appear


def decide(stage=2, micro_batches=4, tokens=1024, device=CUDA, parameters=1_236_000_000, **flags):
    args = argparse.Namespace(activation_checkpointing=None, fused_loss=None, coalesce=None, gpu_memory=None)
    vars(args).update(flags)
    config = AutoConfig.for_model(
        "llama", vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    info = argparse.Namespace(config=config, parameters=parameters)
    rows = argparse.Namespace(max_length=tokens)
    train = argparse.Namespace(micro_batch_size=1, rows=rows, gradient_accumulation_steps=micro_batches)
    lines = []
    log = argparse.Namespace(info=lambda *more: lines.extend(more))
    return memory_plan.make_plan(args, info, train, stage, device, log), lines


def test_a_large_gpu_needs_no_help(gpu):
    gpu(141)
    plan, lines = decide()
    assert plan == (False, False, True)
    assert lines[0].startswith("activation checkpointing: off (") and "this GPU has 141.0" in lines[0]
    assert lines[2] == "gradients to the host: once a step (added up on the device over 4 micro-batches)"


def test_what_does_not_fit_is_recomputed_fused_and_sent_at_once(gpu):
    gpu(16)
    # Logits and their gradient are 2 x 2 bytes x tokens x vocabulary: 1.96 GiB of 16 for 4,096 tokens.
    assert not decide(tokens=2048)[0].fused_loss
    assert decide(tokens=4096)[0].fused_loss
    assert decide(tokens=16384)[0].activation_checkpointing
    gpu(6)
    assert not decide()[0].accumulate_on_gpu  # the gradients, 2.3 GiB, are more than a quarter
    assert "4 times a step" in decide()[1][2]
    gpu(16)
    assert decide(gpu_memory=6)[0] == decide_on(gpu, 6)


def decide_on(gpu, gib):
    gpu(gib)
    return decide()[0]


def test_coalescing_is_for_several_micro_batches(gpu):
    gpu(141)
    assert not decide(micro_batches=1)[0].accumulate_on_gpu and "once a step" in decide(micro_batches=1)[1][2]
    assert all(decide(stage=stage)[0].accumulate_on_gpu for stage in (1, 2, 3))


def test_flags_decide_first(gpu):
    gpu(4)
    plan, lines = decide(activation_checkpointing=False, fused_loss=False, coalesce=True)
    assert plan == (False, False, True)
    assert lines[0] == "activation checkpointing: off (as the flag says)"
    gpu(141)
    plan, lines = decide(activation_checkpointing=True, fused_loss=True, coalesce=False)
    assert plan == (True, True, False)
    assert lines[1] == "fused loss: on (as the flag says)"


def test_without_a_gpu_nothing_is_too_large():
    plan, lines = decide(device=CPU, tokens=10**7)
    assert plan == (False, False, True)
    assert "no GPU here" in lines[0]


def test_activations_of_plain_and_gated_blocks():
    llama, gpt2, bloom = (
        AutoConfig.from_pretrained(sample.sample_model_directory(name)) for name in ("llama", "gpt2", "bloom")
    )
    assert memory.activations(llama, 10) == 2 * 10 * 4 * (7 * 128 + 4 * 352)
    assert memory.activations(gpt2, 10) == memory.activations(bloom, 10) == 2 * 10 * 4 * (7 * 128 + 2 * 512)
    assert memory.logits(llama, 10) == 4 * 10 * 2048
