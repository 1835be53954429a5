"""Checkpoints of baseline/, which Trainer writes."""

import argparse
import shutil

import pytest
import torch

from baseline import checkpoints
from common.errors import UserError
from helpers.launch import launch

SHORT = ("--end_idx", 120, "--num_epochs", 2, "--max_new_tokens", 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, finished process) of two short epochs of the default, with a checkpoint every 5 steps too."""
    directory = tmp_path_factory.mktemp("run") / "out"
    finished = launch("baseline/train.py", *SHORT, "--save_every", 5, "--output_dir", directory)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return directory, finished


def test_parts_of_a_checkpoint(run, tmp_path):
    args = argparse.Namespace(resume_from_checkpoint="latest", output_dir=tmp_path)
    for number, part in enumerate(checkpoints.PARTS, start=1):
        directory = tmp_path / f"checkpoint-{number}"
        shutil.copytree(run[0] / "checkpoint-8", directory)
        assert checkpoints.incomplete(directory) is None
        (path,) = directory.glob(part)
        path.unlink()
        assert checkpoints.incomplete(directory) == f"it has no {part}"
        with pytest.raises(UserError, match=r"it has no .*, so no whole checkpoint"):
            checkpoints.find_checkpoint(argparse.Namespace(resume_from_checkpoint=str(directory)), None)
    said = []
    with pytest.raises(UserError, match=f"none of the {len(checkpoints.PARTS)} in .* is whole"):
        checkpoints.find_checkpoint(args, argparse.Namespace(info=said.append))
    assert len(said) == len(checkpoints.PARTS)
    shutil.copytree(run[0] / "checkpoint-8", tmp_path / "checkpoint-0")
    assert checkpoints.find_checkpoint(args, argparse.Namespace(info=said.append)) == str(tmp_path / "checkpoint-0")
    for content in ("[]", '{"global_step": "x"}', "{"):
        (tmp_path / "checkpoint-0" / "trainer_state.json").write_text(content)
        assert checkpoints.incomplete(tmp_path / "checkpoint-0")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    earlier = tmp_path / "checkpoint-3"
    earlier.mkdir()
    (earlier / "trainer_state.json").write_text("{}")
    said = r"checkpoint-3 cannot be saved \(.* GB are free\): disk; checkpoints saved before"
    with pytest.raises(UserError, match=said), checkpoints.saving(tmp_path, 3, {"seed": 1}):
        # Until Trainer has written all of it, what was there before does not count either.
        assert not (earlier / "trainer_state.json").exists()
        assert checkpoints.read_run_state(earlier) == {"seed": 1}
        raise RuntimeError("disk")
    assert not earlier.exists()


def test_a_checkpoint_must_have_all_weights():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3)
            self.head.weight = self.embedding.weight

    checkpoints.check_loaded(Tied(), ["head.weight"])
    with pytest.raises(UserError, match=r"no weights for embedding.weight, head.weight"):
        checkpoints.check_loaded(Tied(), ["embedding.weight", "head.weight"])


def test_what_cannot_be_saved_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    args = argparse.Namespace(output_dir=tmp_path, save_checkpoint=True, save_every=None, keep_last=None)
    checkpoints.check_disk(args, 1000, 8, 16)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=27_000))
    with pytest.raises(UserError, match=r"2.7e-05 GB free, 2.8e-05 GB are needed for 2 checkpoints of 1,000"):
        checkpoints.check_disk(args, 1000, 8, 16)
    (tmp_path / "checkpoint-5").write_text("")
    with pytest.raises(UserError, match=r"checkpoint-5 is no directory"):
        checkpoints.check_disk(args, 1000, 8, 16)
