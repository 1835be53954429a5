"""One run over two hosts trains what it trains on one: `deepspeed` on each, gloo over the network between them."""

import subprocess
import sys

import pytest

from helpers import hosts
from helpers.launch import ROOT, clean_environment, events, launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.missing() is not None, reason=f"two hosts cannot be made here: {hosts.missing()}"),
]
FLAGS = ("--max_train_steps", 3, "--end_idx", 60, "--max_eval_steps", 1, "--no-save_checkpoint")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    with hosts.TwoHosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


def launch_on(two_hosts, script, *flags, hostfile, env=None):
    """The README's command on each host; returns what each wrote to standard output and error, and the codes."""
    environment = clean_environment() | {"GLOO_SOCKET_IFNAME": hosts.INTERFACE} | (env or {})
    processes = [
        host.popen(
            [
                sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--no_ssh",
                f"--node_rank={node_rank}", f"--master_addr={hosts.ADDRESSES[0]}", ROOT / script, *flags,
            ],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node_rank, host in enumerate(two_hosts)
    ]  # fmt: skip
    # Past the time limit the test fails, and with the hosts all that runs on them ends.
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return outputs, [process.returncode for process in processes]


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{name} slots=1\n" for name in hosts.NAMES))
    return path


@pytest.mark.parametrize("technique", ["zero", "pipeline"])
def test_two_hosts_train_as_one(two_hosts, hostfile, tmp_path, technique):
    script = f"{technique}/train.py"
    before = [host.received() for host in two_hosts]
    outputs, codes = launch_on(two_hosts, script, *FLAGS, "--output_dir", tmp_path / "two", hostfile=hostfile)
    assert codes == [0, 0], "\n".join(outputs)
    # Each launcher started the one rank of its host, and what the ranks told each other went over the network.
    assert "Setting CUDA_VISIBLE_DEVICES=0" in outputs[0] and "node_rank=0" in outputs[0]
    assert "nnodes=2, num_local_procs=1, node_rank=1" in outputs[1]
    assert "step 3/3 | loss" in outputs[0] and "step 3/3" not in outputs[1]
    (run,) = events(tmp_path / "two", "run")
    assert (run["world_size"], run["hardware"]["host"]) == (2, hosts.NAMES[0])
    gradients = 4 * run["parameters"]
    for host, already in zip(two_hosts, before, strict=True):
        assert host.received() - already > gradients, (technique, host.name, run["parameters"])
        assert host.processes() == []

    finished = launch(script, *FLAGS, "--output_dir", tmp_path / "one", ranks=2)
    assert finished.returncode == 0, finished.stderr
    for kind, count in (("step", 3), ("eval", 2)):
        one, two = ([event["loss"] for event in events(tmp_path / name, kind)] for name in ("one", "two"))
        assert len(one) >= count and two == pytest.approx(one, rel=1e-6)
