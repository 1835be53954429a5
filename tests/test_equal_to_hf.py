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
from argparse import Namespace

import pytest
import torch
from runs import events, launch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from common import data, sample

STEPS = 10
ROWS = 4
RATE, WARMUP, DECAY, CLIP = 2e-3, 2, 0.01, 1.0


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """A model directory, a file of uneven documents, and the truth about training one on the other."""
    directory = tmp_path_factory.mktemp("case")
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=request.param, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    words = random.Random(0)
    texts = []
    for number in range(60):
        length = words.randrange(2, 6) if number % 2 else words.randrange(25, 40)
        texts.append(" ".join(words.choice(["we", "show", "that", "a", "model", "learns"]) for _ in range(length)))
    (directory / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return directory, train_with_hf(directory)


def train_with_hf(directory):
    """Plain training of the same documents, in the order that seed and epoch give."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32, use_cache=False)
    names = Namespace(
        dataset_name=str(directory / "text.jsonl"), dataset_config=None, text_column=None, start_idx=0, end_idx=None,
        max_length=64, packing=False,
    )  # fmt: skip
    rows, _ = data.load_rows(names, tokenizer, "abstracts")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses, norms, first_moments, uneven = [], [], None, 0
    for step_rows in data.epoch_order(rows, ROWS, seed=42, epoch=0)[:STEPS]:
        documents = [torch.tensor(rows.pieces[row]).long()[None] for row in step_rows]
        targets = [len(document[0]) - 1 for document in documents]
        uneven += max(targets) >= 3 * min(targets)
        loss = 0
        for document in documents:
            logits = model(document).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum") / sum(targets)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        first_moments = first_moments or {
            name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()
        }
    assert uneven > STEPS / 2
    return {"losses": losses, "norms": norms, "first_moments": first_moments, "weights": model.state_dict()}


def hf_name(layer, key):
    """Hugging Face's name for a key of layer shard `layer`; the model has 4 decoder layers."""
    if key.startswith("layer."):
        return f"model.layers.{layer - 1}.{key.removeprefix('layer.')}"
    return key if key.startswith("lm_head") else f"model.{key}"


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
        pytest.param(True, 1, 1, id="tied-1"),
        pytest.param(True, 2, 1, id="tied-2"),
        pytest.param(True, 4, 1, id="tied-4"),
        pytest.param(True, 2, 2, id="tied-2x2"),
        pytest.param(False, 1, 1, id="untied-1"),
        pytest.param(False, 2, 1, id="untied-2"),
        pytest.param(False, 4, 1, id="untied-4", marks=pytest.mark.slow),
        pytest.param(False, 2, 2, id="untied-2x2", marks=pytest.mark.slow),
    ],
    indirect=["case"],
)
def test_pipeline_trains_what_hf_trains(case, stages, replicas, tmp_path):
    directory, truth = case
    finished = launch(
        "pipeline/train.py", "--model_name", directory / "model", "--dataset_name", directory / "text.jsonl",
        "--max_length", 64, "--no-packing", "--batch_size", 1, "--accum_steps", ROWS // replicas,
        "--num_stages", stages, "--learning_rate", RATE, "--warmup_steps", WARMUP, "--weight_decay", DECAY,
        "--max_train_steps", STEPS, "--save_every", 1, "--output_dir", tmp_path / "run",
        ranks=stages * replicas,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    steps = events(tmp_path / "run", "step")
    assert [step["loss"] for step in steps] == pytest.approx(truth["losses"], rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(truth["norms"], rel=1e-4)

    moments = read_first_moments(tmp_path / "run" / "global_step1", tmp_path / "universal")
    assert set(truth["first_moments"]) <= set(moments)
    for name, moment in moments.items():
        torch.testing.assert_close(moment, truth_of(truth["first_moments"], name), rtol=1e-4, atol=1e-7)

    shards = sorted((tmp_path / "run" / f"global_step{STEPS}").glob("layer_*"))
    assert len(shards) == 7
    differences = []
    for layer, shard in enumerate(shards):
        for key, tensor in torch.load(shard, weights_only=True).items():
            differences.append((tensor - truth["weights"][hf_name(layer, key)]).abs().flatten())
    differences = torch.cat(differences)
    assert differences.max() < 1e-4
    assert differences.mean() < 1e-6
