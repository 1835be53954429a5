"""What SIGKILL leaves behind, and what the next run makes of it: at each file operation of a save, in whole runs."""

import copy
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.utils.file_baton import FileBaton

from common import checkpoint, manifest, tracking
from helpers.launch import ROOT
from offload import cpu_adam

LAYOUT = {"stages": 1, "replicas": 1, "zero_stage": 0, "precision": "fp32", "offload": False}
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


@pytest.fixture
def kills(monkeypatch):
    """The benchmark. Its directory is on the path for the import alone, since its pipeline.py is not pipeline/."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "benchmarks")
        return importlib.import_module("kills")


@pytest.fixture
def one_rank(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["zero 2", "zero 3", "offload 2", "pipeline"])
def test_run_killed_three_times_equals_an_uninterrupted_run(technique, kills, tmp_path):
    result = kills.measure(technique, 3, 0, tmp_path)
    assert (result["kills"], result["resumes"], result["of one rank"]) == (3, 3, 1)
    assert result["steps"] == kills.STEPS and result["tensors compared"] > 20


# --------------------------------------------------------------------------------------------- one operation


def save(output_dir, step, keep_last=2):
    """What a loop does with a model of one weight, whose value is the step."""
    run = {"global_step": step, "layout": LAYOUT}
    with checkpoint.atomic_checkpoint(output_dir, f"global_step{step}", {"config.json": b"{}"}, 0) as hidden:
        state = {"run": run, "module": torch.tensor(float(step))}
        torch.save(state, output_dir / hidden / "mp_rank_00_model_states.pt")
    checkpoint.prune_checkpoints(output_dir, keep_last)


def in_a_process_of_its_own(function):
    """Calls it in a fork of this process, as the only rank; returns how that ended, as `os.waitpid` says it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def kill_at(number):
    """From here on this process dies by SIGKILL just before its file operation of that number."""
    operations = itertools.count()

    def hook(event, args):
        if event in OPERATIONS and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("step", [3, 4], ids=["a step saved before", "a new step"])
def test_killed_at_any_moment_of_a_save(step, one_rank, tmp_path):
    begin = tmp_path / "begin"
    begin.mkdir()
    assert in_a_process_of_its_own(lambda: [save(begin, number) for number in (1, 2, 3)]) == 0
    for number in itertools.count():
        directory = tmp_path / str(number)
        shutil.copytree(begin, directory)

        def killed(directory=directory, number=number):
            kill_at(number)
            save(directory, step)

        status = in_a_process_of_its_own(killed)
        resume = checkpoint.find_resume("latest", directory, LAYOUT, layers=False)
        assert torch.load(resume.directory / "mp_rank_00_model_states.pt")["module"] == resume.state["global_step"]
        assert resume.state["global_step"] in (3, step)
        for path in directory.glob("global_step*"):
            said = manifest.read(path)
            assert sorted(said) == manifest.files_of(path) == ["config.json", "mp_rank_00_model_states.pt"]
            assert not any(manifest.difference(path, name, entry) for name, entry in said.items())
        args = Namespace(output_dir=directory, save_checkpoint=True, keep_last=None)
        checkpoint.check_disk(args, {1}, size=1)
        assert not list(directory.glob(".global_step*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 15
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == [
        f"global_step{step - 1}", f"global_step{step}",
    ]  # fmt: skip


WHOLE = '{"event": "step", "time": 1, "step": 1}\n'


@pytest.mark.parametrize(
    ("end", "kept"), [("", ""), (WHOLE[:-1], WHOLE), (WHOLE[:-9], ""), ('{"loss": "\u2013'.encode()[:-1], "")]
)
def test_a_record_cut_off_does_not_spoil_the_next(one_rank, tmp_path, end, kept):
    end = end if isinstance(end, bytes) else end.encode()
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE.encode() + end)
    log = tracking.RunLog(Namespace(output_dir=str(tmp_path), wandb_project=None), "zero")
    log.event("step", step=2)
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written.startswith(WHOLE + kept)
    assert json.loads(written.removeprefix(WHOLE + kept))["step"] == 2


HOLD = (
    "import sys; from torch.utils.file_baton import FileBaton; print(FileBaton(sys.argv[1]).try_acquire(), flush=True)"
)


def test_a_dead_builder_keeps_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu_adam.free_build_lock("cpu_adam")  # nothing there
    lock = tmp_path / "cpu_adam" / "lock"
    program = HOLD + "; sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        cpu_adam.free_build_lock("cpu_adam")  # as new as another host's
        os.utime(lock, (time.time() - 86400,) * 2)
        cpu_adam.free_build_lock("cpu_adam")  # old, and at work
        assert lock.exists()
    finally:
        holder.kill()
        holder.communicate()
    assert not FileBaton(lock).try_acquire()
    cpu_adam.free_build_lock("cpu_adam")
    assert FileBaton(lock).try_acquire()


def test_cpu_adam_resumes_exactly():
    """DeepSpeed's Adam on the CPU, loaded after 20 of 40 steps, ends with the very weights of the one that went on."""
    gradients = torch.randn(40, 2, 50, generator=torch.Generator().manual_seed(0))

    def train(optimizer, weights, steps):
        for gradient in gradients[steps]:
            for weight, part in zip(weights, gradient, strict=True):
                weight.grad = part.clone()
            optimizer.step()

    weights = [torch.ones(50, requires_grad=True) for _ in range(2)]
    straight = DeepSpeedCPUAdam(weights, lr=0.1)
    train(straight, weights, slice(20))
    saved = copy.deepcopy((weights, straight.state_dict()))
    train(straight, weights, slice(20, 40))

    again, state = saved
    loaded = DeepSpeedCPUAdam(again, lr=0.1)
    loaded.load_state_dict(state)
    cpu_adam.replay_steps(loaded)
    train(loaded, again, slice(20, 40))
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))
