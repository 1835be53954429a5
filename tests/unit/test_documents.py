"""Documents of files and directories, their columns, slices and held-out documents."""

import json

import datasets
import pandas
import pytest

from common.documents import FORMATS, load_documents
from common.errors import UserError

TEXTS = [f"document {i} and\tits 'words', \"quoted\"" for i in range(120)]


def write(path, texts, **columns):
    """The texts, and other columns, in the format of the file's suffix."""
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
    """The message of the UserError, one line."""
    with pytest.raises(UserError) as caught:
        load(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message or "--start_idx" in message
    return message


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


def test_validation_split_is_held_out_if_present(tmp_path):
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", ["", "held", "out"])
    train, held_out = load(tmp_path, start_idx=45, end_idx=55)
    assert train == TEXTS[45:55]  # including the fiftieth
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


@pytest.mark.parametrize(
    ("start", "end"),
    [(121, None), (0, 121), (-1, None), (0, -1), (-5, -2), (5, 5), (7, 3), (120, None), (0, 0)],
    ids=str,
)
def test_slice_empty_or_out_of_range_is_refused(tmp_path, start, end):
    message = refusal(write(tmp_path / "a.jsonl", TEXTS), start_idx=start, end_idx=end)
    assert f"--start_idx {start} --end_idx {120 if end is None else end}: expected a range" in message
    assert "within the 120 non-blank documents" in message


def test_slice_of_a_held_out_document_is_refused(tmp_path):
    message = refusal(write(tmp_path / "a.jsonl", TEXTS), start_idx=49, end_idx=50)
    assert message.startswith("--start_idx 49 --end_idx 50: the only document is held out")


def test_wrong_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS, year=list(range(120)), title=TEXTS)
    message = refusal(path, text_column="abstract")
    assert "--text_column abstract" in message and "text, year, title" in message
    message = refusal(path, text_column="year")
    assert "column year holds" in message and "int64" in message
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": 1}\n{"text": 2}\n')
    message = refusal(mixed)
    assert "column text holds" in message and "int64" in message
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


def test_answers_that_are_numbers(tmp_path):
    path = tmp_path / "squad.csv"
    path.write_text("question,context,answer\nHow many?,Eight eggs.,8\nHow far?,A mile.,1.5\nWho?,Nobody.,\n")
    assert [text.rpartition(": ")[2] for text in load(path)[0]] == ["8", "1.5"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"answers": {"text": {"en": "x"}}}, "expected a string"), ({"question": 3}, "column question holds .*int64")],
)
def test_questions_of_another_type(tmp_path, changes, error):
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in QUESTIONS))
    with pytest.raises(UserError, match=error):
        load(path)
