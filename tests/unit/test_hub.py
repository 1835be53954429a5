"""Checkpoints to a Hub and back, over HTTP: against `hub_server.py`, with the real client."""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, snapshot_download

from common import checkpoint, convert, hub, manifest, sample
from common.errors import UserError
from common.pretrained import resolve_model_directory
from helpers.hub_server import TOKEN, HubServer, Repo, User
from helpers.launch import ROOT, clean_environment

REPO = "me/llama"


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """This process's own client, pointed to the server; returns it."""
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name, value in {"HF_TOKEN": TOKEN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(hub, "QUICK_WAIT_S", 0.1)
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


def held(running):
    """Uploads that wait until the second event is set; the first says that one has begun."""
    begun, go, send = threading.Event(), threading.Event(), hub.send
    running.setattr(hub, "send", lambda *args: (begun.set(), go.wait(30), send(*args))[2])
    return begun, go


# ---------------------------------------------------------------------------------------------------- upload


@pytest.mark.parametrize("sealed", [True, False])
def test_a_directory_shows_its_manifest_last(client, tmp_path, sealed):
    directory, said = saved(tmp_path, sealed=sealed), []
    running = uploads(said)
    running.upload(directory)
    running.finish(Signal(), None)
    names = [name for name in directory.iterdir() if name.name != manifest.MANIFEST]
    *_, before, after = client.repos["model", REPO].commits
    assert {path for path in before if path[0] != "."} == {f"global_step3/{path.name}" for path in names}
    assert set(after) - set(before) == {"global_step3/manifest.json"}
    for path in names:
        assert after[f"global_step3/{path.name}"] == path.read_bytes()
    (tmp_path / "manifest.json").write_bytes(after["global_step3/manifest.json"])
    assert manifest.read(tmp_path) == {path.name: manifest.entry(path) for path in names}
    assert f"uploaded {directory} to {client.url}/{REPO}/tree/main/global_step3: " in said[0]
    assert said[1:] == [f"on the Hub, {client.url}/{REPO}: global_step3"]


def test_a_file_goes_before_directories_that_wait(client, tmp_path, monkeypatch):
    begun, go = held(monkeypatch)
    directories, file = [saved(tmp_path, step) for step in (1, 2)], tmp_path / "llama3.2-1B_0-4000-epoch-1.pt"
    file.write_bytes(os.urandom(1000))
    running, said = uploads(), []
    running.say = said.append
    started = time.monotonic()
    for path in (*directories, file):
        running.upload(path)
        begun.wait(10)
    assert time.monotonic() - started < 1
    assert running.pending() == {*directories, file}
    go.set()
    running.finish(Signal(), None)
    assert said[-1].endswith(": global_step1, llama3.2-1B_0-4000-epoch-1.pt, global_step2")
    assert client.files(REPO)[file.name] == file.read_bytes()
    assert running.pending() == set()


def test_files_in_parts(client, tmp_path):
    client.part_size = 30_000
    directory = saved(tmp_path)
    hub.check_write(REPO)
    hub.send(REPO, directory, nothing)
    assert client.files(REPO) == contents(directory)
    assert client.count("PUT", r"/storage/\w+/\d$") == 4


@pytest.mark.parametrize(
    "failure",
    [
        ("PUT", "/storage/", {"status": 500}),
        ("PUT", "/storage/", {"status": 429, "headers": {"Retry_After": "1"}}),
        ("PUT", "/storage/", {"cut": 20_000}),
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"cut": 0}),
        ("POST", "/preupload/", {"status": 503}),
        ("POST", "/objects/batch", {"status": 502}),
        ("POST", "/verify", {"status": 500}),
        ("POST", "/paths-info/", {"status": 500}),
        ("PUT", "/storage/", {"stall": 20}),
        ("POST", "/commit/", {"stall": 20}),
        ("GET", "/tree/", {"stall": 20}),
    ],
    ids=lambda failure: f"{failure[0]} {failure[1]} {failure[2]}",
)
def test_an_upload_outlasts(client, tmp_path, monkeypatch, failure):
    method, pattern, how = failure
    monkeypatch.setattr(hub, "STALL_S", 1)
    directory, said = saved(tmp_path), []
    hub.check_write(REPO)
    told = client.fail(method, pattern, **how)
    started = time.monotonic()
    hub.send(REPO, directory, said.append)
    assert told.seen == 1
    assert client.files(REPO) == contents(directory)
    assert time.monotonic() - started < 5
    if "headers" in how:
        first, second = [at for at, verb, path, _ in client.requests if verb == "PUT"]
        assert second - first >= 1


def test_our_own_tries_wait_longer_and_longer_or_as_told(client, tmp_path, monkeypatch):
    waits, directory, said = [], saved(tmp_path), []
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 10)
    monkeypatch.setattr(hub.time, "sleep", waits.append)  # the client's too, which does not try commits again
    hub.check_write(REPO)
    client.fail("POST", "/commit/", status=500, times=2)
    client.fail("POST", "/commit/", status=429, headers={"Retry_After": "77"})
    hub.send(REPO, directory, said.append)
    assert waits == [10, 20, 77]
    assert [line.rpartition("; ")[2] for line in said] == [
        "again in 10 s, try 2 of 5", "again in 20 s, try 3 of 5", "again in 77 s, try 4 of 5",
    ]  # fmt: skip
    client.fail("POST", "/commit/", status=500, times=9)
    waits.clear()
    with pytest.raises(Exception, match="500"):
        hub.send(REPO, saved(tmp_path, 4), nothing)
    assert waits == [10, 20, 40, 80]


def test_a_failed_upload_costs_neither_training_nor_files(client, tmp_path, monkeypatch):
    bad, good, said = saved(tmp_path, 1), saved(tmp_path, 2), []
    running = uploads(said)
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
    assert said[-1] == f"on the Hub, {client.url}/{REPO}: global_step2"
    assert running.pending() == {bad}
    assert contents(bad)
    assert f"cd {ROOT} && python -m common.hub upload {REPO} {bad}" in message
    monkeypatch.chdir(ROOT)
    assert hub.retry_command(REPO, [Path("a b")]) == f"python -m common.hub upload {REPO} 'a b'"


def test_a_hub_out_of_reach_gets_one_try_for_each_next_path(client, tmp_path, monkeypatch):
    tries = []

    def unreachable(repo, path, say, attempts):
        tries.append(attempts)
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "send", unreachable)
    running = uploads()
    for step in (1, 2):
        running.upload(saved(tmp_path, step))
    with pytest.raises(UserError, match=r"2 of 2 uploads failed: .*global_step1 \(no route\); .*global_step2 \(no"):
        running.finish(Signal(), None)
    assert tries == [hub.ATTEMPTS, 1]


def test_another_upload_of_the_same_name_takes_the_place_of_the_first(client, tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    (first / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"of a second rank")
    (first / manifest.MANIFEST).unlink()
    hub.check_write(REPO)
    hub.send(REPO, first, nothing)
    assert len(client.files(REPO)) == 4
    hub.send(REPO, second, nothing)
    assert client.files(REPO) == contents(second)
    between = client.repos["model", REPO].commits[-2]
    assert "global_step3/manifest.json" not in between
    stored = client.count("PUT", "/storage/")
    hub.send(REPO, second, nothing)  # once more: nothing is sent twice
    assert client.count("PUT", "/storage/") == stored
    assert client.files(REPO) == contents(second)


def test_a_file_changed_since_it_was_saved_is_not_shown(client, tmp_path):
    directory = saved(tmp_path)
    (directory / "config.json").write_text('{"step": 4}')
    hub.check_write(REPO)
    with pytest.raises(UserError, match=r"config.json was changed after it was saved: SHA-256 \w{12}…, its manifest"):
        hub.send(REPO, directory, nothing)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"config.json is missing, its checkpoint's manifest names it"):
        hub.send(REPO, directory, nothing)
    assert client.files(REPO) == {}


def test_what_arrived_otherwise_is_not_sealed(client, tmp_path, monkeypatch):
    directory = saved(tmp_path)
    hub.check_write(REPO)
    store = type(client).files
    handler = client.server.RequestHandlerClass
    commit = handler.commit

    def damaged(self, body, repo, revision):
        try:
            commit(self, body, repo, revision)
        finally:
            repo.commits[-1]["global_step3/mp_rank_00_model_states.pt"] = b"x" * 100_000

    monkeypatch.setattr(handler, "commit", damaged)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt has SHA-256 \w+… instead of \w+…, which is not"):
        hub.send(REPO, directory, nothing)
    assert "global_step3/manifest.json" not in store(client, REPO)


def test_checkpoints_that_wait_are_not_dropped(client, tmp_path, monkeypatch):
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


def test_a_signal_ends_the_waiting_and_the_next_run_uploads_what_was_left(client, tmp_path, monkeypatch, capsys):
    said, stop = [], Signal()
    with monkeypatch.context() as held_up:
        begun, go = held(held_up)
        running = uploads(said, output_dir=str(tmp_path))
        steps = [saved(tmp_path, step) for step in (1, 2, 3)]
        for path in steps:
            running.upload(path)
        begun.wait(10)
        stop.number = signal.SIGTERM
        started = time.monotonic()
        running.finish(stop, None)
        assert time.monotonic() - started < 5 and said[-1] == "stopped by SIGTERM before all is on the Hub"
        atexit.unregister(running._at_exit)
        running._at_exit()
        assert "to upload: " in capsys.readouterr().err
        running.list = Path("/nowhere/.to_upload")  # its process is gone
        # A run begun anew has nothing to do with them, nor one that uploads elsewhere.
        assert uploads(output_dir=str(tmp_path)).pending() == set()
        elsewhere = uploads(repo="me/other", output_dir=str(tmp_path), resume_from_checkpoint="latest")
        assert elsewhere.pending() == set()
        lines = (tmp_path / ".to_upload").read_text().splitlines()
        assert lines == [f"{REPO} {path.name}" for path in steps]
        shutil.rmtree(steps[1])
        again = uploads(said, output_dir=str(tmp_path), resume_from_checkpoint="latest")
        assert said[-1] == "still to be uploaded from the run before: global_step1, global_step3"
        assert again.pending() == {steps[0], steps[2]}
        go.set()
        again.finish(Signal(), None)
    assert {path.split("/")[0] for path in client.files(REPO)} >= {"global_step1", "global_step3"}
    assert not (tmp_path / ".to_upload").exists()


def test_an_address_with_a_password_does_not_show_it(client, monkeypatch):
    bare = hub.constants.ENDPOINT
    monkeypatch.setattr(hub.constants, "ENDPOINT", bare.replace("//", "//user:hf_secretSecretSecret@"))
    assert hub.address("me/llama") == f"{bare}/me/llama"
    assert hub.clean("no answer from https://us:er@host/x, see http://host/a@b") == (
        "no answer from https://host/x, see http://host/a@b"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_unknownTokenThatMustNotShow")
    with pytest.raises(UserError) as refused:
        hub.check_write("me/llama")
    assert "ecret" not in str(refused.value) and bare in str(refused.value)


# ------------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        (REPO, None, "no token for the Hub; run `hf auth login` or set HF_TOKEN, with write access"),
        (REPO, "hf_unknownTokenThatMustNotShow", " does not know the token"),
        (REPO, "hf_readerTokenThatMustNotShow", "--hf_repo me/llama cannot be made by reader: "),
        ("me/there", "hf_readerTokenThatMustNotShow", "the token of reader may not write there: 403 You"),
        ("other/llama", TOKEN, "--hf_repo other/llama cannot be made by me: 403 You don't have the rights"),
    ],
)  # fmt: skip
def test_no_upload_without(client, monkeypatch, repo, token, said):
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
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "MustNotShow" not in str(refused.value)
    assert time.monotonic() - started < 1
    assert set(client.repos) == {("model", "me/there")}


@pytest.mark.parametrize("name", ["a/b/c", "", f"https://me:{TOKEN}@huggingface.co/me/x"])
def test_what_is_no_name_of_a_repository_is_not_even_quoted(name, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as refused:
        hub.main(["upload", name, "here"])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "USER/NAME: expected USER/NAME, the name of a repository on the Hub" in said
    assert TOKEN not in said


def test_the_check_costs_a_second_and_makes_the_repository(client):
    started = time.monotonic()
    assert hub.check_write("llama") == REPO
    assert hub.check_write(REPO) == REPO
    assert time.monotonic() - started < 1
    assert client.repos["model", REPO].private
    client.fail("GET", "whoami", status=429, headers={"Retry_After": "1"})
    assert hub.check_write(REPO) == REPO
    client.fail("GET", "whoami", status=500, times=9)
    with pytest.raises(UserError, match="500"):
        hub.check_write(REPO)


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999999"])
def test_an_address_that_is_none(monkeypatch, address):
    monkeypatch.setattr(hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"^HF_ENDPOINT http.* is no address"):
        hub.check_write(REPO)


def test_a_hub_out_of_reach_is_one_line(client, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"--hf_repo me/llama: no answer from http://127.0.0.1:9: .*Connection refused"):
        hub.check_write(REPO)


def test_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    checkpoint.check_space(tmp_path / "not" / "there", free // 2, "to save")
    with pytest.raises(UserError, match=rf"{tmp_path} has .* GB free, .* GB are needed to save"):
        checkpoint.check_space(tmp_path, 2 * free, "to save")


def test_room_for_all_that_will_be_saved_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    million, layout = 1_000_000, {"precision": "bf16", "zero_stage": 2}

    def needed(keep_last=None, save_every=None, **more):
        """Least room in units of a million bytes with which 10 steps of 4 an epoch may begin."""
        args = SimpleNamespace(
            output_dir=str(tmp_path), save_checkpoint=True, keep_last=keep_last, save_every=save_every
        )
        for free in range(500):
            monkeypatch.setattr(
                checkpoint.shutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free * million)
            )
            try:
                checkpoint.check_disk(args, million, layout, 4, 10, **more)
            except UserError:
                continue
            return free
        return None

    assert needed() == 3 * 14  # steps 4, 8 and 10
    assert needed(save_every=5) == 4 * 14  # and 5
    assert needed(weights_files=True) == 3 * 14 + 3 * 2
    assert needed(keep_last=1) == 2 * 14
    assert needed(resume=SimpleNamespace(state={"global_step": 4})) == 2 * 14
    (saved(tmp_path, 8, size=13 * million) / "more.pt").write_bytes(bytes(million - 100))
    assert needed() == 2 * 14  # step 8 is saved over what is there
    assert needed(keep_last=1) == 0


def test_clean():
    assert (
        hub.clean(f"Bearer {TOKEN}: https://x/y?X-Amz-Signature=abc&b='q' end") == "Bearer <token>: https://x/y'q' end"
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


def test_the_newest_complete_checkpoint_comes_back(uploaded, tmp_path):
    said = []
    target = hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", said.append)
    assert target == tmp_path / "out" / "global_step10"
    assert contents(target) == contents(tmp_path / "remote" / "global_step10")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["global_step10"]
    assert said[0].startswith(f"downloaded {REPO}/global_step10 to {target}: 0.0001 GB in ")
    # It is there now: nothing is downloaded twice.
    before = uploaded.count("GET", "/storage/")
    assert hub.fetch_checkpoint(hub.choose("llama"), tmp_path / "out", said.append) == target
    assert uploaded.count("GET", "/storage/") == before
    assert hub.choose(REPO, "global_step2").tag == "global_step2"


def test_a_run_without_a_complete_checkpoint_says_what_there_is(uploaded):
    said = (
        r"me/llama has no complete checkpoint global_step11 .*; complete: global_step2, global_step9, global_step10; "
    )
    with pytest.raises(UserError, match=said + "incomplete: global_step11"):
        hub.choose(REPO, "global_step11")
    files = uploaded.repos["model", REPO].commits[-1]
    for step in (2, 9, 10):
        del files[f"global_step{step}/manifest.json"]
    with pytest.raises(UserError, match=r"no complete checkpoint .*: none; incomplete: global_step2, global_step9, "):
        hub.choose(REPO)
    with pytest.raises(UserError, match=r"me/other cannot be read: 404 Repository not found"):
        hub.choose("me/other")


def test_a_manifest_that_does_not_fit_is_not_trusted(uploaded):
    def commit(**changed):
        files = uploaded.repos["model", REPO].commits[-1]
        changed = {f"global_step10/{name.replace('_json', '.json')}": content for name, content in changed.items()}
        files = files | changed
        uploaded.repos["model", REPO].commits.append({path: files[path] for path in files if files[path] is not None})

    commit(config_json=b'{"step": 10}\n')
    with pytest.raises(UserError, match=r"global_step10/config.json has 13 bytes instead of 12, which its"):
        hub.choose(REPO)
    commit(config_json=None)
    with pytest.raises(UserError, match=r"global_step10/config.json is missing, which its checkpoint's manifest"):
        hub.choose(REPO)
    commit(manifest_json=b"{}")
    with pytest.raises(UserError, match=r"manifest.json is not a manifest"):
        hub.choose(REPO)


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("HEAD /resolve/", {"status": 500}),
        ("/storage/", {"cut": 20_000}),
        ("/storage/", {"cut": 20_000, "times": 3}),
        ("/storage/", {"status": 500}),
        ("/resolve/", {"status": 429, "headers": {"Retry_After": "1"}}),
        ("/storage/", {"stall": 20}),
        ("/storage/", {"wrong": True}),
        ("/resolve/.*config.json", {"wrong": True}),
        ("/tree/", {"status": 500}),
    ],
)
def test_a_download_outlasts(uploaded, tmp_path, monkeypatch, pattern, how):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    method, _, pattern = pattern.rpartition(" ")
    told = uploaded.fail(method or "GET", pattern, **how)
    target = hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert told.seen == how.get("times", 1)
    assert contents(target) == contents(tmp_path / "remote" / "global_step10")


def test_a_file_that_comes_wrong_is_named_and_nothing_is_left(uploaded, tmp_path):
    uploaded.fail("GET", "/storage/", wrong=True, times=9)
    said = (
        r"me/llama: global_step10/mp_rank_00_model_states.pt was downloaded twice and is wrong: 100,000 bytes with "
        r"SHA-256 \w{12}…, expected 100,000 bytes with SHA-256 \w{12}…"
    )
    with pytest.raises(UserError, match=said):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert not list((tmp_path / "out").glob("global_step*"))
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_an_interrupted_download_goes_on(uploaded, tmp_path, monkeypatch):
    choice, download = hub.choose(REPO), hub._download

    def interrupted(repo, path, *args, **kwargs):
        if path.endswith(".pt"):
            raise KeyboardInterrupt
        return download(repo, path, *args, **kwargs)

    monkeypatch.setattr(hub, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch_checkpoint(choice, tmp_path / "out", nothing)
    assert not list((tmp_path / "out").glob("global_step*"))
    monkeypatch.setattr(hub, "_download", download)
    hub.fetch_checkpoint(choice, tmp_path / "out", nothing)
    assert uploaded.count("HEAD", "/resolve/.*/global_step10/config.json") == 1
    assert contents(tmp_path / "out" / "global_step10") == contents(tmp_path / "remote" / "global_step10")


def test_to_convert_a_checkpoint_comes_to_the_cache(uploaded, tmp_path):
    newest = hub.cached_checkpoint(hub.choose("llama"), nothing)
    assert contents(newest) == contents(tmp_path / "remote" / "global_step10")
    named = hub.cached_checkpoint(hub.choose(REPO, "global_step2"), nothing)
    assert contents(named) == contents(tmp_path / "remote" / "global_step2")
    uploaded.fail("GET", "/storage/", wrong=True, times=9)
    with pytest.raises(UserError, match=r"global_step9/mp_rank_00_model_states.pt was downloaded twice and is wrong"):
        hub.cached_checkpoint(hub.choose(REPO, "global_step9"), nothing)


def test_another_checkpoint_of_that_name_stays(uploaded, tmp_path):
    own = saved(tmp_path / "out", 10)
    before = contents(own)
    with pytest.raises(UserError, match=r"out/global_step10 is there already and not the global_step10 of me/llama: "):
        hub.fetch_checkpoint(hub.choose(REPO), tmp_path / "out", nothing)
    assert contents(own) == before


def test_weights_of_a_name_that_is_not_here_come_from_the_hub(client, tmp_path, monkeypatch):
    name = "llama3.2-1B_0-4000-epoch-1.pt"
    (tmp_path / name).write_bytes(os.urandom(50_000))
    hub.check_write(REPO)
    hub.send(REPO, tmp_path / name, nothing)
    args = SimpleNamespace(hf_repo=REPO, resume_file=name, resume_from_checkpoint=None)
    monkeypatch.chdir(tmp_path)
    assert hub.fetch_resume(args, nothing) == (None, name)  # it is here
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    client.fail("GET", "/storage/", wrong=True)
    checkpoint_path, path = hub.fetch_resume(args, nothing)
    assert checkpoint_path is None and Path(path).name == name
    assert Path(path).read_bytes() == (tmp_path / name).read_bytes()
    assert args.resume_file == name  # as the user typed it
    args.resume_file = "no.pt"
    said = f"--resume_file no.pt: not a local file; on the Hub: me/llama has no file no.pt; .pt files there: {name}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        hub.fetch_resume(args, nothing)


def test_weights_that_come_wrong_are_named_both_sides(client, tmp_path):
    (tmp_path / "a_0-1-epoch-1.pt").write_bytes(os.urandom(5000))
    hub.check_write(REPO)
    hub.send(REPO, tmp_path / "a_0-1-epoch-1.pt", nothing)
    client.fail("GET", "/storage/", wrong=True, times=9)
    with pytest.raises(UserError, match=r"is wrong: 5,000 bytes with SHA-256 .*…, expected 5,000 bytes with SHA-256 "):
        hub.fetch_file(REPO, "a_0-1-epoch-1.pt", nothing)
    client.failures.clear()
    path = hub.fetch_file(REPO, "a_0-1-epoch-1.pt", nothing)
    assert Path(path).read_bytes() == (tmp_path / "a_0-1-epoch-1.pt").read_bytes()


def test_resume_from_the_hub_needs_a_repository(client):
    args = SimpleNamespace(hf_repo=None, resume_from_checkpoint="hub")
    with pytest.raises(UserError, match="--resume_from_checkpoint hub needs --hf_repo"):
        hub.fetch_resume(args, nothing)


def test_to_go_on_makes_no_repository(client):
    args = SimpleNamespace(hf_repo="me/typo", resume_from_checkpoint="hub", output_dir="/nowhere")
    with pytest.raises(UserError, match="me/typo: there is no such repository that me may see"):
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


def test_convert_root_layout_downloads_only_layers_and_equals_local_conversion(client, published, tmp_path, capsys):
    outputs = {name: tmp_path / name for name in ("hub", "local")}
    for source, output in ((PUBLISHED, outputs["hub"]), (published, outputs["local"])):
        flags = ("--base_model", LLAMA, "--output_dir", str(output), "--verify")
        assert convert.main(["to-hf", str(source), *flags]) == 0, capsys.readouterr().err
        assert "verify: logits identical" in capsys.readouterr().out
    layers = sorted(path.name for path in published.glob("layer_*"))
    assert len(layers) == 7
    assert requested(client, PUBLISHED) == layers
    files = {path.name: path.read_bytes() for path in outputs["local"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {path.name: path.read_bytes() for path in outputs["hub"].iterdir()} == files


def test_convert_root_layout_without_config_names_the_flag_before_downloading(client, published, tmp_path, capsys):
    assert convert.main(["to-hf", PUBLISHED, "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"error: {PUBLISHED}: not a local directory; on the Hub: {PUBLISHED} has layer shards but no config.json; "
        "name their model with --base_model\n"
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
    told = client.fail("GET", "/storage/", wrong=True, times=2)
    flags = ("--base_model", LLAMA, "--output_dir", str(tmp_path / "out"))
    assert convert.main(["to-hf", PUBLISHED, *flags]) == 1
    assert told.seen == 2
    said = r"/layer_00-model_states.pt was downloaded twice and is wrong: .* bytes with SHA-256 \w{12}…, expected "
    assert re.search(said.replace("/", f"{PUBLISHED}: ", 1), capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_convert_repository_without_checkpoint_says_what_it_has(client, tmp_path, capsys):
    client.put("model", "me/model", sample.sample_model_directory("llama"))
    saved(tmp_path / "remote", 11, sealed=False)
    client.repos["model", "me/model"].commits[-1] |= contents(tmp_path / "remote" / "global_step11")
    assert convert.main(["to-hf", "me/model", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(
        "error: me/model: not a local directory; on the Hub: me/model has no complete checkpoint (a folder "
        "global_stepN with manifest.json) and no layer shards (layer_*) at its root; complete: none; incomplete: "
        "global_step11; files at its root: config.json, "
    )


def test_choose_complete_folder_takes_precedence_over_root(client, published, tmp_path):
    assert hub.choose(PUBLISHED).tag is None
    files = client.repos["model", PUBLISHED].commits[-1]
    files |= contents(saved(tmp_path / "remote", 4, sealed=False))
    assert hub.choose(PUBLISHED).tag is None
    shutil.rmtree(tmp_path / "remote")
    files |= contents(saved(tmp_path / "remote", 4))
    assert hub.choose(PUBLISHED).name == f"{PUBLISHED}/global_step4"


def test_cached_checkpoint_root_layout_holds_only_what_was_asked_for(client, published):
    """Whatever else of the repository the cache has, the result is the same."""
    shutil.copy(sample.sample_model_directory("llama") / "config.json", published)
    client.put("model", PUBLISHED, published)
    snapshot = Path(snapshot_download(PUBLISHED))
    assert (snapshot / "mp_rank_00_model_states.pt").is_file()
    names = {path.name for path in published.iterdir()}
    for side_files, expected in (
        (True, without_training_state(names)),
        (False, sorted(name for name in names if name.startswith("layer_"))),
    ):
        directory = hub.cached_checkpoint(hub.choose(PUBLISHED), nothing, side_files=side_files)
        assert sorted(path.name for path in directory.iterdir()) == expected
        assert all((directory / name).read_bytes() == (published / name).read_bytes() for name in expected)
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
    with pytest.raises(UserError, match="--hf_repo me/llama: the token of you may not write there"):
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
        (f"{REPO}/global_step11", "me/llama has no complete checkpoint global_step11 "),
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


def run(server, tmp_path, *command, token=TOKEN, cwd=ROOT):
    env = clean_environment() | server.environment(tmp_path / "home", token)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_the_upload_command(server, tmp_path):
    one, two, file = saved(tmp_path, 1), saved(tmp_path, 2), tmp_path / "w.pt"
    file.write_bytes(b"weights")
    command = [sys.executable, "-m", "common.hub", "upload", REPO, one, f"{two}/", file]
    server.fail("POST", "/preupload/", status=403, headers={"X_Error_Message": "no space"})
    failed = run(server, tmp_path, *command)
    assert failed.returncode == 1
    error, retry = failed.stderr.splitlines()
    assert error.startswith(f"error: {one} is not on the Hub: 403 no space")
    assert retry == f"to try again: python -m common.hub upload {REPO} {one}"
    assert server.files(REPO) == contents(two) | {"w.pt": b"weights"}
    again = run(server, tmp_path, "bash", "-c", retry.removeprefix("to try again: "))
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"uploaded {one} to {server.url}/{REPO}/tree/main/global_step1")
    assert server.files(REPO) == contents(one) | contents(two) | {"w.pt": b"weights"}
    for wrong in (tmp_path, one / "..", one / "config.json"):
        refused = run(server, tmp_path, *command[:5], wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert refused.stderr.endswith(" is neither a global_stepN directory nor a .pt file\n")
    here = run(server, tmp_path, "env", f"PYTHONPATH={ROOT}", *command[:5], ".", cwd=one)
    assert (here.returncode, here.stderr) == (0, "") and here.stdout.startswith(f"uploaded {one} to ")
    assert server.files(REPO) == contents(one) | contents(two) | {"w.pt": b"weights"}
    missing = run(server, tmp_path, *command[:-1], tmp_path / "none")
    assert (missing.returncode, missing.stderr) == (1, f"error: {tmp_path / 'none'}: no such directory or file\n")


def test_the_token_is_in_no_line(server, tmp_path):
    """Not even where the client's own warnings quote addresses with a signature."""
    one = saved(tmp_path, 1)
    server.fail("PUT", "/storage/", status=500)
    finished = run(server, tmp_path, sys.executable, "-m", "common.hub", "upload", REPO, one)
    assert finished.returncode == 0
    assert re.search("HTTP Error 500 thrown while requesting PUT http://", finished.stderr)
    assert "MustNotShow" not in finished.stdout + finished.stderr


# ----------------------------------------------------------------------------------------------- whole runs

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


def test_a_gated_model_without_a_token(client, gated, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    said = f"{LLAMA}: gated; ask for access at {gated.url}/{LLAMA}, then run `hf auth login` or set HF_TOKEN"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        resolve_model_directory(LLAMA)
