"""Trains on conversations: the share of tokens that contributes to the loss, and the held-out loss of the answers.

    python tests/benchmarks/chats.py --questions squad.jsonl --tokenizer openai-community/gpt2 \\
        --output tests/benchmarks/results/chats.json

makes a conversation of each question (context and question from the user, the answer from the assistant), renders it
with common/chatml.jinja, and trains two models from random weights on two GPUs: a GPT-2 of DistilGPT-2's shape with
zero/, and a Llama of 12 layers on two stages with pipeline/.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import bench
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

FLAGS = (
    "--max_length", 512, "--learning_rate", "6e-4", "--no-save_checkpoint", "--chat_template",
    bench.ROOT / "common" / "chatml.jinja",
)  # fmt: skip
SHAPE = bench.SHAPES["llama-100m"].to_diff_dict()
MODELS = {
    "zero": (GPT2LMHeadModel, GPT2Config, {"n_layer": 6}, ("--batch_size", 8, "--generation_prompt", "")),
    "pipeline": (LlamaForCausalLM, LlamaConfig, SHAPE, ("--batch_size", 4, "--accum_steps", 4)),
}


def write_chats(questions, path):
    """Writes SQuAD's rows as conversations."""
    with open(path, "w") as file:
        for row in map(json.loads, questions.read_text().splitlines()):
            asked, answer = f"{row['context']}\n\n{row['question']}", row["answers"]["text"][0]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def train(script, model, chats, epochs, flags):
    """Returns what the run said of its text, and its held-out losses: before the first step and after each epoch."""
    with tempfile.TemporaryDirectory() as output:
        printed = bench.launch([
            *bench.deepspeed(2), bench.ROOT / script / "train.py", "--model_name", model, "--dataset_name", chats,
            "--num_epochs", epochs, "--output_dir", output, *FLAGS, *flags,
        ])  # fmt: skip
        evals = bench.read_events(output, "eval")
        run = bench.read_events(output, "run")[0]
    text = next(line for line in printed.splitlines() if line.startswith("train: "))
    return {
        "text": text,
        "share_of_tokens": float(re.search(r"([\d.]+)% of the tokens", text)[1]) / 100,
        "held_out_losses": [round(event["loss"], 4) for event in evals],
        "parameters": run["parameters"],
        "hardware": run["hardware"],
        "versions": run["versions"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="a .jsonl file in SQuAD's format")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tokenizer, results = AutoTokenizer.from_pretrained(args.tokenizer), {}
    with tempfile.TemporaryDirectory() as scratch:
        write_chats(args.questions, f"{scratch}/chats.jsonl")
        for script, (model_class, config_class, shape, flags) in MODELS.items():
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            torch.manual_seed(0)
            config = config_class(**shape | ids | {"vocab_size": len(tokenizer)})
            model_class(config).save_pretrained(f"{scratch}/{script}")
            tokenizer.save_pretrained(f"{scratch}/{script}")
            results[script] = train(script, f"{scratch}/{script}", f"{scratch}/chats.jsonl", args.epochs, flags)
            bench.keep(args.output, results)
            print(script, json.dumps(results[script]), flush=True)


if __name__ == "__main__":
    main()
