"""One command that trains with every technique and reports on the runs."""

import json
import signal
from pathlib import Path

import pytest

from common import report, run_all
from helpers.launch import ROOT
from helpers.run_records import save, table_of, whole_run, zero_config


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_run_all_plan_has_the_same_rows_per_step(gpus, ranks):
    plan = run_all.plan(gpus)
    assert [*plan] == ["baseline", "zero1", "zero2", "zero3", "offload1", "offload2", "offload3", "pipeline"]
    for name, (script, run_ranks, flags) in plan.items():
        given = dict(zip(run_all.FLAGS[::2], run_all.FLAGS[1::2], strict=False)) | dict(
            zip(flags[::2], flags[1::2], strict=True)
        )
        assert run_ranks == (1 if name == "baseline" else ranks)
        replicas = run_ranks // int(given.get("--num_stages", 1))
        assert int(given["--batch_size"]) * int(given["--accum_steps"]) * replicas == 8
        assert (ROOT / script).is_file()
        if "--deepspeed_config" in given:
            config = json.loads(Path(given["--deepspeed_config"]).read_text())["zero_optimization"]
            assert config["stage"] == int(name[-1])
            assert ("offload_optimizer" in config) == name.startswith("offload")


@pytest.fixture
def launched(monkeypatch):
    """Replaces the scripts of `run_all`; returns the flags of each, and a set for the names of those that fail."""
    flags_of, failing = {}, set()
    configs = {"zero": zero_config(1), "offload": zero_config(1, optimizer="cpu"), "pipeline": zero_config(1)}

    def launch(script, ranks, flags, log):
        directory = Path(flags[flags.index("--output_dir") + 1])
        flags_of[directory.name] = flags
        log.write_text("".join(f"line {number} of {directory.name}\n" for number in range(100)))
        if directory.name in failing:
            return 7
        technique = script.split("/")[0]
        records = whole_run(ranks=ranks, technique=technique, ds_config=configs.get(technique), gpu=None)
        with open(directory / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        return 0

    monkeypatch.setattr(run_all, "launch", launch)
    return flags_of, failing


def test_run_all_reports_on_every_run(launched, tmp_path, capsys):
    flags_of, _ = launched
    argv = ["--run-all", "--output_dir", str(tmp_path / "out"), "--", "--seed", "7", "--max_length", "64"]
    assert report.main(argv) == 0
    out, _ = capsys.readouterr()
    assert len(table_of(tmp_path / "out")) == 8
    lines = out.splitlines()
    assert [line.split(" |")[0].strip() for line in lines[:8]] == [
        f"{number}/8 {name}" for number, name in enumerate(run_all.plan(0), start=1)
    ]
    assert lines[0].endswith("| train loss 4.2000, on held-out text 7.2500 to 3.1250")
    for flags in flags_of.values():
        assert flags[flags.index("--seed") + 1] == "7"
        assert [flags[i + 1] for i, flag in enumerate(flags) if flag == "--max_length"][
            -1
        ] == "64"  # the last one counts
        assert flags[-2] == "--output_dir"
    assert "the same model, tokens and loss at each of 8 steps." in out


@pytest.mark.parametrize(("native_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_run_all_precision_is_one_that_the_gpu_supports(launched, tmp_path, monkeypatch, native_bf16, precision):
    """On a T4 PyTorch emulates bf16, which counts as supported unless told otherwise."""
    monkeypatch.setattr(run_all.torch.cuda, "device_count", lambda: 2)
    supported = lambda including_emulation=True: including_emulation or native_bf16  # noqa: E731
    monkeypatch.setattr(run_all.torch.cuda, "is_bf16_supported", supported)
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 0
    assert {flags[flags.index("--precision") + 1] for flags in launched[0].values()} == {precision}


def test_run_all_with_failed_runs_continues_and_fails_at_the_end(launched, tmp_path, capsys):
    _, failing = launched
    failing.update(["zero2", "pipeline"])
    # What an earlier run left there is not reported as this one's.
    old = save(tmp_path / "out" / "pipeline", whole_run(technique="pipeline"))
    before = (old / "metrics.jsonl").read_bytes()
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out.count("| failed with exit code 7") == 2
    assert "line 99 of zero2" in err and "line 80 of zero2" not in err
    assert err.splitlines()[-1] == "error: 2 of the runs failed: zero2, pipeline"
    techniques = [row["technique"] for row in table_of(tmp_path / "out")]
    assert len(techniques) == 6 and not any(name.startswith("pipeline") for name in techniques)
    assert (old / "metrics.jsonl").read_bytes() == before


def test_run_all_flag_that_one_script_lacks_is_refused_before_the_first_run(launched, tmp_path, capsys):
    flags_of, _ = launched
    for flags in (["--generation_prompt", ""], ["--liger"], ["--lerning_rate", "1"]):  # pipeline, baseline, all lack it
        with pytest.raises(SystemExit):
            report.main(["--run-all", "--output_dir", str(tmp_path / "out"), "--", *flags])
        assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err
    assert not flags_of


def test_directory_names_may_start_with_a_tilde(launched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert report.main(["--run-all", "--output_dir=~/out"]) == 0
    assert report.main(["~/out/baseline", "--output_dir", "~/report"]) == 0
    assert (tmp_path / "report" / "report.md").exists()
    for argv in ([""], [str(tmp_path / "out" / "baseline"), "--output_dir", ""]):
        with pytest.raises(SystemExit):
            report.main(argv)
        assert "expected a directory, got an empty name" in capsys.readouterr().err


def test_run_all_without_a_single_run_is_an_error(launched, tmp_path, capsys):
    _, failing = launched
    failing.update(run_all.plan(0))
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no run started training")
    assert not (tmp_path / "out" / "report.md").exists()


def alive(pid):
    """Whether that process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_launch_interrupted_leaves_no_rank_behind(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "os.kill(os.getppid(), 2)\n"  # Ctrl-C
        "child.wait()\n"
    )
    # Where tests run in the background of a shell, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all.launch(script, 1, [], tmp_path / "log")
    finally:
        signal.signal(signal.SIGINT, before)
    pids = (tmp_path / "log").read_text().split()
    assert len(pids) == 2
    assert not any(map(alive, pids))
