"""Launching the shipped scripts from tests, as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def launch(script, *flags, ranks=1, cwd=ROOT, env=None):
    """Runs a training script on `ranks` CPU ranks, by `deepspeed` or for one rank by plain `python`.

    The launcher runs under this Python, so that no other environment's DeepSpeed can get in. Returns the finished
    process with its output as text.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", "--master_port", str(free_port())]
    command += [str(ROOT / script), *map(str, flags)]
    # A launcher that runs the tests must not leak its ranks into this one.
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean["PATH"] = str(Path(sys.executable).parent) + os.pathsep + clean["PATH"]
    return subprocess.run(command, cwd=cwd, env=clean | (env or {}), capture_output=True, text=True, timeout=600)


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def events(output_dir, kind):
    """The events of that kind in a run's metrics.jsonl, in order."""
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
