"""Which attention and kernels a run uses, by its flags and what is installed."""

import argparse
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from common import attention, kernels
from common.errors import UserError


@pytest.fixture(autouse=True)
def sdpa(monkeypatch):
    """Choosing attention would ask the GPU."""
    monkeypatch.setattr(attention, "choose_attention", lambda config, device, dtype: "sdpa")


@pytest.fixture(autouse=True)
def liger(monkeypatch):
    """A liger-kernel that has kernels for Llama; the calls of its patch."""
    calls = []
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **switches: calls.append(switches)}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return calls


def choose(config, device="cuda", liger=None, compile=False):
    lines = []
    args = argparse.Namespace(liger=liger, compile=compile)
    log = SimpleNamespace(info=lines.append)
    kernels.choose_kernels(args, config, torch.device(device), torch.bfloat16, log)
    return lines[0]


def test_choose_kernels_sets_the_attention_that_was_chosen():
    config = LlamaConfig(attn_implementation="eager")
    choose(config, "cpu")
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        (LlamaConfig(), {}, "kernels: liger-kernel's RMSNorm, SwiGLU and rotary embedding"),
        (LlamaConfig(), {"liger": True}, "kernels: liger-kernel's RMSNorm, SwiGLU and rotary embedding"),
        (LlamaConfig(), {"liger": False}, "kernels: PyTorch's"),
        (LlamaConfig(), {"device": "cpu"}, "kernels: PyTorch's"),
        (LlamaConfig(), {"compile": True}, "kernels: torch.compile's, made on first use"),
        (GPT2Config(), {}, "kernels: PyTorch's (liger-kernel has none for gpt2)"),
    ],
)
def test_choose_kernels_follows_flags_and_architecture(liger, config, flags, says):
    assert choose(config, **flags) == says
    assert len(liger) == ("liger-kernel's" in says)
    # The loss stays ours.
    assert not any(calls["cross_entropy"] or calls["fused_linear_cross_entropy"] for calls in liger)


def test_choose_kernels_without_liger_installed_uses_pytorchs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(LlamaConfig()) == "kernels: PyTorch's (pip install liger-kernel for faster ones)"
    with pytest.raises(UserError, match=r"^--liger: liger-kernel is not installed"):
        choose(LlamaConfig(), liger=True)


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        (LlamaConfig(), {"compile": True}, "--liger and --compile"),
        (LlamaConfig(), {"device": "cpu"}, "--liger: .* no GPU"),
        (GPT2Config(), {}, "--liger: liger-kernel has none for gpt2"),
    ],
)
def test_choose_kernels_liger_that_cannot_run_raises(liger, config, flags, says):
    with pytest.raises(UserError, match=says):
        choose(config, liger=True, **flags)
    assert not liger
