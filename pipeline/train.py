"""Pipeline parallelism by hand: the model's layers are partitioned into stages, one stage per GPU.

    deepspeed --num_gpus=2 pipeline/train.py

runs anywhere, even without a GPU: a small Llama on generated abstracts. A real run:

    deepspeed --num_gpus=2 pipeline/train.py --model_name meta-llama/Llama-3.2-1B-Instruct \\
        --dataset_name ash001/arxiv-abstract --num_epochs 3 --start_idx 0 --end_idx 25000 \\
        --batch_size 2 --accum_steps 16 --max_length 1024

(`torchrun`, `srun` with one task per GPU, and plain `python` start it too.)

What differs from zero/train.py: the model is a list of layers (layers.py), of which each rank builds only those of its
stage (partition.py). Instead of forward, backward and step there is one `train_batch`, which sends micro-batches
through the stages so that all stages compute at the same time. The checkpoint has one file per layer.

Ranks communicate only in calls of DeepSpeed and in lines marked `# collective`.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
import torch.distributed as dist
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_utils import local_torch_dtype

from common import cli, data, deepspeed_config, distributed, kernels, memory, models
from common.checkpoint import Checkpointer
from common.rows import RowLoader
from common.tracking import RunLog, reduce_metrics
from pipeline import layers, partition
from pipeline.stage_timer import StageTimer, stage_metrics

SAMPLE_MODEL, SAMPLE_TEXT = "llama", "abstracts"


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "pipeline", Path(__file__).with_name("ds_pipeline.json"))
    partition.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # ------------------------------------------------------------------------------ distributed set-up and seed
    memory.set_gpu_allocator()
    device = distributed.set_device()
    memory.limit_gpu(args.gpu_memory)
    deepspeed.init_distributed()
    num_stages, dp_world_size = partition.grid(args, dist.get_world_size())  # stages x replicas of the pipeline
    dp_rank = dist.get_rank() % dp_world_size  # consecutive ranks hold the same stage of different replicas
    log = RunLog(args, "pipeline")  # collective

    # ---------------------------------------------------------------------- DeepSpeed config, what to resume from
    ds_config, dtype = deepspeed_config.from_args(args, "pipeline", device, log)
    checkpointer = Checkpointer(args, log, ds_config, dp_world_size, num_stages)  # collective
    resume = checkpointer.resume  # the checkpoint to resume from, or None
    # Puts --batch_size and --accum_steps into ds_config; a resumed run keeps its global batch size.
    deepspeed_config.resolve_batch_size(ds_config, dp_world_size, args.batch_size, args.accum_steps, resume)

    # -------------------------------------------------------------------------------- model files and text to rows
    # The first rank of each host downloads and tokenizes; the others then find the files in its cache.
    with distributed.local_rank_zero_first():  # collective
        info = models.inspect_model(args, SAMPLE_MODEL, resume)
        layers.check_architecture(info.config)
        text = data.load(args, info, SAMPLE_TEXT, ds_config, device, dp_rank, log, checkpointer.initial_epoch)
    total_steps = min(args.num_epochs * text.train.steps_per_epoch, args.max_train_steps or sys.maxsize)

    # ---------------------------------------------------------------------------------------------------- model
    # Stage s gets layers bounds[s] .. bounds[s + 1] - 1.
    bounds = partition.choose_stages(args, info, ds_config, text.train, dtype, resume, log)  # collective
    checkpointer.prepare(info, ds_config, text, total_steps, bounds=bounds)  # collective
    model = build_model(args, info, ds_config, dtype, device, log, text.train, bounds, checkpointer)  # collective
    # Each replica draws its own dropout masks. Seeded only now, because building a stage draws numbers for its weights.
    distributed.set_seed(args.seed + dp_rank)

    # ------------------------------------------------------------------------------------ optimizer and engine
    groups = layers.optimizer_groups(model)  # about one per layer, which lowers peak memory
    optimizer = torch.optim.AdamW(groups, lr=checkpointer.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    # From here on the engine clips gradients (the JSON sets the norm), steps the schedule and clears the gradients.
    with deepspeed_config.config_errors(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    layers.reduce_memory(engine, dtype)  # optional: lowers peak memory
    stage_timer = StageTimer()
    stage_timer.attach(engine)  # optional: measures how busy each stage is
    log.start(info, ds_config, text, dtype, checkpointer.start_step, total_steps, f"pipeline stages: {num_stages}")
    if resume:
        with torch.no_grad(), checkpointer.loading(lr_scheduler, len(groups)) as (directory, tag):  # collective
            if resume.has_optimizer:
                # The saved schedule has one entry per parameter group, and a different split may have more or fewer.
                engine.load_checkpoint(directory, tag=tag, load_lr_scheduler_states=not resume.reshard)
    if dtype == torch.float16:  # `log.step` ends a run that skips too many steps, with a clearer error
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    # ---------------------------------------------------------------------------------------------------- train
    preemption, stopped_by = distributed.PreemptionHandler(), None
    for step in itertools.count(checkpointer.start_step):  # `step` steps are done: first what is due after them
        finished = step >= total_steps
        epoch_ended = finished or step % text.train.steps_per_epoch == 0
        if epoch_ended and not stopped_by:
            log.eval(step, evaluate(engine, text.held_out, args.max_eval_steps))  # collective
        due = epoch_ended or stopped_by or (args.save_every and step % args.save_every == 0)
        if args.save_checkpoint and due and step > checkpointer.start_step:
            with checkpointer.saving(step) as (tag, client_state):  # collective: each rank saves its own shards
                engine.save_checkpoint(args.output_dir, tag=tag, client_state=client_state, save_latest=False)
        if finished or stopped_by:
            break

        started, lr = stage_timer.start(), lr_scheduler.get_last_lr()[0]
        batch = text.train[step]
        # All micro-batches in the 1F1B schedule (each stage alternates one forward and one backward pass, sending and
        # receiving in between), then one optimizer step. Returns the mean loss over micro-batches and replicas.
        loss = engine.train_batch(data_iter=layers.micro_batches(batch))
        busy, seconds = stage_timer.stop(started)
        # The only communication outside the engine: loss, memory and stop requests of all ranks. Waits for the GPU.
        metrics, stopped_by = reduce_metrics(engine, loss, 1, preemption, engine.stage_id, busy / seconds)  # collective
        metrics["stages"] = stage_metrics(metrics.pop("ranks"), num_stages)
        log.step(step + 1, batch, lr=lr, seconds=seconds, **metrics)

    # --------------------------------------------------------------------------------------------------- results
    if not stopped_by:
        log.eval(step, evaluate(engine, text.test, args.max_eval_steps), phase="test")  # collective
    log.finish(stopped_by)
    checkpointer.finish(stopped_by, preemption, device)  # collective


def build_model(
    args: argparse.Namespace,
    info: models.ModelInfo,
    ds_config: dict,
    dtype: torch.dtype,
    device: torch.device,
    log: RunLog,
    train: RowLoader,
    bounds: list[int],
    checkpointer: Checkpointer,
) -> layers.PartitionedPipeline:
    """This rank's stage of the model, with its weights. Each rank builds and reads only the layers of its stage."""
    kernels.choose_kernels(args, info.config, device, dtype, log)
    specs = layers.layer_specs(info.config, len(bounds) - 1, train.max_docs, train.max_seqlen, args.compile)
    interval = ds_config["pipeline"]["activation_checkpoint_interval"]
    # Without gradients, because DeepSpeed broadcasts tied weights, which autograd would otherwise record.
    with device, local_torch_dtype(dtype), torch.no_grad():
        model = layers.PartitionedPipeline(specs, bounds, interval, loss_fn=layers.causal_lm_loss)
    with distributed.raise_on_all_ranks():  # collective
        layers.load_weights(model, info, checkpointer.resume)
    return model


def evaluate(engine: deepspeed.DeepSpeedEngine, split: RowLoader, max_batches: int | None) -> dict | None:
    """Mean loss per target token on a split, with counts, equal on all ranks; None if the split is empty.

    `eval_batch` runs the forward half of the schedule, without gradients or dropout, for any number of micro-batches.
    """
    if not len(split.rows):
        return None
    started, total, targets, samples = time.perf_counter(), 0.0, 0, 0
    for batch in split.eval_batches(max_batches):
        loss = engine.eval_batch(layers.micro_batches(batch), num_micro_batches=batch.num_micro_batches)
        total += loss.item() * batch.counts.targets  # from mean to sum
        targets += batch.counts.targets
        samples += batch.counts.samples
    speed = samples / (time.perf_counter() - started)
    return {"loss": total / targets, "tokens": targets, "samples_per_second": speed}


if __name__ == "__main__":
    distributed.set_rank_variables()
    distributed.run(main)
