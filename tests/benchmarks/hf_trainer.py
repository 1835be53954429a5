"""Hugging Face's Trainer on the rows that the shipped scripts train on: what one would otherwise run.

    deepspeed --num_gpus=1 tests/benchmarks/hf_trainer.py --model_name DIR --dataset_name FILE \\
        --deepspeed_config zero/ds_zero2.json --batch_size 8 --accum_steps 8 --steps 8 --output result.json

The same DeepSpeed JSON, model, packed rows and micro-batch. The batch keys and the learning rate come from the
flags as in the scripts; an optimizer that is offloaded has to stand in the JSON, where Trainer makes its own
otherwise. `--liger` turns on Trainer's own switch for liger-kernel, which its users may not know.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import bench
import deepspeed
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from common import cli, deepspeed_config
from common.documents import load_documents
from common.tokens import load_rows, tokenize


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """The time of each optimizer step, with the GPU waited for at both ends."""

    def __init__(self):
        self.seconds, self.losses, self.started = [], [], None

    def on_step_begin(self, *args, **kwargs):
        self.started = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--deepspeed_config", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--accum_steps", type=int, required=True)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not measured")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    ds_config = deepspeed_config.load(args.deepspeed_config)
    deepspeed_config.resolve_batch_size(ds_config, 1, args.batch_size, args.accum_steps)
    ds_config.pop("fp16")
    ds_config["bf16"]["enabled"] = torch.cuda.is_available()
    if "offload_optimizer" in ds_config["zero_optimization"]:
        auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        ds_config["optimizer"] = {"type": "AdamW", "params": auto}
    training = TrainingArguments(
        output_dir=str(args.output.with_suffix("")),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accum_steps,
        max_steps=args.steps,
        learning_rate=1e-4,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        use_liger_kernel=args.liger,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        deepspeed=ds_config,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    tokens = tokenize(load_documents(args.dataset_name).train, tokenizer, args.max_length, "text", None)
    rows = load_rows(tokens, args.max_length, packing=True)
    real = rows.totals.tokens / len(rows)
    model = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.bfloat16, use_cache=False)
    clock = Clock()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=list(range(len(rows))),
        data_collator=rows.collate,
        callbacks=[clock],
    )
    trainer.train()
    seconds = statistics.median(clock.seconds[args.warmup :])
    tokens = real * args.batch_size * args.accum_steps
    result = {
        "tokens_per_second": round(tokens / seconds),
        "step_time_s": round(seconds, 4),
        "tokens_per_step": round(tokens),
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / bench.GIB,
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / bench.GIB,
        "losses": clock.losses,
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "deepspeed": deepspeed.__version__,
        },
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
