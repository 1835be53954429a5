"""The workshop's comparison: Trainer, ZeRO 1 to 3 and offload on one task, with BLOOM-560m's shape on one GPU.

    python tests/benchmarks/baseline_speed.py --dataset_name rajpurkar/squad --tokenizer bigscience/bloom-560m

launches the shipped scripts on questions (a Hub name or a local file of SQuAD's columns): a BLOOM of bloom-560m's
shape with random weights, rows of at most 512 tokens, padded, 4 x 4 rows a step, bf16. Then `common.report` makes the
table and the pictures; `--output_dir` (default tests/benchmarks/results/workshop) gets them and the figures as JSON,
beside those of earlier runs there.

The variants take turns for `--rounds` rounds, and of each the round with the median step counts: steps this short wait
for the processor more than for the GPU, and a shared machine's is not equally fast all the time.

`baseline` pads as `zero/` does, to the longest row of a micro-batch; `baseline, 512` pads each row to 512 tokens, as
the workshop did.
"""

import argparse
import itertools
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import bench

VARIANTS = {
    "baseline": "baseline/train.py",
    "zero 1": "zero/train.py --deepspeed_config zero/ds_zero1.json --compile",
    "zero 1, not compiled": "zero/train.py --deepspeed_config zero/ds_zero1.json",
    "zero 2": "zero/train.py --deepspeed_config zero/ds_zero2.json --compile",
    "zero 3": "zero/train.py --deepspeed_config zero/ds_zero3.json",
    "offload 1": "offload/train.py --deepspeed_config offload/ds_zero1_offload.json --compile",
    "offload 2": "offload/train.py --deepspeed_config offload/ds_zero2_offload.json --compile",
    "offload 3": "offload/train.py --deepspeed_config offload/ds_zero3_offload.json",
    "baseline, 512": "baseline/train.py --pad_to_max_length",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="questions with SQuAD's columns")
    parser.add_argument("--tokenizer", required=True, help="Hub name or directory of the tokenizer to read them with")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a variant; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=10, help="of these not measured; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="how often to measure each; default: %(default)s")
    parser.add_argument("--shape", choices=bench.SHAPES, default="bloom-560m", help="default: %(default)s")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="measure this variant; may be repeated")
    parser.add_argument("--output_dir", type=Path, default=bench.ROOT / "tests/benchmarks/results/workshop")
    args = parser.parse_args()
    if args.warmup >= args.steps:
        sys.exit("--warmup leaves no step to measure")
    args.output_dir = args.output_dir.resolve()
    kept = args.output_dir / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    dataset = Path(args.dataset_name).resolve() if Path(args.dataset_name).exists() else args.dataset_name
    taken = {}  # by variant, each round's step time, run directory and figures
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        bench.make_model(scratch / args.shape, args.shape, args.tokenizer)
        for number, name in itertools.product(range(args.rounds), args.only or VARIANTS):
            script, *flags = shlex.split(VARIANTS[name])
            flags = [bench.ROOT / flag if flag.endswith(".json") else flag for flag in flags]
            run = scratch / str(number) / name
            command = [
                "deepspeed", "--num_gpus=1", bench.ROOT / script, *flags, "--model_name", args.shape,
                "--dataset_name", dataset, "--max_length", 512, "--no-packing", "--batch_size", 4,
                "--accum_steps", 4, "--learning_rate", "5e-5", "--max_train_steps", args.steps, "--max_eval_steps", 4,
                "--precision", "bf16", "--no-save_checkpoint", "--generation_prompt", "", "--output_dir", run,
            ]  # fmt: skip
            # From there, so that the model has one name in all calls, whose runs the report compares.
            bench.launch(command, cwd=scratch)
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            shown = bench.summarize(events, args.warmup)
            print(
                f"{name}: {shown['tokens_per_second']:,} tok/s | {shown['step_time_s']:.3f} s a step | "
                f"GPU peak {shown['gpu_peak_gib'] or 0:.1f} GiB | loss {shown['first_loss']:.4f} -> "
                f"{shown['last_loss']:.4f}",
                flush=True,
            )
            rounds = taken.setdefault(name, [])
            rounds.append((shown["step_time_s"], run, shown))
            _, median_run, median = sorted(rounds, key=lambda entry: entry[0])[len(rounds) // 2]
            step_times = [step_time for step_time, *_ in rounds]
            results[name] = {"flags": VARIANTS[name], "step_time_s_of_rounds": step_times, **median}
            bench.keep(kept, results)
            shutil.rmtree(args.output_dir / "runs" / name, ignore_errors=True)
            shutil.copytree(median_run, args.output_dir / "runs" / name)
    runs = [args.output_dir / "runs" / name for name in VARIANTS]
    command = [sys.executable, "-m", "common.report", *filter(Path.exists, runs), "--output_dir", args.output_dir]
    bench.launch(command, cwd=bench.ROOT)


if __name__ == "__main__":
    main()
