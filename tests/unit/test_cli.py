"""How flags are spelled: dashes and underscores, and the alias of --max_train_steps."""

import argparse
import re
import time

import pytest
import torch.distributed as dist

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


@pytest.fixture(autouse=True)
def one_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_defaults():
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


def test_switches_and_environment(monkeypatch):
    args = parse("--no-packing", "--no-save_checkpoint", "--no-liger", "--compile", "--local_rank=1")
    assert (args.packing, args.save_checkpoint, args.liger, args.compile) == (False, False, False, True)
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    assert parse().wandb_project == "from-environment"
    assert parse("--wandb_project", "x").wandb_project == "x"


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--max_length", "1", "fewer than 2 tokens"),
        ("--num_epochs", "0", "less than 1"),
        ("--batch_size", "0", "less than 1"),
        ("--batch_size", "2.5", "invalid"),
        ("--accum_steps", "-1", "less than 1"),
        ("--learning_rate", "0", "not a positive number"),
        ("--learning_rate", "nan", "not a positive number"),
        ("--learning_rate", "inf", "not a positive number"),
        ("--warmup_steps", "-1", "negative"),
        ("--weight_decay", "-0.1", "negative"),
        ("--weight_decay", "nan", "negative or not finite"),
        ("--seed", "-1", "negative"),
        ("--precision", "fp8", "invalid choice"),
        ("--keep_last", "0", "less than 1"),
        ("--save_every", "0", "less than 1"),
        ("--max_train_steps", "0", "less than 1"),
        ("--start_idx", "three", "invalid"),
        ("--learning_rat", "1", "unrecognized"),
    ],
)
def test_bad_values_exit_with_2(flag, value, says, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(flag, value)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert flag in error and says in error


def test_other_ranks_leave_the_word_to_rank_0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(SystemExit) as caught:
        parse("--seed", "-1")
    assert caught.value.code == 2 and waits
    assert capsys.readouterr().err == ""


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
def test_peak_learning_rate(flags, rate):
    assert cli.peak_learning_rate(parse(*flags)) == rate


@pytest.mark.parametrize("text", ["-1", "1e-320", "nan", "inf"])
def test_temperature_out_of_range_is_refused(text):
    assert (cli.temperature("0"), cli.temperature("0.7")) == (0, 0.7)
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        cli.temperature(text)


def test_a_run_goes_on_with_its_own_rate_and_weight_decay():
    run = {"learning_rate": 1e-3, "weight_decay": 0.1}
    resume = checkpoint.Resume(None, run, True, "")
    args = argparse.Namespace(learning_rate=None, weight_decay=0.1)
    assert cli.peak_learning_rate(args, resume) == 1e-3
    args.learning_rate = 1e-3
    assert cli.peak_learning_rate(args, resume) == 1e-3
    args.weight_decay = 0.01
    with pytest.raises(UserError, match=r"--weight_decay 0\.01: the run that goes on has 0\.1"):
        cli.peak_learning_rate(args, resume)
    args.weight_decay, args.learning_rate = 0.1, 2e-3
    with pytest.raises(UserError, match=r"--learning_rate 0\.002: the run that goes on has 0\.001"):
        cli.peak_learning_rate(args, resume)
    resume.has_optimizer = False
    assert cli.peak_learning_rate(args, resume) == 2e-3
