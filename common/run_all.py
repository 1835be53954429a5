"""Trains with every technique on one model and one text, so that their curves can be compared.

`python -m common.report --run-all` calls this, then reports on the runs. Each run is a process of its own, started the
way a user starts it. All train on the same rows per step in the same micro-batches, so in float32 the losses are equal.
"""

import contextlib
import os
import runpy
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
MICRO_BATCHES = 4  # per step, of all data-parallel ranks together
FLAGS = [
    "--model_name", "sample-llama", "--dataset_name", "sample-abstracts", "--num_epochs", "1",
    "--max_train_steps", "48", "--batch_size", "2", "--max_length", "256", "--no-save_checkpoint",
]  # fmt: skip
LAST_LINES = 15  # shown of a run that failed
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def plan(gpus: int) -> dict[str, tuple[str, int, list[str]]]:
    """Returns {name: (script, ranks, flags)} for the techniques whose directory exists.

    Args:
        gpus: of this host; with 0, two ranks run on the CPU.
    """
    ranks = min(gpus, 2) or 2
    accumulate = ["--accum_steps", str(MICRO_BATCHES // ranks)]
    runs = {"baseline": ("baseline/train.py", 1, ["--accum_steps", str(MICRO_BATCHES)])}
    for technique, suffix in (("zero", ""), ("offload", "_offload")):
        for stage in (1, 2, 3):
            config = ["--deepspeed_config", str(ROOT / technique / f"ds_zero{stage}{suffix}.json")]
            runs[f"{technique}{stage}"] = (f"{technique}/train.py", ranks, [*accumulate, *config])
    stages = ["--accum_steps", str(MICRO_BATCHES), "--num_stages", str(ranks)]
    runs["pipeline"] = ("pipeline/train.py", ranks, stages)
    return {name: run for name, run in runs.items() if (ROOT / run[0]).is_file()}


def run_all(output_dir: Path, flags: list[str], losses: Callable[[Path], str]) -> tuple[list[Path], list[str]]:
    """Trains with every technique, one after the other, and continues if one fails.

    Args:
        output_dir: each run gets a directory of its name in it; what it prints goes to `output.log` there.
        flags: for every script; they override all but a run's own accumulation, JSON, stages and directory.
        losses: returns the losses of the run in a directory, for the progress line.

    Returns:
        (directories of the runs to report on, names of the runs that failed).

    Raises:
        UserError: no run started training.
        SystemExit: a script does not accept one of the flags.
    """
    check_flags(flags)
    for interrupt in INTERRUPTS:
        signal.signal(interrupt, signal.default_int_handler)  # so that the ranks are ended too
    gpus = torch.cuda.device_count()
    # Emulated bf16 counts as supported unless told otherwise, and every script refuses it.
    has_bf16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = ["--precision", "bf16" if has_bf16 else "fp16"] if gpus else []
    runs = plan(gpus)
    directories, failed, started = [], [], time.monotonic()
    for number, (name, (script, ranks, own_flags)) in enumerate(runs.items(), start=1):
        directory = output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        metrics, log = directory / "metrics.jsonl", directory / "output.log"
        size_before = metrics.stat().st_size if metrics.exists() else 0
        print(f"{number}/{len(runs)} {name:9}", end="", flush=True)
        began = time.monotonic()
        all_flags = [*FLAGS, *precision, *flags, *own_flags, "--output_dir", str(directory)]
        code = launch(script, ranks, all_flags, log)
        now = time.monotonic()
        print(f" | {now - began:4.0f} s | {now - started:4.0f} s in total", end="")
        if metrics.exists() and metrics.stat().st_size > size_before:  # not only what an earlier run left there
            directories.append(directory)
            print(f" | {losses(directory)}", end="")
        print(f" | failed with exit code {code}" if code else "", flush=True)
        if code:
            failed.append(name)
            lines = log.read_text(errors="replace").splitlines()
            print(*(f"    {line}" for line in lines[-LAST_LINES:]), sep="\n", file=sys.stderr, flush=True)
    if not directories:
        raise UserError(f"no run started training; see {output_dir}/*/output.log")
    return directories, failed


def check_flags(flags: list[str]) -> None:
    """Exits with argparse's message if one of the scripts does not accept a flag, before the first of them runs."""
    if not flags:
        return
    os.environ.setdefault("RANK", "0")  # only rank 0 prints the message
    arguments = sys.argv
    for script in dict.fromkeys(script for script, *_ in plan(0).values()):
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints as it is imported
            parse_args = runpy.run_path(str(ROOT / script))["parse_args"]
        try:
            sys.argv = [script, *FLAGS, *flags]
            parse_args()
        finally:
            sys.argv = arguments


def launch(script: str, ranks: int, flags: list[str], log: Path) -> int:
    """Runs a training script with `deepspeed`, or one rank with plain `python`; returns its exit code.

    However this ends, no rank is left behind.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # The launcher starts its ranks by name: they must find this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # On a CPU, threads that spin while they wait stand still for seconds when another program has a core.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launcher = []
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        launcher = ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", f"--master_port={port}"]
    with open(log, "wb") as output:
        # A session of its own, so that the launcher's ranks can be told to end with it.
        process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / script), *flags],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # a second Ctrl-C would leave the ranks behind
        end_group(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of the processes that `process` started: SIGTERM, and SIGKILL after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # the group exists until its first process has been waited for
                time.sleep(0.2)
                os.killpg(process.pid, 0)
