"""Checkpoints to a Hub and back, over HTTP: against `hub_server.py`, with the real client."""

import atexit
import io
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download, snapshot_download
from huggingface_hub.utils import _http

from common import checkpoint, convert, hub, hub_client, manifest, sample
from common.errors import UserError
from helpers.hub_server import TOKEN, HubServer, Repo, User
from helpers.launch import ROOT

REPO = "me/llama"


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """Points this process's client to the server and returns the server.

    The waits before retries, the client's and ours, are recorded in its list `waits` and take no time.
    """
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.5,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": TOKEN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    server.waits = []
    for module in (_http, file_download, hub_client):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=server.waits.append))
    monkeypatch.setattr(hub_client, "STALL_S", 0.5)
    monkeypatch.setattr(hub, "POLL_S", 0.05)
    return server


def saved(parent, step=3, size=100_000, sealed=True):
    """A checkpoint's directory with a large file and a small one."""
    directory = parent / f"global_step{step}"
    directory.mkdir(parents=True)
    (directory / "mp_rank_00_model_states.pt").write_bytes(os.urandom(size))
    (directory / "config.json").write_text(f'{{"step": {step}}}')
    if sealed:
        files = {name: manifest.entry(directory / name) for name in manifest.files_of(directory)}
        (directory / manifest.MANIFEST).write_text(manifest.dumps(files))
    return directory


def contents(directory):
    return {f"{directory.name}/{path.name}": path.read_bytes() for path in directory.iterdir()}


def uploads(said=None, repo=REPO, **args):
    lines = [] if said is None else said
    defaults = {"resume_from_checkpoint": None, "output_dir": "/nowhere"}
    return hub.Uploads(SimpleNamespace(hf_repo=repo, **(defaults | args)), lines.append)


class Signal:
    """A `distributed.PreemptionHandler` that receives a signal when told to."""

    number = 0


def nothing(line):
    pass


def send(path, log=nothing):
    return hub.send(REPO, path, log, hub.RETRY_WAITS_S)


def held(monkeypatch):
    """Makes uploads wait for the second event; the first is set when one has started."""
    begun, go, send = threading.Event(), threading.Event(), hub.send
    monkeypatch.setattr(hub, "send", lambda *args: (begun.set(), go.wait(30), send(*args))[2])
    return begun, go


# ---------------------------------------------------------------------------------------------------- upload


@pytest.mark.parametrize("sealed", [True, False])
def test_upload_directory_appears_with_manifest_in_one_commit(client, tmp_path, sealed):
    directory, lines = saved(tmp_path, sealed=sealed), []
    running = uploads(lines)
    commits = client.repos["model", REPO].commits
    before = len(commits)
    running.upload(directory)
    running.finish(Signal(), None)
    names = [path.name for path in directory.iterdir() if path.name != manifest.MANIFEST]
    assert len(commits) == before + 1
    there = client.files(REPO)
    assert set(there) == {f"global_step3/{name}" for name in [*names, manifest.MANIFEST]}
    assert all(there[f"global_step3/{name}"] == (directory / name).read_bytes() for name in names)
    (tmp_path / "manifest.json").write_bytes(there["global_step3/manifest.json"])
    assert manifest.read(tmp_path) == {name: manifest.entry(directory / name) for name in names}
    assert f"uploaded {directory} to {client.url}/{REPO}/tree/main/global_step3: " in lines[0]
    assert lines[1:] == [f"on the Hub, {client.url}/{REPO}: global_step3"]


def test_upload_weights_file_goes_before_waiting_directories(client, tmp_path, monkeypatch):
    begun, go = held(monkeypatch)
    directories, file = [saved(tmp_path, step) for step in (1, 2)], tmp_path / "llama3.2-1B_0-4000-epoch-1.pt"
    file.write_bytes(os.urandom(1000))
    lines = []
    running = uploads(lines)
    started = time.monotonic()
    for path in (*directories, file):
        running.upload(path)
        begun.wait(10)
    assert time.monotonic() - started < 1
    assert running.pending() == {*directories, file}
    go.set()
    running.finish(Signal(), None)
    assert lines[-1].endswith(": global_step1, llama3.2-1B_0-4000-epoch-1.pt, global_step2")
    assert client.files(REPO)[file.name] == file.read_bytes()
    assert running.pending() == set()


@pytest.mark.parametrize(
    "failure",
    [
        ("PUT", "/storage/", {"status": 500}),
        ("PUT", "/storage/", {"status": 429, "headers": {"Retry_After": "7"}}),
        ("PUT", "/storage/", {"cut": 20_000}),
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"cut": 0}),
        ("POST", "/preupload/", {"status": 503}),
        ("POST", "/objects/batch", {"status": 502}),
        ("POST", "/verify", {"status": 500}),
        ("GET", "/api/models/me/llama$", {"status": 500}),
        ("PUT", "/storage/", {"stall": 20}),
        ("POST", "/commit/", {"stall": 20}),
        ("GET", "/api/models/me/llama$", {"stall": 20}),
    ],
    ids=lambda failure: f"{failure[0]} {failure[1]} {failure[2]}",
)
def test_upload_transient_failure_is_retried(client, tmp_path, failure):
    method, pattern, how = failure
    directory = saved(tmp_path)
    hub.check_write(REPO)
    told = client.fail(method, pattern, **how)
    started = time.monotonic()
    send(directory)
    assert told.seen == 1
    assert client.files(REPO) == contents(directory)
    assert time.monotonic() - started < 5
    assert len(client.waits) == 1
    if "headers" in how:
        assert client.waits[0] >= 7


def test_upload_retries_wait_longer_each_time_or_as_the_hub_asks(client, tmp_path):
    waits, directory, lines = client.waits, saved(tmp_path), []  # the client does not retry commits
    hub.check_write(REPO)
    client.fail("POST", "/commit/", status=500, times=2)
    client.fail("POST", "/commit/", status=429, headers={"Retry_After": "77"})
    send(directory, lines.append)
    assert waits == [10, 20, 77]
    assert [line.rpartition("; ")[2] for line in lines] == [f"retrying in {wait} s" for wait in waits]
    client.fail("POST", "/commit/", status=500, times=9)
    waits.clear()
    with pytest.raises(Exception, match="500"):
        send(saved(tmp_path, 4))
    assert waits == [10, 20, 40, 80]


def test_upload_refused_keeps_files_and_uploads_the_others(client, tmp_path, monkeypatch):
    bad, good, lines = saved(tmp_path, 1), saved(tmp_path, 2), []
    running = uploads(lines)
    monkeypatch.chdir(tmp_path)
    told = client.fail("POST", "/preupload/", status=403, headers={"X_Error_Message": "storage quota exceeded"})
    running.upload(bad)
    running.upload(good)
    with pytest.raises(UserError) as failed:
        running.finish(Signal(), None)
    assert told.seen == 1
    message = str(failed.value)
    assert f"1 of 2 uploads failed: {bad} (403 storage quota exceeded" in message
    assert "\n" not in message
    assert lines[-1] == f"on the Hub, {client.url}/{REPO}: global_step2"
    assert running.pending() == {bad}
    assert contents(bad)
    assert f"cd {ROOT} && python -m common.hub upload {REPO} {bad}" in message
    monkeypatch.chdir(ROOT)
    assert hub.retry_command(REPO, [Path("a b")]) == f"python -m common.hub upload {REPO} 'a b'"


def test_upload_refused_file_is_not_retried(client, tmp_path):
    """The client wraps the refusal of a file's content in an error of another type."""
    hub.check_write(REPO)
    told, lines = client.fail("PUT", "/storage/", status=403, times=9), []
    with pytest.raises(RuntimeError) as failed:
        send(saved(tmp_path), lines.append)
    assert (told.seen, lines) == (1, [])
    assert hub_client.reason(failed.value).startswith("403 told to fail, from http://")


def test_uploads_after_a_failed_one_get_a_single_try(client, tmp_path, monkeypatch):
    waits_given = []

    def unreachable(repo, path, log, waits):
        waits_given.append(waits)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "send", unreachable)
    running = uploads()
    for step in (1, 2):
        running.upload(saved(tmp_path, step))
    with pytest.raises(UserError, match=r"2 of 2 uploads failed: .*global_step1 \(no route\); .*global_step2 \(no"):
        running.finish(Signal(), None)
    assert waits_given == [hub.RETRY_WAITS_S, ()]


def test_upload_same_name_replaces_all_files_in_one_commit(client, tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    (first / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"of a second rank")
    (first / manifest.MANIFEST).unlink()
    hub.check_write(REPO)
    send(first)
    assert len(client.files(REPO)) == 4
    commits = client.repos["model", REPO].commits
    before = len(commits)
    send(second)
    assert (len(commits), client.files(REPO)) == (before + 1, contents(second))
    stored = client.count("PUT", "/storage/")
    send(second)  # once more: nothing is sent twice
    assert client.count("PUT", "/storage/") == stored
    assert client.files(REPO) == contents(second)


def test_upload_file_unlike_its_manifest_is_refused(client, tmp_path):
    directory = saved(tmp_path)
    (directory / "config.json").write_text('{"step": 4}')
    hub.check_write(REPO)
    with pytest.raises(UserError, match=r"config.json differs from what was saved: SHA-256 \w{12}…, expected \w{12}…"):
        send(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json' is not a file on the local file system"):
        send(directory)
    assert client.files(REPO) == {}


def test_prune_checkpoints_keeps_pending_uploads(client, tmp_path, monkeypatch):
    begun, go = held(monkeypatch)
    running = uploads()
    for step in (1, 2, 3):
        running.upload(saved(tmp_path, step))
        begun.wait(10)
        checkpoint.prune_checkpoints(tmp_path, 1, running.pending())
    assert sorted(path.name for path in tmp_path.glob("global_step*")) == [f"global_step{n}" for n in (1, 2, 3)]
    go.set()
    running.finish(Signal(), None)
    checkpoint.prune_checkpoints(tmp_path, 1, running.pending())
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step3"]
    assert {path.split("/")[0] for path in client.files(REPO)} == {f"global_step{n}" for n in (1, 2, 3)}


def test_finish_signal_ends_the_wait_and_the_next_run_uploads_the_rest(client, tmp_path, monkeypatch, capsys):
    lines, stop = [], Signal()
    with monkeypatch.context() as patched:
        begun, go = held(patched)
        running = uploads(lines, output_dir=str(tmp_path))
        steps = [saved(tmp_path, step) for step in (1, 2, 3)]
        for path in steps:
            running.upload(path)
        begun.wait(10)
        stop.number = signal.SIGTERM
        started = time.monotonic()
        running.finish(stop, None)
        assert time.monotonic() - started < 5 and lines[-1] == "stopped by SIGTERM before all uploads were done"
        atexit.unregister(running._at_exit)
        patched.setattr(logging.getLogger("huggingface_hub"), "setLevel", nothing)
        running._at_exit()
        assert "to upload: " in capsys.readouterr().err
        running.list_file = Path("/nowhere/.to_upload")  # its process is gone
        # A run that starts over ignores the list, and so does one that uploads elsewhere.
        assert uploads(output_dir=str(tmp_path)).pending() == set()
        elsewhere = uploads(repo="me/other", output_dir=str(tmp_path), resume_from_checkpoint="latest")
        assert elsewhere.pending() == set()
        assert (tmp_path / ".to_upload").read_text().splitlines() == [f"{REPO} {path.name}" for path in steps]
        shutil.rmtree(steps[1])
        again = uploads(lines, output_dir=str(tmp_path), resume_from_checkpoint="latest")
        assert lines[-1] == "still to be uploaded from the previous run: global_step1, global_step3"
        assert again.pending() == {steps[0], steps[2]}
        go.set()
        again.finish(Signal(), None)
    assert {path.split("/")[0] for path in client.files(REPO)} >= {"global_step1", "global_step3"}
    assert not (tmp_path / ".to_upload").exists()


def test_address_with_password_does_not_show_it(client, monkeypatch):
    bare = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", bare.replace("//", "//user:hf_secretSecretSecret@"))
    assert hub_client.address("me/llama") == f"{bare}/me/llama"
    assert hub_client.clean("no answer from https://us:er@host/x, see http://host/a@b") == (
        "no answer from https://host/x, see http://host/a@b"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_unknownTokenThatMustNotShow")
    with pytest.raises(UserError) as refused:
        hub.check_write("me/llama")
    assert "ecret" not in str(refused.value) and bare in str(refused.value)


# ------------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        (REPO, None, "no token for the Hub; run `hf auth login` or set HF_TOKEN, with write access"),
        (REPO, "hf_unknownTokenThatMustNotShow", "me/llama with this token: 401 Invalid username or password."),
        (REPO, "hf_readerTokenThatMustNotShow", "me/llama with this token: 403 You don't have the rights"),
        ("me/there", "hf_readerTokenThatMustNotShow", "me/there with this token: 403 You don't have the rights"),
        ("other/llama", TOKEN, "other/llama with this token: 403 You don't have the rights"),
    ],
)  # fmt: skip
def test_check_write_without_access_fails_in_a_second(client, monkeypatch, repo, token, message):
    client.repos["model", "me/there"] = Repo("model", "me/there")
    client.users["hf_readerTokenThatMustNotShow"] = User("reader", write=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        hub.check_write(repo)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "MustNotShow" not in str(refused.value)
    assert time.monotonic() - started < 1
    assert set(client.repos) == {("model", "me/there")}


@pytest.mark.parametrize("name", ["a/b/c", "", f"https://me:{TOKEN}@huggingface.co/me/x"])
def test_upload_command_invalid_repository_name_is_not_quoted(name, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as refused:
        hub.main(["upload", name, "here"])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "USER/NAME: expected USER/NAME, the name of a repository on the Hub" in said
    assert TOKEN not in said


def test_check_write_takes_a_second_and_creates_a_private_repository(client):
    started = time.monotonic()
    assert hub.check_write("llama") == REPO
    assert hub.check_write(REPO) == REPO
    assert time.monotonic() - started < 1
    assert client.repos["model", REPO].private
    client.fail("GET", "auth-check", status=429, headers={"Retry_After": "7"})
    assert hub.check_write(REPO) == REPO
    assert client.waits == [7]
    client.fail("GET", "auth-check", status=500, times=9)
    with pytest.raises(UserError, match="500"):
        hub.check_write(REPO)


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999999", "http://127.0.0.1:9"])
def test_check_write_hub_out_of_reach_is_one_line(client, monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(UserError, match=rf"^--hf_repo me/llama: cannot write to {re.escape(address)}/me/llama .+: .+$"):
        hub.check_write(REPO)


def test_clean_removes_token_and_signature():
    assert (
        hub_client.clean(f"Bearer {TOKEN}: https://x/y?X-Amz-Signature=abc&b='q' end")
        == "Bearer <token>: https://x/y'q' end"
    )


# -------------------------------------------------------------------------------------------------- download


@pytest.fixture
def uploaded(client, tmp_path):
    """A repository with complete checkpoints of steps 2, 9 and 10, and the files of step 11 without a manifest."""
    client.put("model", REPO, tmp_path / "remote-nothing")
    files = client.repos["model", REPO].commits[-1]
    for step in (2, 9, 10):
        files |= contents(saved(tmp_path / "remote", step))
    files |= contents(saved(tmp_path / "remote", 11, sealed=False))
    return client


def test_fetch_checkpoint_downloads_the_newest_complete_one(uploaded, tmp_path):
    lines = []
    target = hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", lines.append)
    assert target == tmp_path / "out" / "global_step10"
    assert contents(target) == contents(tmp_path / "remote" / "global_step10")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["global_step10"]
    assert lines[0].startswith(f"downloaded {REPO}/global_step10 to {target}: 0.0001 GB in ")
    # It is there now: nothing is downloaded twice.
    before = uploaded.count("GET", "/storage/")
    assert hub.fetch_checkpoint(hub.choose("llama"), tmp_path / "out", lines.append) == target
    assert uploaded.count("GET", "/storage/") == before
    assert hub.choose(REPO, "global_step2").tag == "global_step2"


def test_choose_without_complete_checkpoint_lists_what_there_is(uploaded):
    message = (
        r"me/llama has no complete checkpoint global_step11; complete .*: global_step10, global_step2, global_step9; "
    )
    with pytest.raises(UserError, match=message + "all its files and folders: global_step10, global_step11, "):
        hub.choose(REPO, "global_step11")
    files = uploaded.repos["model", REPO].commits[-1]
    for step in (2, 9, 10):
        del files[f"global_step{step}/manifest.json"]
    with pytest.raises(
        UserError, match=r"no complete checkpoint and no layer .*: none; all .*: global_step10, global_"
    ):
        hub.choose(REPO)
    with pytest.raises(UserError, match=r"me/other cannot be read: 404 Repository not found"):
        hub.choose("me/other")


def test_fetch_checkpoint_unlike_its_manifest_is_refused(uploaded, tmp_path):
    def commit(**changed):
        files = uploaded.repos["model", REPO].commits[-1]
        changed = {f"global_step10/{name.replace('_json', '.json')}": content for name, content in changed.items()}
        files = files | changed
        uploaded.repos["model", REPO].commits.append({path: files[path] for path in files if files[path] is not None})

    commit(config_json=b'{"step": 10}\n')
    with pytest.raises(UserError, match=r"global_step10/config.json has 13 bytes, expected 12"):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path, nothing)
    commit(config_json=None)
    with pytest.raises(
        UserError, match=r"global_step10/config.json is missing, but its checkpoint's manifest names it"
    ):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path, nothing)
    assert not (tmp_path / "global_step10").exists()
    for content in (b"{}", b'{"files": {"../../x": {"size": 1, "sha256": "a"}}}', b'{"files": {"/x": {"size": 1}}}'):
        commit(manifest_json=content)
        with pytest.raises(UserError, match=r"manifest.json is not a manifest"):
            hub.choose(REPO)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("HEAD /resolve/", {"status": 500}),
        ("/storage/", {"cut": 20_000}),
        ("/storage/", {"cut": 20_000, "times": 3}),
        ("/storage/", {"status": 500}),
        ("/resolve/", {"status": 429, "headers": {"Retry_After": "7"}}),
        ("/storage/", {"stall": 20}),
        ("/storage/", {"wrong": True}),
        ("/resolve/.*config.json", {"wrong": True}),
        ("/tree/", {"status": 500}),
        ("/tree/", {"stall": 20}),
        ("/api/models/me/llama$", {"status": 500}),
        ("/api/models/me/llama$", {"stall": 20}),
    ],
)
def test_fetch_checkpoint_transient_failure_is_retried(uploaded, tmp_path, pattern, how):
    method, _, pattern = pattern.rpartition(" ")
    told = uploaded.fail(method or "GET", pattern, **how)
    target = hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert told.seen == how.get("times", 1)
    if "headers" in how:
        assert uploaded.waits[0] >= 7
    assert contents(target) == contents(tmp_path / "remote" / "global_step10")


def test_fetch_checkpoint_wrong_bytes_twice_are_named_and_removed(uploaded, tmp_path):
    uploaded.fail("GET", "/storage/", wrong=True, times=9)
    message = (
        r"me/llama/global_step10 was downloaded twice and is damaged: .*/global_step10/mp_rank_00_model_states.pt "
        r"differs from what was saved: SHA-256 \w{12}…, expected \w{12}…"
    )
    with pytest.raises(UserError, match=message):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert not list((tmp_path / "out").glob("global_step*"))
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_fetch_checkpoint_interrupted_continues_with_missing_files(uploaded, tmp_path, monkeypatch):
    choice = hub.choose(REPO)
    hub._download(choice, ["config.json"], tmp_path / "out" / f".global_step10.{socket.gethostname()}.partial", nothing)
    assert not list((tmp_path / "out").glob("global_step*"))
    hub.fetch_checkpoint(choice, tmp_path / "out", nothing)
    assert uploaded.count("HEAD", "/resolve/.*/global_step10/config.json") == 1
    assert contents(tmp_path / "out" / "global_step10") == contents(tmp_path / "remote" / "global_step10")


def test_cached_checkpoint_equals_the_repository_or_is_refused(uploaded, tmp_path):
    for directory in (
        hub.cached_checkpoint(hub.choose("llama")),
        hub.cached_checkpoint(hub.choose(REPO, "global_step2")),
    ):
        remote = contents(tmp_path / "remote" / directory.name)
        assert (
            contents(directory) | {f"{directory.name}/manifest.json": remote[f"{directory.name}/manifest.json"]}
            == remote
        )
    assert directory.name == "global_step2"
    uploaded.fail("GET", "/storage/", wrong=True, times=9)
    with pytest.raises(UserError, match=r"global_step9/mp_rank_00_model_states.pt differs from what was saved"):
        hub.cached_checkpoint(hub.choose(REPO, "global_step9"), nothing)


def test_fetch_checkpoint_keeps_another_one_of_that_name(uploaded, tmp_path):
    own = saved(tmp_path / "out", 10)
    before = contents(own)
    with pytest.raises(UserError, match=r"out/global_step10 already exists and is not me/llama/global_step10: "):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert contents(own) == before


def test_resume_file_not_here_is_downloaded_from_hf_repo(client, tmp_path, monkeypatch):
    name = "llama3.2-1B_0-4000-epoch-1.pt"
    (tmp_path / name).write_bytes(os.urandom(50_000))
    hub.check_write(REPO)
    send(tmp_path / name)
    args = SimpleNamespace(hf_repo=REPO, resume_file=name, resume_from_checkpoint=None)
    monkeypatch.chdir(tmp_path)
    assert hub.fetch_resume(args, nothing) == (None, name)  # it is here
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = client.fail("GET", "/storage/", wrong=True, times=2)
    with pytest.raises(UserError, match=rf"{name} differs from what was saved: SHA-256 \w+…, expected \w+…"):
        hub.fetch_resume(args, nothing)
    told.times = 1
    checkpoint_path, path = hub.fetch_resume(args, nothing)
    assert checkpoint_path is None and Path(path).name == name
    assert Path(path).read_bytes() == (tmp_path / name).read_bytes()
    assert args.resume_file == name  # as the user typed it
    args.resume_file = "no.pt"
    message = f"--resume_file no.pt: not a local file; on the Hub: me/llama has no file no.pt; .pt files there: {name}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        hub.fetch_resume(args, nothing)


def test_fetch_resume_from_hub_without_hf_repo_is_refused(client):
    args = SimpleNamespace(hf_repo=None, resume_from_checkpoint="hub")
    with pytest.raises(UserError, match="--resume_from_checkpoint hub needs --hf_repo"):
        hub.fetch_resume(args, nothing)


def test_uploads_of_a_resumed_run_create_no_repository(client):
    args = SimpleNamespace(hf_repo="me/typo", resume_from_checkpoint="hub", output_dir="/nowhere")
    with pytest.raises(UserError, match=r"--hf_repo me/typo: cannot write to .*: 404 Repository not found"):
        hub.Uploads(args, nothing)
    assert client.repos == {}


# --------------------------------------------------------------------------------- other people's repositories

PUBLISHED = "ash001/deepspeed-pipeline-llama-1B"


@pytest.fixture
def published(client, tmp_path):
    """The files of `PUBLISHED`: layer shards at its root, next to a tokenizer and another program's training states."""
    model, directory = sample.sample_model_directory("llama"), tmp_path / "published"
    assert convert.main(["to-pipeline", str(model), "--output_dir", str(directory)]) == 0
    (directory / "config.json").unlink()
    (directory / "latest").write_text("global_step7")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (directory / name).write_bytes(os.urandom(1000))
    client.put("model", PUBLISHED, directory)
    client.put("model", LLAMA, model)
    return directory


def requested(server, repo):
    """Names of a repository's files, once for each time that a client asked for one to download it."""
    pattern = rf"/{repo}/resolve/[^/]+/(.+)"
    return sorted(
        match[1] for _, verb, path, _ in server.requests if verb == "HEAD" and (match := re.match(pattern, path))
    )


def without_training_state(names):
    return sorted(name for name in names if name.startswith("layer_") or not name.endswith(("_states.pt", "latest")))


def resume_arguments(name, output_dir, hf_repo=None):
    """Those of pipeline/train.py, whose flag --num_stages the other scripts lack."""
    return SimpleNamespace(
        resume_from_checkpoint=name, output_dir=str(output_dir), hf_repo=hf_repo, model_name=None, num_stages=None
    )


def test_convert_root_layout_without_training_state_equals_local_conversion(client, published, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("hub", "local")}
    for source, output in ((PUBLISHED, outputs["hub"]), (published, outputs["local"])):
        flags = ("--base_model", LLAMA, "--output_dir", str(output), "--verify")
        assert convert.main(["to-hf", str(source), *flags]) == 0, capsys.readouterr().err
        assert "verify: weights identical" in capsys.readouterr().out
    names = without_training_state(path.name for path in published.iterdir())
    assert len([name for name in names if name.startswith("layer_")]) == 7
    assert requested(client, PUBLISHED) == names
    files = {path.name: path.read_bytes() for path in outputs["local"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {path.name: path.read_bytes() for path in outputs["hub"].iterdir()} == files


def test_convert_root_layout_without_config_names_the_flag_before_downloading(client, published, tmp_path, capsys):
    assert convert.main(["to-hf", PUBLISHED, "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"error: {PUBLISHED} has layer shards but no config.json; name their model with --base_model\n"
    )
    assert requested(client, PUBLISHED) == []


def test_convert_root_layout_with_config_needs_no_base_model(client, published, tmp_path, capsys):
    shutil.copy(sample.sample_model_directory("llama") / "config.json", published)
    client.put("model", PUBLISHED, published)
    flags = ("--output_dir", str(tmp_path / "out"), "--verify", "--prompt", "We")
    assert convert.main(["to-hf", PUBLISHED, *flags]) == 0, capsys.readouterr().err
    names = without_training_state(path.name for path in published.iterdir())
    assert {"config.json", "tokenizer.json"} < set(names)
    assert requested(client, PUBLISHED) == names
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def test_convert_root_layout_missing_shard_is_named(client, published, tmp_path, capsys):
    del client.repos["model", PUBLISHED].commits[-1]["layer_03-model_states.pt"]
    flags = ("--base_model", LLAMA, "--output_dir", str(tmp_path / "out"))
    assert convert.main(["to-hf", PUBLISHED, *flags]) == 1
    assert re.search(
        r"error: .*/layer_03-model_states.pt: missing; found 6 shards, .* makes 7", capsys.readouterr().err
    )


def test_convert_root_layout_wrong_bytes_are_noticed(client, published, tmp_path, capsys):
    client.fail("GET", "/storage/", wrong=True, times=99)
    flags = ("--base_model", LLAMA, "--output_dir", str(tmp_path / "out"))
    assert convert.main(["to-hf", PUBLISHED, *flags]) == 1
    message = (
        r" was downloaded twice and is damaged: .*/layer_00-model_states.pt differs from .* SHA-256 \w{12}…, expected "
    )
    assert re.search(PUBLISHED + message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_convert_repository_without_checkpoint_says_what_it_has(client, tmp_path, capsys):
    client.put("model", "me/model", sample.sample_model_directory("llama"))
    saved(tmp_path / "remote", 11, sealed=False)
    client.repos["model", "me/model"].commits[-1] |= contents(tmp_path / "remote" / "global_step11")
    assert convert.main(["to-hf", "me/model", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(
        "error: me/model: not a local directory; on the Hub: me/model has no complete checkpoint and no layer "
        "shards at its root; complete (a folder global_stepN with manifest.json): none; all its files and folders: "
        "config.json, generation_config.json, global_step11, "
    )


def test_choose_complete_folder_takes_precedence_over_root(client, published, tmp_path):
    assert hub.choose(PUBLISHED).tag is None
    files = client.repos["model", PUBLISHED].commits[-1]
    files |= contents(saved(tmp_path / "remote", 4, sealed=False))
    assert hub.choose(PUBLISHED).tag is None
    shutil.rmtree(tmp_path / "remote")
    files |= contents(saved(tmp_path / "remote", 4))
    assert hub.choose(PUBLISHED).name == f"{PUBLISHED}/global_step4"


def test_cached_checkpoint_root_layout_has_no_training_state(client, published):
    """Whatever else of the repository the client's cache has."""
    snapshot = Path(snapshot_download(PUBLISHED))
    assert (snapshot / "mp_rank_00_model_states.pt").is_file()
    directory = hub.cached_checkpoint(hub.choose(PUBLISHED), nothing)
    names = without_training_state(path.name for path in published.iterdir())
    assert sorted(path.name for path in directory.iterdir() if path.is_file()) == names
    assert all((directory / name).read_bytes() == (published / name).read_bytes() for name in names)
    assert directory.name == PUBLISHED.split("/")[1]


def test_resume_from_hub_never_falls_back_to_layer_shards(client, published, tmp_path):
    """A run whose first checkpoint was cut off must not silently start over from the weights at the root."""
    client.put("model", PUBLISHED, published)
    args = resume_arguments("hub", tmp_path / "out", PUBLISHED)
    with pytest.raises(UserError, match=f"no complete checkpoint, .* --resume_from_checkpoint {PUBLISHED}$"):
        hub.fetch_resume(args, nothing)


def test_resume_from_read_only_repository_uploads_to_own(uploaded, tmp_path, monkeypatch):
    uploaded.users["hf_anotherTokenThatMustNotShow"] = User("you")
    monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenThatMustNotShow")
    before = len(uploaded.repos["model", REPO].commits)
    for name, step in ((REPO, 10), (f"{REPO}/global_step2", 2)):
        output = tmp_path / f"out{step}"
        args = resume_arguments(name, output, "you/mine")
        running = hub.Uploads(args, nothing)
        assert hub.fetch_resume(args, nothing) == (str(output / f"global_step{step}"), None)
        assert args.resume_from_checkpoint == name  # as the user typed it
        assert contents(output / f"global_step{step}") == contents(tmp_path / "remote" / f"global_step{step}")
        own = saved(output, 12)
        running.upload(own)
        running.finish(Signal(), None)
        assert uploaded.files("you/mine") == contents(own)
    assert len(uploaded.repos["model", REPO].commits) == before
    with pytest.raises(UserError, match=r"--hf_repo me/llama: cannot write to .*me/llama with this token: 403 "):
        hub.check_write(REPO)


def test_resume_without_token_reads_public_repositories_only(uploaded, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    args = resume_arguments(REPO, tmp_path / "out")
    assert hub.fetch_resume(args, nothing) == (str(tmp_path / "out" / "global_step10"), None)
    uploaded.repos["model", REPO].private = True
    with pytest.raises(
        UserError, match=f"^--resume_from_checkpoint {REPO}: not a local directory; on the Hub: .* 401 "
    ):
        hub.fetch_resume(resume_arguments(REPO, tmp_path / "out"), nothing)


def test_resume_local_path_takes_precedence(uploaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (REPO, f"{REPO}/global_step2"):
        Path(name).mkdir(parents=True)
        args = resume_arguments(name, tmp_path / "out")
        assert hub.fetch_resume(args, nothing) == (name, None)
    for name in ("latest", "/somewhere/global_step2", "global_step2", "a/b/c/d"):
        args = resume_arguments(name, tmp_path / "out")
        assert hub.fetch_resume(args, nothing) == (name, None)
    assert uploaded.requests == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/none", "me/none cannot be read: 404 Repository not found"),
        (f"{REPO}/global_step11", "me/llama has no complete checkpoint global_step11; "),
    ],
)
def test_resume_name_found_nowhere_mentions_both_places(uploaded, tmp_path, name, said):
    with pytest.raises(UserError, match=f"^--resume_from_checkpoint {name}: not a local directory; on the Hub: {said}"):
        hub.fetch_resume(resume_arguments(name, tmp_path), nothing)


def test_resume_root_layout_needs_model_name_or_config(client, published, tmp_path):
    said = f"^{PUBLISHED} has layer shards but no config.json; name their model with --model_name$"
    with pytest.raises(UserError, match=said):
        hub.fetch_resume(resume_arguments(PUBLISHED, tmp_path), nothing)
    assert requested(client, PUBLISHED) == []
    shutil.copy(sample.sample_model_directory("llama") / "config.json", published)
    client.put("model", PUBLISHED, published)
    args = resume_arguments(PUBLISHED, tmp_path)
    directory, _ = hub.fetch_resume(args, nothing)
    layout = checkpoint.shard_layout({}, num_stages=1, dp_world_size=1)
    resume = checkpoint.find_resume(directory, tmp_path, layout)
    assert (resume.state, resume.has_optimizer) == (None, False)
    assert (resume.directory / "config.json").is_file()


def test_resume_file_from_read_only_repository_is_downloaded(client, tmp_path, monkeypatch):
    name = "llama3.2-1B_0-4000-epoch-1.pt"
    content, other = os.urandom(5000), os.urandom(5000)
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / name).write_bytes(content)
    client.put("model", REPO, tmp_path / "remote")
    client.put("model", "you/mine", tmp_path / "remote").commits[-1][name] = other
    client.users["hf_anotherTokenThatMustNotShow"] = User("you", write=False)
    monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenThatMustNotShow")
    monkeypatch.chdir(tmp_path)

    def resolved(file, hf_repo):
        args = SimpleNamespace(resume_file=file, hf_repo=hf_repo, resume_from_checkpoint=None)
        return hub.fetch_resume(args, nothing)[1]

    for hf_repo in (None, "you/mine"):
        path = resolved(f"{REPO}/{name}", hf_repo)
        assert (Path(path).name, Path(path).read_bytes()) == (name, content)
    assert Path(resolved(name, "you/mine")).read_bytes() == other
    said = rf"^--resume_file me/llama/no.pt: not a local file; on the Hub: me/llama has no file no.pt; .* {name}$"
    with pytest.raises(UserError, match=said):
        resolved(f"{REPO}/no.pt", "you/mine")
    with pytest.raises(UserError, match=r"^--resume_file me/none/x.pt: not a local file; on the Hub: .* 404 Repo"):
        resolved("me/none/x.pt", None)
    Path(REPO).mkdir(parents=True)
    Path(REPO, name).write_bytes(b"local")
    assert resolved(f"{REPO}/{name}", "you/mine") == f"{REPO}/{name}"


# ---------------------------------------------------------------------------------------------- command line


def test_upload_command_uploads_all_and_prints_the_retry(client, tmp_path, monkeypatch, capsys):
    one, two, file = saved(tmp_path, 1), saved(tmp_path, 2), tmp_path / "w.pt"
    file.write_bytes(b"weights")
    monkeypatch.chdir(ROOT)
    client.fail("POST", "/preupload/", status=403, headers={"X_Error_Message": "no space"})
    assert hub.main(["upload", REPO, str(one), f"{two}/", str(file)]) == 1
    error, _, retry = capsys.readouterr().err.strip().partition(". To try again: ")
    assert error.startswith(f"error: 1 of 3 uploads failed: {one} (403 no space")
    assert retry == f"python -m common.hub upload {REPO} {one}"
    assert client.files(REPO) == contents(two) | {"w.pt": b"weights"}
    assert hub.main(shlex.split(retry)[3:]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"uploaded {one} to {client.url}/{REPO}/tree/main/global_step1") and err == ""
    assert client.files(REPO) == contents(one) | contents(two) | {"w.pt": b"weights"}
    monkeypatch.chdir(one)
    assert hub.main(["upload", REPO, "."]) == 0
    assert capsys.readouterr().out.startswith(f"uploaded {one} to ")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", " is neither a global_stepN directory nor a .pt file"),
        ("global_step3/..", " is neither a global_stepN directory nor a .pt file"),
        ("global_step3/config.json", " is neither a global_stepN directory nor a .pt file"),
        ("none.pt", ": no such directory or file"),
    ],
)
def test_upload_command_other_paths_are_refused_before_anything_is_sent(client, tmp_path, capsys, path, problem):
    assert hub.main(["upload", REPO, str(saved(tmp_path)), str(tmp_path / path)]) == 1
    assert capsys.readouterr().err == f"error: {os.path.abspath(tmp_path / path)}{problem}\n"
    assert client.requests == []


def test_upload_command_never_prints_the_token(client, tmp_path, monkeypatch, capsys):
    """Not even where the client's own warnings quote addresses with a signature."""
    (handler,), warnings = logging.getLogger("huggingface_hub").handlers, io.StringIO()
    monkeypatch.setattr(handler, "stream", warnings)
    client.fail("PUT", "/storage/", status=500)
    assert hub.main(["upload", REPO, str(saved(tmp_path, 1))]) == 0
    assert "HTTP Error 500 thrown while requesting PUT http://" in warnings.getvalue()
    assert "MustNotShow" not in warnings.getvalue() + "".join(capsys.readouterr())


# --------------------------------------------------------------------------------------------------- models

LLAMA, ABSTRACTS = "meta-llama/Llama-3.2-1B-Instruct", "ash001/arxiv-abstract"


@pytest.fixture
def gated(server, tmp_path):
    """The server with stand-ins for the model, which is gated, and the dataset of the real commands."""
    server.put("model", LLAMA, sample.sample_model_directory("llama"), gated=True)
    (tmp_path / "dataset").mkdir()
    shutil.copy(sample.sample_dataset_file("abstracts"), tmp_path / "dataset" / "train.jsonl")
    server.put("dataset", ABSTRACTS, tmp_path / "dataset")
    server.users[TOKEN].gated = (LLAMA,)
    return server


def test_resolve_model_directory_gated_without_token_says_how_to_log_in(client, gated, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    said = f"{LLAMA}: gated; ask for access at {gated.url}/{LLAMA}, then run `hf auth login` or set HF_TOKEN"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        hub_client.resolve_model_directory(LLAMA)
