"""Training in fp16 on a GPU: loss scale, skipped steps, schedule, resuming and conversion of every engine loop.

    python tests/benchmarks/fp16.py --output tests/benchmarks/results/fp16.json

runs each configuration twice, for 30 steps and resumed from the checkpoint of step 10, and fails unless

- steps are skipped, and the loss scale settles: over the last ten steps it changes by a factor of 2 at most;
- a skipped step does not advance the learning rate;
- the resumed run has the loss scales, skipped steps and learning rates of the uninterrupted one, losses within 1e-3;
- `common.convert to-hf --verify` accepts the last checkpoint.

The initial loss scale is 2^28, so that the first steps overflow, and it doubles after 8 good steps, so that later ones
do: the shipped JSONs start from 2^16 and double after 1000. The model is a Llama of 100 M random parameters.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import bench

CONFIGS = {
    "zero 1": ("zero", "ds_zero1.json"),
    "zero 3": ("zero", "ds_zero3.json"),
    "offload 2": ("offload", "ds_zero2_offload.json"),
    "offload 3": ("offload", "ds_zero3_offload.json"),
    "pipeline": ("pipeline", "ds_pipeline.json"),
}
STEPS, SAVED = 30, 10
WINDOW = 8  # good steps after which the loss scale doubles
SAME = ("loss_scale", "skipped_steps", "lr")


def run(script, ds_config, gpus, model, text, output, *flags):
    """Trains and returns the `step` events."""
    bench.launch([
        *bench.deepspeed(gpus), bench.ROOT / script / "train.py", "--deepspeed_config", ds_config,
        "--model_name", model, "--dataset_name", text, "--precision", "fp16", "--learning_rate", "1e-4",
        "--warmup_steps", "10", "--num_epochs", "1", "--max_train_steps", STEPS, "--save_every", SAVED,
        "--max_length", "512", "--batch_size", "4", "--accum_steps", "4", "--max_eval_steps", "1",
        "--output_dir", output, *flags,
    ])  # fmt: skip
    return bench.read_events(output, "step")


def check(name, steps, resumed):
    """Exits unless the two runs are what the module's docstring says; returns the largest difference of a loss."""
    skipped_before = 0
    for step, following in itertools.pairwise(steps):
        if step["skipped_steps"] > skipped_before and following["lr"] != step["lr"]:
            sys.exit(f"{name}: step {step['step']} was skipped, but the learning rate moved on to {following['lr']}")
        skipped_before = step["skipped_steps"]
    scales = [step["loss_scale"] for step in steps]
    if not steps[-1]["skipped_steps"] or max(scales[-10:]) > 2 * min(scales[-10:]):
        sys.exit(f"{name}: the loss scale did not settle: {scales}")
    expected = steps[SAVED:]
    if [step["step"] for step in resumed] != [step["step"] for step in expected]:
        sys.exit(f"{name}: resumed steps {[step['step'] for step in resumed]}")
    for key in SAME:
        got, wanted = ([step[key] for step in some] for some in (resumed, expected))
        if got != wanted:
            sys.exit(f"{name}: {key} of the resumed run {got}, of the uninterrupted one {wanted}")
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(resumed, expected, strict=True))
    if difference > 1e-3:
        differences = [abs(a["loss"] - b["loss"]) for a, b in zip(resumed, expected, strict=True)]
        sys.exit(f"{name}: losses differ by {differences}")
    return difference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--only", choices=CONFIGS, action="append", help="run this configuration; may be repeated")
    parser.add_argument(
        "--output", type=Path, help="JSON file for the result; other configurations' results there stay"
    )
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        model, text = scratch / "llama-100m", scratch / "abstracts.jsonl"
        bench.make_model(model, "llama-100m")
        bench.write_text(text, (STEPS + 2) * 16 * 512 * args.num_gpus)
        for name in args.only or CONFIGS:
            script, config = CONFIGS[name]
            ds_config = json.loads((bench.ROOT / script / config).read_text())
            ds_config["fp16"] |= {"initial_scale_power": 28, "loss_scale_window": WINDOW}
            (scratch / "ds.json").write_text(json.dumps(ds_config))
            output, again = (scratch / f"{name} {part}".replace(" ", "_") for part in ("whole", "resumed"))
            launch = (script, scratch / "ds.json", args.num_gpus, model, text)
            steps = run(*launch, output)
            resumed = run(
                *launch, again, "--no-save_checkpoint", "--resume_from_checkpoint", output / f"global_step{SAVED}"
            )
            difference = check(name, steps, resumed)
            said = bench.launch([
                sys.executable, "-m", "common.convert", "to-hf", output / f"global_step{STEPS}",
                "--output_dir", scratch / "hf", "--overwrite", "--verify",
            ], cwd=bench.ROOT)  # fmt: skip
            event = bench.read_events(output, "run")[0]
            results[name] = {
                "gpus": args.num_gpus,
                **{key: [step[key] for step in steps] for key in ("loss", *SAME)},
                "resumed_loss": [step["loss"] for step in resumed],
                "largest_loss_difference": difference,
                "verify": next(line for line in said.splitlines() if line.startswith("verify:")),
                "hardware": event["hardware"],
                "versions": event["versions"],
            }
            print(
                f"{name}: loss scale {steps[0]['loss_scale']:,.0f} -> {steps[-1]['loss_scale']:,.0f}, "
                f"{steps[-1]['skipped_steps']} of {STEPS} steps skipped, loss {steps[0]['loss']:.3f} -> "
                f"{steps[-1]['loss']:.3f}, resumed within {difference:.1e} | {results[name]['verify']}",
                flush=True,
            )
            bench.keep(args.output, results)


if __name__ == "__main__":
    main()
