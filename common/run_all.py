"""The workshop in one go: every technique on one model and one text, so that their curves can be compared.

`python -m common.report --run-all` runs this, then reports on it. Each run is a process of its own, started as a
user starts it. All take the same rows a step, in the same micro-batches, so in float32 all have the same losses.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCH_SIZE = 2  # rows
MICRO_BATCHES = 4  # a step, of all data-parallel ranks together
FLAGS = [
    "--model_name", "sample-llama", "--dataset_name", "sample-abstracts", "--num_epochs", "1",
    "--max_train_steps", "48", "--batch_size", str(MICRO_BATCH_SIZE), "--max_length", "256", "--no-save_checkpoint",
]  # fmt: skip
LAST_LINES = 15  # shown of a run that failed


def plan(gpus: int) -> dict[str, tuple[str, int, list[str]]]:
    """The runs as {name: (script, ranks, flags)}, for the techniques whose directory exists.

    Args:
        gpus: of this host; 0 for two ranks on its CPU.
    """
    ranks = min(gpus, 2) or 2

    def shares(data_parallel):
        return ["--accum_steps", str(MICRO_BATCHES // data_parallel)]

    runs = {"baseline": ("baseline/train.py", 1, shares(1))}
    for technique, suffix in (("zero", ""), ("offload", "_offload")):
        for stage in (1, 2, 3):
            config = ["--deepspeed_config", str(ROOT / technique / f"ds_zero{stage}{suffix}.json")]
            runs[f"{technique}{stage}"] = (f"{technique}/train.py", ranks, [*shares(ranks), *config])
    runs["pipeline"] = ("pipeline/train.py", ranks, [*shares(1), "--num_stages", str(ranks)])
    return {name: run for name, run in runs.items() if (ROOT / run[0]).is_file()}


def run_all(output_dir: Path, flags: list[str], losses: Callable[[Path], str]) -> tuple[list[Path], list[str]]:
    """Trains with every technique, one after the other, and goes on if one fails.

    Args:
        output_dir: each run goes into a directory of its name in it, what it prints into `output.log` there.
        flags: for every script; they override all but a run's own accumulation, JSON, stages and directory.
        losses: called with a run's directory, says in a few words what came out.

    Returns:
        (directories with what can be reported, names of the runs that failed).

    Raises:
        UserError: output_dir cannot be written, or nothing has run.
        SystemExit: a script does not know one of the flags.
    """
    check_flags(flags)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # so that the ranks end too
    gpus = torch.cuda.device_count()
    # Emulated bf16 counts as supported unless told otherwise, and every script refuses it.
    has_bf16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = ["--precision", "bf16" if has_bf16 else "fp16"] if gpus else []
    runs = plan(gpus)
    directories, failed, started = [], [], time.monotonic()
    for number, (name, (script, ranks, own_flags)) in enumerate(runs.items(), start=1):
        directory = output_dir / name
        metrics = directory / "metrics.jsonl"
        print(f"{number}/{len(runs)} {name:9}", end="", flush=True)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            size_before = metrics.stat().st_size if metrics.exists() else 0
            began = time.monotonic()
            code = launch(
                script, ranks, [*FLAGS, *precision, *flags, *own_flags, "--output_dir", str(directory)],
                directory / "output.log",
            )  # fmt: skip
        except OSError as error:
            print()
            raise UserError(f"--output_dir {output_dir} cannot be written: {error}") from error
        now = time.monotonic()
        print(f" | {now - began:4.0f} s | {now - started:4.0f} s in all", end="")
        # What an earlier run left in the directory is not this one's.
        if metrics.exists() and metrics.stat().st_size > size_before:
            directories.append(directory)
            print(f" | {losses(directory)}", end="")
        print(f" | failed with exit code {code}" if code else "", flush=True)
        if code:
            failed.append(name)
            lines = (directory / "output.log").read_text(errors="replace").splitlines()
            print(*(f"    {line}" for line in lines[-LAST_LINES:]), sep="\n", file=sys.stderr, flush=True)
    if not directories:
        raise UserError(f"no run has begun to train; what they printed is in {output_dir}/*/output.log")
    return directories, failed


def check_flags(flags: list[str]) -> None:
    """Ends with argparse's message where one of the scripts does not know a flag, before the first of them runs."""
    if not flags:
        return
    os.environ.setdefault("RANK", "0")  # that speaks for all of a script's
    for script in dict.fromkeys(script for script, *_ in plan(0).values()):
        specification = importlib.util.spec_from_file_location("script", ROOT / script)
        module = importlib.util.module_from_spec(specification)
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed says what it finds as it is imported
            specification.loader.exec_module(module)
        arguments, sys.argv = sys.argv, [script, *FLAGS, *flags]
        try:
            module.parse_args()
        finally:
            sys.argv = arguments


def launch(script: str, ranks: int, flags: list[str], log: Path) -> int:
    """Runs a training script by `deepspeed`, or for one rank on one GPU by plain `python`; returns its exit code.

    However this ends, no rank is left behind.
    """
    command = [sys.executable]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # The launcher starts its ranks by name: they must find this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # On a CPU, threads that spin while they wait stand still for seconds where another program has a core.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if ranks > 1:
        command += ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", "--master_port", str(free_port())]
    with open(log, "wb") as output:
        # A session of its own, so that the launcher's ranks can be told to end with it.
        process = subprocess.Popen(
            [*command, str(ROOT / script), *flags], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait()
    finally:
        end_session(process)


def end_session(process: subprocess.Popen) -> None:
    """Ends what is left of the processes that `process` started: asks first, and insists after ten seconds."""
    # A second Ctrl-C would leave them behind.
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(ending, signal.SIG_IGN) for ending in endings]
    try:
        _end_group(process)
    finally:
        for ending, handler in zip(endings, handlers, strict=True):
            signal.signal(ending, handler)


def _end_group(process):
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # the group is there until its first process has been waited for
                time.sleep(0.2)
                os.killpg(process.pid, 0)
        except ProcessLookupError:
            return


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
