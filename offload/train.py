"""ZeRO-Offload by hand: the optimizer and its states live in host memory, so that a small GPU trains a large model.

    deepspeed --num_gpus=2 offload/train.py

runs anywhere, even without a GPU: a small Llama on generated abstracts, under ZeRO-2. A real run, on a GPU of 16 GB:

    deepspeed --num_gpus=1 offload/train.py --model_name meta-llama/Llama-3.2-1B-Instruct \\
        --dataset_name ash001/arxiv-abstract --num_epochs 1 --start_idx 0 --end_idx 4000 \\
        --batch_size 1 --accum_steps 4

(`torchrun`, `srun` with one task per GPU, and plain `python` start it too.)

What differs from zero/train.py: the optimizer is `DeepSpeedCPUAdam`, which updates float32 weights in host memory.
Gradients go down to it and 16-bit weights come back up once per step, so the gradients of all micro-batches are first
added up on the GPU. If the GPU would otherwise be full, activations are recomputed and the loss is fused with the head.
Under stage 3 (ds_zero3_offload.json) the weights are in host memory too, and come up one block at a time.

Ranks communicate only in calls of DeepSpeed and in lines marked `# collective`.
"""

import argparse
import itertools
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import get_cosine_schedule_with_warmup

from common import cli, data, deepspeed_config, distributed, kernels, memory, models
from common.checkpoint import Checkpointer
from common.pretrained import open_weights
from common.rows import RowLoader
from common.tracking import RunLog, reduce_metrics
from offload import cpu_adam, memory_plan
from offload.fused_loss import patch_loss

SAMPLE_MODEL, SAMPLE_TEXT = "llama", "abstracts"


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "offload", Path(__file__).with_name("ds_zero2_offload.json"))
    cli.add_generation_arguments(parser, prompt="We present")
    cli.add_weights_file_arguments(parser)
    memory_plan.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # ------------------------------------------------------------------------------ distributed set-up and seed
    pinned = memory_plan.set_allocators()
    device = distributed.set_device()
    memory.limit_gpu(args.gpu_memory)
    threads = distributed.set_cpu_threads(args.cpu_threads)
    deepspeed.init_distributed()
    rank, dp_world_size = dist.get_rank(), dist.get_world_size()
    distributed.set_seed(args.seed + rank)  # each rank draws its own dropout masks
    log = RunLog(args, "offload")  # collective

    # ---------------------------------------------------------------------- DeepSpeed config, what to resume from
    ds_config, dtype = deepspeed_config.from_args(args, "offload", device, log)
    stage = ds_config["zero_optimization"]["stage"]
    checkpointer = Checkpointer(args, log, ds_config, dp_world_size)  # collective
    resume = checkpointer.resume  # the checkpoint to resume from, or None
    # Puts --batch_size and --accum_steps into ds_config; a resumed run keeps its global batch size.
    deepspeed_config.resolve_batch_size(ds_config, dp_world_size, args.batch_size, args.accum_steps, resume)

    # -------------------------------------------------------------------------------- model files and text to rows
    # The first rank of each host downloads and tokenizes; the others then find the files in its cache.
    with distributed.local_rank_zero_first():  # collective
        info = models.inspect_model(args, SAMPLE_MODEL, resume)
        if distributed.local_rank() == 0:
            cpu_adam.free_build_lock()  # left by a run that was killed while it compiled DeepSpeedCPUAdam
        text = data.load(args, info, SAMPLE_TEXT, ds_config, device, rank, log, checkpointer.initial_epoch)
    total_steps = min(args.num_epochs * text.train.steps_per_epoch, args.max_train_steps or sys.maxsize)
    checkpointer.prepare(info, ds_config, text, total_steps, weights_files=True)  # collective

    # ---------------------------------------------------------------------------------------------------- model
    plan = memory_plan.make_plan(args, info, text.train, stage, device, log)
    log.info(f"optimizer on the host: threads a rank: {threads}; {pinned}")
    model = build_model(args, info, ds_config, dtype, device, log, text.packing, checkpointer, plan)  # collective

    # ------------------------------------------------------------------------------------ optimizer and engine
    groups = cpu_adam.param_groups_by_block(model)
    optimizer = DeepSpeedCPUAdam(groups, lr=checkpointer.learning_rate, weight_decay=args.weight_decay)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    # From here on the engine clips gradients (the JSON sets the norm), steps the schedule and clears the gradients.
    with deepspeed_config.config_errors(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    log.start(info, ds_config, text, dtype, checkpointer.start_step, total_steps, f"ZeRO stage {stage}")
    log.info(*memory_plan.describe_engine(engine))
    if resume:
        with checkpointer.loading(lr_scheduler) as (directory, tag):  # collective; restores RNG and schedule at its end
            engine.load_checkpoint(directory, tag=tag)
            cpu_adam.replay_steps(optimizer)
    if dtype == torch.float16 and stage > 0:  # `log.step` ends a run that skips too many steps, with a clearer error
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
        if epoch_ended and not stopped_by:
            checkpointer.save_weights(model, step)  # collective
        if finished or stopped_by:
            break

        started, lr = time.perf_counter(), lr_scheduler.get_last_lr()[0]
        batch = text.train[step]  # the global batch; iterating over it yields this rank's part
        loss_sum = torch.zeros((), device=device)
        # The engine averages over micro-batches and ranks. Dividing the sum over a micro-batch's targets by the mean
        # number of targets per micro-batch gives every target token of the global batch the same weight.
        #
        # On its own the engine would send the gradients of each micro-batch to the host, and fetch back the sum so far:
        # three trips over PCIe per micro-batch instead of one per step. In this context it sends them once, at the end.
        # `step` may not be called there, so the loop tells the engine which micro-batch is the last one.
        with engine.coalesce_grad_reduction() if plan.accumulate_on_gpu else nullcontext():
            for micro_step, (inputs, labels) in enumerate(batch, start=1):  # this rank's micro-batches
                engine.set_gradient_accumulation_boundary(micro_step == batch.num_micro_batches)
                micro_loss = engine(**inputs, labels=labels).loss / batch.targets_per_micro_batch  # see fused_loss.py
                engine.backward(micro_loss)
                loss_sum += micro_loss.detach()
        engine.set_gradient_accumulation_boundary(True)
        engine.step()  # clips, updates on the CPU, and copies the new weights to the GPU
        # The only communication outside the engine: loss, memory and stop requests of all ranks. Waits for the GPU.
        metrics, stopped_by = reduce_metrics(engine, loss_sum, batch.num_micro_batches, preemption)  # collective
        log.step(step + 1, batch, lr=lr, seconds=time.perf_counter() - started, **metrics)

    # --------------------------------------------------------------------------------------------------- results
    if not stopped_by:
        log.eval(step, evaluate(engine, text.test, args.max_eval_steps), phase="test")  # collective
        table = memory.zero_table(  # collective
            info.parameters, dp_world_size, dtype, stage, device, offload=True, coalesced=plan.accumulate_on_gpu
        )
        log.info(*table)
        # Under ZeRO-3 a rank that finishes early keeps generating, because the others need its shards of the weights.
        log.info(*models.sample_text(model, info, args, text.chat_template, synced_gpus=stage == 3))  # collective
    log.finish(stopped_by)
    checkpointer.finish(stopped_by, preemption, device)  # collective


def build_model(
    args: argparse.Namespace,
    info: models.ModelInfo,
    ds_config: dict,
    dtype: torch.dtype,
    device: torch.device,
    log: RunLog,
    packing: bool,
    checkpointer: Checkpointer,
    plan: memory_plan.Plan,
) -> torch.nn.Module:
    """The Hugging Face model with pretrained weights; a resumed run gets its weights from `load_checkpoint`.

    Under ZeRO-3 each parameter is partitioned among the ranks as soon as its module has created it, and then filled
    from the files one tensor at a time, so that no rank ever holds the whole model.
    """
    stage = ds_config["zero_optimization"]["stage"]
    kernels.choose_kernels(args, info.config, device, dtype, log)
    with distributed.raise_on_all_ranks():  # collective
        memory_plan.check_host(args, info.parameters, dtype, stage, device)
    config_errors = deepspeed_config.config_errors(args.deepspeed_config)
    with config_errors, device, deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3):
        model = models.empty_model(info.config, dtype)
    with distributed.raise_on_all_ranks():  # collective
        pretrained = []
        if not checkpointer.resume:
            pretrained = models.map_pretrained(model, open_weights(info.directory, checkpointer.resume_file))
    for parameter, read_values in pretrained:
        # Below stage 3 every rank fills its own copy. Under stage 3 rank 0 fills the gathered parameter; at the end of
        # the context it is broadcast, and each rank keeps its partition.
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=stage == 3), torch.no_grad():
            if stage < 3 or dist.get_rank() == 0:
                parameter.copy_(read_values())
    patch_loss(model, plan.fused_loss)
    if plan.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage == 3:
        # Gather a transformer block's weights in one message instead of one per submodule.
        deepspeed.utils.set_z3_leaf_modules(model, list(model._no_split_modules))
    if args.compile:
        models.compile_model(model, packing, blocks_only=stage == 3 or plan.activation_checkpointing)
    return model


@torch.no_grad()
def evaluate(engine: deepspeed.DeepSpeedEngine, split: RowLoader, max_batches: int | None) -> dict | None:
    """Mean loss per target token on a split, with counts, equal on all ranks; None if the split is empty.

    All ranks process the same number of micro-batches, with empty rows if need be: under ZeRO-3 each forward pass
    gathers the weights from all ranks.
    """
    if not len(split.rows):
        return None
    engine.eval()
    started, total, targets, samples = time.perf_counter(), 0.0, 0, 0
    for batch in split.eval_batches(max_batches):
        loss = sum(engine(**inputs, labels=labels).loss for inputs, labels in batch)
        total += distributed.sum_over_ranks(loss, engine.device)  # collective
        targets += batch.counts.targets
        samples += batch.counts.samples
    engine.train()
    speed = samples / (time.perf_counter() - started)
    return {"loss": total / targets, "tokens": targets, "samples_per_second": speed}


if __name__ == "__main__":
    distributed.set_rank_variables()
    distributed.run(main)
