"""Before training: ranks that wait for a slow one, and GPUs or drivers that the installed PyTorch cannot use."""

import pytest
import torch
import torch.distributed as dist

from common import distributed
from common import distributed as ranks
from common.errors import UserError

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


@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_user_error_passes_raise_on_all_ranks():
    with distributed.raise_on_all_ranks():
        pass
    with pytest.raises(UserError, match=r"^a mistake$") as caught, distributed.raise_on_all_ranks():
        raise UserError("a mistake")
    assert caught.value.on_all_ranks
    with pytest.raises(ZeroDivisionError), distributed.raise_on_all_ranks():
        1 / 0  # noqa: B018


def test_another_ranks_user_error_is_raised_here_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "all_gather_object", lambda everyone, own: everyone.__setitem__(1, "no space left"))
    with pytest.raises(UserError, match=r"^rank 1: no space left$"), distributed.raise_on_all_ranks():
        pass


def test_local_rank_zero_first_raises_what_its_block_raises():
    with distributed.local_rank_zero_first():
        result = "set"
    assert result == "set"
    with pytest.raises(UserError, match=r"^a mistake$"), distributed.local_rank_zero_first():
        raise UserError("a mistake")


def test_plain_python_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that what is set now is gone after the test
        monkeypatch.delenv(name)
    distributed.set_rank_variables()
    assert (distributed.rank(), distributed.world_size(), distributed.local_world_size()) == (0, 1, 1)


def test_run_ends_a_user_error_with_one_line(capsys):
    def main():
        raise UserError("a mistake")

    with pytest.raises(SystemExit) as caught:
        distributed.run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: a mistake\n"
