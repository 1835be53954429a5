"""pipeline/train.py as it used to save: one parameter group per stage, without recording groups or split."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from common.checkpoint import Checkpointer
    from pipeline import layers

    prepare = Checkpointer.prepare

    def prepare_as_before(self, *args, bounds, **kwargs):
        del self.layout["param_groups"]
        prepare(self, *args, **kwargs)

    Checkpointer.prepare = prepare_as_before
    layers.optimizer_groups = lambda pipeline: list(pipeline.parameters())
    runpy.run_path(str(ROOT / "pipeline" / "train.py"), run_name="__main__")
