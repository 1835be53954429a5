"""Checkpoints of baseline/, which Trainer writes."""

import argparse
import shutil

import pytest
import torch
from transformers import TrainerState

from baseline import checkpoints
from common.errors import UserError


def saved(output_dir, step):
    """The files of a complete checkpoint, as far as they are looked at before Trainer loads them."""
    directory = output_dir / f"checkpoint-{step}"
    directory.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (directory / name).touch()
    (directory / checkpoints.RUN_STATE).write_text('{"seed": 1}')
    TrainerState(global_step=step).save_to_json(str(directory / "trainer_state.json"))
    return directory


def test_find_checkpoint_skips_incomplete_ones(tmp_path):
    args = argparse.Namespace(resume_from_checkpoint="latest", output_dir=tmp_path)
    for step, part in enumerate(checkpoints.PARTS, start=5):
        directory = saved(tmp_path, step)
        assert checkpoints.incomplete(directory) is None
        (path,) = directory.glob(part)
        path.unlink()
        assert checkpoints.incomplete(directory) == f"it has no {part}"
        with pytest.raises(UserError, match=r"not a complete checkpoint of Trainer: it has no "):
            checkpoints.find_checkpoint(argparse.Namespace(resume_from_checkpoint=str(directory)), None)
    skipped = []
    log = argparse.Namespace(info=skipped.append)
    with pytest.raises(
        UserError, match=rf"{tmp_path} has no complete checkpoint-N \({len(checkpoints.PARTS)} incomplete"
    ):
        checkpoints.find_checkpoint(args, log)
    assert len(skipped) == len(checkpoints.PARTS)
    for step in (1, 2):
        complete = saved(tmp_path, step)
    assert checkpoints.find_checkpoint(args, log) == str(complete)
    for content in ("[]", '{"global_step": "x"}', "{"):
        (complete / "trainer_state.json").write_text(content)
        assert checkpoints.incomplete(complete)


def test_saving_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    earlier = saved(tmp_path, 3)
    said = rf"cannot write {earlier}: disk; .* GB were free; earlier checkpoints"
    with pytest.raises(UserError, match=said), checkpoints.saving(tmp_path, 3, {"seed": 2}):
        # Until Trainer has written all of it, what was there before does not count either.
        assert checkpoints.incomplete(earlier) == "it has no trainer_state.json"
        assert checkpoints.read_run_state(earlier) == {"seed": 2}
        raise RuntimeError("disk")
    assert not earlier.exists()


def test_check_loaded_missing_weights_are_refused():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3)
            self.head.weight = self.embedding.weight

    checkpoints.check_loaded(Tied(), ["head.weight"])
    with pytest.raises(UserError, match=r"no weights for embedding.weight, head.weight"):
        checkpoints.check_loaded(Tied(), ["embedding.weight", "head.weight"])


def test_check_disk_counts_checkpoints_and_the_final_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    args = argparse.Namespace(output_dir=tmp_path, save_checkpoint=True, save_every=None, keep_last=None)
    checkpoints.check_disk(args, 1000, 8, 16)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=27_000))
    with pytest.raises(UserError, match=r"2.7e-05 GB free, 2.8e-05 GB are needed for 2 checkpoints of 1.2e-05 GB"):
        checkpoints.check_disk(args, 1000, 8, 16)
    (tmp_path / "checkpoint-5").write_text("")
    with pytest.raises(UserError, match=r"checkpoint-5 has a checkpoint's name, but is not a directory"):
        checkpoints.check_disk(args, 1000, 8, 16)
