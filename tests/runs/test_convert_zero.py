"""Models converted from runs of zero/ have the losses that the runs logged."""

import json
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
)

from common import sample
from common.convert import main
from helpers.hf_models import assert_equal, load, stored
from helpers.launch import events, launch_several
from helpers.token_rows import ids_in_row, load_rows

STEPS = 3


def convert_to(output, checkpoint, *options):
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), *map(str, options)]) == 0
    return output


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two model directories, `gpt2` with a tied head and `llama` without, and a file of uneven documents."""
    directory = tmp_path_factory.mktemp("case")
    words = random.Random(0)
    texts = [" ".join(words.choices(["we", "show", "that", "a", "model"], k=words.randrange(3, 40))) for _ in range(80)]
    (directory / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for kind in ("gpt2", "llama"):
        tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory(kind))
        config = {
            "gpt2": GPT2Config(
                vocab_size=len(tokenizer), n_embd=36, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                attn_pdrop=0, initializer_range=0.2,
            ),
            "llama": LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=36, intermediate_size=50, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
            ),
        }[kind]  # fmt: skip
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / kind)
        tokenizer.save_pretrained(directory / kind)
    return directory


SUMMED_IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}
# Model, precision and DeepSpeed's configuration of each run.
RUNS = {
    **{f"stage {stage}": ("gpt2", "fp32", stage, {}) for stage in range(4)},
    **{f"stage {stage}, bf16": ("llama", "bf16", stage, {}) for stage in range(4)},
    "stage 1, bf16, summed in float32": ("llama", "bf16", 1, SUMMED_IN_FLOAT32),
}


@pytest.fixture(scope="module")
def runs(case, tmp_path_factory):
    """Trains each of `RUNS` on two ranks; {name: output directory}."""
    directory = tmp_path_factory.mktemp("runs")
    flags = {}
    for name, (kind, precision, stage, others) in RUNS.items():
        config = directory / f"{name}.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": stage}, **others}))
        flags[name] = (
            "--model_name", case / kind, "--dataset_name", case / "text.jsonl", "--deepspeed_config", config,
            "--precision", precision, "--max_length", 64, "--no-packing", "--batch_size", 2, "--learning_rate", 1e-2,
            "--warmup_steps", 0, "--max_train_steps", STEPS, "--output_dir", directory / name,
        )  # fmt: skip
    for name, finished in launch_several("zero/train.py", flags, ranks=2).items():
        assert not any(finished.returncodes), (name, finished.stderrs)
    return {name: directory / name for name in RUNS}


def held_out_loss(case, model_directory):
    """Mean loss of a token of the held-out documents, by Hugging Face's model alone, one document at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = load(model_directory).eval()
    _, rows = load_rows(str(case / "text.jsonl"), tokenizer, max_length=64, packing=False)
    total = targets = 0
    for (piece,) in (ids_in_row(rows, row) for row in range(len(rows))):
        ids = torch.tensor(piece).long()[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    return total / targets


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_converted_model_has_the_loss_of_the_run(case, runs, stage, tmp_path, capsys):
    run = runs[f"stage {stage}"]
    output = convert_to(tmp_path / "out", run, "--verify", "--prompt", "we show", "--max_new_tokens", 3)
    printed = capsys.readouterr().out
    assert "verify: weights identical (29 tensors" in printed
    assert "we show" in printed
    losses = {event["phase"]: event["loss"] for event in events(run, "eval")}
    assert abs(losses["before"] / losses["after"] - 1) > 1e-2  # so that the weights before training would fail
    assert held_out_loss(case, output) == pytest.approx(losses["after"], rel=1e-5)
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    assert len(stored(output)) == 28  # without the tied head


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_stages_give_the_same_weights(runs, stage, tmp_path):
    expected = stored(convert_to(tmp_path / "expected", runs["stage 0"]))
    found = stored(convert_to(tmp_path / "found", runs[f"stage {stage}"]))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("c_attn.bias"):  # the loss does not depend on the keys' bias, so Adam steps by rounding errors
            found[name][36:72] = tensor[36:72]
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["stage 0, bf16", "stage 1, bf16", "stage 2, bf16", "stage 1, bf16, summed in float32"]
)
def test_16_bit_run_converts_to_the_weights_it_computed_with_and_to_its_masters(runs, name, tmp_path):
    """Rounded, the masters are the weights that the run computed with, which the checkpoint has as well."""
    run = runs[name]
    output = convert_to(tmp_path / "out", run, "--verify")
    state = torch.load(run / f"global_step{STEPS}" / "mp_rank_00_model_states.pt", weights_only=True)
    assert_equal(stored(output), dict(state["module"]))
    assert load(output).dtype == torch.bfloat16
    masters = stored(convert_to(tmp_path / "masters", run, "--dtype", "float32", "--verify"))
    for name, master in masters.items():
        assert torch.equal(master.bfloat16(), state["module"][name])
    assert any(not torch.equal(master.bfloat16().float(), master) for master in masters.values())


def test_16_bit_run_of_stage_3_has_the_loss_of_the_run(case, runs, tmp_path):
    run = runs["stage 3, bf16"]
    masters = stored(convert_to(tmp_path / "masters", run, "--dtype", "float32", "--verify"))
    assert_equal(stored(convert_to(tmp_path / "out", run)), {name: m.bfloat16() for name, m in masters.items()})
    losses = {event["phase"]: event["loss"] for event in events(run, "eval")}
    assert held_out_loss(case, tmp_path / "out") == pytest.approx(losses["after"], rel=1e-2)
