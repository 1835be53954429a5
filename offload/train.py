"""ZeRO-Offload by hand: the optimizer and its states live in host memory, so that a small GPU trains a large model.

    deepspeed --num_gpus=2 offload/train.py

runs anywhere, without a GPU too: a small Llama on generated abstracts, under ZeRO-2. The real thing, on a GPU of 16 GB:

    deepspeed --num_gpus=1 offload/train.py --model_name meta-llama/Llama-3.2-1B-Instruct \\
        --dataset_name ash001/arxiv-abstract --num_epochs 1 --start_idx 0 --end_idx 4000 \\
        --batch_size 1 --accum_steps 4

(`torchrun`, `srun` with a task a GPU and plain `python` start it too.)

What differs from zero/train.py: the optimizer is `DeepSpeedCPUAdam`, which updates float32 weights in host memory;
gradients go down to it and 16-bit weights come back up once a step, so all micro-batches' gradients are first
added up on the GPU; and activations are recomputed and the loss is fused where the GPU would else be full. Under
stage 3 (ds_zero3_offload.json) the weights too wait in host memory, and come up a block at a time.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from common import attention, checkpoint, cli, data, deepspeed_config, generate, hub, launch, memory, models, sample
from common.kernels import choose_kernels, free_build_lock, fuse_loss
from common.pretrained import open_weights
from common.tracking import Guard, RunLog, banner, measure


def parse_args():
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "offload", Path(__file__).with_name("ds_zero2_offload.json"))
    cli.add_generation_arguments(parser, prompt="We present")
    offload = parser.add_argument_group("offload")
    offload.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction,
        help="recompute each block in the backward pass instead of keeping its activations; default: where they would "
        "not fit",
    )  # fmt: skip
    offload.add_argument(
        "--fused_loss", action=argparse.BooleanOptionalAction,
        help="head and loss a slice of tokens at a time; default: where the logits would take over a tenth of the GPU",
    )  # fmt: skip
    offload.add_argument(
        "--coalesce", action=argparse.BooleanOptionalAction,
        help="add up the gradients of all micro-batches on the GPU, so that they go to the host once a step; default: "
        "where they take less than a quarter of the GPU",
    )  # fmt: skip
    offload.add_argument(
        "--gpu_memory", type=cli.positive_float, metavar="GIB", help="use so much of the GPU, to try out a smaller one"
    )
    offload.add_argument(
        "--host_memory", type=cli.positive_float, metavar="GIB", help="memory of this host; default: what it says"
    )
    offload.add_argument(
        "--cpu_threads", type=cli.positive_int, metavar="N",
        help="threads of this rank's optimizer; default: the host's cores shared out to its ranks",
    )  # fmt: skip
    offload.add_argument(
        "--resume_file", metavar="FILE",
        help="start from the weights in an earlier run's .pt file; if there is no such local file, it is downloaded "
        "from --hf_repo, or for USER/NAME/FILE from that repository; ignored with --resume_from_checkpoint, which "
        "loads weights too",
    )  # fmt: skip
    offload.add_argument(
        "--initial_epoch", type=cli.non_negative_int, metavar="N",
        help="epochs trained before this run, whose first epoch is number N+1; default: the number in the name of "
        "--resume_file, or 0; a resumed run keeps its own",
    )  # fmt: skip
    return parser.parse_args()


def main():
    args = parse_args()
    # --------------------------------------------------------------------------- distributed set-up and seed
    pinned = memory.set_allocators()
    device = launch.set_device()
    memory.limit_gpu(args.gpu_memory)
    threads = launch.set_cpu_threads(args.cpu_threads)
    deepspeed.init_distributed()
    launch.set_seed(args.seed + launch.rank())  # each rank gets its own dropout masks
    log = RunLog(args, "offload")
    dp_world_size = launch.world_size()

    # -------------------------------------------------------------------------------------- DeepSpeed config
    ds_config = deepspeed_config.load(args.deepspeed_config)
    stage = deepspeed_config.check_zero(ds_config, offload=True)
    dtype, why = deepspeed_config.set_precision(ds_config, device, args.precision)
    layout = checkpoint.layout(ds_config, num_stages=1, dp_world_size=dp_world_size)
    resume = None
    uploads = hub.Uploads(args, log.say)
    hub.fetch_resume(args, log.say)
    # A rank that fails alone would leave the others waiting in their next collective call: all stop together.
    with launch.all_ranks_agree():
        if args.resume_from_checkpoint is not None:
            resume = checkpoint.find_resume(args.resume_from_checkpoint, args.output_dir, layout, layers=False)
    if resume and resume.recut:  # which DeepSpeed has to know before it makes the engine
        ds_config.setdefault("checkpoint", {})["load_universal"] = True
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
        generate.check(args, config, tokenizer)
        side_files = checkpoint.read_side_files(model_directory)
        args.packing = attention.choose_packing(config, args.packing)
    train_rows, eval_rows, test_rows = launch.first_then_others(
        lambda: data.load_rows(args, tokenizer, "abstracts", test=True)
    )
    models.check_vocabulary(tokenizer, (train_rows, eval_rows, test_rows), config.vocab_size)
    log.say(*(data.describe(*part) for part in (("train", train_rows), ("held out", eval_rows), ("test", test_rows))))
    steps_per_epoch = data.steps_in_epoch(train_rows, global_batch_size)
    total_steps = min(args.num_epochs * steps_per_epoch, args.max_train_steps or sys.maxsize)
    limits = data.attention_limits(train_rows, eval_rows, test_rows)  # the most documents a row, tokens of the longest
    initial_epoch = checkpoint.initial_epoch(args, log, resume)
    end_idx = args.end_idx or data.count_documents(args, "abstracts")  # for the names of the files of weights

    # ------------------------------------------------------------------------------------------------- model
    config._attn_implementation = attention.choose_attention(config, device, dtype)
    kernels = choose_kernels(config, device, args.liger, args.compile)  # replaces classes, so before they are used
    log.say(kernels, f"attention: {config._attn_implementation}")
    parameters, matmul_parameters = models.count_parameters(models.on_meta(config))
    with launch.all_ranks_agree():
        file = dtype.itemsize * parameters * args.save_checkpoint  # of weights, that rank 0 writes
        held = memory.offloaded(parameters, dp_world_size, stage, device)
        memory.check_host(held, file, args.host_memory, hint=" (--host_memory, if it has more than it says)")
        needed = checkpoint.check_disk(
            args, parameters, layout, steps_per_epoch, total_steps, resume, weights_files=True
        )
    # Under ZeRO-3 each parameter is partitioned among the ranks as soon as its module has made it, and then filled
    # from the files one at a time: the whole model is never in one place. Below stage 3 every rank fills its own copy;
    # under 3 rank 0 fills the gathered parameter, and leaving the block hands out the partitions.
    refusals = deepspeed_config.refusals(args.deepspeed_config)
    with refusals, device, deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3):
        model = models.without_weights(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
    with launch.all_ranks_agree():
        # A resumed run gets its weights with the rest of its state, below.
        pretrained = [] if resume else models.match_weights(model, open_weights(model_directory, args.resume_file))
    for parameter, read in pretrained:
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=stage == 3), torch.no_grad():
            if stage < 3 or launch.rank() == 0:
                parameter.copy_(read())
    model.loss_function = causal_lm_loss  # HF's forward calls it with its logits and the keywords it does not know
    plan, lines = memory.plan(
        args, config, device, parameters, stage, micro_batch_size * args.max_length, gradient_accumulation_steps
    )
    log.say(*lines, f"optimizer on the host: threads a rank: {threads}; {pinned}")
    if plan.fused_loss:
        fuse_loss(model)
    if plan.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage == 3:
        # A block's weights come in one message, not one for each of its modules.
        deepspeed.utils.set_z3_leaf_modules(model, {type(block) for block in models.blocks(model)})
    if args.compile:
        models.compile_model(model, args.packing, blocks_alone=stage == 3 or plan.activation_checkpointing)

    # --------------------------------------------------------------------------------------------- optimizer
    learning_rate = cli.peak_learning_rate(args, resume)
    # While the CPU updates one group of weights, those of the group before are on their way back to the GPU.
    groups = models.groups_by_block(model)
    with launch.all_ranks_agree():
        if launch.local_rank() == 0:
            free_build_lock("cpu_adam")  # of a run killed while it compiled, which this one would wait for
    optimizer = DeepSpeedCPUAdam(groups, lr=learning_rate, weight_decay=args.weight_decay)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)

    # ---------------------------------------------------------------------------------- deepspeed.initialize
    # From here on the engine clips (the JSON says to what norm), steps the schedule and clears the gradients.
    with deepspeed_config.refusals(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    model_name = checkpoint.model_name(args, resume, model_directory)
    log.run(ds_config, model_name, sample.full_name(args.dataset_name, "abstracts"), parameters)
    log.say(f"model: {config.model_type}, {parameters:,} parameters", *banner(engine))

    # ------------------------------------------------------------------------------------------------ resume
    global_step = samples_seen = 0
    data_state = data.data_state(args, train_rows, global_batch_size)
    if resume:
        log.say(f"resume from {resume.directory}: {resume.why}")
        with checkpoint.loading(resume, args.output_dir) as directory:
            engine.load_checkpoint(str(directory.parent), tag=directory.name)
            checkpoint.replay_steps(optimizer)
        global_step, samples_seen = checkpoint.restore(resume, data_state, lr_scheduler)

    saved_step, saved = (global_step, resume.directory) if resume else (None, None)

    def save():
        nonlocal saved_step, saved
        tag = checkpoint.tag_of(global_step)
        client_state = checkpoint.client_state(
            args, layout, data_state, model_name, learning_rate, global_step, samples_seen, initial_epoch=initial_epoch
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
        evaluate(engine, eval_rows, "before", args, limits, log, global_step, 0.0)

    # ------------------------------------------------------------------------------------------------- train
    log.begin(global_step, total_steps, steps_per_epoch, config, matmul_parameters)
    guard = Guard(dtype == torch.float16, global_step, engine.optimizer)
    stop = launch.StopSignal()
    # A checkpoint from an epoch's last step goes on with what follows it: evaluation, and the epoch's checkpoint. With
    # 23 steps an epoch step 46 is 23 steps into epoch 1, of which none is left.
    epochs_done = max(global_step - 1, 0) // steps_per_epoch
    first_step = global_step - epochs_done * steps_per_epoch
    for epoch in range(initial_epoch + epochs_done, initial_epoch + args.num_epochs):
        order = data.epoch_order(train_rows, global_batch_size, args.seed, epoch)
        for step_rows in order[first_step : first_step + total_steps - global_step]:
            started = time.perf_counter()
            lr = lr_scheduler.get_last_lr()[0]
            counts = train_rows.count(step_rows)
            # The engine takes the mean over micro-batches and ranks; with this divisor it is sum of all / all targets.
            targets_per_micro_batch = counts.targets / (gradient_accumulation_steps * dp_world_size)
            loss = 0.0
            batches = data.micro_batches(
                train_rows, step_rows, gradient_accumulation_steps, dp_world_size, launch.rank(), device
            )
            # Left to itself the engine would send the gradients of every micro-batch to the host and fetch back
            # what it has there of those before: three trips over PCIe a micro-batch instead of one a step. In the
            # context it does so once, at its end; `step` may not be called there, so the loop says itself which
            # micro-batch is the last.
            with engine.coalesce_grad_reduction() if plan.coalesce else nullcontext():
                for micro_step, batch in enumerate(batches, start=1):
                    engine.set_gradient_accumulation_boundary(micro_step == gradient_accumulation_steps)
                    inputs = attention.model_inputs(config, batch["input_ids"], batch["position_ids"], limits)
                    inputs |= {"labels": batch["labels"], "num_items_in_batch": targets_per_micro_batch}
                    micro_loss = engine(**inputs).loss
                    engine.backward(micro_loss)
                    loss += micro_loss.detach()
            engine.set_gradient_accumulation_boundary(True)
            engine.step()
            loss = launch.sum_over_ranks(loss, device) / (gradient_accumulation_steps * dp_world_size)
            grad_norm = engine.get_global_grad_norm()
            grad_norm = None if grad_norm is None else float(grad_norm)
            global_step += 1
            samples_seen += counts.samples
            seconds = time.perf_counter() - started
            log.step(
                global_step, counts, loss=loss, lr=lr, grad_norm=grad_norm, seconds=seconds, samples_seen=samples_seen,
                **measure(device, engine),
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
        evaluate(engine, eval_rows, phase, args, limits, log, global_step, global_step / steps_per_epoch)
        if args.save_checkpoint and saved_step != global_step:
            save()
        if args.save_checkpoint:
            name = checkpoint.weights_file_name(model_name, args.start_idx, end_idx, epoch + 1)
            checkpoint.write_weights_file(Path(args.output_dir) / name, checkpoint.gather_state(model, stage))
            log.say(f"saved {args.output_dir}/{name}")
            uploads.upload(Path(args.output_dir) / name)
        if last:
            break
    evaluate(engine, test_rows, "test", args, limits, log, global_step, global_step / steps_per_epoch)
    log.say(*memory.zero_table(parameters, dp_world_size, dtype, stage, device, offload=True, coalesced=plan.coalesce))

    # ------------------------------------------------------------------------------------------- sample text
    if args.generation_prompt:
        sampling = generate.prepare(model, tokenizer, args, device)
        # Under ZeRO-3 a rank that has its text would leave the others waiting for its share of the weights.
        text = model.generate(**sampling, synced_gpus=stage == 3)
        log.say(tokenizer.decode(text[0], skip_special_tokens=True))
    log.close()
    uploads.finish(stop, device)
    if args.save_checkpoint:
        checkpoint.drop_old(args.output_dir, args.keep_last, uploads.pending())  # what was still to be uploaded
        log.say(
            "to convert the checkpoint for inference:",
            checkpoint.convert_command(saved, args.output_dir, "--verify"),
        )


def causal_lm_loss(logits, labels, num_items_in_batch, **_):
    """The micro-batch's part of the token-weighted loss of the whole global batch; HF's models call it.

    The engine averages over `accumulation x data-parallel` micro-batches. Averaging their means would give a token
    of a short micro-batch more weight than one of a long micro-batch; so each is its *sum* over the global batch's
    targets divided by the number of its micro-batches, and the average comes out as sum over all / targets of all.

    Args:
        logits: [B, T, V].
        labels: [B, T] in HF's convention, -100 where there is no target.
        num_items_in_batch: HF's name for what the sum is divided by, here the mean number of targets a micro-batch.
    """
    # Position t predicts token t + 1. Shifting the labels instead of the logits spares a copy of the latter, and
    # DeepSpeed's cross entropy one in float32.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss_sum = chunked_cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss_sum / num_items_in_batch


@torch.no_grad()
def evaluate(engine, rows, phase, args, limits, log, global_step, epoch):
    """Token-weighted loss and perplexity on held-out rows, equal on every rank, into the log.

    Every rank takes the same number of micro-batches, if need be of empty rows: under ZeRO-3 each one is needed
    for the weights of all.
    """
    if not len(rows):
        return
    engine.eval()
    started, loss_sum, targets_seen, samples_seen = time.time(), 0.0, 0, 0
    rows_at_once = engine.train_micro_batch_size_per_gpu() * launch.world_size()
    batches = data.eval_batches(rows, rows_at_once, engine.gradient_accumulation_steps())
    for step_rows in batches[: args.max_eval_steps]:
        count = len(step_rows) // rows_at_once
        loss = 0.0
        for batch in data.micro_batches(rows, step_rows, count, launch.world_size(), launch.rank(), engine.device):
            inputs = attention.model_inputs(engine.module.config, batch["input_ids"], batch["position_ids"], limits)
            loss += engine(**inputs, labels=batch["labels"], num_items_in_batch=1).loss
        loss_sum += launch.sum_over_ranks(loss, engine.device)
        counts = rows.count(step_rows)
        targets_seen += counts.targets
        samples_seen += counts.samples
    engine.train()
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
