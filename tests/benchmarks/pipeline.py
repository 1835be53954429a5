"""Speed and memory of pipeline/train.py on the Llama-3.2-1B shape: random weights, generated text, 2 GPUs.

    python tests/benchmarks/pipeline.py --output tests/benchmarks/results/pipeline.json

launches the shipped script once a variant and reads its metrics.jsonl. Each step is 131,072 tokens (128 rows of
1024), bf16, in micro-batches of 4 or 8 rows. `zero1` is the same script with one stage, that is ZeRO-1 data
parallelism, at the same batch.

    python tests/benchmarks/pipeline.py --try "--partition 11,5 --batch_size 8 --accum_steps 16"

measures flags of your own instead, `--only "zero1, liger"` one variant; results join those in the output file.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import sample

VARIANTS = {
    "pipeline": "--num_stages 2 --batch_size 4 --accum_steps 32 --compile",
    "pipeline, 8 rows": "--num_stages 2 --batch_size 8 --accum_steps 16 --compile",
    "zero1, 8 rows": "--num_stages 1 --batch_size 8 --accum_steps 8 --compile",
    "zero1": "--num_stages 1 --batch_size 4 --accum_steps 16 --compile",
    "pipeline, liger": "--num_stages 2 --batch_size 4 --accum_steps 32",
    "pipeline, liger, 8 rows": "--num_stages 2 --batch_size 8 --accum_steps 16",
    "zero1, liger": "--num_stages 1 --batch_size 4 --accum_steps 16",
    "zero1, liger, 8 rows": "--num_stages 1 --batch_size 8 --accum_steps 8",
    "pipeline, liger, uniform split": "--num_stages 2 --batch_size 4 --accum_steps 32 --partition uniform",
}


def make_model(directory):
    """A Llama of Llama-3.2-1B's shape with random bf16 weights, and the sample's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("llama"))
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def measure(flags, gpus, model, text, steps, warmup):
    """Launches pipeline/train.py and returns the medians of its steps after the warm-up."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            "deepspeed", f"--num_gpus={gpus}", str(ROOT / "pipeline" / "train.py"), "--model_name", str(model),
            "--dataset_name", str(text), "--max_length", "1024", "--learning_rate", "1e-4", "--num_epochs", "1",
            "--max_train_steps", str(steps), "--max_eval_steps", "1", "--no-save_checkpoint",
            "--output_dir", output, *shlex.split(flags),
        ]  # fmt: skip
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"{' '.join(command)}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}")
        events = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
        said = [line for line in finished.stdout.splitlines() if line.startswith(("stage ", "kernels", "attention"))]
    run = next(event for event in events if event["event"] == "run")
    measured = [event for event in events if event["event"] == "step"][warmup:]

    def median(value):
        return statistics.median(value(event) for event in measured)

    return {
        "flags": flags,
        "split": said,
        "tokens_per_second_per_gpu": round(median(lambda event: event["tokens_per_second_per_gpu"])),
        "mfu": round(median(lambda event: event.get("mfu", 0)), 4),
        "step_time_s": round(median(lambda event: event["step_time_s"]), 4),
        "tokens_per_step": median(lambda event: event["tokens"]),
        "stages": [
            {
                "busy": round(median(lambda event, stage=stage: event["stages"][stage]["busy"]), 4),
                "gpu_peak_gib": measured[-1]["stages"][stage]["gpu_peak_gib"],
                "host_peak_gib": measured[-1]["stages"][stage]["host_peak_gib"],
            }
            for stage in range(len(measured[-1]["stages"]))
        ],
        "first_loss": events[2]["loss"],
        "last_loss": measured[-1]["loss"],
        "hardware": run["hardware"],
        "versions": run["versions"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps a variant; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=5, help="of these not measured; default: %(default)s")
    parser.add_argument("--try", dest="flags", action="append", help="measure these flags instead; may be repeated")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="measure this variant; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    variants = {flags: flags for flags in args.flags or ()} or {name: VARIANTS[name] for name in args.only or VARIANTS}
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        model, text = Path(scratch) / "llama-1b", Path(scratch) / "abstracts.jsonl"
        make_model(model)
        # About 132 tokens a document.
        sample.write_documents(text, "abstracts", args.steps * 131072 // 120, seed=1)
        for name, flags in variants.items():
            results[name] = measure(flags, args.num_gpus, model, text, args.steps, args.warmup)
            shown = results[name]
            peaks = ", ".join(f"{stage['gpu_peak_gib'] or 0:.1f}" for stage in shown["stages"])
            busy = ", ".join(f"{stage['busy']:.0%}" for stage in shown["stages"])
            print(
                f"{name}: {shown['tokens_per_second_per_gpu']:,} tok/s/gpu | mfu {shown['mfu']:.1%} | "
                f"{shown['step_time_s']:.3f} s | busy {busy} | peak {peaks} GiB",
                flush=True,
            )
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
