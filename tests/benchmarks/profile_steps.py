"""Runs a training script with PyTorch's profiler on, and sums up for every step what kept each rank's GPU busy.

    deepspeed --num_gpus=2 tests/benchmarks/profile_steps.py zero/train.py --output_dir runs/profile ...

Each rank writes OUTPUT_DIR/profile_rank_R.json: per step its seconds and the milliseconds of its kernels by kind.
Communication includes waiting for the other ranks.
"""

import collections
import json
import runpy
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {  # by what a kernel's name contains; the first that fits counts
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "copies": ("memcpy", "memset"),
}


def kind_of(kernel):
    kernel = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other kernels")


class StepProfiler:
    """Profiles from one call of `RunLog.step` to the next, outside of what the step's seconds cover."""

    def __init__(self, log_step):
        self.log_step, self.profiler, self.steps = log_step, None, []

    def __call__(self, log, global_step, batch, **fields):
        self.log_step(log, global_step, batch, **fields)
        if self.profiler:
            self.profiler.stop()
            busy = collections.Counter()
            for event in self.profiler.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    busy[kind_of(event.name)] += event.time_range.elapsed_us() / 1000
            self.steps.append(
                {"step": global_step, "seconds": fields["seconds"], "tokens": batch.counts.tokens, **busy}
            )
        self.profiler = profile(activities=[ProfilerActivity.CUDA])
        self.profiler.start()


if __name__ == "__main__":
    # The launcher puts --local_rank before the script's own name.
    script = next(argument for argument in sys.argv[1:] if argument.endswith(".py"))
    sys.path[0] = str(Path(script).parents[1])  # instead of this directory, which has another module called pipeline
    from common import distributed
    from common.tracking import RunLog

    profiler = StepProfiler(RunLog.step)
    RunLog.step = lambda *args, **kwargs: profiler(*args, **kwargs)
    sys.argv = [script, *(argument for argument in sys.argv[1:] if argument != script)]
    output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    runpy.run_path(script, run_name="__main__")
    profiler.profiler.stop()
    (output / f"profile_rank_{distributed.rank()}.json").write_text(json.dumps(profiler.steps, indent=1) + "\n")
