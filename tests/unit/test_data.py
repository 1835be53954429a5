"""From files to rows: which documents are trained on, and every token but a document's first a target once."""

import argparse
import json
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from common import data, sample
from common.documents import load_documents
from common.errors import UserError
from common.tokens import tokenize, tokenize_and_pack
from helpers.token_rows import load_rows

BATCH = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 2}
TEXTS = [f"document {i} and\tits 'words', \"quoted\"" for i in range(120)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(*texts):
    return [{"text": text} for text in texts]


def make_tokenizer(appends_eos=False):
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.mark.parametrize("appends_eos", [False, True])
def test_each_document_ends_with_one_end_of_text_token(appends_eos):
    tokenizer = make_tokenizer(appends_eos)
    texts = [*TEXTS[:40], "and its", "and its"]  # of one length each and of several
    tokens = tokenize(datasets.Dataset.from_dict({"text": texts}), tokenizer, 16, "text", None)
    assert tokens.features == {"ids": datasets.List(datasets.Value("int32"))}
    for text, ids in zip(texts, tokens["ids"], strict=True):
        assert tokenizer.convert_ids_to_tokens(ids) == [*text.split(), "<eos>"]


def test_no_documents_make_no_rows():
    none = datasets.Dataset.from_dict({"text": TEXTS}).select([])
    rows = tokenize_and_pack(none, make_tokenizer(), argparse.Namespace(max_length=16), True, "text", None)
    assert len(rows) == 0
    assert "nothing" in data.describe("held out", rows)


def test_tokenizer_without_end_of_text_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenize(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, 16, "text", None)


QUESTIONS = [
    {
        "question": f" What is {i}? ",
        "context": f"One {i} two. " * (i % 7),
        "answers": {"text": [f"it {i}", "no"], "answer_start": [4, 8]},
    }
    for i in range(60)
]


def rendered(row):
    question, context, answer = row["question"].strip(), row["context"].strip(), row["answers"]["text"][0]
    return f"Question: {question} Context: {context} Answer: {answer}"


@pytest.mark.parametrize("architecture", ["bloom", "gpt2-like offsets"])
@pytest.mark.parametrize("loss_on", ["text", "answer"])
@pytest.mark.parametrize("packing", [False, True])
def test_targets_of_a_question_are_the_text_or_the_answer(tmp_path, loss_on, packing, architecture):
    if architecture == "bloom":
        tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("bloom"))
    else:
        tokenizer = make_tokenizer()
    path = write(tmp_path / "squad.jsonl", QUESTIONS)
    train, _ = load_rows(str(path), tokenizer, 128, packing, loss_on)
    batch = train.collate(np.arange(len(train)))
    learned = Counter()
    for ids, positions, labels in zip(
        *(batch[key].numpy() for key in ("input_ids", "position_ids", "labels")), strict=True
    ):
        for document in np.split(np.arange(128), np.flatnonzero(positions == 0)):
            targets = document[labels[document] != -100] if len(document) else document
            if len(targets):
                assert (labels[targets] == ids[targets]).all()
                assert targets[-1] - targets[0] == len(targets) - 1
                learned[tuple(ids[targets])] += 1
    eos = tokenizer.eos_token_id
    expected = Counter()
    for row in (row for i, row in enumerate(QUESTIONS) if i != 49):
        whole = tokenizer(rendered(row))["input_ids"]
        before = tokenizer(rendered(row).removesuffix(f" {row['answers']['text'][0]}"))["input_ids"]
        assert whole[: len(before)] == before
        expected[(*whole[len(before) if loss_on == "answer" else 1 :], eos)] += 1
    assert learned == expected
    assert train.count(np.arange(len(train)))[1] == sum(len(ids) * n for ids, n in expected.items())


def test_a_long_question_keeps_question_and_answer(tmp_path):
    tokenizer = make_tokenizer()
    row = {"question": "words and", "context": " ".join(TEXTS[:9]), "answer": "its 'words',"}
    train = load_documents(str(write(tmp_path / "one.jsonl", [row] * 60))).train
    whole = tokenizer(rendered({**row, "answers": {"text": [row["answer"]]}}))["input_ids"]
    for length in (len(whole) + 1, len(whole), 20, 8):
        ids, loss_mask = tokenize(train, tokenizer, length, "answer", None)[0].values()
        answer = loss_mask.index(1)
        assert len(ids) == min(length, len(whole) + 1)
        assert loss_mask == [0] * answer + [1] * (len(ids) - answer)
        kept = length - 1 - 7  # "Question: words and Context:" "Answer: its 'words',"
        words = tokenizer.convert_ids_to_tokens(ids)
        context = row["context"].split()[: max(kept, 0)]
        tokens = [tokenizer.convert_ids_to_tokens(tokenizer(word)["input_ids"])[0] for word in context]
        assert words[4:-4] == tokens
        assert ids[answer:] == [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("test", [TEXTS[70:73], [], None])
def test_rows_of_the_test_split(tmp_path, validation, test):
    write(tmp_path / "text" / "train.jsonl", texts_of(*TEXTS[:60]))
    if validation:
        write(tmp_path / "text" / "validation.jsonl", texts_of(*TEXTS[60:70]))
    if test is not None:
        write(tmp_path / "text" / "test.jsonl", texts_of(*test, " "))
    args = argparse.Namespace(
        dataset_name=str(tmp_path / "text"), dataset_config=None, text_column=None, start_idx=10, end_idx=30,
        max_length=16, packing=True, loss_on=None, chat_template=None, seed=42,
    )  # fmt: skip
    info = SimpleNamespace(config=LlamaConfig(), tokenizer=make_tokenizer())

    def load_all(**arguments):
        """(the run's data, number of documents of each split, log lines); the slice is of the training text only."""
        lines = []
        log = SimpleNamespace(info=lines.append)
        text = data.load(args, info, "paragraphs", BATCH, torch.device("cpu"), 0, log, **arguments)
        loaders = [loaded for loaded in (text.train, text.held_out, text.test) if loaded]
        return text, [loaded.rows.totals.samples for loaded in loaders], lines

    text, documents, lines = load_all()
    assert documents == [20, 10 if validation else 1, len(test or ())]
    assert text.num_documents == 60
    assert [line for line in lines if line.startswith("test: ")] == [data.describe("test", text.test.rows)] * bool(test)
    assert data.describe("test", text.test.rows).startswith("test: 3 documents" if test else "test: nothing")
    text, documents, lines = load_all(test=False)
    assert documents == [20, 10 if validation else 1]
    assert text.test is None and not any(line.startswith("test: ") for line in lines)
