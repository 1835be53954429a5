"""From files to rows: which documents are trained on, and every token but a document's first a target once."""

import argparse
import json
import random
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pytest
import torch
from token_rows import ids_in_row, load_rows, rows_of_documents
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from common import data, sample
from common.attention import attention_arguments
from common.documents import FORMATS, load_documents
from common.errors import UserError
from common.rows import Batch, RowLoader, epoch_order, eval_batches, steps_in_epoch
from common.tokens import tokenize, tokenize_and_pack

TEXTS = [f"document {i} and\tits 'words', \"quoted\"" for i in range(120)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path, texts, **columns):
    """The texts, and other columns, in the format that the file's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame({"text": texts, **columns}, dtype=object)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    elif path.suffix == ".json":
        path.write_text(json.dumps(frame.to_dict("records")))
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(texts) + "\n")
    return path


def load(path, **arguments):
    """(training, held-out) texts."""
    documents = load_documents(str(path), **arguments)
    return list(documents.train["text"]), list(documents.held_out["text"])


def refusal(path, **arguments):
    """The one line that a UserError says."""
    with pytest.raises(UserError) as caught:
        load(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or "--start_idx" in message
    return message


# ------------------------------------------------------------------------------------------------- documents


def test_blank_documents_are_dropped_before_slicing(tmp_path):
    blanks = ["", "  \t ", "\n", None]
    mixed = [text for i, real in enumerate(TEXTS) for text in (blanks[i % 4], real)]
    path = write(tmp_path / "a.jsonl", mixed)
    train, _ = load(path, start_idx=3, end_idx=7)
    assert train == TEXTS[3:7]


def test_every_fiftieth_document_is_held_out_whatever_the_slice(tmp_path):
    path = write(tmp_path / "a.jsonl", ["", *TEXTS])
    held_out = [TEXTS[49], TEXTS[99]]
    for start, end in ((0, None), (0, 120), (40, 60), (48, 52), (99, 120), (0, 49)):
        train, evaluated = load(path, start_idx=start, end_idx=end)
        assert evaluated == held_out
        assert train == [text for text in TEXTS[start:end] if text not in held_out]


def test_fewer_than_fifty_documents_hold_none_out(tmp_path):
    assert load(write(tmp_path / "a.jsonl", TEXTS[:49])) == (TEXTS[:49], [])


def test_validation_split_is_used_where_there_is_one(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", ["", "held", "out"])
    train, held_out = load(tmp_path, start_idx=45, end_idx=55)
    assert train == TEXTS[45:55]  # the fiftieth is trained on, for the other split is evaluated on
    assert held_out == ["held", "out"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_and_directories_give_the_same_documents(tmp_path, suffix):
    path = write(tmp_path / f"text/train{suffix}", TEXTS)
    expected = ([text for text in TEXTS if text not in (TEXTS[49], TEXTS[99])], [TEXTS[49], TEXTS[99]])
    assert load(path) == expected
    assert load(path.parent) == expected


def test_directories_of_save_to_disk(tmp_path):
    split = datasets.Dataset.from_dict({"text": TEXTS[:10]})
    split.save_to_disk(tmp_path / "split")
    both = datasets.DatasetDict(train=split, validation=split.select([3]))
    both.save_to_disk(tmp_path / "both")
    assert load(tmp_path / "split") == (TEXTS[:10], [])
    assert load(tmp_path / "both") == (TEXTS[:10], [TEXTS[3]])


def test_column_of_strings_is_found_or_named(tmp_path):
    rows = [{"number": i, "abstract": text} for i, text in enumerate(TEXTS)]
    only = tmp_path / "only.jsonl"
    only.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(only)[0][:5] == TEXTS[:5]
    several = write(tmp_path / "several.jsonl", TEXTS, title=[text.upper() for text in TEXTS])
    assert load(several)[0][0] == TEXTS[0]
    assert load(several, text_column="title")[0][0] == TEXTS[0].upper()


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("start", "end"), [(121, None), (0, 121), (-1, None), (0, -1), (-5, -2)], ids=lambda index: str(index)
)
def test_slice_out_of_range(tmp_path, start, end):
    message = refusal(write(tmp_path / "a.jsonl", TEXTS), start_idx=start, end_idx=end)
    assert f"--start_idx {start}" in message
    assert "120 non-blank documents" in message
    if end is not None:
        assert f"--end_idx {end}" in message


@pytest.mark.parametrize(("start", "end"), [(5, 5), (7, 3), (120, None), (0, 0), (49, 50)])
def test_empty_slice(tmp_path, start, end):
    message = refusal(write(tmp_path / "a.jsonl", TEXTS), start_idx=start, end_idx=end)
    assert f"--start_idx {start} --end_idx {120 if end is None else end} leave no document" in message


def test_wrong_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS, year=list(range(120)), title=TEXTS)
    message = refusal(path, text_column="abstract")
    assert "--text_column abstract" in message and "text, year, title" in message
    message = refusal(path, text_column="year")
    assert "--text_column year" in message and "int64" in message
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": 1}\n{"text": 2}\n')
    message = refusal(mixed)
    assert "--text_column text" in message and "int64" in message
    unclear = tmp_path / "b.jsonl"
    unclear.write_text('{"title": "one", "abstract": "two"}\n')
    message = refusal(unclear)
    assert "name the text column" in message and "--text_column" in message and "title, abstract" in message


def test_unreadable_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing.jsonl")
    assert "no such file" in refusal("./nothing_here")
    other = tmp_path / "a.docx"
    other.write_text("x")
    message = refusal(other)
    assert "'.docx'" in message and ".jsonl .json .csv .parquet .txt" in message
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": "broken\n{"text": "fine"}\n')
    assert "cannot be read: " in refusal(broken)
    for suffix in FORMATS:
        empty = tmp_path / f"empty{suffix}"
        empty.write_text("")
        assert "is empty" in refusal(empty)
    (tmp_path / "bare").mkdir()
    assert refusal(tmp_path / "bare")


def test_only_blank_documents(tmp_path):
    assert "every document is blank" in refusal(write(tmp_path / "a.jsonl", ["", "  "]))


def test_no_train_split(tmp_path):
    path = write(tmp_path / "text" / "test.jsonl", TEXTS).parent
    message = refusal(path)
    assert "no train split" in message and "test" in message


# --------------------------------------------------------------------------------------------------- tokenize


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


def test_tokenizer_without_end_of_text():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenize(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, 16, "text", None)


# --------------------------------------------------------------------------------------------------- questions

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


def squad_features():
    answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
    text = {name: datasets.Value("string") for name in ("id", "title", "question", "context")}
    return datasets.Features(text | {"answers": datasets.Sequence(answers)})


@pytest.mark.parametrize("source", ["jsonl", "hub features", "lists", "strings"])
def test_squad_columns_become_one_text(tmp_path, source):
    path = tmp_path / "squad.jsonl"
    if source == "hub features":  # what load_dataset("squad") gives
        rows = [{"id": "1", "title": "t", **row} for row in QUESTIONS]
        path = tmp_path / "squad"
        datasets.Dataset.from_list(rows, features=squad_features()).save_to_disk(path)
    else:
        of = {"jsonl": lambda row: row, "lists": lambda row: row["text"], "strings": lambda row: row["text"][0]}[source]
        rows = [{**row, "id": "1"} for row in QUESTIONS]
        for row in rows:
            row["answers"] = of(row["answers"])
            if source == "strings":
                row["answer"] = row.pop("answers")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load(path)
    assert train == [rendered(row) for i, row in enumerate(QUESTIONS) if i != 49]
    assert held_out == [rendered(QUESTIONS[49])]


def test_a_column_of_questions_can_still_be_named(tmp_path):
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    train, _ = load(path, text_column="context")
    assert train[0] == QUESTIONS[1]["context"]  # the first is blank


def test_questions_without_an_answer_are_left_out(tmp_path):
    path = tmp_path / "squad.jsonl"
    rows = [{**row, "answers": {"text": [], "answer_start": []}} if i % 2 else row for i, row in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(path)[0] == [rendered(row) for row in QUESTIONS[::2]]


def test_answers_of_another_kind(tmp_path):
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps({**row, "answers": {"text": {"en": "x"}}}) + "\n" for row in QUESTIONS))
    with pytest.raises(UserError, match="expected a string"):
        load(path)


def test_answers_that_are_numbers(tmp_path):
    path = tmp_path / "squad.csv"
    path.write_text("question,context,answer\nHow many?,Eight eggs.,8\nHow far?,A mile.,1.5\nWho?,Nobody.,\n")
    assert [text.rpartition(": ")[2] for text in load(path)[0]] == ["8", "1.5"]


def test_questions_of_another_kind(tmp_path):
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps({**row, "question": 3}) + "\n" for row in QUESTIONS))
    assert "its questions are" in refusal(path)


@pytest.mark.parametrize("architecture", ["bloom", "gpt2-like offsets"])
@pytest.mark.parametrize("loss_on", ["text", "answer"])
@pytest.mark.parametrize("packing", [False, True])
def test_what_is_learnt_of_a_question(tmp_path, loss_on, packing, architecture):
    if architecture == "bloom":
        tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("bloom"))
    else:
        tokenizer = make_tokenizer()
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    train, _ = load_rows(str(tmp_path / "squad.jsonl"), tokenizer, 128, packing, loss_on)
    batch = train.collate(np.arange(len(train)))
    learnt = Counter()
    for ids, positions, labels in zip(
        *(batch[key].numpy() for key in ("input_ids", "position_ids", "labels")), strict=True
    ):
        for document in np.split(np.arange(128), np.flatnonzero(positions == 0)):
            targets = document[labels[document] != -100] if len(document) else document
            if len(targets):
                assert (labels[targets] == ids[targets]).all()
                assert targets[-1] - targets[0] == len(targets) - 1
                learnt[tuple(ids[targets])] += 1
    eos = tokenizer.eos_token_id
    expected = Counter()
    for row in (row for i, row in enumerate(QUESTIONS) if i != 49):
        whole = tokenizer(rendered(row))["input_ids"]
        before = tokenizer(rendered(row).removesuffix(f" {row['answers']['text'][0]}"))["input_ids"]
        assert whole[: len(before)] == before
        expected[(*whole[len(before) if loss_on == "answer" else 1 :], eos)] += 1
    assert learnt == expected
    assert train.count(np.arange(len(train)))[1] == sum(len(ids) * n for ids, n in expected.items())


def test_a_long_question_keeps_question_and_answer(tmp_path):
    tokenizer = make_tokenizer()
    row = {"question": "words and", "context": " ".join(TEXTS[:9]), "answer": "its 'words',"}
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(60)))
    train = load_documents(str(tmp_path / "one.jsonl")).train
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


def test_padded_rows_of_a_step_stand_by_length_and_are_cut_to_the_longest():
    rows = rows_of_documents([range(2 + 4 * (i * 7 % 40)) for i in range(40)], 192, packing=False)
    plain = np.random.default_rng([3, 1]).permutation(len(rows))
    for step_rows, same in zip(epoch_order(rows, 10, 3, 1), plain.reshape(-1, 10), strict=True):
        assert sorted(step_rows) == sorted(same)
        lengths = [len(ids) for row in step_rows for ids in ids_in_row(rows, row)]
        assert lengths == sorted(lengths)
        assert rows.width(step_rows) == min(192, -(-lengths[-1] // 64) * 64)
        assert rows.width(step_rows[:1]) >= lengths[0]
    assert rows.width(np.array([-1, -1])) == 64
    packed = rows_of_documents([range(9)] * 40, 192)
    assert packed.width(np.array([0])) == 192


# ------------------------------------------------------------------------------------------------------- rows

EOS = 0
LAYOUTS = [(length, packing) for length in (2, 3, 16, 50) for packing in (True, False)]


def random_documents(seed, count=60, longest=120):
    """Documents of distinct tokens, so that a token tells its document and its place, and the same end."""
    draw = random.Random(seed)
    ids = iter(range(1, 1_000_000))
    lengths = [1, 2, 3, longest, *(draw.randint(1, draw.choice((8, longest))) for _ in range(count))]
    return [np.array([*(next(ids) for _ in range(length - 1)), EOS], dtype=np.int32) for length in lengths]


def pairs_of(documents):
    return Counter(pair for ids in documents for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))


def everything(rows, extra=0):
    """All rows collated, with `extra` filler rows at the end, as lists; pad = eos."""
    batch = rows.collate([*range(len(rows)), *[-1] * extra], pad_id=EOS)
    return zip(*(batch[key].tolist() for key in ("input_ids", "position_ids", "labels")), strict=True)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_but_a_documents_first_is_a_target_once(seed, length, packing):
    documents = random_documents(seed)
    learnt, learnt_of_documents = Counter(), pairs_of(documents)
    for ids, positions, labels in everything(rows_of_documents(documents, length, packing), extra=2):
        assert len(ids) == len(positions) == len(labels) == length
        for t in range(length - 1):
            if labels[t + 1] != -100:
                assert labels[t + 1] == ids[t + 1]
                assert positions[t + 1] == positions[t] + 1  # both in one document, as attention sees it
                learnt[ids[t], labels[t + 1]] += 1
        assert labels[0] == -100
    assert learnt == learnt_of_documents
    # With pad = eos, the end of every document that has anything to predict it from is a target.
    assert sum(n for (_, target), n in learnt.items() if target == EOS) == sum(len(ids) > 1 for ids in documents)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
def test_chunks_without_a_target_are_left_out(length, packing):
    documents, draw = random_documents(8), random.Random(8)
    starts = [draw.randint(0, len(ids)) for ids in documents]
    taught = [ids[max(start - 1, 0) :] for ids, start in zip(documents, starts, strict=True)]
    rows = rows_of_documents(documents, length, packing, starts)
    learnt, whole = Counter(), np.concatenate(documents)
    for ids, _, labels in everything(rows):
        learnt.update((ids[t - 1], labels[t]) for t in range(1, length) if labels[t] != -100)
    assert learnt == pairs_of(taught)
    assert rows.totals[1:3] == (learnt.total(), sum(len(ids) > 1 for ids in taught))
    for begin, ids, loss_mask in (chunk for row in range(len(rows)) for chunk in rows.chunks(row)):
        assert (ids == whole[begin : begin + len(ids)]).all()
        assert loss_mask[1:].any()


def test_packed_documents_that_fit_keep_their_own_positions():
    documents = random_documents(1, longest=30)
    place = {int(token): i for ids in documents for i, token in enumerate(ids[:-1])}
    rows = rows_of_documents(documents, 30)
    assert len(rows) < len(documents)
    seen = [
        (token, position)
        for ids, positions, _ in everything(rows)
        for token, position in zip(ids, positions, strict=True)
        if token != EOS
    ]
    assert all(place[token] == position for token, position in seen)
    assert len(seen) == len({token for token, _ in seen}) == len(place)


def test_filler_rows_have_no_target():
    rows = rows_of_documents(random_documents(2), 16)
    batch = rows.collate([-1, -1, -1], pad_id=7)
    assert (batch["labels"] == -100).all()
    assert (batch["input_ids"] == 7).all()
    assert batch["input_ids"].shape == batch["position_ids"].shape == (3, 16)


@pytest.mark.parametrize(("length", "packing"), LAYOUTS)
def test_count_totals(length, packing):
    documents = random_documents(3)
    rows = rows_of_documents(documents, length, packing)
    every = np.arange(len(rows))
    tokens, targets, begun, squares = rows.count(every)
    assert targets == sum(pairs_of(documents).values())
    assert begun == sum(len(ids) > 1 for ids in documents)
    # Pieces overlap by a token: one more token each for every piece but a document's first.
    pieces = sum(-(-(len(ids) - 1) // (length - 1)) for ids in documents)
    assert tokens == targets + pieces
    by_hand = 0
    for ids in documents:
        left = len(ids) - 1
        while left > 0:
            by_hand += (min(left, length - 1) + 1) ** 2
            left -= length - 1
    assert squares == by_hand
    assert rows.mean_context_len == pytest.approx(by_hand / tokens / 2)
    # Row by row they add up, a filler row adds nothing, and the targets are those in the labels.
    assert tuple(np.sum([rows.count([row]) for row in every], axis=0)) == (tokens, targets, begun, squares)
    assert rows.count([*every, -1, -1]) == rows.totals == (tokens, targets, begun, squares)
    assert rows.count([-1]) == (0, 0, 0, 0)
    some = every[::3]
    assert rows.count(some)[1] == int((rows.collate(some, EOS)["labels"] != -100).sum())


@pytest.mark.parametrize("one_width", [False, True])
def test_micro_batches_are_the_rows_of_a_rank(one_width):
    documents = [range(1, length + 1) for length in (10, 70, 30, 64, 200, 128, 65, 5)]
    rows = rows_of_documents(documents, 256, packing=False)
    step_rows = np.array([0, 1, 2, 3, 4, 5, 6, -1])
    widths = []
    for rank in range(2):
        batches = list(Batch(loader(rows, 2, 2, rank), step_rows).micro_batches(one_width))
        for number, batch in enumerate(batches):
            mine = step_rows[4 * number + 2 * rank :][:2]  # micro-batch by micro-batch, in it rank by rank
            expected = rows.collate(mine)
            width = batch["input_ids"].shape[1]
            widths.append(width)
            assert all(torch.equal(batch[key], expected[key][:, :width]) for key in expected)
            assert all(tensor.is_contiguous() for tensor in batch.values())
            assert (expected["labels"][:, width:] == -100).all()
    assert widths == ([256] * 4 if one_width else [128, 256, 64, 128])


def test_packing_takes_few_rows():
    documents = random_documents(4, count=2000, longest=50)
    rows = rows_of_documents(documents, 64)
    real = sum(len(ids) for ids in documents if len(ids) > 1)
    assert real <= len(rows) * 64 < 1.05 * real


# ------------------------------------------------------------------------------------------- for the scripts


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("test", [TEXTS[70:73], [], None])
def test_rows_of_the_test_split(tmp_path, validation, test):
    write(tmp_path / "text" / "train.jsonl", TEXTS[:60])
    if validation:
        write(tmp_path / "text" / "validation.jsonl", TEXTS[60:70])
    if test is not None:
        write(tmp_path / "text" / "test.jsonl", [*test, " "])
    args = argparse.Namespace(
        dataset_name=str(tmp_path / "text"), dataset_config=None, text_column=None, start_idx=10, end_idx=30,
        max_length=16, packing=True, loss_on=None, chat_template=None, seed=42,
    )  # fmt: skip
    info = SimpleNamespace(config=LlamaConfig(), tokenizer=make_tokenizer())

    def load_all(**arguments):
        """(the run's data, number of documents of each split, log lines); the slice is of the training text only."""
        lines = []
        log = SimpleNamespace(info=lines.append)
        text = data.load(args, info, "paragraphs", batches_of(2, 1, 1), torch.device("cpu"), 0, log, **arguments)
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


# --------------------------------------------------------------------------------------- bounds for attention


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [(120, 9), (9, 120), (10, 3), (50, 50)], ids=str)
def test_attention_limits_hold_in_every_row(lengths, packing):
    splits = [
        rows_of_documents(random_documents(i, count=count, longest=longest), 50, packing)
        for i, (count, longest) in enumerate(zip((60, 4), lengths, strict=True))
    ]
    most, longest = data.attention_limits(*splits)
    for rows in splits:
        for row in [*range(len(rows)), -1]:
            positions = rows.collate([row], EOS)["position_ids"]
            assert int(positions.max()) < min(longest, rows.longest)
            assert int((positions == 0).sum()) <= most
            # So `varlen` has a place for each document and its kernel looks at no token too few.
            cu_seqlens = attention_arguments("varlen", positions, most, longest)["cu_seqlens"]
            assert cu_seqlens.diff().max() <= longest


def test_attention_limits_without_held_out_rows():
    rows = rows_of_documents(random_documents(0), 50)
    assert data.attention_limits(rows, rows_of_documents([], 50)) == data.attention_limits(rows)


# ------------------------------------------------------------------------------------------------------ order


def test_order_depends_on_seed_and_epoch_alone():
    rows = rows_of_documents(random_documents(5), 16)

    def order(batch, *arguments):
        numbers = epoch_order(rows, batch, *arguments)
        assert numbers.shape == (steps_in_epoch(rows, batch), batch)
        real, filler = numbers.flatten()[: len(rows)], numbers.flatten()[len(rows) :]
        assert sorted(real) == list(range(len(rows)))
        assert len(filler) < batch and (filler == -1).all()
        return real.tolist()

    first = order(8, 42, 0)
    assert first == order(8, 42, 0) == order(3, 42, 0) == order(len(rows), 42, 0) == order(len(rows) + 5, 42, 0)
    random.seed(1)
    np.random.seed(1)
    assert first == order(8, 42, 0)  # nor do the global generators decide
    orders = [first, order(8, 42, 1), order(8, 43, 0), order(8, 43, 1), list(range(len(rows)))]
    assert len(set(map(tuple, orders))) == len(orders)
    assert order(8) == list(range(len(rows)))


@pytest.mark.parametrize(("accumulation", "ranks", "micro"), [(1, 1, 1), (4, 1, 2), (1, 4, 2), (3, 2, 5), (16, 8, 2)])
def test_ranks_share_a_global_batch_out_and_leave_none(accumulation, ranks, micro):
    rows = rows_of_documents([[number, number] for number in range(1000)], 2, packing=False)
    step = np.random.default_rng(0).permutation(1000)[: accumulation * ranks * micro]
    batches = [Batch(loader(rows, accumulation, ranks, rank, micro), step) for rank in range(ranks)]
    # Each row's first token is its number.
    shares = [[tensors["input_ids"][:, 0].numpy() for tensors in batch.micro_batches()] for batch in batches]
    assert all(np.shape(share) == (accumulation, micro) for share in shares)
    assert sorted(np.ravel(shares)) == sorted(step)
    # Each micro-step is the same stretch of the batch whatever the number of ranks.
    for number in range(accumulation):
        stretch = step[number * ranks * micro : (number + 1) * ranks * micro]
        assert sorted(np.concatenate([share[number] for share in shares])) == sorted(stretch)


@pytest.mark.parametrize(("at_once", "most"), [(1, 1), (4, 3), (7, 100), (1000, 2)])
def test_evaluation_sees_every_row_once(at_once, most):
    rows = rows_of_documents(random_documents(6), 16)
    batches = eval_batches(rows, at_once, most)
    assert all(len(batch) % at_once == 0 and len(batch) <= most * at_once for batch in batches)
    assert [row for row in np.concatenate(batches) if row >= 0] == list(range(len(rows)))
    assert sum(map(len, batches)) - len(rows) < at_once


# ----------------------------------------------------------------------------------------------------- loader


def loader(rows, accumulation, ranks, rank, micro=2, first_epoch=0):
    config = argparse.Namespace(model_type="llama", _attn_implementation="sdpa")
    ds_config, limits = batches_of(micro, accumulation, ranks), data.attention_limits(rows)
    return RowLoader(rows, config, ds_config, torch.device("cpu"), rank, *limits, seed=42, first_epoch=first_epoch)


def batches_of(micro, accumulation, ranks):
    """The batch keys of a DeepSpeed JSON."""
    return {
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * ranks,
    }  # fmt: skip


def test_loader_batch_is_a_function_of_the_step():
    rows = rows_of_documents(random_documents(7), 16)
    loaded = loader(rows, accumulation=2, ranks=2, rank=0)
    steps = 2 * loaded.steps_per_epoch + 3
    orders = np.concatenate([epoch_order(rows, 8, 42, epoch) for epoch in range(3)])
    samples = 0
    for step in range(steps):
        batch = loaded[step]
        assert (batch.row_numbers == orders[step]).all()
        samples += rows.count(orders[step]).samples
        assert batch.samples_seen == samples
        assert batch.targets_per_micro_batch == rows.count(orders[step]).targets / 4
    later = loader(rows, accumulation=2, ranks=2, rank=0)[steps - 1]  # without the steps before it
    assert (later.row_numbers == batch.row_numbers).all() and later.samples_seen == samples
    shifted = loader(rows, accumulation=2, ranks=2, rank=0, first_epoch=1)[0]
    assert (shifted.row_numbers == orders[loaded.steps_per_epoch]).all()


def test_loader_ranks_have_the_micro_batches_of_a_step_together():
    rows = rows_of_documents(random_documents(7), 16)
    tokens = 0
    for rank in range(3):
        batch = loader(rows, accumulation=2, ranks=3, rank=rank)[1]
        micro_batches = list(batch)
        assert len(micro_batches) == batch.num_micro_batches == 2
        for inputs, labels in micro_batches:
            assert inputs["input_ids"].shape == labels.shape == (2, 16)
            tokens += int((labels != -100).sum())
    assert tokens == batch.counts.targets


def test_loader_eval_batches_are_all_rows_or_the_first():
    rows = rows_of_documents(random_documents(7), 16)
    loaded = loader(rows, accumulation=3, ranks=2, rank=1)
    numbers = np.concatenate([batch.row_numbers for batch in loaded.eval_batches()])
    assert [number for number in numbers if number >= 0] == list(range(len(rows)))
    assert [len(batch.row_numbers) for batch in loaded.eval_batches(limit=2)] == [12, 12]
