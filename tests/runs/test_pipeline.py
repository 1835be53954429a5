"""Whole runs of pipeline/train.py on CPU: files, log, metrics, evaluation, conversion, resuming, refusals."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import convert, sample
from common.errors import UserError
from common.pretrained import PretrainedWeights
from helpers.launch import ROOT, errors, events, launch_forked, launch_several
from pipeline import layers, partition

SHORT = ("--max_length", 64, "--batch_size", 2, "--accum_steps", 4, "--end_idx", 120, "--num_epochs", 2)
LOG_LINE = re.compile(
    r"step \d+/\d+ \| loss \d+\.\d{4} \| lr \d\.\d\de[+-]\d\d \| grad_norm \d+\.\d\d \| \d+ ms \| "
    r"[\d,]+ tok/s \| [\d,]+ tok/s/gpu \| host \d+\.\d GiB"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, finished process) of two short epochs on two stages, never stopped, a checkpoint every 7 steps."""
    directory = tmp_path_factory.mktemp("run") / "out"
    finished = launch_forked("pipeline/train.py", *SHORT, "--save_every", 7, "--output_dir", directory, ranks=2)
    assert finished.returncodes == [0, 0], finished.stderrs
    return directory, finished


MISTAKES = {
    "--end_idx": (["--end_idx", "5000"], ["5000", "1,000 non-blank documents"]),
    "architecture": (["--model_name", "sample-gpt2"], ["llama, mistral, qwen2, qwen3", "gpt2"]),
    "--partition": (["--partition", "3,2"], ["5 decoder layers", "the model has 4"]),
    "--text_column": (["--text_column", "abstract"], ["abstract", "text"]),
    "no document": (["--start_idx", "10", "--end_idx", "10"], ["--start_idx 10 --end_idx 10", "0 <= start < end"]),
    "--max_length": (["--max_length", "4096"], ["4096", "2048 positions"]),
    "--model_name": (["--model_name", "/no/such/model"], ["/no/such/model"]),
}


@pytest.fixture(scope="module")
def more(run, tmp_path_factory):
    """{name: (finished run, its directory)} of runs that resume what the first saved or are compared with it."""
    directory, model = tmp_path_factory.mktemp("more"), tmp_path_factory.mktemp("converted")
    assert convert.main(["to-hf", str(run[0]), "--output_dir", str(model / "hf")]) == 0
    assert convert.main(["to-pipeline", str(model / "hf"), "--output_dir", str(model / "shards")]) == 0
    ds_config = json.loads((ROOT / "pipeline" / "ds_pipeline.json").read_text())
    ds_config["pipeline"]["activation_checkpoint_interval"] = 1
    (directory / "checkpointing.json").write_text(json.dumps(ds_config))
    shutil.copytree(run[0] / "global_step7", directory / "one kept" / "global_step7")
    (directory / "one kept" / "latest").write_text("global_step7")

    def resume(checkpoint):
        return "--resume_from_checkpoint", checkpoint

    def replicas(number):
        return (*SHORT[:2], "--batch_size", 1, "--accum_steps", 4 // number, "--end_idx", 60, "--num_stages", 1,
                "--max_train_steps", 3, "--no-save_checkpoint")  # fmt: skip

    script, one_stage = "pipeline/train.py", ("--num_stages", 1)
    two_ranks = {
        "two replicas": (script, *replicas(2)),
        "padded": (script, *SHORT, "--model_name", model / "hf", "--no-packing", "--max_train_steps", 1,
                   "--no-save_checkpoint"),
        "resumed": (script, *SHORT, *resume(run[0] / "global_step7")),
        "activation checkpointing": (
            script, *SHORT, "--deepspeed_config", directory / "checkpointing.json", "--max_train_steps", 2,
            "--warmup_steps", 1, "--no-save_checkpoint",
        ),
        "older run": ("tests/helpers/older_pipeline.py", *SHORT, "--save_every", 7),
        "older checkpoint": (script, *SHORT, *resume(directory / "older run" / "global_step7")),
        "other split": (script, *SHORT, *resume(run[0] / "global_step7"), "--partition", "1,3", "--save_every", 10),
        "saved split": (script, *SHORT, *resume(directory / "other split" / "global_step10")),
        **{name: (script, *flags) for name, (flags, _) in MISTAKES.items()},
    }  # fmt: skip
    one_rank = {
        "one replica": (script, *replicas(1)),
        "finished": (script, *SHORT, *one_stage, *resume("latest")),
        "finished, shorter": (script, *SHORT, *one_stage, *resume("latest"), "--max_train_steps", 3),
        "one kept": (script, *SHORT, *one_stage, *resume("latest"), "--save_every", 1, "--keep_last", 1,
                     "--max_train_steps", 9),
        "shards": (script, *SHORT, *resume(model / "shards"), "--max_train_steps", 1, "--no-save_checkpoint"),
    }  # fmt: skip
    for name in ("finished", "finished, shorter"):
        shutil.copytree(run[0], directory / name)
    finished = {}
    for ranks, runs in ((2, two_ranks), (1, one_rank)):
        runs = {name: (*flags, "--output_dir", directory / name) for name, flags in runs.items()}
        finished |= launch_several(None, runs, ranks=ranks)
    for name in finished.keys() - MISTAKES.keys():
        assert not any(finished[name].returncodes), (name, finished[name].stderrs)
    return {name: (finished[name], directory / name) for name in finished}


def last_checkpoint(directory):
    return directory / (directory / "latest").read_text()


def test_checkpoint_has_the_layout_of_published_ones(run):
    files = {path.name for path in last_checkpoint(run[0]).iterdir()}
    assert {name for name in files if name.endswith(".pt")} == {
        *(f"layer_{index:02d}-model_states.pt" for index in range(7)),
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_01_optim_states.pt",
    }
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files


def test_shard_keys_are_those_of_published_ones(run):
    def keys(index):
        return set(torch.load(last_checkpoint(run[0]) / f"layer_{index:02d}-model_states.pt", weights_only=True))

    assert keys(0) == {"embed_tokens.weight"}
    assert keys(5) == {"norm.weight"}
    assert keys(6) == {"lm_head.weight"}
    assert {"layer.self_attn.q_proj.weight", "layer.mlp.down_proj.weight"} <= keys(1) == keys(4)


def test_embedding_and_head_stayed_one(run):
    first, last = (
        torch.load(last_checkpoint(run[0]) / f"layer_0{index}-model_states.pt", weights_only=True) for index in (0, 6)
    )
    assert torch.equal(first["embed_tokens.weight"], last["lm_head.weight"])


def test_log_and_metrics(run):
    directory, finished = run
    lines = [line for line in finished.stdout.splitlines() if line.startswith("step ")]
    steps = events(directory, "step")
    assert len(lines) == len(steps) > 10
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert all(len(step["stages"]) == 2 and 0 < step["stages"][0]["busy"] <= 1 for step in steps)
    assert [event["phase"] for event in events(directory, "eval")] == ["before", "epoch", "after"]
    assert len(events(directory, "run")) == len(events(directory, "summary")) == 1
    # 120 documents less the two held out of the slice, twice.
    assert steps[-1]["samples_seen"] == 2 * 118
    assert all((directory / "logs" / f"rank_{rank}.log").stat().st_size for rank in range(2))
    for words in ("of the work", "bubble", "precision: fp32", "batch: 2 rows x 4 micro-batches"):
        assert words in finished.stdout


def test_printed_command_converts(run, capsys):
    directory, finished = run
    command = next(line for line in finished.stdout.splitlines() if line.startswith("python -m common.convert"))
    arguments = command.replace("'We present'", "We_present").split()[3:]
    assert convert.main(arguments) == 0
    assert "weights identical" in capsys.readouterr().out
    model, info = AutoModelForCausalLM.from_pretrained(directory / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_perplexity_is_that_of_plain_hf(run):
    directory, _ = run
    assert convert.main(["to-hf", str(directory), "--output_dir", str(directory / "hf-eval")]) == 0
    model = AutoModelForCausalLM.from_pretrained(directory / "hf-eval")
    tokenizer = AutoTokenizer.from_pretrained(directory / "hf-eval")
    texts = [json.loads(line)["text"] for line in sample.sample_dataset_file("abstracts").open()]
    loss_sum, targets = 0.0, 0
    for text in texts[49::50]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        # Rows of 64 tokens: a longer document goes on in another row with one token of context.
        for start in range(0, len(ids) - 1, 63):
            piece = torch.tensor([ids[start : start + 64]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            loss_sum += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
            targets += piece.shape[1] - 1
    after = events(directory, "eval")[-1]
    assert after["tokens"] == targets
    assert after["loss"] == pytest.approx(loss_sum / targets, rel=1e-5)
    assert after["perplexity"] == pytest.approx(math.exp(loss_sum / targets), rel=1e-4)


def test_padding_evaluates_like_packing(run, more):
    _, directory = more["padded"]
    before, after = events(directory, "eval")[0], events(run[0], "eval")[-1]
    assert before["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert before["tokens"] == after["tokens"]
    assert not list(directory.glob("global_step*"))


def test_resume_equals_an_uninterrupted_run(run, more):
    (directory, _), (_, resumed) = run, more["resumed"]
    names = ("step", "loss", "lr", "grad_norm", "samples_seen")
    steps = [[step[name] for name in names] for step in events(resumed, "step")]
    assert steps == [[step[name] for name in names] for step in events(directory, "step")][7:]
    for shard in sorted(last_checkpoint(directory).glob("layer_*")):
        ours, theirs = (torch.load(path, weights_only=True) for path in (shard, last_checkpoint(resumed) / shard.name))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "layers_of_stage_0", "words"),
    [
        ("older checkpoint", 3, "resharded: saved with param_groups all, this run has layer"),
        ("other split", 1, "resharded: its stages begin at layers [0, 4], this run's at [0, 2]"),
        ("saved split", 1, "whole state at step 10\n"),
    ],
)
def test_resume_from_other_shards_equals_an_uninterrupted_run(run, more, name, layers_of_stage_0, words):
    finished, directory = more[name]
    assert words in finished.stdout
    assert f"stage 0: embedding + {layers_of_stage_0} decoder layer" in finished.stdout
    uninterrupted = {step["step"]: step for step in events(run[0], "step")}
    resumed = events(directory, "step")
    assert resumed[-1]["step"] == max(uninterrupted) and len(resumed) >= 4
    for step in resumed:
        for key in ("loss", "lr", "grad_norm"):
            assert step[key] == pytest.approx(uninterrupted[step["step"]][key], rel=1e-6)


def test_resuming_a_finished_run_leaves_its_checkpoint_whole(run, more):
    for name in ("finished", "finished, shorter"):
        finished, directory = more[name]
        assert "nothing left to train" in finished.stdout
        ours, theirs = (
            {path.name: path.read_bytes() for path in last_checkpoint(each).iterdir()} for each in (directory, run[0])
        )
        assert ours == theirs


def test_keep_last_1_of_a_resumed_run_keeps_its_newest_checkpoint_only(more):
    _, directory = more["one kept"]
    assert [path.name for path in directory.glob("global_step*")] == ["global_step9"]
    assert (directory / "global_step9" / "config.json").exists()


def test_activation_checkpointing_changes_no_loss(run, more):
    first = events(more["activation checkpointing"][1], "step")[0]
    for name in ("loss", "grad_norm"):
        assert first[name] == pytest.approx(events(run[0], "step")[0][name], rel=1e-6)


def test_hf_model_resumes_as_pipeline(run, more):
    before = events(more["shards"][1], "eval")[0]
    assert before["loss"] == pytest.approx(events(run[0], "eval")[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("stage", range(3))
def test_load_pretrained_reads_only_the_layers_of_its_stage(stage):
    weights = PretrainedWeights(sample.sample_model_directory("llama"))
    read = []
    weights.read = lambda name, read_file=weights.read: read.append(name) or read_file(name)
    config = layers_config()
    bounds = partition.partition(config, 3, "2,1,1", mean_context_len=50)

    built = [spec.build() for spec in layers.layer_specs(config, 3)[bounds[stage] : bounds[stage + 1]]]
    pipeline = SimpleNamespace(parts=bounds, stage_id=stage, forward_funcs=built)
    layers.load_pretrained(pipeline, weights, config)
    decoder = {int(name.split(".")[2]) for name in read if name.startswith("model.layers.")}
    assert decoder == [{0, 1}, {2}, {3}][stage]
    # The tied head is a copy of the embedding, so both ends read that one.
    assert ("model.embed_tokens.weight" in read) == (stage in (0, 2))
    assert ("model.norm.weight" in read) == (stage == 2)
    if stage == 0:
        truth = AutoModelForCausalLM.from_pretrained(sample.sample_model_directory("llama"))
        assert torch.equal(built[1].layer.self_attn.q_proj.weight, truth.model.layers[0].self_attn.q_proj.weight)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sample.sample_model_directory("llama"))
    model.save_pretrained(tmp_path)
    config = layers_config()
    config.num_hidden_layers = 3
    pipeline = SimpleNamespace(
        parts=[0, 6], stage_id=0, forward_funcs=[layers.layer_specs(config, num_stages=2)[0].build()]
    )
    with pytest.raises(UserError, match=r"model\.layers\.3\..* has no place in a llama of 3 decoder layers"):
        layers.load_pretrained(pipeline, PretrainedWeights(tmp_path), config)

    headless = {
        name: tensor for name, tensor in model.state_dict().items() if "embed" not in name and "head" not in name
    }
    save_file(headless, tmp_path / "model.safetensors")
    pipeline = SimpleNamespace(
        parts=[6, 7], stage_id=0, forward_funcs=[layers.layer_specs(layers_config(), num_stages=2)[6].build()]
    )
    with pytest.raises(UserError, match=r"expected 'lm_head\.weight' .* missing"):
        layers.load_pretrained(pipeline, PretrainedWeights(tmp_path), layers_config())

    pipeline = SimpleNamespace(
        parts=[0, 1], stage_id=0, forward_funcs=[layers.layer_specs(config, num_stages=2)[0].build()]
    )
    integers = {name: tensor.to(torch.int8) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(integers, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is torch\.int8, expected a floating-point type"):
        layers.load_pretrained(pipeline, PretrainedWeights(tmp_path), layers_config())


def layers_config():
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(sample.sample_model_directory("llama"))


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_error_line_and_fails_on_every_rank(more, name):
    finished, directory = more[name]
    assert all(finished.returncodes)
    (line,) = set(errors(finished))  # of a mistake that each rank finds by itself, each prints the line
    assert all(word in line for word in MISTAKES[name][1])
    assert not list(directory.glob("global_step*"))


def test_two_replicas_see_the_same_order_as_one(more):
    one, two = ([step["loss"] for step in events(more[name][1], "step")] for name in ("one replica", "two replicas"))
    assert one == pytest.approx(two, rel=1e-5)
