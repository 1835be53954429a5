"""What a run reports: the log line, `metrics.jsonl`, a log file per rank, a progress bar, Weights & Biases."""

import json
import math
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

import deepspeed
import torch
import transformers
from tqdm import tqdm

from common import memory
from common.distributed import PreemptionHandler, gather_numbers, local_world_size, raise_on_all_ranks, rank, world_size
from common.errors import UserError, one_line
from common.models import ModelInfo
from common.rows import Batch

# Dense 16-bit matrix throughput in TFLOP/s, from the vendors' data sheets, by part of the device's name. The first
# match counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150,
    "A30": 165, "A6000": 155, "4090": 165, "3090": 71, "T4": 65, "V100": 125, "P100": 19,
}  # fmt: skip
# Steps in a row that fp16 may skip while it looks for a loss scale; a scale of 2^16 halved 20 times is 1/16.
MAX_SKIPPED = 20
WANDB_STEP_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "gpu_peak_gib", "samples_seen")


def peak_flops() -> float | None:
    """This GPU's 16-bit peak in FLOP/s, or None if it is unknown."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def training_flops(
    config: transformers.PreTrainedConfig, non_embedding_parameters: int, tokens: int, squared_lengths: int
) -> float:
    """Floating-point operations of forward and backward passes, counted as in PaLM (appendix B).

    6 per token and weight of a matrix product, which excludes the embedding, a lookup. For attention 12 x layers x
    heads x head_dim per pair of tokens; of the pairs in a document, causality leaves half.

    Args:
        non_embedding_parameters: weights of the decoder layers and the head.
        tokens: real tokens, without padding.
        squared_lengths: the sum over documents of their length squared.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * squared_lengths
    return 6 * non_embedding_parameters * tokens + attention


class RunLog:
    """The outputs of one run. Every rank has one; rank 0 prints and writes `metrics.jsonl`. Creating it is collective.

    Args:
        args: the script's arguments: output_dir, wandb_project and resume_from_checkpoint are used, all are logged.
        technique: the directory's name.

    Raises:
        UserError: output_dir cannot be written.
    """

    def __init__(self, args: Namespace, technique: str):
        self.technique, self.directory = technique, Path(args.output_dir)
        self.args = {key: value for key, value in vars(args).items() if key != "local_rank"}
        self.started = time.time()
        self.bar = self.metrics = self.wandb = None
        self.lost: set[str] = set()  # names of files that could not be written
        self.trained_samples, self.trained_seconds = 0, 0.0
        self.last_step: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self.test: dict[str, Any] = {}
        with raise_on_all_ranks():
            try:
                (self.directory / "logs").mkdir(parents=True, exist_ok=True)
                self.rank_log = open(self.directory / "logs" / f"rank_{rank()}.log", "a", encoding="utf-8")  # noqa: SIM115
                if rank() == 0:
                    _repair_end(self.directory / "metrics.jsonl")
                    self.metrics = open(self.directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise UserError(f"--output_dir {args.output_dir} cannot be written: {error}") from error
        earlier = [*self.directory.glob("global_step*[0-9]"), *self.directory.glob("checkpoint-*[0-9]")]
        if earlier and args.resume_from_checkpoint is None:
            newest = max(earlier, key=lambda path: path.lstat().st_mtime)  # may be a dangling link
            self.info(
                f"{newest} is from an earlier run: this run starts over and replaces its checkpoints of the same steps "
                "(to resume instead: --resume_from_checkpoint latest)"
            )
        if rank() == 0 and args.wandb_project:
            self.wandb = start_wandb(args.wandb_project, technique, self.args, self.directory)

    def info(self, *lines: str) -> None:
        """Prints on rank 0 and writes to every rank's own log."""
        for line in lines:
            self.debug(line)
            if rank() == 0:
                # In a single write, because uploads print from another thread.
                tqdm.write(line) if self.bar else print(line + "\n", end="", flush=True)

    def debug(self, line: str) -> None:
        """Writes a line to this rank's own log only."""
        self._write(self.rank_log, f"{time.strftime('%H:%M:%S')} {line}\n")

    def _write(self, file: TextIO, line: str) -> None:
        """Writes a line. A full disk costs the run its records, but does not end it."""
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            if file.name not in self.lost:
                self.lost.add(file.name)
                print(f"{file.name}: {error.strerror}; lines will be missing", file=sys.stderr, flush=True)

    def event(self, event: str, **fields: Any) -> None:
        """Writes one line of `metrics.jsonl`; fields that are None are left out."""
        if rank() != 0:
            return
        record = {"event": event, "time": time.time()}
        for key, value in fields.items():
            # JSON has no infinity, such as the gradient norm of a step that fp16 skipped.
            if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
                record[key] = value
        self._write(self.metrics, json.dumps(record) + "\n")

    def _chart(self, group: str, fields: dict[str, Any], names: tuple[str, ...]) -> None:
        """Sends those of `fields` that are known to W&B, if the run uses it."""
        if self.wandb:
            charts = {f"{group}/{name}": fields[name] for name in names if fields.get(name) is not None}
            self.wandb.log(charts | {"epoch": fields["epoch"]}, step=fields["step"])

    def start(
        self,
        info: ModelInfo,
        ds_config: dict[str, Any] | None,
        text: Any,
        dtype: torch.dtype,
        start_step: int,
        total_steps: int,
        *detail: str,
    ) -> None:
        """Logs the `run` event.

        Args:
            ds_config: the one in force; None without DeepSpeed.
            text: `common.data.TextData`.
            dtype: of the computation; fp16 may skip steps, see `NonFiniteGuard`.
            detail: more to say in the line about the model.
        """
        self.total_steps, self.steps_per_epoch = total_steps, text.train.steps_per_epoch
        self.config, self.non_embedding_parameters = info.config, info.non_embedding_parameters
        self.guard = NonFiniteGuard(dtype == torch.float16, start_step)
        self.event(
            "run",
            technique=self.technique,
            model=info.name,
            dataset=text.name,
            parameters=info.parameters,
            world_size=world_size(),
            args=self.args,
            ds_config=ds_config,
            versions={
                "python": platform.python_version(),
                **{package.__name__: package.__version__ for package in (torch, deepspeed, transformers)},
            },
            hardware={
                "host": platform.node(),
                "cpu_cores": len(os.sched_getaffinity(0)),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "gpus": torch.cuda.device_count(),
            },
        )
        self.info(", ".join([f"model: {info.config.model_type}", f"{info.parameters:,} parameters", *detail]))
        if start_step >= total_steps:
            self.info(f"nothing left to train: the checkpoint is at step {start_step}, this run ends at {total_steps}")

    def step(
        self,
        global_step: int,
        batch: Batch,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        seconds: float,
        **metrics: Any,
    ) -> None:
        """Logs one optimizer step: the log line, or the bar on a terminal, and the `step` event.

        Args:
            seconds: duration of the step.
            metrics: further fields of the event, see `reduce_metrics`.

        Raises:
            UserError: loss or gradient norm are not finite (under fp16: for too many steps in a row).
        """
        if not self.bar and rank() == 0 and sys.stderr.isatty():
            self.bar = tqdm(initial=global_step - 1, total=self.total_steps, unit="step", dynamic_ncols=True)
        counts, peak = batch.counts, peak_flops()
        rate = counts.tokens / seconds
        fields = {
            "step": global_step,
            "epoch": round(global_step / self.steps_per_epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": counts.tokens,
            "step_time_s": seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_gpu": rate / world_size(),
            "samples_seen": batch.samples_seen,
            **metrics,
        }
        parts = [
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            f"grad_norm {grad_norm:.2f}" if grad_norm is not None else "grad_norm -",
            f"{seconds * 1000:.0f} ms",
            f"{rate:,.0f} tok/s",
            f"{rate / world_size():,.0f} tok/s/gpu",
        ]
        if peak:
            flops = training_flops(self.config, self.non_embedding_parameters, counts.tokens, counts.squared_lengths)
            fields["mfu"] = flops / seconds / world_size() / peak
            parts.append(f"mfu {fields['mfu']:.1%}")
        if fields.get("gpu_peak_gib") is not None:
            parts.append(f"gpu {fields['gpu_peak_gib']:.1f} GiB")
        parts.append(f"host {fields['host_peak_gib']:.1f} GiB")
        line = " | ".join([f"step {global_step}/{self.total_steps}", *parts])
        if self.bar:
            self.bar.set_postfix_str(" | ".join(parts))
            self.bar.update()
            self.debug(line)
        else:
            self.info(line)
        self.event("step", **fields)
        self._chart("train", fields, WANDB_STEP_FIELDS)
        self.trained_samples += counts.samples
        self.trained_seconds += seconds
        self.last_step = fields
        self.guard.check(global_step, loss, grad_norm)

    def eval(self, global_step: int, result: dict[str, Any] | None, phase: str | None = None) -> None:
        """Logs an evaluation: the line and the `eval` event.

        Args:
            result: loss, tokens and samples_per_second; None if there was no text to evaluate on.
            phase: "before" training, at the end of an "epoch", "after" training, or "test"; None derives one of the
                first three from the step.

        Raises:
            UserError: the loss is not finite though every step's was, so the weights must not be saved.
        """
        if result is None:
            return
        if phase is None:
            phase = "before" if global_step == 0 else "epoch" if global_step < self.total_steps else "after"
        loss, perplexity = result["loss"], torch.tensor(result["loss"]).exp().item()
        fields = {
            "step": global_step,
            "epoch": global_step / self.steps_per_epoch,
            "phase": phase,
            "loss": loss,
            "perplexity": perplexity,
            "tokens": result["tokens"],
            "samples_per_second": result["samples_per_second"],
        }
        self.info(
            f"eval {phase} | loss {loss:.4f} | perplexity {perplexity:.2f} | {result['tokens']:,} tokens | "
            f"{result['samples_per_second']:.1f} samples/s"
        )
        self.event("eval", **fields)
        self._chart("test" if phase == "test" else "eval", fields, ("loss", "perplexity"))
        if phase == "test":
            self.test = fields
        else:
            self.last_eval = fields
        if phase in ("epoch", "after") and not math.isfinite(loss):
            raise UserError(
                f"step {global_step}: the loss on held-out text is {loss}, so its weights are not saved; checkpoints "
                "saved before are untouched",
                on_all_ranks=True,
            )

    def finish(self, stopped_by: str | None = None) -> None:
        """Closes the bar, logs the `summary` event, closes the files.

        Args:
            stopped_by: name of the signal that stopped the run early; such a run has no `summary` event.
        """
        if self.bar:
            self.bar.close()
            self.bar = None
        if stopped_by:
            saved = self.args["save_checkpoint"]
            how = (
                "the same command with --resume_from_checkpoint latest" if saved else "not possible, nothing was saved"
            )
            step = self.last_step["step"]
            self.info(f"stopped by {stopped_by} after step {step} of {self.total_steps}; to resume: {how}")
        else:
            summary = {
                "final_train_loss": self.last_step.get("loss"),
                "final_eval_loss": self.last_eval.get("loss"),
                "test_loss": self.test.get("loss"),
                "train_samples_per_second": self.trained_samples / (self.trained_seconds or math.inf),
                "eval_samples_per_second": self.last_eval.get("samples_per_second"),
                "steps_per_epoch": self.steps_per_epoch,
                "gpu_peak_gib": self.last_step.get("gpu_peak_gib"),
                "host_peak_gib": self.last_step.get("host_peak_gib"),
                "wall_time_s": time.time() - self.started,
            }
            self.event("summary", **summary)
            if self.wandb:
                self.wandb.summary.update(summary)
        if self.wandb:
            self.wandb.finish()
        if self.metrics:
            self.metrics.close()


def _repair_end(path: Path) -> None:
    """Removes a record at the end of `metrics.jsonl` that a killed run, or a full disk, left incomplete."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        last = content.rpartition(b"\n")[2]
        if last:
            try:
                json.loads(last)
                file.write(b"\n")  # only the end of the line is missing
            except ValueError:
                file.truncate(len(content) - len(last))


class NonFiniteGuard:
    """Ends a run as soon as its loss or gradients are not finite, before such weights are saved.

    Under fp16 DeepSpeed skips a step whose gradients overflow and lowers the loss scale, which is normal now and then.

    Args:
        fp16: whether the run computes in fp16.
        start_step: global step that the run starts from.
    """

    def __init__(self, fp16: bool, start_step: int):
        self.max_bad = MAX_SKIPPED if fp16 else 1
        self.last_good, self.bad = start_step, 0

    def check(self, global_step: int, loss: float, grad_norm: float | None) -> None:
        """Raises UserError if this was one bad step too many; all ranks have the same numbers."""
        # DeepSpeed also returns -1 for a norm that is not finite.
        if math.isfinite(loss) and (grad_norm is None or 0 <= grad_norm < math.inf):
            self.last_good, self.bad = global_step, 0
            return
        self.bad += 1
        if self.bad >= self.max_bad:
            skipped = f"{self.bad} steps in a row skipped, at step" if self.max_bad > 1 else "step"
            raise UserError(
                f"{skipped} {global_step}: loss {loss}, gradient norm {grad_norm}; the last good step was "
                f"{self.last_good}, and checkpoints saved before are untouched",
                on_all_ranks=True,
            )


def reduce_metrics(
    engine: Any, loss: float | torch.Tensor, micro_batches: int, preemption: PreemptionHandler, *numbers: float
) -> tuple[dict[str, Any], str | None]:
    """Loss, gradient norm, memory and stop requests of all ranks after a step, in one collective call.

    Waits for the GPU. The engine already knows the gradient norm over all ranks, and under fp16 the loss scale.

    Args:
        loss: sum of the losses of this rank's micro-batches.
        micro_batches: their number.
        numbers: more numbers to gather, returned as `ranks`: for each rank (host peak, GPU peak or 0, *numbers).

    Returns:
        (fields for `RunLog.step`, name of the signal that asks the run to stop or None).
    """
    memory_peaks = [memory.host_peak_gib(), memory.gpu_peak_gib() or 0.0]
    ranks = gather_numbers([float(loss), preemption.number, *memory_peaks, *numbers], engine.device)
    losses, signals, host_peaks, gpu_peaks, *_ = zip(*ranks, strict=True)
    grad_norm = engine.get_global_grad_norm()
    metrics = {
        "loss": sum(losses) / (micro_batches * len(ranks)),
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "host_peak_gib": sum(host_peaks[: local_world_size()]),  # of the first host
        "gpu_peak_gib": max(gpu_peaks) or None,
    }
    if engine.fp16_enabled():
        metrics |= {"loss_scale": engine.optimizer.loss_scale, "skipped_steps": engine.skipped_steps}
    if numbers:
        metrics["ranks"] = [numbers_of_rank[2:] for numbers_of_rank in ranks]
    number = int(max(signals))
    return metrics, signal.Signals(number).name if number else None


def start_wandb(project: str, technique: str, config: dict[str, Any], directory: str | Path | None = None) -> Any:
    """Starts a Weights & Biases run that never asks for a login: without an API key it is offline.

    If W&B cannot be reached, the run continues without it.
    """
    import wandb

    try:
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
        return wandb.init(
            project=project,
            group=technique,
            config=config,
            dir=os.environ.get("WANDB_DIR", directory),
            mode="offline" if offline else None,
            settings=wandb.Settings(init_timeout=60, console="off"),
        )
    except Exception as error:
        print(f"wandb: disabled ({one_line(error)}); metrics.jsonl has everything", file=sys.stderr, flush=True)
        return None
