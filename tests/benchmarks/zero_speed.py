"""Speed and memory of zero/train.py and offload/train.py beside Hugging Face's Trainer under the same DeepSpeed JSON.

    python tests/benchmarks/zero_speed.py --output tests/benchmarks/results/zero.json

launches the shipped scripts, and tests/benchmarks/hf_trainer.py, once a variant: the Llama-3.2-1B shape with random
weights, generated text in packed rows of 1024, bf16, 65,536 tokens a step in 8 micro-batches of 8 rows, one GPU.
Further variants are a GPU cut down to 15 GiB, the plan of 4 documents of about 207 tokens a step, and a model of
8.0 B parameters on two GPUs cut down to 12 GiB (`--only "8B, 2 x 12 GiB"`, which is not run otherwise).

A step is timed from before its first micro-batch to after the optimizer, GPU waited for; medians over the steps after
the warm-up; tokens are real ones.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import bench


class Variant(NamedTuple):
    script: str  # "zero", "offload" or "trainer"
    flags: str
    gpus: int = 1
    shape: str = "llama-1b"
    joined: tuple = (1,)  # abstracts to a document
    on_request: bool = False


ROWS = "--max_length 1024 --batch_size 8 --accum_steps 8"
CONFIGS = {f"zero {stage}": f"zero/ds_zero{stage}.json" for stage in (1, 2, 3)}
CONFIGS |= {f"offload {stage}": f"offload/ds_zero{stage}_offload.json" for stage in (1, 2, 3)}
LIKE_207 = (1, 2, 2, 1, 2, 1, 2)
VARIANTS = {
    **{name: Variant(name.split()[0], f"--deepspeed_config {path} {ROWS}") for name, path in CONFIGS.items()},
    **{f"Trainer, {name}": Variant("trainer", f"--deepspeed_config {path} {ROWS}") for name, path in CONFIGS.items()},
    "Trainer with liger, zero 2": Variant("trainer", f"--deepspeed_config {CONFIGS['zero 2']} {ROWS} --liger"),
    **{
        f"zero {stage}, {gpus} GPU{'s' * (gpus > 1)}": Variant(
            "zero", f"--deepspeed_config {CONFIGS[f'zero {stage}']} {ROWS}", gpus, on_request=True
        )
        for stage in (1, 2, 3)
        for gpus in (1, 2)
    },
    "zero 2, 16 rows": Variant("zero", "--max_length 1024 --batch_size 16 --accum_steps 4"),
    "offload 2, 15 GiB": Variant("offload", "--max_length 1024 --batch_size 64 --accum_steps 1 --gpu_memory 15"),
    "4 documents, packed": Variant(
        "offload", "--max_length 880 --batch_size 1 --accum_steps 1 --gpu_memory 15", joined=LIKE_207
    ),
    "4 documents, padded": Variant(
        "offload", "--max_length 384 --no-packing --batch_size 1 --accum_steps 4 --gpu_memory 15", joined=LIKE_207
    ),
    "4 rows of documents": Variant(
        "offload", "--max_length 1024 --batch_size 1 --accum_steps 4 --gpu_memory 15", joined=LIKE_207
    ),
    "8B, 2 x 12 GiB": Variant(
        "offload",
        "--deepspeed_config offload/ds_zero3_offload.json --max_length 1024 --batch_size 8 --accum_steps 1 "
        "--warmup_steps 4 --gpu_memory 12 --host_memory 240",
        gpus=2,
        shape="llama-8b",
        on_request=True,
    ),
}


def measure(variant, model, text, steps, warmup):
    """Launches a variant; returns its figures and what it said about its plan."""
    if variant.script != "trainer":
        flags = f"{variant.flags} --max_train_steps {steps} --generation_prompt ''"
        lines, events = bench.train(variant.script, flags, variant.gpus, model, text)
        said = ("kernels", "attention:", "activation", "fused", "gradients", "optimizer on", "measured", "batch:")
        return {"said": [line for line in lines if line.startswith(said)], **bench.summarize(events, warmup)}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "result.json"
        bench.launch([
            *bench.deepspeed(1), Path(__file__).with_name("hf_trainer.py"), "--model_name", model,
            "--dataset_name", text, "--steps", steps, "--warmup", warmup, "--output", output,
            *shlex.split(variant.flags),
        ])  # fmt: skip
        return json.loads(output.read_text())


def compare(results):
    """Lines that set each configuration beside Trainer's run of it."""
    for name in CONFIGS:
        ours, theirs = results.get(name), results.get(f"Trainer, {name}")
        if ours and theirs:
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            memory = ours["gpu_peak_gib"] / theirs["gpu_peak_gib"]
            yield (
                f"{name}: {ours['tokens_per_second']:,} tok/s, Trainer {theirs['tokens_per_second']:,}: {speed:.2f} x; "
                f"peak {ours['gpu_peak_gib']:.1f} GiB, Trainer {theirs['gpu_peak_gib']:.1f}: {memory:.2f} x"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a variant; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=4, help="of these not measured; default: %(default)s")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="measure this variant; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON file for the result; other variants' results there stay")
    args = parser.parse_args()
    if args.warmup >= args.steps:
        sys.exit("--warmup leaves no step to measure")
    chosen = args.only or [name for name, variant in VARIANTS.items() if not variant.on_request]
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            variant = VARIANTS[name]
            model = Path(scratch) / variant.shape
            if not model.exists():
                bench.make_model(model, variant.shape)
            text = Path(scratch) / f"{len(variant.joined)}.jsonl"
            if not text.exists():
                bench.write_text(text, (args.steps + 1) * 2 * 65536, variant.joined)
            results[name] = {
                "flags": variant.flags, "gpus": variant.gpus, **measure(variant, model, text, args.steps, args.warmup),
            }  # fmt: skip
            shown = results[name]
            print(
                f"{name}: {shown['tokens_per_second']:,} tok/s | {shown['step_time_s']:.3f} s a step | "
                f"{shown.get('samples_per_second', 0):.1f} documents/s | "
                f"GPU peak {shown['gpu_peak_gib'] or 0:.1f} GiB | host peak {shown['host_peak_gib']:.1f} GiB",
                flush=True,
            )
            bench.keep(args.output, results)
    print(*compare(results), sep="\n")


if __name__ == "__main__":
    main()
