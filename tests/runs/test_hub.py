"""Runs that upload to a Hub and resume from it, against `hub_server.py`."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from common import convert, hub, hub_client, manifest, sample
from helpers.hub_server import TOKEN, HubServer
from helpers.launch import ROOT, clean_environment, errors, events, free_port, launch, launch_several

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
    monkeypatch.setattr(hub, "RETRY_WAITS_S", (0.1,) * 4)
    monkeypatch.setattr(hub_client, "QUICK_RETRY_WAITS_S", (0.1,) * 2)
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


def run(server, tmp_path, *command, token=TOKEN, cwd=ROOT):
    env = clean_environment() | server.environment(tmp_path / "home", token)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


RUN_THAT_FAILS = """
import sys
from argparse import Namespace
from pathlib import Path
from common import distributed, hub
from common.errors import UserError
def main():
    uploads = hub.Uploads(Namespace(hf_repo="me/llama", resume_from_checkpoint=None, output_dir="out"), print)
    for path in sys.argv[2:]:
        uploads.upload(Path(path))
    if sys.argv[1] == "interrupted":
        raise KeyboardInterrupt
    raise UserError("step 7: loss nan")
distributed.set_rank_variables()
distributed.run(main)
"""


@pytest.mark.parametrize("how", ["failed", "interrupted"])
def test_run_failing_ends_at_once_and_names_pending_uploads(server, tmp_path, how):
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    server.fail("PUT", "/storage/", stall=40)
    started = time.monotonic()
    failed = run(server, tmp_path, sys.executable, "-c", RUN_THAT_FAILS, how, one, two)
    assert time.monotonic() - started < 30
    assert failed.returncode == (130 if how == "interrupted" else 1)
    last = failed.stderr.splitlines()[-1]
    command = f"python -m common.hub upload {REPO} {one} {two}"
    assert last == f"not on the Hub: {one}, {two}; to upload: {command}"
    server.failures.clear()
    assert run(server, tmp_path, "bash", "-c", command).returncode == 0
    assert server.files(REPO) == contents(one) | contents(two)


TWO_RANKS = """
import sys, time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from common import distributed, hub
def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    uploads = hub.Uploads(Namespace(hf_repo="me/llama", resume_from_checkpoint=None, output_dir="out"), print)
    send = hub.send
    hub.send = lambda *args: (time.sleep(6), send(*args))[1]
    uploads.upload(Path(sys.argv[1]))
    uploads.finish(distributed.PreemptionHandler(), torch.device("cpu"))
distributed.run(main)
"""


def test_finish_longer_than_the_collective_timeout_keeps_other_ranks_waiting(server, tmp_path):
    env = clean_environment() | server.environment(tmp_path / "home")
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, saved(tmp_path / str(rank))], cwd=ROOT, text=True,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    (out, error), (_, other) = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], error + other
    assert "uploaded" in out
    assert server.files(REPO) == contents(tmp_path / "0" / "global_step3")


SHORT = ("--max_length", 48, "--batch_size", 1, "--accum_steps", 2, "--max_eval_steps", 1, "--generation_prompt", "")


LLAMA, ABSTRACTS = "meta-llama/Llama-3.2-1B-Instruct", "ash001/arxiv-abstract"


def losses(directory):
    return {step["step"]: step["loss"] for step in events(directory, "step")}


def assert_no_token(directory, *finished):
    """Neither a run's output nor a file that it wrote holds the token, or the signature of an address."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    assert len(files) > 5
    secret = b"MustNotShow"
    assert [path for path in files if secret in path.read_bytes()] == []
    for run in finished:
        assert secret.decode() not in run.stdout + run.stderr


def test_zero_uploads_while_training_and_resumes_from_the_hub(server, tmp_path):
    env = server.environment(tmp_path / "home") | {"WANDB_MODE": "offline"}
    flags = (*SHORT, "--max_train_steps", 6, "--save_every", 2, "--keep_last", 1, "--hf_repo", "me/zero")
    server.fail("PUT", "/storage/", stall=5)
    server.fail("PUT", "/storage/", status=500)
    whole = tmp_path / "whole"
    run = launch("zero/train.py", *flags, "--output_dir", whole, "--wandb_project", "by-hand", ranks=2, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = {step["step"]: step["time"] for step in events(whole, "step")}
    first_commit = min(at for at, _, path, _ in server.requests if "/commit/" in path)
    assert steps[2] < first_commit
    assert steps[3] < first_commit  # the upload took 5 s, and training did not wait
    for step in (2, 4, 6):
        assert f"uploaded {whole}/global_step{step} to {server.url}/me/zero/tree/main/global_step{step}: " in run.stdout
    (weights,) = whole.glob("gpt2_0-*-epoch-1.pt")
    assert server.files("me/zero")[weights.name] == weights.read_bytes()
    (end,) = (line for line in run.stdout.splitlines() if line.startswith(f"on the Hub, {server.url}/me/zero: "))
    assert {*end.partition("zero: ")[2].split(", ")} == {"global_step2", "global_step4", "global_step6", weights.name}
    trained = torch.load(whole / "global_step6" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    state = torch.load(weights, weights_only=True)["MODEL_STATE"]
    assert all(torch.equal(state[name], trained[name]) for name in state) and len(state) > 10
    assert [path.name for path in whole.glob("global_step*")] == ["global_step6"]
    there = server.files("me/zero")
    for step in (2, 4, 6):
        assert f"global_step{step}/manifest.json" in there
        assert f"global_step{step}/zero_pp_rank_1_mp_rank_00_optim_states.pt" in there
        assert f"global_step{step}/tokenizer.json" in there
    assert_no_token(whole, run)

    # Another machine goes on from step 4, because step 6 has lost its manifest; then the Hub takes no more.
    commits = server.repos["model", "me/zero"].commits
    commits.append({path: there[path] for path in there if path != "global_step6/manifest.json"})
    server.fail("POST", "/preupload/", status=403, times=99, headers={"X_Error_Message": "quota exceeded"})
    other = tmp_path / "other"
    run = launch("zero/train.py", *flags, "--output_dir", other, "--resume_from_checkpoint", "hub", ranks=2, env=env)
    assert run.returncode != 0
    assert f"downloaded me/zero/global_step4 to {other}/global_step4: " in run.stdout
    assert losses(other) == {step: loss for step, loss in losses(whole).items() if step > 4}
    assert "Traceback" not in run.stderr
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "2 of 2 uploads failed: " in error
    assert f"{other}/global_step6 (403 quota exceeded, from " in error
    assert len(list((other / "global_step6").iterdir())) > 5
    server.failures.clear()
    retry = subprocess.run(
        error.partition(". To try again: ")[2], shell=True, cwd=ROOT, env=clean_environment() | env, check=False
    )
    assert retry.returncode == 0
    assert "global_step6/manifest.json" in server.files("me/zero")
    assert_no_token(other, run)
    # Of what was never up the directory keeps a list, for the next run.
    assert sorted((other / ".to_upload").read_text().split()[1::2]) == ["global_step6", weights.name]


@pytest.fixture
def gated(server, tmp_path):
    """The server with stand-ins for the model, which is gated, and the dataset of the real commands."""
    server.put("model", LLAMA, sample.sample_model_directory("llama"), gated=True)
    (tmp_path / "dataset").mkdir()
    shutil.copy(sample.sample_dataset_file("abstracts"), tmp_path / "dataset" / "train.jsonl")
    server.put("dataset", ABSTRACTS, tmp_path / "dataset")
    server.users[TOKEN].gated = (LLAMA,)
    return server


@pytest.mark.slow
def test_offload_continues_with_the_next_slice_from_the_hub(gated, tmp_path):
    env = gated.environment(tmp_path / "home")
    flags = (
        "--model_name", LLAMA, "--dataset_name", ABSTRACTS, "--num_epochs", 1, "--batch_size", 1, "--accum_steps", 4,
        "--max_eval_steps", 1, "--generation_prompt", "", "--hf_repo", "me/offload",
    )  # fmt: skip
    first = launch(
        "offload/train.py", *flags, "--start_idx", 0, "--end_idx", 40, "--output_dir", tmp_path / "first", env=env
    )
    assert first.returncode == 0, first.stdout + first.stderr
    name = "llama3.2-1B_0-40-epoch-1.pt"
    there = gated.files("me/offload")
    assert there[name] == (tmp_path / "first" / name).read_bytes()
    tag = f"global_step{max(losses(tmp_path / 'first'))}"
    assert f"{tag}/manifest.json" in there
    assert f"{tag}/zero_pp_rank_0_mp_rank_00_optim_states.pt" in there

    second = launch(
        "offload/train.py", *flags, "--start_idx", 40, "--end_idx", 80, "--output_dir", tmp_path / "second",
        "--resume_file", name, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{name}: the first epoch of this run is number 2" in second.stdout
    assert "warning: that file was trained" not in second.stdout
    assert "llama3.2-1B_40-80-epoch-2.pt" in gated.files("me/offload")
    before, after = events(tmp_path / "second", "eval")[0], events(tmp_path / "first", "eval")[-1]
    assert (before["phase"], after["phase"]) == ("before", "after")
    assert before["loss"] == after["loss"]  # held out is the same text for every slice
    assert_no_token(tmp_path / "first", first, second)


def test_run_with_gated_model_fails_before_anything_else(gated, tmp_path):
    gated.users[TOKEN].gated = ()
    flags = ("--model_name", LLAMA, "--dataset_name", ABSTRACTS, "--output_dir", tmp_path / "out", "--hf_repo", "me/x")
    run = launch("offload/train.py", *flags, env=gated.environment(tmp_path / "home"))
    assert run.returncode == 1
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert error == f"error: {LLAMA}: gated; ask for access at {gated.url}/{LLAMA}"
    assert "Traceback" not in run.stderr


def test_pipeline_uploaded_shards_convert_from_the_hub(client, gated, tmp_path, capsys):
    env = gated.environment(tmp_path / "home")
    flags = (*SHORT[:-2], "--model_name", LLAMA, "--dataset_name", ABSTRACTS, "--hf_repo", "me/pipeline")
    run = launch(
        "pipeline/train.py", *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "out", ranks=2, env=env
    )
    assert run.returncode == 0, run.stdout + run.stderr
    there = gated.files("me/pipeline")
    for name in ("layer_00-model_states.pt", "layer_06-model_states.pt", "tokenizer.json", "config.json"):
        assert there[f"global_step2/{name}"] == (tmp_path / "out" / "global_step2" / name).read_bytes()
    for name, output in (("me/pipeline", "hub"), (tmp_path / "out" / "global_step2", "local")):
        assert convert.main(["to-hf", str(name), "--output_dir", str(tmp_path / output), "--verify"]) == 0
        assert "verify: weights identical" in capsys.readouterr().out
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("hub", "local")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert gated.count("GET", "/resolve/.*optim_states") == 0
    assert_no_token(tmp_path / "out", run)
    assert convert.main(["to-hf", "me/none", "--output_dir", str(tmp_path / "none")]) == 1
    said = "error: me/none: not a local directory; on the Hub: me/none cannot be read: 404 Repository not found"
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["offload", "pipeline"])
def test_run_resumed_from_the_hub_restores_the_whole_state(server, tmp_path, technique):
    env = server.environment(tmp_path / "home")
    flags = (*(SHORT if technique == "offload" else SHORT[:-2]), "--max_train_steps", 4, "--save_every", 2)
    flags = (f"{technique}/train.py", *flags, "--hf_repo", "me/x")
    run = launch(*flags, "--output_dir", tmp_path / "whole", ranks=2, env=env)
    assert run.returncode == 0, run.stderr
    there = server.files("me/x")
    server.repos["model", "me/x"].commits.append({path: there[path] for path in there if "global_step4/" not in path})
    run = launch(*flags, "--output_dir", tmp_path / "other", "--resume_from_checkpoint", "hub", ranks=2, env=env)
    assert run.returncode == 0, run.stderr
    assert "whole state at step 2" in run.stdout
    expected = {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 2}
    assert losses(tmp_path / "other") == pytest.approx(expected, rel=1e-6)


def test_runs_root_layout_pipeline_starts_from_its_weights_and_others_refuse(client, published, tmp_path, monkeypatch):
    for name, value in client.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    flags = (*SHORT[:-2], "--max_train_steps", 1, "--no-save_checkpoint", "--model_name", LLAMA)
    resume = ("--resume_from_checkpoint", PUBLISHED)
    runs = {
        "shards": ("pipeline/train.py", *flags, *resume),
        "model": ("pipeline/train.py", *flags),
        "zero": ("zero/train.py", *resume),
        "offload": ("offload/train.py", *resume),
        "nowhere": ("pipeline/train.py", "--resume_from_checkpoint", "me/none"),
    }
    runs = {name: (*argv, "--output_dir", tmp_path / name) for name, argv in runs.items()}
    runs = launch_several(None, runs, ranks=2, fresh=True)
    assert [runs[name].returncodes for name in ("shards", "model")] == [[0, 0]] * 2, runs["shards"].stderrs
    assert "only weights: layer shards without training state" in runs["shards"].stdout
    assert losses(tmp_path / "shards") == losses(tmp_path / "model")
    evals = [[event["loss"] for event in events(tmp_path / name, "eval")] for name in ("shards", "model")]
    assert evals[0] == evals[1] and len(evals[0]) == 2
    # Once for both ranks, and not at all for zero/ and offload/.
    assert requested(client, PUBLISHED) == without_training_state(path.name for path in published.iterdir())
    for name in ("zero", "offload"):
        assert runs[name].returncodes == [1, 1]
        (error,) = errors(runs[name])
        assert f"--resume_from_checkpoint {PUBLISHED}: {PUBLISHED} has layer shards, from which only pipeline/" in error
    assert runs["nowhere"].returncodes == [1, 1]
    (error,) = errors(runs["nowhere"])
    assert "--resume_from_checkpoint me/none: not a local directory; on the Hub: me/none cannot be read: 404 " in error
