"""The `run.slurm` scripts, submitted to a real Slurm of two nodes whose GPUs are files linked to /dev/null.

What a job wrote stays in its test's `tmp_path`. Where Slurm cannot be started the tests are skipped and say why.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import hosts, slurm
from helpers.launch import ROOT, clean_environment, events, launch

TECHNIQUES = ("baseline", "offload", "pipeline", "zero")
ENGINES = ("offload", "pipeline", "zero")
needs_slurm = pytest.mark.skipif(slurm.missing() is not None, reason=f"no Slurm can be started here: {slurm.missing()}")
FLAGS = ("--max_train_steps", 3, "--end_idx", 60, "--max_eval_steps", 1, "--no-save_checkpoint")
STEPS = 9
LONGER = ("--max_train_steps", STEPS, "--end_idx", 300, "--max_eval_steps", 1, "--generation_prompt", "")
OUTPUT = {"baseline": "baseline", "zero": "ds_zero2", "offload": "ds_zero3", "pipeline": "ds_pipeline"}
MEMORY_LOGGER = """#!/usr/bin/env bash
echo "$@"
while true; do echo "now, 0, 11 MiB"; sleep 0.5; done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    with hosts.TwoHosts(tmp_path_factory.mktemp("hosts")) as two_hosts:
        cluster = slurm.Slurm(two_hosts, directory)
        cluster.start()
        yield cluster


@pytest.fixture
def copy(tmp_path):
    """A copy of the scripts in which jobs can write, with a `logs` directory beside them."""
    for directory in (*TECHNIQUES, "common"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture(scope="module")
def direct_losses(tmp_path_factory):
    """A function: the losses of a technique's run on so many ranks of this machine, started without Slurm."""
    known = {}

    def losses(technique, ranks):
        if technique not in known:
            directory = tmp_path_factory.mktemp(technique)
            flags = (*FLAGS, *default_flags(technique), "--output_dir", directory)
            finished = launch(f"{technique}/train.py", *flags, ranks=ranks)
            assert finished.returncode == 0, finished.stderr
            known[technique] = losses_of(directory)
        return known[technique]

    return losses


def default_flags(technique):
    """Those that the script puts before the user's."""
    return ("--deepspeed_config", "offload/ds_zero3_offload.json") if technique == "offload" else ()


def losses_of(directory):
    return [event["loss"] for kind in ("step", "eval") for event in events(directory, kind)]


def python_environment():
    """PYTHON_ENV for this Python."""
    return sys.prefix if sys.prefix != sys.base_prefix else ""


def start(cluster, directory, command, **env):
    """Runs a `sbatch` command line in a directory; returns the job's number."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "nvidia-smi").write_text(MEMORY_LOGGER)
    (programs / "nvidia-smi").chmod(0o755)
    environment = clean_environment() | {"SLURM_CONF": cluster.environment["SLURM_CONF"]}
    environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"], "/usr/sbin"])
    environment |= {"PYTHON_ENV": python_environment(), "GLOO_SOCKET_IFNAME": hosts.INTERFACE} | env
    (directory / "logs").mkdir(exist_ok=True)
    return cluster.run(*command, cwd=directory, env=environment).split()[-1]


def output_of(job):
    """What its output files say: a job that comes back may do so on another node."""
    files = [Path(job["StdOut"].replace("%N", name)) for name in hosts.NAMES]
    return "".join(path.read_text() for path in files if path.exists())


def submit(cluster, directory, command, **env):
    """Runs a `sbatch` command line in a directory, waits for the job; returns it and what its output file says."""
    job = cluster.wait(start(cluster, directory, command, **env))
    output = output_of(job)
    # Both launchers and the memory logger end quietly: nothing of the job is left for Slurm to kill.
    assert not re.search("CANCELLED|srun: error|slurmstepd", output) or job["JobState"] == "FAILED", output
    return job, output


# Technique, where it is submitted, launcher, nodes. The test below has zero by deepspeed, and by srun on two nodes.
JOBS = {
    "zero by srun": ("zero", "own", "srun", 1),
    "offload by deepspeed": ("offload", "own", "deepspeed", 1),
    "offload by srun on two nodes": ("offload", "root", "srun", 2),
    "pipeline by srun": ("pipeline", "root", "srun", 1),
    "pipeline by deepspeed on two nodes": ("pipeline", "own", "deepspeed", 2),
    "baseline": ("baseline", "root", None, 1),
}


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("name", JOBS)
def test_job_trains_like_the_command_without_slurm(cluster, copy, direct_losses, name):
    technique, where, launcher, nodes = JOBS[name]
    ranks = 1 if technique == "baseline" else 2
    directory, script = (copy, f"{technique}/run.slurm") if where == "root" else (copy / technique, "run.slurm")
    resources = [f"--nodes={nodes}", "--gres=gpu:1", "--ntasks-per-node=1"] if nodes > 1 else []
    command = ["sbatch", *resources, script, *FLAGS, "--output_dir", "out"]
    job, output = submit(cluster, directory, command, **({"LAUNCHER": launcher} if launcher == "srun" else {}))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert job["Restarts"] == "0"
    number = job["JobId"]
    assert Path(job["StdOut"]) == directory / "logs" / f"{OUTPUT[technique]}_{number}_%N.out"
    assert (int(job["NumNodes"]), job["TresPerNode"]) == (nodes, f"gres:gpu:{ranks // nodes}")
    assert (int(job["NumTasks"]), job["TimeLimit"]) == (ranks, "12:00:00")
    assert job["MinMemoryNode"] == ("64G" if technique == "offload" else "32G")

    assert "MASTER_ADDR=node1\n" in output and "NCCL_DEBUG=WARN\n" in output and "NCCL_SOCKET_IFNAME" in output
    assert re.search(r"^step 3/3 \| loss", output, flags=re.MULTILINE)
    assert ("deepspeed.launcher.launch" in output) == (launcher == "deepspeed")
    (run,) = events(directory / "out", "run")
    assert (run["world_size"], run["hardware"]["host"]) == (ranks, "node1")
    if technique == "offload":
        assert "Parameter offloading: True" in output and "ZeRO Stage: 3" in output
    assert losses_of(directory / "out") == pytest.approx(direct_losses(technique, ranks), rel=1e-6)

    logs = [f"gpu_memory_{number}_node{node + 1}.csv" for node in range(nodes)]
    assert sorted(path.name for path in (directory / "logs").iterdir()) == [
        f"{OUTPUT[technique]}_{number}_node1.out", *logs,
    ]  # fmt: skip
    for log in logs:
        first, *rest = (directory / "logs" / log).read_text().splitlines()
        assert "memory.used" in first and set(rest) == {"now, 0, 11 MiB"} and len(rest) >= 3


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The output directory of a run of `LONGER` that nothing stops, without Slurm."""
    directory = tmp_path_factory.mktemp("unstopped")
    finished = launch("zero/train.py", *LONGER, "--output_dir", directory, ranks=2)
    assert finished.returncode == 0, finished.stderr
    return directory


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_job_stopped_by_slurm_is_requeued_and_resumes(cluster, copy, unstopped, launcher):
    resources = ["--nodes=2", "--gres=gpu:1", "--ntasks-per-node=1"] if launcher == "srun" else []
    command = ["sbatch", *resources, "zero/run.slurm", *LONGER, "--output_dir=out"]
    number = start(cluster, copy, command, LAUNCHER=launcher)
    metrics, latest = copy / "out" / "metrics.jsonl", copy / "out" / "latest"
    cluster.wait_for(lambda: metrics.exists() and events(copy / "out", "step"), seconds=120)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.wait_for(lambda: cluster.job(number)["JobState"] != "RUNNING", seconds=120)
    job = cluster.job(number)
    # The ranks have saved when the job is given up, and nothing had to be killed.
    last = events(copy / "out", "step")[-1]["step"]
    output = output_of(job)
    assert latest.read_text() == f"global_step{last}" and last < STEPS, output
    assert f"stopped by SIGUSR1 after step {last} of {STEPS}" in output, output
    assert "DUE TO JOB REQUEUE" in output and not re.search("srun: error|Killed|Terminated", output), output
    cluster.wait_for(lambda: cluster.job(number)["JobState"] == "PENDING")
    # Slurm would hold it back for two minutes; at once its nodes would refuse it, as the job that they have just ended.
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")
    job = cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output_of(job)
    assert [event["step"] for event in events(copy / "out", "step")] == [*range(1, STEPS + 1)]
    assert losses_of(copy / "out") == pytest.approx(losses_of(unstopped), rel=1e-6)


@pytest.mark.slow
@needs_slurm
def test_deepspeed_uses_the_gpus_of_the_job(cluster, copy, direct_losses):
    """Another job has node1's first GPU, so on two nodes this one gets GPU 1 of node1 and GPU 0 of node2."""
    blocker = ["sbatch", "--nodelist=node1", "--gres=gpu:1", "--mem=1G", "--wrap=sleep 600", "--output=/dev/null"]
    other = cluster.run(*blocker).split()[-1]
    try:
        cluster.wait_for(lambda: cluster.job(other)["JobState"] == "RUNNING")
        command = ["sbatch", "--parsable", "--nodes=2", "--gres=gpu:1", "--ntasks-per-node=1", "zero/run.slurm"]
        # `wait` would wait for the other job's processes too.
        environment = clean_environment() | {"PYTHON_ENV": python_environment(), "GLOO_SOCKET_IFNAME": hosts.INTERFACE}
        (copy / "logs").mkdir()
        number = cluster.run(*command, *FLAGS, "--output_dir", "out", cwd=copy, env=environment).strip()
        cluster.wait_for(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"), seconds=300)
    finally:
        cluster.run("scancel", other)
    output = (copy / "logs" / f"ds_zero2_{number}_node1.out").read_text()
    assert cluster.wait(number)["JobState"] == "COMPLETED", output
    assert sorted(re.findall(r"Setting CUDA_VISIBLE_DEVICES=(\S+)", output)) == ["0", "1"]
    assert "--include=node1:1@node2:0" in output
    assert losses_of(copy / "out") == pytest.approx(direct_losses("zero", 2), rel=1e-6)


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_failed_training_is_a_failed_job(cluster, copy, launcher):
    nodes = 1 if launcher == "deepspeed" else 2
    resources = [f"--nodes={nodes}", f"--gres=gpu:{2 // nodes}", f"--ntasks-per-node={2 // nodes}"]
    command = ["sbatch", *resources, "zero/run.slurm", "--model_name", "./none"]
    job, output = submit(cluster, copy, command, LAUNCHER=launcher)
    assert job["JobState"] == "FAILED", output
    # srun ends the other tasks by SIGTERM and takes the highest code of all.
    assert job["ExitCode"] in (["1:0"] if launcher == "deepspeed" else ["1:0", "143:0"]), output
    assert len(re.findall(r"^error: .*\./none", output, flags=re.MULTILINE)) == 1, output
    assert [path.name for path in (copy / "logs").glob("hostfile*")] == []


RANK_VARIABLES = """
import os
from common import distributed
distributed.set_rank_variables()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(*(os.environ.get(name) for name in names), os.uname().nodename)
"""


@pytest.mark.slow
@needs_slurm
def test_rank_variables_from_slurm(cluster, tmp_path):
    environment = clean_environment()
    step = ["srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", RANK_VARIABLES]
    ranks = sorted(line.split() for line in cluster.run(*step, cwd=ROOT, env=environment).splitlines())
    ports = {rank.pop(5) for rank in ranks}
    assert len(ports) == 1 and 20000 <= int(ports.pop()) < 40000
    assert ranks == [
        ["0", "0", "4", "2", "node1", "node1"], ["1", "1", "4", "2", "node1", "node1"],
        ["2", "0", "4", "2", "node1", "node2"], ["3", "1", "4", "2", "node1", "node2"],
    ]  # fmt: skip

    # What a batch script starts without srun is a run of one rank, however many tasks the job has.
    batch = ["sbatch", "--ntasks=2", f"--output={tmp_path}/out", f"--wrap={sys.executable} -c '{RANK_VARIABLES}'"]
    cluster.wait(cluster.run(*batch, cwd=ROOT, env=environment).split()[-1])
    rank = (tmp_path / "out").read_text().split()
    assert rank[:3] == ["0", "0", "1"] and rank[4] == "127.0.0.1"


def start_script(technique, cwd, flags=("--seed", "7"), **env):
    """The script as a batch job would begin it, without Slurm."""
    command = ["bash", ROOT / technique / "run.slurm", *flags]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | env
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_script(*args, **kwargs):
    process = start_script(*args, **kwargs)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_one_line(finished, *said):
    assert finished.returncode == 1, finished
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1, finished.stderr
    assert all(part in finished.stderr for part in said), finished.stderr


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_missing_scripts_and_directories_are_one_error_line(tmp_path, technique):
    assert_one_line(run_script(technique, ROOT, PYTHON_ENV="/nonexistent/venv"), "/nonexistent/venv", "no conda")
    assert_one_line(run_script(technique, ROOT, VIRTUAL_ENV="/nonexistent/active"), "/nonexistent/active")
    assert_one_line(run_script(technique, ROOT / technique), "deepspeed-finetune")
    assert_one_line(run_script(technique, tmp_path), f"{technique}/train.py", str(tmp_path))
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    without_packages = run_script(technique, ROOT, PYTHON_ENV=str(tmp_path))
    assert_one_line(without_packages, str(tmp_path), "pip install -r requirements.txt")


def write_repository(directory, technique, train=""):
    """What a job needs of the repository, with a `train.py` that consists of `train`."""
    for name in (technique, "common"):
        (directory / name).mkdir()
    (directory / technique / "train.py").write_text(train)
    shutil.copy(ROOT / "common" / "slurm.sh", directory / "common")


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_script_without_the_file_that_all_share(tmp_path, technique):
    write_repository(tmp_path, technique)
    (tmp_path / "common" / "slurm.sh").unlink()
    for directory, path in ((tmp_path, "common/slurm.sh"), (tmp_path / technique, "../common/slurm.sh")):
        finished = run_script(technique, directory)
        assert finished.returncode == 1 and finished.stdout == "", finished
        assert finished.stderr.endswith(f": {path}: No such file or directory\n"), finished
        assert finished.stderr.count("\n") == 1, finished


def write_programs(directory, **programs):
    for name, text in programs.items():
        (directory / name).write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
        (directory / name).chmod(0o755)


@pytest.fixture
def standins(tmp_path):
    """`tmp_path` with programs for a PATH, and environment variables, that make a job's script believe in Slurm.

    Of conda, which knows one environment, and of Slurm's programs, which clean nothing up.
    """
    programs = {
        "conda": """
            [[ "$*" == "shell.bash hook" ]] && echo 'conda() { [[ $* == "activate llm" ]] && PATH='$ENV:'$PATH; }'
        """,
        "scontrol": "if [[ $1 == requeue ]]; then echo requeue $2; else echo one; echo two; fi",
        "squeue": "echo ${STATE:-RUNNING}",
    }
    write_programs(tmp_path, **programs)
    environment = tmp_path / "environment"
    environment.mkdir()
    write_programs(environment, python=f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "CONDA_PREFIX": "llm", "ENV": str(environment), "SLURM_JOB_ID": "20003",
        "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "4",
    }  # fmt: skip


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_conda_environment_memory_logger_and_exit_code(tmp_path, standins, technique):
    srun = """
        case "$*" in
        *SLURMD_NODENAME*) echo 1 two 2,3; echo 0 one 0,1 ;;
        *nvidia-smi*) echo $$ > $ENV/logger; exec sleep 60 > /dev/null ;;
        *) until [[ -s $ENV/logger ]]; do sleep 0.01; done; echo "$@" | tail -1; exit 7 ;;
        esac
    """
    write_programs(tmp_path, **{"nvidia-smi": "", "srun": srun})
    environment = tmp_path / "environment"
    write_repository(tmp_path, technique)

    def run(**env):
        return run_script(technique, tmp_path, **(standins | env))

    finished = run(LAUNCHER="srun")
    assert finished.returncode == 7, finished
    with pytest.raises(ProcessLookupError):
        os.kill(int((environment / "logger").read_text()), 0)
    assert "job 20003 on one two | llm | torch 2." in finished.stdout
    assert "MASTER_ADDR=one\nMASTER_PORT=20003\nNCCL_DEBUG=WARN\n" in finished.stdout
    assert finished.stdout.splitlines()[-1].endswith(
        f"{technique}/train.py {' '.join((*default_flags(technique), '--seed 7'))}"
    )
    assert "NCCL_DEBUG=INFO\nNCCL_SOCKET_IFNAME=ib0\n" in run(NCCL_DEBUG="INFO", NCCL_SOCKET_IFNAME="ib0").stdout
    assert_one_line(run(PYTHON_ENV="other"), "other is neither a venv nor a conda environment")
    if technique != "baseline":
        said = run().stdout.splitlines()[-1]
        assert "--include=one:0,1@two:2,3 --master_addr=one --master_port=20003" in said
        assert_one_line(run(LAUNCHER="mpirun"), "mpirun")


# What training has left behind, and whether the job then goes back into the queue.
ENDS = {
    "stopped": ({}, True),
    "stopped, in a job that is cancelled": ({"STATE": "COMPLETING"}, False),
    "stopped without a checkpoint": ({"SAVES": ""}, False),
    "stopped, beside another run's checkpoint": ({"SAVES": "", "OLD": "1"}, False),
    "at its end": ({"LAST": "summary"}, False),
    "failed": ({"CODE": "1"}, False),
}
TRAINING = """
case "$*" in
*SLURMD_NODENAME*) echo 1 two 2,3; echo 0 one 0,1 ;;
*)
    echo "$@" | tail -1
    echo '{"event": "'${LAST:-step}'", "time": 1.0}' > out/metrics.jsonl
    [[ -z ${SAVES-1} ]] || { sleep 0.05; echo global_step1 > out/latest; }
    exit ${CODE:-0}
    ;;
esac
"""


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("technique", ENGINES)
def test_a_stopped_run_and_no_other_comes_back(tmp_path, standins, technique, end):
    environment, comes_back = ENDS[end]
    write_programs(tmp_path, srun=TRAINING)
    write_repository(tmp_path, technique)
    (tmp_path / "out").mkdir()
    if "OLD" in environment:
        (tmp_path / "out" / "latest").write_text("global_step7")

    def run(*flags, **more):
        return run_script(technique, tmp_path, flags, **(standins | environment | more))

    first = run("--output_dir", "elsewhere", "--output_dir=out")
    assert first.returncode == int(environment.get("CODE", 0)), first
    assert ("requeue 20003" in first.stdout) == comes_back, first
    assert "resume_from_checkpoint" not in first.stdout
    # Slurm itself requeues a job whose node was lost: that one goes on too, if it has saved.
    begins_at = ("--resume_file=x.pt", "--resume_file", "y.pt") if technique == "offload" else ()
    again = run("--output_dir", "out", *begins_at, "--seed", "7", SLURM_RESTART_COUNT="1").stdout
    goes_on = end not in ("stopped without a checkpoint", "stopped, beside another run's checkpoint", "at its end")
    flags = (*begins_at, "--seed 7", *(("--resume_from_checkpoint latest",) if goes_on else ()))
    assert f"{technique}/train.py {' '.join((*default_flags(technique), '--output_dir out', *flags))}\n" in again


# srun where Slurm tracks processes by cgroup: a signal reaches the one that it started on the node, and no other.
SRUN_OF_CGROUPS = f"""#!{sys.executable}
import signal, subprocess, sys
if "SLURMD_NODENAME" in " ".join(sys.argv):
    sys.exit(print("0 one 0,1"))
task = subprocess.Popen(
    sys.argv[sys.argv.index("bash"):], start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
)
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
sys.exit(task.wait())
"""
LAUNCHER = """#!/bin/sh
until [ "$1" = zero/train.py ]; do shift; done
python "$@"
exit $?
"""
RANK = """
import atexit, pathlib, signal, time
pathlib.Path("out/begun").touch()
time.sleep(2)  # it makes its model; a signal is lost
signals = []
signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
until = time.monotonic() + 10
while not signals:
    assert time.monotonic() < until
    time.sleep(0.05)
time.sleep(1)  # it saves
pathlib.Path("out/metrics.jsonl").write_text('{"event": "step"}')
pathlib.Path("out/latest").write_text("global_step1")
"""


@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_signal_reaches_ranks_that_cgroups_hide(tmp_path, standins, launcher, name):
    write_programs(tmp_path, srun=SRUN_OF_CGROUPS, deepspeed=LAUNCHER)
    write_repository(tmp_path, "zero", RANK)
    (tmp_path / "out").mkdir()
    process = start_script("zero", tmp_path, ("--output_dir", "out"), LAUNCHER=launcher, **standins)
    while not (tmp_path / "out" / "begun").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out
    assert (tmp_path / "out" / "latest").exists() and out.endswith("requeue 20003\n")


ENDING = """
import os, signal
from common import distributed
class Late:
    # Python has taken its signal handlers back by then, and modules are gone.
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGUSR1, signal.SIGTERM), say=print):
        for number in numbers:
            kill(pid, number)
        say("alive", flush=True)
late = Late()
distributed.PreemptionHandler()
"""


def test_a_signal_that_comes_while_python_ends_is_too_late():
    ended = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended
