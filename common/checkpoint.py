"""Checkpoints: their names, the files next to DeepSpeed's own, and what a run needs to resume from one.

DeepSpeed saves weights, optimizer and schedule. It saves neither the state of the random number generators nor
the place in the data; both travel in its `client_state`.
"""

import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from argparse import Namespace
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator
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
from common.files import check_space
from common.manifest import TAG
from common.models import ModelInfo
from common.pretrained import copy_side_files
from common.tracking import RunLog

# ------------------------------------------------------------------------------------------------ checkpointer


class Checkpointer:
    """Saves a run and resumes it, around DeepSpeed's own `save_checkpoint` and `load_checkpoint`.

    Owns everything about a checkpoint that is not DeepSpeed's: which one to resume from, config and tokenizer next to
    the weights, the random state, the check that the disk has room, the rename that makes it complete or absent, how
    many are kept, and uploads to the Hub. All methods are collective, and so is creating one.

    Attributes:
        resume: what to resume from, or None.
        resume_file: local path of --resume_file, or None.
        start_step: optimizer steps done so far.
        initial_epoch: epochs trained before the run's first step.
        learning_rate: peak; a resumed run keeps its own.

    Args:
        num_stages: number of pipeline stages (a pipeline writes one file per layer); None in the other scripts.

    Raises:
        UserError: the checkpoint to resume from is missing, damaged or does not fit, or --hf_repo cannot be written to.
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
        self.info, self.data = info, data
        self.weights_files, self.total_steps = weights_files, total_steps
        if weights_files:
            self.end_idx = self.args.end_idx or data.num_documents
        self.state = {"learning_rate": self.learning_rate, "weight_decay": self.args.weight_decay, **state}
        if hasattr(self.args, "initial_epoch"):
            self.state["initial_epoch"] = self.initial_epoch
        steps_per_epoch = data.train.steps_per_epoch
        parameters = info.parameters
        if self.is_pipeline and info.config.tie_word_embeddings:  # the head has its own file
            parameters += info.config.vocab_size * info.config.hidden_size
        if self.resume and self.resume.reshard:
            ds_config.setdefault("checkpoint", {})["load_universal"] = True
        with raise_on_all_ranks():
            self.hf_config_files = read_hf_config_files(info.directory)
            if self.args.chat_template:
                self.hf_config_files["chat_template.jinja"] = info.tokenizer.chat_template.encode()
            self.size = check_disk(
                self.args, parameters, self.layout, steps_per_epoch, total_steps, self.resume, weights_files
            )

    @contextmanager
    def loading(self, lr_scheduler: LRScheduler, param_groups: int | None = None) -> Iterator[tuple[str, str]]:
        """Around `engine.load_checkpoint`: yields (directory, tag). Restores random state and schedule afterwards.

        Args:
            param_groups: number of optimizer groups of this run, if the checkpoint may have another.

        Raises:
            UserError: DeepSpeed cannot load the checkpoint, or it is of a run with other data or another batch size.
        """
        self.log.info(f"resume from {self.resume.directory}: {self.resume.summary}")
        if self.resume.has_optimizer:
            with loadable_directory(self.resume, self.args.output_dir, param_groups) as directory:
                yield str(directory.parent), directory.name
        else:
            yield str(self.resume.directory.parent), self.resume.directory.name
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
            "rng": rng_states(),
            **self.state,
        }
        with atomic_checkpoint(self.args.output_dir, f"global_step{step}", self.hf_config_files, self.size) as hidden:
            yield hidden, {"run": run}
        self.saved = Path(self.args.output_dir) / f"global_step{step}"
        self._announce(self.saved)

    def save_weights(self, model: Any, step: int) -> None:
        """Writes the weights, without the training state, to `{model}_{start}-{end}-epoch-{N}.pt`.

        Does nothing before the first step, if the run was resumed beyond its last step, with --no-save_checkpoint, or
        if `prepare` did not enable it.

        Args:
            model: Hugging Face's, maybe partitioned by ZeRO-3.

        Raises:
            UserError: the file cannot be written.
        """
        if not self.weights_files or not 0 < step <= self.total_steps or not self.args.save_checkpoint:
            return
        epoch = self.initial_epoch + math.ceil(step / self.data.train.steps_per_epoch)
        name = weights_file_name(self.info.name, self.args.start_idx, self.end_idx, epoch)
        path = Path(self.args.output_dir) / name
        write_weights_file(path, gather_state(model, self.layout["zero_stage"]))
        self._announce(path)

    def _announce(self, path):
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
            command = convert_command(self.saved, self.args.output_dir, *flags)
            self.log.info("to convert the checkpoint for inference:", command)


# --------------------------------------------------------------------------------------------- random numbers


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and PyTorch's generators on this rank, as tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
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


def rng_states() -> list[dict[str, Any]]:
    """`rng_state()` of every rank, in rank order: all ranks call it, all get the same list."""
    states = [None] * world_size()
    dist.all_gather_object(states, rng_state())
    return states


# ------------------------------------------------------------------------------------------------------- save


def read_hf_config_files(model_directory: str | Path) -> dict[str, bytes]:
    """Config, tokenizer and generation config as {file name: bytes}.

    Read once at the start: a run that goes on from a checkpoint has them from there, and may later remove it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy_side_files(model_directory, scratch)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    return files | {"config.json": (Path(model_directory) / "config.json").read_bytes()}


def checkpoint_bytes(parameters: int, layout: dict[str, Any]) -> int:
    """About how many bytes a checkpoint takes: the weights, and for Adam a float32 copy of them and its two moments.

    Without ZeRO a float32 run has no copy, under ZeRO-3 there is nothing but the copy.
    """
    weights = PRECISIONS[layout["precision"]].itemsize if layout["zero_stage"] < 3 else 0
    copy = 0 if layout["precision"] == "fp32" and layout["zero_stage"] == 0 else 4
    return parameters * (weights + copy + 8)


def check_disk(
    args: Namespace,
    parameters: int,
    layout: dict[str, Any],
    steps_per_epoch: int,
    total_steps: int,
    resume: "Resume | None" = None,
    weights_files: bool = False,
) -> int:
    """Checks that --output_dir has room for everything that a run will save and keep.

    Rank 0 first removes what a killed run left in part.

    Args:
        weights_files: whether every epoch also writes a file of only the weights, which --keep_last does not remove.

    Returns:
        Bytes of one checkpoint, `checkpoint_bytes`.

    Raises:
        UserError: there is not enough room.
    """
    size = checkpoint_bytes(parameters, layout)
    if not args.save_checkpoint or rank() != 0:
        return size
    _remove_hidden(args.output_dir)
    done = resume.state["global_step"] if resume and resume.state else 0
    steps, ends = steps_that_save(args, steps_per_epoch, total_steps)
    steps, ends = ({step for step in some if step > done} for some in (steps, ends))
    there = [path for path in Path(args.output_dir).glob("global_step*") if TAG.fullmatch(path.name)]
    check_places(args.output_dir, there)
    if (Path(args.output_dir) / "latest").is_dir():
        raise UserError(
            f"--output_dir {args.output_dir}: its `latest` is a directory, not the file to be written there"
        )
    count = len(steps)
    if args.keep_last:  # and one more, because the newest is written before the oldest goes
        count = min(count, max(1, args.keep_last + 1 - len(there)))
    needed = count * size + weights_files * len(ends) * parameters * PRECISIONS[layout["precision"]].itemsize
    # A run that is begun again replaces what it saved before.
    again = [path for path in there if int(TAG.fullmatch(path.name)[1]) in steps]
    needed -= sum(file.stat().st_size for path in again for file in path.rglob("*") if file.is_file())
    check_space(
        args.output_dir, needed, f"for {count} checkpoints of {parameters:,} parameters (--keep_last keeps fewer)"
    )
    return size


def steps_that_save(args: Namespace, steps_per_epoch: int, total_steps: int) -> tuple[set[int], set[int]]:
    """(steps that end with a checkpoint, those of them that end an epoch or the run)."""
    ends = {*range(steps_per_epoch, total_steps, steps_per_epoch), total_steps}
    return ends | {*range(args.save_every, total_steps + 1, args.save_every)} if args.save_every else ends, ends


def check_places(output_dir: str | Path, paths: Iterable[Path]) -> None:
    """Raises UserError where one of the paths that checkpoints go by is no directory."""
    for path in paths:
        if not path.is_dir():
            raise UserError(f"--output_dir {output_dir}: {path} is no directory, and checkpoints are called so")


def _remove_hidden(output_dir):
    """Removes what a run left that was killed while it saved or removed a checkpoint; rank 0 does it."""
    if rank() == 0:
        for left in (*Path(output_dir).glob(".global_step*"), Path(output_dir, ".latest")):
            _remove(left)


def _remove(path):
    """Removes a directory, or a link to one, or a file, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic_checkpoint(
    output_dir: str | Path, tag: str, hf_config_files: dict[str, bytes], needed: int
) -> Iterator[str]:
    """Around `engine.save_checkpoint`: the checkpoint is at `output_dir/tag` complete or not at all. A collective call.

    The engine writes into a hidden directory, the value of the `with` statement is its name. Once every rank's files
    are on disk and their sizes and checksums in the manifest, the directory gets its name and `latest` moves to it.

    Args:
        hf_config_files: config and tokenizer, as `read_hf_config_files` gives them.
        needed: `checkpoint_bytes`.

    Raises:
        UserError: a rank cannot write its files. What it has written is removed, and checkpoints saved before stay.
    """
    output_dir = Path(output_dir)
    partial = output_dir / f".{tag}.partial"
    with raise_on_all_ranks():
        if rank() == 0:
            try:
                if (output_dir / tag).is_file():
                    raise NotADirectoryError("it is a file")
                _remove_hidden(output_dir)
                check_space(output_dir, needed, f"for {tag}; checkpoints saved before are untouched")
                partial.mkdir()
                for name, content in hf_config_files.items():
                    (partial / name).write_bytes(content)
            except OSError as error:
                raise UserError(_cannot_write(output_dir / tag, error, needed)) from error
    try:
        yield partial.name
        _publish(partial, output_dir / tag, needed)
    except Exception as error:  # torch's writer hides the OSError
        free = shutil.disk_usage(output_dir).free  # before what was written is removed
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(_cannot_write(output_dir / tag, error, needed, free)) from error


def _cannot_write(path, error, needed, free=None):
    """What to say of a checkpoint or file of `needed` bytes that could not be written, with so many bytes free."""
    free = shutil.disk_usage(path.parent).free if free is None else free
    what = "the checkpoint " if TAG.fullmatch(path.name) else ""
    return (
        f"cannot write {what}{path}: {one_line(error, 200)}; it takes about {needed / 1e9:.3g} GB, "
        f"{free / 1e9:.3g} GB were free; checkpoints saved before are untouched"
    )


def _publish(partial, directory, needed):
    """Gives a complete checkpoint its manifest and its name, and moves `latest` to it."""
    names = [manifest.files_of(partial) if rank() == 0 else None]
    dist.broadcast_object_list(names)
    entries = {}
    with raise_on_all_ranks():
        try:
            for name in names[0][rank() :: world_size()]:
                entries[name] = manifest.entry(partial / name)
                _sync(partial / name)
        except OSError as error:
            raise UserError(_cannot_write(directory, error, needed)) from error
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, entries)
    with raise_on_all_ranks():
        if rank() == 0:
            try:
                _write(partial / manifest.MANIFEST, manifest.dumps(dict(ChainMap(*everyone))))
                _sync(partial)
                if directory.exists():  # of an earlier run; a directory that is not empty cannot be replaced
                    directory.rename(_old(directory))
                partial.rename(directory)
                _write(directory.parent / ".latest", directory.name)
                (directory.parent / ".latest").replace(directory.parent / "latest")
                _sync(directory.parent)
                _remove(_old(directory))
            except OSError as error:
                raise UserError(_cannot_write(directory, error, needed)) from error


def _old(directory):
    """What a checkpoint is called while it is replaced or removed."""
    return directory.with_name(f".{directory.name}.old")


def _write(path, text):
    path.write_text(text)
    _sync(path)


def _sync(path):
    """Waits until a file, or a directory's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune_checkpoints(output_dir: str | Path, keep_last: int | None, spare: Collection[Path] = ()) -> None:
    """Rank 0 removes all but the `keep_last` most recently written checkpoints of `output_dir`; None keeps all.

    By time, not by step: an earlier run may have left higher steps than this one has got to.

    Args:
        spare: paths to leave for a later call.
    """
    if keep_last is None or rank() != 0:
        return
    saved = [path for path in Path(output_dir).glob("global_step*") if TAG.fullmatch(path.name)]
    for path in sorted(saved, key=lambda path: path.stat().st_mtime)[:-keep_last]:
        if path in spare:
            continue
        with suppress(OSError):
            path.rename(_old(path))  # a run killed in between must not leave a part of it under its name
            _remove(_old(path))


def convert_command(saved: Path, output_dir: str | Path, *flags: str) -> str:
    """The command that makes an HF directory of a checkpoint, for a shell."""
    return shlex.join(
        ["python", "-m", "common.convert", "to-hf", str(saved), "--output_dir", f"{output_dir}/hf", *flags]
    )


# --------------------------------------------------------------------------------------- files of weights alone


def weights_file_name(model_name: str, start_idx: int, end_idx: int, epoch: int) -> str:
    """`llama3.2-1B_0-4000-epoch-1.pt` for meta-llama/Llama-3.2-1B-Instruct; else the last part of the model's name."""
    name = Path(model_name).name
    llama = re.fullmatch(r"[Ll]lama-([\d.]+)-(\d+[BM])(-Instruct)?", name)
    return f"{f'llama{llama[1]}-{llama[2]}' if llama else name}_{start_idx}-{end_idx}-epoch-{epoch}.pt"


def read_weights_file_name(path: str | Path) -> tuple[int, int, int] | None:
    """(start_idx, end_idx, epoch) from the name of a weights file, or None where it has another form."""
    match = re.search(r"_(\d+)-(\d+)-epoch-(\d+)\.pt$", Path(path).name)
    return tuple(map(int, match.groups())) if match else None


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
    named = read_weights_file_name(args.resume_file) if args.resume_file is not None else None
    _, end, epoch = named or (None, None, 0)
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
    """Every name of the model's state dict, on rank 0's CPU; names of one tied weight get one tensor.

    Under ZeRO-3 every rank takes part: a weight is put together, copied and cut up again before the next.
    """
    state, copies = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            with deepspeed.zero.GatheredParameters(tensor, enabled=stage == 3):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if rank() == 0 else None
        state[name] = copies[id(tensor)]
    return state


def write_weights_file(path: str | Path, state: dict[str, torch.Tensor | None]) -> None:
    """Rank 0 writes `{"MODEL_STATE": state}`; the name appears once the file is complete. A collective call.

    Raises:
        UserError: the file cannot be written, on every rank.
    """
    path = Path(path)
    with raise_on_all_ranks():
        if rank() == 0:
            partial = path.with_name(f".{path.name}.partial")
            try:
                torch.save({"MODEL_STATE": state}, partial)
                partial.replace(path)
            except (OSError, RuntimeError) as error:  # torch's own writer hides the OSError
                tensors = {id(tensor): tensor for tensor in state.values()}.values()
                said = _cannot_write(path, error, sum(tensor.nbytes for tensor in tensors))
                partial.unlink(missing_ok=True)
                raise UserError(said) from error


# ----------------------------------------------------------------------------------------------------- resume


@dataclass
class Resume:
    """A checkpoint to resume from.

    Attributes:
        directory: the checkpoint itself, with the shards in it.
        state: the `run` entry of its client state, which says where the run was; None for bare layer shards.
        has_optimizer: whether DeepSpeed can load the optimizer too, not only weights and position.
        summary: one line that says what is restored.
        reshard: whether the state is sharded for other ranks or parameter groups, and becomes a universal checkpoint
            before DeepSpeed loads it.
        same_ranks: whether each rank is the same stage of the same replica as in the run that saved it.
        schedule_step: steps of the learning-rate schedule so far, fewer than global_step if fp16 skipped some; None if
            the checkpoint does not say.
    """

    directory: Path
    state: dict | None
    has_optimizer: bool
    summary: str
    reshard: bool = False
    same_ranks: bool = False
    schedule_step: int | None = None


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


def check_manifest(directory: Path) -> bool:
    """Compares a checkpoint with its manifest; each rank reads its share of the files. False where it has none.

    Raises:
        UserError: a file is not what was saved; the message names it and a checkpoint from before, if there is one.
    """
    try:
        files = manifest.read(directory) or {}
    except UserError as error:
        raise UserError(f"{error}; {_one_before(directory)}") from error
    for name in sorted(files)[rank() :: world_size()]:
        problem = manifest.difference(directory, name, files[name])
        if problem:
            raise UserError(f"{problem}; {_one_before(directory)}")
    return bool(files)


def _one_before(directory):
    """What to go on from instead of a damaged checkpoint: one line."""
    step = TAG.fullmatch(directory.name)
    earlier = {}
    for other in directory.parent.glob("global_step*"):
        match = TAG.fullmatch(other.name)
        if match and (other / manifest.MANIFEST).is_file() and (not step or int(match[1]) < int(step[1])):
            earlier[int(match[1])] = other
    if not earlier:
        return f"{directory.parent} has no complete checkpoint from before it"
    return f"the one before it: --resume_from_checkpoint {earlier[max(earlier)]}"


def find_resume(argument: str | Path, output_dir: str | Path, now: dict[str, Any], *, layers: bool = True) -> Resume:
    """Looks at what `--resume_from_checkpoint` names, without loading weights.

    Args:
        now: this run's `layout`.
        layers: whether the script takes checkpoints with a file a layer, which are the pipeline's.

    Raises:
        UserError: no checkpoint there, one that does not fit, or one of its files is missing or truncated.
    """
    try:
        directory = _directory_to_resume(argument, output_dir)
    except (OSError, ValueError) as error:  # a name too long, or one with a null byte
        raise UserError(f"--resume_from_checkpoint {one_line(argument, 200)}: {one_line(error, 200)}") from error
    if (directory / "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {directory}: a checkpoint of baseline/train.py; to go on with its weights, name "
            "it with --model_name"
        )
    checked = check_manifest(directory)
    states = sorted(directory.glob("*mp_rank_*_model_states.pt"))
    cut_up = any(path.name.startswith("zero_pp_rank_") for path in states)  # ZeRO-3: each rank has its own
    first = directory / f"{'zero_pp_rank_0_' if cut_up else ''}mp_rank_00_model_states.pt"
    shards = sorted(directory.glob("*zero_pp_rank_*_optim_states.pt"))
    if not layers and list(directory.glob("layer_*")):
        raise UserError(
            f"--resume_from_checkpoint {directory}: a checkpoint of pipeline/train.py; to go on with its weights, "
            "convert them (common.convert to-hf) and name them with --model_name"
        )
    if not states and not shards:
        if not list(directory.glob("layer_*")):
            before = f"; {_one_before(directory)}" if TAG.fullmatch(directory.name) else ""
            raise UserError(f"--resume_from_checkpoint {argument}: no checkpoint in {directory}{before}")
        return Resume(directory, None, False, "weights alone: layer shards without training state")
    if first not in states:
        raise UserError(f"{first} is missing beside {(states + shards)[0].name}: the checkpoint is not whole")
    for path in states + shards:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is truncated: it ends before its table of contents")
    try:
        state = torch.load(first, map_location="cpu", weights_only=True, mmap=True)
        run, schedule_step = state["run"], (state.get("lr_scheduler") or {}).get("last_epoch")
        was = OLDER_LAYOUT | run["layout"]
        ranks = was["stages"] * was["replicas"]
        files = ranks if was["zero_stage"] == 3 else was["stages"], ranks if was["zero_stage"] else 0
    except Exception as error:
        raise UserError(f"{first} is not a checkpoint of this project: {one_line(error, 200)}") from error
    if (len(states), len(shards)) != files:
        raise UserError(
            f"{directory} has {len(states)} model_states and {len(shards)} optim_states files; a run of "
            f"{was['stages']} stages x {was['replicas']} replicas writes {files[0]} and {files[1]}"
        )
    step = f"step {run['global_step']}" + ("" if checked else " (no manifest.json to check its files by)")
    now = OLDER_LAYOUT | now
    if was == now:
        return Resume(directory, run, True, f"whole state at {step}", same_ranks=True)
    differ = [name for name in was if was[name] != now[name]]
    what = [f"{name} {was[name]}, this run has {now[name]}" for name in differ]
    same_ranks = not {"stages", "replicas"} & set(differ)
    # One stage has a tied weight under its layers' names, several under one that they share.
    same_names = was["stages"] == now["stages"] or 1 not in (was["stages"], now["stages"])
    if set(differ) <= {"stages", "replicas", "param_groups"} and was["zero_stage"] and same_names:
        why = f"whole state at {step}, resharded: saved with {'; '.join(what)}"
        return Resume(directory, run, True, why, reshard=True, same_ranks=same_ranks, schedule_step=schedule_step)
    if differ == ["replicas"] and not layers:  # without ZeRO every rank has everything
        return Resume(directory, run, True, f"whole state at {step}")
    if not list(directory.glob("layer_*")):
        raise UserError(
            f"--resume_from_checkpoint {directory}: its files are cut for {'; '.join(what)}; to go on with its weights "
            "alone, convert them (common.convert to-hf) and name them with --model_name"
        )
    why = (
        f"weights, schedule and place in the data at {step}; Adam's moments start from zero: they "
        f"were cut for {'; '.join(what)}"
    )
    return Resume(directory, run, False, why, schedule_step=schedule_step)


def _directory_to_resume(argument, output_dir):
    """The path of the checkpoint itself: `argument`, or what the file `latest` in it names. It may not be there."""
    directory = Path(os.path.expanduser(output_dir if argument == "latest" else argument))
    newest = directory / "latest"
    if newest.is_file():
        directory /= newest.read_text(errors="replace").strip()
        if directory.parent != newest.parent:
            raise FileNotFoundError(f"{newest} names no directory beside it")
        if argument == "latest" and not directory.exists():
            with suppress(OSError):  # killed while it replaced this one; every rank may be the one that puts it back
                _old(directory).rename(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, a checkpoint is a directory")
    return directory


@contextmanager
def loadable_directory(resume: Resume, output_dir: str | Path, param_groups: int | None = None) -> Iterator[Path]:
    """Around `engine.load_checkpoint`: the value of the `with` statement is the directory to load.

    That is the checkpoint, or if it has to be resharded a universal one made from it, which has a file for each
    weight instead of one for each rank. It lies in `output_dir` until it is loaded. A collective call.

    Raises:
        UserError: DeepSpeed cannot convert or load the checkpoint.
    """
    directory = resume.directory
    if resume.reshard:
        directory = Path(output_dir) / f".{resume.directory.name}.universal"
        with raise_on_all_ranks():
            if rank() == 0:
                _make_universal(resume.directory, directory, param_groups)
    try:
        yield directory
        dist.barrier()
    except Exception as error:  # torch's readers and DeepSpeed's checks have no common base
        raise UserError(f"{resume.directory} cannot be loaded: {one_line(error, 200)}") from error
    finally:
        if resume.reshard and rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _make_universal(directory, target, param_groups):
    """Converts a checkpoint to a universal one.

    Args:
        param_groups: how many it gets, all with the settings of the first; None keeps them.
    """
    shutil.rmtree(target, ignore_errors=True)
    workers = str(min(8, len(os.sched_getaffinity(0))))
    finished = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
         "--input_folder", str(directory.resolve()), "--output_folder", str(target.resolve()),
         "--num_extract_workers", workers, "--num_merge_workers", workers],
        capture_output=True, text=True,
    )  # fmt: skip
    (target.parent / "latest_universal").unlink(missing_ok=True)
    if finished.returncode:
        shutil.rmtree(target, ignore_errors=True)
        why = (finished.stderr.strip() or "no word why").splitlines()[-1]
        raise UserError(f"{directory} cannot be made a universal checkpoint: {one_line(why, 200)}")
    if param_groups:  # if the counts differ, DeepSpeed silently loads the state of the first groups only
        path = target / "zero" / "optimizer_state.pt"
        state = torch.load(path, weights_only=False)
        state["param_groups"] = state["param_groups"][:1] * param_groups
        torch.save(state, path)


def check_same(directory: str | Path, was: dict[str, Any], now: dict[str, Any], first: str = "") -> None:
    """Raises UserError where what decides a run's steps is not what it was in the run that goes on.

    Args:
        was, now: `data.data_state` and the like.
        first: what to do with the weights before another run can begin with them.
    """
    for name, value in now.items():
        if was.get(name) != value:
            raise UserError(
                f"--resume_from_checkpoint {directory}: its run had {name} {was.get(name)}, this one has {value}; to "
                f"train these weights otherwise, {first}start anew with --model_name"
            )


def restore(resume: Resume, data_state: dict[str, Any], lr_scheduler: LRScheduler) -> tuple[int, int]:
    """Puts random numbers and schedule back where the checkpoint was.

    Returns:
        (global_step, samples_seen).

    Raises:
        UserError: the data or the batch are not those of the checkpoint, so that its place means nothing.
    """
    run = resume.state
    check_same(resume.directory, run["data"], data_state, "convert them (common.convert to-hf) and ")
    if resume.has_optimizer and resume.same_ranks:  # otherwise each rank keeps the seed it started with
        set_rng_state(run["rng"][rank()])
    if resume.has_optimizer and not resume.reshard:
        steps = lr_scheduler.last_epoch
    else:
        steps = run["global_step"] if resume.schedule_step is None else resume.schedule_step
    # Steps it once to there, since the rate that was saved is that of a run as long as the earlier one.
    lr_scheduler.last_epoch, lr_scheduler._step_count = steps - 1, steps
    with warnings.catch_warnings():
        # It expects an optimizer step before its own, and finds none in this process.
        warnings.simplefilter("ignore")
        lr_scheduler.step()
    return run["global_step"], run["samples_seen"]
