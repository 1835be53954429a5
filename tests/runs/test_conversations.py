"""Runs on conversations have the losses of plain Hugging Face, and convert with their chat template."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from common import convert, evaluate
from helpers.launch import events, launch_several
from helpers.plain_hf import save_llama

CHATML = Path(__file__).resolve().parents[2] / "common" / "chatml.jinja"


def turns(*contents, system=None):
    """A conversation in which user and assistant take turns."""
    rest = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *rest] if system else rest


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(path, **changes):
    values = {
        "dataset_name": str(path), "dataset_config": None, "text_column": None, "start_idx": 0, "end_idx": None,
        "max_length": 256, "loss_on": None, "chat_template": str(CHATML), "seed": 1,
    }  # fmt: skip
    return argparse.Namespace(**values | changes)


STEPS, RATE = 3, 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two techniques on conversations, each step on all of them, and the same with plain Hugging Face."""
    directory = tmp_path_factory.mktemp("chats")
    save_llama(directory / "model", tied=True)
    splits = {
        "train": [turns(f"What is {i}?", f"It is {i}.", *(["Sure?", "Yes!"] * (i % 2))) for i in range(9)],
        "validation": [turns(f"Who is {i}?", f"Nobody {i}.") for i in range(4)],
    }
    (directory / "text").mkdir()
    for split, conversations in splits.items():
        write(directory / "text" / f"{split}.jsonl", [{"messages": each} for each in conversations])
    common = [
        "--model_name", directory / "model", "--dataset_name", directory / "text", "--chat_template", CHATML,
        "--max_length", 128, "--batch_size", 8, "--num_epochs", STEPS, "--learning_rate", RATE, "--warmup_steps", 0,
        "--precision", "fp32",
    ]  # fmt: skip
    runs = {
        "zero": ["zero/train.py", *common, "--accum_steps", 1, "--generation_prompt", "Who?", "--max_new_tokens", 3],
        "pipeline": ["pipeline/train.py", *common, "--accum_steps", 2],
    }
    runs = {name: [*flags, "--output_dir", directory / name] for name, flags in runs.items()}
    finished = launch_several(None, runs, ranks=2)
    for name, run in finished.items():
        assert not any(run.returncodes), (name, run.stdout, run.stderrs)
    return directory, finished, train_on_conversations(directory / "model", splits)


def train_on_conversations(model_directory, splits):
    """(training losses, held-out losses) of plain Hugging Face in float32, one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32, use_cache=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)

    def mean_loss(conversations):
        total, targets = 0, 0
        for conversation in conversations:
            encoded = tokenizer.apply_chat_template(
                conversation, chat_template=CHATML.read_text(), return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["assistant_masks"]])
            labels = ids.masked_fill(mask == 0, -100)[0, 1:]
            total += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="sum")
            targets += int(mask[:, 1:].sum())
        return total / targets

    losses, held_out = [], [mean_loss(splits["validation"]).item()]
    for _ in range(STEPS):
        loss = mean_loss(splits["train"])
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        held_out.append(mean_loss(splits["validation"]).item())
    return losses, held_out


@pytest.mark.parametrize("technique", ["zero", "pipeline"])
def test_run_on_conversations_has_the_losses_of_plain_hf(trained, technique):
    directory, _, (losses, held_out) = trained
    assert [event["loss"] for event in events(directory / technique, "step")] == pytest.approx(losses, rel=1e-5)
    assert [event["loss"] for event in events(directory / technique, "eval")] == pytest.approx(held_out, rel=1e-5)
    assert losses[-1] < losses[0]


def test_prompt_of_a_run_on_conversations_is_a_users_turn(trained):
    _, finished, _ = trained
    assert "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n" in finished["zero"].stdout


@pytest.mark.parametrize("technique", ["zero", "pipeline"])
def test_converted_model_has_the_template_and_the_loss_of_the_run(trained, technique, tmp_path, capsys):
    directory, _, (_, held_out) = trained
    checkpoint = directory / technique / f"global_step{STEPS}"
    run = torch.load(next(checkpoint.glob("mp_rank_00*")), weights_only=False)["run"]
    assert run["data"]["loss_on"] == "assistant" and run["data"]["date_string"] == "26 Jul 2024"
    assert convert.main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "hf")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == CHATML.read_text()
    flags = ["--dataset_name", directory / "text", "--max_length", 128, "--precision", "fp32"]
    flags += ["--output", tmp_path / "out.json"]
    assert evaluate.main([str(tmp_path / "hf"), *map(str, flags), "--num_prompts", "1", "--max_new_tokens", "3"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["loss_on"] == "assistant"
    assert found["models"][0]["loss"] == pytest.approx(held_out[-1], rel=1e-5)
    answers = [f"Nobody {i}.<|im_end|>" for i in range(4)]
    assert found["models"][0]["bytes"] == len("".join(answers).encode())
    assert found["prompts"] == [{"text": "Who is 0?", "reference": found["prompts"][0]["reference"]}]
    assert found["prompts"][0]["reference"] and "Nobody 0.".startswith(found["prompts"][0]["reference"])
