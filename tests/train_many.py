"""Runs training scripts one after another in the same ranks: importing the libraries takes longer than a small run.

    deepspeed --num_gpus=2 tests/train_many.py RUNS.json

RUNS.json is a list of [script, flags]. Each run is the script's own `main` with these flags; the first that fails
ends all.
"""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import cpuinfo
from runs import ROOT

sys.path.insert(0, str(ROOT))

from common import launch

# Each DeepSpeedCPUAdam asks anew what the CPU can do, which takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


def main():
    modules = {}
    for script, flags in json.loads(Path(sys.argv[-1]).read_text()):
        if script not in modules:
            spec = importlib.util.spec_from_file_location(script, ROOT / script)
            modules[script] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[script])
        sys.argv = [script, *flags]
        print("run:", *sys.argv, flush=True)  # so that a failure names its run
        modules[script].main()


if __name__ == "__main__":
    launch.set_rank_variables()
    launch.run(main)
