"""Every technique trains the same: Trainer, ZeRO 0 to 3, with and without offload, and the pipeline, on two ranks.

The truth is a float32 loop over `LlamaForCausalLM` that sees one document at a time (plain_hf.py). Each technique
trains on the same global batches of 8 rows, in 2 and 4 micro-batches (slow: 1 and 2). Compared are the loss and the
gradient norm of each step, and the weights after ten steps as the run saved them. The numbers of tokens in a step's
micro-batches differ at least threefold, so that a loss averaged over micro-batches or ranks instead of tokens fails.

    python -m pytest -s tests/parity/test_same_training.py

prints the table.
"""

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout

import datasets
import numpy as np
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from common.documents import HELD_OUT_EVERY
from common.rows import epoch_order
from helpers.launch import ROOT, events, launch_several
from helpers.plain_hf import DECAY, RATE, STEPS, WARMUP, WORDS, read_layer_shards, save_llama, train_with_hf
from helpers.token_rows import rows_of_documents

ROWS = 8
RANKS = 2
CASES = [("padded", 4), ("packed", 2)]  # rows, micro-batches per step
MORE_CASES = [("padded", 1), ("padded", 2)]
LOSS, NORM, LARGEST, MEAN = 1e-5, 1e-4, 1e-4, 1e-6  # most that may differ: the first two relative, the others weights

# Name, script, DeepSpeed JSON (None is made by the test), replicas. The pipeline comes last, since DeepSpeed goes on
# to use its data-parallel groups for every engine that the same process makes after it.
TECHNIQUES = [
    ("Trainer", "baseline/train.py", None, RANKS),
    ("ZeRO-0", "zero/train.py", None, RANKS),
    *((f"ZeRO-{stage}", "zero/train.py", f"zero/ds_zero{stage}.json", RANKS) for stage in (1, 2, 3)),
    *(
        (f"ZeRO-{stage} offload", "offload/train.py", f"offload/ds_zero{stage}_offload.json", RANKS)
        for stage in (1, 2, 3)
    ),
    ("pipeline, 2 stages", "pipeline/train.py", "pipeline/ds_pipeline.json", 1),
]


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)])
def test_every_technique_trains_what_hf_trains(cases, tmp_path):
    datasets.disable_progress_bars()
    save_llama(tmp_path / "model", tied=True)
    truths = {}
    for rows, texts in (("padded", padded_texts()), ("packed", packed_texts())):
        (tmp_path / f"{rows}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        truths[rows] = train_with_hf(tmp_path / "model", tmp_path / f"{rows}.jsonl", ROWS, packing=rows == "packed")
    check_uneven(truths)

    train_all(tmp_path, cases)
    table = [
        compare(tmp_path / name / f"{rows}-{micro_batches}", name, f"{micro_batches} x {replicas}", rows, truths[rows])
        for name, _, _, replicas in TECHNIQUES
        for rows, micro_batches in cases
    ]
    head = (
        f"{'':28}{'micro-batches':>13}  {'largest relative':^20}  {f'weights at step {STEPS}':^20}\n"
        f"{'technique':20}{'rows':8}{'x replicas':>13}  {'loss':>9}  {'grad norm':>9}  {'largest':>9}  {'mean':>9}"
    )
    print(f"\ndifference from plain Hugging Face, {RANKS} ranks, {ROWS} rows a step", head, *table, sep="\n")
    assert all(line.endswith("ok") for line in table), "\n".join(table)


# -------------------------------------------------------------------------------------------------- documents


def padded_texts():
    """80 documents to train on and one held out; every step has four short ones beside four long ones."""
    words = random.Random(0)
    texts = [""] * (STEPS * ROWS)
    alike = rows_of_documents([[0, 0]] * len(texts), 2, packing=False)
    for step, step_rows in enumerate(epoch_order(alike, ROWS, seed=42, epoch=0)):
        for place, row in enumerate(step_rows):
            short = (place < ROWS // 2) == step % 2
            texts[row] = sentence(words, 2, 5) if short else sentence(words, 24, 32)
    held_out = HELD_OUT_EVERY - 1
    return [*texts[:held_out], sentence(words, 24, 32), *texts[held_out:]]


def packed_texts():
    """Documents for two epochs of five steps, whose last is not full: it has micro-batches without a single token."""
    words = random.Random(0)
    return [sentence(words, 2, 5) if number % 2 else sentence(words, 20, 32) for number in range(78)]


def sentence(words, least, most):
    return " ".join(words.choice(WORDS) for _ in range(words.randint(least, most)))


def check_uneven(truths):
    """That a step's micro-batches have numbers of targets which an average over micro-batches would get wrong."""
    for targets in truths["padded"]["targets"]:
        for parts in (2, 4, 8):  # micro-batches x replicas
            of_parts = np.reshape(targets, (parts, -1)).sum(axis=1)
            assert max(of_parts) >= 3 * min(of_parts)
    assert all(max(documents) > 1 for documents in truths["packed"]["documents"])
    empty = [np.reshape(targets, (4, -1)).sum(axis=1).min() == 0 for targets in truths["packed"]["targets"]]
    assert sum(empty) == 2


# ------------------------------------------------------------------------------------------------------- runs


def train_all(directory, cases):
    """Trains every technique and case into directory / technique / case, Trainer's in processes of their own."""
    stage_0 = json.loads((ROOT / "zero/ds_zero2.json").read_text()) | {"zero_optimization": {"stage": 0}}
    (directory / "ds_zero0.json").write_text(json.dumps(stage_0))
    runs = {True: {}, False: {}}
    for name, script, config, replicas in TECHNIQUES:
        for rows, micro_batches in cases:
            flags = [
                "--model_name", directory / "model", "--dataset_name", directory / f"{rows}.jsonl",
                "--max_length", 64, "--packing" if rows == "packed" else "--no-packing",
                "--batch_size", ROWS // micro_batches // replicas, "--accum_steps", micro_batches,
                "--learning_rate", RATE, "--warmup_steps", WARMUP, "--weight_decay", DECAY,
                "--max_train_steps", STEPS, "--max_eval_steps", 1, "--precision", "fp32",
                "--output_dir", directory / name / f"{rows}-{micro_batches}",
                *(["--num_stages", RANKS] if replicas == 1 else ["--generation_prompt", ""]),
            ]  # fmt: skip
            if name != "Trainer":
                flags += ["--deepspeed_config", ROOT / config if config else directory / "ds_zero0.json"]
            runs[name == "Trainer"][f"{name}, {rows}, {micro_batches}"] = [script, *flags]
    for together in runs.values():
        for name, finished in launch_several(None, together, ranks=RANKS).items():
            assert not any(finished.returncodes), (name, finished.stdout, finished.stderrs)


# -------------------------------------------------------------------------------------------------- comparison


def compare(run, name, batch, rows, truth):
    """A line of the table, which ends in `ok` or `DIFFERS`."""
    steps = events(run, "step")
    loss = most_relative([step["loss"] for step in steps], truth["losses"])
    norm = 0.0
    if name != "ZeRO-0":  # in float32 without ZeRO, DeepSpeed clips the gradients but keeps no norm
        norm = most_relative([step["grad_norm"] for step in steps], truth["norms"])
    weights = saved_weights(run, name)
    assert {key for key, _ in weights} >= set(truth["first_moments"])
    differences = torch.cat([(tensor - truth["weights"][key]).abs().flatten() for key, tensor in weights])
    largest, mean = differences.max().item(), differences.mean().item()
    ok = loss <= LOSS and norm <= NORM and largest <= LARGEST and mean <= MEAN
    return (
        f"{name:20}{rows:8}{batch:>13}  {loss:9.1e}  {f'{norm:.1e}' if norm else '-':>9}  {largest:9.1e}  {mean:9.1e}  "
        f"{'ok' if ok else 'DIFFERS'}"
    )


def most_relative(values, expected):
    assert len(values) == len(expected)
    return float(np.abs(np.divide(values, expected) - 1).max())


def saved_weights(run, name):
    """[(name in the HF model, tensor)] from the files that each technique's users have."""
    if name == "Trainer":
        return list(load_file(run / "model.safetensors").items())
    checkpoint = run / f"global_step{STEPS}"
    if name.startswith("pipeline"):
        return read_layer_shards(checkpoint)
    if name.endswith("offload"):
        *_, last_epoch = sorted(run.glob("model_0-*-epoch-*.pt"))
        weights = torch.load(last_epoch, weights_only=True)["MODEL_STATE"]
    elif name == "ZeRO-0":
        weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    else:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # DeepSpeed's progress
            weights = get_fp32_state_dict_from_zero_checkpoint(run, tag=checkpoint.name)
    return list(weights.items())
