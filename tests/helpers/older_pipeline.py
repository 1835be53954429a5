"""pipeline/train.py as it used to save: one parameter group per stage, without recording groups or split."""

from pathlib import Path
from unittest import mock

from common.checkpoint import Checkpointer
from helpers.several import main_of
from pipeline import layers

ROOT = Path(__file__).resolve().parents[2]


def main():
    prepare = Checkpointer.prepare

    def prepare_as_before(self, *args, bounds, **kwargs):
        del self.layout["param_groups"]
        prepare(self, *args, **kwargs)

    with (
        mock.patch.object(Checkpointer, "prepare", prepare_as_before),
        mock.patch.object(layers, "optimizer_groups", lambda pipeline: list(pipeline.parameters())),
    ):
        main_of(str(ROOT / "pipeline" / "train.py"))()
