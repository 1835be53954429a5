"""Pipeline parallelism by hand: the model's layers are dealt out to stages, one stage a GPU.

    deepspeed --num_gpus=2 pipeline/train.py

runs anywhere, without a GPU too: a small Llama on generated abstracts. The real thing:

    deepspeed --num_gpus=2 pipeline/train.py --model_name meta-llama/Llama-3.2-1B-Instruct \\
        --dataset_name ash001/arxiv-abstract --num_epochs 3 --start_idx 0 --end_idx 25000 \\
        --batch_size 2 --accum_steps 16 --max_length 1024

(`torchrun`, `srun` with a task a GPU and plain `python` start it too.)

What differs from a data-parallel loop: the model is a list of layers (layers.py), of which each rank builds only
its stage's; there is no forward, backward and step to call but one `train_batch`, which sends micro-batches
through the stages so that one computes while another does; and the checkpoint is a file a layer.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from transformers import get_cosine_schedule_with_warmup

from common import attention, checkpoint, cli, data, deepspeed_config, hub, launch, memory, models, sample
from common.errors import UserError
from common.kernels import choose_kernels
from common.pretrained import PretrainedWeights
from common.shards import find_layer_shards
from common.tracking import Guard, RunLog, StageTimer, measure_stages
from pipeline import layers


def parse_args():
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "pipeline", Path(__file__).with_name("ds_pipeline.json"))
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument(
        "--num_stages", type=cli.positive_int, metavar="N",
        help="pipeline stages; world size / N replicas train side by side; default: one stage a rank",
    )  # fmt: skip
    pipeline.add_argument(
        "--partition", metavar="HOW",
        help="balanced (equal work, head and loss included, as far as each stage fits its GPU), uniform (equal numbers "
        "of decoder layers), or decoder layers per stage such as 11,5; default: balanced, for a resumed run its own",
    )  # fmt: skip
    pipeline.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute each decoder layer in the backward pass instead of keeping its activations; default: on if "
        "the JSON enables it, or if a stage would not fit its GPU without it",
    )  # fmt: skip
    pipeline.add_argument(
        "--gpu_memory", type=cli.positive_float, metavar="GIB",
        help="use only this much of each GPU, to try out a smaller one",
    )  # fmt: skip
    return parser.parse_args()


def main():
    args = parse_args()
    # ------------------------------------------------------------------------------------ distributed set-up
    memory.set_gpu_allocator()
    device = launch.set_device()
    memory.limit_gpu(args.gpu_memory)
    deepspeed.init_distributed()
    log = RunLog(args, "pipeline")
    world_size = launch.world_size()
    num_stages = args.num_stages or world_size
    if world_size % num_stages:
        raise UserError(f"--num_stages {num_stages} does not divide the {world_size} ranks")
    dp_world_size = world_size // num_stages

    # -------------------------------------------------------------------------------------- DeepSpeed config
    ds_config = deepspeed_config.load(args.deepspeed_config)
    deepspeed_config.check_pipeline(ds_config)
    dtype, why = deepspeed_config.set_precision(ds_config, device, args.precision)
    layout = checkpoint.layout(ds_config, num_stages, dp_world_size, param_groups="layer")
    resume = None
    uploads = hub.Uploads(args, log.say)
    hub.fetch_resume(args, log.say)
    # A rank that fails alone would leave the others waiting in their next collective call: all stop together.
    with launch.all_ranks_agree():
        if args.resume_from_checkpoint is not None:
            resume = checkpoint.find_resume(args.resume_from_checkpoint, args.output_dir, layout)
    micro_batch_size, gradient_accumulation_steps, global_batch_size = deepspeed_config.set_batch(
        ds_config, dp_world_size, args.batch_size, args.accum_steps, resume
    )
    equation = deepspeed_config.describe_batch(
        micro_batch_size, gradient_accumulation_steps, dp_world_size, args.max_length
    )
    log.say(equation, why)

    # ------------------------------------------------------------------------------------ tokenizer and data
    model_directory = launch.first_then_others(lambda: models.model_directory(args.model_name, "llama", resume))
    with launch.all_ranks_agree():
        config, tokenizer = models.load_config_and_tokenizer(model_directory, args.max_length)
        side_files = checkpoint.read_side_files(model_directory)
        layers.check_architecture(config)
        args.packing = attention.choose_packing(config, args.packing)
    train_rows, eval_rows = launch.first_then_others(lambda: data.load_rows(args, tokenizer, "abstracts"))
    models.check_vocabulary(tokenizer, (train_rows, eval_rows), config.vocab_size)
    log.say(data.describe("train", train_rows), data.describe("held out", eval_rows))
    steps_per_epoch = data.steps_in_epoch(train_rows, global_batch_size)
    total_steps = min(args.num_epochs * steps_per_epoch, args.max_train_steps or sys.maxsize)

    # ------------------------------------------------------------------------------------------------- model
    config._attn_implementation = attention.choose_attention(config, device, dtype)
    kernels = choose_kernels(config, device, args.liger, args.compile)  # replaces classes, so before they are used
    log.say(kernels, f"attention: {config._attn_implementation}")
    attended = train_rows.mean_attended  # tokens that a token attends to: attention's share of the work
    usable = memory.usable_gpu_bytes(device)
    peak = functools.partial(
        layers.stage_peak, config, layers.layer_sizes(config), num_stages, dtype=dtype, dp_world_size=dp_world_size,
        micro_batches=gradient_accumulation_steps, rows=micro_batch_size, length=args.max_length,
    )  # fmt: skip
    interval = ds_config.setdefault("pipeline", {}).get("activation_checkpoint_interval", 0)
    saved_bounds = resume.run.get("bounds") if resume and resume.run else None
    same_shape = (
        saved_bounds and len(saved_bounds) == num_stages + 1 and saved_bounds[-1] == config.num_hidden_layers + 3
    )
    bounds, checkpointing = layers.plan_stages(
        config, num_stages, "balanced" if args.partition is None else args.partition, attended, peak, usable,
        bounds=saved_bounds if same_shape and args.partition is None else None,
        checkpointing=True if args.activation_checkpointing is None and interval else args.activation_checkpointing,
    )  # fmt: skip
    ds_config["pipeline"]["activation_checkpoint_interval"] = (interval or 1) if checkpointing else 0
    if saved_bounds and saved_bounds != bounds and resume.full and not resume.recut:
        resume.recut = True
        resume.why += f", resharded: its stages begin at layers {saved_bounds[:-1]}, this run's at {bounds[:-1]}"
    if resume and resume.recut:  # DeepSpeed must know before it builds the engine
        ds_config.setdefault("checkpoint", {})["load_universal"] = True
    log.say(*layers.describe_partition(config, bounds, gradient_accumulation_steps, attended))
    log.say(layers.describe_memory(bounds, peak, usable, checkpointing))
    parameters, matmul_parameters = layers.count_parameters(config)
    # A tied head is a weight of its own on the last stage, and in its file.
    stored = parameters + config.tie_word_embeddings * config.vocab_size * config.hidden_size
    with launch.all_ranks_agree():
        needed = checkpoint.check_disk(args, stored, layout, steps_per_epoch, total_steps, resume)
    # Each rank builds its own stage's layers, on its own device, and reads only their weights from the files.
    # Without gradients, since DeepSpeed's broadcast of a tied weight would otherwise be recorded for autograd.
    with device, launch.default_dtype(dtype), torch.no_grad():
        pipeline = layers.PartitionedPipeline(
            layers.layer_specs(config, num_stages, data.attention_limits(train_rows, eval_rows), args.compile),
            bounds,
            loss_fn=layers.causal_lm_loss,
            # Recomputing the head would save almost nothing. With chunks of several layers DeepSpeed would leave out
            # those that include any other layer.
            checkpointable_layers=["DecoderLayerPipe"] if interval <= 1 else None,
        )
    with launch.all_ranks_agree():
        if resume:
            layers.load_shards(pipeline, find_layer_shards(resume.directory, config.num_hidden_layers))
        else:
            layers.load_pretrained(pipeline, PretrainedWeights(model_directory), config)
    # For dropout, and only now, because building a stage draws as many random numbers as it has weights. The ranks of
    # one stage are neighbors, so each replica gets its own masks, and all its stages the same.
    launch.set_seed(args.seed + launch.rank() % dp_world_size)

    # --------------------------------------------------------------------------------------------- optimizer
    learning_rate = cli.peak_learning_rate(args, resume)
    groups = layers.optimizer_groups(pipeline)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)

    # ---------------------------------------------------------------------------------- deepspeed.initialize
    # From here on the engine clips (the JSON says to what norm), steps the schedule and clears the gradients.
    with deepspeed_config.refusals(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(
            model=pipeline, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config
        )
    layers.release_logits(engine)
    layers.save_memory_in_norm(dtype)
    stage_timer = StageTimer(engine)
    model_name = checkpoint.model_name(args, resume, model_directory)
    log.run(ds_config, model_name, sample.full_name(args.dataset_name, "abstracts"), parameters)
    log.say(f"model: {config.model_type}, {parameters:,} parameters, pipeline stages: {num_stages}")

    # ------------------------------------------------------------------------------------------------ resume
    global_step = samples_seen = 0
    data_state = data.data_state(args, train_rows, global_batch_size)
    if resume:
        log.say(f"resume from {resume.directory}: {resume.why}")
        if resume.full:
            # Weights once more, now with optimizer and schedule.
            with torch.no_grad(), checkpoint.loading(resume, args.output_dir, len(groups)) as directory:
                # The saved schedule has one entry per parameter group, and another split may have a different number.
                engine.load_checkpoint(
                    str(directory.parent), tag=directory.name, load_lr_scheduler_states=not resume.recut
                )
        if resume.run:
            global_step, samples_seen = checkpoint.restore(resume, data_state, lr_scheduler)

    saved_step, saved = (global_step, resume.directory) if resume else (None, None)

    def save():
        nonlocal saved_step, saved
        tag = checkpoint.tag_of(global_step)
        client_state = checkpoint.client_state(
            args, layout, data_state, model_name, learning_rate, global_step, samples_seen, bounds=bounds
        )
        # All ranks save, each its own share. The tag is of a hidden directory, which gets its name once every
        # rank's files are complete.
        with checkpoint.saving(args.output_dir, tag, side_files, needed) as hidden:
            engine.save_checkpoint(args.output_dir, tag=hidden, client_state=client_state, save_latest=False)
        saved_step, saved = global_step, Path(args.output_dir) / tag
        checkpoint.drop_old(args.output_dir, args.keep_last, uploads.pending())
        log.say(f"saved {saved}")
        uploads.upload(saved)

    # ---------------------------------------------------------------------------------------------- evaluate
    if global_step == 0:
        evaluate(engine, eval_rows, "before", args, log, global_step, 0.0)

    # ------------------------------------------------------------------------------------------------- train
    log.begin(global_step, total_steps, steps_per_epoch, config, matmul_parameters)
    guard = Guard(dtype == torch.float16, global_step, engine.optimizer)
    stop = launch.StopSignal()
    # A checkpoint from an epoch's last step goes on with what follows it: evaluation, and the epoch's checkpoint. With
    # 23 steps an epoch step 46 is 23 steps into epoch 1, of which none is left.
    epochs_done = max(global_step - 1, 0) // steps_per_epoch
    first_step = global_step - epochs_done * steps_per_epoch
    for epoch in range(epochs_done, args.num_epochs):
        order = data.epoch_order(train_rows, global_batch_size, args.seed, epoch)
        for step_rows in order[first_step : first_step + total_steps - global_step]:
            started = stage_timer.start()
            lr = lr_scheduler.get_last_lr()[0]
            counts = train_rows.count(step_rows)
            batches = micro_batches(engine, train_rows, step_rows, gradient_accumulation_steps)
            loss = engine.train_batch(data_iter=batches).item()
            grad_norm = float(engine.get_global_grad_norm())
            global_step += 1
            samples_seen += counts.samples
            busy, seconds = stage_timer.stop(started)
            log.step(
                global_step, counts, loss=loss, lr=lr, grad_norm=grad_norm, seconds=seconds, samples_seen=samples_seen,
                **measure_stages(engine, busy / seconds),
            )  # fmt: skip
            guard.check(global_step, loss, grad_norm)
            stopped_by = stop.agreed(device)
            if args.save_checkpoint and (stopped_by or (args.save_every and global_step % args.save_every == 0)):
                save()
            if stopped_by:
                log.stop(stopped_by, global_step, args.save_checkpoint)
                return
        first_step = 0
        # --------------------------------------------------------------------------------- evaluate and save
        last = global_step >= total_steps
        phase = "after" if last else "epoch"
        evaluate(engine, eval_rows, phase, args, log, global_step, global_step / steps_per_epoch)
        if args.save_checkpoint and saved_step != global_step:
            save()
        if last:
            break
    log.close()
    uploads.finish(stop, device)
    if args.save_checkpoint:
        checkpoint.drop_old(args.output_dir, args.keep_last, uploads.pending())  # what was still to be uploaded
        log.say(
            "to convert the checkpoint for inference:",
            checkpoint.convert_command(saved, args.output_dir, "--verify", "--prompt", "We present"),
        )


def micro_batches(engine, rows, step_rows, count):
    """What `train_batch` and `eval_batch` draw: this replica's share of a global batch in `count` micro-batches.

    First and last stage draw the same ones; the first uses the inputs, the last the labels. The labels bring the
    number of targets that `causal_lm_loss` divides by, which is the same for all.
    """
    replicas, replica = engine.grid.get_data_parallel_world_size(), engine.grid.get_data_parallel_id()
    targets_per_micro_batch = torch.tensor([rows.count(step_rows).targets / (count * replicas)], device=engine.device)
    for batch in data.micro_batches(rows, step_rows, count, replicas, replica, engine.device, one_width=True):
        yield (batch["input_ids"], batch["position_ids"]), (batch["labels"], targets_per_micro_batch)


def evaluate(engine, rows, phase, args, log, global_step, epoch):
    """Token-weighted loss and perplexity on held-out rows, equal on every rank, into the log.

    A batch takes only as many micro-batches as it has rows for: `eval_batch` runs the forward half of the
    schedule, for which any number will do, but every micro-batch must have the shape of the training ones.
    """
    if not len(rows):
        return
    started, loss_sum, targets_seen, samples_seen = time.time(), 0.0, 0, 0
    rows_at_once = engine.train_micro_batch_size_per_gpu() * engine.grid.get_data_parallel_world_size()
    batches = data.eval_batches(rows, rows_at_once, engine.gradient_accumulation_steps())
    for step_rows in batches[: args.max_eval_steps]:
        count = len(step_rows) // rows_at_once
        loss = engine.eval_batch(micro_batches(engine, rows, step_rows, count), num_micro_batches=count)
        counts = rows.count(step_rows)
        loss_sum += loss.item() * counts.targets
        targets_seen += counts.targets
        samples_seen += counts.samples
    log.eval(
        step=global_step,
        epoch=epoch,
        phase=phase,
        loss=loss_sum / targets_seen,
        perplexity=torch.tensor(loss_sum / targets_seen).exp().item(),
        tokens=targets_seen,
        samples_per_second=samples_seen / (time.time() - started),
    )


if __name__ == "__main__":
    launch.set_rank_variables()
    launch.run(main)
