"""A checkpoint of two ranks resumes on one or four."""

import pytest
import torch

from common import checkpoint
from helpers.launch import ROOT, events, launch_several

SHORT = (
    "--model_name", "sample-llama", "--dataset_name", "sample-abstracts", "--end_idx", 100, "--max_length", 64,
    "--warmup_steps", 2, "--num_epochs", 20, "--max_train_steps", 12, "--max_eval_steps", 1,
)  # fmt: skip


SILENT = ("--generation_prompt", "")


TECHNIQUES = {
    "zero 0": ("zero/train.py", *SHORT, *SILENT, "--deepspeed_config", "stage 0"),
    "zero 2": ("zero/train.py", *SHORT, *SILENT),
    "zero 3": ("zero/train.py", *SHORT, *SILENT, "--deepspeed_config", ROOT / "zero" / "ds_zero3.json"),
    "offload 2": ("offload/train.py", *SHORT, *SILENT),
    "offload 3": (
        "offload/train.py", *SHORT, *SILENT, "--deepspeed_config", ROOT / "offload" / "ds_zero3_offload.json",
    ),
    "replicas": ("pipeline/train.py", *SHORT, "--num_stages", 1),
    "stages": ("pipeline/train.py", *SHORT),
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("zero 2", "zero 3", "offload 2", "stages"), id="some"),
        pytest.param(("zero 0", "offload 3", "replicas"), id="others", marks=pytest.mark.slow),
    ],
)
def two_ranks(request, tmp_path_factory):
    """{technique: flags}, and the directory of their runs on two ranks, with a checkpoint at step 5."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "stage0.json").write_text(
        (ROOT / "zero" / "ds_zero2.json").read_text().replace('"stage": 2', '"stage": 0')
    )
    techniques = {
        name: tuple(directory / "stage0.json" if flag == "stage 0" else flag for flag in TECHNIQUES[name])
        for name in request.param
    }
    runs = {
        name: (*flags, "--save_every", 5, "--output_dir", directory / "two" / name)
        for name, flags in techniques.items()
    }
    for name, finished in launch_several(None, runs, ranks=2).items():
        assert finished.returncodes == [0, 0], (name, finished.stderrs)
    return techniques, directory


def test_dropout_differs_between_replicas_and_not_between_stages(two_ranks):
    techniques, directory = two_ranks
    for name in techniques:
        files = sorted((directory / "two" / name / "global_step5").glob("*mp_rank_00_model_states.pt"))
        first, second = torch.load(files[0], weights_only=True)["run"]["rng"]
        assert torch.equal(first["torch"], second["torch"]) == (name == "stages"), name


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoint_of_two_ranks_resumes_on_other_numbers(two_ranks, ranks):
    """No flag says so: the batch, the rows of each step and the optimizer's state are those of the two ranks."""
    techniques, directory = two_ranks
    runs = {
        name: (*flags, "--resume_from_checkpoint", directory / "two" / name / "global_step5",
               "--output_dir", directory / str(ranks) / name)
        for name, flags in techniques.items()
    }  # fmt: skip
    for name, finished in launch_several(None, runs, ranks=ranks).items():
        assert finished.returncodes == [0] * ranks, (name, finished.stderrs)
        steps = events(directory / str(ranks) / name, "step")
        expected = events(directory / "two" / name, "step")[5:]
        assert [step["step"] for step in steps] == [*range(6, 13)]
        whole = (name, ranks) != ("stages", 1)
        assert ("whole state at step 5" in finished.stdout) == whole
        if not whole:
            assert "Adam's moments start from zero: the saved ones are for stages 2, this run has 1" in finished.stdout
        for step, other in zip(steps, expected, strict=True):
            assert (step["lr"], step["tokens"], step["samples_seen"]) == (
                other["lr"], other["tokens"], other["samples_seen"],
            )  # fmt: skip
            if whole or step["step"] == 6:
                assert step["loss"] == pytest.approx(other["loss"], rel=2e-6), (name, step["step"])
                if name != "zero 0":  # DeepSpeed does not measure it there
                    assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5), (name, step["step"])
        assert not list((directory / str(ranks) / name).glob(".*")), "the universal checkpoint is still there"
        assert not (directory / str(ranks) / name / "latest_universal").exists()


def test_checkpoint_bytes_are_about_the_size_of_the_files(two_ranks):
    stages = {"zero 0": 0, "zero 2": 2, "zero 3": 3, "offload 2": 2, "offload 3": 3, "replicas": 1}
    for name in stages.keys() & two_ranks[0].keys():
        directory = two_ranks[1] / "two" / name
        (run,) = events(directory, "run")
        size = sum(file.stat().st_size for file in (directory / "global_step5").glob("*.pt"))
        layout = {"precision": "fp32", "zero_stage": stages[name]}
        assert checkpoint.checkpoint_bytes(run["parameters"], layout) == pytest.approx(size, rel=0.1), name
