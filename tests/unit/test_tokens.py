"""Tokens and layout in files: the cache, several processes, and packing, which old checkpoints rely on."""

import json
import os
import random
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from common import chat, documents, sample, tokens
from common.errors import UserError
from helpers.token_rows import rows_of_documents


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer():
    return AutoTokenizer.from_pretrained(sample.sample_model_directory("gpt2"))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(path, max_length=16, packing=True, loss_on="text", tokenizer=None, **arguments):
    train = documents.load_documents(str(path), **arguments).train
    args = Namespace(dataset_name=str(path), max_length=max_length)
    return tokens.tokenize_and_pack(train, tokenizer or TOKENIZER, args, packing, loss_on, None)


TOKENIZER = tokenizer()
TEXTS = [f"text {i} " + "word " * (i % 9) for i in range(120)]


def content(rows):
    return {key: tensor.tolist() for key, tensor in rows.collate(range(len(rows))).items()}


def test_second_start_neither_tokenizes_nor_lays_out(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", TEXTS)
    first = load(path)

    def fail(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(tokens, "_encode_texts", fail)
    monkeypatch.setattr(tokens, "lay_out", fail)
    second = load(path, tokenizer=tokenizer())
    assert content(second) == content(first)
    (file,) = (tmp_path / "cache" / "rows").glob("*.pt")
    assert str(file) in Path("/proc/self/maps").read_text()
    for changes in ({"max_length": 17}, {"packing": False}):  # other rows of the same tokens
        with pytest.raises(AssertionError, match="computed again"):
            load(path, **changes)


def test_cache_is_not_used_after_a_change_of_conversations(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    args = Namespace(dataset_name=str(path), max_length=64)

    def rows(source="{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}", **special):
        (tmp_path / "template.jinja").write_text(source)
        with_special = tokenizer()
        with_special.add_special_tokens(special)
        template = chat.ChatTemplate(with_special, str(tmp_path / "template.jinja"))
        train = documents.load_documents(str(path)).train
        return content(tokens.tokenize_and_pack(train, with_special, args, True, "text", template))

    first = rows()
    assert rows() == first
    assert rows(bos_token="!") != first
    assert rows("{% for message in messages %}{{ message.content }}{% endfor %}") != first
    monkeypatch.setattr(documents, "CODE", b"other")
    monkeypatch.setattr(documents, "render_conversations", lambda *columns: {"messages": ['"wrong"'], "row": [0]})
    with pytest.raises(UserError, match="wrong"):
        rows()


@pytest.mark.parametrize("change", ["text", "slice", "tokenizer", "end of text", "code"])
def test_cache_is_not_used_after_a_change_of_tokens(tmp_path, monkeypatch, change):
    path = write(tmp_path / "a.jsonl", TEXTS)
    load(path)
    other, arguments = tokenizer(), {}
    if change == "text":
        write(path, ["another text", *TEXTS[1:]])
        os.utime(path, (1, 1))
    elif change == "slice":
        arguments = {"start_idx": 1}
    elif change == "tokenizer":
        other.add_tokens(["word"])
    elif change == "end of text":
        other.eos_token = "!"
    else:
        monkeypatch.setattr(documents, "CODE", b"other")
    monkeypatch.setattr(tokens, "_encode_texts", lambda *args: (_ for _ in ()).throw(AssertionError("computed again")))
    with pytest.raises(AssertionError, match="computed again"):
        load(path, tokenizer=other, **arguments)


def test_layout_saved_by_another_process_is_used(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", TEXTS)
    lay_out = tokens.lay_out

    def lay_out_late(*args):
        monkeypatch.setattr(tokens, "lay_out", lay_out)
        load(path)  # the other process, which is faster
        return lay_out(*args)

    monkeypatch.setattr(tokens, "lay_out", lay_out_late)
    assert len(load(path)) > 0
    assert len(list((tmp_path / "cache" / "rows").glob("*.pt"))) == 1


@pytest.fixture
def cores(monkeypatch):
    """Sets how many processes there are, each with two documents or more."""
    monkeypatch.setattr(documents, "DOCUMENTS_PER_PROCESS", 2)
    return lambda number: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)))


@pytest.mark.parametrize("kind", ["text", "questions"])
def test_several_processes_make_the_same_rows_as_one(tmp_path, monkeypatch, cores, kind):
    rows = [{"text": text} for text in TEXTS]
    if kind == "questions":
        rows = [{"question": f"{i}?", "context": "c", "answer": f"{i}"} for i in range(120)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for number in (1, 2):
        cores(number)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache_{number}")
        found.append(content(load(path, loss_on="answer" if kind == "questions" else "text")))
    assert found[0] == found[1]
    assert list((tmp_path / "cache_2").rglob("*_00001_of_00002.arrow"))
    assert not list((tmp_path / "cache_1").rglob("*_of_*.arrow"))


def test_error_found_by_several_processes_names_row_and_split(tmp_path, cores):
    cores(2)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [json.dumps({"messages": turns})] * 20 + [json.dumps({"messages": []})]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text(rows[0])
    (tmp_path / "text" / "validation.jsonl").write_text("\n".join(rows))
    (tmp_path / "template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    template = chat.ChatTemplate(tokenizer(), str(tmp_path / "template.jinja"))
    held_out = documents.load_documents(str(tmp_path / "text")).held_out
    args = Namespace(dataset_name="text", max_length=64)
    with pytest.raises(UserError, match=r"text: row 20 of the validation split .*: the conversation is empty"):
        tokens.tokenize_and_pack(held_out, template.tokenizer, args, True, "text", template)


def test_error_in_one_of_several_processes_is_a_user_error(tmp_path, cores):
    cores(2)
    answers = [{"text": ["a"]}] * 20 + [{"text": {"wrong": "kind"}}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "context": "c", "answers": each}) + "\n" for each in answers))
    with pytest.raises(UserError, match="expected a string"):
        load(path)


@pytest.mark.parametrize("max_length", [2, 7, 50])
@pytest.mark.parametrize("seed", range(2))
def test_packing_puts_each_chunk_into_the_fullest_row_that_has_room(max_length, seed):
    draw = random.Random(seed)
    documents = [[*range(1, draw.randint(1, draw.choice((6, 120))) + 1)] for _ in range(60)]
    starts = [draw.randint(0, 40) if seed % 2 else 0 for _ in documents]
    chunks = [
        ids[begin : begin + max_length]
        for ids, start in zip(documents, starts, strict=True)
        for begin in range(0, len(ids) - 1, max_length - 1)
        if start < min(begin + max_length, len(ids))  # otherwise it has no target
    ]
    expected = []  # for each row its chunks, and the number of the last one
    for number, chunk in enumerate(chunks):
        rooms = [(sum(map(len, there)), last, row) for row, (there, last) in enumerate(expected)]
        rooms = [room for room in rooms if room[0] + len(chunk) <= max_length]
        if rooms:  # of equally full rows the one that was added to last
            row = max(rooms)[2]
            expected[row] = [*expected[row][0], chunk], number
        else:
            expected.append(([chunk], number))
    rows = rows_of_documents(documents, max_length, loss_start=starts if seed % 2 else None)
    found = [[ids.tolist() for _, ids, _ in rows.chunks(row)] for row in range(len(rows))]
    assert found == [there for there, _ in expected]
