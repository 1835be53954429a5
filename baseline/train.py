"""The baseline: Hugging Face's Trainer without DeepSpeed, to compare with what the other directories do by hand.

    python baseline/train.py

runs anywhere, even without a GPU: a small BLOOM on generated questions. A real run:

    python baseline/train.py --model_name bigscience/bloom-560m --dataset_name rajpurkar/squad --end_idx 500

(`deepspeed`, `torchrun`, and `srun` with one task per GPU start it too. Trainer then trains data-parallel: every GPU
has the whole model, its gradients and its optimizer states.)

There is no loop to read here: Trainer has its own, which gives the same losses as ours. This script configures it, and
trainer.py has the few methods that it overrides.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerState, TrainingArguments

from baseline import checkpoints, trainer
from common import checkpoint, cli, data, deepspeed_config, distributed, models
from common.errors import UserError, one_line
from common.tracking import RunLog

SAMPLE_MODEL, SAMPLE_TEXT = "bloom", "questions"

LEARNING_RATE = 5e-5  # peak, for a pretrained model
# A question like those of the sample text; the model continues after "Answer:".
PROMPT = (
    "Question: How long is the River Helvale? Context: The River Helvale is a river in the east of Ashcombe county. "
    "It is 830 kilometres long. Answer:"
)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "baseline", learning_rate=LEARNING_RATE)
    cli.add_generation_arguments(parser, prompt=PROMPT)
    parser.add_argument(
        "--pad_to_max_length", action=argparse.BooleanOptionalAction, default=False,
        help="pad each row to --max_length; default: to the longest row of its micro-batch",
    )  # fmt: skip
    parser.set_defaults(output_dir="bloom-qa-finetuned", max_length=512, batch_size=4, accum_steps=4)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # ------------------------------------------------------------------- distributed set-up, Trainer's arguments
    device = distributed.set_device()
    dp_world_size = distributed.world_size()
    if dp_world_size == 1:
        # With it Trainer would wrap the model for data parallelism, which takes a second copy of the gradients.
        os.environ.pop("LOCAL_RANK", None)
    dtype, why = deepspeed_config.set_precision({"fp16": {"enabled": True}}, device, args.precision, "this script")
    learning_rate = cli.peak_learning_rate(args, pretrained=LEARNING_RATE)
    training = TrainingArguments(  # also starts the communication among ranks
        output_dir=args.output_dir,
        eval_strategy="epoch",
        save_strategy="epoch" if args.save_checkpoint else "no",
        save_total_limit=args.keep_last,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accum_steps,
        num_train_epochs=args.num_epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=1.0,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        activation_checkpointing=False,  # `gradient_checkpointing` before transformers 5
        push_to_hub=False,
        seed=args.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
    )
    if dp_world_size == 1:
        training._n_gpu = 1  # if a process sees several GPUs, Trainer would spread each micro-batch over them
    log = RunLog(args, "baseline")  # collective
    with distributed.raise_on_all_ranks():
        resume = checkpoints.find_checkpoint(args, log)
    # Not with `trainer.evaluate()` before `train()`: gradients of several ranks would then never be averaged.
    training.eval_on_start = resume is None
    log.info(why)

    # -------------------------------------------------------------------------------- model files and text to rows
    batch_sizes = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accum_steps,
        "train_batch_size": args.batch_size * args.accum_steps * dp_world_size,
    }
    with distributed.local_rank_zero_first():  # downloads and tokenizes; the others find the files in its cache
        info = models.inspect_model(args, SAMPLE_MODEL)
        text = data.load(args, info, SAMPLE_TEXT, batch_sizes, device, distributed.rank(), log, test=False)
    total_steps = min(args.num_epochs * text.train.steps_per_epoch, args.max_train_steps or sys.maxsize)
    training.max_steps = total_steps  # --max_train_steps would, on its own, take precedence over --num_epochs

    # ---------------------------------------------------------------------------------------------------- model
    with distributed.raise_on_all_ranks():
        checkpoints.check_disk(args, info.parameters, text.train.steps_per_epoch, total_steps)
        model = load_model(info).to(device)
    # Trainer's own optimizer exempts norms and biases from weight decay; the other directories do not.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=args.weight_decay, fused=True)

    # ---------------------------------------------------------------------------------------------------- train
    # What decides the steps of a run. Trainer would silently resume with other data or another learning rate.
    run_state = {**text.state, "learning_rate": learning_rate, "weight_decay": args.weight_decay}
    with distributed.raise_on_all_ranks():
        if resume is not None:
            checkpoint.check_same(resume, checkpoints.read_run_state(resume), run_state)
    start_step = TrainerState.load_from_json(f"{resume}/trainer_state.json").global_step if resume else 0
    log.start(info, None, text, dtype, start_step, total_steps)
    metrics = trainer.Metrics(log, text.train, args.save_every if args.save_checkpoint else None)
    # --max_eval_steps limits the evaluation to the first rows of the held-out text.
    eval_batches = text.held_out.eval_batches(args.max_eval_steps)
    eval_rows = range(sum(int((batch.row_numbers >= 0).sum()) for batch in eval_batches))
    if not eval_rows:  # the text is too short to hold any out
        training.eval_strategy, training.eval_on_start = "no", False
    train_set, held_out_set = (
        trainer.RowDataset(split.rows, text.packing, args.pad_to_max_length) for split in (text.train, text.held_out)
    )
    hf_trainer = trainer.OrderedTrainer(
        order=trainer.EpochOrder(text.train),
        run_state=run_state,
        model=model,
        args=training,
        data_collator=lambda micro_batch: micro_batch,  # the data sets collate
        train_dataset=train_set,
        eval_dataset=torch.utils.data.Subset(held_out_set, eval_rows),
        preprocess_logits_for_metrics=trainer.sum_by_row,
        compute_metrics=trainer.mean_over_tokens,
        optimizers=(optimizer, None),
        callbacks=[metrics],
        processing_class=info.tokenizer,  # saved with the model
    )
    distributed.set_seed(args.seed + distributed.rank())  # Trainer has just seeded all ranks identically
    hf_trainer.remove_callback(PrinterCallback)  # prints what `metrics` does
    if start_step >= total_steps:  # Trainer would train one more step
        log.finish()
        return

    try:
        hf_trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if resume is None or metrics.started is not None:
            raise
        # Trainer was still reading the checkpoint: what a damaged file raises depends on its format.
        raise UserError(f"--resume_from_checkpoint {resume} cannot be loaded: {one_line(error, 200)}") from error
    if args.save_checkpoint:  # an ordinary Hugging Face directory
        hf_trainer.save_model(args.output_dir)
        log.info(f"saved {args.output_dir}")

    log.info(*models.sample_text(model, info, args, text.chat_template))
    log.finish()
    trainer.log_table(log, hf_trainer.state)


def load_model(info: models.ModelInfo) -> PreTrainedModel:
    """The model in float32: mixed precision (`fp16=True`) uses these weights as its master weights.

    Raises:
        UserError: its files are damaged or incomplete.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            info.directory, config=info.config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a damaged file raises whatever the reader of its format does
        raise UserError(f"--model_name {info.directory} cannot be loaded: {one_line(error)}") from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"--model_name {info.directory} has no weights for {missing}")
    return model


if __name__ == "__main__":
    distributed.set_rank_variables()
    distributed.run(main)
