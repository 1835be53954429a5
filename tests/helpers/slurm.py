"""A Slurm of two nodes with two GPUs each, on two hosts that are namespaces of this machine."""

import os
import re
import shutil
import subprocess
import time

from helpers import hosts

GPUS = 2  # a node; files linked to /dev/null
# Requests count, resources are what this file says: the nodes have more cores and memory than the machine.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={node1}({address1})
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MpiDefault=none
KillWait=5
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
NodeName={node1} NodeAddr={address1} CPUs=64 RealMemory=262144 Gres=gpu:{gpus} State=UNKNOWN
NodeName={node2} NodeAddr={address2} CPUs=64 RealMemory=262144 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PACKAGES = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "srun": "slurm-wlm",
    "scontrol": "slurm-wlm", "munged": "munge",
}  # fmt: skip


# The daemons are often not on a user's PATH.
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
DAEMONS = ("munged ", "slurmctld ", "slurmd ", ": slurmscriptd")  # the last is slurmctld's own


def missing():
    """Why this Slurm cannot be started here, or None."""
    absent = sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=PATH) is None})
    return f"not installed: {', '.join(absent)} (Debian's packages)" if absent else hosts.missing()


class Slurm:
    """Daemons on two hosts; jobs are submitted on the first one.

    Args:
        two_hosts: what `TwoHosts` gives; its end is the daemons' end too.
        directory: an empty one for configuration, state and logs.
    """

    def __init__(self, two_hosts, directory):
        self.hosts, self.directory = two_hosts, directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": PATH}
        self.daemons = []

    def start(self):
        directory = self.directory
        names = {"node1": hosts.NAMES[0], "node2": hosts.NAMES[1]}
        addresses = {"address1": hosts.ADDRESSES[0], "address2": hosts.ADDRESSES[1]}
        text = CONFIGURATION.format(directory=directory, gpus=GPUS, **names, **addresses)
        (directory / "slurm.conf").write_text(text)
        for gpu in range(GPUS):
            (directory / f"gpu{gpu}").symlink_to("/dev/null")
        (directory / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={directory}/gpu[0-{GPUS - 1}]\n")
        (directory / "state").mkdir()
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{name}={directory}/munge.{kind}" for name, kind in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
        )]  # fmt: skip
        first = self.hosts[0]
        # One munged for both hosts: they share the file system, and so its socket.
        self.daemon(first, "munged", "--foreground", "--force", *munge)
        self.wait_for((directory / "munge.socket").exists)
        self.daemon(first, "slurmctld", "-D", "-i")
        for host in self.hosts:
            self.daemon(host, "slurmd", "-D", "-N", host.name)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2\n")

    def daemon(self, host, *argv):
        log = open(self.directory / f"{argv[0]}-{host.name}.out", "w")  # noqa: SIM115
        self.daemons.append(
            host.popen(argv, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )
        log.close()

    def wait_for(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in self.daemons):
                logs = sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
                raise RuntimeError("\n".join(f"{log}:\n{log.read_text()}" for log in logs))
            time.sleep(0.2)

    def run(self, *argv, cwd="/", env=None, check=True):
        """A command on the first host; returns what it wrote to standard output."""
        environment = self.environment | (env or {})
        return self.hosts[0].run(argv, cwd=cwd, env=environment, check=check, timeout=300).stdout

    def job(self, number):
        """What `scontrol show job` says of it, by its names."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, number, seconds=300):
        """The job, once it has ended and nothing of it is left on the hosts."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        until = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ended or self.leftovers():
            if time.monotonic() > until:
                self.run("scancel", number)
                raise AssertionError(f"job {number} after {seconds} s: {job}, {self.leftovers()}")
            time.sleep(0.5)
        return job

    def leftovers(self):
        """Command lines of what runs on the hosts besides the daemons."""
        return [line for host in self.hosts for line in host.processes() if line and not line.startswith(DAEMONS)]
