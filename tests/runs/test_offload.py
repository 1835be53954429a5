"""Whole runs of offload/train.py on CPU: banner, files of weights, the plan's switches, resuming, refusals."""

import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import sample
from helpers.launch import ROOT, begun, errors, events, launch, launch_several, shorten

STEP = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "samples_seen")


def config_of(stage):
    return ROOT / "offload" / f"ds_zero{stage}_offload.json"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Flags of a short run: one slice of a small text, two micro-batches of a row a step."""
    directory = tmp_path_factory.mktemp("text")
    lines = sample.sample_dataset_file("abstracts").read_text().splitlines()
    (directory / "train.jsonl").write_text("\n".join(lines[:30]) + "\n")
    (directory / "validation.jsonl").write_text("\n".join(lines[30:34]) + "\n")
    return (
        "--dataset_name", directory, "--max_length", 64, "--batch_size", 1, "--accum_steps", 2, "--num_epochs", 2,
        "--end_idx", 10, "--max_new_tokens", 10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, short):
    """(directory, {name: finished run}) on two ranks: two epochs under each stage, then three steps a switch."""
    directory = tmp_path_factory.mktemp("runs")
    brief = "--max_train_steps", 3, "--max_eval_steps", 1, "--no-save_checkpoint", "--generation_prompt", ""
    both = "--activation_checkpointing", "--fused_loss"
    flags = {
        **{f"stage{stage}": ("--save_every", 4, "--deepspeed_config", config_of(stage)) for stage in (1, 2, 3)},
        "recompute": (*brief, "--activation_checkpointing"),
        "fused": (*brief, "--fused_loss"),
        "apart": (*brief, "--no-coalesce"),
        "together": (*brief, *both, "--coalesce"),
        "stage1 apart": (*brief, "--no-coalesce", "--deepspeed_config", config_of(1)),
        "stage3 both": (*brief, *both, "--deepspeed_config", config_of(3)),
    }
    flags = {name: (*short, *own, "--output_dir", directory / name) for name, own in flags.items()}
    finished = launch_several("offload/train.py", flags, ranks=2)
    for run in finished.values():
        assert run.returncodes == [0, 0], run.stdout + "".join(run.stderrs)
    return directory, finished


def numbers(directory, names=STEP):
    return [[event[name] for name in names] for event in events(directory, "step")]


def last_checkpoint(directory):
    return directory / (directory / "latest").read_text()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_log_and_metrics(runs, stage):
    directory, stdout = runs[0] / f"stage{stage}", runs[1][f"stage{stage}"].stdout
    banner = [
        f"  ZeRO Stage: {stage}", f"  Parameter offloading: {stage == 3}", "  Optimizer offloading: True",
        "  Global rank: 0", "  World size: 2", "  Device: cpu",
    ]  # fmt: skip
    assert "\n".join(banner) in stdout
    steps, evaluations = events(directory, "step"), events(directory, "eval")
    assert len(steps) > 8 and steps[-1]["loss"] < steps[0]["loss"]
    assert sum(line.startswith("step ") for line in stdout.splitlines()) == len(steps)
    assert [event["phase"] for event in evaluations] == ["before", "epoch", "after"]
    assert evaluations[0]["loss"] > evaluations[1]["loss"] > evaluations[2]["loss"]
    assert [line.split()[1] for line in stdout.splitlines() if line.startswith("* ")] == [str(stage)]
    # 18 bytes a parameter, half of them on each rank.
    (run,) = events(directory, "run")
    assert f"{18 * run['parameters'] / 2 / 2**20:14.2f}\n" in stdout
    assert stdout.rindex(f"measured under stage {stage}") < stdout.rindex("We present")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("epoch", [1, 2])
def test_file_of_weights_is_a_plain_state_dict(runs, stage, epoch):
    path = runs[0] / f"stage{stage}" / f"llama_0-10-epoch-{epoch}.pt"
    content = torch.load(path, weights_only=True)
    assert set(content) == {"MODEL_STATE"}
    state = content["MODEL_STATE"]
    model = AutoModelForCausalLM.from_pretrained(sample.sample_model_directory("llama"))
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state, strict=True)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    # Each tensor once and nothing more: no file of slices that drag whole buffers along.
    assert path.stat().st_size < 1.1 * 4 * sum(parameter.numel() for parameter in model.parameters())
    if epoch == 2 and stage < 3:
        saved = torch.load(last_checkpoint(path.parent) / "mp_rank_00_model_states.pt", weights_only=True)["module"]
        assert all(torch.equal(state[name], saved[name]) for name in state)


def test_stages_agree(runs):
    first, second, third = (
        [event["loss"] for event in events(runs[0] / f"stage{stage}", "step")] for stage in (1, 2, 3)
    )
    assert first == pytest.approx(second, rel=1e-4)
    assert third == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "stage", "says"),
    [
        ("recompute", 2, "activation checkpointing: on (as the flag says)"),
        ("fused", 2, "fused loss: on (as the flag says)"),
        ("apart", 2, "gradients to the host: 2 times per step"),
        ("together", 2, "added up on the device over 2 micro-batches"),
        ("stage1 apart", 1, "gradients to the host: 2 times per step"),
        ("stage3 both", 3, "fused loss: on"),
    ],
)
def test_switches_change_no_loss(runs, name, stage, says):
    assert says in runs[1][name].stdout
    names = ("loss", "grad_norm")
    for switched, plain in zip(numbers(runs[0] / name, names), numbers(runs[0] / f"stage{stage}", names), strict=False):
        assert switched == pytest.approx(plain, rel=1e-6 if stage < 3 else 1e-5)
    assert not list((runs[0] / name).glob("*.pt"))


@pytest.mark.slow
def test_the_default_command_trains(tmp_path):
    finished = launch("offload/train.py", "--output_dir", tmp_path, ranks=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    before, *_, after = events(tmp_path, "eval")
    assert after["phase"] == "after" and after["perplexity"] < 0.1 * before["perplexity"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [f"llama_0-1000-epoch-{n}.pt" for n in (1, 2, 3)]
    assert "\nWe present" in finished.stdout


# ----------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def again(runs, short, tmp_path_factory):
    """(directory, {name: finished run}) in new processes, from the checkpoints and files of `runs`."""
    directory = tmp_path_factory.mktemp("again")
    flags = {
        **{
            f"stage{stage}": (
                "--deepspeed_config", config_of(stage), "--resume_from_checkpoint", "latest", "--output_dir",
                begun(runs[0] / f"stage{stage}", "global_step4", directory / f"stage{stage}"),
                # Where the command that goes on begins with one, as the first did, its checkpoint counts.
                *(("--resume_file", "gone.pt") if stage == 2 else ()),
            )
            for stage in (2, 3)
        },
        "file": ("--resume_file", runs[0] / "stage3" / "llama_0-10-epoch-2.pt", "--start_idx", 10, "--end_idx", 20),
        "file3": (
            "--resume_file", runs[0] / "stage1" / "llama_0-10-epoch-2.pt", "--deepspeed_config", config_of(3),
        ),
        "epoch": ("--initial_epoch", 4, "--save_every", 2),
        "other stage": (
            "--resume_from_checkpoint", runs[0] / "stage2", "--deepspeed_config", config_of(3),
        ),
    }  # fmt: skip
    brief = "--num_epochs", 1, "--max_train_steps", 2, "--generation_prompt", ""
    flags = {
        name: (*short, *(() if name.startswith("stage") else brief), "--output_dir", directory / name, *own)
        for name, own in flags.items()
    }
    finished = launch_several("offload/train.py", flags, ranks=2)
    for name, run in finished.items():
        assert run.returncodes == [int(name == "other stage")] * 2, run.stdout + "".join(run.stderrs)
    return directory, finished


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_equals_an_uninterrupted_run(runs, again, stage):
    straight, directory = runs[0] / f"stage{stage}", again[0] / f"stage{stage}"
    assert 4 % events(straight, "summary")[0]["steps_per_epoch"], "step 4 has to be in the middle of an epoch"
    steps = numbers(straight)[4:]
    assert len(numbers(directory)) == len(steps)
    for ours, theirs in zip(numbers(directory), steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    ours, theirs = (
        torch.load(path / "llama_0-10-epoch-2.pt", weights_only=True)["MODEL_STATE"] for path in (straight, directory)
    )
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6) for name in ours)


def test_resume_file_starts_from_its_weights(runs, again):
    for name, source in (("file", "stage3"), ("file3", "stage1")):
        before, after = events(again[0] / name, "eval")[0], events(runs[0] / source, "eval")[-1]
        assert before["loss"] == pytest.approx(after["loss"], rel=1e-6 if name == "file" else 1e-5)
    assert [path.name for path in (again[0] / "file").glob("*.pt")] == ["llama_10-20-epoch-3.pt"]
    assert [path.name for path in (again[0] / "file3").glob("*.pt")] == ["llama_0-10-epoch-3.pt"]
    assert "first epoch of this run is number 3" in again[1]["file"].stdout
    assert "warning:" not in again[1]["file"].stdout
    (warning,) = (line for line in again[1]["file3"].stdout.splitlines() if line.startswith("warning: "))
    assert "up to document 10" in warning and "--start_idx 0" in warning


def test_initial_epoch_counts_on(runs, again):
    assert [path.name for path in (again[0] / "epoch").glob("*.pt")] == ["llama_0-10-epoch-5.pt"]
    # The fifth epoch has an order of its own.
    assert numbers(again[0] / "epoch", ["loss"])[0] != numbers(runs[0] / "stage2", ["loss"])[0]


def test_another_stage_is_refused(again):
    (error,) = errors(again[1]["other stage"])
    assert "zero_stage 2, this run has 3" in error


# --------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "JSON without offload": ("offload_optimizer.device is not 'cpu'", "zero/train.py"),
    "stage 0": ("offload_optimizer", "stage 0"),
    "offload_param under stage 2": ("offload_param", "stage 2"),
    "batch equation": ("train_batch_size is 64", "1 rows x 2 accumulation steps x 1"),
    "no memory": ("1.0 GiB of host memory", "this host has 0.5 GiB"),
    "no GPU": ("--gpu_memory 8", "there is no GPU"),
    "packed BLOOM": ("bloom", "--no-packing"),
    "fp16": ("--precision fp16", "GPU"),
    "no file": ("nothing.pt", "no such file"),
    "another model's file": ("has shape", "the config wants"),
    "fewer layers in the file": ("model.layers.3", "is missing"),
    "more layers in the file": ("model.layers.4", "no place in the llama"),
    "truncated": ("truncated.pt", "truncated"),
    "under stage 3": ("truncated.pt", "truncated"),
    "a list": ("list.pt", "MODEL_STATE"),
    "bare state": ("bare.pt", "MODEL_STATE"),
    "integers": ("torch.int8", "floating-point"),
    "a pickle that runs": ("pickle.pt", "refused, a pickle that asks for posix.mkdir"),
    "no pickle": ("text.pt", "not a plain zip file of torch.save"),
    "another batch": ("its run had global_batch_size 4, this one has 2", "common.convert to-hf"),
    "file cannot be written": ("cannot write", "llama_0-10-epoch-1.pt"),
}


class Runs:
    """Unpickled by a reader that trusts its file it would make a directory."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.directory),)


def other_state(layers, hidden=128):
    config = LlamaConfig.from_pretrained(
        sample.sample_model_directory("llama"), num_hidden_layers=layers, hidden_size=hidden
    )
    return LlamaForCausalLM(config).state_dict()


@pytest.fixture(scope="module")
def mistakes(runs, short, tmp_path_factory):
    """(directory, {name: finished run}) of every mistake on one rank."""
    directory = tmp_path_factory.mktemp("mistakes")
    good = torch.load(runs[0] / "stage2" / "llama_0-10-epoch-1.pt", weights_only=True)
    state = good["MODEL_STATE"]
    integers = state | {"model.norm.weight": state["model.norm.weight"].to(torch.int8)}
    files = {
        "narrow": {"MODEL_STATE": other_state(4, hidden=64)},
        "shallow": {"MODEL_STATE": other_state(3)},
        "deep": {"MODEL_STATE": other_state(5)},
        "truncated": good,
        "list": [state],
        "bare": state,
        "integers": {"MODEL_STATE": integers},
        "pickle": good | {"more": Runs(directory / "made by a pickle")},
    }
    for name, content in files.items():
        torch.save(content, directory / f"{name}.pt")
    shorten(directory / "truncated.pt")
    (directory / "text.pt").write_text("no pickle")

    shipped = json.loads(config_of(2).read_text())
    zero = shipped["zero_optimization"]
    jsons = {
        "stage 0": shipped | {"zero_optimization": zero | {"stage": 0}},
        "param": shipped | {"zero_optimization": zero | {"offload_param": {"device": "cpu"}}},
        "batch": shipped | {"train_batch_size": 64},
    }
    for name, content in jsons.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    (directory / "file cannot be written" / "llama_0-10-epoch-1.pt").mkdir(parents=True)

    flags = {
        "JSON without offload": ("--deepspeed_config", ROOT / "zero" / "ds_zero2.json"),
        "stage 0": ("--deepspeed_config", directory / "stage 0.json"),
        "offload_param under stage 2": ("--deepspeed_config", directory / "param.json"),
        "batch equation": ("--deepspeed_config", directory / "batch.json"),
        "no memory": ("--host_memory", 0.5),
        "no GPU": ("--gpu_memory", 8),
        "packed BLOOM": ("--model_name", "sample-bloom", "--packing"),
        "fp16": ("--precision", "fp16"),
        "no file": ("--resume_file", directory / "nothing.pt"),
        "another model's file": ("--resume_file", directory / "narrow.pt"),
        "fewer layers in the file": ("--resume_file", directory / "shallow.pt"),
        "more layers in the file": ("--resume_file", directory / "deep.pt"),
        "truncated": ("--resume_file", directory / "truncated.pt"),
        "under stage 3": ("--resume_file", directory / "truncated.pt", "--deepspeed_config", config_of(3)),
        "a list": ("--resume_file", directory / "list.pt"),
        "bare state": ("--resume_file", directory / "bare.pt"),
        "integers": ("--resume_file", directory / "integers.pt"),
        "a pickle that runs": ("--resume_file", directory / "pickle.pt"),
        "no pickle": ("--resume_file", directory / "text.pt"),
        "another batch": ("--resume_from_checkpoint", begun(runs[0] / "stage2", "global_step4", directory / "two")),
        "file cannot be written": (),
    }  # fmt: skip
    ends = "--max_train_steps", 1, "--max_eval_steps", 1
    flags = {name: (*short, *ends, "--output_dir", directory / name, *own) for name, own in flags.items()}
    return directory, launch_several("offload/train.py", flags)


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_error_line(mistakes, name):
    directory, finished = mistakes
    assert finished[name].returncodes == [1]
    (error,) = errors(finished[name])
    assert all(word in error for word in MISTAKES[name]), error
    assert not list(directory.rglob("*.partial"))
    assert not (directory / "made by a pickle").exists()
    if (directory / name / "metrics.jsonl").exists() and name != "file cannot be written":
        assert not events(directory / name, "step")


@pytest.mark.slow
def test_broken_weights_end_the_run_on_every_rank_and_save_nothing(runs, short, tmp_path):
    output = begun(runs[0] / "stage2", "global_step4", tmp_path / "out")
    good = runs[0] / "stage2" / "llama_0-10-epoch-1.pt"
    shutil.copy(good, output)
    content = torch.load(good, weights_only=True)
    content["MODEL_STATE"]["model.layers.2.mlp.up_proj.weight"][3, 5] = math.inf
    torch.save(content, tmp_path / "broken.pt")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    finished = launch(
        "offload/train.py", *short, "--resume_file", tmp_path / "broken.pt", "--save_every", 1, "--keep_last", 1,
        "--output_dir", output, ranks=2,
    )  # fmt: skip
    assert finished.returncode != 0
    assert "Traceback" not in finished.stdout + finished.stderr
    (error,) = (line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert re.match(r"error: step 1: loss (nan|inf)", error) and "the last good step was 0" in error
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [path.name for path in output.glob("global_step*")] == ["global_step4"]
    assert not list(output.glob(".*"))
