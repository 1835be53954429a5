"""Training that is killed again and again, against the same training left alone.

    python tests/benchmarks/kills.py --output tests/benchmarks/results/kills.json

launches the shipped scripts as a user does, on two ranks, with the small sample models: 60 steps, a checkpoint every
third, the last two kept. Each technique runs once undisturbed; then again, killed with SIGKILL at random moments and
started anew with `--resume_from_checkpoint latest`, until it has been killed 20 times and may finish. Kills come while
the program starts, while it trains and while it saves; most hit launcher and ranks at once, some a single rank, after
which the launcher has to end the others. `--forked` starts the ranks without the launcher, which takes two seconds and
not ten: they are forks of a process that has imported the libraries, and begin with the script's first line.

After each kill no checkpoint may be there in part, and the one that `latest` names, checked against its manifest, must
be no older than the last that the run said it had saved. At the end each step's loss and every tensor of the last
checkpoint (weights, optimizer, random numbers) must be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import bench

sys.path.insert(0, str(bench.ROOT / "tests"))

import psutil
import torch

from common import manifest
from common.checkpoint import TAG
from helpers.launch import clean_environment, events

STEPS, SAVE_EVERY = 60, 3
FLAGS = (
    "--max_train_steps", STEPS, "--save_every", SAVE_EVERY, "--keep_last", 2, "--max_length", 64, "--batch_size", 1,
    "--num_epochs", 20, "--max_eval_steps", 1,
)  # fmt: skip
ZERO = "zero", "--generation_prompt", "", "--accum_steps", 1, "--end_idx", 60
TECHNIQUES = {
    "zero 2": ZERO,
    "zero 3": (*ZERO, "--deepspeed_config", "zero/ds_zero3.json"),
    "offload 2": ("offload", "--generation_prompt", "", "--accum_steps", 1, "--end_idx", 30),
    "pipeline": ("pipeline", "--accum_steps", 2, "--end_idx", 30),
}
POLL_S = 0.002
PATIENCE_S = 300  # how long a start may take to come to the moment of its kill
CLEAN_UP_S = 90  # how long the launcher may take to end the other ranks


class Lost(Exception):
    """Something that a kill must not do."""


class Kill(NamedTuple):
    """When and whom.

    Attributes:
        during: "start", "train" or "save".
        step: the kill waits for the first record of this step or a later one, or for its checkpoint to begin.
        part: of the time from then on that a start, SAVE_EVERY steps or a save take, from 0 to 1.
        victim: rank, or None for the launcher and all ranks.
    """

    during: str
    step: int
    part: float
    victim: int | None


class Launched(subprocess.Popen):
    """`deepspeed` with two ranks, in a process group of its own."""

    def __init__(self, argv, port, log):
        launcher = "deepspeed.launcher.runner", "--num_gpus=2", "--master_port", str(port)
        with open(log, "w") as file:
            super().__init__(
                [sys.executable, "-m", *launcher, *map(str, argv)], cwd=bench.ROOT, env=clean_environment(),
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def rank(self, number):
        """The process of a rank, or None where it has not begun yet."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                line = process.cmdline()
                if f"--local_rank={number}" in line and "deepspeed.launcher.launch" not in line:
                    return process
        return None


class Forked(multiprocessing.get_context("fork").Process):
    """A launcher without a start-up time: two ranks as forks of this process, in a process group of their own.

    It has of subprocess.Popen what is asked of the launcher's.
    """

    def __init__(self, argv, port, log):
        super().__init__(target=self.launch, args=([*map(str, argv)], port, log))
        self.start()
        while os.getpgid(self.pid) != self.pid:
            time.sleep(POLL_S)

    @staticmethod
    def launch(argv, port, log):
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        ranks = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                os.environ.update(
                    clean_environment(), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
                sys.argv = [*argv, f"--local_rank={rank}"]
                # As Python would: this file's directory has a pipeline.py, which is not pipeline/.
                sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
                sys.path.insert(0, str(Path(argv[0]).parent))
                runpy.run_path(argv[0], run_name="__main__")
                return
            ranks.append(pid)
        failed = False
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            failed |= status != 0
            if failed and ranks:
                os.kill(ranks[0], signal.SIGTERM)
        sys.exit(failed)

    def rank(self, number):
        """The process of a rank, or None where it has not begun yet."""
        ranks = sorted(psutil.Process(self.pid).children(), key=lambda process: process.pid)
        return ranks[number] if len(ranks) == 2 else None

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("the ranks", timeout)
        return self.exitcode

    @property
    def returncode(self):
        return self.exitcode


class Pace(NamedTuple):
    """Seconds that the undisturbed run took to its first step, for SAVE_EVERY steps with their save, and for a save."""

    start: float
    train: float
    save: float


def plan(technique, count, seed):
    """`count` kills at random moments in the order of their steps, the same for the same seed."""
    rng = random.Random(f"{seed} {technique}")
    during = ["save"] * math.ceil(0.45 * count) + ["start"] * (count * 3 // 20)
    during += ["train"] * (count - len(during))
    victims = [rng.randrange(2) for _ in range(math.ceil(0.2 * count))]
    victims += [None] * (count - len(victims))
    rng.shuffle(during)
    rng.shuffle(victims)
    # The last save must not be over before the last kill.
    steps = sorted(rng.randint(1, STEPS - 3 * SAVE_EVERY) for _ in range(count))
    return [Kill(*kill) for kill in zip(during, steps, (rng.random() for _ in steps), victims, strict=True)]


class Start:
    """One start of the training, with launcher and two ranks in a process group of its own."""

    def __init__(self, technique, output_dir, port, forked):
        script, *flags = TECHNIQUES[technique]
        self.output_dir = output_dir
        self.resumed = (output_dir / "latest").exists()
        if self.resumed:
            flags += ["--resume_from_checkpoint", "latest"]
        self.log = output_dir.parent / "log"
        self.metrics = output_dir / "metrics.jsonl"
        self.read_to = self.metrics.stat().st_size if self.metrics.exists() else 0
        self.step, self.started = 0, time.monotonic()
        argv = [bench.ROOT / script / "train.py", *FLAGS, *flags, "--output_dir", output_dir]
        self.process = (Forked if forked else Launched)(argv, port, self.log)

    def saving(self):
        """Step of the checkpoint that this start is writing, or None. One that it found there is of no step of its."""
        step = self.last_step()
        return step if step and (self.output_dir / f".global_step{step}.partial").exists() else None

    def last_step(self):
        """The last step that this start has recorded, 0 for none."""
        if self.metrics.exists():
            with open(self.metrics, "rb") as file:
                file.seek(self.read_to)
                found = re.findall(rb'"event": "step", .*?"step": (\d+),', file.read())
            self.step = int(found[-1]) if found else self.step
        return self.step

    def wait_for(self, condition):
        """Whether it came to be before the run was over.

        Raises:
            Lost: neither happens.
        """
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.started > PATIENCE_S:
                self.kill_all()
                raise Lost(f"it neither gets on nor ends:\n{self.said()[-4000:]}")
            time.sleep(POLL_S)
        return True

    def said(self):
        return self.log.read_text(errors="replace")

    def members(self):
        """Processes of this start that are still there."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                if os.getpgid(process.pid) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except ProcessLookupError:
                continue
        return found

    def kill_all(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wait_until_gone()

    def wait_until_gone(self):
        """Raises Lost if a process outlives the launcher."""
        deadline = time.monotonic() + CLEAN_UP_S
        while self.members():
            if time.monotonic() > deadline:
                left = [" ".join(process.cmdline()) for process in self.members()]
                os.killpg(self.process.pid, signal.SIGKILL)
                raise Lost(f"processes outlive the run: {left}")
            time.sleep(POLL_S)

    def kill(self, victim):
        """Kills everything or that rank alone, and waits until all are gone; returns whom it hit: a rank or None."""
        process = None if victim is None else self.process.rank(victim)
        if process is None:
            self.kill_all()
            return None
        process.kill()
        try:
            self.process.wait(CLEAN_UP_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Lost(f"rank {victim} is dead, and the launcher still runs after {CLEAN_UP_S} s") from None
        self.wait_until_gone()
        return victim


def is_there(path, states):
    """Raises Lost where a checkpoint's files are not those of its manifest."""
    said = manifest.read(path)
    if said is None:
        raise Lost(f"{path} has no manifest: {states}")
    if sorted(said) != manifest.files_of(path):
        raise Lost(f"{path} has other files than its manifest names: {states}")
    for name, entry in said.items():
        problem = manifest.difference(path, name, entry)
        if problem:
            raise Lost(problem)


def check_checkpoints(output_dir, said):
    """Every checkpoint is complete, and `latest` names one at least as new as the last that was announced.

    Args:
        said: what the run printed.

    Returns:
        The step of the checkpoint that `latest` names, 0 where there is none yet.
    """
    states = sorted(path.name for path in output_dir.iterdir())
    for path in output_dir.glob("global_step*"):
        is_there(path, states)
    announced = max((int(step) for step in re.findall(r"^saved .*/global_step(\d+)$", said, re.M)), default=0)
    latest = output_dir / "latest"
    if not latest.exists():
        if announced:
            raise Lost(f"global_step{announced} was saved, and there is no latest: {states}")
        return 0
    tag = latest.read_text()
    if not TAG.fullmatch(tag) or not (output_dir / tag).is_dir():
        raise Lost(f"latest names {tag!r}: {states}")
    step = int(TAG.fullmatch(tag)[1])
    if step < announced:
        raise Lost(f"global_step{announced} was saved, and latest names {tag}: {states}")
    return step


def undisturbed(technique, directory, port, forked):
    """Runs the training to its end; returns its Pace."""
    start = Start(technique, directory, port, forked)
    first, saves, began = None, [], None
    while start.process.poll() is None:
        now = time.monotonic()
        if first is None and start.last_step():
            first = now
        if began is None and start.saving():
            began = now
        elif began is not None and not start.saving():
            saves.append(now - began)
            began = None
        time.sleep(POLL_S)
    if start.process.returncode:
        raise Lost(f"the undisturbed run fails:\n{start.said()[-4000:]}")
    times = [event["time"] for event in events(directory, "step")]
    return Pace(first - start.started, (times[-1] - times[0]) / (STEPS - 1) * SAVE_EVERY, statistics.median(saves))


def killed(technique, directory, port, forked, kills, pace, say):
    """Runs the training to its end through all kills.

    Returns:
        What happened: dict of counts, and a list with an entry a kill.
    """
    done, starts, resumes, newest = [], 0, 0, 0
    for kill in [*kills, None]:
        start = Start(technique, directory, port, forked)
        starts += 1
        resumes += start.resumed
        if kill is None:
            break
        if kill.during == "start":
            time.sleep(kill.part * pace.start)
            there = start.process.poll() is None
        elif kill.during == "train":
            there = start.wait_for(lambda start=start, kill=kill: start.last_step() >= kill.step)
            time.sleep(kill.part * pace.train)
        else:
            there = start.wait_for(lambda start=start, kill=kill: (start.saving() or 0) >= kill.step)
            time.sleep(kill.part * pace.save)
        if not there or start.process.poll() is not None:
            raise Lost(f"it ended before it could be killed at {kill}:\n{start.said()[-4000:]}")
        at, saving = start.last_step(), start.saving() is not None
        hit = start.kill(kill.victim)
        latest = check_checkpoints(directory, start.said())
        if latest < newest:
            raise Lost(f"latest went back from step {newest} to {latest}")
        newest = latest
        done.append({
            "during": kill.during, "saving": saving, "rank": hit, "last_step": at, "latest": latest,
            "cut_record": start.metrics.exists() and start.metrics.read_bytes()[-1:] not in (b"", b"\n"),
        })  # fmt: skip
        say(f"{technique}: kill {len(done)}/{len(kills)} {done[-1]}")
    if start.process.wait():
        raise Lost(f"the last start fails:\n{start.said()[-4000:]}")
    check_checkpoints(directory, start.said())
    hidden = sorted(path.name for path in directory.glob(".*"))
    if hidden:
        raise Lost(f"the finished run leaves {hidden}")
    memory = [path.name for path in Path("/dev/shm").glob(f"*_{port}_*")]
    if memory:
        raise Lost(f"the runs leave {memory} in /dev/shm")
    return {
        "kills": len(done),
        "of launcher and all ranks": sum(kill["rank"] is None for kill in done),
        "of one rank": sum(kill["rank"] is not None for kill in done),
        "while starting": sum(not kill["last_step"] for kill in done),
        "while saving": sum(kill["saving"] for kill in done),
        "starts": starts,
        "resumes": resumes,
        "each kill": done,
    }


def tensors(value, name=""):
    """All tensors in what torch.load returned, as (name, tensor)."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from tensors(inner, f"{name}/{number}")


def compare(straight, broken):
    """Sets the killed run's losses and last checkpoint beside the undisturbed run's.

    Returns:
        Counts: of steps, of those done twice, of tensors compared, and the largest differences.
    """
    expected = {event["step"]: event["loss"] for event in events(straight, "step")}
    records = events(broken, "step")
    losses = {event["step"]: event["loss"] for event in records}
    if sorted(losses) != list(range(1, STEPS + 1)) or sorted(expected) != sorted(losses):
        raise Lost(f"steps {sorted(set(range(1, STEPS + 1)) ^ set(losses))} are not there once each")
    off = max(abs(losses[step] - loss) for step, loss in expected.items())
    tag = f"global_step{STEPS}"
    differences = []
    names = [name for name in manifest.files_of(straight / tag) if name.endswith(".pt")]
    if names != [name for name in manifest.files_of(broken / tag) if name.endswith(".pt")]:
        raise Lost(f"{broken / tag} has other files than {straight / tag}")
    for name in names:
        # Files that the runs above wrote; DeepSpeed's classes are in them.
        states = [torch.load(directory / tag / name, weights_only=False) for directory in (straight, broken)]
        differences += largest_differences(*(list(tensors(state)) for state in states))
    if not differences:
        raise Lost(f"{straight / tag} holds no tensors")
    if off or max(differences):
        raise Lost(f"losses differ by up to {off}, tensors by up to {max(differences)}")
    return {
        "steps": len(losses), "steps done twice": len(records) - len(losses), "tensors compared": len(differences),
        "largest difference of a loss": off, "largest difference of a tensor": max(differences),
    }  # fmt: skip


def largest_differences(first, second):
    """The largest difference between each pair of tensors; each argument is a list of (name, tensor)."""
    if [(name, tensor.shape, tensor.dtype) for name, tensor in first] != [
        (name, tensor.shape, tensor.dtype) for name, tensor in second
    ]:
        raise Lost("the checkpoints hold other tensors")
    for (_, one), (_, other) in zip(first, second, strict=True):
        if torch.equal(one, other):
            yield 0.0
        else:
            difference = (one.double() - other.double()).abs().max().item()
            yield difference if difference else math.inf  # NaN, or a sign of zero


def free_port():
    """A port for all starts of a training, below those that the system hands out to clients meanwhile."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port of a hundred tried is free")


def measure(technique, count, seed, scratch, forked=False, say=lambda line: None):
    """The whole comparison for one technique.

    Args:
        count: kills.
        scratch: an empty directory.
        forked: without the launcher.
        say: called with one line a kill.

    Raises:
        Lost: with what was lost.
    """
    began, port = time.monotonic(), free_port()
    straight, broken = scratch / "straight" / "run", scratch / "killed" / "run"
    for directory in (straight, broken):
        directory.mkdir(parents=True)
    pace = undisturbed(technique, straight, port, forked)
    say(f"{technique}: undisturbed {pace}")
    counts = killed(technique, broken, port, forked, plan(technique, count, seed), pace, say)
    each = counts.pop("each kill")
    run = events(broken, "run")[-1]
    return {
        **counts, **compare(straight, broken), "wall_time_s": round(time.monotonic() - began, 1),
        "launcher": not forked, "seed": seed, "hardware": run["hardware"], "versions": run["versions"],
        "each kill": each,
    }  # fmt: skip


def table(results):
    """Lines of a table, a row a technique."""
    columns = ("kills", "while starting", "while saving", "of one rank", "resumes", "steps", "steps done twice")
    yield " | ".join(["technique".ljust(10), *columns, "lost", "largest difference"])
    for technique, result in results.items():
        numbers = [str(result[column]).rjust(len(column)) for column in columns]
        difference = max(result["largest difference of a loss"], result["largest difference of a tensor"])
        yield " | ".join([technique.ljust(10), *numbers, "none", f"{difference:g}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each technique; default: %(default)s")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=[*TECHNIQUES], help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--forked", action="store_true", help="start the ranks without the launcher, as forks")
    parser.add_argument("--output", type=Path, help="JSON file for the result; other techniques' results there stay")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of this process's threads, and would wait for them
    results = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    for technique in args.techniques:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                results[technique] = measure(
                    technique, args.kills, args.seed, Path(scratch), args.forked, lambda line: print(line, flush=True)
                )
            except Lost as lost:
                sys.exit(f"{technique}: {lost}")
        bench.keep(args.output, results)
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
