"""The commands of the READMEs run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.launch import ROOT, events

TECHNIQUES = ("baseline", "zero", "offload", "pipeline")


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the working tree in which commands can write."""
    directory = tmp_path_factory.mktemp("clone") / "repository"
    ignore = shutil.ignore_patterns(".*", "runs", "wandb", "__pycache__")
    return Path(shutil.copytree(ROOT, directory, ignore=ignore))


def shell(command, cwd):
    """Runs a line of a README with this Python's programs first, `pip install` left out: the caller did that."""
    bin_directory = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": bin_directory + os.pathsep + os.environ["PATH"]}
    finished = subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_first_command_and_conversion(copy):
    install, train = blocks(ROOT / "README.md", "bash")[0].strip().split(" && ")
    assert install == "pip install -r requirements.txt"
    assert train == "deepspeed --num_gpus=2 pipeline/train.py"
    said = shell(train, copy)
    losses = [step["loss"] for step in events(copy / "runs" / "pipeline", "step")]
    assert losses[-1] < 0.6 * losses[0]
    assert [event["phase"] for event in events(copy / "runs" / "pipeline", "eval")] == [
        "before", "epoch", "epoch", "after",
    ]  # fmt: skip
    assert "python -m common.convert to-hf runs/pipeline/global_step" in said

    convert = next(block for block in blocks(ROOT / "README.md", "bash") if "to-hf" in block)
    assert "weights identical" in shell(convert, copy)
    load = next(block for block in blocks(ROOT / "README.md", "python") if "from_pretrained" in block)
    assert shell(f"{sys.executable} - <<'PYTHON'\n{load}print(type(model).__name__)\nPYTHON", copy) == (
        "LlamaForCausalLM\n"
    )

    evaluate = next(block for block in blocks(ROOT / "README.md", "bash") if "common.evaluate" in block)
    assert re.search(r"^difference: loss -\d", shell(evaluate, copy), re.M)

    logged = {key for event in ("step", "eval", "summary") for key in events(copy / "runs" / "pipeline", event)[0]}
    for technique in TECHNIQUES:
        text = (ROOT / technique / "README.md").read_text()
        only_here = {"stages"} if technique != "pipeline" else set()
        assert [key for key in logged - only_here if f"`{key}" not in text] == [], technique
