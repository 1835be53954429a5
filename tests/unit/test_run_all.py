"""One command runs all techniques and reports on them."""

import json
import signal
from pathlib import Path

import pytest

from common import report, run_all

STEPS = 8


def zero_config(stage, **offload):
    devices = {f"offload_{what}": {"device": device} for what, device in offload.items()}
    return {"zero_optimization": {"stage": stage, **devices}}


def start(technique="zero", world_size=2, *, gpu="NVIDIA H200", ds_config=None, resumed=None, **fields):
    args = {"resume_from_checkpoint": resumed, "num_stages": None} | fields.pop("args", {})
    return {
        "event": "run", "time": 1000.0, "technique": technique, "world_size": world_size, "model": "llama",
        "dataset": "abstracts", "parameters": 1_235_814_400, "args": args, "hardware": {"gpu": gpu},
        **({"ds_config": ds_config} if ds_config else {}), **fields,
    }  # fmt: skip


def step(number, rate=1000.0, *, ranks=2, loss=None, time=None, **fields):
    return {
        "event": "step", "time": 1000.0 + number if time is None else time, "step": number,
        "loss": 5 - number / 10 if loss is None else loss, "tokens": 500, "step_time_s": 0.5,
        "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks, "samples_seen": 7 * number,
        "host_peak_gib": 20.0 + number / 100, **fields,
    }  # fmt: skip


def evaluation(number, phase, loss, perplexity=12.5):
    return {
        "event": "eval", "time": 1000.5 + number, "step": number, "phase": phase, "loss": loss,
        "perplexity": perplexity,
    }  # fmt: skip


SUMMARY = {"event": "summary", "time": 1100.0}


def whole_run(rate=1000.0, *, steps=STEPS, ranks=2, mfu=None, gpu_peak_gib=None, **start_fields):
    """A run whose first three steps are a hundred times slower than the others, the last half as fast."""
    speeds = [rate / 100] * 3 + [rate] * (steps - 4) + [rate / 2]
    extra = {"mfu": mfu, "gpu_peak_gib": gpu_peak_gib}
    extra = {key: value for key, value in extra.items() if value is not None}
    return [
        start(world_size=ranks, **start_fields),
        evaluation(0, "before", 7.25),
        *(step(number, speed, ranks=ranks, **extra) for number, speed in enumerate(speeds, start=1)),
        evaluation(steps, "after", 3.125),
        evaluation(steps, "test", 9.9, 99.9),
        SUMMARY,
    ]


def save(directory, records):
    """Writes records, or lines of bytes, as that run's metrics.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return directory


def tabulate(output_dir):
    """The rows of the report's table, {heading: cell} each."""
    lines = [line for line in (output_dir / "report.md").read_text().splitlines() if line.startswith("|")]
    heading, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert len({len(line) for line in lines}) == 1  # the columns line up
    return [dict(zip(heading, row, strict=True)) for row in rows]


@pytest.fixture
def launched(monkeypatch):
    """`run_all` with scripts that write a file at once; returns their flags, and a set of those that shall fail."""
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


def test_run_all_reports_on_all(launched, tmp_path, capsys):
    flags_of, _ = launched
    argv = ["--run-all", "--output_dir", str(tmp_path / "out"), "--", "--seed", "7", "--max_length", "64"]
    assert report.main(argv) == 0
    out, _ = capsys.readouterr()
    assert len(tabulate(tmp_path / "out")) == 8
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
def test_run_all_picks_a_precision_that_the_gpu_has(launched, tmp_path, monkeypatch, native_bf16, precision):
    """On a T4 PyTorch emulates bf16 and calls that supported, unless told otherwise."""
    monkeypatch.setattr(run_all.torch.cuda, "device_count", lambda: 2)
    supported = lambda including_emulation=True: including_emulation or native_bf16  # noqa: E731
    monkeypatch.setattr(run_all.torch.cuda, "is_bf16_supported", supported)
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 0
    assert {flags[flags.index("--precision") + 1] for flags in launched[0].values()} == {precision}


def test_run_all_goes_on_behind_a_failure_and_fails_at_the_end(launched, tmp_path, capsys):
    _, failing = launched
    failing.update(["zero2", "pipeline"])
    # What a run before left there is not taken for this one's.
    old = save(tmp_path / "out" / "pipeline", whole_run(technique="pipeline"))
    before = (old / "metrics.jsonl").read_bytes()
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out.count("| failed with exit code 7") == 2
    assert "line 99 of zero2" in err and "line 80 of zero2" not in err
    assert err.splitlines()[-1] == "error: 2 of the runs failed: zero2, pipeline"
    techniques = [row["technique"] for row in tabulate(tmp_path / "out")]
    assert len(techniques) == 6 and not any(name.startswith("pipeline") for name in techniques)
    assert (old / "metrics.jsonl").read_bytes() == before


def test_a_flag_that_one_script_lacks_is_known_before_the_first_runs(launched, tmp_path, capsys):
    flags_of, _ = launched
    for flags in (["--generation_prompt", ""], ["--liger"], ["--lerning_rate", "1"]):  # pipeline, baseline, all lack it
        with pytest.raises(SystemExit):
            report.main(["--run-all", "--output_dir", str(tmp_path / "out"), "--", *flags])
        assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err
    assert not flags_of


def test_names_of_directories(launched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert report.main(["--run-all", "--output_dir=~/out"]) == 0
    assert report.main(["~/out/baseline", "--output_dir", "~/report"]) == 0
    assert (tmp_path / "report" / "report.md").exists()
    for argv in ([""], [str(tmp_path / "out" / "baseline"), "--output_dir", ""]):
        with pytest.raises(SystemExit):
            report.main(argv)
        assert "expected a directory, got an empty name" in capsys.readouterr().err
    (tmp_path / "taken" / "scaling.png").mkdir(parents=True)
    assert report.main(["~/out/baseline", "--output_dir", "~/taken"]) == 1
    assert "its scaling.png is a directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["scaling.png"]


def test_run_all_without_a_single_run(launched, tmp_path, capsys):
    _, failing = launched
    failing.update(run_all.plan(0))
    assert report.main(["--run-all", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no run has begun to train")
    assert not (tmp_path / "out" / "report.md").exists()


def alive(pid):
    """Whether that process runs still; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupted_it_leaves_no_rank_behind(tmp_path):
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
