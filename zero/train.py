"""ZeRO by hand: every rank trains its own rows, and the ranks share out what each would otherwise hold in full.

    deepspeed --num_gpus=2 zero/train.py

runs anywhere, without a GPU too: a small GPT-2 on generated paragraphs, under ZeRO-2. The real thing:

    deepspeed --num_gpus=2 zero/train.py --model_name distilbert/distilgpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config wikitext-2-raw-v1 --num_epochs 3 --batch_size 8 --max_length 512

(`torchrun`, `srun` with a task a GPU and plain `python` start it too.)

What differs from the loop of one GPU: `deepspeed.initialize` wraps the model in an engine whose `backward` and `step`
also move gradients and weights between the ranks. Which of them it moves is the stage in the JSON, and the loop is
the same for all: 1 shares out the optimizer's states (ds_zero1.json), 2 the gradients too (ds_zero2.json, the
default), 3 the weights as well (ds_zero3.json).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from common import attention, checkpoint, cli, data, deepspeed_config, generate, hub, launch, memory, models, sample
from common.kernels import choose_kernels
from common.pretrained import PretrainedWeights
from common.tracking import Guard, RunLog, measure


def parse_args():
    parser = cli.Parser(description=__doc__)
    cli.add_run_arguments(parser, "zero", Path(__file__).with_name("ds_zero2.json"))
    cli.add_generation_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    # --------------------------------------------------------------------------- distributed set-up and seed
    device = launch.set_device()
    deepspeed.init_distributed()
    launch.set_seed(args.seed + launch.rank())  # each rank gets its own dropout masks
    log = RunLog(args, "zero")
    dp_world_size = launch.world_size()

    # -------------------------------------------------------------------------------------- DeepSpeed config
    ds_config = deepspeed_config.load(args.deepspeed_config)
    stage = deepspeed_config.check_zero(ds_config, offload=False)
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
    model_directory = launch.first_then_others(lambda: models.model_directory(args.model_name, "gpt2", resume))
    with launch.all_ranks_agree():
        config, tokenizer = models.load_config_and_tokenizer(model_directory, args.max_length)
        generate.check(args, config, tokenizer)
        side_files = checkpoint.read_side_files(model_directory)
        args.packing = attention.choose_packing(config, args.packing)
    train_rows, eval_rows, test_rows = launch.first_then_others(
        lambda: data.load_rows(args, tokenizer, "paragraphs", test=True)
    )
    models.check_vocabulary(tokenizer, (train_rows, eval_rows, test_rows), config.vocab_size)
    log.say(*(data.describe(*part) for part in (("train", train_rows), ("held out", eval_rows), ("test", test_rows))))
    steps_per_epoch = data.steps_in_epoch(train_rows, global_batch_size)
    total_steps = min(args.num_epochs * steps_per_epoch, args.max_train_steps or sys.maxsize)
    limits = data.attention_limits(train_rows, eval_rows, test_rows)  # the most documents a row, tokens of the longest
    # For the names of the files of weights, which go to the Hub.
    end_idx = args.end_idx or (data.count_documents(args, "paragraphs") if args.hf_repo else None)

    # ------------------------------------------------------------------------------------------------- model
    config._attn_implementation = attention.choose_attention(config, device, dtype)
    kernels = choose_kernels(config, device, args.liger, args.compile)  # replaces classes, so before they are used
    log.say(kernels, f"attention: {config._attn_implementation}")
    parameters, matmul_parameters = models.count_parameters(models.on_meta(config))
    with launch.all_ranks_agree():
        memory.check_host(memory.resident(parameters, dp_world_size, dtype, stage, device))
        needed = checkpoint.check_disk(
            args, parameters, layout, steps_per_epoch, total_steps, resume, weights_files=args.hf_repo is not None
        )
    # Under ZeRO-3 each parameter is partitioned among the ranks as soon as its module has made it, and then filled
    # from the files one at a time: the whole model is never in one place. Below stage 3 every rank fills its own copy;
    # under 3 rank 0 fills the gathered parameter, and leaving the block hands out the partitions.
    refusals = deepspeed_config.refusals(args.deepspeed_config)
    with refusals, device, deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3):
        model = models.without_weights(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
    with launch.all_ranks_agree():
        # A resumed run gets its weights with the rest of its state, below.
        pretrained = [] if resume else models.match_weights(model, PretrainedWeights(model_directory))
    for parameter, read in pretrained:
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=stage == 3), torch.no_grad():
            if stage < 3 or launch.rank() == 0:
                parameter.copy_(read())
    model.loss_function = causal_lm_loss  # HF's forward calls it with its logits and the keywords it does not know
    if stage == 3:
        # A block's weights come in one message, not one for each of its modules.
        deepspeed.utils.set_z3_leaf_modules(model, {type(block) for block in models.blocks(model)})
    if args.compile:
        models.compile_model(model, args.packing, blocks_alone=stage == 3)

    # --------------------------------------------------------------------------------------------- optimizer
    learning_rate = cli.peak_learning_rate(args, resume)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)

    # ---------------------------------------------------------------------------------- deepspeed.initialize
    # From here on the engine clips (the JSON says to what norm), steps the schedule and clears the gradients.
    with deepspeed_config.refusals(args.deepspeed_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=ds_config)
    model_name = checkpoint.model_name(args, resume, model_directory)
    log.run(ds_config, model_name, sample.full_name(args.dataset_name, "paragraphs"), parameters)
    log.say(f"model: {config.model_type}, {parameters:,} parameters, ZeRO stage {stage}")

    # ------------------------------------------------------------------------------------------------ resume
    global_step = samples_seen = 0
    data_state = data.data_state(args, train_rows, global_batch_size)
    if resume:
        log.say(f"resume from {resume.directory}: {resume.why}")
        with checkpoint.loading(resume, args.output_dir) as directory:
            engine.load_checkpoint(str(directory.parent), tag=directory.name)
        global_step, samples_seen = checkpoint.restore(resume, data_state, lr_scheduler)

    saved_step, saved = (global_step, resume.directory) if resume else (None, None)

    def save():
        nonlocal saved_step, saved
        tag = checkpoint.tag_of(global_step)
        client_state = checkpoint.client_state(
            args, layout, data_state, model_name, learning_rate, global_step, samples_seen
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
    for epoch in range(epochs_done, args.num_epochs):
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
            for batch in batches:
                inputs = attention.model_inputs(config, batch["input_ids"], batch["position_ids"], limits)
                inputs |= {"labels": batch["labels"], "num_items_in_batch": targets_per_micro_batch}
                micro_loss = engine(**inputs).loss
                engine.backward(micro_loss)  # also reduces the gradients over the ranks, as the stage has it
                engine.step()  # nothing until the last micro-batch; then clips, updates, hands out the new weights
                loss += micro_loss.detach()
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
        if args.save_checkpoint and args.hf_repo:  # for those who want the weights without the training state
            name = checkpoint.weights_file_name(model_name, args.start_idx, end_idx, epoch + 1)
            checkpoint.write_weights_file(Path(args.output_dir) / name, checkpoint.gather_state(model, stage))
            log.say(f"saved {args.output_dir}/{name}")
            uploads.upload(Path(args.output_dir) / name)
        if last:
            break
    evaluate(engine, test_rows, "test", args, limits, log, global_step, global_step / steps_per_epoch)
    log.say(*memory.zero_table(parameters, dp_world_size, dtype, stage, device))

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
