"""How busy each pipeline stage is."""

import time
from typing import Any

import torch
from deepspeed import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass


class StageTimer:
    """Measures how long this stage spends in forward and backward passes in each step.

    The rest of a step is waiting for other stages, sending, reducing gradients and the optimizer. DeepSpeed's own
    breakdown (`wall_clock_breakdown`) fails in the pipeline, so `attach` wraps its forward and backward passes.
    CUDA events around them cost almost nothing, and receiving and sending are instructions of their own.
    """

    def __init__(self):
        self.spans = []

    def attach(self, engine: PipelineEngine) -> None:
        """Wraps the engine's forward and backward passes."""
        timed = {kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in (ForwardPass, BackwardPass)}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **timed}

    def _timed(self, execute):
        def timed(engine, *args, **kwargs):
            start = self._now()
            execute(engine, *args, **kwargs)
            self.spans.append((start, self._now()))

        return timed

    def _now(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> float:
        """Discards what ran before, such as an evaluation; returns the time to pass to `stop`."""
        self.spans.clear()
        return time.perf_counter()

    def stop(self, started: float) -> tuple[float, float]:
        """(seconds of forward and backward passes, seconds in total) since `start`. Waits for the GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            busy = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            busy = sum(end - start for start, end in self.spans)
        return busy, time.perf_counter() - started


def stage_metrics(ranks: list[list[float]], num_stages: int) -> list[dict[str, Any]]:
    """Busy share and peak memory of each stage: the mean and the maximum over its replicas.

    Args:
        ranks: for each rank (host peak in GiB, GPU peak in GiB or 0, stage, busy share).
    """
    stages = []
    for stage in range(num_stages):
        host, gpu, _, busy = zip(*(numbers for numbers in ranks if numbers[2] == stage), strict=True)
        stages.append({"busy": sum(busy) / len(busy), "gpu_peak_gib": max(gpu) or None, "host_peak_gib": max(host)})
    return stages
