"""Whole HF models: their files, parameter counts, packed documents and generated text."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import attention, data, models, sample
from common.errors import UserError
from helpers.token_rows import ids_in_row, rows_of_documents


def directory_of(architecture):
    return sample.sample_model_directory(architecture)


def random_model(architecture, seed=1, **fields):
    """Another model of the sample's shape, every parameter random, biases too."""
    config = AutoConfig.from_pretrained(directory_of(architecture), **fields)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.09, generator=generator)
    return model.eval()


def test_directory_without_tokenizer_files_is_refused(tmp_path):
    """transformers would make an empty tokenizer from GPT-2's config alone."""
    shutil.copy(directory_of("gpt2") / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer"):
        models.load_config_and_tokenizer(tmp_path, 64)


def test_continue_prompt_is_greedy_or_sampled():
    model = random_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory_of("llama"))
    ids = torch.tensor([models.prompt_ids(tokenizer, "We present")])
    expected = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    rest = tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True)
    assert models.continue_prompt(model, tokenizer, "We present", 8) == text
    assert models.continue_prompt(model, tokenizer, "We present", 8, include_prompt=False) == rest
    sampled = set()
    for seed in range(3):
        torch.manual_seed(seed)
        sampled.add(models.continue_prompt(model, tokenizer, "We present", 8, temperature=2.0, top_k=0))
    assert len(sampled) == 3


@pytest.mark.parametrize(
    ("prompt", "more", "said"),
    [
        ("four words of text", 4, None),
        ("four words of text", 5, "--flag is 4 tokens, with --max_new_tokens 5 more than the model's 8 positions"),
        (" ", 1, "--flag ' ' has no tokens"),
        ("words of 9s", 1, "makes id 9, but the model's embedding has 9 rows"),
    ],
)
def test_check_prompt_that_cannot_be_continued_is_refused(prompt, more, said):
    def tokenizer(text, verbose):
        return {"input_ids": [9 if word == "9s" else 1 for word in text.split()]}

    tokenizer.name_or_path = "it"
    config = SimpleNamespace(max_position_embeddings=8, vocab_size=9)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        models.check_prompt("--flag", prompt, more, config, tokenizer)


@pytest.mark.parametrize(
    ("architecture", "looked_up"), [("llama", 0), ("gpt2", 1024 * 128), ("bloom", 0)]
)  # GPT-2's positions are only looked up; the tied embedding is the head
def test_count_parameters(architecture, looked_up):
    model = models.meta_model(AutoConfig.from_pretrained(directory_of(architecture)))
    every = sum(tensor.numel() for tensor in load_file(directory_of(architecture) / "model.safetensors").values())
    assert models.count_parameters(model) == (every, every - looked_up)


def test_count_parameters_of_an_untied_model():
    model = random_model("llama", tie_word_embeddings=False)
    every = sum(parameter.numel() for parameter in model.parameters())
    assert models.count_parameters(model) == (every, every - 2048 * 128)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_packed_documents_have_the_logits_of_each_document(architecture):
    model = random_model(architecture)
    model.set_attn_implementation("sdpa")
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 2048, length).astype(np.int32) for length in (9, 20, 5, 3, 30, 2)]
    rows = rows_of_documents(documents, 32)
    assert len(rows) < len(documents)
    batch = rows.collate(range(len(rows)))
    inputs = attention.model_inputs(
        model.config, batch["input_ids"], batch["position_ids"], *data.attention_limits(rows)
    )
    seen = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        for row in range(len(rows)):
            place = 0
            for ids in ids_in_row(rows, row):
                alone = model(torch.tensor(ids).long()[None]).logits[0]
                end = place + len(alone)
                torch.testing.assert_close(logits[row, place:end], alone, rtol=1e-4, atol=1e-5)
                place, seen = end, seen + 1
    assert seen == len(documents)


def test_bloom_takes_one_document_per_row():
    config = AutoConfig.from_pretrained(directory_of("bloom"))
    with pytest.raises(UserError, match="--no-packing"):
        attention.choose_packing(config, True)
    assert attention.choose_packing(config, None) is attention.choose_packing(config, False) is False
    llama = AutoConfig.from_pretrained(directory_of("llama"))
    assert [attention.choose_packing(llama, flag) for flag in (None, True, False)] == [True, True, False]
    ids = torch.arange(6).view(1, 6)
    assert set(attention.model_inputs(config, ids, ids, None)) == {"input_ids", "use_cache"}


def test_meta_model_of_an_invalid_config_is_refused(tmp_path):
    config = AutoConfig.for_model("gpt2", n_head=7, name_or_path=str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/config.json does not describe a model: ValueError: .*divisible"):
        models.meta_model(config)


def test_code_of_a_model_directory_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (tmp_path / "mine.py").write_text("raise SystemExit(7)")
    with pytest.raises(UserError, match="transformers cannot read it"):
        models.load_config_and_tokenizer(tmp_path, 8)
