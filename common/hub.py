"""Uploads checkpoints to the Hugging Face Hub while training continues, and downloads them to resume or convert.

    python -m common.hub upload USER/NAME runs/zero/global_step69

uploads what a run could not: a checkpoint directory or a file of weights, under its own name.

A checkpoint is uploaded in one commit, so a repository has all of it or nothing. Its `manifest.json` states the size
and SHA-256 of every file, and a download that differs from it is not used. Weights files and layer shards at the root
of a repository have no manifest; they are compared with the size and SHA-256 that the Hub states.
"""

import argparse
import atexit
import fnmatch
import logging
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub as hf
import torch
import torch.distributed as dist
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.utils import disable_progress_bars

from common import manifest
from common.cli import ArgumentParser, repository
from common.distributed import PreemptionHandler, gather_numbers, local_rank, raise_on_all_ranks, rank, world_size
from common.errors import UserError, command
from common.files import atomic_path, check_space, remove
from common.hub_client import Log, address, reason, request, retry
from common.manifest import TAG
from common.pretrained import GENERATION_FILES, TOKENIZER_FILES

ROOT = Path(__file__).resolve().parents[1]

# The client retries most requests 5 times over 23 s, but not a commit. So a failed upload or download is repeated as
# a whole after these seconds; files that have arrived are not transferred again.
RETRY_WAITS_S = (10, 20, 40, 80)
# Ranks without uploads wait for rank 0 in calls of this length: a collective call times out after 10 minutes.
POLL_S = 1

_REPO = r"[\w-][\w.-]*/[\w.-]+"
CHECKPOINT_NAME = re.compile(rf"({_REPO})(?:/({TAG.pattern}))?")
WEIGHTS_FILE_NAME = re.compile(rf"({_REPO})/([^/]+\.pt)")
# The files used of a checkpoint with layer shards, except by a run that resumes its training state.
LAYER_FILES = ("layer_*", "config.json", *TOKENIZER_FILES, *GENERATION_FILES)

Entries = dict[str, dict[str, Any]]  # as in a manifest: file name -> {"size": bytes, "sha256": hex}


# ----------------------------------------------------------------------------------------- before training


def full_name(repo: str) -> str:
    """`USER/NAME` of a repository; without a user it is the token's."""
    if "/" in repo:
        return repo
    user = request(HfApi().whoami, f"--hf_repo {repo}: the token's user is unknown")["name"]
    return f"{user}/{repo}"


def check_write(repo: str, create: bool = True) -> str:
    """Checks, in about a second, that checkpoints can be uploaded to a repository; returns its full name.

    Args:
        create: create the repository, as a private one, if it does not exist.

    Raises:
        UserError: no token, an invalid one, no such repository, no write access, or the Hub cannot be reached.
    """
    if not hf.get_token():
        raise UserError(
            f"--hf_repo {repo}: no token for the Hub; run `hf auth login` or set HF_TOKEN, with write access"
        )
    repo = full_name(repo)

    def check() -> None:
        if create:
            HfApi().create_repo(repo, private=True, exist_ok=True)
        HfApi().auth_check(repo, write=True)

    request(check, f"--hf_repo {repo}: cannot write to {address(repo)} with this token")
    return repo


# ---------------------------------------------------------------------------------------------------- upload


class Uploads:
    """Queue of checkpoint directories and weights files, uploaded to one repository by a background thread.

    Every rank creates one, at the same place; it only acts on rank 0, and only with --hf_repo.

    `HfApi.run_as_future` is not used: Python waits for its thread pool at exit, so a run that fails would hang until
    its uploads end. A daemon thread ends with the process.

    Args:
        args: of the script: hf_repo, output_dir, resume_from_checkpoint.
        log: called with one line, also from the thread.

    Raises:
        UserError: see `check_write`.
    """

    def __init__(self, args: argparse.Namespace, log: Log):
        self.log = log
        self.list_file = Path(args.output_dir) / ".to_upload"  # tells the next run what this one did not upload
        self.active = args.hf_repo is not None and rank() == 0
        self.queue: list[Path] = []  # the first is being uploaded
        self.done: list[Path] = []
        self.failed: dict[Path, str] = {}
        self.changed = threading.Condition()
        with raise_on_all_ranks():
            if not self.active:
                return
            # A misspelled name must not create an empty repository to resume from.
            self.repo = check_write(args.hf_repo, create=args.resume_from_checkpoint != "hub")
        threading.Thread(target=self._work, name="uploads", daemon=True).start()
        atexit.register(self._at_exit)
        left = self._read_list() if args.resume_from_checkpoint is not None else []
        if left:
            log(f"still to be uploaded from the previous run: {', '.join(path.name for path in left)}")
        for path in left:
            self.upload(path)

    def upload(self, path: Path) -> None:
        """Queues a directory or file and returns. It must not change until it is no longer `pending`."""
        if not self.active:
            return
        with self.changed:
            # Weights files are small and what others wait for: they go before directories.
            self.queue.insert(len(self.queue) if path.is_dir() else 1, path)
            self._write_list()
            self.changed.notify_all()

    def pending(self) -> set[Path]:
        """Paths that are still to be uploaded, or whose upload failed."""
        with self.changed:
            return {*self.queue, *self.failed}

    def finish(self, preemption: PreemptionHandler, device: torch.device) -> None:
        """Waits for all uploads and logs where they are; a collective call.

        Args:
            preemption: a signal ends the wait; what is still pending is then printed at exit.

        Raises:
            UserError: an upload failed, on every rank; has the command that tries again.
        """
        busy = True
        while busy:
            with self.changed:
                done = self.changed.wait_for(lambda: not self.queue, POLL_S)
            ranks = gather_numbers([not done, preemption.number], device)
            busy, number = map(max, zip(*ranks, strict=True))
            if busy and number:
                self.log(f"stopped by {signal.Signals(int(number)).name} before all uploads were done")
                return
        atexit.unregister(self._at_exit)
        if self.done:
            self.log(f"on the Hub, {address(self.repo)}: {', '.join(path.name for path in self.done)}")
        with raise_on_all_ranks():
            if self.failed:
                raise _failure(self.repo, self.failed, len(self.failed) + len(self.done))

    def _work(self) -> None:
        disable_progress_bars()  # the run has its own
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue)
                path = self.queue[0]
            try:
                # After one failure with all retries the Hub is probably down: the other paths get one try each.
                line, error = send(self.repo, path, self.log, () if self.failed else RETRY_WAITS_S), None
            except Exception as raised:  # whatever it is, training continues
                error = reason(raised)
                line = f"{path} is not on the Hub: {error}"
            self.log(line)
            with self.changed:
                self.queue.remove(path)
                if error is None:
                    self.failed.pop(path, None)  # an earlier upload under the same name
                    self.done.append(path)
                else:
                    self.failed[path] = error
                self._write_list()
                self.changed.notify_all()

    def _write_list(self) -> None:
        with suppress(OSError):  # a full disk must not end the training here
            if not (pending := sorted(self.pending())):
                self.list_file.unlink()
                return
            with atomic_path(self.list_file) as hidden:
                hidden.write_text("".join(f"{self.repo} {path.name}\n" for path in pending))

    def _read_list(self) -> list[Path]:
        """Paths that an earlier run did not upload to this repository and that still exist."""
        try:
            lines = self.list_file.read_text(errors="replace").splitlines()
        except OSError:
            return []
        names = [name for repo, _, name in (line.partition(" ") for line in lines) if repo == self.repo]
        paths = [self.list_file.parent / Path(name).name for name in names if name]
        return [path for path in paths if path.is_file() or (path / manifest.MANIFEST).is_file()]

    def _at_exit(self) -> None:
        """Prints what a run that ends before its uploads leaves to do."""
        self.log = lambda line: None
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # the client's connections break now
        if missing := sorted(self.pending()):
            names = ", ".join(map(str, missing))
            line = f"not on the Hub: {names}; to upload: {retry_command(self.repo, missing)}"
            print(line, file=sys.stderr, flush=True)


def retry_command(repo: str, paths: Iterable[Path]) -> str:
    """The command that uploads these paths, to be run in the current directory."""
    here = Path.cwd() == ROOT
    words = [str(path) if here else os.path.abspath(path) for path in paths]
    line = shlex.join(["python", "-m", "common.hub", "upload", repo, *words])
    return line if here else f"(cd {shlex.quote(str(ROOT))} && {line})"


def _failure(repo: str, failed: dict[Path, str], count: int) -> UserError:
    reasons = "; ".join(f"{path} ({why})" for path, why in failed.items())
    return UserError(
        f"{len(failed)} of {count} uploads failed: {reasons}. The files are still here. "
        f"To try again: {retry_command(repo, failed)}"
    )


def send(repo: str, path: Path, log: Log, waits: Iterable[float]) -> str:
    """Uploads a checkpoint directory or a file under its own name; returns a line that says where it is.

    Args:
        waits: seconds to wait before each retry.

    Raises:
        UserError: a file is not what the checkpoint's manifest says.
        Exception: the client's last error.
    """
    started = time.monotonic()
    size = retry(lambda: _upload(repo, path), waits, log)
    where = address(f"{repo}/{'tree' if path.is_dir() else 'blob'}/main/{path.name}")
    return f"uploaded {path} to {where}: {size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s"


def _upload(repo: str, path: Path) -> int:
    """Uploads in one commit; returns the number of bytes.

    Not with `HfApi.upload_folder`: if Xet is installed, that may split a checkpoint into several commits.
    """
    api, tag = HfApi(), path.name
    if path.is_dir():
        files = manifest.read(path) or {name: manifest.entry(path / name) for name in manifest.files_of(path)}
        additions = []
        for name, stated in files.items():
            addition = CommitOperationAdd(f"{tag}/{name}", path / name)
            # One file at a time: for several the client uses a thread pool, for which Python waits at exit.
            api.preupload_lfs_files(repo, [addition], num_threads=1, free_memory=False)
            if addition.upload_info.sha256.hex() != stated["sha256"]:
                raise UserError(manifest.difference(path, name, stated) or f"{path / name} was changed meanwhile")
            additions.append(addition)
        additions.append(CommitOperationAdd(f"{tag}/{manifest.MANIFEST}", manifest.dumps(files).encode()))
        before = {name for name in _list_files(repo)[1] if name.startswith(f"{tag}/")}
    else:
        additions, before = [CommitOperationAdd(path.name, path)], set()
    stale = before - {addition.path_in_repo for addition in additions}
    deletions = [CommitOperationDelete(name) for name in sorted(stale)]
    api.create_commit(repo, [*deletions, *additions], commit_message=f"Upload {path.name}", num_threads=1)
    return sum(addition.upload_info.size for addition in additions)


# -------------------------------------------------------------------------------------------------- download


class RemoteCheckpoint(NamedTuple):
    """A checkpoint in a repository, or a weights file at its root.

    Attributes:
        repo: full name.
        revision: commit that it was found in.
        tag: its folder; None for files at the repository's root.
        files: dict name -> {"size": bytes, "sha256": hex}. The SHA-256 is None if neither a manifest nor the Hub
            states it.
    """

    repo: str
    revision: str
    tag: str | None
    files: Entries

    @property
    def name(self) -> str:
        """`USER/NAME/global_stepN`, or `USER/NAME` for the root."""
        return f"{self.repo}/{self.tag}" if self.tag else self.repo

    def check_config(self, flag: str) -> None:
        """Raises UserError for layer shards without a config: `flag` has to name the model."""
        if self.tag is None and "config.json" not in self.files:
            raise UserError(f"{self.repo} has layer shards but no config.json; name their model with {flag}")


def find(name: str, flag: str = "") -> RemoteCheckpoint | None:
    """Finds the checkpoint `USER/NAME` or `USER/NAME/global_stepN`; see `choose`.

    Returns None for any other text, and for a path that exists on this machine: local paths take precedence.

    Raises:
        UserError: it is not on the Hub either; the message starts with `flag`.
    """
    match = CHECKPOINT_NAME.fullmatch(name)
    if not match or os.path.exists(name):
        return None
    try:
        return choose(*match.group(1, 2))
    except UserError as error:
        raise UserError(f"{flag} {name}: not a local directory; on the Hub: {error}".lstrip()) from error


def choose(repo: str, tag: str | None = None) -> RemoteCheckpoint:
    """Finds the checkpoint `tag` in a repository, by default the newest complete one or else layer shards at the root.

    Raises:
        UserError: no such repository, or no such checkpoint in it.
    """
    repo = full_name(repo)
    revision, there = request(lambda: _list_files(repo), f"{repo} cannot be read")
    tops = sorted({name.split("/")[0] for name in there if not name.startswith(".")})
    complete = [top for top in tops if TAG.fullmatch(top) and f"{top}/{manifest.MANIFEST}" in there]
    if tag is None and complete:
        tag = max(complete, key=lambda top: int(top.removeprefix("global_step")))
    if tag in complete:
        name = f"{tag}/{manifest.MANIFEST}"
        path = request(lambda: hf.hf_hub_download(repo, name, revision=revision), f"{repo}/{name} cannot be read")
        return RemoteCheckpoint(repo, revision, tag, manifest.read(Path(path).parent) or {})
    if tag is None and _has_layers(tops):
        return RemoteCheckpoint(repo, revision, None, {name: there[name] for name in tops if name in there})
    raise UserError(
        f"{repo} has no complete checkpoint {tag or 'and no layer shards at its root'}; complete (a folder "
        f"global_stepN with {manifest.MANIFEST}): {', '.join(complete) or 'none'}; all its files and folders: "
        f"{', '.join(tops[:20]) or 'none'}"
    )


def _list_files(repo: str) -> tuple[str, Entries]:
    """(commit, files) of a repository's main branch. The SHA-256 of small files, which git itself stores, is None."""
    info = HfApi().model_info(repo, files_metadata=True)
    return info.sha, {
        file.rfilename: {"size": file.size, "sha256": file.lfs.sha256 if file.lfs else None}
        for file in info.siblings or []
    }


def _has_layers(names: Iterable[str]) -> bool:
    return any(name.startswith("layer_") for name in names)


def _download(choice: RemoteCheckpoint, names: Iterable[str], directory: Path, log: Log) -> None:
    """Downloads files of a checkpoint to `directory`, under their paths in the repository, and compares their content.

    Files that are there already are kept, unless they differ: then they are downloaded once more.

    Raises:
        UserError: a file cannot be downloaded, or differs again. It is removed.
    """
    prefix = f"{choice.tag}/" if choice.tag else ""
    files = {prefix + name: choice.files[name] for name in names}

    def download() -> None:
        hf.snapshot_download(choice.repo, revision=choice.revision, local_dir=directory, allow_patterns=[*files])

    for _ in range(2):
        try:
            retry(download, RETRY_WAITS_S, log)
        except Exception as error:
            raise UserError(f"{choice.name} cannot be downloaded: {reason(error)}") from error
        problems = {name: manifest.difference(directory, name, stated) for name, stated in files.items()}
        files = {name: files[name] for name, problem in problems.items() if problem}
        if not files:
            return
        for name in files:
            (directory / name).unlink(missing_ok=True)
    raise UserError(f"{choice.name} was downloaded twice and is damaged: {problems[min(files)]}")


def fetch_checkpoint(choice: RemoteCheckpoint, parent: str | Path, log: Log) -> Path:
    """Downloads a checkpoint to a directory of the same name in `parent`, which appears once it is complete.

    A download that was interrupted continues with the next file.

    Raises:
        UserError: another checkpoint has that name, the disk is too small, or the download failed.
    """
    target = Path(parent) / choice.tag
    if target.exists():
        if manifest.read(target) != choice.files:
            raise UserError(
                f"{target} already exists and is not {choice.name}: their manifests differ; to resume from it, pass "
                "its path, or choose another --output_dir"
            )
        log(f"{target} already exists, with the manifest of {choice.name}")
        return target
    # One per host, in case they share the disk and download at the same time.
    hidden = target.with_name(f".{choice.tag}.{socket.gethostname()}.partial")
    size = sum(stated["size"] for stated in choice.files.values())
    there = sum(path.stat().st_size for path in hidden.rglob("*") if path.is_file())
    check_space(parent, size - there, f"to download {choice.name}")
    started = time.monotonic()
    _download(choice, choice.files, hidden, log)
    (hidden / choice.tag / manifest.MANIFEST).write_text(manifest.dumps(choice.files))
    try:
        (hidden / choice.tag).rename(target)
    except OSError as error:
        if not target.exists():  # otherwise another host was first
            raise UserError(f"{target} cannot be written: {error}") from error
    remove(hidden)
    log(f"downloaded {choice.name} to {target}: {size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s")
    return target


def cached_checkpoint(choice: RemoteCheckpoint, log: Log = print) -> Path:
    """Downloads a checkpoint or weights file into the cache and returns its directory there.

    Training states next to layer shards are left out.

    Raises:
        UserError: the download failed.
    """
    names = [*choice.files]
    if _has_layers(names):
        names = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in LAYER_FILES)]
    log(f"{choice.name}: {sum(choice.files[name]['size'] for name in names) / 1e9:.3g} GB")
    directory = _cache_directory(choice)
    _download(choice, names, directory, log)
    return directory / (choice.tag or "")


def _cache_directory(choice: RemoteCheckpoint) -> Path:
    """Where the cache keeps a repository's checkpoints.

    Not a snapshot of the Hub's own cache: that may have more of the repository, such as training states of another
    program, which cannot be resumed from.
    """
    folder = f"models--{choice.repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE, folder, "checkpoints", choice.revision, choice.repo.split("/")[1])


# ---------------------------------------------------------------------------------------------------- resume


def fetch_resume(args: argparse.Namespace, log: Log) -> tuple[str | None, str | None]:
    """Downloads what a run resumes from, if it is on the Hub; a collective call.

    Returns:
        Local paths of (the checkpoint, the weights file), None for what the flags do not ask for. A downloaded
        checkpoint is in --output_dir, layer shards from the root of a repository and weights files are in the cache.
        A path that is not downloaded is returned as given. --resume_file is ignored if there is a checkpoint.

    Raises:
        UserError: it is neither here nor on the Hub, or its download failed.
    """
    name, file = args.resume_from_checkpoint, getattr(args, "resume_file", None)
    if name is None and file is None:
        return None, None
    choices: list[RemoteCheckpoint | None] = [None]
    with raise_on_all_ranks():
        if rank() == 0:
            choices = [_choose_weights(file, args.hf_repo) if name is None else _choose_checkpoint(args)]
    if world_size() > 1:  # an upload that ends now must not make two hosts choose differently
        dist.broadcast_object_list(choices)
    (choice,) = choices
    if choice is None:
        return name, file if name is None else None
    with raise_on_all_ranks():
        if local_rank() == 0:
            if choice.tag:
                fetch_checkpoint(choice, args.output_dir, log)
            else:
                cached_checkpoint(choice, log)
    if name is None:
        return None, str(_cache_directory(choice) / next(iter(choice.files)))
    return str(Path(args.output_dir) / choice.tag if choice.tag else _cache_directory(choice)), None


def _choose_checkpoint(args: argparse.Namespace) -> RemoteCheckpoint | None:
    """The checkpoint on the Hub that --resume_from_checkpoint names; None for a local path."""
    name, flag = args.resume_from_checkpoint, "--resume_from_checkpoint"
    if name == "hub" and args.hf_repo is None:
        raise UserError(f"{flag} hub needs --hf_repo, the repository to resume from")
    choice = choose(args.hf_repo) if name == "hub" else find(name, flag)
    if choice is None or choice.tag is not None:
        return choice
    if name == "hub":  # a run that has lost its training state must not start over silently
        raise UserError(
            f"{flag} hub: {choice.repo} has no complete checkpoint, only layer shards at its root; to start from "
            f"those: {flag} {choice.repo}"
        )
    if not hasattr(args, "num_stages"):
        raise UserError(
            f"{flag} {name}: {choice.repo} has layer shards, from which only pipeline/train.py resumes; to start with "
            f"their weights, convert them (python -m common.convert to-hf {choice.repo}) and name the result with "
            "--model_name"
        )
    if args.model_name is None:
        choice.check_config("--model_name")
    return choice


def _choose_weights(name: str, hf_repo: str | None) -> RemoteCheckpoint | None:
    """The file on the Hub that --resume_file names: `USER/NAME/FILE.pt`, or FILE.pt in --hf_repo; None if local."""
    match = WEIGHTS_FILE_NAME.fullmatch(name)
    repo, file = match.groups() if match else (hf_repo, name)
    if repo is None or os.path.exists(os.path.expanduser(name)):
        return None
    failure = f"--resume_file {name}: not a local file; on the Hub: {repo}"
    repo = full_name(repo)
    revision, there = request(lambda: _list_files(repo), f"{failure} cannot be read")
    if file not in there:
        weights = ", ".join(sorted(path for path in there if path.endswith(".pt") and "/" not in path)) or "none"
        raise UserError(f"{failure} has no file {file}; .pt files there: {weights}")
    return RemoteCheckpoint(repo, revision, None, {file: there[file]})


# ---------------------------------------------------------------------------------------------- command line


@command
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m common.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{upload}")
    upload = commands.add_parser(
        "upload", help="checkpoints to a repository",
        description="Uploads each PATH under its own name; files that are there already are not sent again. The exit "
        "code is 0 once all are there. The token comes from HF_TOKEN or `hf auth login`.",
    )  # fmt: skip
    upload.add_argument("repo", type=repository, metavar="USER/NAME", help="created if it does not exist")
    upload.add_argument("paths", nargs="+", metavar="PATH", help="a global_stepN directory or a .pt file")
    args = parser.parse_args(argv)
    paths = [Path(os.path.abspath(os.path.expanduser(path))) for path in args.paths]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such directory or file")
        # Other names would collide with what else a repository has.
        if not (TAG.fullmatch(path.name) if path.is_dir() else path.suffix == ".pt"):
            raise UserError(f"{path} is neither a global_stepN directory nor a .pt file")
    if not sys.stderr.isatty():
        disable_progress_bars()
    repo = check_write(args.repo)
    failed: dict[Path, str] = {}
    for path in paths:
        try:
            print(send(repo, path, print, () if failed else RETRY_WAITS_S), flush=True)
        except Exception as error:  # whatever it is, the others are tried
            failed[path] = reason(error)
    if failed:
        raise _failure(repo, failed, len(paths))


if __name__ == "__main__":
    sys.exit(main())
