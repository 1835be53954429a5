"""Runs training scripts several times in one process, since importing the libraries takes longer than a short run.

    python tests/helpers/several.py RUNS.json DIRECTORY

RUNS.json is {name: [script, flags...]}. Each rank leaves DIRECTORY/<name>.<rank>.json: [exit code, standard output,
standard error].
"""

import functools
import gc
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cpuinfo
import torch.distributed as dist

from common import distributed

# Each DeepSpeedCPUAdam asks anew what the CPU can do, which takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


@functools.cache
def main_of(script):
    spec = importlib.util.spec_from_file_location("train", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def captured(main, argv):
    """[exit code, standard output, standard error] of `main` as it would end its process, with those arguments."""
    sys.argv, code = argv, 0
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            distributed.run(main)
        except SystemExit as end:
            code = end.code
        except Exception:  # whatever it is, as the interpreter would end
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, 1):
            os.dup2(copy, number)
            os.close(copy)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return [code, *texts]


if __name__ == "__main__":
    runs, directory = sys.argv[1:]
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # all runs share the first one's
    distributed.LAST_WORD_S = 0  # a rank that has failed ends no other here
    for name, argv in json.loads(Path(runs).read_text()).items():
        result = captured(main_of(argv[0]), argv)
        (Path(directory) / f"{name}.{distributed.rank()}.json").write_text(json.dumps(result))
        gc.collect()
    if dist.is_initialized():
        end()
