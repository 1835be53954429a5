"""Trainer's checkpoints: which ones are complete, and whether there is room for them."""

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from common.checkpoint import check_places, steps_that_save
from common.distributed import rank
from common.errors import UserError, one_line
from common.files import check_space
from common.tracking import RunLog

RUN_STATE = "run_state.json"  # in each checkpoint, next to Trainer's own files
# What Trainer needs to resume; if some are missing, it silently starts over. It writes trainer_state.json last.
PARTS = ("trainer_state.json", RUN_STATE, "model.safetensors*", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
BYTES_PER_PARAMETER = 12  # of a checkpoint: the weight and Adam's two moments in float32


def check_disk(args: Namespace, parameters: int, steps_per_epoch: int, total_steps: int) -> None:
    """Raises UserError if --output_dir has no room for what a run will save, or a file is in the way."""
    if not args.save_checkpoint or rank() != 0:
        return
    check_places(args.output_dir, Path(args.output_dir).glob("checkpoint-*"))
    steps, _ = steps_that_save(args, steps_per_epoch, total_steps)
    count = min(len(steps), args.keep_last + 1) if args.keep_last else len(steps)
    needed = (count * BYTES_PER_PARAMETER + 4) * parameters  # and the model by itself at the end
    check_space(
        args.output_dir, needed, f"for {count} checkpoints of {parameters:,} parameters (--keep_last keeps fewer)"
    )


@contextmanager
def saving(output_dir: str, global_step: int, run_state: dict[str, Any]) -> Iterator[None]:
    """Around Trainer's saving: the checkpoint is complete or, if that fails, removed.

    Args:
        run_state: what decides the steps of the run; it is saved too.

    Raises:
        UserError: it cannot be written.
    """
    directory = Path(output_dir) / f"checkpoint-{global_step}"
    try:
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            # Without it, what an earlier run saved here counts as incomplete until Trainer overwrites it.
            (directory / "trainer_state.json").unlink(missing_ok=True)
            (directory / RUN_STATE).write_text(json.dumps(run_state, indent=2))
        yield
    except Exception as error:  # a full disk is whatever the writer of the format raises
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(
            f"{directory} cannot be saved ({free / 1e9:.3g} GB are free): {one_line(error, 200)}; checkpoints saved "
            "before are untouched"
        ) from error


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
        problem = incomplete(Path(name))
        if problem:
            raise UserError(f"--resume_from_checkpoint {name}: {problem}, so no whole checkpoint of Trainer's")
        return name
    numbered = {}
    for path in Path(args.output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            numbered[int(number)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        problem = incomplete(path)
        if not problem:
            return str(path)
        log.info(f"{path} is passed over: {problem}")
    if not numbered:
        raise UserError(f"--resume_from_checkpoint latest: {args.output_dir} has no checkpoint-N")
    raise UserError(f"--resume_from_checkpoint latest: none of the {len(numbered)} in {args.output_dir} is whole")


def incomplete(directory: Path) -> str | None:
    """Why Trainer could not resume from a checkpoint, or None if it can."""
    for part in PARTS:
        if not any(directory.glob(part)):
            return f"it has no {part}"
    try:
        step = TrainerState.load_from_json(directory / "trainer_state.json").global_step
        if not isinstance(step, int) or not isinstance(read_run_state(directory), dict):
            return f"its trainer_state.json or {RUN_STATE} is damaged"
    except (OSError, TypeError, ValueError) as error:
        return f"its state cannot be read: {one_line(error, 200)}"
    return None


def read_run_state(directory: str | Path) -> dict[str, Any]:
    """What decided the steps of the run that saved this checkpoint."""
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
