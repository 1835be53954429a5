"""`common.evaluate` measures the losses that the runs logged."""

import json

import pytest

from common import convert, evaluate
from helpers.launch import events, launch_forked


@pytest.fixture
def compare(tmp_path):
    """Runs the command and returns what it wrote as JSON."""

    def run(*argv):
        output = tmp_path / "evaluation.json"
        assert evaluate.main([*map(str, argv), "--output", str(output)]) == 0
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def test_loss_of_a_converted_run_equals_what_it_logged(compare, tmp_path, capsys):
    run = tmp_path / "run"
    finished = launch_forked(
        "zero/train.py", "--max_train_steps", 3, "--warmup_steps", 0, "--max_length", 128, "--output_dir", run,
        "--generation_prompt", "",
    )  # fmt: skip
    assert finished.returncodes == [0], finished.stderrs
    assert convert.main(["to-hf", str(run), "--output_dir", str(run / "hf")]) == 0
    logged = {event["phase"]: event for event in events(run, "eval")}
    assert abs(logged["before"]["loss"] / logged["after"]["loss"] - 1) > 1e-2
    for split, phases in (("held_out", ("after", "before")), ("test", ("test", None))):
        base = ("--base_model", "sample-gpt2") if phases[1] else ()
        found = compare(
            run / "hf", *base, "--dataset_name", "sample-paragraphs", "--split", split, "--max_length", 128,
            "--num_prompts", 1,
        )  # fmt: skip
        for phase, each in zip(filter(None, phases), found["models"], strict=True):
            assert each["tokens"] == logged[phase]["tokens"]
            assert each["loss"] == pytest.approx(logged[phase]["loss"], rel=1e-5)
            assert each["perplexity"] == pytest.approx(logged[phase]["perplexity"], rel=1e-4)
    assert evaluate.main([str(run)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "convert it first" in message
    assert f"python -m common.convert to-hf {run}/global_step3 --output_dir {run}/hf" in message


def test_loss_of_a_weights_file_equals_what_its_run_logged(compare, tmp_path):
    run = tmp_path / "run"
    finished = launch_forked(
        "offload/train.py", "--max_train_steps", 2, "--warmup_steps", 0, "--output_dir", run, "--generation_prompt", ""
    )
    assert finished.returncodes == [0], finished.stderrs
    (weights,) = run.glob("*.pt")
    found = compare(weights, "--base_model", "sample-llama", "--num_prompts", 0)
    logged = {event["phase"]: event for event in events(run, "eval")}
    for phase, each in zip(("after", "before"), found["models"], strict=True):
        assert each["loss"] == pytest.approx(logged[phase]["loss"], rel=1e-5)
