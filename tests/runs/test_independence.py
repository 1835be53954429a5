"""Techniques share `common` and nothing else: a repository without some of them works."""

import shutil
import subprocess
import sys

import pytest

from helpers.launch import ROOT, clean_environment

TECHNIQUES = ("baseline", "zero", "offload", "pipeline")
# Imports every module, parses each script's flags, and converts layer shards, in a repository without some directories.
USE_EVERYTHING = """
import importlib, runpy, sys
from pathlib import Path
import torch
from common import convert, run_all, sample

for path in sorted(Path().glob("*/*.py")):
    if path.name != "__init__.py":
        importlib.import_module(".".join(path.with_suffix("").parts))
assert {script.split("/")[0] for script, *_ in run_all.plan(2).values()} == set(sys.argv[1:])
run_all.check_flags(["--num_epochs", "2"])
model = str(sample.sample_model_directory("llama"))
assert convert.main(["to-pipeline", model, "--output_dir", "shards"]) == 0
assert convert.main(["to-hf", "shards", "--base_model", model, "--output_dir", "hf", "--verify"]) == 0
"""


@pytest.mark.parametrize("kept", [("baseline", "pipeline"), ("zero", "offload")])
def test_everything_else_works_without_two_techniques(tmp_path, kept):
    for directory in (*kept, "common"):
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=shutil.ignore_patterns("__pycache__"))
    finished = subprocess.run(
        [sys.executable, "-c", USE_EVERYTHING, *kept],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "verify: weights identical" in finished.stdout
