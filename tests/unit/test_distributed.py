"""Ranks: their numbers, whether PyTorch can use their GPUs, and errors and signals that concern all of them."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from common import distributed
from common.errors import UserError


@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- GPUs and drivers

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"


def fake_gpu(monkeypatch, gpus=0, init_error=None, kernel_error=None):
    """A machine with that many GPUs, on which CUDA's start or the first kernel fails."""

    def raise_or_return(error, result=None):
        if error:
            raise error
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "init", lambda: raise_or_return(init_error))
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: raise_or_return(kernel_error, torch.zeros(1)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    "machine",
    [
        {"init_error": RuntimeError(TOO_OLD)},
        {"gpus": 1, "kernel_error": RuntimeError("CUDA error: no kernel image is available for execution")},
    ],
    ids=["driver", "kernel"],
)
def test_set_device_unusable_gpu_raises(monkeypatch, machine):
    fake_gpu(monkeypatch, **machine)
    with pytest.raises(UserError, match=r"(driver on your system is too old \(found version 12020\)|no kernel image)"):
        distributed.set_device()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        distributed.check_gpu()


def test_set_device_fewer_gpus_than_ranks_raises(monkeypatch):
    fake_gpu(monkeypatch, gpus=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.set_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^local rank 2 has no GPU: this host has 2; start one process per GPU$"):
        distributed.set_device()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        RuntimeError("No CUDA GPUs are available"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_set_device_no_gpu_is_the_cpu(monkeypatch, error):
    fake_gpu(monkeypatch, init_error=error)
    monkeypatch.setattr(distributed, "set_cpu_threads", lambda: None)
    assert distributed.set_device() == torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- all ranks


def test_raise_on_all_ranks_own_error_is_raised():
    with distributed.raise_on_all_ranks():
        pass
    with pytest.raises(UserError, match=r"^a mistake$") as caught, distributed.raise_on_all_ranks():
        raise UserError("a mistake")
    assert caught.value.on_all_ranks
    with pytest.raises(ZeroDivisionError), distributed.raise_on_all_ranks():
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([None, "no space left", None], "rank 1: no space left"),
        ([None, None, "ZeroDivisionError: division by zero"], "rank 2: ZeroDivisionError: division by zero"),
        (["a mistake"] * 3, "a mistake"),
    ],
)
def test_raise_on_all_ranks_error_of_another_rank_is_raised_here_too(monkeypatch, messages, error):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "all_gather_object", lambda everyone, own: everyone.__setitem__(slice(None), messages))
    with pytest.raises(UserError) as caught, distributed.raise_on_all_ranks():
        pass
    assert str(caught.value) == error and caught.value.on_all_ranks


@pytest.mark.parametrize("local_rank", [0, 1])
def test_local_rank_zero_first_runs_in_turn_and_raises(monkeypatch, local_rank):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    turns = []
    monkeypatch.setattr(dist, "all_gather_object", lambda everyone, own: turns.append("agreed"))
    monkeypatch.setattr(distributed, "wait_for_all_ranks", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with distributed.local_rank_zero_first():
        turns.append("block")
    assert turns == (["block", "agreed", "agreed"] if local_rank == 0 else ["agreed", "block", "agreed"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"^a mistake$"), distributed.local_rank_zero_first():
        raise UserError("a mistake")


@pytest.fixture
def handlers():
    """Restores the signal handlers."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_preemption_handler_only_records_the_first_signal(handlers, capfd):
    preemption = distributed.PreemptionHandler()
    assert preemption.number == 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert preemption.number == signal.SIGUSR1
    assert capfd.readouterr().err == "SIGUSR1: the run saves and ends after this step; Ctrl-C ends it now\n"


def test_set_rank_variables_plain_python_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that what is set now is gone after the test
        monkeypatch.delenv(name)
    distributed.set_rank_variables()
    assert (distributed.rank(), distributed.world_size(), distributed.local_world_size()) == (0, 1, 1)


def test_set_rank_variables_deepspeeds_local_size_is_renamed(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    distributed.set_rank_variables()
    assert distributed.local_world_size() == 4 and "LOCAL_SIZE" not in os.environ


@pytest.mark.parametrize(
    ("rank", "on_all_ranks", "says"),
    [(0, False, "error: a mistake\n"), (1, True, ""), (1, False, "error: a mistake\n")],
)
def test_run_user_error_is_one_line_and_exit_code_1(monkeypatch, capsys, rank, on_all_ranks, says):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(distributed, "LAST_WORD_S", 0)

    def main():
        raise UserError("a mistake", on_all_ranks=on_all_ranks)

    with pytest.raises(SystemExit) as caught:
        distributed.run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == says
