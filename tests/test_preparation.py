"""Before training: ranks that wait for a slow one, and GPUs or drivers that the installed PyTorch cannot use."""

import subprocess
import sys

import pytest
import torch
from runs import ROOT, clean_environment, events, free_port, launch

from common import distributed as ranks
from common.errors import UserError

WAIT = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from common import distributed
from common.errors import UserError

dist.init_process_group("gloo", timeout=timedelta(seconds=2))
for mistake in (False, True):
    try:
        with distributed.raise_on_all_ranks():
            if distributed.rank() == 0:
                time.sleep(5)
                if mistake:
                    raise UserError("a mistake")
    except UserError as error:
        print(error)
    else:
        print("agreed")
"""


def test_raise_on_all_ranks_outlasts_the_time_out_of_collective_calls():
    env = clean_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAIT], cwd=ROOT, env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.splitlines() == ["agreed", "rank 0: a mistake"], err


@pytest.mark.slow
def test_run_whose_preparation_outlasts_the_time_out_trains(tmp_path):
    """100 s of preparation with DeepSpeed's time-out at its minimum, one minute."""
    finished = launch(
        "tests/slow_preparation.py", 100, "--max_train_steps", 2, "--max_eval_steps", 1, "--generation_prompt", "",
        "--no-save_checkpoint", "--output_dir", tmp_path, ranks=2, env={"DEEPSPEED_TIMEOUT": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
    assert events(tmp_path, "step")[0]["time"] - events(tmp_path, "run")[0]["time"] < 60


# ------------------------------------------------------------------------------------------- GPUs and drivers

PINNED_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "covered"),
    [
        ((6, 1), PINNED_WHEEL, False),
        ((7, 0), PINNED_WHEEL, False),
        ((7, 5), PINNED_WHEEL, True),
        ((8, 7), PINNED_WHEEL, True),
        ((8, 9), PINNED_WHEEL, True),
        ((10, 3), PINNED_WHEEL, True),
        ((11, 0), PINNED_WHEEL, False),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_60", "sm_70"], True),
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for newer GPUs
        ((8, 9), ["sm_90", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((9, 0), ["gfx90a"], True),  # not CUDA: nothing to tell
        ((9, 0), [], True),
    ],
)
def test_has_code_for(capability, architectures, covered):
    assert ranks.has_code_for(capability, architectures) is covered


def fake_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P40")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: PINNED_WHEEL)


def test_check_gpu_without_code_for_it_raises(monkeypatch):
    fake_gpu(monkeypatch, (6, 1))
    with pytest.raises(UserError) as caught:
        ranks.set_device()
    for words in ("Tesla P40", "6.1", torch.__version__, "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"):
        assert words in str(caught.value)


def test_check_gpu_with_code_for_it_passes(monkeypatch):
    fake_gpu(monkeypatch, (8, 9))
    ranks.check_gpu()


def no_gpu(monkeypatch, error):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


TOO_OLD = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
)


def test_check_gpu_driver_too_old_raises(monkeypatch):
    no_gpu(monkeypatch, TOO_OLD)
    with pytest.raises(UserError, match=r"driver on your system is too old \(found version 12020\)"):
        ranks.set_device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_check_gpu_hidden_gpu_trains_on_the_cpu(monkeypatch, hidden):
    no_gpu(monkeypatch, TOO_OLD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    ranks.check_gpu()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
        RuntimeError("No CUDA GPUs are available"),
        AssertionError("Torch not compiled with CUDA enabled"),
    ],
)
def test_check_gpu_no_gpu_trains_on_the_cpu(monkeypatch, error):
    no_gpu(monkeypatch, error)
    ranks.check_gpu()
