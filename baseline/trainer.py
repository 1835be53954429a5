"""What the baseline's Trainer does differently from the stock one: README.md says why for each."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baseline import checkpoints
from common import memory
from common.distributed import gather_numbers, local_world_size
from common.loss import IGNORE
from common.rows import RowLoader, Rows, epoch_order
from common.tracking import RunLog


class RowDataset(Dataset):
    """Rows for PyTorch's DataLoader, which asks for those of a micro-batch together and gets the model's arguments.

    Args:
        packing: whether rows hold several documents.
        pad_to_max_length: instead of to the longest row of the micro-batch.
    """

    def __init__(self, rows: Rows, packing: bool, pad_to_max_length: bool):
        self.rows, self.packing, self.pad_to_max_length = rows, packing, pad_to_max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        width = self.rows.max_length if self.pad_to_max_length else self.rows.width(np.array(numbers))
        batch = {key: tensor[:, :width] for key, tensor in self.rows.collate(numbers).items()}
        if not self.packing:
            del batch["position_ids"]  # with one document per row the model's default is the same
        return batch


class EpochOrder(Sampler):
    """The order of rows in the other directories: every row number of an epoch, and -1 to fill up the last step."""

    def __init__(self, train: RowLoader):
        self.train, self.epoch = train, 0

    def __len__(self) -> int:
        return self.train.steps_per_epoch * self.train.global_batch_size

    def __iter__(self) -> Iterator[int]:
        train = self.train
        return iter(epoch_order(train.rows, train.global_batch_size, train.seed, self.epoch).flatten().tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class OrderedTrainer(Trainer):
    """Trainer that takes rows in a given order and saves and loads complete checkpoints only.

    Args:
        order: sampler of the training rows.
        run_state: what decides the steps of the run; saved with each checkpoint.
    """

    def __init__(self, *args: Any, order: EpochOrder, run_state: dict[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.order, self.run_state = order, run_state

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.order

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with checkpoints.saving(self.args.output_dir, self.state.global_step, self.run_state):
            super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        checkpoints.check_loaded(self.model, load_result.missing_keys)  # Trainer only warns


def sum_by_row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What evaluation keeps of a batch: for each row the sum of its token losses and its number of targets, [B, 2].

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 for tokens without a loss.
    """
    sums = [
        nn.functional.cross_entropy(row[:-1].float(), target[1:], ignore_index=IGNORE, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack([torch.stack(sums).double(), (labels[:, 1:] != IGNORE).sum(1).double()], dim=1)


def mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's `compute_metrics`, given what `sum_by_row` returned for all rows.

    Its `loss` replaces Trainer's own, the mean of the batches' means, in which tokens of short batches weigh more.
    """
    loss_sum, targets = prediction.predictions.sum(axis=0)
    return {"loss": loss_sum / targets, "tokens": int(targets)}


class Metrics(TrainerCallback):
    """Writes what Trainer reports as the log lines and `metrics.jsonl` of the other directories.

    Args:
        log: started.
        train: the training rows, to count what each step held.
        save_every: optimizer steps, or None.
    """

    def __init__(self, log: RunLog, train: RowLoader, save_every: int | None):
        self.log, self.train, self.save_every = log, train, save_every
        self.started: float | None = None  # when the current step started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= bool(self.save_every and state.global_step % self.save_every == 0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return  # an evaluation, or Trainer's own summary
        seconds = time.perf_counter() - self.started  # includes the GPU's work, since the loss is already a number
        peaks = [memory.host_peak_gib(), memory.gpu_peak_gib() or 0.0]
        host_peaks, gpu_peaks = zip(*gather_numbers(peaks, args.device), strict=True)
        self.log.step(
            state.global_step,
            self.train[state.global_step - 1],
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            seconds=seconds,
            host_peak_gib=sum(host_peaks[: local_world_size()]),
            gpu_peak_gib=max(gpu_peaks) or None,
        )
        self.started = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        names = ("loss", "tokens", "samples_per_second")
        self.log.eval(state.global_step, {name: kwargs["metrics"][f"eval_{name}"] for name in names})
        self.started = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.log.info(f"saved {args.output_dir}/checkpoint-{state.global_step}")
        self.started = time.perf_counter()


def log_table(log: RunLog, state: TrainerState) -> None:
    """Prints losses and speeds as a Markdown table. `state` also has the evaluations from before a resume."""
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"]]
    rows = {
        "Train Loss (Final)": f"{log.last_step['loss']:.4f}",
        **{f"Eval Loss (Epoch {entry['epoch']:g})": f"{entry['eval_loss']:.4f}" for entry in evaluations},
        "Training Speed (samples/sec)": f"{log.trained_samples / log.trained_seconds:.2f}",
        "Evaluation Speed (samples/sec)": f"{log.last_eval['samples_per_second']:.2f}" if log.last_eval else "–",
        "Steps per Epoch": log.steps_per_epoch,
    }
    log.info("| Metric | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()))
