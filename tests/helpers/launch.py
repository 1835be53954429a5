"""Launching the shipped scripts from tests, as a user does."""

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from helpers import several

ROOT = Path(__file__).resolve().parents[2]


def launch(script, *flags, ranks=1, cwd=ROOT, env=None):
    """Runs a training script on `ranks` CPU ranks, by `deepspeed` or for one rank by plain `python`.

    The launcher runs under this Python, so that no other environment's DeepSpeed is used. Returns the finished process
    with its output as text. Fails if the run takes longer than 300 s or leaves shared memory behind.
    """
    command, port = [sys.executable], free_port()
    if ranks > 1:
        command += ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", "--master_port", str(port)]
    command += [str(ROOT / script), *map(str, flags)]
    env = clean_environment() | (env or {})
    # A session of its own: the launcher starts the ranks through a shell, and killing that alone would leave them.
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired as expired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{script} did not end within {expired.timeout:.0f} s:\n{out}\n{err}") from None
    assert not [*Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def clean_environment():
    """The environment without the variables of a launcher that may be running the tests."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # OpenMP threads that spin while they wait stall for seconds if another program occupies their core.
    return clean | {"OMP_WAIT_POLICY": "PASSIVE", "PATH": str(Path(sys.executable).parent) + os.pathsep + clean["PATH"]}


def launch_several(script, runs, ranks=1, fresh=False):
    """Runs a training script once for each of {name: flags}, one after another in the same `ranks` processes.

    The ranks are forked from a process that has imported the libraries, without a launcher. Tests of the launcher use
    `launch`.

    Args:
        script: None if each run's flags begin with a script of their own.
        fresh: start new processes instead. They inherit this process's resource limits, and libraries read their
            environment variables on import.

    Returns:
        {name: a run with `returncodes` and `stderrs`, a list over ranks each, and `stdout`, rank 0's}.
    """
    argvs = {name: [*map(str, [script, *flags] if script else flags)] for name, flags in runs.items()}
    argvs = {name: [str(ROOT / argv[0]), *argv[1:]] for name, argv in argvs.items()}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        env = clean_environment() | {
            "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        context = multiprocessing.get_context("spawn") if fresh else fork_server()
        processes = [
            context.Process(
                target=several.run_rank, args=(argvs, scratch, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 600
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):  # the others would wait for it
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        assert not any(codes) and None not in codes, [path.read_text() for path in scratch.glob("rank*.log")]
        results = {}
        for name in runs:
            of_ranks = [json.loads((scratch / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]
            codes, outs, errs = zip(*of_ranks, strict=True)
            results[name] = SimpleNamespace(returncodes=[*codes], stdout=outs[0], stderrs=[*errs])
    return results


def launch_forked(script, *flags, ranks=1):
    """Runs one script with `launch_several` and returns that run."""
    return launch_several(script, {"run": flags}, ranks)["run"]


@functools.cache
def fork_server():
    """The multiprocessing context whose processes are forked with the libraries imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(several.PRELOAD)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with mock.patch.dict(os.environ, clean_environment() | {"PYTHONPATH": paths}):
        multiprocessing.forkserver.ensure_running()
    return context


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def events(output_dir, kind):
    """The events of that kind in a run's metrics.jsonl, in order."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def begun(source, tag, target):
    """Makes `target` an output directory whose newest checkpoint is a copy of `source`/`tag`."""
    shutil.copytree(source / tag, target / tag)
    (target / "latest").write_text(tag)
    return target


def shorten(path):
    """Truncates a file by 1,000 bytes."""
    path.write_bytes(path.read_bytes()[:-1000])


def errors(finished):
    """The error lines of all ranks of a run by `launch_several`; there must be no traceback."""
    stderr = "".join(finished.stderrs)
    assert "Traceback" not in finished.stdout + stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]
