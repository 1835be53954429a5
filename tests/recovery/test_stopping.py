"""Runs that end before their time: by a signal, on a full disk; and that go on, on other ranks too."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.zero_checkpoint import read_masters
from helpers.launch import ROOT, clean_environment, errors, events, free_port, launch_several

SHORT = (
    "--model_name", "sample-llama", "--dataset_name", "sample-abstracts", "--end_idx", 100, "--max_length", 64,
    "--warmup_steps", 2, "--num_epochs", 20, "--max_train_steps", 12, "--max_eval_steps", 1,
)  # fmt: skip
SILENT = ("--generation_prompt", "")
TECHNIQUES = {
    "zero 0": ("zero/train.py", *SHORT, *SILENT, "--deepspeed_config", "stage 0"),
    "zero 2": ("zero/train.py", *SHORT, *SILENT),
    "zero 3": ("zero/train.py", *SHORT, *SILENT, "--deepspeed_config", ROOT / "zero" / "ds_zero3.json"),
    "offload 2": ("offload/train.py", *SHORT, *SILENT),
    "offload 3": (
        "offload/train.py", *SHORT, *SILENT, "--deepspeed_config", ROOT / "offload" / "ds_zero3_offload.json",
    ),
    "replicas": ("pipeline/train.py", *SHORT, "--num_stages", 1),
    "stages": ("pipeline/train.py", *SHORT),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ signals


class Running:
    """A training run by `deepspeed` on two ranks that someone may signal."""

    def __init__(self, script, *flags, output_dir):
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port", free_port(),
            ROOT / script, *flags, "--output_dir", output_dir,
        ]  # fmt: skip
        self.log = Path(output_dir).with_suffix(".log")
        self.flag = str(output_dir)

        def as_from_a_terminal():
            signal.signal(signal.SIGINT, signal.default_int_handler)

        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*map(str, command)], cwd=ROOT, env=clean_environment(), stdout=log, stderr=log,
                start_new_session=True, preexec_fn=as_from_a_terminal,
            )  # fmt: skip

    def wait_for(self, words):
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def processes(self, word):
        """Their ids: of those whose command line has this word and the output directory."""
        ids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if self.flag in command and any(word in part for part in command):
                ids.append(int(path.parent.name))
        return sorted(ids)

    def ranks(self):
        return self.processes("--local_rank=")

    def wait(self):
        """The launcher's exit code, once all ranks have ended; on a terminal it ends before them."""
        code = self.process.wait(timeout=240)
        while self.processes("train.py"):
            time.sleep(0.05)
        return code


def stopped_after(log):
    """(signal, step) that the one line names."""
    (line,) = [line for line in log.splitlines() if line.startswith("stopped by")]
    words = line.split()
    assert line.endswith("to resume: the same command with --resume_from_checkpoint latest")
    return words[2], int(words[5])


LONG = (*SHORT[:-4], "--max_train_steps", 60, "--max_eval_steps", 1)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero 3", "offload 2")]


@pytest.mark.parametrize("technique", ["stages", *SLOW])
def test_signal_to_one_rank_stops_all_and_resuming_equals_an_uninterrupted_run(technique, tmp_path):
    script, *flags = TECHNIQUES[technique]
    flags += ["--max_train_steps", 24]
    running = Running(script, *flags, output_dir=tmp_path / "a")
    running.wait_for("step 3/24")
    os.kill(running.ranks()[1], signal.SIGUSR1)
    assert running.wait() == 0, running.log.read_text()
    log = running.log.read_text()
    name, step = stopped_after(log)
    assert name == "SIGUSR1" and 3 <= step < 20
    assert log.index(f"saved {tmp_path}/a/global_step{step}") < log.index("stopped by") and "Traceback" not in log
    assert (tmp_path / "a" / "latest").read_text() == f"global_step{step}"
    assert not events(tmp_path / "a", "summary")
    runs = {
        "resumed": (script, *flags, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "a"),
        "straight": (script, *flags, "--output_dir", tmp_path / "b"),
    }
    for finished in launch_several(None, runs, ranks=2).values():
        assert finished.returncodes == [0, 0], finished.stderrs
    exact = technique != "offload 2"  # DeepSpeed's CPU Adam may add in another order
    names = ("step", "loss", "lr", "grad_norm", "samples_seen")
    ours, theirs = ([[step[name] for name in names] for step in events(tmp_path / run, "step")] for run in "ab")
    assert (ours == theirs) if exact else ours == [pytest.approx(step, rel=1e-6) for step in theirs]
    ours, theirs = (weights(tmp_path / run / "global_step24") for run in "ab")
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0 if exact else 1e-6)


def weights(directory):
    """{name: tensor} of a checkpoint."""
    shards = sorted(directory.glob("layer_*"))
    if not shards:
        masters, _ = read_masters(directory)
        return {name: master.contiguous() for name, master in masters.items()}
    return {
        f"{shard.name} {key}": tensor
        for shard in shards
        for key, tensor in torch.load(shard, weights_only=True).items()
    }


def test_ctrl_c_saves_and_ends(tmp_path):
    """The terminal sends it to the launcher and the ranks, and the launcher sends the ranks a SIGTERM right after."""
    running = Running("zero/train.py", *LONG, *SILENT, output_dir=tmp_path / "a")
    running.wait_for("step 3/60")
    os.killpg(running.process.pid, signal.SIGINT)
    running.wait()
    log = running.log.read_text()
    assert log.count("the run saves and ends after this step; Ctrl-C ends it now") == 1
    name, step = stopped_after(log)
    assert name in ("SIGINT", "SIGTERM")
    assert (tmp_path / "a" / "latest").read_text() == f"global_step{step}"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    running = Running("zero/train.py", *LONG, *SILENT, "--save_every", 4, output_dir=tmp_path / "a")
    running.wait_for("saved")
    ranks = running.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # between the two no step may end
    for _ in range(2):
        for rank in ranks:
            os.kill(rank, signal.SIGINT)
            os.kill(rank, signal.SIGCONT)
        time.sleep(0.02)
    code = running.wait()
    assert code != 0
    assert "stopped by" not in running.log.read_text()
    saved = (tmp_path / "a" / "latest").read_text()
    assert (tmp_path / "a" / saved / "manifest.json").exists()


@pytest.mark.slow
def test_the_launchers_sigterm_saves_and_without_saving_the_line_says_so(tmp_path):
    running = Running("pipeline/train.py", *LONG, "--no-save_checkpoint", output_dir=tmp_path / "a")
    running.wait_for("step 3/60")
    (launcher,) = running.processes("deepspeed.launcher.launch")
    os.kill(launcher, signal.SIGTERM)
    running.wait()
    log = running.log.read_text()
    assert "stopped by SIGTERM after step " in log and log.count("to resume: not possible, nothing was saved") == 1
    assert not list((tmp_path / "a").glob("global_step*"))


# ---------------------------------------------------------------------------------------------------- full disk


def test_a_disk_that_fills_up_while_saving(tmp_path):
    """Files of more than 4 MB cannot be written: the weights and the optimizer's shards."""
    flags = (*LONG, *SILENT, "--save_every", 2, "--output_dir", tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        finished = launch_several("zero/train.py", {"full": flags}, ranks=2, fresh=True)["full"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finished.returncodes == [1, 1]
    assert 1 <= len(errors(finished)) <= 2  # a rank that fails first ends the other
    for error in errors(finished):
        assert error.startswith(f"error: cannot write {tmp_path}/a/global_step2: ")
        assert "it takes about 0.0" in error and "were free; earlier checkpoints are untouched" in error
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["logs", "metrics.jsonl"]
