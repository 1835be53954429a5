"""Checkpoints: what they are called, what lies beside DeepSpeed's files, and what a run needs to go on from one.

DeepSpeed saves weights, optimizer and schedule. It saves neither the state of the random number generators nor
the place in the data; both travel in its `client_state`.
"""

import random
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError
from common.launch import all_ranks_agree, rank, world_size
from common.pretrained import copy_side_files

TAG = re.compile(r"global_step(\d+)")


def tag_of(global_step):
    return f"global_step{global_step}"


# --------------------------------------------------------------------------------------------- random numbers


def rng_state():
    """State of Python's, NumPy's and PyTorch's generators on this rank, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_states():
    """`rng_state()` of every rank, in rank order: all ranks call it, all get the same list."""
    states = [None] * world_size()
    dist.all_gather_object(states, rng_state())
    return states


# ------------------------------------------------------------------------------------------------------- save


def prepare_save(output_dir, tag, model_directory):
    """Clears the checkpoint's directory and puts config and tokenizer there, before DeepSpeed's files come.

    A run with other stages may have left files of the same tag; beside the new ones they would be foreign shards.
    `latest` still names the checkpoint before, until DeepSpeed has written every file of this one.
    """
    directory = Path(output_dir) / tag
    with all_ranks_agree():
        if rank() == 0:
            try:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                copy_side_files(model_directory, directory)
                if not (directory / "config.json").exists():
                    shutil.copyfile(Path(model_directory) / "config.json", directory / "config.json")
            except OSError as error:
                raise UserError(f"cannot write the checkpoint {directory}: {error}") from error


def drop_old(output_dir, keep_last):
    """Rank 0 removes all but the `keep_last` newest checkpoints of `output_dir`; None keeps all."""
    if keep_last is None or rank() != 0:
        return
    tags = sorted((int(TAG.fullmatch(path.name)[1]), path) for path in saved(output_dir))
    for _, path in tags[:-keep_last]:
        shutil.rmtree(path)


def saved(output_dir):
    return [path for path in Path(output_dir).glob("global_step*") if TAG.fullmatch(path.name)]


# ----------------------------------------------------------------------------------------------------- resume


@dataclass
class Resume:
    """A checkpoint to go on from.

    Attributes:
        directory: the checkpoint itself, with the shards in it.
        run: the `run` entry of its client state, the place the run was at; None for bare layer shards.
        full: whether DeepSpeed can load the whole state. Otherwise only the weights and the place go over.
        why: one line on what goes over.
    """

    directory: Path
    run: dict | None
    full: bool
    why: str


def find_resume(argument, output_dir, num_stages, dp_world_size):
    """Looks at what `--resume_from_checkpoint` names, without loading weights.

    Raises:
        UserError: no checkpoint there.
    """
    directory = Path(output_dir if argument == "latest" else argument).expanduser()
    if (directory / "latest").exists():
        directory = directory / (directory / "latest").read_text().strip()
    stages = sorted(directory.glob("mp_rank_*_model_states.pt"))
    if not stages and not list(directory.glob("layer_*")):
        raise UserError(f"--resume_from_checkpoint {argument}: no checkpoint in {directory}")
    if not stages:
        return Resume(directory, None, False, "weights alone: layer shards without training state")
    try:
        saved_state = torch.load(stages[0], map_location="cpu", weights_only=True, mmap=True)
        state = saved_state["run"]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{stages[0]} is not a checkpoint of this project: {reason}") from error
    was = f"{len(stages)} stages x {saved_state['dp_world_size']} replicas"
    now = f"{num_stages} stages x {dp_world_size} replicas"
    if was == now:
        return Resume(directory, state, True, f"whole state at step {state['global_step']}")
    why = (
        f"weights, schedule and place in the data at step {state['global_step']}; Adam's moments start from zero: "
        f"they were cut for {was}, this run has {now}"
    )
    return Resume(directory, state, False, why)


def restore(resume, data_state, lr_scheduler):
    """Puts random numbers and schedule back where the checkpoint was.

    Returns:
        (global_step, samples_seen).

    Raises:
        UserError: the data or the batch are not those of the checkpoint, so that its place means nothing.
    """
    run = resume.run
    for name, was in run["data"].items():
        if data_state[name] != was:
            raise UserError(
                f"--resume_from_checkpoint {resume.directory}: its run had {name} {was}, this one has "
                f"{data_state[name]}; to train these weights on other data, convert them (common.convert to-hf) and "
                "start anew with --model_name"
            )
    if resume.full:
        set_rng_state(run["rng"][rank()])
    else:
        lr_scheduler.last_epoch = run["global_step"] - 1
        with warnings.catch_warnings():
            # It expects an optimizer step before its own, and finds none in this process.
            warnings.simplefilter("ignore")
            lr_scheduler.step()
    return run["global_step"], run["samples_seen"]
