"""What `DeepSpeedCPUAdam` needs around it: removal of stale build locks, parameter groups, an exact resume."""

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch.utils.cpp_extension import _get_build_directory
from transformers import PreTrainedModel

from common.models import blocks


def free_build_lock(name: str = "cpu_adam") -> None:
    """Removes the build lock of a DeepSpeed extension if the process that held it is dead.

    PyTorch's lock is a file. A run that is killed while it compiles or loads the extension leaves it behind, and every
    later run would wait forever. A live owner keeps the file open. A lock that was created after this process started
    is kept, since it may belong to another host.
    """
    lock = Path(_get_build_directory(name, verbose=False), "lock")
    try:
        if lock.stat().st_mtime > psutil.Process().create_time():
            return
    except FileNotFoundError:
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(lock.resolve()) in (file.path for file in process.open_files()):
                return
    lock.unlink(missing_ok=True)


def param_groups_by_block(model: PreTrainedModel) -> list[dict[str, list[torch.nn.Parameter]]]:
    """Returns optimizer groups: the parameters outside the transformer blocks, then one group per block.

    While the CPU updates one group, the new weights of the previous one are copied to the GPU.
    """
    groups = [list(block.parameters()) for block in blocks(model)]
    inside = {parameter for group in groups for parameter in group}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    return [{"params": group} for group in (outside, *groups) if group]


def replay_steps(optimizer: DeepSpeedCPUAdam) -> None:
    """Makes a loaded optimizer compute exactly as the one that was saved.

    Its C++ code updates the powers of the betas by one multiplication per step, in float32. They are not in the saved
    state: after loading it would compute them with `pow`, which rounds differently. So this replays the steps on dummy
    numbers.
    """
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    group, dummies, threads = optimizer.param_groups[0], torch.zeros(4, 1), torch.get_num_threads()
    torch.set_num_threads(1)  # starting threads would take a hundred times as long as the updates themselves
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, group["lr"], *group["betas"], group["eps"], 0.0, group["bias_correction"], *dummies
        )
    torch.set_num_threads(threads)
