"""What Hugging Face's Trainer needs to log as the loops here do, and to go on from a checkpoint."""

import json
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from common import data, launch
from common.errors import UserError, one_line
from common.tracking import measure

RUN_STATE = "run_state.json"  # in each checkpoint, beside Trainer's own files


def find_checkpoint(args):
    """The `checkpoint-N` directory that --resume_from_checkpoint means, or None.

    Raises:
        UserError: there is none.
    """
    name = args.resume_from_checkpoint
    if name is None:
        return None
    directory = name
    if name == "latest":
        directory = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if directory is None or not (Path(directory) / "trainer_state.json").is_file():
        where = f"{args.output_dir} has no checkpoint-N" if name == "latest" else "it has no trainer_state.json"
        raise UserError(f"--resume_from_checkpoint {name}: {where}, so no checkpoint of Trainer's")
    try:
        TrainerState.load_from_json(Path(directory) / "trainer_state.json")
        json.loads((Path(directory) / RUN_STATE).read_text())
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"--resume_from_checkpoint {directory} cannot be read: {one_line(error, 200)}") from error
    return str(directory)


def read_run_state(directory):
    """What decided the steps of the run that saved this checkpoint."""
    return json.loads((Path(directory) / RUN_STATE).read_text())


class Metrics(TrainerCallback):
    """Writes what Trainer tells as the log lines and `metrics.jsonl` that the other directories write.

    Args:
        log: `RunLog`, which `begin` was called of.
        rows, global_batch_size: what is trained on, to count what each step held.
        guard: `Guard`.
        state: what decides the steps of the run, kept in every checkpoint.
    """

    def __init__(self, args, log, rows, global_batch_size, guard, device, state):
        self.args, self.log, self.rows, self.global_batch_size = args, log, rows, global_batch_size
        self.guard, self.device, self.state = guard, device, state
        self.samples_seen, self.started = 0, None
        self.eval_losses = {}  # by epoch

    def step_rows(self, number):
        """Row numbers of the optimizer step of that number, from 1."""
        epoch, step = divmod(number - 1, data.steps_in_epoch(self.rows, self.global_batch_size))
        return data.epoch_order(self.rows, self.global_batch_size, self.args.seed, epoch)[step]

    def on_train_begin(self, args, state, control, **kwargs):
        done = range(1, state.global_step + 1)
        self.samples_seen = sum(self.rows.count(self.step_rows(number)).samples for number in done)
        # Those from before a resume, too.
        self.eval_losses = {
            entry["epoch"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"]
        }
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        every = self.args.save_every
        control.should_save |= bool(self.args.save_checkpoint and every and state.global_step % every == 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return  # an evaluation, or Trainer's own summary
        seconds = time.perf_counter() - self.started  # Trainer has waited for the GPU: the loss is a number
        counts = self.rows.count(self.step_rows(state.global_step))
        self.samples_seen += counts.samples
        self.log.step(
            state.global_step, counts, loss=logs["loss"], lr=logs["learning_rate"], grad_norm=logs["grad_norm"],
            seconds=seconds, samples_seen=self.samples_seen, **measure(self.device),
        )  # fmt: skip
        self.guard.check(state.global_step, logs["loss"], logs["grad_norm"])
        self.started = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0:
            phase = "before"
        else:
            phase = "after" if state.global_step == state.max_steps else "epoch"
            self.eval_losses[state.epoch] = metrics["eval_loss"]
        self.log.eval(
            step=state.global_step,
            epoch=state.epoch or 0.0,
            phase=phase,
            loss=metrics["eval_loss"],
            perplexity=torch.tensor(metrics["eval_loss"]).exp().item(),
            tokens=metrics["eval_tokens"],
            samples_per_second=metrics["eval_samples_per_second"],
        )
        self.started = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if launch.rank() == 0:
            (directory / RUN_STATE).write_text(json.dumps(self.state, indent=2))
        self.log.say(f"saved {directory}")
        self.started = time.perf_counter()


def log_table(log, metrics):
    """Prints the workshop's table, filled in."""
    losses = {f"Eval Loss (Epoch {epoch:g})": f"{loss:.4f}" for epoch, loss in metrics.eval_losses.items()}
    rows = {
        "Train Loss (Final)": f"{log.last_step['loss']:.4f}",
        **losses,
        "Training Speed (samples/sec)": f"{log.trained_samples / log.trained_seconds:.2f}",
        "Evaluation Speed (samples/sec)": f"{log.last_eval.get('samples_per_second', 0):.2f}",
        "Steps per Epoch": log.steps_per_epoch,
    }
    log.say("| Metric | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()))
