"""The pipeline trains what plain Hugging Face and PyTorch train, whatever the stages and replicas.

The truth is a float32 loop over `LlamaForCausalLM` that sees one document at a time and divides the sum of all
token losses by their number. Compared are every step's loss and gradient norm, Adam's first moment after one step
and the weights after ten. Micro-batches are single documents of 4 to 60 tokens, so that a loss averaged over
micro-batches instead of tokens fails.
"""

import json
import random
import subprocess
import sys

import pytest
import torch

from helpers.launch import events, launch_forked
from helpers.plain_hf import DECAY, RATE, STEPS, WARMUP, WORDS, hf_name, read_layer_shards, save_llama, train_with_hf

ROWS = 4


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A model directory, a file of uneven documents, and the truth about training one on the other."""
    directory = tmp_path_factory.mktemp("case")
    save_llama(directory / "model", tied=request.param)
    words = random.Random(0)
    texts = []
    for number in range(60):
        length = words.randrange(2, 6) if number % 2 else words.randrange(25, 40)
        texts.append(" ".join(words.choice(WORDS) for _ in range(length)))
    (directory / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    truth = train_with_hf(directory / "model", directory / "text.jsonl", ROWS)
    assert sum(max(targets) >= 3 * min(targets) for targets in truth["targets"]) > STEPS / 2
    return directory, truth


def read_first_moments(checkpoint, scratch):
    """Adam's first moment by HF name, read with DeepSpeed's own converter to one file a parameter."""
    subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", checkpoint, "--output_folder",
         scratch, "--inject_missing_state"],
        check=True, capture_output=True,
    )  # fmt: skip
    moments = {}
    for file in sorted((scratch / "zero").glob("*/exp_avg.pt")):
        owner, key = file.parent.name.split(".", 1)
        if owner == "tied_modules":
            key = key.removeprefix("embedding.")
        layer = int(owner) if owner.isdigit() else 0
        moments[hf_name(layer, key)] = torch.load(file, weights_only=True)["param"]
    return moments


def truth_of(values, name):
    """The value by HF name; a tied head is the embedding."""
    return values[name] if name in values else values["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("case", "stages", "replicas"),
    [
        pytest.param(True, 1, 1, id="tied-1", marks=pytest.mark.slow),
        pytest.param(True, 2, 1, id="tied-2", marks=pytest.mark.slow),
        pytest.param(True, 4, 1, id="tied-4", marks=pytest.mark.slow),
        pytest.param(True, 2, 2, id="tied-2x2"),
        pytest.param(False, 1, 1, id="untied-1", marks=pytest.mark.slow),
        pytest.param(False, 2, 1, id="untied-2"),
        pytest.param(False, 4, 1, id="untied-4", marks=pytest.mark.slow),
        pytest.param(False, 2, 2, id="untied-2x2", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
def test_pipeline_trains_what_hf_trains(case, stages, replicas, tmp_path):
    directory, truth = case
    finished = launch_forked(
        "pipeline/train.py", "--model_name", directory / "model", "--dataset_name", directory / "text.jsonl",
        "--max_length", 64, "--no-packing", "--batch_size", 1, "--accum_steps", ROWS // replicas,
        "--num_stages", stages, "--learning_rate", RATE, "--warmup_steps", WARMUP, "--weight_decay", DECAY,
        "--max_train_steps", STEPS, "--save_every", 1, "--output_dir", tmp_path / "run",
        ranks=stages * replicas,
    )  # fmt: skip
    assert not any(finished.returncodes), finished.stderrs
    steps = events(tmp_path / "run", "step")
    assert [step["loss"] for step in steps] == pytest.approx(truth["losses"], rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(truth["norms"], rel=1e-4)

    moments = read_first_moments(tmp_path / "run" / "global_step1", tmp_path / "universal")
    assert set(truth["first_moments"]) <= set(moments)
    for name, moment in moments.items():
        torch.testing.assert_close(moment, truth_of(truth["first_moments"], name), rtol=1e-4, atol=1e-7)

    weights = read_layer_shards(tmp_path / "run" / f"global_step{STEPS}")
    differences = torch.cat([(tensor - truth["weights"][name]).abs().flatten() for name, tensor in weights])
    assert differences.max() < 1e-4
    assert differences.mean() < 1e-6
