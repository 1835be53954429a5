"""What surrounds the training loop: ranks, random numbers, the log, Weights & Biases, the flags."""

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
from transformers import LlamaConfig

from common import checkpoint, cli, distributed
from common.errors import UserError


@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------- random numbers


def draw():
    """Numbers from every generator, the cached second normal variate included."""
    return [
        random.random(), random.gauss(0, 1), random.gauss(0, 1), *np.random.rand(2), *np.random.randn(2),
        *torch.rand(3).tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("through_file", [False, True])
def test_random_numbers_go_on_where_they_were(tmp_path, through_file):
    distributed.set_seed(7)
    random.gauss(0, 1), np.random.randn()  # each leaves a variate for the next call
    (state,) = checkpoint.rng_states()
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = draw()
    assert draw() != expected
    distributed.set_seed(8)
    checkpoint.set_rng_state(state)
    assert draw() == expected


def test_seed_sets_every_generator():
    distributed.set_seed(2**40 + 1)
    expected = draw()
    distributed.set_seed(2**40 + 1)
    assert draw() == expected
    distributed.set_seed(2**40 + 2)
    assert not set(draw()) & set(expected)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    # 100 and 10 are an earlier run's; what this run wrote last is the newest, whatever its step.
    for age, step in enumerate((5, 9, 100, 10)):
        (tmp_path / f"global_step{step}").mkdir()
        os.utime(tmp_path / f"global_step{step}", (1e9 - age, 1e9 - age))
    (tmp_path / "global_step7_copy").mkdir()
    (tmp_path / "logs").mkdir()
    checkpoint.prune_checkpoints(tmp_path, None)
    assert len(list(tmp_path.glob("global_step*"))) == 5
    checkpoint.prune_checkpoints(tmp_path, 2)
    assert {path.name for path in tmp_path.glob("global_step*")} == {
        "global_step5",
        "global_step9",
        "global_step7_copy",
    }
    assert (tmp_path / "logs").exists()


def save(output_dir, tag, files, side_files=None):
    """What a run does around `engine.save_checkpoint`, which writes {name: content}."""
    with checkpoint.atomic_checkpoint(output_dir, tag, side_files or {}, needed=1000) as hidden:
        assert not (output_dir / tag / "half").exists()
        for name, content in files.items():
            (output_dir / hidden / name).write_bytes(content)


def test_side_files_are_config_and_tokenizer(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert checkpoint.read_hf_config_files(tmp_path) == {"config.json": b"{}", "tokenizer.json": b"{}"}


def test_a_saved_checkpoint_has_a_manifest_and_nothing_of_an_earlier_one(tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "layer_07-model_states.pt").write_text("of another run")
    (tmp_path / ".global_step2.partial").mkdir()
    (tmp_path / ".global_step3.partial").touch()
    (tmp_path / ".global_step3.old").symlink_to(tmp_path)
    save(tmp_path, "global_step3", {"a.pt": b"abc"}, {"config.json": b"{}"})
    assert not list(tmp_path.glob(".*")) and [path.name for path in tmp_path.glob("global*")] == ["global_step3"]
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert sorted(path.name for path in (tmp_path / "global_step3").iterdir()) == [
        "a.pt", "config.json", "manifest.json",
    ]  # fmt: skip
    said = json.loads((tmp_path / "global_step3" / "manifest.json").read_text())["files"]
    # printf abc | sha256sum
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert said["a.pt"] == {"size": 3, "sha256": digest} and set(said) == {"a.pt", "config.json"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] unexpected pos")]
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, error):
    save(tmp_path, "global_step3", {"a.pt": b"abc"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for tag in ("global_step3", "global_step6"):
        refused = pytest.raises(UserError, match=rf"cannot write the checkpoint .*{tag}: .*takes about .* were free")
        with refused, checkpoint.atomic_checkpoint(tmp_path, tag, {}, needed=1000) as hidden:
            (tmp_path / hidden / "a.pt").write_bytes(b"ab")
            raise error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not list(tmp_path.glob(".*"))


def test_a_manifest_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, "global_step3", {"a.pt": b"abc"})

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*global_step6: .*No space left"):
        save(tmp_path, "global_step6", {"a.pt": b"abc"})
    assert [path.name for path in tmp_path.glob("*global_step*")] == ["global_step3"]
    assert (tmp_path / "latest").read_text() == "global_step3"


def test_a_checkpoint_that_is_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    save(tmp_path, "global_step3", {"a.pt": b"abc"})
    moved = (tmp_path / "global_step3").rename(tmp_path / "elsewhere")
    (tmp_path / "global_step3").symlink_to(moved)
    save(tmp_path, "global_step3", {"a.pt": b"xyz"})
    assert (moved / "a.pt").read_bytes() == b"abc" and (tmp_path / "global_step3" / "a.pt").read_bytes() == b"xyz"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("latest", Path.mkdir, "its `latest` is a directory"),
        ("global_step2", Path.touch, "global_step2 is no directory"),
        ("global_step2", lambda path: path.symlink_to("nowhere"), "global_step2 is no directory"),
    ],
)
def test_what_would_be_in_the_way_of_a_checkpoint_is_said_before_training(tmp_path, name, make, said):
    make(tmp_path / name)
    args = SimpleNamespace(output_dir=str(tmp_path), save_checkpoint=True, save_every=None, keep_last=None)
    with pytest.raises(UserError, match=said):
        checkpoint.check_disk(args, 1, NOW, 1, 1)


def test_the_command_to_convert_is_for_a_shell():
    command = checkpoint.convert_command(Path("a b/global_step1"), "a b", "--prompt", "We present")
    assert command == ("python -m common.convert to-hf 'a b/global_step1' --output_dir 'a b/hf' --prompt 'We present'")


@pytest.mark.parametrize("text", ["-1", "1e-320", "nan", "inf"])
def test_a_temperature_that_is_none(text):
    assert (cli.temperature("0"), cli.temperature("0.7")) == (0, 0.7)
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        cli.temperature(text)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    refused = pytest.raises(
        UserError, match=r"has [\d.e+]+ GB free, [\d.e+]+ GB are needed for global_step3; checkpoints saved before"
    )
    with refused, checkpoint.atomic_checkpoint(tmp_path, "global_step3", {}, needed=2 * free):
        raise AssertionError("the block must not run")
    assert not list(tmp_path.glob("*global_step*"))


def test_an_output_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save(tmp_path / "file", "global_step3", {})


@pytest.mark.parametrize("how", ["changed", "truncated", "gone"])
def test_a_file_that_is_not_what_was_saved_is_named_with_the_checkpoint_before(tmp_path, how):
    for step in (2, 10, 9):  # by number, not as text
        save(tmp_path, f"global_step{step}", {"a.pt": b"abc", "b.pt": b"def"})
    (tmp_path / "latest").write_text("global_step10")
    (tmp_path / "global_step9_copy").mkdir()
    file = tmp_path / "global_step10" / "b.pt"
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"deg" if how == "changed" else b"de")
    words = {"changed": "differs from what was saved", "truncated": "has 2 bytes, expected 3", "gone": "is missing"}
    with pytest.raises(UserError, match=rf"{file} {words[how]}.*resume_from_checkpoint {tmp_path}/global_step9$"):
        checkpoint.find_resume("latest", tmp_path, NOW)
    with pytest.raises(UserError, match="no complete checkpoint from before it"):
        checkpoint.check_manifest(file.parent.rename(tmp_path / "global_step1"))


NO_MANIFESTS = (
    "", "{", "[]", '{"files": {"a": 3}}', '{"files": {}}',
    '{"files": {"a": {"size": 1e400, "sha256": ""}}}', "[" * 100_000,
    '{"files": {"a\\u0000b": {"size": 1, "sha256": ""}}}',
)  # fmt: skip


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        checkpoint.check_manifest(tmp_path)


def test_instead_of_a_checkpoint_with_no_manifest_the_one_before_is_offered(tmp_path):
    for step in (1, 2):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "manifest.json").write_text("{")
    said = rf"is not a manifest: .*; the one before it: --resume_from_checkpoint {tmp_path}/global_step1$"
    with pytest.raises(UserError, match=said):
        checkpoint.check_manifest(tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step3")
    said = rf"no checkpoint in .*global_step3; the one before it: --resume_from_checkpoint {tmp_path}/global_step2$"
    with pytest.raises(UserError, match=said):
        checkpoint.find_resume("latest", tmp_path, NOW)


NOW = {"stages": 2, "replicas": 1, "zero_stage": 1, "precision": "fp32", "offload": False}


def saved_run(directory, tag="global_step3", **layout):
    """A checkpoint of pipeline/train.py, as far as `find_resume` looks at it."""
    layout = NOW | layout
    (directory / tag).mkdir(parents=True)
    (directory / tag / "layer_00-model_states.pt").write_text("")
    run = {
        "global_step": 3, "samples_seen": 30, "learning_rate": 0.1, "layout": layout,
        "data": {"seed": 42, "rows": 9}, "rng": [checkpoint.rng_state()],
    }  # fmt: skip
    for stage in range(layout["stages"]):
        torch.save({"run": run}, directory / tag / f"mp_rank_{stage:02d}_model_states.pt")
        for replica in range(layout["replicas"]):
            torch.save({}, directory / tag / f"zero_pp_rank_{replica}_mp_rank_{stage:02d}_optim_states.pt")
    (directory / "latest").write_text(tag)
    return directory / tag


def test_resume_finds_the_newest_and_says_what_goes_over(tmp_path):
    saved_run(tmp_path)
    for argument in ("latest", str(tmp_path), str(tmp_path / "global_step3")):
        resume = checkpoint.find_resume(argument, tmp_path, NOW)
        assert resume.directory == tmp_path / "global_step3"
        assert resume.has_optimizer and resume.state["global_step"] == 3
        assert "whole state at step 3" in resume.summary
    for name, value in (("stages", 4), ("replicas", 2)):
        resume = checkpoint.find_resume("latest", tmp_path, NOW | {name: value})
        assert resume.has_optimizer and resume.reshard
        assert f"resharded: saved with {name} {NOW[name]}, this run has {value}" in resume.summary
    for name, value in (("stages", 1), ("precision", "bf16"), ("zero_stage", 0)):
        resume = checkpoint.find_resume("latest", tmp_path, NOW | {name: value})
        assert not resume.has_optimizer
        assert f"cut for {name} {NOW[name]}, this run has {value}" in resume.summary


@pytest.mark.parametrize("damage", ["first state", "second state", "optimizer shard"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_resume_names_a_damaged_file(tmp_path, damage, how):
    names = {
        "first state": "mp_rank_00_model_states.pt",
        "second state": "mp_rank_01_model_states.pt",
        "optimizer shard": "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    }
    file = saved_run(tmp_path) / names[damage]
    content = file.read_bytes()
    file.unlink()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"truncated|is missing|has \d model_states and \d optim_states") as caught:
        checkpoint.find_resume("latest", tmp_path, NOW)
    assert "\n" not in str(caught.value)


def test_a_pipelines_checkpoint_is_for_the_pipeline(tmp_path):
    for now in (NOW, NOW | {"stages": 1}):
        saved_run(tmp_path / str(now["stages"]), stages=now["stages"])
        with pytest.raises(UserError, match=r"a checkpoint of pipeline/train\.py"):
            checkpoint.find_resume("latest", tmp_path / str(now["stages"]), now, layers=False)


def test_resume_of_a_checkpoint_from_before_offload(tmp_path):
    directory = saved_run(tmp_path)
    for file in directory.glob("mp_rank_*"):
        state = torch.load(file, weights_only=True)
        del state["run"]["layout"]["offload"]
        torch.save(state, file)
    assert checkpoint.find_resume("latest", tmp_path, NOW).has_optimizer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_finds_what_zero_saved(tmp_path, stage, ranks):
    """Under stage 3 each rank has its own model states, under stage 0 there are no optimizer shards."""
    now = {"stages": 1, "replicas": ranks, "zero_stage": stage, "precision": "bf16", "offload": False}
    directory = tmp_path / "global_step3"
    directory.mkdir()
    for rank in range(ranks if stage == 3 else 1):
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save({"run": {"global_step": 3, "layout": now}}, directory / f"{prefix}mp_rank_00_model_states.pt")
    for rank in range(ranks if stage else 0):
        torch.save({}, directory / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step3")
    resume = checkpoint.find_resume("latest", tmp_path, now)
    assert resume.has_optimizer and resume.directory == directory
    resume = checkpoint.find_resume("latest", tmp_path, now | {"replicas": 4}, layers=False)
    assert resume.has_optimizer and resume.reshard == (stage > 0)  # without ZeRO there is nothing to cut
    for name, value in (("zero_stage", (stage + 1) % 4), ("precision", "fp16"), ("offload", True)):
        with pytest.raises(UserError, match=rf"cut for {name} {now[name]}, this run has {value}; .* to-hf"):
            checkpoint.find_resume("latest", tmp_path, now | {name: value})
    files = sorted(path for path in directory.iterdir())
    files[-1].unlink()
    with pytest.raises(UserError, match=r"no checkpoint in|has \d model_states and \d optim_states|is missing"):
        checkpoint.find_resume("latest", tmp_path, now)


# -------------------------------------------------------------------------------------------- files of weights


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1B_0-4000-epoch-1.pt"),
        ("meta-llama/Llama-3.2-1B", "llama3.2-1B_0-4000-epoch-1.pt"),
        ("/models/Llama-3.1-8B-Instruct/", "llama3.1-8B_0-4000-epoch-1.pt"),
        ("Llama-3.2-1B-Instruct-tuned", "Llama-3.2-1B-Instruct-tuned_0-4000-epoch-1.pt"),
        ("openai-community/gpt2", "gpt2_0-4000-epoch-1.pt"),
        ("llama", "llama_0-4000-epoch-1.pt"),
    ],
)
def test_weights_file_names(model, name):
    assert checkpoint.weights_file_name(model, 0, 4000, 1) == name
    assert checkpoint.read_weights_file_name(f"/some/where_3-4-epoch-5.pt/{name}") == (0, 4000, 1)


@pytest.mark.parametrize("name", ["model.pt", "model_0-4000-epoch-.pt", "model_0-4000-epoch-1.pt.bak", "epoch-1.pt"])
def test_names_of_another_form(name):
    assert checkpoint.read_weights_file_name(name) is None


class Said(list):
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
    said = Said()
    args = argparse.Namespace(resume_file=file, initial_epoch=flag, start_idx=start)
    assert checkpoint.resolve_initial_epoch(args, said) == epochs
    assert any(line.startswith("warning: ") and "--start_idx 0" in line for line in said) == warns
    if file == "model_0-40-epoch-2.pt":
        assert f"number {epochs + 1}" in said[0]


@pytest.mark.parametrize(("flag", "name"), [(0, "llama3.2-1B_4000-8000-epoch-1.pt"), (None, "…-epoch-2.pt")])
def test_initial_epoch_next_slice_names_its_first_file(flag, name):
    file = "llama3.2-1B_0-4000-epoch-1.pt"
    args = argparse.Namespace(resume_file=file, initial_epoch=flag, start_idx=4000)
    epochs = checkpoint.resolve_initial_epoch(args, Said())
    written = checkpoint.weights_file_name("meta-llama/Llama-3.2-1B-Instruct", 4000, 8000, epochs + 1)
    assert written == name.replace("…", "llama3.2-1B_4000-8000")


def test_initial_epoch_resumed_run_keeps_its_own():
    resume = checkpoint.Resume(Path("out/global_step4"), {"initial_epoch": 4}, True, "")
    args = argparse.Namespace(resume_file="model_0-40-epoch-2.pt", initial_epoch=None, start_idx=0)
    for args.initial_epoch in (None, 4):
        assert checkpoint.resolve_initial_epoch(args, Said(), resume) == 4
    args.initial_epoch = 0
    with pytest.raises(UserError, match=r"--initial_epoch 0: the run saved in out/global_step4 started from epoch 4"):
        checkpoint.resolve_initial_epoch(args, Said(), resume)


def test_weights_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path, weight = tmp_path / "out" / "a.pt", torch.ones(3)
    path.parent.mkdir()
    checkpoint.write_weights_file(path, {"one": weight, "other": weight})
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]
    state = torch.load(path, weights_only=True)["MODEL_STATE"]
    assert state["one"].data_ptr() == state["other"].data_ptr()

    def full_disk(content, file):
        file.write_bytes(b"half of it")
        raise RuntimeError("no space\nleft")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(UserError, match=rf"cannot write {path}: no space left"):
            checkpoint.write_weights_file(path, {})
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]
    assert torch.equal(torch.load(path, weights_only=True)["MODEL_STATE"]["one"], weight)
    monkeypatch.setenv("RANK", "1")
    checkpoint.write_weights_file(path.with_name("b.pt"), None)
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("latest", "said"),
    [
        (b"global_step\0", "null byte"),
        (b"a" * 5000, "File name too long"),
        (b"../global_step3", "no directory beside"),
        (b"", "no directory beside"),
        (b"file", "is a file, a checkpoint is a directory"),
        (b"checkpoint-5", "a checkpoint of baseline/train.py; to go on with its weights, name it with --model_name"),
    ],
)
def test_a_latest_that_is_none(tmp_path, latest, said):
    (tmp_path / "latest").write_bytes(latest)
    (tmp_path / "file").touch()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
    with pytest.raises(UserError, match=said) as failed:
        checkpoint.find_resume("latest", tmp_path, NOW)
    assert len(str(failed.value)) < 500 and str(failed.value).startswith("--resume_from_checkpoint ")


@pytest.mark.parametrize(
    ("argument", "said"), [("~nobody here/x", "no checkpoint in ~nobody here/x"), ("x" * 300, "File name too long")]
)
def test_a_checkpoint_whose_name_is_no_path(tmp_path, argument, said):
    with pytest.raises(UserError, match=said):
        checkpoint.find_resume(argument, tmp_path, NOW)


def test_resume_from_bare_shards_and_from_nothing(tmp_path):
    with pytest.raises(UserError, match=f"latest: no checkpoint in {tmp_path}"):
        checkpoint.find_resume("latest", tmp_path, NOW)
    (tmp_path / "layer_00-model_states.pt").write_text("")
    resume = checkpoint.find_resume(str(tmp_path), "elsewhere", NOW)
    assert resume.state is None and not resume.has_optimizer and "weights alone" in resume.summary
    torch.save({"module": None}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project") as caught:
        checkpoint.find_resume(str(tmp_path), "elsewhere", NOW)
    assert "\n" not in str(caught.value)


def test_restore_wants_the_same_data(tmp_path):
    saved_run(tmp_path)
    expected = draw()
    resume = checkpoint.find_resume("latest", tmp_path, NOW)
    with pytest.raises(UserError, match=r"its run had rows 9, this one has 10"):
        checkpoint.restore(resume, {"seed": 42, "rows": 10}, None)
    assert checkpoint.restore(resume, {"seed": 42, "rows": 9}, schedule()[1]) == (3, 30)
    assert draw() == expected


def test_restore_on_other_ranks_keeps_the_seed_of_this_rank(tmp_path):
    saved_run(tmp_path)
    resume = checkpoint.find_resume("latest", tmp_path, NOW | {"replicas": 2})
    assert resume.reshard and not resume.same_ranks
    distributed.set_seed(43)
    checkpoint.restore(resume, {"seed": 42, "rows": 9}, schedule()[1])
    drawn = draw()
    distributed.set_seed(43)
    assert draw() == drawn


def test_resume_older_checkpoint_of_one_parameter_group_is_resharded(tmp_path):
    saved_run(tmp_path)
    resume = checkpoint.find_resume("latest", tmp_path, NOW | {"param_groups": "layer"})
    assert resume.has_optimizer and resume.reshard and resume.same_ranks
    assert "resharded: saved with param_groups all, this run has layer" in resume.summary


@pytest.mark.parametrize("full", [True, False])
def test_restore_leaves_skipped_steps_out_of_the_schedule(tmp_path, full):
    run = {"global_step": 5, "samples_seen": 30, "data": {}, "rng": [checkpoint.rng_state()]}
    resume = checkpoint.Resume(tmp_path, run, full, "", reshard=full, schedule_step=3)
    resumed = schedule()[1]
    checkpoint.restore(resume, {}, resumed)
    assert resumed.get_last_lr() == [1 / (1 + 3)]


def test_resume_reads_the_step_of_the_schedule(tmp_path):
    path = saved_run(tmp_path) / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=True) | {"lr_scheduler": {"last_epoch": 2}}, path)
    for now in (NOW | {"replicas": 2}, NOW | {"precision": "bf16"}):
        assert checkpoint.find_resume("latest", tmp_path, now).schedule_step == 2


def schedule(total=1):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: total / (1 + step))


def test_a_run_that_becomes_longer_goes_on_at_the_rate_of_its_own_schedule(tmp_path):
    saved_run(tmp_path)
    resume = checkpoint.find_resume("latest", tmp_path, NOW)
    optimizer, short = schedule()
    for _ in range(2):  # of three: one was skipped for its overflow
        optimizer.step()
        short.step()
    optimizer, longer = schedule(10)
    longer.load_state_dict(short.state_dict())
    checkpoint.restore(resume, {"seed": 42, "rows": 9}, longer)
    assert longer.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [10 / 3]
    assert longer.state_dict() == short.state_dict() | {"_last_lr": [10 / 3]}


@pytest.mark.parametrize("step", [3, 12])
def test_restore_sets_the_schedule_where_the_state_does_not_go_over(tmp_path, step):
    optimizer, straight = schedule()
    for _ in range(step):
        optimizer.step()
        straight.step()
    run = {"global_step": step, "samples_seen": 30, "data": {}}
    optimizer, resumed = schedule()
    assert checkpoint.restore(checkpoint.Resume(tmp_path, run, False, ""), {}, resumed) == (step, 30)
    assert resumed.get_last_lr() == straight.get_last_lr() == [1 / (1 + step)]
    for scheduler in (straight, resumed):
        scheduler.optimizer.step()
        scheduler.step()
    assert resumed.get_last_lr() == straight.get_last_lr() == [1 / (2 + step)]


# ------------------------------------------------------------------------------------------------------- log


def start(log, total_steps, steps_per_epoch=10):
    info = SimpleNamespace(name="model", config=LlamaConfig(), parameters=12, non_embedding_parameters=100)
    text = SimpleNamespace(name="text", train=SimpleNamespace(steps_per_epoch=steps_per_epoch))
    log.start(info, {"bf16": {}}, text, torch.float32, 0, total_steps)
