"""Memory: as the ZeRO paper counts it, limits of GPU, host and control group, and estimates."""

import argparse
import math
import os

import pytest
import torch
from transformers import AutoConfig

from common import memory, sample
from common.errors import UserError
from common.memory import GIB

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# ------------------------------------------------------------------------------------- as the ZeRO paper counts


def test_model_states_are_those_of_the_papers_figure_1():
    """7.5 B parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB."""
    parts = memory.model_states(7_500_000_000, 64, torch.bfloat16)
    assert [round(sum(part) / 1e9, 1) for part in parts] == [120.0, 31.4, 16.6, 1.9]
    assert [part / 1e9 for part in parts[0]] == [15.0, 15.0, 90.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_model_states_on_one_rank_are_the_same_under_all_stages(dtype):
    parts = memory.model_states(1000, 1, dtype)
    assert parts[1] == parts[2] == parts[3] == (1000 * dtype.itemsize, 1000 * dtype.itemsize, 12_000)
    # Without ZeRO a float32 run has no second copy of its weights.
    assert parts[0][2] == (8000 if dtype == torch.float32 else 12_000)


@pytest.fixture
def peaks(monkeypatch):
    """Two ranks with 1 and 2 GiB allocated, whose peaks are 4 and 3 GiB on the host and 9 and 8 GiB on the GPU."""
    monkeypatch.setattr(memory, "gather_numbers", lambda numbers, device: [numbers, [2.0, numbers[1] - 1]])
    monkeypatch.setattr(memory, "allocated_gib", lambda device: 1.0)
    monkeypatch.setattr(memory, "host_peak_gib", lambda: 4.0)
    monkeypatch.setattr(memory, "gpu_peak_gib", lambda: 9.0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_table_marks_the_stage(peaks, stage):
    lines = memory.zero_table(7_500_000_000, 64, torch.bfloat16, stage, CPU)
    assert "7,500,000,000 parameters in bfloat16, 64 ranks" in lines[0] and "GiB" in lines[0]
    rows = [line.replace("*", " ").split() for line in lines[2:6]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [line.startswith("*") for line in lines[2:6]] == [number == stage for number in range(4)]
    assert [float(row[-1]) for row in rows] == pytest.approx([111.76, 29.25, 15.50, 1.75], abs=0.01)
    assert lines[6] == (
        f"measured under stage {stage} in the process, libraries included: 2.00 GiB between two steps, 4.00 GiB at the "
        "peak"
    )


def test_zero_table_of_offload_has_the_optimizer_on_the_host(peaks):
    lines = memory.zero_table(1_000_000, 2, torch.bfloat16, 2, CUDA, offload=True)
    assert "MiB" in lines[0] and lines[1].endswith("on the host")
    row = lines[4].split()
    # 2 bytes a weight, 1 a gradient, and on the host 9 = 18 / 2.
    assert row[:2] == ["*", "2"]
    assert [float(number) for number in row[2:]] == pytest.approx([1.91, 0.95, 0.0, 2.86, 8.58], abs=0.01)
    assert "on the GPU: 2.00 GiB between two steps, 9.00 GiB at the peak" in lines[6]


# ------------------------------------------------------------------------------------------- before the start


def test_limit_gpu_sets_a_fraction_of_what_the_gpu_has(monkeypatch):
    memory.limit_gpu(None)
    with pytest.raises(UserError, match=r"--gpu_memory 8: there is no GPU"):
        memory.limit_gpu(8)
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = argparse.Namespace(total_memory=32 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    memory.limit_gpu(None)
    assert fractions == []
    memory.limit_gpu(8)
    assert fractions == [0.25]
    with pytest.raises(UserError, match=r"--gpu_memory 40 GiB is more than the 32\.0 GiB that the GPU has"):
        memory.limit_gpu(40)
    for fraction, usable in ((0.25, 8 * GIB), (1.0, 31 * GIB)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, f=fraction: f)
        assert memory.usable_gpu_bytes(CUDA) == usable
    assert memory.usable_gpu_bytes(CPU) == math.inf


def test_check_host_counts_all_ranks_of_the_host(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    memory.check_host(4 * GIB, gib=8)
    with pytest.raises(UserError) as caught:
        memory.check_host(4 * GIB, gib=7.5)
    assert "about 8.0 GiB of host memory (2 ranks x 4.0 GiB)" in str(caught.value)
    assert str(caught.value).endswith("this host has 7.5 GiB")
    with pytest.raises(UserError, match=r"about 9\.0 GiB.*8\.5 GiB \(a hint\)"):
        memory.check_host(4 * GIB, once=GIB, gib=8.5, hint=" (a hint)")
    monkeypatch.setattr(memory, "host_total", lambda: 9 * GIB)
    memory.check_host(4 * GIB)
    with pytest.raises(UserError, match=r"this host has 9\.0 GiB"):
        memory.check_host(5 * GIB)


def test_resident_without_a_gpu_includes_the_model_states():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert memory.resident(10**9, 4, torch.bfloat16, 0, cpu) == 16e9 + GIB
    assert memory.resident(10**9, 4, torch.bfloat16, 3, cpu) == 4e9 + GIB
    assert memory.resident(10**12, 4, torch.bfloat16, 3, cuda) < 4 * GIB


def test_host_total_is_the_control_groups_limit_if_that_is_less(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, total in ((1000, 1000), (math.inf, whole), (2**62, whole)):
        monkeypatch.setattr(memory, "cgroup_limit", lambda limit=limit: limit)
        assert memory.host_total() == total


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        # Slurm's --mem is on the job's group; the step has none of its own.
        (
            "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            {"system.slice/slurmstepd.scope/job_7/memory.max": "4000\n", "system.slice/memory.max": "max\n"},
            4000,
        ),
        (
            "0::/job_7/step_0\n",
            {"job_7/memory.max": "4000", "job_7/step_0/memory.max": "9000", "memory.max": "5000"},
            4000,
        ),
        # A container that sees its own group as the root, with its path or the host's in /proc/self/cgroup.
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/docker/0123\n", {"memory.max": "5000"}, 5000),
        ("0::/job_7\n", {"job_7/memory.max": "max"}, math.inf),
        # Version 1: one line and one hierarchy for each controller.
        (
            "5:cpu,cpuacct:/other\n4:memory:/slurm/uid_0/job_7/step_0\n0::/\n",
            {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": str(2**62)},
            3000,
        ),
        ("4:memory:/slurm\n", {"memory/memory.limit_in_bytes": "2000"}, 2000),
        ("5:cpu:/slurm\n", {"memory/slurm/memory.limit_in_bytes": "1", "slurm/memory.max": "1"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_cgroup_limit_is_the_smallest_on_the_way_to_the_root(tmp_path, membership, files, limit):
    root = tmp_path / "root" / "cgroup"
    (tmp_path / "membership").write_text(membership)
    for name, text in (files | {"../memory.max": "1"}).items():  # above the root nothing counts
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert memory.cgroup_limit(tmp_path / "membership", root) == limit


def test_cgroup_limit_without_control_groups_is_infinite(tmp_path):
    assert memory.cgroup_limit(tmp_path / "none", tmp_path) == math.inf


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_is_the_ranks_shard_and_without_a_gpu_the_whole_model(stage):
    billion = 10**9
    share = 11 if stage == 3 else 9
    assert memory.offloaded(billion, 2, stage, CUDA) == share * billion + 3 * GIB
    # Without a GPU its weights and gradients are there too: float32, under stage 3 a share of them.
    assert memory.offloaded(billion, 2, stage, CPU) == (share + (4 if stage == 3 else 8)) * billion + GIB


def test_activations_of_plain_and_gated_blocks():
    llama, gpt2, bloom = (
        AutoConfig.from_pretrained(sample.sample_model_directory(name)) for name in ("llama", "gpt2", "bloom")
    )
    assert memory.activations(llama, 10) == 2 * 10 * 4 * (7 * 128 + 4 * 352)
    assert memory.activations(gpt2, 10) == memory.activations(bloom, 10) == 2 * 10 * 4 * (7 * 128 + 2 * 512)
    assert memory.logits(llama, 10) == 4 * 10 * 2048
