"""Checkpoints to the Hugging Face Hub while training goes on, and back from there.

    python -m common.hub upload USER/NAME runs/zero/global_step69

uploads what a run could not: a checkpoint's directory or a file of weights, under its own name.

A directory goes up file by file; one commit then shows them all, and a last one adds `manifest.json` with every file's
size and SHA-256. A directory without it is incomplete, and a resume trusts only what a manifest names. Single files
and layer shards at a repository's root need none: they are compared with the size and SHA-256 that the Hub states.
"""

import argparse
import atexit
import fnmatch
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
import torch
import torch.distributed as dist
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from common import manifest
from common.cli import ArgumentParser, repository
from common.distributed import (
    PreemptionHandler,
    gather_numbers,
    local_rank,
    local_rank_zero_first,
    raise_on_all_ranks,
    rank,
    world_size,
)
from common.errors import UserError, one_line
from common.files import check_space
from common.manifest import TAG
from common.pretrained import GENERATION_FILES, TOKENIZER_FILES

ROOT = Path(__file__).resolve().parents[1]

# The client itself tries a request 6 times over 23 s, or as far apart as the Hub's Retry-After says. What is left
# failing then is tried again as a whole; files that are up already stay there.
ATTEMPTS, FIRST_WAIT_S = 5, 10
QUICK_ATTEMPTS, QUICK_WAIT_S = 3, 1  # before training, when someone is waiting
# Without a byte in either direction for so long a connection is given up; the client would wait for ever.
STALL_S = 60
# Ranks without uploads must not wait in one collective call until the last is up: those time out after half an hour.
# In each turn they also look whether a signal has come.
TURN_S = 1
# Answers below 500 that are worth another try: time-outs, conflicts with another commit, too many requests.
PASSING = (408, 409, 412, 423, 425, 429)

_REPO = r"[\w-][\w.-]*/[\w.-]+"
CHECKPOINT_NAME = re.compile(rf"({_REPO})(?:/({TAG.pattern}))?")
WEIGHTS_FILE_NAME = re.compile(rf"({_REPO})/([^/]+\.pt)")
# What is used of a repository with layer shards at its root; the training states next to them are not.
ROOT_FILES = ("layer_*", "config.json", *TOKENIZER_FILES, *GENERATION_FILES)


# ------------------------------------------------------------------------------------------------- the client


def clean(text: str) -> str:
    """`text` without the token, or anything that looks like one, and its addresses without users and signatures."""
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"\bhf_\w{16,}", "<token>", text)
    text = re.sub(r"(https?://)[^\s/'\"]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


def reason(error: BaseException) -> str:
    """Why a request failed, in one line: the innermost error that says something."""
    while error.__cause__ is not None and not isinstance(error, (HfHubHTTPError, UserError)):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        said = one_line(error.server_message or error.response.reason_phrase)
        return clean(f"{error.response.status_code} {said}, from {error.response.url}")[:300]
    return clean(one_line(error))[:300]


class _Clean(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = clean(record.getMessage()), ()
        return True


def _limit_stall(request):
    if (request.extensions.get("timeout") or {}).get("read") is None:
        request.extensions["timeout"] = httpx2.Timeout(STALL_S).as_dict()


def _client():
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = hooks | {"request": [*hooks["request"], _limit_stall]}
    return client


def _api():
    """The Hub's client, with a limit to stalls and nothing in its log lines that should stay secret."""
    try:
        _ = urlsplit(constants.ENDPOINT).port  # looks at the rest too
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT {clean(constants.ENDPOINT)} is no address: {one_line(error, 200)}") from error
    if not any(isinstance(each, _Clean) for handler in _handlers() for each in handler.filters):
        set_client_factory(_client)
        for handler in _handlers():
            handler.addFilter(_Clean())
    return HfApi()


def _handlers():
    return logging.getLogger("huggingface_hub").handlers


def _passing(error):
    """Whether it may go better next time."""
    seen = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if response is not None:
            return response.status_code >= 500 or response.status_code in PASSING
        if isinstance(seen, (UserError, OfflineModeIsEnabled)):
            return False
        if isinstance(seen, OSError) and seen.errno is not None and not isinstance(seen, ConnectionError):
            return False  # of this machine: no such file, disk full
        seen = seen.__cause__
    return True


def _retry(action, say, attempts, first_wait):
    """Calls `action` until it succeeds, at most `attempts` times."""
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except Exception as error:  # the errors of the HTTP library, of the Hub's and of Xet have no common base
            if attempt == attempts or not _passing(error):
                raise
            wait = max(first_wait * 2 ** (attempt - 1), _retry_after(error))
            say(f"the Hub: {reason(error)}; again in {wait} s, try {attempt + 1} of {attempts}")
            time.sleep(wait)


def _retry_after(error):
    """Seconds that the Hub asks to wait; 0 where it does not."""
    while error is not None:
        said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
        if said.isdigit():
            return int(said)
        error = error.__cause__
    return 0


def _retry_briefly(action, what):
    """Calls `action` with a few quick retries; raises UserError that begins with `what`."""
    try:
        return _retry(action, lambda line: None, QUICK_ATTEMPTS, QUICK_WAIT_S)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from error


def address(repo: str, *path: str) -> str:
    """Where a repository, or a path in it, is to be seen."""
    return "/".join([clean(constants.ENDPOINT), repo, *(("tree/main", *path) if path else ())])


# ----------------------------------------------------------------------------------------- before training


def full_name(repo: str) -> str:
    """`USER/NAME` of a repository whose user may be left out: then it is the token's."""
    if "/" in repo:
        return repo
    return f"{_retry_briefly(_api().whoami, f'--hf_repo {repo}, without a user')['name']}/{repo}"


def check_write(repo: str, create: bool = True) -> str:
    """Finds out in a second whether checkpoints can go to a repository; returns its full name.

    Args:
        create: make the repository where it is not there.

    Raises:
        UserError: no token, an invalid one, no such repository, no right to write, or no Hub in reach.
    """
    if not get_token():
        raise UserError(
            f"--hf_repo {repo}: no token for the Hub; run `hf auth login` or set HF_TOKEN, with write access"
        )
    api = _api()
    try:
        user = _retry_briefly(api.whoami, f"--hf_repo {repo}: no answer from {clean(constants.ENDPOINT)}")["name"]
    except UserError as error:
        if getattr(getattr(error.__cause__, "response", None), "status_code", None) == 401:
            raise UserError(f"--hf_repo {repo}: {clean(constants.ENDPOINT)} does not know the token") from error
        raise
    repo = repo if "/" in repo else f"{user}/{repo}"
    if create:
        refused = f"--hf_repo {repo} cannot be made by {user}"
        _retry_briefly(lambda: api.create_repo(repo, private=True, exist_ok=True), refused)
    try:
        _retry_briefly(
            lambda: api.auth_check(repo, write=True), f"--hf_repo {repo}: the token of {user} may not write there"
        )
    except UserError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise UserError(f"--hf_repo {repo}: there is no such repository that {user} may see") from error
        raise
    return repo


# ---------------------------------------------------------------------------------------------------- upload


class Uploads:
    """Checkpoint directories and files of weights on their way to one repository, sent by a thread of its own.

    Every rank makes one, at the same place; only rank 0's, where --hf_repo is given, does anything.

    Args:
        args: of the script: hf_repo, output_dir, resume_from_checkpoint.
        say: called with one line, from the thread.

    Raises:
        UserError: as `check_write`.
    """

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]):
        self.say = say
        self.list = Path(args.output_dir) / ".to_upload"  # what a run that ends before its uploads leaves to the next
        self.active = args.hf_repo is not None and rank() == 0
        self.waiting, self.current, self.failed, self.done = deque(), None, {}, []
        self.changed = threading.Condition()
        with raise_on_all_ranks():
            if not self.active:
                return
            # A typing error must not make an empty repository to go on from.
            self.repo = check_write(args.hf_repo, create=args.resume_from_checkpoint != "hub")
            left = self._left_over() if args.resume_from_checkpoint is not None else []
        # A daemon, so that a run that fails ends at once; what it leaves undone is named then.
        threading.Thread(target=self._work, name="uploads", daemon=True).start()
        atexit.register(self._at_exit)
        if left:
            say(f"still to be uploaded from the run before: {', '.join(path.name for path in left)}")
        for path in left:
            self.upload(path)

    def upload(self, path: Path) -> None:
        """Queues a directory or file; returns at once. It must stay as it is until it is no longer `pending`."""
        if not self.active:
            return
        with self.changed:
            # Weights alone are what others wait for, and small beside the training state.
            (self.waiting.append if path.is_dir() else self.waiting.appendleft)(path)
            self._note_pending()
            self.changed.notify_all()

    def pending(self) -> set[Path]:
        """Paths that are not on the Hub yet, or could not be uploaded."""
        with self.changed:
            return {*self.waiting, *self.failed, self.current} - {None}

    def finish(self, preemption: PreemptionHandler, device: torch.device) -> None:
        """Waits for all uploads and says where they are; a collective call.

        Args:
            preemption: a signal ends the wait, and what is not on the Hub by then is named at the end.

        Raises:
            UserError: some failed, on every rank; names them and the command that tries again.
        """
        busy = True
        while busy:
            ranks = gather_numbers([self._busy_for(TURN_S), preemption.number], device)
            busy, number = map(max, zip(*ranks, strict=True))
            if busy and number:
                self.say(f"stopped by {signal.Signals(int(number)).name} before all is on the Hub")
                return
        atexit.unregister(self._at_exit)
        if self.done:
            self.say(f"on the Hub, {address(self.repo)}: {', '.join(path.name for path in self.done)}")
        with raise_on_all_ranks():
            if self.failed:
                what = "; ".join(f"{path} ({why})" for path, why in self.failed.items())
                raise UserError(
                    f"{len(self.failed)} of {len(self.failed) + len(self.done)} uploads failed: {what}. The files are "
                    f"still here. To try again: {retry_command(self.repo, self.failed)}"
                )

    def _note_pending(self):
        with suppress(OSError):  # a full disk must not end the training over it
            partial = self.list.with_name(".to_upload.partial")
            partial.write_text("".join(f"{self.repo} {path.name}\n" for path in sorted(self.pending())))
            partial.replace(self.list)
            if not self.pending():
                self.list.unlink()

    def _left_over(self):
        """Paths that the run before could not upload to this repository and that are still there."""
        try:
            lines = self.list.read_text(errors="replace").splitlines()
        except OSError:
            return []
        names = [name for repo, _, name in (line.partition(" ") for line in lines) if repo == self.repo]
        paths = [self.list.parent / Path(name).name for name in names if name]
        return [path for path in paths if path.is_file() or (path / manifest.MANIFEST).is_file()]

    def _busy_for(self, seconds):
        """Waits so long at most; whether uploads still go on then."""
        with self.changed:
            return not self.changed.wait_for(lambda: not self.waiting and self.current is None, seconds)

    def _work(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                path = self.current = self.waiting.popleft()
            disable_progress_bars()  # the run has its own; the bars of its downloads are through by now
            # A Hub that could not be reached for minutes gets one more chance with each path, not five.
            attempts = 1 if self.failed else ATTEMPTS
            try:
                line, why = send(self.repo, path, self.say, attempts), None
            except Exception as error:  # whatever it is, training goes on
                why = reason(error)
                line = f"{path} is not on the Hub: {why}"
            self.say(line)
            with self.changed:
                if why is None:
                    self.done.append(path)
                else:
                    self.failed[path] = why
                self.current = None
                self._note_pending()
                self.changed.notify_all()

    def _at_exit(self):
        """A run that ends before its uploads, by an error or Ctrl-C, still says what is missing."""
        self.say = lambda line: None
        for handler in _handlers():
            handler.setLevel(logging.CRITICAL)  # of connections that break as the process ends
        missing = sorted(self.pending())
        if missing:
            names = ", ".join(map(str, missing))
            command = retry_command(self.repo, missing)
            print(f"not on the Hub: {names}; to upload: {command}", file=sys.stderr, flush=True)


def retry_command(repo: str, paths: Iterable[Path]) -> str:
    """The one command that uploads these paths, from the directory that the run was started in."""
    here = Path.cwd() == ROOT
    words = [str(path if here else Path(path).resolve()) for path in paths]
    command = shlex.join(["python", "-m", "common.hub", "upload", repo, *words])
    return command if here else f"(cd {shlex.quote(str(ROOT))} && {command})"


def send(repo: str, path: Path, say: Callable[[str], None], attempts: int = ATTEMPTS) -> str:
    """Uploads a directory or file under its own name, with retries; returns a line that says where it is.

    Raises:
        UserError: a file is not what its manifest says, or the Hub has got another one than was sent.
        Exception: whatever the client raised last.
    """
    started = time.monotonic()
    action = _send_directory if path.is_dir() else _send_file
    size = _retry(lambda: action(_api(), repo, path), say, attempts, FIRST_WAIT_S)
    seconds = time.monotonic() - started
    where = address(repo, path.name) if path.is_dir() else f"{address(repo)}/blob/main/{path.name}"
    return f"uploaded {path} to {where}: {size / 1e9:.3g} GB in {seconds:.1f} s"


def _send_file(api, repo, path):
    addition = CommitOperationAdd(path.name, path)
    api.create_commit(repo, [addition], commit_message=f"Upload {path.name}", num_threads=1)
    _check_sent(api, repo, {path.name: _sent(addition)})
    return addition.upload_info.size


def _send_directory(api, repo, directory):
    files = manifest.read(directory)
    if files is None:
        files = {name: manifest.entry(directory / name) for name in manifest.files_of(directory)}
    if not files:
        raise UserError(f"{directory} holds no files")
    tag = directory.name
    additions = []
    for name, said in files.items():
        if not (directory / name).is_file():
            raise UserError(manifest.difference(directory, name, said))
        addition = CommitOperationAdd(f"{tag}/{name}", directory / name)
        # One at a time: a pool's threads would keep a run that fails from ending, and Xet shares out each file itself.
        api.preupload_lfs_files(repo, [addition], num_threads=1, free_memory=False)
        if _sent(addition) != said:
            raise UserError(
                manifest.difference(directory, name, said) or f"{directory / name} changed while it was sent"
            )
        additions.append(addition)
    # What an earlier upload of this name left there, its manifest above all, goes in the same commit.
    there = {file.path for file in _files(api, repo, tag)}
    stale = [CommitOperationDelete(path) for path in sorted(there - {addition.path_in_repo for addition in additions})]
    api.create_commit(repo, [*stale, *additions], commit_message=f"Upload {tag}", num_threads=1)
    _check_sent(api, repo, {f"{tag}/{name}": said for name, said in files.items()})
    seal = CommitOperationAdd(f"{tag}/{manifest.MANIFEST}", manifest.dumps(files).encode())
    api.create_commit(repo, [seal], commit_message=f"{tag} is complete", num_threads=1)
    return sum(said["size"] for said in files.values())


def _sent(addition):
    return {"size": addition.upload_info.size, "sha256": addition.upload_info.sha256.hex()}


def _check_sent(api, repo, files):
    """Raises UserError unless the repository holds files of these sizes and, where it says so, SHA-256."""
    there = {file.path: file for file in api.get_paths_info(repo, list(files))}
    for path, said in files.items():
        wrong = _mismatch(there.get(path), said)
        if wrong:
            raise UserError(f"{repo}: {path} {wrong}, which is not what was sent")


def _mismatch(file, said):
    """How a file in a repository is not what a manifest says; None where it is, as far as the Hub tells."""
    if file is None:
        return "is missing"
    if file.size != said["size"]:
        return f"has {file.size:,} bytes instead of {said['size']:,}"
    if file.lfs and file.lfs.sha256 != said["sha256"]:
        return f"has SHA-256 {file.lfs.sha256[:12]}… instead of {said['sha256'][:12]}…"
    return None


def _files(api, repo, path=None, revision=None):
    """`RepoFile` of every file of a repository, or of a folder in it; none where there is no such folder."""
    try:
        tree = api.list_repo_tree(repo, path, recursive=True, revision=revision)
        return [entry for entry in tree if isinstance(entry, RepoFile)]
    except EntryNotFoundError:
        return []


# -------------------------------------------------------------------------------------------------- download


class RemoteCheckpoint(NamedTuple):
    """A checkpoint in a repository.

    Attributes:
        repo: full name.
        revision: commit at which it was looked at.
        tag: its folder; None for layer shards at the repository's root.
        files: dict name -> {"size": bytes, "sha256": hex}. The SHA-256 is None if neither a manifest nor the Hub
            states it.
    """

    repo: str
    revision: str
    tag: str | None
    files: dict

    @property
    def name(self) -> str:
        """`USER/NAME/global_stepN`, or `USER/NAME` for the root."""
        return f"{self.repo}/{self.tag}" if self.tag else self.repo

    def path(self, name: str) -> str:
        """Path in the repository of the file `name`."""
        return f"{self.tag}/{name}" if self.tag else name

    def check_config(self, flag: str) -> None:
        """Raises UserError for layer shards without a config: `flag` has to name the model."""
        if self.tag is None and "config.json" not in self.files:
            raise UserError(f"{self.repo} has layer shards but no config.json; name their model with {flag}")


def split_name(text: str) -> tuple[str, str | None] | None:
    """(repository, tag or None) of `USER/NAME` or `USER/NAME/global_stepN`.

    None for any other text, and for a path that exists on this machine: local paths take precedence.
    """
    match = CHECKPOINT_NAME.fullmatch(text)
    return match.group(1, 2) if match and not os.path.exists(text) else None


def choose(repo: str, tag: str | None = None) -> RemoteCheckpoint:
    """The checkpoint named `tag` of a repository.

    Without `tag` it is the newest complete one, or else the layer shards at the repository's root.

    Raises:
        UserError: no such repository, no such checkpoint, or one whose files are not those of its manifest.
    """
    repo = full_name(repo)
    revision, there = _list_repository(repo)
    folders = {path.split("/")[0] for path in there if TAG.fullmatch(path.split("/")[0]) and "/" in path}
    complete = [name for name in folders if f"{name}/{manifest.MANIFEST}" in there]
    at_root = sorted(path for path in there if "/" not in path and not path.startswith("."))
    wanted = f"complete checkpoint {tag or ''}".rstrip() + f" (a folder global_stepN with {manifest.MANIFEST})"
    if tag is None:
        tag = max(complete, key=_step, default=None)
        if tag is None and any(map(_is_shard, at_root)):
            names = [name for name in at_root if any(fnmatch.fnmatch(name, pattern) for pattern in ROOT_FILES)]
            return RemoteCheckpoint(repo, revision, None, {name: _stated(there[name]) for name in names})
        wanted += " and no layer shards (layer_*) at its root"
    if tag not in complete:
        begun = ", ".join(sorted(folders - {*complete}, key=_step)) or "none"
        whole = ", ".join(sorted(complete, key=_step)) or "none"
        others = ", ".join(at_root[:8]) + (", …" if len(at_root) > 8 else "") or "none"
        raise UserError(f"{repo} has no {wanted}; complete: {whole}; incomplete: {begun}; files at its root: {others}")
    path = _retry_briefly(
        lambda: _api().hf_hub_download(repo, f"{tag}/{manifest.MANIFEST}", revision=revision), f"{repo}/{tag}"
    )
    files = manifest.read(Path(path).parent)
    for name, said in files.items():
        wrong = _mismatch(there.get(f"{tag}/{name}"), said)
        if wrong:
            raise UserError(f"{repo}: {tag}/{name} {wrong}, which its checkpoint's manifest says")
    return RemoteCheckpoint(repo, revision, tag, files)


def _list_repository(repo):
    """(commit, dict path -> `RepoFile`) of a repository's main branch; UserError if it cannot be read."""
    api = _api()

    def look():
        revision = api.repo_info(repo).sha
        return revision, {file.path: file for file in _files(api, repo, revision=revision)}

    return _retry_briefly(look, f"{repo} cannot be read")


def _stated(file):
    """What the Hub says of a file: its size and, if it is an LFS file, its SHA-256."""
    return {"size": file.size, "sha256": file.lfs.sha256 if file.lfs else None}


def _is_shard(name):
    return name.startswith("layer_")


def _step(tag):
    return int(TAG.fullmatch(tag)[1])


def _download(repo, path, revision, said, say, local_dir=None):
    """Downloads one file and compares it with `said`; returns where it is.

    Args:
        said: {"size": bytes, "sha256": hex or None}, of a manifest or the Hub itself.

    Raises:
        UserError: wrong twice, or the Hub does not give it.
    """
    for again in (False, True):
        try:
            place = _retry(
                lambda again=again: _api().hf_hub_download(
                    repo, path, revision=revision, local_dir=local_dir, force_download=again
                ),
                say,
                ATTEMPTS,
                FIRST_WAIT_S,
            )
        except Exception as error:
            raise UserError(f"{repo} does not give {path}: {reason(error)}") from error
        found = manifest.entry(Path(place))
        if found["size"] == said["size"] and said["sha256"] in (None, found["sha256"]):
            return Path(place)
    Path(place).resolve().unlink()  # in the cache the name is a link
    with_sha256 = f" with SHA-256 {said['sha256'][:12]}…" if said["sha256"] else ""
    raise UserError(
        f"{repo}: {path} was downloaded twice and is wrong: {found['size']:,} bytes with SHA-256 "
        f"{found['sha256'][:12]}…, expected {said['size']:,} bytes{with_sha256}"
    )


def fetch_checkpoint(choice: RemoteCheckpoint, parent: str | Path, say: Callable[[str], None]) -> Path:
    """Downloads a checkpoint to a directory of its own name in `parent`, which appears once it is all there.

    What an interrupted download got is used by the next one.

    Raises:
        UserError: another checkpoint is there, the disk is too small, the Hub does not give a file, or not the one
            that the manifest names.
    """
    parent = Path(parent)
    target = parent / choice.tag
    if target.exists():
        for name, said in choice.files.items():
            wrong = manifest.difference(target, name, said)
            if wrong:
                raise UserError(
                    f"{target} is there already and not the {choice.tag} of {choice.repo}: {wrong}; name it itself to "
                    "go on from it, or take another --output_dir"
                )
        say(f"{target} is the {choice.tag} of {choice.repo}")
        return target
    # A name of this host's, because another may share the disk and download too.
    partial = parent / f".{choice.tag}.{socket.gethostname()}.partial"
    missing = {
        name: said
        for name, said in choice.files.items()
        if manifest.difference(partial / choice.tag, name, said) is not None
    }
    size = sum(said["size"] for said in missing.values())
    started = time.monotonic()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        check_space(parent, size, f"to download {choice.repo}/{choice.tag}")
        for name, said in missing.items():
            _download(choice.repo, choice.path(name), choice.revision, said, say, local_dir=partial)
        (partial / choice.tag / manifest.MANIFEST).write_text(manifest.dumps(choice.files))
        try:
            (partial / choice.tag).rename(target)
        except OSError:
            if not (target / manifest.MANIFEST).exists():  # by that other host
                raise
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    shutil.rmtree(partial, ignore_errors=True)
    say(f"downloaded {choice.repo}/{choice.tag} to {target}: {size / 1e9:.3g} GB in {time.monotonic() - started:.1f} s")
    return target


def cached_checkpoint(choice: RemoteCheckpoint, say: Callable[[str], None] = print, *, side_files: bool = True) -> Path:
    """Downloads a checkpoint into the Hub's own cache and returns its directory there.

    The optimizer states of a pipeline are left out.

    Args:
        side_files: whether config and tokenizer next to layer shards at a repository's root are wanted too.

    Raises:
        UserError: the Hub does not give a file, or not the one that is expected.
    """
    wanted = choice.files
    if any(map(_is_shard, wanted)):
        others = side_files or choice.tag is not None
        wanted = {
            name: said
            for name, said in wanted.items()
            if _is_shard(name) or (others and not name.endswith("_states.pt"))
        }
    say(f"{choice.name}: {sum(said['size'] for said in wanted.values()) / 1e9:.3g} GB")
    for name, said in wanted.items():
        path = choice.path(name)
        place = _download(choice.repo, path, choice.revision, said, say)
    snapshot = place.parents[path.count("/")]
    if choice.tag is not None:
        return snapshot / choice.tag
    directory = _linked_directory(choice, side_files)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            with suppress(FileExistsError):
                (directory / name).symlink_to(os.path.relpath(snapshot / name, directory))
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error
    return directory


def _linked_directory(choice, side_files=True):
    """Where the cache has links to the files of a repository's root that are used, and to no others.

    The snapshot itself may hold more, depending on what was downloaded before: training states of another program,
    which could not be resumed from, or a config that --base_model is to replace.
    """
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=choice.repo, repo_type="model")
    return repository / ("checkpoints" if side_files else "layers") / choice.revision / choice.repo.split("/")[1]


def fetch_file(repo: str, name: str, say: Callable[[str], None]) -> str:
    """Downloads a weights file into the Hub's cache and returns its path, which ends with the same name.

    Raises:
        UserError: there is no such file, or it is not what the Hub says of it.
    """
    repo = full_name(repo)
    revision, there = _list_repository(repo)
    if name not in there:
        weights = ", ".join(sorted(path for path in there if path.endswith(".pt") and "/" not in path)) or "none"
        raise UserError(f"{repo} has no file {name}; .pt files there: {weights}")
    said = _stated(there[name])
    path = _download(repo, name, revision, said, say)
    say(f"downloaded {address(repo)}/blob/main/{name}: {said['size'] / 1e9:.3g} GB")
    return str(path)


def fetch_resume(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[str | None, str | None]:
    """Downloads what a run resumes from, if it is on the Hub; a collective call.

    Returns:
        Local paths of (the checkpoint, the weights file), None for what the flags do not ask for. A checkpoint is
        below --output_dir, or in the Hub's cache for layer shards from a repository's root; without a download it is
        --resume_from_checkpoint as given. --resume_file is ignored if there is a checkpoint.

    Raises:
        UserError: it is neither here nor on the Hub, or does not arrive complete.
    """
    name = args.resume_from_checkpoint
    if name is None:
        weights_file = None
        if getattr(args, "resume_file", None) is not None:
            with local_rank_zero_first():
                weights_file = _local_weights_file(args, say)
        return None, weights_file
    choice = None
    with raise_on_all_ranks():
        if name == "hub" and args.hf_repo is None:
            raise UserError("--resume_from_checkpoint hub needs --hf_repo, the repository to resume from")
        if rank() == 0:
            choice = _choose_to_resume(args)
    if world_size() > 1:  # an upload that ends now must not make two hosts choose differently
        choices = [choice]
        dist.broadcast_object_list(choices)
        choice = choices[0]
    if choice is None:
        return name, None
    with raise_on_all_ranks():
        if local_rank() == 0:
            if choice.tag:
                fetch_checkpoint(choice, args.output_dir, say)
            else:
                cached_checkpoint(choice, say)
    return str(Path(args.output_dir) / choice.tag if choice.tag else _linked_directory(choice)), None


def _choose_to_resume(args):
    """The `RemoteCheckpoint` that --resume_from_checkpoint names; None for a local path."""
    name = args.resume_from_checkpoint
    if name == "hub":
        choice = choose(args.hf_repo)
        if choice.tag is None:  # a run that has lost its training state must not start over silently
            raise UserError(
                f"--resume_from_checkpoint hub: {choice.repo} has no complete checkpoint, only layer shards at its "
                f"root; to start from those: --resume_from_checkpoint {choice.repo}"
            )
    elif repo_and_tag := split_name(name):
        try:
            choice = choose(*repo_and_tag)
        except UserError as error:
            raise UserError(f"--resume_from_checkpoint {name}: not a local directory; on the Hub: {error}") from error
    else:
        return None
    if choice.tag is None:
        if not hasattr(args, "num_stages"):
            raise UserError(
                f"--resume_from_checkpoint {name}: {choice.repo} has layer shards, from which only pipeline/train.py "
                f"resumes; to start with their weights, convert them (python -m common.convert to-hf {choice.repo}) "
                "and name the result with --model_name"
            )
        if args.model_name is None:
            choice.check_config("--model_name")
    return choice


def _local_weights_file(args, say):
    """Local path of --resume_file, after downloading `USER/NAME/FILE.pt` or a file of that name in --hf_repo."""
    name = args.resume_file
    match = WEIGHTS_FILE_NAME.fullmatch(name)
    repo, file = match.groups() if match else (args.hf_repo, name)
    if repo is None or os.path.exists(os.path.expanduser(name)):
        return name
    try:
        return fetch_file(repo, file, say)
    except UserError as error:
        raise UserError(f"--resume_file {name}: not a local file; on the Hub: {error}") from error


# ---------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; a mistake in the input is one line on standard error."""
    parser = ArgumentParser(
        prog="python -m common.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{upload}")
    upload = commands.add_parser(
        "upload", help="checkpoints to a repository",
        description="Uploads each PATH under its own name; what is there already is not sent again. The exit code is 0 "
        "once all are there. The token comes from HF_TOKEN or `hf auth login`.",
    )  # fmt: skip
    upload.add_argument("repo", type=repository, metavar="USER/NAME", help="made where it is not there")
    upload.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a global_stepN directory or a .pt file")
    args = parser.parse_args(argv)
    failed = {}
    try:
        paths = [_to_upload(path) for path in args.paths]
        if not sys.stderr.isatty():
            disable_progress_bars()
        repo = check_write(args.repo)
        for path in paths:
            try:
                print(send(repo, path, print, 1 if failed else ATTEMPTS), flush=True)
            except Exception as error:
                failed[path] = reason(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, why in failed.items():
        print(f"error: {path} is not on the Hub: {why}", file=sys.stderr)
    if failed:
        print(f"to try again: {retry_command(repo, failed)}", file=sys.stderr)
    return 1 if failed else 0


def _to_upload(path):
    """The path of a checkpoint, with the name that it gets on the Hub at its end.

    Raises:
        UserError: it is none. Anything else would take places in the repository that belong to others.
    """
    path = Path(os.path.normpath(os.path.expanduser(path)))
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.exists():
        raise UserError(f"{path}: no such directory or file")
    if not (TAG.fullmatch(path.name) if path.is_dir() else path.suffix == ".pt"):
        raise UserError(f"{path} is neither a global_stepN directory nor a .pt file")
    return path


if __name__ == "__main__":
    sys.exit(main())
