"""How busy the stages of a pipeline are."""

from types import SimpleNamespace

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, LoadMicroBatch

from pipeline import stage_timer


def test_stage_metrics_are_mean_and_maximum_over_replicas():
    # Host peak, GPU peak, stage, busy share.
    ranks = [[1.0, 3.0, 0, 0.5], [2.0, 5.0, 0, 0.7], [4.0, 4.0, 1, 0.8], [8.0, 0, 1, 1]]
    first, second = stage_timer.stage_metrics(ranks, num_stages=2)
    assert first == {"busy": pytest.approx(0.6), "gpu_peak_gib": 5.0, "host_peak_gib": 2.0}
    assert second == {"busy": pytest.approx(0.9), "gpu_peak_gib": 4.0, "host_peak_gib": 8.0}


def test_stage_timer_counts_forward_and_backward_passes_since_start(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    now = 0.0
    monkeypatch.setattr(stage_timer.time, "perf_counter", lambda: now)

    def taking(seconds):
        def execute(engine, **arguments):
            nonlocal now
            now += seconds

        return execute

    engine = SimpleNamespace(
        _INSTRUCTION_MAP={ForwardPass: taking(1), BackwardPass: taking(2), LoadMicroBatch: taking(4)}
    )
    timer = stage_timer.StageTimer()
    timer.attach(engine)
    engine._INSTRUCTION_MAP[ForwardPass](engine, buffer_id=0)  # such as an evaluation
    started = timer.start()
    for instruction in (LoadMicroBatch, ForwardPass, ForwardPass, BackwardPass):
        engine._INSTRUCTION_MAP[instruction](engine, buffer_id=0)
    assert timer.stop(started) == (4, 8)
