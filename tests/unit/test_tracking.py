"""The log line, metrics.jsonl, FLOPs, the guard against non-finite losses, and W&B."""

import argparse
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16 import loss_scaler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from common import tracking
from common.errors import UserError
from common.rows import Counts


@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_flops_equal_a_count_by_hand_and_pytorchs():
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    # Two documents of 3 and 5 tokens: 6 x 1000 x 8, and half of 12 x 2 layers x 4 heads x 8 x (9 + 25).
    assert tracking.training_flops(config, 1000, 8, 34) == 48_000 + 13_056
    model = AutoModelForCausalLM.from_config(config)
    matmul = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 100 * 16
    # For one document PyTorch counts the same, except that it ignores causality: twice the pairs.
    ids = torch.arange(12)[None]
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == tracking.training_flops(config, matmul, 12, 2 * 12**2)


def arguments(directory, **others):
    others = {"resume_from_checkpoint": None} | others
    return argparse.Namespace(output_dir=str(directory), wandb_project=None, local_rank=0, dataset_name="x", **others)


def start(log, total_steps, steps_per_epoch=10):
    info = SimpleNamespace(name="model", config=LlamaConfig(), parameters=12, non_embedding_parameters=100)
    text = SimpleNamespace(name="text", train=SimpleNamespace(steps_per_epoch=steps_per_epoch))
    log.start(info, {"bf16": {}}, text, torch.float32, 0, total_steps)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_run_log_checkpoints_of_an_earlier_run_are_announced(tmp_path, capsys):
    tracking.RunLog(arguments(tmp_path), "zero")
    assert capsys.readouterr().out == ""
    (tmp_path / "global_step2").symlink_to("nowhere")
    os.utime(tmp_path / "global_step2", (0, 0), follow_symlinks=False)
    (tmp_path / "global_step4").mkdir()
    tracking.RunLog(arguments(tmp_path, resume_from_checkpoint="latest"), "zero")
    assert capsys.readouterr().out == ""
    tracking.RunLog(arguments(tmp_path), "zero")
    assert f"{tmp_path}/global_step4 is from an earlier run: this run starts over" in capsys.readouterr().out


def test_event_is_one_line_of_json_without_none(tmp_path):
    before = time.time()
    for seed in range(2):
        log = tracking.RunLog(arguments(tmp_path, seed=seed), "pipeline")
        log.event("step", step=seed, gpu_peak_gib=None, loss=0.5, note="a\nb")
        start(log, total_steps=20)
        log.finish()
    events = lines(tmp_path)
    assert [event["event"] for event in events] == ["step", "run", "summary"] * 2
    assert all(before <= event["time"] <= time.time() for event in events)
    assert {key: value for key, value in events[3].items() if key != "time"} == {
        "event": "step", "step": 1, "loss": 0.5, "note": "a\nb",
    }  # fmt: skip
    assert events[4]["args"]["seed"] == 1 and "local_rank" not in events[4]["args"]
    assert events[4]["world_size"] == 1 and events[4]["technique"] == "pipeline"
    assert "final_train_loss" not in events[5]


def test_step_writes_the_line_and_the_event(tmp_path, capsys):
    log = tracking.RunLog(arguments(tmp_path), "pipeline")
    start(log, total_steps=40, steps_per_epoch=6)
    capsys.readouterr()
    batch = SimpleNamespace(counts=Counts(1000, 990, 6, 10_000), samples_seen=18)
    log.step(3, batch, loss=2.5, lr=1e-3, grad_norm=1.25, seconds=0.5, host_peak_gib=1.5, gpu_peak_gib=None)
    line = capsys.readouterr().out.strip()
    assert line == (
        "step 3/40 | loss 2.5000 | lr 1.00e-03 | grad_norm 1.25 | 500 ms | 2,000 tok/s | 2,000 tok/s/gpu | host 1.5 GiB"
    )
    log.finish()
    _, step, summary = lines(tmp_path)
    assert step["samples_seen"] == 18
    assert step["epoch"] == 0.5 and step["tokens_per_second"] == step["tokens_per_second_per_gpu"] == 2000
    assert "mfu" not in step and "gpu_peak_gib" not in step
    assert summary["train_samples_per_second"] == 12 and summary["final_train_loss"] == 2.5
    assert summary["steps_per_epoch"] == 6
    assert (tmp_path / "logs" / "rank_0.log").read_text().endswith(line + "\n")


def test_event_full_disk_warns_once_and_continues(tmp_path, capsys):
    log = tracking.RunLog(arguments(tmp_path), "zero")
    log.metrics = open("/dev/full", "a")  # noqa: SIM115
    for step in range(3):
        log.event("step", step=step)
    assert capsys.readouterr().err == "/dev/full: No space left on device; lines will be missing\n"
    log.info("next")
    assert capsys.readouterr().out == "next\n"


def test_info_prints_on_rank_0_only(tmp_path, monkeypatch, capsys):
    log = tracking.RunLog(arguments(tmp_path / "first"), "pipeline")
    log.info("hello")
    assert capsys.readouterr().out == "hello\n"
    monkeypatch.setenv("RANK", "1")
    other = tracking.RunLog(arguments(tmp_path / "second"), "pipeline")
    other.info("hello")
    other.event("step")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    assert (tmp_path / "second" / "logs" / "rank_1.log").read_text().endswith("hello\n")


def test_run_log_unwritable_output_dir_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file cannot be written"):
        tracking.RunLog(arguments(tmp_path / "file"), "pipeline")


class Engine:
    """What `reduce_metrics` asks of DeepSpeed's engine."""

    device, optimizer, skipped_steps = torch.device("cpu"), SimpleNamespace(loss_scale=8.0), 2

    def __init__(self, fp16=False):
        self.fp16 = fp16

    def get_global_grad_norm(self):
        return torch.tensor(0.5)

    def fp16_enabled(self):
        return self.fp16


def test_reduce_metrics_four_ranks_on_two_hosts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    # Loss, signal, host peak, GPU peak, stage, busy share.
    ranks = [
        [8.0, 0, 1.0, 3.0, 0, 0.5],
        [4.0, 15, 2.0, 5.0, 0, 0.7],
        [2.0, 0, 4.0, 4.0, 1, 0.8],
        [2.0, 10, 8.0, 0, 1, 1],
    ]
    monkeypatch.setattr(tracking, "gather_numbers", lambda numbers, device: ranks)
    preemption = SimpleNamespace(number=0)
    metrics, stopped_by = tracking.reduce_metrics(Engine(), torch.tensor(8.0), 2, preemption, 0, 0.5)
    assert metrics == {
        "loss": 16 / 8, "grad_norm": 0.5, "host_peak_gib": 3.0, "gpu_peak_gib": 5.0,
        "ranks": [[1.0, 3.0, 0, 0.5], [2.0, 5.0, 0, 0.7], [4.0, 4.0, 1, 0.8], [8.0, 0, 1, 1]],
    }  # fmt: skip
    assert stopped_by == "SIGTERM"


def test_reduce_metrics_fp16_has_the_loss_scale():
    preemption = SimpleNamespace(number=0)
    metrics, stopped_by = tracking.reduce_metrics(Engine(fp16=True), torch.tensor(6.0), 4, preemption)
    assert stopped_by is None and metrics.pop("host_peak_gib") > 0
    assert metrics == {"loss": 1.5, "grad_norm": 0.5, "gpu_peak_gib": None, "loss_scale": 8.0, "skipped_steps": 2}


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0, -1.0)]
)
def test_guard_non_finite_number_raises(loss, norm):
    guard = tracking.NonFiniteGuard(False, 5)
    with pytest.raises(UserError, match=r"^step 6: .* the last good step was 5"):
        guard.check(6, loss, norm)
    guard = tracking.NonFiniteGuard(False, 5)
    for step, norm_of_step in ((6, 0.0), (7, None), (8, 1e30)):
        guard.check(step, 1.0, norm_of_step)
    with pytest.raises(UserError, match=rf"^step 9: loss {loss}, gradient norm {norm}; the last good step was 8"):
        guard.check(9, loss, norm)


def test_guard_fp16_raises_after_twenty_bad_steps_in_a_row():
    guard = tracking.NonFiniteGuard(True, 100)
    for step in range(101, 120):
        guard.check(step, 1.0, float("inf"))
    guard.check(120, 1.0, 2.0)
    for step in range(121, 140):
        guard.check(step, 1.0, -1.0)
    with pytest.raises(UserError, match=r"^20 steps in a row skipped, at step 140: .* the last good step was 120"):
        guard.check(140, float("nan"), None)


def test_guard_raises_before_the_loss_scaler_does(monkeypatch):
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=2**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )
    scaler.raise_error_at_min_scale = False  # as the scripts set it next to `deepspeed.initialize`
    guard = tracking.NonFiniteGuard(True, 0)
    with pytest.raises(UserError, match=r"^20 steps in a row skipped, at step 20"):
        for step in range(1, 30):
            scaler.update_scale(overflow=True)
            guard.check(step, 1.0, float("inf"))
    assert scaler.cur_scale == 1


@pytest.mark.parametrize("phase", ["before", "epoch", "after", "test"])
def test_eval_non_finite_loss_raises_before_weights_are_saved(tmp_path, phase):
    log = tracking.RunLog(arguments(tmp_path), "zero")
    start(log, total_steps=9, steps_per_epoch=7)
    result = {"loss": 1.0, "tokens": 9, "samples_per_second": 1.0}
    log.eval(7, result, phase)
    log.eval(7, None, phase)  # nothing to evaluate on
    assert [event["event"] for event in lines(tmp_path)] == ["run", "eval"]
    result["loss"] = float("nan")
    if phase in ("before", "test"):  # nothing is saved after these
        log.eval(7, result, phase)
    else:
        with pytest.raises(UserError, match=r"^step 7: the loss on held-out text is nan"):
            log.eval(7, result, phase)


@pytest.mark.parametrize(("step", "phase"), [(0, "before"), (7, "epoch"), (9, "after"), (10, "after")])
def test_eval_phase_follows_from_the_step(tmp_path, step, phase):
    log = tracking.RunLog(arguments(tmp_path), "zero")
    start(log, total_steps=9, steps_per_epoch=7)
    log.eval(step, {"loss": 1.0, "tokens": 9, "samples_per_second": 1.0})
    event = lines(tmp_path)[-1]
    assert (event["phase"], event["epoch"]) == (phase, step / 7)


def test_step_non_finite_loss_is_logged_and_raises(tmp_path):
    log = tracking.RunLog(arguments(tmp_path), "zero")
    start(log, total_steps=9)
    batch = SimpleNamespace(counts=Counts(1000, 990, 6, 10_000), samples_seen=6)
    with pytest.raises(UserError, match=r"^step 1: loss nan"):
        log.step(1, batch, loss=float("nan"), lr=1e-3, grad_norm=1.0, seconds=1.0, host_peak_gib=1.0)
    assert lines(tmp_path)[-1]["event"] == "step"


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    module = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked for a login"))
    monkeypatch.setattr("getpass.getpass", lambda *prompt: pytest.fail("asked for a key"))
    module.teardown()
    yield module
    module.teardown()


def test_wandb_without_a_key_is_offline_and_does_not_prompt(tmp_path, wandb, monkeypatch, capfd):
    log = tracking.RunLog(argparse.Namespace(output_dir=str(tmp_path), wandb_project="by-hand", seed=3), "pipeline")
    assert log.wandb is not None
    assert log.wandb.settings.mode == "offline"
    assert log.wandb.config["seed"] == 3
    assert log.wandb.group == "pipeline" and log.wandb.project == "by-hand"
    start(log, total_steps=1)
    charts = []
    monkeypatch.setattr(log.wandb, "log", lambda values, step: charts.append((step, values)))
    batch = SimpleNamespace(counts=Counts(1000, 990, 6, 10_000), samples_seen=6)
    log.step(1, batch, loss=2.5, lr=1e-3, grad_norm=None, seconds=0.5, host_peak_gib=1.5, gpu_peak_gib=None)
    log.eval(1, {"loss": 0.0, "tokens": 9, "samples_per_second": 1.0}, phase="test")
    steps = {"train/loss": 2.5, "train/lr": 1e-3, "train/tokens_per_second": 2000.0, "train/samples_seen": 6}
    assert charts == [(1, steps | {"epoch": 0.1}), (1, {"test/loss": 0.0, "test/perplexity": 1.0, "epoch": 0.1})]
    log.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert "deprecated" not in capfd.readouterr().err


def test_wandb_failure_does_not_end_the_run(wandb, monkeypatch, capsys):
    def fail(**arguments):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(wandb, "init", fail)
    assert tracking.start_wandb("by-hand", "pipeline", {}) is None
    assert "disabled (no network)" in capsys.readouterr().err


def test_wandb_with_a_key_or_a_mode_is_not_forced_offline(wandb, monkeypatch):
    modes = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: modes.append(arguments["mode"]))
    tracking.start_wandb("by-hand", "pipeline", {})
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking.start_wandb("by-hand", "pipeline", {})
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: not prompt)  # there is a key
    tracking.start_wandb("by-hand", "pipeline", {})
    assert modes == ["offline", None, None]
