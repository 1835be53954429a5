"""Preparation that takes longer than the time-out of collective calls."""

import subprocess
import sys

import pytest

from helpers.launch import ROOT, clean_environment, events, free_port, launch

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


@pytest.mark.slow
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
        "tests/helpers/slow_preparation.py", 100, "--max_train_steps", 2, "--max_eval_steps", 1,
        "--generation_prompt", "",
        "--no-save_checkpoint", "--output_dir", tmp_path, ranks=2, env={"DEEPSPEED_TIMEOUT": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
    assert events(tmp_path, "step")[0]["time"] - events(tmp_path, "run")[0]["time"] < 60
