"""Speed and memory of pipeline/train.py on the Llama-3.2-1B shape: random weights, generated text, 2 GPUs.

    python tests/benchmarks/pipeline_speed.py --output tests/benchmarks/results/pipeline.json

launches the shipped script once a variant and reads its metrics.jsonl. Each step is 131,072 tokens (128 rows of
1024), bf16, in micro-batches of 4 or 8 rows. `zero1` is the same script with one stage, that is ZeRO-1 data
parallelism, at the same batch.

    python tests/benchmarks/pipeline_speed.py --try "--partition 11,5 --batch_size 8 --accum_steps 16"

measures flags of your own instead, `--only "zero1, liger"` one variant; results join those in the output file.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import bench

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
# The README's and the seed's command on two T4s.
T4 = "--num_stages 2 --batch_size 2 --accum_steps 16 --no-liger --gpu_memory 13.5"
VARIANTS |= {
    "as on two T4s, 1024 tokens": f"{T4}",
    "as on two T4s, 512 tokens": f"{T4} --max_length 512",
}


# How the lines begin that say what a run does.
SAID = ("stage ", "kernels", "attention", "activation", "precision")


def measure(name, flags, gpus, model, text, steps, warmup):
    """Launches pipeline/train.py and returns the medians of its steps after the warm-up."""
    wrapper = [Path(__file__).with_name("as_t4.py")] if name.startswith("as on two T4s") else []
    options = f"--max_length 1024 --max_train_steps {steps} {flags}"
    lines, events = bench.train("pipeline", options, gpus, model, text, wrapper)
    measured = [event for event in events if event["event"] == "step"][warmup:]
    return {
        "flags": flags,
        "split": [line for line in lines if line.startswith(SAID)],
        **bench.summarize(events, warmup),
        "stages": [
            {
                "busy": round(statistics.median(event["stages"][stage]["busy"] for event in measured), 4),
                "gpu_peak_gib": measured[-1]["stages"][stage]["gpu_peak_gib"],
                "host_peak_gib": measured[-1]["stages"][stage]["host_peak_gib"],
            }
            for stage in range(len(measured[-1]["stages"]))
        ],
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
        bench.make_model(model)
        bench.write_text(text, args.steps * 131072)
        for name, flags in variants.items():
            results[name] = measure(name, flags, args.num_gpus, model, text, args.steps, args.warmup)
            shown = results[name]
            peaks = ", ".join(f"{stage['gpu_peak_gib'] or 0:.1f}" for stage in shown["stages"])
            busy = ", ".join(f"{stage['busy']:.0%}" for stage in shown["stages"])
            print(
                f"{name}: {shown['tokens_per_second_per_gpu']:,} tok/s/gpu | mfu {shown['mfu']:.1%} | "
                f"{shown['step_time_s']:.3f} s | busy {busy} | peak {peaks} GiB",
                flush=True,
            )
            bench.keep(args.output, results)


if __name__ == "__main__":
    main()
