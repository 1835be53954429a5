"""What Hugging Face's Trainer needs to log as the loops here do, and to go on from a checkpoint."""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from common import data, launch
from common.checkpoint import check_places, steps_that_save
from common.errors import UserError, one_line
from common.manifest import check_space
from common.tracking import measure

RUN_STATE = "run_state.json"  # in each checkpoint, beside Trainer's own files
# What Trainer needs to go on where it was; of some it lacks it would begin anew without a word. The last that it writes
# is trainer_state.json.
PARTS = ("trainer_state.json", RUN_STATE, "model.safetensors*", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
BYTES_PER_PARAMETER = 12  # of a checkpoint: the weight and Adam's two moments in float32


# ------------------------------------------------------------------------------------------------ checkpoints


def check_disk(args, parameters, steps_per_epoch, total_steps):
    """Raises UserError where --output_dir has no room for what a run will save, or no place under its name."""
    if not args.save_checkpoint or launch.rank() != 0:
        return
    check_places(args.output_dir, Path(args.output_dir).glob("checkpoint-*"))
    steps, _ = steps_that_save(args, steps_per_epoch, total_steps)
    count = min(len(steps), args.keep_last + 1) if args.keep_last else len(steps)
    needed = (count * BYTES_PER_PARAMETER + 4) * parameters  # and the model by itself at the end
    check_space(
        args.output_dir, needed, f"for {count} checkpoints of {parameters:,} parameters (--keep_last keeps fewer)"
    )


@contextmanager
def saving(output_dir, global_step, run_state):
    """Has Trainer save a checkpoint that is there as a whole or, where it fails, not at all.

    Args:
        run_state: what decides the steps of the run, kept with it.

    Raises:
        UserError: it cannot be written.
    """
    directory = Path(output_dir) / f"checkpoint-{global_step}"
    try:
        if launch.rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            # Without it what an earlier run has saved here counts as incomplete until Trainer writes it anew.
            (directory / "trainer_state.json").unlink(missing_ok=True)
            (directory / RUN_STATE).write_text(json.dumps(run_state, indent=2))
        yield
    except Exception as error:  # a full disk is whatever the writer of the format raises
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(
            f"{directory} cannot be saved ({free / 1e9:.3g} GB are free): {one_line(error, 200)}; checkpoints saved "
            "before are untouched"
        ) from error


def find_checkpoint(args, say):
    """The `checkpoint-N` directory that --resume_from_checkpoint means, or None.

    Args:
        say: called with a line for each newer one that was not saved to its end.

    Raises:
        UserError: there is none.
    """
    name = args.resume_from_checkpoint
    if name is None:
        return None
    if name != "latest":
        problem = incomplete(Path(name))
        if problem:
            raise UserError(f"--resume_from_checkpoint {name}: {problem}, so no whole checkpoint of Trainer's")
        return name
    numbered = {}
    for path in Path(args.output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            numbered[int(number)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        problem = incomplete(path)
        if not problem:
            return str(path)
        say(f"{path} is passed over: {problem}")
    if not numbered:
        raise UserError(f"--resume_from_checkpoint latest: {args.output_dir} has no checkpoint-N")
    raise UserError(f"--resume_from_checkpoint latest: none of the {len(numbered)} in {args.output_dir} is whole")


def incomplete(directory):
    """Why Trainer could not go on from there, or None."""
    for part in PARTS:
        if not any(directory.glob(part)):
            return f"it has no {part}"
    try:
        step = TrainerState.load_from_json(directory / "trainer_state.json").global_step
        if not isinstance(step, int) or not isinstance(read_run_state(directory), dict):
            return f"its trainer_state.json or {RUN_STATE} is damaged"
    except (OSError, TypeError, ValueError) as error:
        return f"its state cannot be read: {one_line(error, 200)}"
    return None


def read_run_state(directory):
    """What decided the steps of the run that saved this checkpoint."""
    return json.loads((Path(directory) / RUN_STATE).read_text())


def check_loaded(model, missing):
    """Raises UserError where a checkpoint has no weights for some of the model's; a tied weight has several names.

    Args:
        missing: names that were not in it.
    """
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    there = {number for name, number in tensors.items() if name not in missing}
    lacking = sorted(name for name in missing if tensors.get(name) not in there)
    if lacking:
        raise UserError(f"it has no weights for {', '.join(lacking[:3])}")


# ----------------------------------------------------------------------------------------------------- metrics


class Metrics(TrainerCallback):
    """Writes what Trainer tells as the log lines and `metrics.jsonl` that the other directories write.

    Args:
        log: `RunLog`, which `begin` was called of.
        rows, global_batch_size: what is trained on, to count what each step held.
        guard: `Guard`.
    """

    def __init__(self, args, log, rows, global_batch_size, guard, device):
        self.args, self.log, self.rows, self.global_batch_size = args, log, rows, global_batch_size
        self.guard, self.device = guard, device
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
        self.log.say(f"saved {args.output_dir}/checkpoint-{state.global_step}")
        self.started = time.perf_counter()


def log_table(log, metrics):
    """Prints the workshop's table, filled in."""
    losses = {f"Eval Loss (Epoch {epoch:g})": f"{loss:.4f}" for epoch, loss in metrics.eval_losses.items()}
    rows = {
        "Train Loss (Final)": f"{log.last_step['loss']:.4f}",
        **losses,
        "Training Speed (samples/sec)": f"{log.trained_samples / log.trained_seconds:.2f}",
        "Evaluation Speed (samples/sec)": f"{log.last_eval['samples_per_second']:.2f}" if log.last_eval else "–",
        "Steps per Epoch": log.steps_per_epoch,
    }
    log.say("| Metric | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()))
