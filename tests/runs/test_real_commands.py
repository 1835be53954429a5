"""Every documented command that names a repository on the Hub, against stand-ins on `hub_server.py`."""

import ast
import importlib
import itertools
import json
import re
import shlex
import sys
from collections import Counter
from typing import NamedTuple

import datasets
import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from common import models, sample
from common.documents import load_documents
from common.errors import UserError
from helpers.hub_server import TOKEN, HubServer
from helpers.launch import ROOT, events, launch

ABSTRACTS, QUESTIONS, PARAGRAPHS = "ash001/arxiv-abstract", "rajpurkar/squad", "Salesforce/wikitext"
MODELS = {
    "meta-llama/Llama-3.2-1B-Instruct": "llama",
    "distilbert/distilgpt2": "gpt2",
    "bigscience/bloom-560m": "bloom",
}
CONFIGURATIONS = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
# As the real dataset card declares them.
SQUAD_FEATURES = [
    *({"name": name, "dtype": "string"} for name in ("id", "title", "context", "question")),
    {
        "name": "answers",
        "sequence": [{"name": "text", "dtype": "string"}, {"name": "answer_start", "dtype": "int32"}],
    },
]

# --------------------------------------------------------------------------------------------------- commands


class Command(NamedTuple):
    source: str  # file that documents it
    launcher: str  # what comes before the script, such as `deepspeed --num_gpus=2`
    script: str  # such as zero/train.py or common.evaluate
    argv: list


DOCUMENTED = sorted(
    path
    for pattern in ("README.md", "*/README.md", "*/train.py", "*/run.slurm", "common/*.py")
    for path in ROOT.glob(pattern)
)
COMMAND = re.compile(
    r"(?:mkdir -p logs && )?((?:deepspeed|torchrun|python|sbatch)\b.*?) (\w+/(?:train\.py|run\.slurm)|common\.\w+) (.+)"
)
NAMING_FLAG = r"--(?:model[-_]name|dataset[-_]name|base[-_]model|hf[-_]repo)[ =]"
# Positional arguments that may be repositories.
POSITIONAL = {"common.evaluate": slice(0, 1), "common.convert": slice(1, 2), "common.hub": slice(1, 2)}
# Names that stand for no repository: placeholders, samples, and what a command before made or the reader brings.
LOCAL = re.compile(r"NAME|sample(-\w+)?|runs/.*|my-model|my-shards|bloom-qa-finetuned|llama-11m|\w+\.jsonl")


def documentation(path):
    """A file's text for users, with continued lines joined."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".slurm":
        head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        text = "\n".join(line.removeprefix("#") for line in head)
    return re.sub(r"\\\n\s*", "", text)


def repositories(command):
    """The names that a command's flags and positional arguments give to repositories on the Hub."""
    values = re.findall(rf"{NAMING_FLAG}(\S+)", " ".join(command.argv))
    values += command.argv[POSITIONAL.get(command.script, slice(0))]
    return [value for value in values if not LOCAL.fullmatch(value)]


def find_commands():
    for path in DOCUMENTED:
        for line in documentation(path).splitlines():
            if match := COMMAND.fullmatch(line.strip()):
                script = match[2].replace("run.slurm", "train.py")  # which gets the batch script's arguments
                command = Command(str(path.relative_to(ROOT)), match[1], script, shlex.split(match[3]))
                if repositories(command):
                    yield command


COMMANDS = [*find_commands()]
LOADING = [command for command in COMMANDS if command.script != "common.hub"]  # that one only uploads


def parse(command, monkeypatch):
    """The script's own reading of a command's arguments."""
    if not command.script.endswith("train.py"):
        return importlib.import_module(command.script).build_parser().parse_args(command.argv)
    script = importlib.import_module(command.script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [command.script, *command.argv])
    return script.parse_args()


# -------------------------------------------------------------------------------------------------- stand-ins


def put_dataset(hub, name, directory, splits, card=None):
    """Puts a dataset on the Hub; `splits` maps a path such as `plain_text/train` to the `Dataset` of its one file."""
    for path, split in splits.items():
        file = directory / f"{path}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        split.to_parquet(file)
    if card:
        (directory / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n")
    hub.put("dataset", name, directory)


def configuration(name, *splits):
    """An entry of a dataset card's `configs`."""
    files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    return {"config_name": name, "data_files": files}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with stand-ins for all models and datasets of the commands, to which this process is pointed.

    Its `documents` maps each dataset to what each of its non-blank training documents contains.
    """
    scratch = tmp_path_factory.mktemp("hub")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        # Both libraries read these variables on import, so a process that has imported them needs the results changed.
        for module, values in {
            constants: {
                "ENDPOINT": server.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,
                "HF_HUB_CACHE": str(scratch / "cache"),
            },
            datasets.config: {
                "HF_ENDPOINT": server.url,
                "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
                "HF_HUB_OFFLINE": False,
                "HF_DATASETS_CACHE": scratch / "datasets",
            },
        }.items():
            for name, value in values.items():
                patch.setattr(module, name, value)
        for name, value in {"HF_TOKEN": TOKEN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        datasets.disable_progress_bars()

        for name, architecture in MODELS.items():
            server.put("model", name, sample.sample_model_directory(architecture), gated=architecture == "llama")
        server.users[TOKEN].gated = tuple(MODELS)

        # As many abstracts as the largest --end_idx needs, so short that they load in a moment.
        abstracts = [f"Abstract {n}: we study problem {n} and present a method." for n in range(25_000)]
        put_dataset(
            server, ABSTRACTS, scratch / "abstracts", {"data/train": datasets.Dataset.from_dict({"text": abstracts})}
        )

        lines = sample.sample_dataset_file("questions").read_text().splitlines()
        questions = datasets.Dataset.from_list([json.loads(line) for line in lines])
        splits = {"train": questions.select(range(550)), "validation": questions.select(range(550, 600))}
        put_dataset(
            server, QUESTIONS, scratch / "questions", {f"plain_text/{name}": split for name, split in splits.items()},
            {
                "dataset_info": {
                    "config_name": "plain_text",
                    "features": SQUAD_FEATURES,
                    "splits": [{"name": name, "num_examples": len(split)} for name, split in splits.items()],
                },
                "configs": [configuration("plain_text", *splits)],
            },
        )  # fmt: skip

        paragraphs = {}
        for name, split in itertools.product(CONFIGURATIONS, ("test", "train", "validation")):
            texts = [f"{split} of {name}"]  # to tell one configuration from another
            if name == "wikitext-2-raw-v1":
                file = sample.sample_dataset_file("paragraphs") / f"{split}.jsonl"
                texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
            paragraphs[f"{name}/{split}"] = datasets.Dataset.from_dict({"text": texts})
        card = {"configs": [configuration(name, "test", "train", "validation") for name in CONFIGURATIONS]}
        put_dataset(server, PARAGRAPHS, scratch / "paragraphs", paragraphs, card)

        server.documents = {
            ABSTRACTS: abstracts,
            QUESTIONS: splits["train"]["question"][:],
            PARAGRAPHS: [text for text in paragraphs["wikitext-2-raw-v1/train"]["text"] if text.strip()],
        }
        yield server
        datasets.enable_progress_bars()


# ------------------------------------------------------------------------------------------------------ tests


def test_find_commands_in_documentation_finds_all_with_namespaces():
    assert Counter(command.source for command in COMMANDS) == {
        "README.md": 7,
        "baseline/README.md": 2,
        "baseline/run.slurm": 1,
        "baseline/train.py": 1,
        "common/convert.py": 1,
        "common/evaluate.py": 1,
        "common/hub.py": 1,
        "offload/README.md": 3,
        "offload/run.slurm": 1,
        "offload/train.py": 1,
        "pipeline/run.slurm": 1,
        "pipeline/train.py": 1,
        "zero/run.slurm": 1,
        "zero/train.py": 1,
    }
    named = [(command.source, name) for command in COMMANDS for name in repositories(command)]
    # Prose too says what to give to a flag.
    for path in DOCUMENTED:
        values = re.findall(rf"{NAMING_FLAG}([\w./-]+)`", documentation(path))
        named += [(path.name, value) for value in values if not LOCAL.fullmatch(value)]
    assert [(source, name) for source, name in named if name.count("/") != 1] == []


@pytest.mark.parametrize("command", LOADING, ids=lambda command: f"{command.source}-{command.script}")
def test_command_from_documentation_loads_its_model_and_documents(hub, monkeypatch, command):
    args = parse(command, monkeypatch)
    flags = vars(args)
    name = flags.get("model_name") or flags.get("base_model")
    if name:
        directory = models.model_directory(name, "llama")
        config, tokenizer = models.load_config_and_tokenizer(directory, args.max_length)
        assert config.model_type == MODELS[name]
        assert len(tokenizer) == config.vocab_size
    if "dataset_name" in flags and not LOCAL.fullmatch(args.dataset_name):
        start, end = flags.get("start_idx", 0), flags.get("end_idx")
        documents = load_documents(args.dataset_name, args.dataset_config, args.text_column, start, end)
        expected = [*enumerate(hub.documents[args.dataset_name])][start:end]
        if args.dataset_name == ABSTRACTS:  # which has no validation split
            expected = [(number, text) for number, text in expected if number % 50 != 49]
        assert all(part in text for (_, part), text in zip(expected, documents.train["text"], strict=True))
        assert len(documents.held_out) >= 50


@pytest.mark.parametrize(
    "bare, full, config", [("wikitext", PARAGRAPHS, "wikitext-2-raw-v1"), ("squad", QUESTIONS, None)]
)
def test_load_documents_known_bare_name_equals_full_name(hub, bare, full, config):
    loaded, same = (load_documents(name, config) for name in (bare, full))
    assert [part.to_list() for part in loaded[:3]] == [part.to_list() for part in same[:3]]
    assert len(loaded.train) == loaded.num_documents == same.num_documents == len(hub.documents[full])


@pytest.mark.parametrize("name", ["imdb", "a/b/c", "rajpurkar/squad/"])
def test_load_documents_other_name_is_refused_before_any_request(hub, name):
    before = len(hub.requests)
    with pytest.raises(UserError) as caught:
        load_documents(name)
    message = str(caught.value)
    assert message.startswith(f"--dataset_name {name}: no such file or directory")
    assert "NAMESPACE/NAME, such as Salesforce/wikitext" in message
    assert "\n" not in message
    assert len(hub.requests) == before


def test_load_documents_directory_with_a_known_bare_name_takes_precedence(hub, monkeypatch, tmp_path):
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "train.jsonl").write_text('{"text": "of this directory"}\n' * 60)
    monkeypatch.chdir(tmp_path)
    before = len(hub.requests)
    train = load_documents("squad").train
    assert {*train["text"]} == {"of this directory"}
    assert len(hub.requests) == before


def test_load_documents_file_with_a_known_bare_name_takes_precedence(hub, monkeypatch, tmp_path):
    (tmp_path / "squad").write_text("of this file\n")
    monkeypatch.chdir(tmp_path)
    before = len(hub.requests)
    with pytest.raises(UserError, match=r"^--dataset_name squad: cannot read '' files"):
        load_documents("squad")
    assert len(hub.requests) == before


def test_hub_server_dataset_without_namespace_is_not_found(hub, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a document"}\n')
    hub.put("dataset", "imdb", tmp_path)
    with pytest.raises(HfHubHTTPError, match="404"):
        HfApi(hub.url).dataset_info("imdb")
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        datasets.load_dataset("imdb")


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["baseline", "zero", "offload", "pipeline"])
def test_train_real_command_trains(hub, tmp_path, technique):
    script = f"{technique}/train.py"
    command = next(each for each in COMMANDS if each.source.endswith("README.md") and each.script == script)
    ranks = int((re.search(r"--num_gpus=(\d)", command.launcher) or [0, 1])[1])
    flags = ("--max_train_steps", 2, "--max_eval_steps", 1, "--output_dir", tmp_path / "out")
    env = hub.environment(tmp_path / "home")
    run = launch(script, *command.argv, *flags, ranks=ranks, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [step["step"] for step in events(tmp_path / "out", "step")] == [1, 2]
