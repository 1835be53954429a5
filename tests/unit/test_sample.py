"""The sample: the same bytes everywhere, complete or absent, and like real models and datasets."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import sample
from common.errors import UserError
from common.files import sha256
from helpers.launch import ROOT

# SHA-256 of the files: runs on the sample stay comparable between versions.
DIGESTS = {
    "abstracts.jsonl": "1f673c64925fcbebe7669add3bbe0e5ba75f1f6fe9ce446f46aab2e63e68f2be",
    "questions.jsonl": "f1ea3997a75ba52e7844a56b26696112893bc675274d9c345b5bd3b6c44c2f95",
    "paragraphs/train.jsonl": "b843325ed0eac6489b4ac383d4c9c969f99766e77171f31bc04a60cb94e5664e",
    "paragraphs/validation.jsonl": "0f4b78781dfc2e398bf074524b10ade8268a325cd117b69c86c6ee50de34f55a",
    "paragraphs/test.jsonl": "b6ae71343bde214bb8309349e4d2417f7cd187a399f6ab558f73e7a0899d002c",
    "tokenizer.json": "b36d0a6d1b1d1b692c99ba9c40aab42f78c46091984246c4d8190b479da893c6",
    "llama/model.safetensors": "6864824e95faa548aa7770010624796350a3c4d559394f942f13fe243e2fa69b",
    "gpt2/model.safetensors": "867d3c12b14ff89e71fb680c356302ed17abf8f3fb0e5a785975963a6303615f",
    "bloom/model.safetensors": "4663e72a33f60b04046001d6dfc0c77ae4e3a28fa7b4747da10f77cdf5867391",
}
EVERYTHING = """
from common import sample
for kind in sample.KINDS:
    sample.sample_dataset_file(kind)
for architecture in sample.MODELS:
    sample.sample_model_directory(architecture)
"""


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def other_process(tmp_path_factory):
    """Makes the sample meanwhile, with another hash seed, one thread and plain CPU instructions."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {"PYTHONHASHSEED": "2", "TOKENIZERS_PARALLELISM": "false", "ATEN_CPU_CAPABILITY": "default"}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", EVERYTHING], env=os.environ | environment)
    yield process, cache
    process.wait(timeout=120)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sample.sample_model_directory("llama"))


def test_version_covers_the_code_and_the_data(tmp_path, monkeypatch):
    versions = set()
    for name in ("", "words.json", "abstracts.json", "articles.json"):
        data = tmp_path / f"changed {name}"
        shutil.copytree(sample.DATA, data)
        if name:
            (data / name).write_text((data / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
        monkeypatch.setattr(sample, "DATA", data)
        sample._version.cache_clear()
        versions.add(sample._version())
    sample._version.cache_clear()
    assert len(versions) == 4


def test_cache_made_by_two_processes_keeps_the_first(tmp_path, monkeypatch):
    """The other process finishes while this one is still making its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(path):
        if not list(tmp_path.rglob("thing/first")):
            sample._cached("thing", lambda inner: (inner.mkdir(), (inner / "first").touch()))
        path.mkdir()
        (path / "second").touch()

    assert [file.name for file in sample._cached("thing", make).iterdir()] == ["first"]


def test_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def half(path):
        path.mkdir()
        (path / "config.json").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample._cached("llama", half)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sample._cached("llama", Path.mkdir).is_dir()


def test_cache_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        sample.sample_dataset_file("abstracts")


def test_abstracts_are_distinct_and_of_many_lengths(tokenizer):
    texts = [row["text"] for row in rows(sample.sample_dataset_file("abstracts"))]
    assert len(texts) == len(set(texts)) == 1000
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert 10 <= min(lengths) <= 30
    assert max(lengths) >= 10 * min(lengths)
    assert 100 <= sum(lengths) / len(lengths) <= 160
    assert not any(mark in text for text in texts for mark in "{}[]_|")


def test_questions_have_their_answer_in_the_context():
    found = rows(sample.sample_dataset_file("questions"))
    assert len(found) == 600
    assert len({row["id"] for row in found}) == 600
    assert len({(row["context"], row["question"]) for row in found}) == 600
    for row in found:
        assert list(row) == ["id", "title", "context", "question", "answers"]
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert text
        assert row["context"][start : start + len(text)] == text
        assert not any(mark in row["context"] + row["question"] for mark in "{}[]_|")


def test_paragraphs_of_all_splits_are_distinct():
    folder = sample.sample_dataset_file("paragraphs")
    seen = set()
    for split, count in {"train": 6000, "validation": 600, "test": 600}.items():
        lines = [row["text"] for row in rows(folder / f"{split}.jsonl")]
        assert len(lines) == count
        texts = [line for line in lines if line and not line.startswith(" = ")]
        assert all(text.strip() for text in texts)
        assert len(set(texts)) == len(texts) > count / 5
        assert seen.isdisjoint(texts)
        seen.update(texts)
        assert "" in lines and any(line.startswith(" = = ") for line in lines)


@pytest.mark.parametrize("kind", sample.KINDS)
def test_write_documents_of_any_count_starts_the_same_and_repeats_none(kind, tmp_path):
    for name, count, seed in (("small", 500, 3), ("large", 4_000, 3), ("other", 500, 4)):
        sample.write_documents(tmp_path / name, kind, count, seed)
    small, large, other = (rows(tmp_path / name) for name in ("small", "large", "other"))
    assert (len(small), len(large)) == (500, 4_000)
    assert large[:500] == small != other
    documents = [text for row in large if (text := json.dumps(row)).count(" ") > 12]
    assert len(documents) == len(set(documents)) > 900


def test_abstract_drawn_twice_is_dropped():
    draws = []

    def record():
        draws.append(uniform())
        return draws[-1]

    uniform = random.Random(0).random
    first = next(sample.abstracts(record))
    again = itertools.chain(draws, draws, iter(uniform, None))
    kind = sample.abstracts(lambda: next(again))
    assert next(kind) == first
    assert next(kind) != first


@pytest.mark.parametrize("architecture", sample.MODELS)
def test_model_loads_in_transformers_with_its_tokenizer(architecture, tokenizer):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sample.sample_model_directory(f"sample-{architecture}")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0.9e6 < model.num_parameters() < 1.3e6
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
    for name, tensor in stored.items():
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(sample.DEVIATION, rel=0.02), name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name

    own = AutoTokenizer.from_pretrained(folder)
    text = "  Snow, 12.5 % of it:\n\n Renée's Bergstrøm 雪 "
    assert own.get_vocab() == tokenizer.get_vocab()
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert own.decode(own(text)["input_ids"]) == text
    assert len(own) == model.config.vocab_size == sample.VOCABULARY
    assert own.eos_token == "<|endoftext|>"
    assert own.model_max_length == sample.MODELS[architecture][1]
    for settings in (model.config, model.generation_config):
        ids = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
        assert ids == (own.bos_token_id, own.eos_token_id, own.pad_token_id)


def test_first_use_does_not_advance_the_random_numbers(tmp_path, monkeypatch):
    import torch

    made = sample.sample_model_directory("llama").parent  # with the tokenizer
    monkeypatch.setattr(sample, "_cached", lambda name, make: made / name)
    before = torch.get_rng_state()
    sample._save_model(tmp_path / "gpt2", "gpt2")
    assert (tmp_path / "gpt2" / "model.safetensors").exists()
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_the_sample():
    assert all(map(sample.is_sample, ("sample", "sample-gpt2", "sample-xyz")))
    assert not any(map(sample.is_sample, ("samples", "./sample", "gpt2")))
    assert [sample.full_name(name, "bloom") for name in ("sample", "sample-gpt2")] == ["sample-bloom", "sample-gpt2"]
    assert sample.sample_model_directory("sample-bloom") == sample.sample_model_directory("bloom")
    with pytest.raises(UserError, match=r"sample-xyz.*sample-llama, sample-gpt2, sample-bloom"):
        sample.sample_model_directory("sample-xyz")


def test_files_are_the_same_bytes_everywhere_and_in_every_version(other_process):
    """Last in this file, so that the other process has had time."""
    process, cache = other_process
    assert process.wait(timeout=120) == 0
    exec(EVERYTHING, {})
    (theirs,) = cache.glob("deepspeed-by-hand/sample-*")
    ours = sample.sample_model_directory("llama").parent
    files = [file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file()]
    assert len(files) >= 3 * 5 + 6
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    assert {name: sha256(theirs / name) for name in DIGESTS} == DIGESTS
