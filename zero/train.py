"""ZeRO by hand: data parallelism in which the ranks shard optimizer states, gradients and weights among themselves.

    deepspeed --num_gpus=2 zero/train.py

runs anywhere, even without a GPU: a small GPT-2 on generated paragraphs, under ZeRO-2. A real run:

    deepspeed --num_gpus=2 zero/train.py --model_name distilbert/distilgpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config wikitext-2-raw-v1 --num_epochs 3 --batch_size 8 --max_length 512

(`torchrun`, `srun` with one task per GPU, and plain `python` start it too.)

What differs from a loop on one GPU: `deepspeed.initialize` wraps the model in an engine whose forward, `backward` and
`step` also communicate. What they communicate depends on the stage in the JSON; the loop is the same for all. Stage 1
shards the optimizer states (ds_zero1.json), stage 2 the gradients too (ds_zero2.json, the default), stage 3 the weights
as well (ds_zero3.json); stage 0 is plain data parallelism.

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

from common import cli, data, deepspeed_config, distributed, kernels, memory, models
from common.checkpoint import Checkpointer
from common.loss import token_loss
from common.pretrained import open_weights
from common.rows import RowLoader
from common.tracking import RunLog, reduce_metrics

SAMPLE_MODEL, SAMPLE_TEXT = "gpt2", "paragraphs"


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "zero", Path(__file__).with_name("ds_zero2.json"))
    cli.add_generation_arguments(parser)
    cli.add_weights_file_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # ------------------------------------------------------------------------------ distributed set-up and seed
    device = distributed.set_device()
    deepspeed.init_distributed()
    rank, dp_world_size = dist.get_rank(), dist.get_world_size()
    distributed.set_seed(args.seed + rank)  # each rank draws its own dropout masks
    log = RunLog(args, "zero")  # collective

    # ---------------------------------------------------------------------- DeepSpeed config, what to resume from
    ds_config, dtype = deepspeed_config.from_args(args, "zero", device, log)
    stage = ds_config["zero_optimization"]["stage"]
    checkpointer = Checkpointer(args, log, ds_config, dp_world_size)  # collective
    resume = checkpointer.resume  # the checkpoint to resume from, or None
    # Puts --batch_size and --accum_steps into ds_config; a resumed run keeps its global batch size.
    deepspeed_config.resolve_batch_size(ds_config, dp_world_size, args.batch_size, args.accum_steps, resume)

    # -------------------------------------------------------------------------------- model files and text to rows
    # The first rank of each host downloads and tokenizes; the others then find the files in its cache.
    with distributed.local_rank_zero_first():  # collective
        info = models.inspect_model(args, SAMPLE_MODEL, resume)
        text = data.load(args, info, SAMPLE_TEXT, ds_config, device, rank, log, checkpointer.initial_epoch)
    total_steps = min(args.num_epochs * text.train.steps_per_epoch, args.max_train_steps or sys.maxsize)
    # Files of weights without training state are for sharing, so they are only written if --hf_repo is given.
    checkpointer.prepare(info, ds_config, text, total_steps, weights_files=args.hf_repo is not None)  # collective

    # ---------------------------------------------------------------------------------------------------- model
    model = build_model(args, info, ds_config, dtype, device, log, text.packing, checkpointer)  # collective

    # ------------------------------------------------------------------------------------ optimizer and engine
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=checkpointer.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    # From here on the engine clips gradients (the JSON sets the norm), steps the schedule and clears the gradients.
    with deepspeed_config.config_errors(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    log.start(info, ds_config, text, dtype, checkpointer.start_step, total_steps, f"ZeRO stage {stage}")
    if resume:
        with checkpointer.loading(lr_scheduler) as (directory, tag):  # collective; restores RNG and schedule at its end
            engine.load_checkpoint(directory, tag=tag)
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
        for inputs, labels in batch:  # this rank's micro-batches
            # `token_loss` is a sum over targets. Under stage 3 the forward pass gathers the weights of each block.
            micro_loss = token_loss(engine(**inputs).logits, labels) / batch.targets_per_micro_batch
            engine.backward(micro_loss)  # reduces gradients, under stages 0 and 1 only at the last micro-batch
            engine.step()  # no-op until then; clips, updates this rank's shard, and under 1 and 2 all-gathers weights
            loss_sum += micro_loss.detach()
        # The only communication outside the engine: loss, memory and stop requests of all ranks. Waits for the GPU.
        metrics, stopped_by = reduce_metrics(engine, loss_sum, batch.num_micro_batches, preemption)  # collective
        log.step(step + 1, batch, lr=lr, seconds=time.perf_counter() - started, **metrics)

    # --------------------------------------------------------------------------------------------------- results
    if not stopped_by:
        log.eval(step, evaluate(engine, text.test, args.max_eval_steps), phase="test")  # collective
        log.info(*memory.zero_table(info.parameters, dp_world_size, dtype, stage, device))  # collective
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
) -> torch.nn.Module:
    """The Hugging Face model with pretrained weights; a resumed run gets its weights from `load_checkpoint`.

    Under ZeRO-3 each parameter is partitioned among the ranks as soon as its module has created it, and then filled
    from the files one tensor at a time, so that no rank ever holds the whole model.
    """
    stage = ds_config["zero_optimization"]["stage"]
    kernels.choose_kernels(args, info.config, device, dtype, log)
    with distributed.raise_on_all_ranks():  # collective
        memory.check_host(memory.resident(info.parameters, dist.get_world_size(), dtype, stage, device))
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
    if stage == 3:
        # Gather a transformer block's weights in one message instead of one per submodule.
        deepspeed.utils.set_z3_leaf_modules(model, list(model._no_split_modules))
    if args.compile:
        models.compile_model(model, packing, blocks_only=stage == 3)
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
        loss = sum(token_loss(engine(**inputs).logits, labels) for inputs, labels in batch)
        total += distributed.sum_over_ranks(loss, engine.device)  # collective
        targets += batch.counts.targets
        samples += batch.counts.samples
    engine.train()
    speed = samples / (time.perf_counter() - started)
    return {"loss": total / targets, "tokens": targets, "samples_per_second": speed}


if __name__ == "__main__":
    distributed.set_rank_variables()
    distributed.run(main)
