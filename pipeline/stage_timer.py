"""How busy each pipeline stage is."""

import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass


class StageTimer:
    """Measures how long this stage spends in forward and backward passes in each step.

    The rest of a step goes to waiting for other stages, sending, reducing gradients and the optimizer. DeepSpeed's own
    breakdown (`wall_clock_breakdown`) fails in the pipeline, so `attach` wraps its forward and backward passes, which
    exclude receiving and sending. CUDA events around them cost almost nothing.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []  # (start, end): CUDA events, or seconds on a CPU

    def attach(self, engine: PipelineEngine) -> None:
        """Wraps the engine's forward and backward passes."""
        timed = {kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in (ForwardPass, BackwardPass)}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **timed}

    def _timed(self, execute: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: PipelineEngine, *args: Any, **kwargs: Any) -> None:
            start = self._now()
            execute(engine, *args, **kwargs)
            self.spans.append((start, self._now()))

        return timed

    def _now(self) -> Any:
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
        """Returns (seconds of forward and backward passes, seconds in total) since `start`. Waits for the GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            busy = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            busy = sum(end - start for start, end in self.spans)
        return busy, time.perf_counter() - started


def stage_metrics(ranks: list[list[float]], num_stages: int) -> list[dict[str, Any]]:
    """Returns for each stage the mean busy share and the maximum peak memory over its replicas.

    Args:
        ranks: for each rank (host peak in GiB, GPU peak in GiB or 0, stage, busy share).
    """
    stages = []
    for stage in range(num_stages):
        host, gpu, _, busy = zip(*(numbers for numbers in ranks if numbers[2] == stage), strict=True)
        stages.append({"busy": sum(busy) / len(busy), "gpu_peak_gib": max(gpu) or None, "host_peak_gib": max(host)})
    return stages
