"""What a run tells: the log line, `metrics.jsonl`, a log file a rank, a progress bar, Weights & Biases."""

import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import deepspeed
import torch
import transformers
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from tqdm import tqdm

from common import memory
from common.errors import UserError, one_line
from common.launch import all_ranks_agree, rank, world_size

# Dense 16-bit matrix throughput in TFLOP/s from the vendors' data sheets, by a part of the device's name; the
# first that fits counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150,
    "A30": 165, "A6000": 155, "4090": 165, "3090": 71, "T4": 65, "V100": 125, "P100": 19,
}  # fmt: skip
# Steps that fp16 may skip one after another while it looks for a loss scale; a scale of 2^16 halved 20 times is 1/16.
MOST_SKIPPED = 20


def peak_flops():
    """This GPU's 16-bit peak in FLOP/s, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def training_flops(config, matmul_parameters, tokens, squared_lengths):
    """Floating-point operations of forward and backward, as PaLM counts them (appendix B).

    6 for each token and each weight that is in a matrix product, so the head once and the embedding, which is
    looked up, not at all; and for attention 12 x layers x heads x head_dim for each pair of tokens, of which
    causality leaves half and packing those within a document.

    Args:
        matmul_parameters: weights of the decoder layers and the head.
        tokens: real tokens, padding left out.
        squared_lengths: the sum over documents of their length squared.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim * squared_lengths
    return 6 * matmul_parameters * tokens + attention


def _end_last_line(path):
    """Removes the record at the end of `metrics.jsonl` that a killed run, or a full disk, cut off; ends a whole one."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        last = content.rpartition(b"\n")[2]
        if last:
            try:
                json.loads(last)
                file.write(b"\n")
            except ValueError:
                file.truncate(len(content) - len(last))


class RunLog:
    """The outputs of one run. Every rank has one; rank 0 prints and writes `metrics.jsonl`.

    Args:
        args: the script's arguments: output_dir and wandb_project are used here, all are logged.
        technique: the directory's name.

    Raises:
        UserError: output_dir cannot be written.
    """

    def __init__(self, args, technique):
        self.technique = technique
        self.directory = Path(args.output_dir)
        self.args = {key: value for key, value in vars(args).items() if key != "local_rank"}
        self.started = time.time()
        self.bar = self.metrics = self.wandb = None
        self.lost = set()  # names of files that could not be written
        self.trained_samples, self.trained_seconds = 0, 0.0
        self.last_step, self.last_eval, self.test = {}, {}, {}
        with all_ranks_agree():
            try:
                (self.directory / "logs").mkdir(parents=True, exist_ok=True)
                self.rank_log = open(self.directory / "logs" / f"rank_{rank()}.log", "a", encoding="utf-8")  # noqa: SIM115
                if rank() == 0:
                    _end_last_line(self.directory / "metrics.jsonl")
                    self.metrics = open(self.directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise UserError(f"--output_dir {args.output_dir} cannot be written: {error}") from error
        there = [*self.directory.glob("global_step*[0-9]"), *self.directory.glob("checkpoint-*[0-9]")]
        if there and args.resume_from_checkpoint is None:
            newest = max(there, key=lambda path: path.lstat().st_mtime)  # a link may lead nowhere
            self.say(
                f"{newest} is from an earlier run: this one begins anew beside it, and replaces what that saved at the "
                "same steps (to go on from there: --resume_from_checkpoint latest)"
            )
        if rank() == 0 and args.wandb_project:
            self.wandb = start_wandb(args.wandb_project, technique, self.args, self.directory)

    def say(self, *lines):
        """Prints on rank 0 and keeps in every rank's own log."""
        for line in lines:
            self.note(line)
            if rank() == 0:
                # In one write: uploads speak from a thread of their own.
                tqdm.write(line) if self.bar else print(line + "\n", end="", flush=True)

    def note(self, line):
        """A line for this rank's own log alone."""
        self._write(self.rank_log, f"{time.strftime('%H:%M:%S')} {line}\n")

    def _write(self, file, line):
        """A full disk costs the run its records, and no more than that: what it has learnt is saved elsewhere."""
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            if file.name not in self.lost:
                self.lost.add(file.name)
                print(f"{file.name}: {error.strerror}; it lacks lines from here on", file=sys.stderr, flush=True)

    def event(self, event, **fields):
        """One line of `metrics.jsonl`; fields that are None are left out."""
        if rank() != 0:
            return
        record = {"event": event, "time": time.time()}
        for key, value in fields.items():
            # JSON has no infinity: the gradient norm of a step that fp16 skipped is left out.
            if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
                record[key] = value
        self._write(self.metrics, json.dumps(record) + "\n")

    def run(self, ds_config, model_name, dataset_name, parameters):
        """Logs what is about to run; `dataset_name` says which sample text it is."""
        self.event(
            "run",
            technique=self.technique,
            model=model_name,
            dataset=dataset_name,
            parameters=parameters,
            world_size=world_size(),
            args=self.args,
            ds_config=ds_config,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "transformers": transformers.__version__,
            },
            hardware={
                "host": platform.node(),
                "cpu_cores": len(os.sched_getaffinity(0)),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "gpus": torch.cuda.device_count(),
            },
        )

    def begin(self, first_step, total_steps, steps_per_epoch, config, matmul_parameters):
        """Says what `step` reckons with (see `training_flops`); starts the progress bar, where someone is watching."""
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.config, self.matmul_parameters = config, matmul_parameters
        if first_step >= total_steps:
            self.say(f"nothing left to train: the checkpoint is at step {first_step}, this run ends at {total_steps}")
        elif rank() == 0 and sys.stderr.isatty():
            self.bar = tqdm(initial=first_step, total=total_steps, unit="step", dynamic_ncols=True)

    def step(self, global_step, counts, *, loss, lr, grad_norm, seconds, samples_seen, **measured):
        """Logs one optimizer step: the log line, or the bar, and the `step` event.

        Args:
            counts: what the step's rows hold, `common.data.Counts`.
            seconds: that it took.
            samples_seen: documents begun so far.
            measured: see `measure`.
        """
        rate, peak = counts.tokens / seconds, peak_flops()
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
            "samples_seen": samples_seen,
            **measured,
        }
        if peak:
            flops = training_flops(self.config, self.matmul_parameters, counts.tokens, counts.squared_lengths)
            fields["mfu"] = flops / seconds / world_size() / peak
        parts = [
            f"step {global_step}/{self.total_steps}",
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            f"grad_norm {grad_norm:.2f}" if grad_norm is not None else "grad_norm -",
            f"{seconds * 1000:.0f} ms",
            f"{rate:,.0f} tok/s",
            f"{rate / world_size():,.0f} tok/s/gpu",
        ]
        if "mfu" in fields:
            parts.append(f"mfu {fields['mfu']:.1%}")
        if fields.get("gpu_peak_gib") is not None:
            parts.append(f"gpu {fields['gpu_peak_gib']:.1f} GiB")
        parts.append(f"host {fields['host_peak_gib']:.1f} GiB")
        line = " | ".join(parts)
        if self.bar:
            self.bar.set_postfix_str(" | ".join(parts[1:]))
            self.bar.update()
            self.note(line)
        else:
            self.say(line)
        self.event("step", **fields)
        self.trained_samples += counts.samples
        self.trained_seconds += seconds
        self.last_step = fields
        if self.wandb:
            names = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "gpu_peak_gib", "samples_seen")
            charts = {f"train/{name}": fields[name] for name in names if fields.get(name) is not None}
            self.wandb.log(charts | {"epoch": fields["epoch"]}, step=fields["step"])

    def eval(self, **fields):
        """Logs an evaluation: step, epoch, phase, loss, perplexity, tokens, samples_per_second.

        Raises:
            UserError: the weights that would be saved next are no good, though every step looked fine.
        """
        self.say(
            f"eval {fields['phase']} | loss {fields['loss']:.4f} | perplexity {fields['perplexity']:.2f} | "
            f"{fields['tokens']:,} tokens | {fields['samples_per_second']:.1f} samples/s"
        )
        self.event("eval", **fields)
        if fields["phase"] == "test":
            self.test = fields
        else:
            self.last_eval = fields
        if fields["phase"] in ("epoch", "after") and not math.isfinite(fields["loss"]):
            raise UserError(
                f"step {fields['step']}: the loss on held-out text is {fields['loss']}; its weights are not saved, and "
                "checkpoints saved before are untouched",
                on_all_ranks=True,
            )
        if self.wandb:
            group = "test" if fields["phase"] == "test" else "eval"
            charts = {f"{group}/loss": fields["loss"], f"{group}/perplexity": fields["perplexity"]}
            self.wandb.log(charts | {"epoch": fields["epoch"]}, step=fields["step"])

    def stop(self, signal_name, global_step, saved):
        """Says that a signal ended the run before its time, and how to go on; closes without a `summary` event."""
        how = "the same command with --resume_from_checkpoint latest" if saved else "nothing was saved"
        self.close_bar()
        self.say(f"stopped by {signal_name} after step {global_step} of {self.total_steps}; to go on: {how}")
        if self.wandb:
            self.wandb.finish()
        if self.metrics:
            self.metrics.close()

    def close_bar(self):
        if self.bar:
            self.bar.close()
            self.bar = None

    def close(self):
        """Ends the bar, logs the `summary` event, closes the files."""
        self.close_bar()
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
            self.wandb.finish()
        if self.metrics:
            self.metrics.close()


class Guard:
    """Ends a run that has stopped learning, before it saves anything.

    Under fp16 DeepSpeed skips a step whose gradients overflow and lowers the loss scale, which is normal now and
    then; elsewhere a loss or gradient that is not finite is the end.

    Args:
        fp16: whether the run computes in fp16.
        global_step: of the state that the run starts from.
        optimizer: the engine's. Its loss scaler would end the run by an exception of its own once the scale is at its
            least, 17 skipped steps from 2^16, and name no step.
    """

    def __init__(self, fp16, global_step, optimizer):
        if hasattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
            optimizer.loss_scaler.raise_error_at_min_scale = False
        self.patience = MOST_SKIPPED if fp16 else 1
        self.last_good = global_step
        self.bad = 0

    def check(self, global_step, loss, grad_norm):
        """Raises UserError if this step was one bad step too many; every rank sees the same numbers."""
        # DeepSpeed also says -1 for a norm that is not finite.
        if math.isfinite(loss) and (grad_norm is None or 0 <= grad_norm < math.inf):
            self.last_good, self.bad = global_step, 0
            return
        self.bad += 1
        if self.bad >= self.patience:
            skipped = f"{self.bad} steps in a row skipped, at step" if self.patience > 1 else "step"
            raise UserError(
                f"{skipped} {global_step}: loss {loss}, gradient norm {grad_norm}; the last good step was "
                f"{self.last_good}, and checkpoints saved before are untouched",
                on_all_ranks=True,
            )


def start_wandb(project, technique, config, directory=None):
    """A Weights & Biases run that never asks for a login: without a key it is an offline one.

    A W&B that cannot be reached costs the run its charts, not its training.
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
        print(f"wandb: no charts ({one_line(error)}); metrics.jsonl has everything", file=sys.stderr, flush=True)
        return None


def banner(engine):
    """What the engine really runs, as its own settings say: lines for the run's head."""
    stage, weights = engine.zero_optimization_stage(), engine.zero_offload_param()
    return [
        "=" * 60,
        f"DeepSpeed ZeRO-{stage} Initialization Complete",
        "=" * 60,
        f"  ZeRO Stage: {stage}",
        f"  Parameter offloading: {weights is not None and weights.device != 'none'}",
        f"  Optimizer offloading: {engine.zero_cpu_offload()}",
        f"  Global rank: {engine.global_rank}",
        f"  World size: {engine.world_size}",
        f"  Device: {engine.device}",
        "=" * 60,
    ]


def measure(device, engine=None):
    """For a step's record the peaks of memory, and under fp16 the loss scale and how many steps it cost so far.

    A collective call.

    Args:
        engine: DeepSpeed's; Trainer has none.
    """
    return {**memory.peaks(memory.gather_peaks(device)), **(_loss_scaling(engine) if engine else {})}


def _loss_scaling(engine):
    if not engine.fp16_enabled():
        return {}
    return {"loss_scale": engine.optimizer.loss_scale, "skipped_steps": engine.skipped_steps}


def measure_stages(engine, busy_share):
    """`measure` with each stage's share of busy time and memory: the mean or the largest of its replicas."""
    ranks = memory.gather_peaks(engine.device, engine.stage_id, busy_share)
    stages = []
    for stage in range(engine.num_stages):
        host, gpu, _, busy = zip(*(numbers for numbers in ranks if numbers[2] == stage), strict=True)
        stages.append({"busy": sum(busy) / len(busy), "gpu_peak_gib": max(gpu) or None, "host_peak_gib": max(host)})
    return {**memory.peaks(ranks), **_loss_scaling(engine), "stages": stages}


class StageTimer:
    """How long this pipeline stage spends in forward and backward passes in each step.

    The rest of a step is waiting for other stages, sending, reducing gradients and the optimizer.

    DeepSpeed's own breakdown (`wall_clock_breakdown`) fails in the pipeline, so its forward and backward
    instructions are wrapped: CUDA events around them cost nothing but two records, since receiving and sending are
    instructions of their own.
    """

    def __init__(self, engine):
        self.spans = []
        for instruction in (ForwardPass, BackwardPass):
            engine._INSTRUCTION_MAP = {
                **engine._INSTRUCTION_MAP,
                instruction: self._timed(engine._INSTRUCTION_MAP[instruction]),
            }

    def _timed(self, execute):
        def timed(engine, *args, **kwargs):
            start = self._now()
            execute(engine, *args, **kwargs)
            self.spans.append((start, self._now()))

        return timed

    def _now(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        """Forgets what ran before, an evaluation say; returns the time to give to `stop`."""
        self.spans.clear()
        return time.perf_counter()

    def stop(self, started):
        """(seconds of computing, seconds of all) since `start`. Waits for the GPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            busy = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            busy = sum(end - start for start, end in self.spans)
        return busy, time.perf_counter() - started
