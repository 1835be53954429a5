"""Whole runs of zero/train.py on CPU: log, metrics, memory table, text, perplexity, resuming, refusals."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import memory, sample
from helpers.launch import ROOT, begun, errors, events, launch, launch_forked, launch_several, shorten

LOG_LINE = re.compile(
    r"step \d+/\d+ \| loss \d+\.\d{4} \| lr \d\.\d\de[+-]\d\d \| grad_norm \d+\.\d\d \| \d+ ms \| "
    r"[\d,]+ tok/s \| [\d,]+ tok/s/gpu \| host \d+\.\d GiB"
)
STEP = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "samples_seen")
EVAL = ("step", "epoch", "phase", "loss", "perplexity", "tokens")


def config_of(stage):
    return ROOT / "zero" / f"ds_zero{stage}.json"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A directory of three small splits of the sample's paragraphs; train has documents longer than a row."""
    directory = tmp_path_factory.mktemp("text")
    for split, count in (("train", 80), ("validation", 40), ("test", 30)):
        lines = (sample.sample_dataset_file("paragraphs") / f"{split}.jsonl").read_text().splitlines()
        (directory / f"{split}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    return directory


@pytest.fixture(scope="module")
def short(text):
    return (
        "--dataset_name", text, "--max_length", 48, "--batch_size", 1, "--accum_steps", 2, "--num_epochs", 2,
        "--max_new_tokens", 10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, short):
    """(directory, {name: finished run}) on two ranks: two epochs under each stage, a checkpoint every 4 steps."""
    directory = tmp_path_factory.mktemp("runs")
    limited = "--max_train_steps", 4, "--max_eval_steps", 2, "--no-save_checkpoint"
    flags = {
        f"stage{stage}": (*short, "--deepspeed_config", config_of(stage), "--save_every", 4, "--temperature", stage % 2)
        for stage in (1, 2, 3)
    } | {"limited": (*short, *limited, "--generation_prompt", "")}
    flags = {name: (*own, "--output_dir", directory / name) for name, own in flags.items()}
    finished = launch_several("zero/train.py", flags, ranks=2)
    for run in finished.values():
        assert run.returncodes == [0, 0], run.stdout + "".join(run.stderrs)
    return directory, finished


def numbers(directory, kind, names):
    return [[event[name] for name in names] for event in events(directory, kind)]


def last_checkpoint(directory):
    return directory / (directory / "latest").read_text()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_log_and_metrics(runs, stage):
    directory, finished = runs[0] / f"stage{stage}", runs[1][f"stage{stage}"]
    lines = [line for line in finished.stdout.splitlines() if line.startswith("step ")]
    steps = events(directory, "step")
    assert len(lines) == len(steps) > 10
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert set(steps[0]) == {
        "event", "time", *STEP, "step_time_s", "tokens_per_second", "tokens_per_second_per_gpu", "host_peak_gib",
    }  # fmt: skip
    evaluations = events(directory, "eval")
    assert [event["phase"] for event in evaluations] == ["before", "epoch", "after", "test"]
    assert set(evaluations[0]) == {"event", "time", *EVAL, "samples_per_second"}
    assert evaluations[0]["loss"] > evaluations[1]["loss"] > evaluations[2]["loss"]
    assert [event["step"] for event in evaluations] == [0, len(steps) // 2, len(steps), len(steps)]
    (run,), (summary,) = events(directory, "run"), events(directory, "summary")
    assert (run["technique"], run["world_size"], run["ds_config"]["zero_optimization"]["stage"]) == ("zero", 2, stage)
    assert summary["steps_per_epoch"] == len(steps) // 2 and summary["final_train_loss"] == steps[-1]["loss"]
    assert all((directory / "logs" / f"rank_{rank}.log").stat().st_size for rank in range(2))
    for words in ("precision: fp32", "batch: 1 rows x 2 micro-batches x 2 data-parallel", f"ZeRO stage {stage}"):
        assert words in finished.stdout


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_table_and_text_come_last(runs, stage):
    stdout = runs[1][f"stage{stage}"].stdout
    (parameters,) = (event["parameters"] for event in events(runs[0] / f"stage{stage}", "run"))
    marked = [line.split()[1:] for line in stdout.splitlines() if line.startswith("* ")]
    states = [part / 2**20 for part in memory.model_states(parameters, 2, torch.float32)[stage]]
    assert marked == [[str(stage), *(f"{part:.2f}" for part in (*states, sum(states)))]]
    table, text = stdout.rindex(f"measured under stage {stage}"), stdout.rindex("The history of")
    assert stdout.rindex("eval test") < table < text


def test_temperature_0_writes_the_likeliest_text(runs):
    model, tokenizer = plain_model(runs[0] / "stage2")
    inputs = tokenizer("The history of", return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=10, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) in runs[1]["stage2"].stdout


def test_one_seed_gives_the_same_losses_and_limits_hold(runs):
    """`limited` is stage2 anew, but it stops early, evaluates little, saves nothing and writes no text."""
    directory, finished = runs[0] / "limited", runs[1]["limited"]
    steps = numbers(directory, "step", STEP)
    assert len(steps) == 4
    assert steps == numbers(runs[0] / "stage2", "step", STEP)[:4]
    for stage in (1, 3):
        losses = [event["loss"] for event in events(runs[0] / f"stage{stage}", "step")]
        assert losses == pytest.approx([event["loss"] for event in events(runs[0] / "stage2", "step")], rel=1e-4)
    assert [event["phase"] for event in events(directory, "eval")] == ["before", "after", "test"]
    assert events(directory, "eval")[0]["tokens"] < events(runs[0] / "stage2", "eval")[0]["tokens"]
    assert sorted(path.name for path in directory.iterdir()) == ["logs", "metrics.jsonl"]
    assert "The history of" not in finished.stdout


def plain_model(directory):
    """(HF's own model with the last checkpoint's weights, its tokenizer); for stages 1 and 2 in float32."""
    checkpoint = last_checkpoint(directory)
    model = AutoModelForCausalLM.from_pretrained(sample.sample_model_directory("gpt2"))
    state = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    model.load_state_dict(state)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_perplexity_is_that_of_plain_hf(runs, text, split):
    model, tokenizer = plain_model(runs[0] / "stage2")
    loss_sum, targets, documents, pieces = 0.0, 0, 0, 0
    for line in (text / f"{split}.jsonl").open():
        document = json.loads(line)["text"]
        if not document.strip():
            continue
        documents += 1
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        # Rows of 48 tokens: a longer document goes on in another row with one token of context.
        for start in range(0, len(ids) - 1, 47):
            piece = torch.tensor([ids[start : start + 48]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            loss_sum += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
            targets += piece.shape[1] - 1
            pieces += 1
    assert pieces > documents > 10
    (event,) = [
        event
        for event in events(runs[0] / "stage2", "eval")
        if event["phase"] == ("test" if split == "test" else "after")
    ]
    assert event["tokens"] == targets
    assert event["loss"] == pytest.approx(loss_sum / targets, rel=1e-5)
    assert event["perplexity"] == pytest.approx(math.exp(loss_sum / targets), rel=1e-4)


@pytest.mark.slow
def test_the_default_command_trains(tmp_path):
    finished = launch("zero/train.py", "--output_dir", tmp_path, ranks=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    before, *_, after, held_out = events(tmp_path, "eval")
    assert [after["phase"], held_out["phase"]] == ["after", "test"]
    assert after["perplexity"] < 0.1 * before["perplexity"]
    assert held_out["loss"] == pytest.approx(after["loss"], rel=0.05)
    assert "ZeRO stage 2" in finished.stdout and "\nThe history of" in finished.stdout


# ----------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def resumed(runs, short, tmp_path_factory):
    """(directory, {name: finished run}): two stages go on from step 4 in new processes, one is another's."""
    directory = tmp_path_factory.mktemp("resumed")
    flags = {
        name: (*short, "--deepspeed_config", config_of(now), "--save_every", 4, "--resume_from_checkpoint", "latest",
               "--output_dir", begun(runs[0] / f"stage{was}", "global_step4", directory / name))
        for name, was, now in (("stage2", 2, 2), ("stage3", 3, 3), ("other", 3, 2))
    }  # fmt: skip
    return directory, launch_several("zero/train.py", flags, ranks=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_equals_an_uninterrupted_run(runs, resumed, stage):
    straight, directory = runs[0] / f"stage{stage}", resumed[0] / f"stage{stage}"
    finished = resumed[1][f"stage{stage}"]
    assert finished.returncodes == [0, 0], finished.stdout + "".join(finished.stderrs)
    steps_per_epoch = events(straight, "summary")[0]["steps_per_epoch"]
    assert 4 % steps_per_epoch, "step 4 has to be in the middle of an epoch"
    assert numbers(directory, "step", STEP) == numbers(straight, "step", STEP)[4:]
    assert numbers(directory, "eval", EVAL) == numbers(straight, "eval", EVAL)[1:]
    for file in sorted(last_checkpoint(straight).glob("*_optim_states.pt")):
        # DeepSpeed's own classes are in there, so not `weights_only`.
        ours, theirs = (
            torch.load(path, weights_only=False)["optimizer_state_dict"]
            for path in (file, last_checkpoint(directory) / file.name)
        )
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        assert all(torch.equal(one, other) for one, other in zip(ours[key], theirs[key], strict=True))


def test_another_stage_is_refused(resumed):
    assert resumed[1]["other"].returncodes == [1, 1]
    (error,) = errors(resumed[1]["other"])
    assert "zero_stage 3, this run has 2" in error and "common.convert to-hf" in error
    assert not (resumed[0] / "other" / "global_step8").exists()


# --------------------------------------------------------------------------------------------------- mistakes


def broken_model(directory, change_config=None, change_weights=None):
    """A copy of the sample GPT-2 whose config and state dict the functions change in place."""
    shutil.copytree(sample.sample_model_directory("gpt2"), directory)
    config = json.loads((directory / "config.json").read_text())
    state = load_file(directory / "model.safetensors")
    (change_config or dict)(config)
    (change_weights or dict)(state)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


def poison(state):
    state["transformer.h.1.mlp.c_fc.weight"][3, 5] = math.nan


def quantize(state):
    state["transformer.h.1.mlp.c_fc.weight"] = state["transformer.h.1.mlp.c_fc.weight"].to(torch.int8)


MISTAKES = {
    "no such config": ("nothing.json", "No such file"),
    "not JSON": ("not JSON", "line 1"),
    "unknown key": ("'zero_optimization.stge'", "did you mean 'stage'?"),
    "offload JSON": ("offload/train.py", "zero/train.py"),
    "batch equation": ("train_batch_size is 64", "1 rows x 2 accumulation steps x 1"),
    "packed BLOOM": ("bloom", "--no-packing"),
    "no config": ("no config.json", "empty"),
    "no tokenizer": ("no tokenizer", "no_tokenizer"),
    "wrong shape": ("has shape [2048, 128]", "wants [2048, 64]"),
    "too many layers": ("transformer.h.3", "no place in the gpt2"),
    "quantized": ("'transformer.h.1.mlp.c_fc.weight' is torch.int8", "floating-point"),
    "truncated": ("model.safetensors", "truncated"),
    "truncated under stage 3": ("model.safetensors", "truncated"),
    "few embeddings": ("the tokenizer of", "embedding has 100 rows"),
    "long rows": ("2048", "1024 positions"),
    "no output directory": ("--output_dir", "cannot be written"),
    "checkpoint cannot be written": ("--output_dir", "global_step1 has a checkpoint's name, but is not a directory"),
    "no dataset": ("nothing.jsonl", "no such file"),
    "empty test split": ("test_empty", "contains no documents"),
    "no checkpoint": ("latest", "no checkpoint in"),
    "a pipeline's checkpoint": ("pipeline/train.py", "common.convert to-hf"),
    "another batch": ("its run had global_batch_size 4, this one has 2", "common.convert to-hf"),
    "truncated checkpoint": ("optim_states.pt", "truncated"),
    "another checkpoint's data": ("max_length 48", "this one has 40"),
    "weights overflow": ("step 2: the loss on held-out text is ", "not saved"),
}


@pytest.fixture(scope="module")
def mistakes(runs, short, text, tmp_path_factory):
    """(directory, {name: finished run}) of every mistake on one rank."""
    directory = tmp_path_factory.mktemp("mistakes")
    shipped = json.loads(config_of(2).read_text())
    jsons = {
        "unknown": json.dumps(shipped | {"zero_optimization": {"stge": 2}}),
        "broken": json.dumps(shipped)[:-1] + ",",
        "batch": json.dumps(shipped | {"train_batch_size": 64}),
    }
    for name, content in jsons.items():
        (directory / f"{name}.json").write_text(content)
    (directory / "empty").mkdir()
    (directory / "file").write_text("")
    broken_model(directory / "no_tokenizer")
    for path in (directory / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    broken_model(directory / "narrow", lambda config: config.update(n_embd=64))
    broken_model(directory / "shallow", lambda config: config.update(n_layer=3))
    broken_model(directory / "quantized", None, quantize)
    shorten(broken_model(directory / "truncated") / "model.safetensors")
    broken_model(directory / "few", lambda config: config.update(vocab_size=100))
    blocked = directory / "checkpoint cannot be written"
    blocked.mkdir()
    (blocked / "global_step1").write_text("")
    (directory / "a pipeline's checkpoint").mkdir()
    (directory / "a pipeline's checkpoint" / "layer_00-model_states.pt").write_text("")
    for name in ("another batch", "truncated checkpoint"):
        begun(runs[0] / "stage2", "global_step4", directory / name)
    shorten(next((directory / "truncated checkpoint" / "global_step4").glob("*optim_states.pt")))
    for split in ("train", "validation"):
        for kind in ("empty", "blank"):
            (directory / f"test_{kind}").mkdir(exist_ok=True)
            shutil.copy(text / f"{split}.jsonl", directory / f"test_{kind}")
    (directory / "test_empty" / "test.jsonl").write_text("")
    (directory / "test_blank" / "test.jsonl").write_text('{"text": " "}\n')

    flags = {
        "no such config": ("--deepspeed_config", directory / "nothing.json"),
        "not JSON": ("--deepspeed_config", directory / "broken.json"),
        "unknown key": ("--deepspeed_config", directory / "unknown.json"),
        "offload JSON": ("--deepspeed_config", ROOT / "offload" / "ds_zero2_offload.json"),
        "batch equation": ("--deepspeed_config", directory / "batch.json"),
        "packed BLOOM": ("--model_name", "sample-bloom", "--packing"),
        "no config": ("--model_name", directory / "empty"),
        "no tokenizer": ("--model_name", directory / "no_tokenizer"),
        "wrong shape": ("--model_name", directory / "narrow"),
        "too many layers": ("--model_name", directory / "shallow"),
        "quantized": ("--model_name", directory / "quantized"),
        "truncated": ("--model_name", directory / "truncated"),
        "truncated under stage 3": ("--model_name", directory / "truncated", "--deepspeed_config", config_of(3)),
        "few embeddings": ("--model_name", directory / "few"),
        "long rows": ("--max_length", 2048),
        "no output directory": ("--output_dir", directory / "file" / "out"),
        "checkpoint cannot be written": (),
        "no dataset": ("--dataset_name", directory / "nothing.jsonl"),
        "no checkpoint": ("--resume_from_checkpoint", "latest"),
        "a pipeline's checkpoint": ("--resume_from_checkpoint", "latest"),
        "another batch": ("--resume_from_checkpoint", "latest"),
        "truncated checkpoint": ("--resume_from_checkpoint", "latest"),
        "one rank": (),
        "another checkpoint's data": ("--resume_from_checkpoint", directory / "one rank", "--max_length", 40),
        "weights overflow": ("--learning_rate", 1e38, "--warmup_steps", 1, "--max_train_steps", 2),
        "empty test split": ("--dataset_name", directory / "test_empty", "--no-save_checkpoint"),
        "blank test split": ("--dataset_name", directory / "test_blank", "--no-save_checkpoint"),
    }
    ends = "--max_train_steps", 1, "--max_eval_steps", 1
    flags = {name: (*short, *ends, "--output_dir", directory / name, *own) for name, own in flags.items()}
    return directory, launch_several("zero/train.py", flags)


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_error_line(mistakes, name):
    directory, finished = mistakes[0] / name, mistakes[1][name]
    assert finished.returncodes == [1]
    (error,) = errors(finished)
    assert all(word in error for word in MISTAKES[name]), error
    assert not list(directory.glob("**/*.partial"))
    if (directory / "metrics.jsonl").exists() and name != "weights overflow":
        assert not events(directory, "step")


def test_blank_test_split_is_accepted(mistakes):
    assert mistakes[1]["blank test split"].returncodes == [0], mistakes[1]["blank test split"].stderrs
    assert [event["phase"] for event in events(mistakes[0] / "blank test split", "eval")] == ["before", "after"]


def test_broken_weights_end_the_run_on_every_rank_and_save_nothing(runs, short, tmp_path):
    model = broken_model(tmp_path / "model", None, poison)
    output = begun(runs[0] / "stage2", "global_step4", tmp_path / "out")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    finished = launch_forked(
        "zero/train.py", *short, "--model_name", model, "--save_every", 1, "--keep_last", 1, "--output_dir", output,
        ranks=2,
    )  # fmt: skip
    assert finished.returncodes == [1, 1]
    (error,) = set(errors(finished))
    assert error.startswith("error: step 1: loss nan") and "the last good step was 0" in error
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [path.name for path in output.glob("global_step*")] == ["global_step4"]
