"""A run's `metrics.jsonl` with known numbers, and the table of a report."""

import json

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
    """The records of a run whose first three steps are a hundred times slower than the next, the last half as fast."""
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


def table_of(output_dir):
    """The rows of the report's table, {heading: cell} each."""
    lines = [line for line in (output_dir / "report.md").read_text().splitlines() if line.startswith("|")]
    heading, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert len({len(line) for line in lines}) == 1  # the columns line up
    return [dict(zip(heading, row, strict=True)) for row in rows]
