"""The checkpoints of zero/ and offload/: their weights in float32, one at a time, whatever the stage they were cut for.

The optimizer updates float32 weights, the masters; a run in 16 bits computes with those, rounded. Under ZeRO 1 to 3
each rank has put its part of the masters into its own `..._optim_states.pt`, and DeepSpeed's converter puts the parts
together. It is given files that were mapped into memory and found to ask for nothing but tensors and DeepSpeed's own
classes: its own way of reading them would execute whatever they ask for.
"""

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, SINGLE_PARTITION_OF_FP32_GROUPS, ZERO_STAGE
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.tensor_fragment import fragment_address

from common.deepspeed_config import PRECISIONS
from common.errors import UserError, one_line
from common.shards import CHUNK, ZERO_FILES, as_bytes, load_tensors_only

DEEPSPEED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class Fp32Weight(NamedTuple):
    """A float32 weight: a tensor, or under stage 3 DeepSpeed's stand-in for one that is split among the ranks."""

    tensor: torch.Tensor | zero_to_fp32.GatheredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> torch.Tensor:
        return self.tensor.contiguous().detach()

    def stream(self, dtype: torch.dtype) -> Iterator[memoryview]:
        """Yields the weight's bytes in `dtype`, a memoryview at a time, each valid until the next."""
        for chunk in self.read().view(-1).split(CHUNK):
            yield as_bytes(chunk.to(dtype))


def read_masters(directory: Path) -> tuple[dict[str, Fp32Weight], torch.dtype]:
    """The weights of a checkpoint that `engine.save_checkpoint` wrote for zero/train.py or offload/train.py.

    Under stages 1 and 2 DeepSpeed's converter holds all of them in memory, 4 bytes a parameter; under stage 3 one at a
    time; under stage 0 they stay in the file.

    Returns:
        (the weights by their names in the HF model, the dtype that the run computed in). A tied weight is there under
        each of its names.

    Raises:
        UserError: a file is missing, damaged, another run's or a pickle that asks for more than tensors and
            DeepSpeed's classes.
    """
    states, layout, dtype = _model_states(directory)
    with torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed's progress
        try:
            tensors = (_merge if layout["zero_stage"] else _stage_0)(directory, states, layout)
        except UserError:
            raise
        except Exception as error:  # a converter that trusts its input fails in as many ways as there are inputs
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(f"{directory}: its files do not make up a checkpoint: {reason}") from error
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{directory}: '{name}' is {tensor.dtype}, expected a floating-point type")
    return {name: Fp32Weight(tensor) for name, tensor in tensors.items()}, dtype


def _model_states(directory):
    """Checks that the files are those of one run: each rank's and no other.

    Returns:
        (the contents of the model_states files in rank order, the layout of their run, its torch dtype).
    """
    found = sorted(path.name for path in directory.glob(ZERO_FILES))
    whole, cut_up = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
    first = next((name for name in (whole, cut_up.format(0)) if name in found), None)
    if first is None:
        raise UserError(f"{directory}: holds {found[0]}, but neither {whole} nor {cut_up.format(0)}")
    first = directory / first
    state = load_tensors_only(first, mmap=True)
    try:
        layout, module = state["run"]["layout"], state["module"]
        stage, ranks, precision = layout["zero_stage"], layout["replicas"], layout["precision"]
        models = [cut_up.format(rank) for rank in range(ranks)] if stage == 3 else [whole]
        expected = models + _optim_files(layout)
        dtype = PRECISIONS[precision]
    except Exception as error:  # the file may hold anything at all
        raise UserError(f"{first}: not of zero/train.py or offload/train.py, which note their layout there") from error
    if not isinstance(module, dict):
        raise UserError(f"{first}: of a pipeline, whose layer shards (layer_*) are missing")

    claim = f"{first.name} is of {ranks} ranks at ZeRO stage {stage} in {precision}, which write {len(expected)} files"
    for name in expected:
        if name not in found:
            raise UserError(f"{directory / name}: missing; {claim}, found {len(found)}")
    for name in found:
        if name not in expected:
            raise UserError(f"{directory / name}: of another run; {claim}, found {len(found)}")
    states = [state] + [load_tensors_only(directory / name, mmap=True) for name in models[1:]]
    for name, other in zip(models, states, strict=True):
        if not isinstance(other, dict) or other.get("run", {}).get("layout") != layout:
            raise UserError(f"{directory / name}: of another run; {claim}")
    return states, layout, dtype


def _optim_files(layout):
    """Names of the optim_states files in rank order."""
    prefix = "bf16_" if layout["precision"] == "bf16" else ""
    ranks = layout["replicas"] if layout["zero_stage"] else 0
    return [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]


def _merge(directory, states, layout):
    """The ranks' parts of the masters, put together by DeepSpeed: dict name -> Tensor or GatheredTensor."""
    stage, ranks = layout["zero_stage"], layout["replicas"]
    parts = []
    for name in _optim_files(layout):
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            optimizer = load_tensors_only(directory / name, mmap=True)["optimizer_state_dict"]
        count = optimizer["partition_count"]
        count = count if isinstance(count, int) else max(count)  # one for each group of parameters
        cut_for = int(optimizer.get(ZERO_STAGE, stage)), count  # without a stage where bf16 sums gradients in float32
        if cut_for != (stage, ranks):
            raise UserError(
                f"{directory / name}: of another run, cut for stage {cut_for[0]} and {cut_for[1]} ranks; the "
                f"model_states beside it are of stage {stage} and {ranks} ranks"
            )
        parts.append(optimizer)
    models = [
        zero_to_fp32.zero_model_state(
            buffers={name: state["module"][name] for name in state["buffer_names"]},
            param_shapes=state["param_shapes"],
            shared_params=list(state["shared_params"].items()),
            ds_version=state["ds_version"],
            frozen_param_shapes=state["frozen_param_shapes"],
            frozen_param_fragments=state["frozen_param_fragments"],
        )
        for state in states
    ]
    # The functions behind get_fp32_state_dict_from_zero_checkpoint. That one also refuses the checkpoints of
    # stage 1 in bf16 with gradients summed in float32, whose optimizer does not note its stage.
    if stage == 3:
        groups = [part[FP32_FLAT_GROUPS] for part in parts]
        return zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(ranks, groups, models, False)
    groups = [part[SINGLE_PARTITION_OF_FP32_GROUPS] for part in parts]
    paddings = parts[0].get(zero_to_fp32.PARAM_ALIGNMENT_PADDINGS)
    return zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(ranks, groups, models, False, paddings)


def _stage_0(directory, states, layout):
    """The masters of a run without ZeRO: dict name -> Tensor.

    A 16-bit run keeps them in a list without names, in the order of the model's parameters.
    """
    (state,) = states
    module = state["module"]
    if layout["precision"] == "fp32":
        return module
    names_of = {}  # tied names share their memory
    for name, tensor in module.items():
        if name not in state["buffer_names"]:
            names_of.setdefault(tensor.data_ptr(), []).append(name)
    masters = [master for group in state["optimizer"]["fp32_groups"] for master in group]
    tensors = dict(module)
    for names, master in zip(names_of.values(), masters, strict=True):
        if not torch.equal(master.to(module[names[0]].dtype), module[names[0]]):
            raise UserError(f"{directory}: '{names[0]}' is not the optimizer's master in its place, rounded")
        tensors |= dict.fromkeys(names, master.detach())
    return tensors
