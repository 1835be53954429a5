"""The ranks of `launch_several`: processes that run training scripts one after another.

Importing the libraries takes longer than a short run, so the ranks are forked from a server process that has imported
`PRELOAD` and done nothing else.
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

import torch.distributed as dist

from common import distributed

# What the server imports before it forks; DeepSpeed and transformers import parts of it only when they are used.
PRELOAD = [
    "helpers.several", "common.checkpoint", "common.kernels", "common.memory", "deepspeed.ops.adam",
    "torch._inductor.compile_fx", "transformers.conversion_mapping", "transformers.trainer",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bloom", "gpt2", "llama")),
]  # fmt: skip


def run_rank(argvs: dict[str, list[str]], directory: Path, environment: dict[str, str]) -> None:
    """One rank: leaves `directory`/<name>.<rank>.json, [exit code, standard output, standard error], of each run."""
    import cpuinfo

    # Each DeepSpeedCPUAdam queries the CPU's features, which takes a second.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(directory / f"rank{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # all runs share the first one's
    distributed.LAST_WORD_S = 0  # a rank that has failed ends no other here
    for name, argv in argvs.items():
        result = captured(main_of(argv[0]), argv)
        (directory / f"{name}.{distributed.rank()}.json").write_text(json.dumps(result))
        gc.collect()
    if dist.is_initialized():
        end()


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
