"""Evaluation of models side by side: numbers equal to plain Hugging Face's and to what runs log, and error messages."""

import json
import math
import random
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PhiConfig, PreTrainedTokenizerFast

from common import evaluate, evaluation, sample, tables
from helpers.launch import ROOT
from helpers.plain_hf import save_llama


def held_out_abstracts():
    """The held-out texts of the sample abstracts, found without this project's code: every fiftieth line."""
    lines = sample.sample_dataset_file("abstracts").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[49::50]]


def truth(directory, texts, max_length=10**6, first_target=lambda text: 1):
    """(nats, target tokens, bytes) of plain Hugging Face in float32, one document at a time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    nats = tokens = size = 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([*encoded["input_ids"], tokenizer.eos_token_id])
        first = first_target(text)
        # The token before the targets may end within a character.
        places = [*encoded["offset_mapping"], (len(text), len(text))]
        begin = min(places[first - 1][1], places[first][0])
        size += len(text[begin:].encode())
        tokens += len(ids) - first
        for start in range(0, len(ids) - 1, max_length - 1):
            piece = ids[start : start + max_length]
            with torch.no_grad():
                logits = model(piece[None]).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")
            nats += losses[max(first - start - 1, 0) :].sum().item()
    return nats, tokens, size


def assert_measured(found, expected):
    nats, tokens, size = expected
    assert found["tokens"] == tokens
    assert found["bytes"] == size
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.fixture
def compare(tmp_path):
    """Runs the command and returns what it wrote as JSON."""

    def run(*argv):
        output = tmp_path / "evaluation.json"
        assert evaluate.main([*map(str, argv), "--output", str(output)]) == 0
        return json.loads(output.read_text(encoding="utf-8"))

    return run


# ------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("model", "base", "max_length"), [("llama", "gpt2", 64), ("gpt2", "bloom", 512)])
def test_losses_of_two_models_equal_plain_hf(compare, model, base, max_length):
    found = compare(f"sample-{model}", "--base_model", f"sample-{base}", "--max_length", max_length, "--num_prompts", 0)
    assert found["same_tokenizer"]
    assert [each["model"] for each in found["models"]] == [f"sample-{model}", f"sample-{base}"]
    for kind, each in zip((model, base), found["models"], strict=True):
        assert_measured(each, truth(sample.sample_model_directory(kind), held_out_abstracts(), max_length))


def test_loss_of_uneven_documents_is_token_weighted(compare, tmp_path):
    words = random.Random(0)
    texts = [" ".join(words.choices(["we", "show", "that", "Ä", "模型"], k=words.randrange(1, 90))) for _ in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    save_llama(tmp_path / "model", tied=False)
    found = compare(
        tmp_path / "model", "--dataset_name", tmp_path / "text.jsonl", "--text_column", "body", "--max_length", 128
    )
    assert_measured(found["models"][0], truth(tmp_path / "model", texts[49::50], 128))


def test_loss_of_a_head_with_a_bias_equals_plain_hf(compare, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("gpt2"))
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = compare(tmp_path / "model")
    assert_measured(found["models"][0], truth(tmp_path / "model", held_out_abstracts(), 256))


def test_loss_in_bf16_is_close_to_fp32(compare):
    nats, tokens, _ = truth(sample.sample_model_directory("llama"), held_out_abstracts())
    (found,) = compare("sample-llama", "--precision", "bf16", "--num_prompts", 0)["models"]
    assert found["loss"] == pytest.approx(nats / tokens, rel=3e-3)
    assert found["loss"] != pytest.approx(nats / tokens, rel=1e-6)


def test_loss_on_answers_counts_only_their_tokens(compare):
    found = compare("sample-gpt2", "--dataset_name", "sample-questions", "--loss_on", "answer", "--num_prompts", 1)
    lines = sample.sample_dataset_file("questions").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[49::50]]
    before = [f"Question: {row['question']} Context: {row['context']} Answer:" for row in rows]
    texts = [f"{text} {row['answers']['text'][0]}" for text, row in zip(before, rows, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("gpt2"))
    begins = {text: len(tokenizer(start)["input_ids"]) for text, start in zip(texts, before, strict=True)}
    expected = truth(sample.sample_model_directory("gpt2"), texts, first_target=begins.get)
    assert_measured(found["models"][0], expected)
    assert found["prompts"] == [{"text": before[0], "reference": rows[0]["answers"]["text"][0]}]


def test_max_eval_steps_without_packing_measures_the_first_documents(compare):
    """Batches of two rows with one document each: BLOOM cannot pack, so neither model does."""
    found = compare(
        "sample-bloom", "--base_model", "sample-llama", "--max_length", 300, "--batch_size", 2, "--max_eval_steps", 3,
        "--num_prompts", 0,
    )  # fmt: skip
    texts = held_out_abstracts()[:6]
    for kind, each in zip(("bloom", "llama"), found["models"], strict=True):
        assert_measured(each, truth(sample.sample_model_directory(kind), texts))


def test_bits_per_byte_of_one_token_documents_are_infinite(compare, tmp_path, capsys):
    """Their only target is the end-of-text token, which stands for no bytes."""
    (tmp_path / "numbers.txt").write_text("7\n" * 100)
    (found,) = compare("sample-gpt2", "--dataset_name", tmp_path / "numbers.txt")["models"]
    nats, tokens, size = truth(sample.sample_model_directory("gpt2"), ["7", "7"])
    assert (found["tokens"], found["bytes"], found["bits_per_byte"]) == (tokens, size, math.inf) == (2, 0, math.inf)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert "no held-out document is longer than 12 words" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A GPT-2 with another tokenizer: one token per byte, and one for the end of the text."""
    directory = tmp_path_factory.mktemp("bytewise")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_positions=1024, initializer_range=0.3, bos_token_id=None,
        eos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_different_tokenizers_compare_by_bits_per_byte(bytewise, compare, capsys):
    found = compare("sample-gpt2", "--base_model", bytewise, "--max_length", 512, "--num_prompts", 0)
    assert not found["same_tokenizer"]
    assert "the tokenizers differ, so losses and perplexities are not comparable" in capsys.readouterr().out
    ours, theirs = found["models"]
    texts = held_out_abstracts()
    expected = truth(bytewise, texts, 512)
    assert expected[1:] == (sum(len(text.encode()) for text in texts), sum(len(text.encode()) - 1 for text in texts))
    assert_measured(theirs, expected)
    assert_measured(ours, truth(sample.sample_model_directory("gpt2"), texts, 512))


# -------------------------------------------------------------------------------------------------- continuations


def greedy(kind, prompt, count):
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory(kind))
    model = AutoModelForCausalLM.from_pretrained(sample.sample_model_directory(kind)).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=count, pad_token_id=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_continuations_are_greedy_and_printed_side_by_side(compare, capsys, monkeypatch):
    kinds = ("bloom", "llama")
    monkeypatch.setenv("COLUMNS", "100")
    prompts = ["We present a", "The river"]
    found = compare(
        f"sample-{kinds[0]}", "--base_model", f"sample-{kinds[1]}", "--prompt", prompts[0], "--prompt", prompts[1],
        "--max_new_tokens", 6,
    )  # fmt: skip
    assert found["prompts"] == [{"text": prompt, "reference": None} for prompt in prompts]
    out = capsys.readouterr().out
    columns = [line.split(" | ") for line in out.splitlines() if " | " in line and line[0] != "|"]
    assert [line[0].strip() for line in columns].count(f"sample-{kinds[0]}") == len(prompts)
    for kind, each, column in zip(kinds, found["models"], zip(*columns, strict=True), strict=True):
        assert each["continuations"] == [greedy(kind, prompt, 6) for prompt in prompts]
        shown = "".join("".join(column).split())
        for text in each["continuations"]:
            assert "".join(tables.printable(text).split()) in shown
    assert all(len(line) <= 100 for line in out.splitlines())


def test_default_prompts_are_beginnings_of_held_out_documents(compare):
    found = compare("sample-llama", "--num_prompts", 2, "--max_new_tokens", 5)
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("llama"))
    for prompt, text in zip(found["prompts"], held_out_abstracts(), strict=False):
        words = text.split()
        assert prompt["text"] == " ".join(words[: evaluation.PROMPT_WORDS])
        assert len(tokenizer(" " + prompt["reference"])["input_ids"]) == 5
        assert text.startswith(prompt["text"] + " " + prompt["reference"])
    assert len(found["prompts"]) == len(found["models"][0]["continuations"]) == 2


def test_default_prompts_skip_questions_that_are_too_long(compare, tmp_path):
    """Context and continuation must fit into the model's 128 positions."""
    rows = [
        {
            "question": f"Which is number {number}?",
            "context": "we show " * (5 if number == 99 else 150),
            "answer": "that",
        }
        for number in range(100)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_llama(tmp_path / "model", tied=True)
    found = compare(tmp_path / "model", "--dataset_name", tmp_path / "questions.jsonl", "--max_length", 128)
    text = "Question: Which is number 99? Context: we show we show we show we show we show Answer:"
    assert found["prompts"] == [{"text": text, "reference": "that"}]


def test_sampling_with_one_seed_is_deterministic(compare):
    flags = ("--prompt", "We", "--prompt", "We", "--temperature", 1.5, "--max_new_tokens", 8)
    found = compare("sample-llama", "--base_model", "sample-llama", *flags)
    texts = [text for each in found["models"] for text in each["continuations"]]
    assert len(set(texts)) == 1
    other = compare("sample-llama", *flags, "--seed", 7)
    assert other["models"][0]["continuations"][0] not in (texts[0], greedy("llama", "We", 8))


def test_control_characters_are_not_printed():
    result = evaluation.Evaluation("m", 1.0, 2.0, 3.0, 4, 5, ["a\x1b[31mb\nc"])
    text = evaluate.as_text(evaluation.Comparison("text", True, [evaluation.Prompt("p\x07")], [result]), 80)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a\ufffd[31mb c" in text


def test_markdown_output_escapes_prompts_and_has_the_printed_numbers(tmp_path, capsys):
    output = tmp_path / "evaluation.md"
    argv = ["sample-llama", "--base_model", "sample-gpt2", "--output", str(output), "--max_new_tokens", "5"]
    assert evaluate.main([*argv, "--prompt", "a | b\n*c*"]) == 0
    lines = output.read_text(encoding="utf-8").splitlines()
    assert "**Prompt 1:** a | b<br>\\*c\\*" in lines
    tables = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    assert tables[4] == ["sample-llama", "sample-gpt2"]
    assert tables[2][0] == "sample-llama"
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| sample-llama"))
    assert printed in lines


def test_table_cells_with_bars_and_line_breaks_stay_in_one_row():
    heads, _, row = tables.table(["a|b", "c"], [[tables.escaped("x | y\nz\r\x0bq"), "*"]]).splitlines()
    assert heads.split() == ["|", "a\\|b", "|", "c", "|"]
    assert row == "| x \\| y<br>z<br><br>q | * |"


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must fail in one line that says all of `said`, and write nothing."""

    def run(*argv, said):
        before = sorted(tmp_path.rglob("*"))
        assert evaluate.main([*map(str, argv), "--output", str(tmp_path / "evaluation.md")]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        for part in said:
            assert part in captured.err, (part, captured.err)
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def model(tmp_path):
    """A directory with a Llama of 128 positions."""
    save_llama(tmp_path / "model", tied=True)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["./nowhere"], ["./nowhere: no such model directory"]),
        (["sample-t5"], ["sample-t5: no such sample; there are", "sample-llama"]),
        (["no/such-model"], ["no/such-model: no", "the Hub"]),
        (["sample-llama", "--base_model", "./nowhere"], ["./nowhere: no such model directory"]),
        (["weights.pt"], ["weights.pt: holds weights only", "--base_model"]),
        (["sample-llama", "--base_model", "weights.pt"], ["weights.pt: holds weights only"]),
        (["weights.pt", "--base_model", "sample-llama"], ["weights.pt: no such file"]),
        (["sample-llama", "--prompt", ""], ["--prompt '' has no tokens"]),
        (
            ["sample-gpt2", "--prompt", "We", "--max_new_tokens", "1024"],
            ["--prompt is 1 tokens, with --max_new_tokens 1024 more than the model's 1024 positions"],
        ),
        (["sample-gpt2", "--max_length", "1025"], ["--max_length 1025", "1024 positions"]),
        (["sample-llama", "--dataset_name", "./none.jsonl"], ["./none.jsonl: no such file"]),
        (["sample-llama", "--split", "test"], ["--split test: --dataset_name sample has no document"]),
        (["sample-llama", "--loss_on", "answer"], ["--loss_on answer", "plain text"]),
        (["sample-llama", "--text_column", "body"], ["--text_column body is not in sample"]),
    ],
)
def test_bad_input_is_one_error_line(refused, flags, said):
    refused(*flags, said=said)


def test_dataset_without_held_out_documents_is_one_error(refused, tmp_path):
    (tmp_path / "short.txt").write_text("a line\n" * 49)
    refused("sample-llama", "--dataset_name", tmp_path / "short.txt", said=["nothing is held out", "fewer than 50"])


def test_max_eval_steps_with_different_tokenizers_is_refused(refused, bytewise):
    refused("sample-gpt2", "--base_model", bytewise, "--max_eval_steps", 1, said=["--max_eval_steps 1", "differ"])


def test_token_ids_beyond_the_embedding_are_refused(refused, model):
    config = json.loads((model / "config.json").read_text())
    shrunk = AutoModelForCausalLM.from_pretrained(model)
    shrunk.resize_token_embeddings(300)
    shrunk.save_pretrained(model)
    said = ["the model's embedding has 300 rows"]
    refused(model, "--max_length", 128, "--num_prompts", 0, said=said)
    refused("sample-llama", "--base_model", model, "--max_length", 128, "--num_prompts", 0, said=said)
    assert config["vocab_size"] > 300


def test_prompt_ids_beyond_the_embedding_are_refused(refused, model):
    """A prompt may have special tokens that no held-out text has."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(model)
    refused(model, "--max_length", 128, "--prompt", "We <new>", said=["the model's embedding has 2,048 rows"])


def test_weights_that_are_nan_are_one_error(model, capsys):
    weights = load_file(model / "model.safetensors")
    nans = {name: tensor * float("nan") for name, tensor in weights.items()}
    save_file(nans, model / "model.safetensors", metadata={"format": "pt"})
    assert evaluate.main([str(model), "--max_length", "128"]) == 1
    assert "its loss on this text is nan" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(refused, model):
    torch.save({"MODEL_STATE": {"norm.weight": torch.ones(3)}}, model / "w.pt")
    refused(model / "w.pt", "--base_model", model, "--max_length", 128, said=["w.pt", "is missing"])
    # The base model is checked before the first model is measured.
    (model / "model.safetensors").unlink()
    refused("sample-llama", "--base_model", model, "--max_length", 128, said=["expected model.safetensors"])


def test_directory_without_a_causal_model_is_refused(refused, tmp_path, model):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", said=["/empty", "config"])
    (model / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(model, said=["does not describe a model"])


@pytest.mark.parametrize("name", ["evaluation.txt", "missing/evaluation.md", "directory.md"])
def test_output_that_is_not_a_file_of_a_known_format_is_refused(name, tmp_path, capsys):
    (tmp_path / "directory.md").mkdir()
    with pytest.raises(SystemExit):
        evaluate.main(["sample-llama", "--output", str(tmp_path / name)])
    assert f"argument --output: '{tmp_path / name}'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ memory


def test_models_are_in_memory_one_at_a_time(monkeypatch):
    load, loaded = evaluation.load, []

    def watched(*arguments):
        assert [model for model in loaded if model() is not None] == []
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(evaluation, "load", watched)
    assert evaluate.main(["sample-llama", "--base_model", "sample-gpt2", "--max_new_tokens", "2"]) == 0
    assert len(loaded) == 2


def test_loss_of_a_plain_head_never_needs_all_logits(monkeypatch):
    monkeypatch.setattr(evaluation, "token_loss", None)
    assert evaluate.main(["sample-llama", "--base_model", "sample-gpt2", "--num_prompts", "0"]) == 0


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_help_imports_no_torch(command):
    code = (
        f"import sys\nfrom common import {command}\n"
        f"try: {command}.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'deepspeed'} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.endswith("\n[]\n")
