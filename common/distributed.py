"""Ranks: their numbers and devices, and how all of them fail or stop together."""

import atexit
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers

from common.errors import UserError, one_line

# Seconds that rank 0 may take to print an error and exit, even on a busy machine.
LAST_WORD_S = 10

# How `torch.cuda.init()` reports a missing NVIDIA GPU or a PyTorch without CUDA; the run then uses the CPU.
NO_GPU = (
    "Found no NVIDIA driver", "No CUDA GPUs are available", "you might not have a CUDA gpu", "not compiled with CUDA",
)  # fmt: skip
_barriers = itertools.count()


def set_rank_variables() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, whatever started this process.

    `deepspeed` and `torchrun` set them. Under `srun` they follow from Slurm's own variables. Plain `python` is one
    rank; without the variables DeepSpeed would look for MPI.
    """
    if "LOCAL_SIZE" in os.environ:
        # The `deepspeed` launcher's name for it. If it stays set, every rank on a CPU allocates 66 MiB of /dev/shm for
        # inference_all_reduce, which nothing here calls, and never frees it.
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.pop("LOCAL_SIZE")
    if "RANK" in os.environ:
        return
    # A batch script has SLURM_PROCID too; only processes started by `srun` have a step.
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        os.environ.update(
            RANK=os.environ["SLURM_PROCID"],
            WORLD_SIZE=os.environ["SLURM_NTASKS"],
            LOCAL_RANK=os.environ["SLURM_LOCALID"],
            LOCAL_WORLD_SIZE=str(int(os.environ["SLURM_NTASKS"]) // len(hosts)),
        )
        os.environ.setdefault("MASTER_ADDR", hosts[0])
        # The same port for every task of a job, and different ones for two jobs on one node.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    else:  # port 0: any free one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def rank() -> int:
    return int(os.environ["RANK"])


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def local_world_size() -> int:
    """Number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def set_device() -> torch.device:
    """Returns this rank's device: its GPU, made current, or the CPU, whose cores the ranks share evenly.

    Raises:
        UserError: this host has fewer GPUs than ranks, or PyTorch cannot use them (see `check_gpu`).
    """
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank()} has no GPU: this host has {torch.cuda.device_count()}; "
                "start one process per GPU"
            )
        torch.cuda.set_device(local_rank())
    check_gpu()
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    set_cpu_threads()
    return torch.device("cpu")


def check_gpu() -> None:
    """Checks that the installed PyTorch can use this machine's NVIDIA GPU, if there is one, by running a kernel.

    Raises:
        UserError: the driver is too old or the GPU does not start (PyTorch would silently use the CPU), or PyTorch was
            built without code for this GPU.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    try:
        torch.cuda.init()
        torch.ones(1, device="cuda").item()
    except (AssertionError, RuntimeError) as error:
        if not any(reason in str(error) for reason in NO_GPU):
            built_for = " ".join([f"CUDA {torch.version.cuda}", *torch.cuda.get_arch_list()])
            raise UserError(
                f"PyTorch {torch.__version__} ({built_for}) cannot use this machine's GPU: {one_line(error, 300)}; "
                # The deepspeed launcher overwrites the variable.
                "to train on the CPU, start the script with `CUDA_VISIBLE_DEVICES= python`"
            ) from error


def set_cpu_threads(threads: int | None = None) -> int:
    """Sets how many threads this rank uses for work on the CPU, and returns that number.

    PyTorch would start one thread per core in every rank. Under `torchrun`, which sets OMP_NUM_THREADS to 1, it would
    start a single one, with which an optimizer on the CPU leaves most cores idle.

    Args:
        threads: --cpu_threads; None shares the host's cores evenly among its ranks.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // local_world_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for extensions that load a threading library of their own
    torch.set_num_threads(threads)
    return threads


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (every device).

    Weights come from files, so this decides the dropout masks: data-parallel ranks need different seeds, the stages of
    one pipeline replica the same.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Runs a block on every rank; if it raises UserError on any of them, all ranks raise it. Collective.

    Any other exception is raised again on its own rank, and the other ranks raise UserError.

    Without this a rank that stops on its own leaves the others waiting in their next collective call. The block itself
    must not communicate, and may take as long as it needs: see `wait_for_all_ranks`.
    """
    error = message = None
    try:
        yield
    except UserError as raised:
        message = str(raised)
    except Exception as raised:
        error, message = raised, f"{type(raised).__name__}: {one_line(raised, 200)}"
    messages = [message] * world_size()
    if world_size() > 1:
        wait_for_all_ranks()
        dist.all_gather_object(messages, message)
    if error:
        raise error
    for number, first in enumerate(messages):
        if first is not None:
            everywhere = len(set(messages)) == 1
            raise UserError(first if everywhere else f"rank {number}: {first}", on_all_ranks=True)


def wait_for_all_ranks() -> None:
    """Returns once every rank has called it.

    A collective call fails after DEEPSPEED_TIMEOUT (10 minutes), which is right for a training step, but one rank may
    download, tokenize or convert for hours while the others wait. So they poll the store, which has no time limit. If a
    rank is killed meanwhile, the launcher, `srun` or `deepspeed`, ends the others.
    """
    store, key = dist.distributed_c10d._get_default_store(), f"barrier {next(_barriers)}"
    pause = 0.001
    store.add(key, 1)
    while store.add(key, 0) < dist.get_world_size():
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Runs a block on local rank 0 of each host before the host's other ranks, which then find its caches filled.

    Collective, and raises like `raise_on_all_ranks`. The block itself must not communicate.
    """
    first = local_rank() == 0
    with raise_on_all_ranks():
        if first:
            yield
    with raise_on_all_ranks():
        if not first:
            yield


class PreemptionHandler:
    """Turns SIGTERM, SIGUSR1 or Ctrl-C into a request to save and stop after the current step.

    Schedulers send the first two before they end a job. A signal may reach only some ranks, so the handler only records
    it, and the ranks agree on it after each step (`common.tracking.reduce_metrics`). A second Ctrl-C ends the process
    at once; the SIGTERM that DeepSpeed's launcher sends after a Ctrl-C of its own does not count as the second.

    Attributes:
        number: of the signal this rank received, 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._request)
        # Python restores its own handlers before it exits, and a signal that arrives after that would kill it.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _request(self, number: int, frame: FrameType | None) -> None:
        requested_before = self.number != 0
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for a collective to return
            if requested_before:
                os.kill(os.getpid(), signal.SIGINT)
        if not requested_before and rank() == 0:
            # The signal may have interrupted a `print`, which is not reentrant.
            name = signal.Signals(number).name
            os.write(2, f"{name}: the run saves and ends after this step; Ctrl-C ends it now\n".encode())


def gather_numbers(numbers: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's list, in rank order, as float64; a collective call. The lists have the same length on all ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyone = [mine]
    if world_size() > 1:
        everyone = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def sum_over_ranks(number: float | torch.Tensor, device: torch.device) -> float:
    """The number's sum over all ranks, in float64; a collective call. Waits for the GPU if it is a tensor."""
    return sum(numbers[0] for numbers in gather_numbers([float(number)], device))


def run(main: Callable[[], None]) -> None:
    """Calls `main` and turns a UserError into one line on standard error and exit code 1 on every rank.

    Most errors are the same on every rank. The launcher ends all ranks as soon as the first one exits, so the others
    give rank 0 time to print. A rank that is still running after that failed on its own, and prints its error itself.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except UserError as error:
        if rank() != 0:
            time.sleep(LAST_WORD_S)
        if rank() == 0 or not error.on_all_ranks:
            _print_error(str(error))
        sys.exit(1)
    except torch.OutOfMemoryError as error:  # ranks need not run out together, so each prints its own
        _print_error(
            f"rank {rank()}: {str(error).split(' Including')[0]} A smaller --batch_size with more --accum_steps takes "
            "less, as do shorter rows (--max_length)"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if rank() == 0:
            _print_error("interrupted; checkpoints saved before are complete")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.destroy_process_group()
            # DeepSpeed keeps the group alive, and with it Gloo's threads. One that frees the tensors of the last
            # collective call needs Python's lock, and aborts the process if Python has ended meanwhile.
            time.sleep(0.2)


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
