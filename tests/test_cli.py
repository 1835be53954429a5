"""How flags are spelled: dashes and underscores, and the alias of --max_train_steps."""

import argparse
import re

import pytest

from common import cli, convert, evaluate, report


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
        (("--no-save-checkpoint",), "save_checkpoint", False),
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


def test_steps_is_max_train_steps():
    assert parse("--steps", "7").max_train_steps == parse("--max-train-steps", "7").max_train_steps == 7


def test_help_shows_one_spelling():
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
