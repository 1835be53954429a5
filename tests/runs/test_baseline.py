"""Whole runs of baseline/train.py on CPU: what it writes and prints, resuming, padding, refusals."""

import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import sample
from common.documents import HELD_OUT_EVERY
from helpers.launch import errors, events, launch, launch_forked, launch_several

SHORT = ("--end_idx", 120, "--num_epochs", 2, "--max_new_tokens", 5)
UNSAVED = (*SHORT[:4], "--no-save_checkpoint", "--generation_prompt", "", "--max_train_steps", 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, finished process) of two short epochs of the default, with a checkpoint every 5 steps too."""
    directory = tmp_path_factory.mktemp("run") / "out"
    finished = launch_forked("baseline/train.py", *SHORT, "--save_every", 5, "--output_dir", directory)
    assert finished.returncodes == [0], finished.stderrs
    return directory, finished


@pytest.fixture(scope="module")
def more(run, tmp_path_factory):
    """{name: (finished run, its directory)} of runs on one rank that resume the first or are compared with it."""
    directory = tmp_path_factory.mktemp("more")
    for name in ("finished", "incomplete"):
        shutil.copytree(run[0], directory / name)
        (directory / name / "metrics.jsonl").unlink()
    (directory / "incomplete" / "checkpoint-16" / "scheduler.pt").unlink()  # a run killed while it saved
    latest = ("--resume_from_checkpoint", "latest")
    flags = {
        "resumed": (*SHORT, "--resume_from_checkpoint", run[0] / "checkpoint-10"),
        "finished": (*SHORT, *latest),
        "incomplete": (*SHORT, *latest),
        "other seed": (*SHORT, "--seed", 1, "--resume_from_checkpoint", run[0] / "checkpoint-10"),
        "one epoch": (*SHORT, "--num_epochs", 1, "--max_train_steps", 12, "--no-save_checkpoint"),
        "padded": (*UNSAVED, "--pad_to_max_length"),
    }
    flags = {name: (*own, "--output_dir", directory / name) for name, own in flags.items()}
    finished = launch_several("baseline/train.py", flags)
    for name in flags.keys() - {"other seed"}:
        assert finished[name].returncodes == [0], (name, finished[name].stderrs)
    return {name: (finished[name], directory / name) for name in flags}


def table_of(finished):
    return dict(re.findall(r"^\| (.+) \| ([\d.]+) \|$", finished.stdout, re.M))


def test_metrics_and_the_workshop_s_table(run):
    directory, finished = run
    (start,), (summary,) = events(directory, "run"), events(directory, "summary")
    steps, evals = events(directory, "step"), events(directory, "eval")
    # 120 questions less every fiftieth, 16 a step.
    assert [step["step"] for step in steps] == list(range(1, 17))
    assert steps[-1]["samples_seen"] == 2 * 118
    assert (start["technique"], start["model"], "ds_config" in start) == ("baseline", "bloom", False)
    assert start["dataset"] == "sample-questions"
    assert [(each["phase"], each["step"]) for each in evals] == [("before", 0), ("epoch", 8), ("after", 16)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert all(each["perplexity"] == pytest.approx(math.exp(each["loss"]), rel=1e-6) for each in evals)
    assert summary["final_train_loss"] == steps[-1]["loss"]
    assert summary["steps_per_epoch"] == 8
    assert table_of(finished) == {
        "Train Loss (Final)": f"{steps[-1]['loss']:.4f}",
        "Eval Loss (Epoch 1)": f"{evals[1]['loss']:.4f}",
        "Eval Loss (Epoch 2)": f"{evals[2]['loss']:.4f}",
        "Training Speed (samples/sec)": f"{summary['train_samples_per_second']:.2f}",
        "Evaluation Speed (samples/sec)": f"{summary['eval_samples_per_second']:.2f}",
        "Steps per Epoch": "8",
    }


def test_evaluation_is_the_mean_over_tokens(run):
    """What it logged after training, from the files that it wrote, one question at a time in plain Hugging Face."""
    directory, _ = run
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    questions = [json.loads(line) for line in sample.sample_dataset_file("questions").read_text().splitlines()]
    loss_sum = targets = 0
    for row in questions[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]:
        text = f"Question: {row['question']} Context: {row['context']} Answer: {row['answers']['text'][0]}"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            loss_sum += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    *_, after = events(directory, "eval")
    assert after["tokens"] == targets
    assert after["loss"] == pytest.approx(loss_sum / targets, rel=1e-5)


def test_resume_equals_an_uninterrupted_run(run, more):
    directory, uninterrupted_run = run
    names = {path.name for path in directory.iterdir()}
    assert {"checkpoint-5", "checkpoint-8", "checkpoint-10", "checkpoint-16", "model.safetensors"} <= names
    resumed_run, resumed = more["resumed"]
    kept = ("step", "loss", "lr", "grad_norm", "samples_seen")
    steps, uninterrupted = (
        [{key: step[key] for key in kept} for step in events(at, "step")] for at in (resumed, directory)
    )
    assert steps == uninterrupted[10:]
    table, expected = table_of(resumed_run), table_of(uninterrupted_run)
    for name in ("Train Loss (Final)", "Eval Loss (Epoch 1)", "Eval Loss (Epoch 2)"):
        assert table[name] == expected[name]


def test_resume_of_a_finished_run_trains_nothing(more):
    assert "nothing left to train: the checkpoint is at step 16, this run ends at 16" in more["finished"][0].stdout


def test_resume_with_another_seed_is_refused(more):
    finished, _ = more["other seed"]
    assert finished.returncodes == [1]
    (error,) = errors(finished)
    assert "its run had seed 42, this one has 1" in error


def test_resume_skips_an_incomplete_checkpoint(run, more):
    finished, directory = more["incomplete"]
    assert "checkpoint-16 is skipped: it has no scheduler.pt" in finished.stdout
    uninterrupted = [step["loss"] for step in events(run[0], "step")]
    assert [step["loss"] for step in events(directory, "step")] == uninterrupted[15:]


def test_the_shorter_of_epochs_and_steps_ends_the_run(more):
    assert [step["step"] for step in events(more["one epoch"][1], "step")] == [*range(1, 9)]


def test_padding_changes_no_loss(run, more):
    """Rows of 512 instead of the longest of a micro-batch."""
    directory = more["padded"][1]
    assert_same_steps(directory, run)
    assert not (directory / "model.safetensors").exists()


def test_two_ranks_with_half_the_rows_each_have_the_losses_of_one(run, tmp_path):
    finished = launch_forked("baseline/train.py", *UNSAVED, "--batch_size", 2, "--output_dir", tmp_path, ranks=2)
    assert finished.returncodes == [0, 0], finished.stderrs
    assert_same_steps(tmp_path, run)


def assert_same_steps(directory, run):
    for step, expected in zip(events(directory, "step"), events(run[0], "step")[:3], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


CONFIGS = {
    "zero 1": ("zero", "zero/ds_zero1.json"),
    "zero 3": ("zero", "zero/ds_zero3.json"),
    "offload 2": ("offload", "offload/ds_zero2_offload.json"),
}


def bloom_on_questions(technique, config, output_dir):
    return (
        f"{technique}/train.py", "--model_name", "sample-bloom", "--dataset_name", "sample-questions", "--end_idx", 120,
        "--max_length", 512, "--batch_size", 2, "--accum_steps", 4, "--max_train_steps", 3, "--no-save_checkpoint",
        "--deepspeed_config", config, "--generation_prompt", "", "--output_dir", output_dir,
    )  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """{name: (finished run, its directory)} of zero/ and offload/ on the baseline's model and questions, two ranks."""
    directory = tmp_path_factory.mktemp("others")
    runs = {name: bloom_on_questions(*which, directory / name) for name, which in CONFIGS.items()}
    finished = launch_several(None, runs, ranks=2)
    return {name: (finished[name], directory / name) for name in runs}


def assert_same_losses(directory, stdout, run):
    assert "118 documents" in stdout and "in 118 rows of 512" in stdout
    for step, expected in zip(events(directory, "step"), events(run[0], "step")[:3], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert step["tokens"] == expected["tokens"]


@pytest.mark.parametrize("name", CONFIGS)
def test_zero_and_offload_on_the_baselines_questions_have_its_losses(run, others, name):
    finished, directory = others[name]
    assert not any(finished.returncodes), finished.stderrs
    assert_same_losses(directory, finished.stdout, run)


@pytest.mark.slow
def test_compiled_zero_has_the_baselines_losses(run, tmp_path):
    finished = launch(*bloom_on_questions("zero", "zero/ds_zero1.json", tmp_path), "--compile", ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert_same_losses(tmp_path, finished.stdout, run)


MISTAKES = [
    (("--packing",), "--no-packing"),
    (("--resume_from_checkpoint", "latest"), "has no complete checkpoint-N"),
    (("--resume_from_checkpoint", "nowhere"), "it has no trainer_state.json"),
    (("--precision", "fp16"), "needs a GPU"),
    (("--dataset_name", "sample-poems"), "sample-abstracts, sample-questions, sample-paragraphs"),
    (("--dataset_name", "sample-abstracts", "--loss_on", "answer"), "read as plain text"),
    (("--model_name", "sample-llama", "--max_length", "4096"), "2048 positions"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mistakes")
    runs = {words: (*flags, "--output_dir", directory / "out") for flags, words in MISTAKES}
    return launch_several("baseline/train.py", runs)


@pytest.mark.parametrize("words", [words for _, words in MISTAKES])
def test_bad_input_is_one_error_line(mistakes, words):
    assert mistakes[words].returncodes == [1]
    (line,) = errors(mistakes[words])
    assert words in line
