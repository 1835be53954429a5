"""Checkpoints: saving a run, resuming it, and the files next to DeepSpeed's own.

DeepSpeed saves weights, optimizer and schedule. It saves neither the state of the random number generators nor
the position in the data; both are stored in its `client_state`.
"""

import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections import ChainMap
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from common import hub, manifest
from common.cli import peak_learning_rate
from common.data import TextData
from common.deepspeed_config import PRECISIONS, precision_of
from common.distributed import PreemptionHandler, raise_on_all_ranks, rank, world_size
from common.errors import UserError, one_line
from common.files import atomic_path, check_space, free_space, hidden_path, recover, remove, replace, sync
from common.manifest import TAG
from common.models import ModelInfo
from common.pretrained import copy_side_files
from common.tracking import RunLog

# ------------------------------------------------------------------------------------------------ checkpointer


class Checkpointer:
    """Saves and resumes a run, around DeepSpeed's own `save_checkpoint` and `load_checkpoint`.

    Owns everything about a checkpoint that is not DeepSpeed's: which one to resume from, config and tokenizer next to
    the weights, the random state, the disk check, the rename that makes it complete or absent, pruning, and uploads to
    the Hub. All methods are collective, and so is the constructor.

    Attributes:
        resume: what to resume from, or None.
        resume_file: local path of --resume_file, or None.
        start_step: optimizer steps done so far.
        initial_epoch: epochs trained before the run's first step.
        learning_rate: peak; a resumed run keeps its own.

    Args:
        num_stages: number of pipeline stages (a pipeline writes one file per layer); None in the other scripts.

    Raises:
        UserError: the checkpoint to resume from is missing, damaged or does not fit, or --hf_repo is not writable.
    """

    def __init__(
        self, args: Namespace, log: RunLog, ds_config: dict, dp_world_size: int, num_stages: int | None = None
    ):
        self.args, self.log, self.is_pipeline = args, log, num_stages is not None
        self.layout = shard_layout(ds_config, num_stages or 1, dp_world_size, "layer" if self.is_pipeline else "all")
        self.uploads = hub.Uploads(args, log.info)
        name, self.resume_file = hub.fetch_resume(args, log.info)
        self.resume = None
        with raise_on_all_ranks():
            if name is not None:
                self.resume = find_resume(name, args.output_dir, self.layout, layers=self.is_pipeline)
        self.initial_epoch = resolve_initial_epoch(args, log, self.resume)
        self.learning_rate = peak_learning_rate(args, self.resume)
        self.start_step = self.resume.state["global_step"] if self.resume and self.resume.state else 0
        self.saved = self.resume.directory if self.resume else None

    def prepare(
        self,
        info: ModelInfo,
        ds_config: dict,
        data: TextData,
        total_steps: int,
        weights_files: bool = False,
        **state: Any,
    ) -> None:
        """Records what the run trains, and checks that the disk has room for what it will save.

        Args:
            ds_config: receives `checkpoint.load_universal` if the checkpoint to resume from has to be resharded.
            weights_files: whether each epoch ends with `save_weights`.
            state: further entries that a resumed run needs.

        Raises:
            UserError: not enough space, or a file is in the way.
        """
        self.info, self.data, self.total_steps, self.weights_files = info, data, total_steps, weights_files
        self.state = {"learning_rate": self.learning_rate, "weight_decay": self.args.weight_decay, **state}
        if hasattr(self.args, "initial_epoch"):
            self.state["initial_epoch"] = self.initial_epoch
        if self.resume and self.resume.reshard:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
        parameters = info.parameters
        if self.is_pipeline and info.config.tie_word_embeddings:  # the head has its own file
            parameters += info.config.vocab_size * info.config.hidden_size
        self.size = checkpoint_bytes(parameters, self.layout)
        steps, epochs = steps_that_save(self.args, data.train.steps_per_epoch, total_steps, self.start_step)
        weights = weights_files * len(epochs) * parameters * PRECISIONS[self.layout["precision"]].itemsize
        with raise_on_all_ranks():
            self.hf_config_files = read_hf_config_files(info.directory)
            if self.args.chat_template:
                self.hf_config_files["chat_template.jinja"] = info.tokenizer.chat_template.encode()
            check_disk(self.args, steps, self.size, weights)

    @contextmanager
    def loading(self, lr_scheduler: LRScheduler, param_groups: int | None = None) -> Iterator[tuple[str, str]]:
        """Around `engine.load_checkpoint`: yields (directory, tag). Restores random state and schedule afterwards.

        A checkpoint that has to be resharded is first converted to a universal checkpoint, which has one file per
        weight instead of one per rank. It stays in --output_dir until it is loaded.

        Args:
            param_groups: number of optimizer groups of this run, if the checkpoint may have another.

        Raises:
            UserError: DeepSpeed cannot load the checkpoint, or it is from a run on other data or with another batch.
        """
        saved = directory = self.resume.directory
        self.log.info(f"resume from {saved}: {self.resume.summary}")
        if self.resume.reshard:
            directory = hidden_path(Path(self.args.output_dir, saved.name), "universal")
            with raise_on_all_ranks():
                if rank() == 0:
                    make_universal(saved, directory, param_groups)
        try:
            yield str(directory.parent), directory.name
            dist.barrier()
        except Exception as error:  # torch's readers and DeepSpeed's checks have no common base
            raise UserError(f"{saved} cannot be loaded: {one_line(error, 200)}") from error
        finally:
            if self.resume.reshard and rank() == 0:
                remove(directory)
        if self.resume.state:
            restore(self.resume, self.data.state, lr_scheduler)

    @contextmanager
    def saving(self, step: int) -> Iterator[tuple[str, dict]]:
        """Around `engine.save_checkpoint`, which all ranks call: yields (tag, client_state).

        The tag names a hidden directory, which is renamed to `global_step{step}` once every rank's files are complete.

        Raises:
            UserError: a rank cannot write its files. Earlier checkpoints are kept.
        """
        run = {
            "global_step": step,
            "samples_seen": self.data.train[step - 1].samples_seen,
            "layout": self.layout,
            "data": self.data.state,
            "model_name": self.info.name,
            "rng": all_gather(rng_state()),
            **self.state,
        }
        with atomic_checkpoint(self.args.output_dir, f"global_step{step}", self.hf_config_files, self.size) as hidden:
            yield hidden, {"run": run}
        self.saved = Path(self.args.output_dir) / f"global_step{step}"
        self._announce(self.saved)

    def save_weights(self, model: torch.nn.Module, step: int) -> None:
        """Writes the weights, without the training state, to `{model}_{start}-{end}-epoch-{N}.pt`.

        Does nothing before the first step, if the run was resumed beyond its last step, with --no-save_checkpoint, or
        if `prepare` did not enable it.

        Args:
            model: a Hugging Face model, possibly partitioned by ZeRO-3.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.weights_files or not 0 < step <= self.total_steps or not self.args.save_checkpoint:
            return
        epoch = self.initial_epoch + math.ceil(step / self.data.train.steps_per_epoch)
        end_idx = self.args.end_idx or self.data.num_documents
        path = Path(self.args.output_dir) / weights_file_name(self.info.name, self.args.start_idx, end_idx, epoch)
        write_weights_file(path, gather_state(model, self.layout["zero_stage"]))
        self._announce(path)

    def _announce(self, path: Path) -> None:
        prune_checkpoints(self.args.output_dir, self.args.keep_last, self.uploads.pending())
        self.log.info(f"saved {path}")
        self.uploads.upload(path)

    def finish(self, stopped_by: str | None, preemption: PreemptionHandler, device: torch.device) -> None:
        """Unless a signal stopped the run: waits for uploads and prints the command that converts the last checkpoint.

        Raises:
            UserError: an upload failed.
        """
        if stopped_by:
            return
        self.uploads.finish(preemption, device)
        if self.args.save_checkpoint:
            prune_checkpoints(self.args.output_dir, self.args.keep_last, self.uploads.pending())
            flags = ["--verify", *(("--prompt", "We present") if self.is_pipeline else ())]
            command = ["python", "-m", "common.convert", "to-hf", str(self.saved)]
            command += ["--output_dir", f"{self.args.output_dir}/hf", *flags]
            self.log.info("to convert the checkpoint for inference:", shlex.join(command))


# --------------------------------------------------------------------------------------------- random numbers


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators on this rank, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def all_gather(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank. A collective call."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------- disk space


def checkpoints_in(directory: str | Path, prefix: str = "global_step") -> dict[int, Path]:
    """The paths named `{prefix}{step}` in a directory, by step in ascending order."""
    found = {path.name.removeprefix(prefix): path for path in Path(directory).glob(f"{prefix}*")}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def checkpoint_bytes(parameters: int, layout: dict[str, Any]) -> int:
    """Approximate size of a checkpoint: the weights, and for Adam a float32 copy of them and two moments.

    Without ZeRO a float32 run has no copy; under ZeRO-3 the copy is all there is.
    """
    weights = PRECISIONS[layout["precision"]].itemsize if layout["zero_stage"] < 3 else 0
    copy = 0 if layout["precision"] == "fp32" and layout["zero_stage"] == 0 else 4
    return parameters * (weights + copy + 8)


def steps_that_save(
    args: Namespace, steps_per_epoch: int, total_steps: int, start_step: int = 0
) -> tuple[set[int], set[int]]:
    """(steps after `start_step` that end with a checkpoint, those of them that end an epoch or the run)."""
    ends = {*range(steps_per_epoch, total_steps, steps_per_epoch), total_steps}
    steps = ends | {*range(args.save_every, total_steps + 1, args.save_every)} if args.save_every else ends
    return {step for step in steps if step > start_step}, {step for step in ends if step > start_step}


def check_disk(args: Namespace, steps: set[int], size: int, others: int = 0, prefix: str = "global_step") -> None:
    """Checks on rank 0 that --output_dir has room for everything that a run will save and keep.

    First removes unfinished files of a killed run.

    Args:
        steps: after which the run saves a checkpoint.
        size: bytes of one checkpoint.
        others: bytes of what the run writes besides checkpoints.
        prefix: a checkpoint is called `{prefix}{step}`.

    Raises:
        UserError: not enough space, or a file has the name of a checkpoint.
    """
    if not args.save_checkpoint or rank() != 0:
        return
    _remove_unfinished(args.output_dir)
    existing = checkpoints_in(args.output_dir, prefix)
    for path in existing.values():
        if not path.is_dir():
            raise UserError(f"--output_dir {args.output_dir}: {path} has a checkpoint's name, but is not a directory")
    count = len(steps)
    if args.keep_last:  # one more at a time, because the newest is written before the oldest is removed
        count = min(count, max(1, args.keep_last + 1 - len(existing)))
    needed = used = 0
    for step in sorted(steps)[:count]:
        used += size
        needed = max(needed, used)  # a checkpoint of the same name is removed only once the new one is complete
        if step in existing:
            used -= sum(file.stat().st_size for file in existing[step].rglob("*") if file.is_file())
    what = f"for {count} checkpoints of {size / 1e9:.3g} GB (--keep_last keeps fewer)"
    check_space(args.output_dir, needed + others, what)


@contextmanager
def write_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns any error of a block that writes `path` into a UserError that states the free space.

    Any error, because the writers of torch and safetensors hide the OSError of a full disk.

    Args:
        needed: about how many bytes `path` takes, if known.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        takes = f"it takes about {needed / 1e9:.3g} GB, " if needed is not None else ""
        raise UserError(
            f"cannot write {path}: {one_line(error, 200)}; {takes}{free_space(path.parent) / 1e9:.3g} GB were free; "
            "earlier checkpoints are untouched"
        ) from error


# ------------------------------------------------------------------------------------------------------- save


def read_hf_config_files(model_directory: str | Path) -> dict[str, bytes]:
    """Config, tokenizer and generation config as {file name: bytes}.

    Read once at the start: a resumed run has them from a checkpoint that it may remove later.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy_side_files(model_directory, scratch)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    return files | {"config.json": (Path(model_directory) / "config.json").read_bytes()}


def _remove_unfinished(output_dir: str | Path) -> None:
    """Removes what a run left behind that was killed while saving or removing a checkpoint."""
    for pattern in (".global_step*", ".latest*"):
        for path in Path(output_dir).glob(pattern):
            remove(path)


@contextmanager
def atomic_checkpoint(
    output_dir: str | Path, tag: str, hf_config_files: dict[str, bytes], needed: int
) -> Iterator[str]:
    """Around `engine.save_checkpoint`: the checkpoint is at `output_dir/tag` complete or not at all. A collective call.

    The engine writes into a hidden directory, whose name is the value of the `with` statement. Once every rank's files
    are on disk and their sizes and checksums in the manifest, the directory is renamed and `latest` points to it.

    Args:
        hf_config_files: config and tokenizer, as returned by `read_hf_config_files`.
        needed: `checkpoint_bytes`.

    Raises:
        UserError: a rank cannot write its files. What was written is removed; earlier checkpoints are kept.
    """
    directory = Path(output_dir) / tag
    partial = hidden_path(directory, "partial")
    try:
        with raise_on_all_ranks(), write_errors(directory, needed):
            if rank() == 0:
                _remove_unfinished(output_dir)
                check_space(output_dir, needed, f"for {tag}; earlier checkpoints are untouched")
                partial.mkdir()
                for name, content in hf_config_files.items():
                    (partial / name).write_bytes(content)
        with write_errors(directory, needed):
            yield partial.name
        _publish(partial, directory, needed)
    except Exception:
        remove(partial)
        raise


def _publish(partial: Path, directory: Path, needed: int) -> None:
    """Adds the manifest to a complete checkpoint, renames it, and points `latest` to it."""
    names: list[list[str]] = [[]]
    with raise_on_all_ranks(), write_errors(directory, needed):
        if rank() == 0:
            names = [manifest.files_of(partial)]
    dist.broadcast_object_list(names)
    entries = {}
    with raise_on_all_ranks(), write_errors(directory, needed):
        for name in names[0][rank() :: world_size()]:
            entries[name] = manifest.entry(partial / name)
            sync(partial / name)
    all_entries = all_gather(entries)
    with raise_on_all_ranks(), write_errors(directory, needed):
        if rank() == 0:
            (partial / manifest.MANIFEST).write_text(manifest.dumps(dict(ChainMap(*all_entries))))
            sync(partial / manifest.MANIFEST)
            sync(partial)
            replace(partial, directory)
            with atomic_path(directory.parent / "latest") as path:
                path.write_text(directory.name)
            sync(directory.parent)


def prune_checkpoints(output_dir: str | Path, keep_last: int | None, spare: Collection[Path] = ()) -> None:
    """Removes on rank 0 all but the `keep_last` most recently written checkpoints of `output_dir`; None keeps all.

    By time, not by step: an earlier run may have left higher steps than this one has reached.

    Args:
        spare: paths to leave for a later call.
    """
    if keep_last is None or rank() != 0:
        return
    saved = sorted(checkpoints_in(output_dir).values(), key=lambda path: path.stat().st_mtime)
    for path in saved[:-keep_last]:
        if path not in spare:
            with suppress(OSError):  # renamed first: a run killed in between must not leave part of it under its name
                remove(path.rename(hidden_path(path, "old")))


# ------------------------------------------------------------------------------------------- weights-only files


def weights_file_name(model_name: str, start_idx: int, end_idx: int, epoch: int) -> str:
    """`llama3.2-1B_0-4000-epoch-1.pt` for meta-llama/Llama-3.2-1B-Instruct; else the last part of the model's name."""
    name = Path(model_name).name
    llama = re.fullmatch(r"[Ll]lama-([\d.]+)-(\d+[BM])(-Instruct)?", name)
    return f"{f'llama{llama[1]}-{llama[2]}' if llama else name}_{start_idx}-{end_idx}-epoch-{epoch}.pt"


def read_weights_file_name(path: str | Path) -> tuple[int, int, int] | None:
    """(start_idx, end_idx, epoch) from the name of a weights file, or None if it has another form."""
    match = re.search(r"_(\d+)-(\d+)-epoch-(\d+)\.pt$", Path(path).name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def resolve_initial_epoch(args: Namespace, log: RunLog, resume: "Resume | None" = None) -> int:
    """The number of epochs trained before this run, whose first epoch gets the next number.

    That is --initial_epoch, or the number in the name of --resume_file, or 0; a resumed run keeps its own. In scripts
    without these flags it is 0. Warns if the slice of the data does not start where that file's slice ended.

    Raises:
        UserError: --initial_epoch differs from that of the resumed run.
    """
    if not hasattr(args, "initial_epoch"):
        return 0
    if resume:
        epoch = (resume.state or {}).get("initial_epoch", 0)
        if args.initial_epoch not in (None, epoch):
            raise UserError(
                f"--initial_epoch {args.initial_epoch}: the run saved in {resume.directory} started "
                f"from epoch {epoch}, and a resumed run keeps that; remove the flag"
            )
        return epoch
    named = read_weights_file_name(args.resume_file or "")
    _, end, epoch = named or (0, 0, 0)
    if args.initial_epoch is not None:
        epoch = args.initial_epoch
    if named:
        log.info(f"weights from {args.resume_file}: the first epoch of this run is number {epoch + 1}")
        if args.start_idx != end:
            log.info(
                f"warning: that file was trained up to document {end}, this run starts at --start_idx {args.start_idx}"
            )
    return epoch


def gather_state(model: torch.nn.Module, stage: int) -> dict[str, torch.Tensor | None]:
    """The model's state dict on rank 0's CPU; names of one tied weight get one tensor.

    A collective call under ZeRO-3: each weight is gathered, copied and partitioned again before the next.
    """
    state, copies = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters(tensor, enabled=stage == 3):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if rank() == 0 else None
        state[name] = copies[id(tensor)]
    return state


def write_weights_file(path: str | Path, state: dict[str, torch.Tensor | None]) -> None:
    """Rank 0 writes `{"MODEL_STATE": state}`; the file appears complete or not at all. A collective call.

    Raises:
        UserError: the file cannot be written, on every rank.
    """
    path = Path(path)
    with raise_on_all_ranks():
        if rank() == 0:
            size = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in state.values()}.values())
            with write_errors(path, size), atomic_path(path) as partial:
                torch.save({"MODEL_STATE": state}, partial)


# ----------------------------------------------------------------------------------------------------- resume


@dataclass
class Resume:
    """A checkpoint to resume from.

    Attributes:
        directory: the checkpoint itself, which holds the shards.
        state: the `run` entry of its client state, which says where the run was; None for layer shards only.
        has_optimizer: whether DeepSpeed can load the optimizer too, not only weights and position.
        summary: one line that says what is restored.
        reshard: whether its shards are for other ranks or parameter groups, and become a universal checkpoint before
            DeepSpeed loads them.
        same_ranks: whether each rank is the same stage of the same replica as in the run that saved it.
        schedule_step: steps of the learning-rate schedule so far, fewer than global_step if fp16 skipped some.
    """

    directory: Path
    state: dict | None
    has_optimizer: bool
    summary: str
    reshard: bool = False
    same_ranks: bool = False
    schedule_step: int = 0


# Layout keys that older checkpoints lack.
OLDER_LAYOUT = {"offload": False, "param_groups": "all"}


def shard_layout(ds_config: dict, num_stages: int, dp_world_size: int, param_groups: str = "all") -> dict[str, Any]:
    """The layout of DeepSpeed's optimizer shards, which load only into the same layout.

    Args:
        param_groups: how the optimizer's parameters are grouped: "layer" in the pipeline, "all" in its older
            checkpoints and in the other scripts, whose groups never change.
    """
    return {
        "stages": num_stages,
        "replicas": dp_world_size,
        "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
        "precision": precision_of(ds_config),
        "offload": bool(ds_config.get("zero_optimization", {}).get("offload_optimizer")),
        "param_groups": param_groups,
    }


def find_resume(argument: str | Path, output_dir: str | Path, layout: dict[str, Any], *, layers: bool = True) -> Resume:
    """Decides what this run can resume from the checkpoint that --resume_from_checkpoint names; reads no weights.

    Args:
        layout: of this run, see `shard_layout`.
        layers: whether the script takes checkpoints with one file per layer, which are the pipeline's.

    Raises:
        UserError: no checkpoint there, one that does not fit, or one of its files is missing or damaged.
    """
    directory = _locate(argument, output_dir)
    has_layers = any(directory.glob("layer_*"))
    if has_layers and not layers:
        raise UserError(
            f"--resume_from_checkpoint {directory}: a checkpoint of pipeline/train.py; to train its weights, convert "
            "them (common.convert to-hf) and pass the result as --model_name"
        )
    verified = check_manifest(directory)
    states = sorted(directory.glob("*mp_rank_*_model_states.pt"))
    shards = sorted(directory.glob("*zero_pp_rank_*_optim_states.pt"))
    if has_layers and not states and not shards:
        return Resume(directory, None, False, "only weights: layer shards without training state")
    if not states:
        raise UserError(
            f"--resume_from_checkpoint {argument}: no checkpoint in {directory}, expected DeepSpeed's files "
            f"*mp_rank_*_model_states.pt{_earlier(directory)}"
        )
    run, saved, schedule_step = _read_state(directory, states, shards)

    layout = OLDER_LAYOUT | layout
    differing = [name for name in saved if saved[name] != layout[name]]
    changes = "; ".join(f"{name} {saved[name]}, this run has {layout[name]}" for name in differing)
    step = f"step {run['global_step']}" + ("" if verified else " (no manifest.json to verify its files)")
    same_ranks = not {"stages", "replicas"} & {*differing}
    resume = Resume(directory, run, True, f"whole state at {step}", False, same_ranks, schedule_step)
    # Without ZeRO every rank has all of the optimizer's state.
    if not differing or (differing == ["replicas"] and not saved["zero_stage"] and not layers):
        return resume
    # One stage has a tied weight under the names of its layers, several have it under a shared name.
    same_names = "stages" not in differing or 1 not in (saved["stages"], layout["stages"])
    if saved["zero_stage"] and same_names and {*differing} <= {"stages", "replicas", "param_groups"}:
        resume.reshard = True
        resume.summary += f", resharded: saved with {changes}"
        return resume
    if not has_layers:
        raise UserError(
            f"--resume_from_checkpoint {directory}: its shards are for {changes}; to train its weights, convert them "
            "(common.convert to-hf) and pass the result as --model_name"
        )
    resume.has_optimizer = False
    resume.summary = (
        f"weights, schedule and position in the data at {step}; Adam's moments start from zero: the saved ones are for "
        f"{changes}"
    )
    return resume


def _locate(argument: str | Path, output_dir: str | Path) -> Path:
    """The checkpoint's path, which need not exist: `argument`, or the directory that the file `latest` in it names."""
    try:
        directory = Path(os.path.expanduser(output_dir if argument == "latest" else argument))
        latest = directory / "latest"
        if latest.is_file():
            directory /= latest.read_text(errors="replace").strip()
            if directory.parent != latest.parent:
                raise FileNotFoundError(f"{latest} does not name a directory next to it")
            if argument == "latest":
                recover(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file, expected a checkpoint directory")
        return directory
    except (OSError, ValueError) as error:  # including a name that is too long or has a null byte
        raise UserError(f"--resume_from_checkpoint {one_line(argument, 200)}: {one_line(error, 200)}") from error


def check_manifest(directory: Path) -> bool:
    """Compares a checkpoint's files with its manifest; each rank reads its share. False if it has no manifest.

    Raises:
        UserError: a file is not what was saved; the message names it and the checkpoint before it, if there is one.
    """
    try:
        files = manifest.read(directory) or {}
        for name in sorted(files)[rank() :: world_size()]:
            if problem := manifest.difference(directory, name, files[name]):
                raise UserError(problem)
    except UserError as error:
        raise UserError(f"{error}{_earlier(directory)}") from error
    return bool(files)


def _earlier(directory: Path) -> str:
    """Names the checkpoint before a damaged one, at the end of an error message; empty if the directory has no step."""
    if not (tag := TAG.fullmatch(directory.name)):
        return ""
    complete = [
        path
        for step, path in checkpoints_in(directory.parent).items()
        if (path / manifest.MANIFEST).is_file() and step < int(tag[1])
    ]
    if not complete:
        return f"; {directory.parent} has no earlier complete checkpoint"
    return f"; the one before it: --resume_from_checkpoint {complete[-1]}"


def _read_state(directory: Path, states: list[Path], shards: list[Path]) -> tuple[dict, dict, int]:
    """(`run` entry, shard layout, steps of the schedule) of a checkpoint, once all of its files are there.

    Args:
        states: one file per pipeline stage, under ZeRO-3 one per rank.
        shards: of the optimizer, one per rank; none without ZeRO.
    """
    for path in states + shards:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is truncated: the index at its end is missing")
    try:
        state = torch.load(states[0], map_location="cpu", weights_only=True, mmap=True)
        run = state["run"]
        layout = OLDER_LAYOUT | run["layout"]
        schedule_step = (state.get("lr_scheduler") or {}).get("last_epoch", run["global_step"])
        ranks = layout["stages"] * layout["replicas"]
        expected = ranks if layout["zero_stage"] == 3 else layout["stages"], ranks if layout["zero_stage"] else 0
    except Exception as error:
        raise UserError(f"{states[0]} is not from a checkpoint of this project: {one_line(error, 200)}") from error
    if (len(states), len(shards)) != expected:
        raise UserError(
            f"{directory} has {len(states)} model_states and {len(shards)} optim_states files; a run of "
            f"{layout['stages']} stages x {layout['replicas']} replicas writes {expected[0]} and {expected[1]}"
        )
    return run, layout, schedule_step


def make_universal(directory: Path, target: Path, param_groups: int | None) -> None:
    """Converts a checkpoint to a universal one.

    Args:
        param_groups: how many it gets, all with the settings of the first; None keeps them.
    """
    remove(target)
    workers = str(min(8, len(os.sched_getaffinity(0))))
    finished = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
         "--input_folder", str(directory.resolve()), "--output_folder", str(target.resolve()),
         "--num_extract_workers", workers, "--num_merge_workers", workers],
        capture_output=True, text=True,
    )  # fmt: skip
    remove(target.parent / "latest_universal")
    if finished.returncode:
        remove(target)
        reason = (finished.stderr.strip() or "no error output").splitlines()[-1]
        raise UserError(f"{directory} cannot be converted to a universal checkpoint: {one_line(reason, 200)}")
    if param_groups:  # if the counts differ, DeepSpeed silently loads the state of the first groups only
        path = target / "zero" / "optimizer_state.pt"
        state = torch.load(path, weights_only=False)
        state["param_groups"] = state["param_groups"][:1] * param_groups
        torch.save(state, path)


def check_same(directory: str | Path, saved: dict[str, Any], current: dict[str, Any], first: str = "") -> None:
    """Raises UserError if what determines a run's steps differs from the run that is resumed.

    Args:
        saved, current: `TextData.state` and the like.
        first: what has to be done with the weights before a new run can start from them.
    """
    for name, value in current.items():
        if saved.get(name) != value:
            raise UserError(
                f"--resume_from_checkpoint {directory}: its run had {name} {saved.get(name)}, this one has {value}; to "
                f"train its weights with other settings, {first}start a new run with --model_name"
            )


def restore(resume: Resume, data_state: dict[str, Any], lr_scheduler: LRScheduler) -> None:
    """Sets random state and learning-rate schedule to where the checkpoint was saved.

    Raises:
        UserError: the data or the batch differ from the checkpoint's, so that its position is meaningless.
    """
    check_same(resume.directory, resume.state["data"], data_state, "convert them (common.convert to-hf) and ")
    if resume.has_optimizer and resume.same_ranks:  # otherwise each rank keeps the seed it started with
        set_rng_state(resume.state["rng"][rank()])
    # One step to that point computes the rate: the saved one belongs to the saved run's total number of steps.
    lr_scheduler.last_epoch, lr_scheduler._step_count = resume.schedule_step - 1, resume.schedule_step
    with warnings.catch_warnings():
        # It expects an optimizer step before its own, but there was none in this process.
        warnings.simplefilter("ignore")
        lr_scheduler.step()
