"""Two hosts on one machine: Linux namespaces with a network of their own between them."""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "veth0"  # of both hosts

# The first process of a host. It sets up what needs no other host, and stays until its standard input ends: when that
# happens, also because the tests were killed, the kernel kills all that runs on the host and takes down its network.
INIT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
while read -r; do :; done
"""


def missing():
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"no `{program}` (Debian's package {package})"
    tried = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--net", "true"],
        capture_output=True, text=True,
    )  # fmt: skip
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """Network, process, UTS and mount namespaces of their own; the file system is the machine's.

    Args:
        hosts_file: becomes the host's /etc/hosts.
    """

    def __init__(self, name, hosts_file):
        self.name = name
        self.unshare = subprocess.Popen(
            ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--uts", "--net",
             "bash", "-c", INIT, "init", name, hosts_file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.unshare.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name}: {self.unshare.communicate()[1]}")
        with open(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children") as children:
            self.pid = int(children.read())

    def command(self, argv, cwd="/"):
        """The command line, for this machine, of a command on the host."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", "--chdir", str(cwd), *map(str, argv)]

    def popen(self, argv, cwd="/", **options):
        return subprocess.Popen(self.command(argv, cwd), text=True, **options)

    def run(self, argv, cwd="/", check=True, **options):
        finished = subprocess.run(self.command(argv, cwd), capture_output=True, text=True, **options)
        assert finished.returncode == 0 or not check, (argv, finished.stdout, finished.stderr)
        return finished

    def received(self):
        """Bytes that came in from the other host."""
        lines = self.run(["cat", "/proc/net/dev"]).stdout.splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == f"{INTERFACE}:")

    def processes(self):
        """Command lines of what runs on the host, its first process left out."""
        lines = []
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if int(entry.name) != self.pid and os.readlink(entry / "ns" / "pid") == here:
                    lines.append((entry / "cmdline").read_text().replace("\0", " ").strip())
            except OSError:
                continue  # it has just ended, or is none of ours
        return lines

    def close(self):
        self.unshare.stdin.close()
        try:
            self.unshare.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.unshare.kill()
            self.unshare.wait()
        self.unshare.stdout.close()
        self.unshare.stderr.close()


class TwoHosts:
    """A context manager: `hosts[0]` and `hosts[1]`, node1 at 10.77.0.1 and node2 at 10.77.0.2.

    Args:
        directory: an empty one for their /etc/hosts.
    """

    def __init__(self, directory):
        self.directory, self.hosts = directory, []

    def __enter__(self):
        hosts_file = self.directory / "hosts"
        lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        try:
            for name in NAMES:
                self.hosts.append(Host(name, hosts_file))
            first, second = self.hosts
            # Only the first one's network is entered, where the second's process has this machine's number.
            link = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(second.pid)]
            subprocess.run(["nsenter", "--target", str(first.pid), "--net", *link], check=True)
            for host, address in zip(self.hosts, ADDRESSES, strict=True):
                host.run(["ip", "address", "add", f"{address}/24", "dev", INTERFACE])
                host.run(["ip", "link", "set", INTERFACE, "up"])
        except BaseException:
            self.__exit__()
            raise
        return self.hosts

    def __exit__(self, *_):
        for host in self.hosts:
            host.close()
