"""All techniques, one after the other, for a report."""

import resource
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from common import run_all
from helpers.launch import ROOT, clean_environment, events


def step(number, rate=1000.0, *, ranks=2, loss=None, time=None, **fields):
    return {
        "event": "step", "time": 1000.0 + number if time is None else time, "step": number,
        "loss": 5 - number / 10 if loss is None else loss, "tokens": 500, "step_time_s": 0.5,
        "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks, "samples_seen": 7 * number,
        "host_peak_gib": 20.0 + number / 100, **fields,
    }  # fmt: skip


def tabulate(output_dir):
    """The rows of the report's table, {heading: cell} each."""
    lines = [line for line in (output_dir / "report.md").read_text().splitlines() if line.startswith("|")]
    heading, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert len({len(line) for line in lines}) == 1  # the columns line up
    return [dict(zip(heading, row, strict=True)) for row in rows]


@pytest.mark.slow
def test_the_whole_workshop(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "common.report", "--run-all", "--output_dir", str(tmp_path / "out")],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Six minutes of two cores. Of the cores' time, since others may share the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 360
    table = tabulate(tmp_path / "out")
    names = [*run_all.plan(0)]
    losses = {name: [event["loss"] for event in events(tmp_path / "out" / name, "step")] for name in names}
    assert len(losses["baseline"]) == 48
    assert losses["baseline"][-1] < 0.5 * losses["baseline"][0]
    for name in names:
        assert np.abs(np.subtract(losses[name], losses["baseline"])).max() < 1e-4, name
    assert [(row["technique"], row["stage"]) for row in table] == [
        ("baseline", "–"), *(("zero", stage) for stage in "123"), *(("offload", stage) for stage in "123"),
        ("pipeline × 2", "1"),
    ]  # fmt: skip
    all_of_them = "baseline, zero 1, zero 2, zero 3, offload 1, offload 2, offload 3, pipeline × 2"
    assert f"{all_of_them}: the same model, the same tokens and, within 0.0001, the same loss" in finished.stdout
    for name in ("losses.png", "memory_and_throughput.png", "loss_by_time.png"):
        assert matplotlib.image.imread(tmp_path / "out" / name).std() > 0.05
