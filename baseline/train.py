"""The baseline: Hugging Face's Trainer without DeepSpeed, to compare with what the other directories do by hand.

    python baseline/train.py

runs anywhere, without a GPU too: a small BLOOM on generated questions. The real thing:

    python baseline/train.py --model_name bigscience/bloom-560m --dataset_name rajpurkar/squad --end_idx 500

(`deepspeed`, `torchrun` and `srun` with a task a GPU start it too; Trainer then trains data-parallel, each GPU with the
whole model, its gradients and optimizer states.)

There is no loop to read here: Trainer has it, with the same losses as ours. This script says what to train on what, and
has a callback write the metrics that the other directories write.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from common import attention, checkpoint, cli, data, deepspeed_config, generate, launch, models, sample
from common.errors import UserError, one_line
from common.tracking import Guard, RunLog
from common.trainer import Metrics, check_disk, check_loaded, find_checkpoint, log_table, read_run_state, saving

LEARNING_RATE = 5e-5  # peak, for a pretrained model
# A question as those of the sample; what follows "Answer:" is the model's.
PROMPT = (
    "Question: How long is the River Helvale? Context: The River Helvale is a river in the east of Ashcombe county. "
    "It is 830 kilometres long. Answer:"
)


def parse_args():
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "baseline", learning_rate=LEARNING_RATE)
    cli.add_generation_arguments(parser, prompt=PROMPT)
    parser.add_argument(
        "--pad_to_max_length", action=argparse.BooleanOptionalAction, default=False,
        help="pad each row to --max_length; default: to the longest row of its micro-batch",
    )  # fmt: skip
    parser.set_defaults(output_dir="bloom-qa-finetuned", max_length=512, batch_size=4, accum_steps=4)
    return parser.parse_args()


def load_model(directory, config):
    """The model in float32, which mixed precision (`fp16=True`) takes for its master weights."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # a damaged file is whatever the reader of its format raises
        raise UserError(f"--model_name {directory} cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"--model_name {directory} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    return model


def save_model(trainer, tokenizer, output_dir):
    """Model and tokenizer as an ordinary Hugging Face directory."""
    trainer.save_model(output_dir)
    if launch.rank() == 0:
        tokenizer.save_pretrained(output_dir)


def main():
    args = parse_args()
    # --------------------------------------------------------------------------- distributed set-up and seed
    device = launch.set_device()
    if launch.world_size() == 1:
        # With it Trainer would wrap the model for data parallelism among one, with a second copy of the gradients.
        os.environ.pop("LOCAL_RANK", None)
    launch.set_seed(args.seed)
    dtype, why = deepspeed_config.set_precision({"fp16": {"enabled": True}}, device, args.precision, "the workshop")
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
        activation_checkpointing=False,  # called gradient_checkpointing before transformers 5
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
    if launch.world_size() == 1:
        training._n_gpu = 1  # where a process sees several GPUs, Trainer would spread each micro-batch over them
    log = RunLog(args, "baseline")
    with launch.all_ranks_agree():
        resume = find_checkpoint(args, log.say)
    # Not by `trainer.evaluate()` before `train()`: with several ranks their gradients are then never averaged.
    training.eval_on_start = resume is None
    dp_world_size = launch.world_size()
    global_batch_size = args.batch_size * args.accum_steps * dp_world_size
    equation = deepspeed_config.describe_batch(args.batch_size, args.accum_steps, dp_world_size, args.max_length)
    log.say(equation, why)

    # ------------------------------------------------------------------------------------ tokenizer and data
    model_directory = launch.first_then_others(lambda: models.model_directory(args.model_name, "bloom"))
    with launch.all_ranks_agree():
        config, tokenizer = models.load_config_and_tokenizer(model_directory, args.max_length)
        generate.check(args, config, tokenizer)
        args.packing = attention.choose_packing(config, args.packing)
    train_rows, eval_rows = launch.first_then_others(lambda: data.load_rows(args, tokenizer, "questions"))
    models.check_vocabulary(tokenizer, (train_rows, eval_rows), config.vocab_size)
    log.say(data.describe("train", train_rows), data.describe("held out", eval_rows))
    steps_per_epoch = data.steps_in_epoch(train_rows, global_batch_size)
    total_steps = min(args.num_epochs * steps_per_epoch, args.max_train_steps or sys.maxsize)
    if args.max_train_steps:  # which Trainer would reach in more epochs than --num_epochs
        training.max_steps = total_steps

    # ------------------------------------------------------------------------------------------------- model
    with launch.all_ranks_agree():
        model = load_model(model_directory, config).to(device)
    model.config.use_cache = False
    parameters, matmul_parameters = models.count_parameters(models.on_meta(config))
    with launch.all_ranks_agree():
        check_disk(args, parameters, steps_per_epoch, total_steps)
    model_name = checkpoint.model_name(args, None, model_directory)
    log.run(None, model_name, sample.full_name(args.dataset_name, "questions"), parameters)
    log.say(f"model: {config.model_type}, {parameters:,} parameters")

    # --------------------------------------------------------------------------------------------- optimizer
    # Trainer's own would spare norms and biases the weight decay, which the other directories do not.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=args.weight_decay, fused=True)

    # ------------------------------------------------------------------------------------------------- train
    global_step = TrainerState.load_from_json(f"{resume}/trainer_state.json").global_step if resume else 0
    guard = Guard(dtype == torch.float16, global_step, optimizer)
    # What decides the steps of a run: Trainer would go on with other data or another rate without a word.
    state = data.data_state(args, train_rows, global_batch_size)
    state |= {"learning_rate": learning_rate, "weight_decay": args.weight_decay}
    with launch.all_ranks_agree():
        if resume is not None:
            checkpoint.check_same(resume, read_run_state(resume), state)
    metrics = Metrics(args, log, train_rows, global_batch_size, guard, device)
    evaluated = data.eval_batches(eval_rows, args.batch_size * dp_world_size, args.accum_steps)[: args.max_eval_steps]
    evaluated = [row for batch in evaluated for row in batch if row >= 0]
    if not evaluated:  # the text has none to hold out
        training.eval_strategy, training.eval_on_start = "no", False
    trainer = TokenWeightedTrainer(
        order=data.EpochOrder(train_rows, global_batch_size, args.seed),
        run_state=state,
        model=model,
        args=training,
        data_collator=Collator(args),
        train_dataset=data.RowDataset(train_rows),
        eval_dataset=torch.utils.data.Subset(data.RowDataset(eval_rows), evaluated),
        preprocess_logits_for_metrics=sum_by_row,
        compute_metrics=mean_over_tokens,
        optimizers=(optimizer, None),
        callbacks=[metrics],
        processing_class=tokenizer,  # which each checkpoint then has beside the weights
    )
    launch.set_seed(args.seed + launch.rank())  # Trainer has just seeded all ranks identically
    trainer.remove_callback(PrinterCallback)  # prints what `metrics` does
    log.begin(global_step, total_steps, steps_per_epoch, config, matmul_parameters)
    if global_step >= total_steps:  # Trainer would train one step more
        log.close()
        return

    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if resume is None or metrics.started is not None:
            raise
        # It is still reading the checkpoint: what a damaged file raises depends on its format.
        raise UserError(f"--resume_from_checkpoint {resume} cannot be loaded: {one_line(error, 200)}") from error
    if args.save_checkpoint:
        save_model(trainer, tokenizer, args.output_dir)
        log.say(f"saved {args.output_dir}")

    # ------------------------------------------------------------------------------------------- sample text
    if args.generation_prompt:
        text = model.generate(**generate.prepare(model, tokenizer, args, device))
        log.say(tokenizer.decode(text[0], skip_special_tokens=True))
    log.close()
    log_table(log, metrics)


class Collator:
    """A micro-batch of rows as arguments for the model: labels are -100 for padding, known by its place."""

    def __init__(self, args):
        self.packing, self.pad_to_max_length = args.packing, args.pad_to_max_length

    def __call__(self, items):
        rows, numbers = data.RowDataset.collate(items)
        width = rows.max_length if self.pad_to_max_length else rows.width(numbers)
        batch = {key: tensor[:, :width] for key, tensor in rows.collate(numbers).items()}
        if not self.packing:
            del batch["position_ids"]  # one document a row: they count up, which is what a model does without them
        return batch


class TokenWeightedTrainer(Trainer):
    """Trainer on the rows in the order of the other directories, with an evaluation in which every token counts alike.

    Trainer weights the tokens of a training step alike by itself.
    """

    def __init__(self, *args, order, run_state, **kwargs):
        super().__init__(*args, **kwargs)
        self.order, self.run_state = order, run_state

    def _get_train_sampler(self, train_dataset=None):
        return self.order

    def _save_checkpoint(self, model, trial):
        with saving(self.args.output_dir, self.state.global_step, self.run_state):
            super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result):
        check_loaded(self.model, load_result.missing_keys)  # Trainer would go on without

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        # What Trainer puts there is the mean of the batches' means, where a token of a short batch weighs more.
        output.metrics["eval_loss"] = output.metrics.pop("eval_mean_over_tokens")
        return output


def sum_by_row(logits, labels):
    """What evaluation keeps of a batch's logits [B, T, V]: each row's sum of token losses and its targets, [B, 2]."""
    sums = [
        nn.functional.cross_entropy(row[:-1].float(), target[1:], ignore_index=-100, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(sums).double(), (labels[:, 1:] != -100).sum(1).double()], dim=1)


def mean_over_tokens(prediction):
    loss_sum, targets = prediction.predictions.sum(axis=0)
    return {"mean_over_tokens": loss_sum / targets, "tokens": int(targets)}


if __name__ == "__main__":
    launch.set_rank_variables()
    launch.run(main)
