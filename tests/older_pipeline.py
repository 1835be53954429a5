"""pipeline/train.py as it used to save: one parameter group per stage, without recording groups or split."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from common import checkpoint
    from pipeline import layers

    layout, client_state = checkpoint.layout, checkpoint.client_state
    checkpoint.layout = lambda *args, param_groups: {
        key: value for key, value in layout(*args).items() if key != "param_groups"
    }
    checkpoint.client_state = lambda *args, bounds: client_state(*args)
    layers.optimizer_groups = lambda pipeline: pipeline.parameters()
    runpy.run_path(str(ROOT / "pipeline" / "train.py"), run_name="__main__")
