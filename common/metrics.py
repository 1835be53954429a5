"""Reads the `metrics.jsonl` of a run."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError

WARM_UP = 3  # steps after each start that do not count for speed


def read_metrics(directory: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns the records of a run's `metrics.jsonl`; `warn` gets one line for each damaged one that is skipped.

    Raises:
        UserError: the file cannot be read.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        inside = " ".join(sorted(str(found.parent) for found in directory.glob("*/metrics.jsonl")))
        hint = f"; name the runs inside it instead: {inside}" if inside else ""
        raise UserError(f"{directory} holds no run: {path.name} cannot be read ({error.strerror}){hint}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "event" not in record:
                raise ValueError("not an event")
            records.append(record)
        except ValueError as error:
            warn(f"{path} line {number}: skipped ({error})")
    return records


class Run:
    """The last run of a directory that started from scratch, continued by those that resumed from it.

    If a step appears twice, the later record wins. What the file does not hold is None.

    Attributes:
        label: technique and stage, such as "zero 2"; the report adds the directory if another run has the same.
        start: the newest `run` event.
        steps, evals: `step` and `eval` events in order, with `elapsed`: seconds since the run started, without the
            time between a stop and the start of the resumed run.
        finished: whether the run reached its end.

    Raises:
        UserError: there is no run in the directory.
    """

    def __init__(self, directory: str | Path, warn: Callable[[str], None]):
        self.directory = Path(directory)
        self.start: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        for record in read_metrics(self.directory, warn):
            if record["event"] == "run":
                self._add_start(record)
            elif not self.start:
                warn(f"{self.directory}: skipped a {record['event']} event before any run event")
            elif record["event"] == "step":
                self._add_step(record)
            elif record["event"] == "eval":
                self.evals.append(record | {"elapsed": self._elapsed(record)})
            elif record["event"] == "summary":
                self.finished = True
        if not self.start:
            raise UserError(f"{directory} holds no run: metrics.jsonl has no run event")
        self.technique, self.gpus = self.start["technique"], self.start["world_size"]
        self.zero = self.start.get("ds_config", {}).get("zero_optimization", {})
        self.gpu = self.start.get("hardware", {}).get("gpu")
        self.label = self.name

    def _add_start(self, record: dict[str, Any]) -> None:
        self.start, self.finished, self._steps_since_start = record, False, 0
        if record.get("args", {}).get("resume_from_checkpoint") is None:
            self.steps, self.evals = [], []
        self._elapsed_before = self.steps[-1]["elapsed"] if self.steps else 0.0

    def _add_step(self, record: dict[str, Any]) -> None:
        for records in (self.steps, self.evals):
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
        last = self.steps[-1] if self.steps else {"step": 0, "elapsed": 0.0, "samples_seen": 0}
        if self._steps_since_start == 0:
            self._elapsed_before = last["elapsed"]
        self._steps_since_start += 1
        record |= {"elapsed": self._elapsed(record), "warm_up": self._steps_since_start <= WARM_UP}
        if last["step"] + 1 == record["step"]:
            record["samples"] = record["samples_seen"] - last["samples_seen"]
        self.steps.append(record)

    def _elapsed(self, record: dict[str, Any]) -> float:
        return self._elapsed_before + record["time"] - self.start["time"]

    @property
    def name(self) -> str:
        if self.technique == "pipeline":
            return f"pipeline × {self.start['args'].get('num_stages') or self.gpus}"
        return f"{self.technique} {self.zero['stage']}" if "stage" in self.zero else self.technique

    @property
    def gpus_in_words(self) -> str:
        return f"{self.gpus} {'GPU' if self.gpu else 'rank'}{'s' if self.gpus > 1 else ''}"

    @property
    def offload(self) -> str:
        places = {"optimizer": "offload_optimizer", "parameters": "offload_param"}
        devices = {what: self.zero.get(key, {}).get("device", "none") for what, key in places.items()}
        return " + ".join(what for what, device in devices.items() if device != "none") or "none"

    @property
    def memory_field(self) -> str:
        return "gpu_peak_gib" if self.gpu else "host_peak_gib"

    def evaluation(self, *phases: str) -> dict[str, Any]:
        """Returns the newest evaluation of those phases, or {}."""
        return next((record for record in reversed(self.evals) if record["phase"] in phases), {})

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The steps that count for speed: without the first few after each start, if there are others."""
        return [step for step in self.steps if not step["warm_up"]] or self.steps[1:] or self.steps

    def median(self, field: str) -> float | None:
        values = [step[field] for step in self.measured if field in step]
        return statistics.median(values) if values else None

    def peak(self, field: str) -> float | None:
        return max((step[field] for step in self.steps if field in step), default=None)

    @property
    def samples_per_second(self) -> float | None:
        counted = [step for step in self.measured if "samples" in step]
        seconds = sum(step["step_time_s"] for step in counted)
        return sum(step["samples"] for step in counted) / seconds if seconds else None
