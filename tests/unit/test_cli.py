"""Flags: their spelling, defaults and types, and the learning rate that follows from them."""

import argparse
import re
import subprocess
import sys
import time

import pytest

from common import checkpoint, cli, convert, evaluate, report
from common.errors import UserError


@pytest.fixture(autouse=True)
def rank_0(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def make_parser():
    parser = cli.Parser("A script.")
    cli.add_run_arguments(parser, "zero", "zero/ds_zero2.json")
    cli.add_generation_arguments(parser)
    return parser


def parse(*flags):
    return make_parser().parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--model-name", "x"), "model_name", "x"),
        (("--model_name", "x"), "model_name", "x"),
        (("--model-name=x",), "model_name", "x"),
        (("--no_packing",), "packing", False),
        (("--no-packing",), "packing", False),
        (("--no_save_checkpoint",), "save_checkpoint", False),
        (("--no-save_checkpoint",), "save_checkpoint", False),
        (("--save-checkpoint",), "save_checkpoint", True),
        (("--resume-from_checkpoint", "latest"), "resume_from_checkpoint", "latest"),
        (("--local-rank=3",), "local_rank", 3),
    ],
)
def test_parser_dashes_and_underscores_are_the_same_flag(flags, name, value):
    assert getattr(parse(*flags), name) == value


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--generation_prompt=--a-b",), "generation_prompt", "--a-b"),
        (("--model-name=a-b_c=--batch-size",), "model_name", "a-b_c=--batch-size"),
        (("--generation-prompt=--max-length",), "generation_prompt", "--max-length"),
        (("--generation_prompt", "--max-length is a flag"), "generation_prompt", "--max-length is a flag"),
        (("--model_name", "my-model"), "model_name", "my-model"),
        (("--output_dir=out-1/a_b",), "output_dir", "out-1/a_b"),
    ],
)
def test_parser_value_stays_as_it_is(flags, name, value):
    assert getattr(parse(*flags), name) == value


@pytest.mark.parametrize("flag", ["--model--name", "-model-name", "---model-name", "--model-nam", "-_seed"])
def test_parser_other_spelling_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "1")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_parser_arguments_after_two_dashes_stay_as_they_are():
    parser = cli.ArgumentParser()
    parser.add_argument("--a_b")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--a-b", "1", "--", "--a-b"]) == argparse.Namespace(a_b="1", rest=["--a-b"])


def test_parser_reads_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--batch-size", "3"])
    assert make_parser().parse_args().batch_size == 3


def test_subcommand_takes_dashes_and_underscores():
    parser = cli.ArgumentParser()
    parser.add_subparsers().add_parser("to-hf").add_argument("--output_dir")
    assert parser.parse_args(["to-hf", "--output-dir", "x-y"]).output_dir == "x-y"


def test_parser_steps_is_max_train_steps():
    assert parse("--steps", "7").max_train_steps == parse("--max-train-steps", "7").max_train_steps == 7


def test_parser_help_shows_one_spelling():
    text = make_parser().format_help()
    assert "--max_train_steps N, --steps N" in text
    assert not re.search(r"--(?!no-)\w+-\w", text)


@pytest.mark.parametrize(
    ("main", "flags", "name"),
    [
        (convert.main, ("to-hf", "x", "--output-dir"), "--output_dir"),
        (evaluate.main, ("x", "--base-model"), "--base_model"),
        (report.main, ("--output-dir",), "--output_dir"),
    ],
)
def test_command_other_spelling_is_the_same_flag(main, flags, name, capsys):
    with pytest.raises(SystemExit):
        main(list(flags))
    assert f"argument {name}: expected one argument" in capsys.readouterr().err


def test_run_arguments_defaults():
    parser = cli.Parser("A script.")
    cli.add_run_arguments(parser, "pipeline", "pipeline/ds_pipeline.json")
    assert vars(parser.parse_args([])) == {
        "local_rank": None, "model_name": None, "dataset_name": "sample", "dataset_config": None,
        "text_column": None, "start_idx": 0, "end_idx": None, "max_length": 256, "packing": None,
        "loss_on": None, "chat_template": None, "num_epochs": 3,
        "batch_size": None, "accum_steps": None, "learning_rate": None, "warmup_steps": 10, "weight_decay": 0.01,
        "max_train_steps": None, "max_eval_steps": None, "seed": 42,
        "deepspeed_config": "pipeline/ds_pipeline.json", "precision": None, "liger": None, "compile": False,
        "output_dir": "runs/pipeline", "save_checkpoint": True, "save_every": None, "keep_last": None,
        "resume_from_checkpoint": None, "wandb_project": None, "hf_repo": None,
    }  # fmt: skip


def test_run_arguments_wandb_project_defaults_to_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    assert parse().wandb_project == "from-environment"
    assert parse("--wandb_project", "x").wandb_project == "x"


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--max_length", "1", "expected an integer >= 2"),
        ("--num_epochs", "0", "expected an integer >= 1, got '0'"),
        ("--batch_size", "2.5", "expected an integer >= 1, got '2.5'"),
        ("--learning_rate", "0", "expected a number > 0"),
        ("--learning_rate", "nan", "expected a number > 0"),
        ("--learning_rate", "inf", "expected a number > 0"),
        ("--warmup_steps", "-1", "expected an integer >= 0"),
        ("--weight_decay", "-0.1", "expected a number >= 0"),
        ("--weight_decay", "nan", "expected a number >= 0"),
        ("--seed", "-1", "expected an integer from 0"),
        ("--seed", str(2**63), "expected an integer from 0 to 2^63 - 1"),
        ("--temperature", "0.0001", "expected 0 (greedy) or a number >= 0.001"),
        ("--top_p", "0", "expected a number > 0 and <= 1"),
        ("--top_p", "1.1", "expected a number > 0 and <= 1"),
        ("--precision", "fp8", "invalid choice"),
        ("--start_idx", "three", "invalid"),
        ("--hf_repo", "https://user:secret@host/x", "expected USER/NAME"),
        ("--output_dir", "", "expected a directory"),
        ("--learning_rat", "1", "unrecognized"),
    ],
)
def test_parser_bad_value_exits_with_2(flag, value, says, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(flag, value)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and says in error and "secret" not in error


@pytest.mark.parametrize(
    ("flag", "value", "result"),
    [
        ("--temperature", "0", 0.0), ("--temperature", "0.001", 0.001), ("--top_p", "1", 1.0), ("--top_k", "0", 0),
        ("--max_length", "2", 2), ("--seed", str(2**63 - 1), 2**63 - 1), ("--weight_decay", "0", 0.0),
    ],
)  # fmt: skip
def test_parser_value_at_its_limit_is_accepted(flag, value, result):
    assert getattr(parse(flag, value), flag[2:]) == result


@pytest.mark.parametrize(
    ("parser", "temperature"), [(make_parser, 0.8), (evaluate.build_parser, 0.0)], ids=["training", "evaluate"]
)
def test_sampling_arguments_are_the_same_but_for_the_temperature(parser, temperature):
    args = parser().parse_args([] if parser is make_parser else ["sample-llama"])
    assert (args.max_new_tokens, args.top_k, args.top_p, args.temperature) == (40, 50, 0.95, temperature)


def test_parser_on_other_ranks_exits_silently_after_rank_0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SystemExit) as caught:
        parse("--seed", "-1")
    assert caught.value.code == 2 and waits
    assert capsys.readouterr().err == ""


def test_cli_imports_nothing_heavy():
    heavy = {"torch", "transformers", "huggingface_hub", "common.sample"}
    code = f"import sys, common.cli; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 5e-3),
        (["--model_name", "sample"], 5e-3),
        (["--model_name", "sample-gpt2"], 5e-3),
        (["--model_name", "meta-llama/Llama-3.2-1B"], 2e-5),
        (["--model_name", "sample", "--learning_rate", "1e-4"], 1e-4),
        (["--model_name", "sampleset/llama"], 2e-5),
        (["--model_name", "someone/samples", "--learning_rate", "1"], 1.0),
    ],
)
def test_peak_learning_rate_default_depends_on_the_model(flags, rate):
    assert cli.peak_learning_rate(parse(*flags)) == rate


@pytest.mark.parametrize("text", ["-1", "1e-320", "nan", "inf"])
def test_temperature_out_of_range_is_refused(text):
    assert (cli.temperature("0"), cli.temperature("0.7")) == (0, 0.7)
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        cli.temperature(text)


RUN = {"learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("learning_rate", "state", "has_optimizer", "rate"),
    [
        (None, RUN, True, 1e-3),
        (1e-3, RUN, True, 1e-3),
        (None, RUN, False, 1e-3),
        (2e-3, RUN, False, 2e-3),
        (None, None, False, 2e-5),
    ],
)
def test_peak_learning_rate_resumed_run_keeps_its_own(learning_rate, state, has_optimizer, rate):
    args = argparse.Namespace(learning_rate=learning_rate, weight_decay=0.1, model_name=None)
    assert cli.peak_learning_rate(args, checkpoint.Resume(None, state, has_optimizer, "")) == rate


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"weight_decay": 0.01}, r"--weight_decay 0\.01: the resumed run has 0\.1"),
        ({"learning_rate": 2e-3}, r"--learning_rate 0\.002: the resumed run has 0\.001"),
    ],
)
def test_peak_learning_rate_other_than_the_optimizer_state_is_refused(flags, says):
    args = argparse.Namespace(**({"learning_rate": None, "weight_decay": 0.1} | flags))
    with pytest.raises(UserError, match=says):
        cli.peak_learning_rate(args, checkpoint.Resume(None, RUN, True, ""))
