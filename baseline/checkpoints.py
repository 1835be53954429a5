"""Trainer's checkpoints: which ones are complete, and whether there is room for them."""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from common import checkpoint
from common.distributed import rank
from common.errors import UserError, one_line
from common.files import remove
from common.tracking import RunLog

PREFIX = "checkpoint-"
RUN_STATE = "run_state.json"  # in each checkpoint, next to Trainer's own files
# What Trainer needs to resume; if some are missing, it silently starts over. It writes trainer_state.json last.
PARTS = ("trainer_state.json", RUN_STATE, "model.safetensors*", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
BYTES_PER_PARAMETER = 12  # of a checkpoint: the weight and Adam's two moments in float32


def check_disk(args: Namespace, parameters: int, steps_per_epoch: int, total_steps: int) -> None:
    """Raises UserError if --output_dir has no room for what a run will save, or a file is in the way."""
    steps, _ = checkpoint.steps_that_save(args, steps_per_epoch, total_steps)
    final_model = 4 * parameters  # saved once more at the end, without the training state
    checkpoint.check_disk(args, steps, BYTES_PER_PARAMETER * parameters, final_model, PREFIX)


@contextmanager
def saving(output_dir: str, global_step: int, run_state: dict[str, Any]) -> Iterator[None]:
    """Around Trainer's saving: the checkpoint is complete or, if that fails, removed.

    Args:
        run_state: what determines the steps of the run; it is saved too.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    directory = Path(output_dir) / f"{PREFIX}{global_step}"
    try:
        with checkpoint.write_errors(directory):
            if rank() == 0:
                directory.mkdir(parents=True, exist_ok=True)
                # Without it, what an earlier run saved here counts as incomplete until Trainer has overwritten it.
                (directory / "trainer_state.json").unlink(missing_ok=True)
                (directory / RUN_STATE).write_text(json.dumps(run_state, indent=2))
            yield
    except UserError:
        remove(directory)
        raise


def find_checkpoint(args: Namespace, log: RunLog) -> str | None:
    """The `checkpoint-N` directory that --resume_from_checkpoint names, or None.

    "latest" is the newest complete one. Newer ones that a killed run left incomplete are
    skipped, with a line in the log.

    Raises:
        UserError: there is no complete checkpoint.
    """
    name = args.resume_from_checkpoint
    if name is None:
        return None
    if name != "latest":
        if problem := incomplete(Path(name)):
            raise UserError(f"--resume_from_checkpoint {name}: not a complete checkpoint of Trainer: {problem}")
        return name
    found = checkpoint.checkpoints_in(args.output_dir, PREFIX).values()
    for path in reversed(found):
        if not (problem := incomplete(path)):
            return str(path)
        log.info(f"{path} is skipped: {problem}")
    raise UserError(
        f"--resume_from_checkpoint latest: {args.output_dir} has no complete {PREFIX}N ({len(found)} incomplete ones)"
    )


def incomplete(directory: Path) -> str | None:
    """Why Trainer cannot resume from a checkpoint, or None if it can."""
    for part in PARTS:
        if not any(directory.glob(part)):
            return f"it has no {part}"
    try:
        step = TrainerState.load_from_json(str(directory / "trainer_state.json")).global_step
        if not isinstance(step, int) or not isinstance(read_run_state(directory), dict):
            return f"its trainer_state.json or {RUN_STATE} is damaged"
    except (OSError, TypeError, ValueError) as error:
        return f"its state cannot be read: {one_line(error, 200)}"
    return None


def read_run_state(directory: str | Path) -> dict[str, Any]:
    """What determined the steps of the run that saved this checkpoint."""
    return json.loads((Path(directory) / RUN_STATE).read_text())


def check_loaded(model: nn.Module, missing: list[str]) -> None:
    """Raises UserError if a checkpoint lacks some of the model's weights; a tied weight may have any of its names.

    Args:
        missing: names that were not in the checkpoint.
    """
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    loaded = {number for name, number in tensors.items() if name not in missing}
    lacking = sorted(name for name in missing if tensors.get(name) not in loaded)
    if lacking:
        raise UserError(f"it has no weights for {', '.join(lacking[:3])}")
