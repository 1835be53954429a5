"""What the benchmarks share: a model of a known shape, generated text, and launching the shipped scripts."""

import itertools
import json
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig

from common import sample

LLAMA_3 = {
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip


def llama_3_rope(factor):
    return {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "high_freq_factor": 4.0,
        "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


SHAPES = {
    "llama-1b": LlamaConfig(
        **LLAMA_3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        tie_word_embeddings=True, rope_parameters=llama_3_rope(32.0),
    ),
    "llama-8b": LlamaConfig(
        **LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128,
        tie_word_embeddings=False, rope_parameters=llama_3_rope(8.0),
    ),
    "llama-100m": LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "bloom-560m": BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16, use_cache=False),
}  # fmt: skip


def make_model(directory, shape="llama-1b", tokenizer=None):
    """A model with random bf16 weights, and a tokenizer.

    Args:
        shape: a key of `SHAPES`: Llama-3.2-1B's, Llama-3.1-8B's, bloom-560m's or that of a small Llama.
        tokenizer: Hub name or directory; None is the sample's.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer or sample.sample_model_directory("llama"))
    config = SHAPES[shape]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_text(path, tokens, joined=(1,)):
    """Generated abstracts of at least so many tokens.

    Args:
        joined: how many abstracts of about 132 tokens make a document, by turns.
    """
    count = max(200, tokens // 120)
    sample.write_documents(path, "abstracts", count, seed=1)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    with open(path, "w") as file:
        for number in itertools.cycle(joined):
            document, texts = texts[:number], texts[number:]
            if not document:
                return
            file.write(json.dumps({"text": " ".join(document)}) + "\n")


def launch(command, cwd=None):
    """Runs a command and returns what it printed; on failure prints its errors and last output, and exits."""
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if finished.returncode:
        errors = "\n".join(line for line in finished.stderr.splitlines() if "rror" in line)
        sys.exit(
            f"{shlex.join(map(str, command))}\n{finished.stdout[-4000:]}\n{errors[:4000]}\n{finished.stderr[-4000:]}"
        )
    return finished.stdout


def deepspeed(gpus):
    """The launcher's command, with a port of its own, so that several can run at a time."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return ["deepspeed", f"--num_gpus={gpus}", f"--master_port={sock.getsockname()[1]}"]


def train(script, flags, gpus, model, text, wrapper=()):
    """Launches a technique's train.py for one epoch at most, and returns (lines it printed, its events).

    Args:
        wrapper: a script that runs another, such as as_t4.py.
    """
    with tempfile.TemporaryDirectory() as output:
        out = launch([
            *deepspeed(gpus), *wrapper, ROOT / script / "train.py", "--model_name", model,
            "--dataset_name", text, "--learning_rate", "1e-4", "--num_epochs", "1",
            "--max_eval_steps", "1", "--no-save_checkpoint", "--output_dir", output, *shlex.split(flags),
        ])  # fmt: skip
        return out.splitlines(), read_events(output)


def read_events(output, kind=None):
    """The events in a run's metrics.jsonl, or those of one kind."""
    events = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if kind in (None, event["event"])]


def summarize(events, warmup):
    """Medians over the steps after the warm-up, the peaks, and on what it ran."""
    run = next(event for event in events if event["event"] == "run")
    steps = [event for event in events if event["event"] == "step"]
    measured = steps[warmup:]

    speeds = [round(event["tokens_per_second_per_gpu"]) for event in measured]

    def median(key):
        return statistics.median(event.get(key, 0) for event in measured)

    return {
        "tokens_per_second": round(median("tokens_per_second")),
        "tokens_per_second_per_gpu": round(median("tokens_per_second_per_gpu")),
        "slowest_and_fastest_step": [min(speeds), max(speeds)],  # tokens per second per GPU
        "samples_per_second": round((steps[-1]["samples_seen"] - steps[warmup - 1]["samples_seen"])
                                    / sum(event["step_time_s"] for event in measured), 2),
        "mfu": round(median("mfu"), 4),
        "step_time_s": round(median("step_time_s"), 4),
        "tokens_per_step": median("tokens"),
        "gpu_peak_gib": measured[-1].get("gpu_peak_gib"),
        "host_peak_gib": measured[-1]["host_peak_gib"],
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "hardware": run["hardware"],
        "versions": run["versions"],
    }  # fmt: skip


def keep(path, results):
    """Writes the results so far, so that a benchmark that is cut short loses only the variant at hand."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
