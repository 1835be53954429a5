"""All techniques, one after the other, for a report."""

import resource
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from common import run_all
from helpers.launch import ROOT, clean_environment, events
from helpers.run_records import table_of


@pytest.mark.slow
def test_run_all_trains_every_technique_to_the_same_losses(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "common.report", "--run-all", "--output_dir", str(tmp_path / "out")],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Six minutes of two cores. Of the cores' time, since others may share the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 360
    table = table_of(tmp_path / "out")
    names = [*run_all.plan(0)]
    losses = {name: [event["loss"] for event in events(tmp_path / "out" / name, "step")] for name in names}
    assert len(losses["baseline"]) == 48
    assert losses["baseline"][-1] < 0.5 * losses["baseline"][0]
    for name in names:
        assert np.abs(np.subtract(losses[name], losses["baseline"])).max() < 1e-4, name
    assert [(row["technique"], row["stage"]) for row in table] == [
        ("baseline", "–"), *((f"zero {stage}", stage) for stage in "123"),
        *((f"offload {stage}", stage) for stage in "123"),
        ("pipeline × 2", "1"),
    ]  # fmt: skip
    all_of_them = "baseline, zero 1, zero 2, zero 3, offload 1, offload 2, offload 3, pipeline × 2"
    assert f"{all_of_them}: the same model, the same tokens and, within 0.0001, the same loss" in finished.stdout
    for name in ("losses.png", "memory_and_throughput.png", "loss_by_time.png"):
        assert matplotlib.image.imread(tmp_path / "out" / name).std() > 0.05
