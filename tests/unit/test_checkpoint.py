"""Saving checkpoints, finding one to resume from, and restoring what DeepSpeed does not."""

import argparse
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common import checkpoint, distributed, manifest
from common.errors import UserError

LAYOUT = {"stages": 2, "replicas": 1, "zero_stage": 1, "precision": "fp32", "offload": False}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


# --------------------------------------------------------------------------------------------- random numbers


def draw():
    """Numbers from every generator, including the cached second normal variate."""
    return [
        random.random(), random.gauss(0, 1), random.gauss(0, 1), *np.random.rand(2), *np.random.randn(2),
        *torch.rand(3).tolist(),
    ]  # fmt: skip


def test_rng_state_through_a_file_continues_every_generator(tmp_path):
    distributed.set_seed(7)
    random.gauss(0, 1), np.random.randn()  # each leaves a variate for the next call
    torch.save(checkpoint.rng_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    distributed.set_seed(8)
    checkpoint.set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_set_seed_seeds_every_generator():
    distributed.set_seed(2**40 + 1)
    expected = draw()
    distributed.set_seed(2**40 + 1)
    assert draw() == expected
    distributed.set_seed(2**40 + 2)
    assert not set(draw()) & set(expected)


# ------------------------------------------------------------------------------------------------------- save


def save(output_dir, tag, files, hf_config_files=None, needed=1000):
    """What a run does around `engine.save_checkpoint`, which writes {name: content}."""
    with checkpoint.atomic_checkpoint(output_dir, tag, hf_config_files or {}, needed) as hidden:
        for name, content in files.items():
            if isinstance(content, Exception):
                raise content
            (output_dir / hidden / name).write_bytes(content)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_read_hf_config_files_leaves_weights_out(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert checkpoint.read_hf_config_files(tmp_path) == {"config.json": b"{}", "tokenizer.json": b"{}"}


def test_save_writes_manifest_and_replaces_what_is_left_of_earlier_runs(tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "layer_07-model_states.pt").write_text("of another run")
    (tmp_path / ".global_step2.partial").mkdir()
    (tmp_path / ".global_step3.partial").touch()
    (tmp_path / ".global_step3.old").symlink_to(tmp_path)
    (tmp_path / ".latest").touch()
    save(tmp_path, "global_step3", {"a.pt": b"abc"}, {"config.json": b"{}"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step3", "latest"]
    written = contents(tmp_path)
    entries = json.loads(written.pop("global_step3/manifest.json"))["files"]
    assert written == {"latest": b"global_step3", "global_step3/a.pt": b"abc", "global_step3/config.json": b"{}"}
    # printf abc | sha256sum
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert entries["a.pt"] == {"size": 3, "sha256": digest} and set(entries) == {"a.pt", "config.json"}


@pytest.mark.parametrize("fails", ["engine", "writer", "manifest"])
@pytest.mark.parametrize("tag", ["global_step3", "global_step6"])
def test_save_that_fails_keeps_earlier_checkpoints_and_nothing_else(tmp_path, monkeypatch, fails, tag):
    save(tmp_path, "global_step3", {"a.pt": b"abc"})
    before = contents(tmp_path)
    error = RuntimeError("unexpected position") if fails == "engine" else OSError(28, "No space left on device")
    files = {"a.pt": b"ab"} if fails == "manifest" else {"a.pt": b"ab", "b.pt": error}

    def full_disk(files):
        raise error

    if fails == "manifest":
        monkeypatch.setattr(manifest, "dumps", full_disk)
    said = (
        rf"cannot write {tmp_path}/{tag}: .*(No space|unexpected).*; it takes about 1e-06 GB, .* GB were free; earlier"
    )
    with pytest.raises(UserError, match=said):
        save(tmp_path, tag, files)
    assert contents(tmp_path) == before and not list(tmp_path.glob(".*"))


def test_save_without_space_or_directory_fails_before_the_engine_writes(tmp_path):
    must_not_run = {"a.pt": AssertionError("the block ran")}
    too_much = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"has [\d.e+]+ GB free, [\d.e+]+ GB are needed for global_step3; earlier"):
        save(tmp_path, "global_step3", must_not_run, needed=too_much)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/global_step3: .*Not a directory"):
        save(tmp_path / "file", "global_step3", must_not_run)


def test_prune_checkpoints_keeps_the_most_recently_written(tmp_path):
    # 100 and 10 are an earlier run's; what this run wrote last is the newest, whatever its step.
    for age, step in enumerate((5, 9, 100, 10)):
        (tmp_path / f"global_step{step}").mkdir()
        os.utime(tmp_path / f"global_step{step}", (1e9 - age, 1e9 - age))
    (tmp_path / "global_step7_copy").mkdir()
    (tmp_path / "logs").mkdir()
    checkpoint.prune_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    checkpoint.prune_checkpoints(tmp_path, 2, [tmp_path / "global_step10"])
    names = {"global_step5", "global_step9", "global_step10", "global_step7_copy", "logs"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_finish_prints_a_command_quoted_for_the_shell():
    lines = []
    run = SimpleNamespace(
        uploads=SimpleNamespace(finish=lambda *_: None, pending=list),
        args=SimpleNamespace(save_checkpoint=True, output_dir="a b", keep_last=None),
        log=SimpleNamespace(info=lambda *texts: lines.extend(texts)),
        saved=Path("a b/global_step1"),
        is_pipeline=True,
    )
    checkpoint.Checkpointer.finish(run, None, None, None)
    flags = "--output_dir 'a b/hf' --verify --prompt 'We present'"
    assert lines[1] == f"python -m common.convert to-hf 'a b/global_step1' {flags}"


# ------------------------------------------------------------------------------------------------- disk space


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_check_disk_refuses_a_file_with_the_name_of_a_checkpoint(tmp_path, make):
    make(tmp_path / "global_step2")
    args = SimpleNamespace(output_dir=str(tmp_path), save_checkpoint=True, keep_last=None)
    with pytest.raises(UserError, match=r"global_step2 has a checkpoint's name, but is not a directory"):
        checkpoint.check_disk(args, {1}, size=1)


def test_check_disk_counts_what_is_saved_kept_and_overwritten(tmp_path, monkeypatch):
    million = 1_000_000
    size = checkpoint.checkpoint_bytes(million, {"precision": "bf16", "zero_stage": 2})
    assert size == 14 * million

    def needed(keep_last=None, save_every=None, start_step=0, others=0):
        """The least free space, in millions of bytes, with which 10 steps in epochs of 4 may start."""
        args = SimpleNamespace(
            output_dir=str(tmp_path), save_checkpoint=True, keep_last=keep_last, save_every=save_every
        )
        steps, _ = checkpoint.steps_that_save(args, 4, 10, start_step)
        for free in range(100):
            usage = SimpleNamespace(free=free * million)
            monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
            try:
                checkpoint.check_disk(args, steps, size, others * million)
            except UserError:
                continue
            return free

    assert needed() == 3 * 14  # steps 4, 8 and 10
    assert needed(save_every=5) == 4 * 14  # and 5
    assert needed(others=6) == 3 * 14 + 6
    assert needed(keep_last=1) == 2 * 14
    assert needed(start_step=4) == 2 * 14
    (tmp_path / "global_step8").mkdir()
    (tmp_path / "global_step8" / "file").write_bytes(bytes(14 * million - 100))
    (tmp_path / ".global_step8.partial").mkdir()
    assert needed() == 2 * 14 + 1  # step 8 overwrites what is there
    assert needed(keep_last=1) == 14
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"deg", "differs from what was saved"), (b"de", "has 2 bytes, expected 3"), (None, "is missing")],
)
def test_resume_file_that_differs_from_manifest_is_named_with_the_checkpoint_before(tmp_path, content, problem):
    for step in (2, 10, 9):  # in the order of numbers, not of text
        save(tmp_path, f"global_step{step}", {"a.pt": b"abc", "b.pt": b"def"})
    (tmp_path / "latest").write_text("global_step10")
    (tmp_path / "global_step9_copy").mkdir()
    file = tmp_path / "global_step10" / "b.pt"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} {problem}.*resume_from_checkpoint {tmp_path}/global_step9$"):
        checkpoint.find_resume("latest", tmp_path, LAYOUT)
    with pytest.raises(UserError, match="has no earlier complete checkpoint"):
        checkpoint.check_manifest(file.parent.rename(tmp_path / "global_step1"))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"files": {"a": 3}}', '{"files": {}}', "[" * 100_000,
        '{"files": {"a": {"size": 1e400, "sha256": ""}}}', '{"files": {"a\\u0000b": {"size": 1, "sha256": ""}}}',
        '{"files": {"../a": {"size": 1, "sha256": ""}}}',
    ],
)  # fmt: skip
def test_manifest_that_is_not_valid_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        checkpoint.check_manifest(tmp_path)


# --------------------------------------------------------------------------------------- weights-only files


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1B_0-4000-epoch-1.pt"),
        ("/models/Llama-3.1-8B-Instruct/", "llama3.1-8B_0-4000-epoch-1.pt"),
        ("Llama-3.2-1B-Instruct-tuned", "Llama-3.2-1B-Instruct-tuned_0-4000-epoch-1.pt"),
        ("openai-community/gpt2", "gpt2_0-4000-epoch-1.pt"),
    ],
)
def test_weights_file_name_is_read_back(model, name):
    assert checkpoint.weights_file_name(model, 0, 4000, 1) == name
    assert checkpoint.read_weights_file_name(f"/some/where_3-4-epoch-5.pt/{name}") == (0, 4000, 1)


@pytest.mark.parametrize("name", ["model.pt", "model_0-40-epoch-.pt", "model_0-40-epoch-1.pt.bak", "epoch-1.pt"])
def test_weights_file_name_of_another_form_is_none(name):
    assert checkpoint.read_weights_file_name(name) is None


class Log(list):
    info = list.append


@pytest.mark.parametrize(
    ("file", "flag", "start", "epochs", "warns"),
    [
        (None, None, 0, 0, False),
        (None, 7, 0, 7, False),
        ("other.pt", None, 0, 0, False),
        ("other.pt", 7, 0, 7, False),
        ("model_0-40-epoch-2.pt", None, 40, 2, False),
        ("model_0-40-epoch-2.pt", None, 0, 2, True),
        ("model_0-40-epoch-2.pt", 0, 40, 0, False),
        ("model_0-40-epoch-2.pt", 7, 0, 7, True),
    ],
)
def test_initial_epoch_flag_takes_precedence_over_the_file(file, flag, start, epochs, warns):
    log = Log()
    args = argparse.Namespace(resume_file=file, initial_epoch=flag, start_idx=start)
    assert checkpoint.resolve_initial_epoch(args, log) == epochs
    assert any(line.startswith("warning: ") and "--start_idx 0" in line for line in log) == warns
    if file == "model_0-40-epoch-2.pt":
        assert f"number {epochs + 1}" in log[0]


def test_initial_epoch_resumed_run_keeps_its_own():
    resume = checkpoint.Resume(Path("out/global_step4"), {"initial_epoch": 4}, True, "")
    args = argparse.Namespace(resume_file="model_0-40-epoch-2.pt", initial_epoch=None, start_idx=0)
    for args.initial_epoch in (None, 4):
        assert checkpoint.resolve_initial_epoch(args, Log(), resume) == 4
    args.initial_epoch = 0
    with pytest.raises(UserError, match=r"--initial_epoch 0: the run saved in out/global_step4 started from epoch 4"):
        checkpoint.resolve_initial_epoch(args, Log(), resume)


def test_write_weights_file_complete_or_not_at_all_and_only_on_rank_0(tmp_path, monkeypatch):
    path, weight = tmp_path / "a.pt", torch.ones(3)
    checkpoint.write_weights_file(path, {"one": weight, "other": weight})
    state = torch.load(path, weights_only=True)["MODEL_STATE"]
    assert state["one"].data_ptr() == state["other"].data_ptr()
    before = contents(tmp_path)

    def full_disk(content, file):
        file.write_bytes(b"half of it")
        raise RuntimeError("no space\nleft")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(UserError, match=rf"cannot write {path}: no space left; it takes about 1.2e-08 GB"):
            checkpoint.write_weights_file(path, {"one": weight, "other": weight})
    assert contents(tmp_path) == before
    monkeypatch.setenv("RANK", "1")
    checkpoint.write_weights_file(path.with_name("b.pt"), {"one": None})
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------------------------------- resume


def saved_run(directory, tag="global_step3", schedule_step=3, layers=True, **layout):
    """The files of a checkpoint that `find_resume` looks at, by default of pipeline/train.py; without a manifest."""
    layout = LAYOUT | layout
    (directory / tag).mkdir(parents=True)
    if layers:
        (directory / tag / "layer_00-model_states.pt").write_text("")
    run = {
        "global_step": 3, "samples_seen": 30, "learning_rate": 0.1, "layout": layout,
        "data": {"seed": 42, "rows": 9}, "rng": [checkpoint.rng_state()],
    }  # fmt: skip
    state = {"run": run, "lr_scheduler": {"last_epoch": schedule_step}}
    for stage in range(layout["stages"]):
        for replica in range(layout["replicas"]):
            prefix = f"zero_pp_rank_{replica}_" if layout["zero_stage"] == 3 else ""
            torch.save(state, directory / tag / f"{prefix}mp_rank_{stage:02d}_model_states.pt")
            if layout["zero_stage"]:
                torch.save({}, directory / tag / f"zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt")
    (directory / "latest").write_text(tag)
    return directory / tag


def test_find_resume_decides_what_a_layout_can_load(tmp_path):
    saved_run(tmp_path)
    for argument in ("latest", str(tmp_path), str(tmp_path / "global_step3")):
        resume = checkpoint.find_resume(argument, tmp_path, LAYOUT)
        assert (resume.directory, resume.state["global_step"]) == (tmp_path / "global_step3", 3)
        assert (resume.has_optimizer, resume.reshard, resume.same_ranks) == (True, False, True)
        assert resume.summary.startswith("whole state at step 3")
    for name, value in (("stages", 4), ("replicas", 2), ("param_groups", "layer")):
        resume = checkpoint.find_resume("latest", tmp_path, LAYOUT | {name: value})
        assert (resume.has_optimizer, resume.reshard, resume.same_ranks) == (True, True, name == "param_groups")
        saved = LAYOUT.get(name, "all")  # older checkpoints have one group of parameters, and do not say so
        assert f"resharded: saved with {name} {saved}, this run has {value}" in resume.summary
    for name, value in (("stages", 1), ("precision", "bf16"), ("zero_stage", 0)):
        resume = checkpoint.find_resume("latest", tmp_path, LAYOUT | {name: value})
        assert not resume.has_optimizer and not resume.reshard
        assert f"the saved ones are for {name} {LAYOUT[name]}, this run has {value}" in resume.summary
    with pytest.raises(UserError, match=r"a checkpoint of pipeline/train\.py; .* to-hf"):
        checkpoint.find_resume("latest", tmp_path, LAYOUT, layers=False)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_find_resume_zero_resumes_on_other_ranks_and_refuses_other_settings(tmp_path, stage, ranks):
    """Under stage 3 each rank has its own model states, under stage 0 there are no optimizer shards."""
    layout = {"stages": 1, "replicas": ranks, "zero_stage": stage, "precision": "bf16", "offload": False}
    directory = saved_run(tmp_path, layers=False, **layout)
    assert checkpoint.find_resume("latest", tmp_path, layout, layers=False).has_optimizer
    resume = checkpoint.find_resume("latest", tmp_path, layout | {"replicas": 4}, layers=False)
    assert resume.has_optimizer and resume.reshard == (stage > 0)  # without ZeRO nothing is sharded
    for name, value in (("zero_stage", (stage + 1) % 4), ("precision", "fp16"), ("offload", True)):
        with pytest.raises(UserError, match=rf"are for {name} {layout[name]}, this run has {value}; .* to-hf"):
            checkpoint.find_resume("latest", tmp_path, layout | {name: value})
    max(directory.iterdir()).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in|has \d model_states and \d optim_states"):
        checkpoint.find_resume("latest", tmp_path, layout)


def test_find_resume_killed_while_replacing_recovers_the_old_checkpoint(tmp_path):
    directory = saved_run(tmp_path)
    directory.rename(tmp_path / ".global_step3.old")
    (tmp_path / ".global_step3.partial").mkdir()
    assert checkpoint.find_resume("latest", tmp_path, LAYOUT).directory == directory


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_01_optim_states.pt"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_find_resume_damaged_file_without_manifest_is_one_line(tmp_path, name, how):
    file = saved_run(tmp_path) / name
    content = file.read_bytes()
    file.unlink()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"truncated|has \d model_states and \d optim_states") as caught:
        checkpoint.find_resume("latest", tmp_path, LAYOUT)
    assert "\n" not in str(caught.value)


def test_find_resume_layout_from_before_offload_still_loads(tmp_path):
    directory = saved_run(tmp_path)
    for file in directory.glob("mp_rank_*"):
        state = torch.load(file, weights_only=True)
        del state["run"]["layout"]["offload"], state["lr_scheduler"]
        torch.save(state, file)
    resume = checkpoint.find_resume("latest", tmp_path, LAYOUT)
    assert resume.has_optimizer and resume.schedule_step == 3


@pytest.mark.parametrize(
    ("latest", "said"),
    [
        (b"global_step\0", "null byte"),
        (b"a" * 5000, "File name too long"),
        (b"../global_step3", "does not name a directory next to it"),
        (b"", "does not name a directory next to it"),
        (b"file", "is a file, expected a checkpoint directory"),
        (b"global_step4", r"no checkpoint in .*global_step4.*; the one before it: .*/global_step3$"),
    ],
)
def test_find_resume_latest_that_names_no_checkpoint_is_one_line(tmp_path, latest, said):
    save(tmp_path, "global_step3", {"a.pt": b"abc"})
    (tmp_path / "latest").write_bytes(latest)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=said) as failed:
        checkpoint.find_resume("latest", tmp_path, LAYOUT)
    assert len(str(failed.value)) < 500 and str(failed.value).startswith("--resume_from_checkpoint ")


def test_find_resume_without_training_state(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in ~nobody here/x"):
        checkpoint.find_resume("~nobody here/x", tmp_path, LAYOUT)
    with pytest.raises(UserError, match=f"latest: no checkpoint in {tmp_path}"):
        checkpoint.find_resume("latest", tmp_path, LAYOUT)
    (tmp_path / "layer_00-model_states.pt").write_text("")
    resume = checkpoint.find_resume(str(tmp_path), "elsewhere", LAYOUT)
    assert resume.state is None and not resume.has_optimizer and "only weights" in resume.summary
    torch.save({"module": None}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="not from a checkpoint of this project") as caught:
        checkpoint.find_resume(str(tmp_path), "elsewhere", LAYOUT)
    assert "\n" not in str(caught.value)


def schedule(total=1):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: total / (1 + step))


def test_restore_same_ranks_continues_random_numbers(tmp_path):
    saved_run(tmp_path)
    expected = draw()
    resume = checkpoint.find_resume("latest", tmp_path, LAYOUT)
    with pytest.raises(UserError, match=r"its run had rows 9, this one has 10; .* to-hf"):
        checkpoint.restore(resume, {"seed": 42, "rows": 10}, None)
    checkpoint.restore(resume, {"seed": 42, "rows": 9}, schedule()[1])
    assert draw() == expected


def test_restore_other_ranks_keeps_the_seed_of_each_rank(tmp_path):
    saved_run(tmp_path)
    resume = checkpoint.find_resume("latest", tmp_path, LAYOUT | {"replicas": 2})
    distributed.set_seed(43)
    checkpoint.restore(resume, {"seed": 42, "rows": 9}, schedule()[1])
    drawn = draw()
    distributed.set_seed(43)
    assert draw() == drawn


@pytest.mark.parametrize("changed", [{}, {"replicas": 2}, {"precision": "bf16"}])
def test_restore_continues_a_longer_schedule_without_the_skipped_steps(tmp_path, changed):
    """Two of three steps count, since fp16 skipped one; the rate is the longer schedule's, not the saved one."""
    saved_run(tmp_path, schedule_step=2)
    optimizer, short = schedule()
    for _ in range(2):
        optimizer.step()
        short.step()
    optimizer, longer = schedule(10)
    if not changed:  # DeepSpeed loads it
        longer.load_state_dict(short.state_dict())
    resume = checkpoint.find_resume("latest", tmp_path, LAYOUT | changed)
    checkpoint.restore(resume, {"seed": 42, "rows": 9}, longer)
    assert longer.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [10 / 3]
    assert longer.state_dict() == short.state_dict() | {"_last_lr": [10 / 3]}
    optimizer.step()
    longer.step()
    assert longer.get_last_lr() == [10 / 4]
