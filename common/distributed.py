"""Ranks: their numbers and devices, and how all of them fail or stop together."""

import atexit
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers

from common.errors import UserError, one_line

# How long rank 0 may take to end, on a machine that is busy too.
LAST_WORD_S = 10

# How long Gloo's threads may take to free a tensor, on a machine that is busy too.
GLOO_RELEASE_S = 0.2

# Errors of torch.cuda.init() that mean there is no NVIDIA GPU, or no CUDA in PyTorch: train on the CPU.
NO_GPU = (
    "Found no NVIDIA driver", "No CUDA GPUs are available", "you might not have a CUDA gpu", "not compiled with CUDA",
)  # fmt: skip
# The deepspeed launcher overwrites the variable.
ON_THE_CPU = "to train on the CPU, start the script with `CUDA_VISIBLE_DEVICES= python`"
_barriers = itertools.count()


def set_rank_variables() -> None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, whatever started this process.

    `deepspeed` and `torchrun` set them. Under `srun` they follow from Slurm's own. Plain `python` is one rank;
    without the variables DeepSpeed would look for MPI.
    """
    if "LOCAL_SIZE" in os.environ:
        # DeepSpeed's launcher's word for it. Left there it makes every rank on a CPU keep 66 MiB of /dev/shm, which
        # is memory, after the run too: for inference_all_reduce, which nothing here calls.
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.pop("LOCAL_SIZE")
    if "RANK" in os.environ:
        return
    # A batch script has SLURM_PROCID too; only inside `srun` is there a step.
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
        # Every task must come to the same port, and two jobs on one node to different ones.
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def rank() -> int:
    return int(os.environ["RANK"])


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def local_world_size() -> int:
    """Ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def set_device() -> torch.device:
    """This rank's GPU, made current, or the CPU.

    On a CPU the cores are split evenly among the ranks: PyTorch would start one thread per core in every rank.

    Raises:
        UserError: this host has fewer GPUs than ranks, or PyTorch cannot use them (see `check_gpu`).
    """
    check_gpu()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"local rank {device.index} has no GPU: this host has {torch.cuda.device_count()}, "
                "start one process a GPU"
            )
        torch.cuda.set_device(device)
        return device
    set_cpu_threads()
    return torch.device("cpu")


def check_gpu() -> None:
    """Checks that the installed PyTorch can use this machine's NVIDIA GPU, if there is one.

    Raises:
        UserError: the driver is too old or the GPU does not start (PyTorch would silently use the CPU), or PyTorch was
            built without code for the GPU (its first kernel would fail).
    """
    if torch.cuda.is_available():
        index = local_rank() if local_rank() < torch.cuda.device_count() else 0
        capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
        if not has_code_for(capability, architectures):
            raise UserError(
                f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, but "
                f"PyTorch {torch.__version__} is built for {' '.join(architectures)}: install a build that covers it; "
                f"{ON_THE_CPU}"
            )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            if not any(reason in str(error) for reason in NO_GPU):
                raise UserError(
                    f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use this machine's GPU: "
                    f"{one_line(error, 300)}; {ON_THE_CPU}"
                ) from error


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code compiled for `architectures` (`torch.cuda.get_arch_list()`) runs on a GPU of that capability.

    Binary code (sm_86) runs on the same major version from its minor version up, so on 8.6 and 8.9; PTX (compute_86) on
    everything newer as well. The suffix `a` (sm_90a) restricts code to that version, `f` to its major version. (CUDA
    C++ Programming Guide, "Application Compatibility".)
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name) for name in architectures]
    found = [match.groups() for match in found if match]
    for kind, number, suffix in found:
        built_for = divmod(int(number), 10)
        same_major = built_for[0] == capability[0]
        if capability == built_for or (
            capability > built_for and suffix != "a" and (same_major or (kind == "compute" and not suffix))
        ):
            return True
    return not found  # not a CUDA build


def set_cpu_threads(threads: int | None = None) -> int:
    """Gives this rank its share of the host's cores for work on the CPU; returns how many threads that is.

    `torchrun` sets OMP_NUM_THREADS to 1, with which an optimizer on the CPU takes a core and leaves the others idle.

    Args:
        threads: --cpu_threads; None shares the cores out evenly.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // local_world_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for operators that bring a threading library of their own
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
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made in the block have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Runs a block on every rank; if it raises UserError on any of them, all raise it.

    Any other exception is raised again on its rank, and the other ranks raise UserError.

    Without this a rank that stops alone leaves the others waiting in their next collective call. The block itself
    must not communicate, and may take as long as it needs: see `wait_for_all_ranks`.
    """
    error = bug = None
    try:
        yield
    except UserError as raised:
        error = str(raised)
    except Exception as raised:
        bug, error = raised, f"{type(raised).__name__}: {one_line(raised, 200)}"
    errors = [error] * world_size()
    if world_size() > 1:
        wait_for_all_ranks()
        dist.all_gather_object(errors, error)
    if bug:
        raise bug
    failed = {number: message for number, message in enumerate(errors) if message is not None}
    if failed:
        everywhere = len(set(failed.values())) == 1 and len(failed) == len(errors)
        first, message = next(iter(failed.items()))
        raise UserError(message if everywhere else f"rank {first}: {message}", on_all_ranks=True)


def wait_for_all_ranks() -> None:
    """Returns once every rank has called it.

    A collective call fails after DEEPSPEED_TIMEOUT (10 minutes), which is right for a training step, but one rank may
    download, tokenize or convert for hours while the others wait. So they wait on the store instead of in a collective
    call. If a rank is killed meanwhile, it is up to the launcher, `srun` or `deepspeed`, to end the others.
    """
    store, key = dist.distributed_c10d._get_default_store(), f"barrier {next(_barriers)}"
    pause = 0.001
    store.add(key, 1)
    while store.add(key, 0) < dist.get_world_size():
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


class PreemptionHandler:
    """Turns SIGTERM, SIGUSR1 or Ctrl-C into a request to save and stop after the current step.

    Schedulers send the first two before they end a job. A signal may reach only some ranks, so the handler only records
    it, and the ranks agree on it after each step (`common.tracking.reduce_metrics`). A second Ctrl-C ends the process
    at once. The SIGTERM that DeepSpeed's launcher sends when it gets a Ctrl-C itself does not count as the second.

    Attributes:
        number: of the signal this rank received, 0 if none.
    """

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._request)
        # Python restores its own handlers before it exits, and a signal that arrives after that would kill it.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _request(self, number, frame):
        requested_before = self.number != 0
        self.number = self.number or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for a collective to return
            if requested_before:
                os.kill(os.getpid(), signal.SIGINT)
        if not requested_before and rank() == 0:
            # The signal may have interrupted a `print`, which cannot be entered twice.
            name = signal.Signals(number).name
            os.write(2, f"{name}: the run saves and ends after this step; Ctrl-C ends it now\n".encode())


def gather_numbers(numbers: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's list, in rank order, as float64; a collective call. The lists have the same length on all ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    if world_size() == 1:
        return [mine.tolist()]
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def sum_over_ranks(number: float | torch.Tensor, device: torch.device) -> float:
    """The number's sum over all ranks, in float64; a collective call. Waits for the GPU if it is a tensor."""
    return sum(numbers[0] for numbers in gather_numbers([float(number)], device))


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Runs a block on local rank 0 of each host before the host's other ranks, which then find its caches filled.

    Collective, and raises like `raise_on_all_ranks`. The block itself must not communicate.
    """
    if local_rank() != 0:
        with raise_on_all_ranks():
            pass  # the others' turn; raises if it failed
        with raise_on_all_ranks():
            yield
    else:
        with raise_on_all_ranks():
            yield
        with raise_on_all_ranks():
            pass


def run(main: Callable[[], None]) -> None:
    """Calls `main` and turns a UserError into one line on standard error and exit code 1 on every rank.

    Most errors are the same on every rank. The launcher ends all ranks as soon as the first has gone, so the others
    wait a while for rank 0 to speak; a rank that is still there then failed alone and speaks for itself.
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
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        # Ranks need not run out together, so each speaks for itself.
        print(
            f"error: rank {rank()}: {str(error).split(' Including')[0]} A smaller --batch_size with more --accum_steps "
            "takes less, as do shorter rows (--max_length)",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if rank() == 0:
            print("error: interrupted; checkpoints saved before are whole", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.destroy_process_group()
            # Gloo's threads outlive the group, which DeepSpeed holds, and take Python's lock to free the tensors of
            # their last collective call. One that comes to it while Python ends aborts the process.
            time.sleep(GLOO_RELEASE_S)
