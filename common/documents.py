"""Documents: which dataset, which of its columns, which slice of it, and what is held out.

How a text becomes rows of tokens:

1. `load_documents` loads a dataset, finds its text, questions or conversations, takes the slice of the flags, and
   holds out the validation split or every fiftieth document.
2. `common.tokens.tokenize`: a text becomes the tokenizer's ids and an end-of-text token, which is a target too. Of a
   question only the answer may be a target. A conversation is rendered by a chat template (`common.chat`); only what
   the assistant says is a target. The ids are in Arrow files that all ranks map into memory.
3. `common.tokens.lay_out`: a document longer than `max_length` is cut into chunks that overlap by one token, so every
   token but a document's first is a target once. Packing puts several chunks into a row; padding gives each its own.
4. `common.rows`: the order of rows in an epoch, each rank's share of a step, and the tensors of its micro-batches.
"""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

import datasets

from common import sample
from common.chat import render_conversations
from common.errors import UserError, one_line

# Every fiftieth document is held out, whatever slice is trained on, so that perplexities of runs over different
# slices compare and no slice has seen the others' evaluation text.
HELD_OUT_EVERY = 50
# Where in the text of a question its context begins and ends, and its answer begins.
PLACES = ("context_start", "context_end", "answer_start")
# Bare names from older tutorials; the Hub's current client accepts only namespace/name.
HUB_NAMES = {"wikitext": "Salesforce/wikitext", "squad": "rajpurkar/squad"}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Documents(NamedTuple):
    """The documents of a run, each in the columns that `_documents` lists.

    Attributes:
        train: the slice to train on, without those that are held out.
        held_out: the validation split if there is one, otherwise every fiftieth document of the training split.
        test: the test split; empty if there is none.
        count: documents in the whole training split, where a slice without --end_idx ends.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    test: datasets.Dataset
    count: int


def load_documents(
    dataset_name: str,
    dataset_config: str | None = None,
    text_column: str | None = None,
    start_idx: int = 0,
    end_idx: int | None = None,
    sample_kind: str = "abstracts",
) -> Documents:
    """Loads a dataset without its blank documents.

    Args:
        dataset_name: "sample", "sample-abstracts", "sample-questions", "sample-paragraphs", a local file or directory
            (.jsonl .json .csv .parquet .txt), or NAMESPACE/NAME on the Hub (or a key of `HUB_NAMES`).
        dataset_config: the Hub dataset's configuration name.
        text_column: column that holds the text or the conversations; None finds it, see `_documents`.
        start_idx, end_idx: slice of the non-blank training documents, end exclusive; None is the last.
        sample_kind: which sample text "sample" stands for.

    Raises:
        UserError: nothing there, an unknown column, a slice that is empty or out of range.
    """
    splits = _load_splits(dataset_name, dataset_config, sample_kind)
    if "train" not in splits:
        raise UserError(f"--dataset_name {dataset_name} has no train split; it has {', '.join(splits)}")
    documents = _documents(splits["train"], text_column, dataset_name)
    if not len(documents):
        raise UserError(f"--dataset_name {dataset_name}: every document is blank")
    last = len(documents) if end_idx is None else end_idx
    slice_of = f"--start_idx {start_idx} --end_idx {last}"
    if not 0 <= start_idx <= len(documents) or not 0 <= last <= len(documents):
        raise UserError(f"{slice_of} reach outside {dataset_name}, which has {len(documents):,} non-blank documents")
    if start_idx >= last:
        raise UserError(f"{slice_of} leave no document to train on: the slice is empty")
    train = documents.select(range(start_idx, last))
    validation = next((splits[name] for name in ("validation", "dev", "valid") if name in splits), None)
    if validation is not None:
        held_out = _documents(validation, text_column, dataset_name)
    else:
        held_out = documents.select(range(HELD_OUT_EVERY - 1, len(documents), HELD_OUT_EVERY))
        train = train.filter(_not_held_out, True, batched=True, input_columns=[], fn_kwargs={"start_idx": start_idx})
    if not len(train):
        raise UserError(f"{slice_of} leave no document to train on (every fiftieth is held out)")
    test = _documents(splits["test"] if "test" in splits else splits["train"].select([]), text_column, dataset_name)
    return Documents(train, held_out, test, len(documents))


def num_proc(documents: datasets.Dataset) -> int | None:
    """Number of processes that is worth starting to go through these documents; None is only this one."""
    processes = min(len(os.sched_getaffinity(0)), len(documents) // 10_000)
    return processes if processes > 1 else None


def _load_splits(name, config, sample_kind):
    if sample.is_sample(name):
        name = str(sample.resolve_sample_dataset(name, sample_kind))
    path = Path(os.path.expanduser(name))
    if not name:
        raise UserError("--dataset_name is empty")
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise UserError(f"--dataset_name {name}: cannot read '{path.suffix}' files, only {' '.join(FORMATS)}")
            if not path.stat().st_size:
                raise UserError(f"--dataset_name {name}: the file is empty, not one document")
            return datasets.load_dataset(FORMATS[path.suffix], data_files={"train": glob.escape(str(path))})
        if path.is_dir():
            if (path / "dataset_dict.json").exists():
                return datasets.load_from_disk(str(path))
            if (path / "state.json").exists():
                return {"train": datasets.load_from_disk(str(path))}
            return datasets.load_dataset(str(path))
        if name.startswith((".", "/", "~")) or path.suffix in FORMATS:
            raise UserError(f"--dataset_name {name}: no such file or directory")
        if not re.fullmatch("[^/]+/[^/]+", HUB_NAMES.get(name, name)):
            raise UserError(
                f"--dataset_name {name}: no such file or directory, and datasets on the Hub are named NAMESPACE/NAME, "
                "such as Salesforce/wikitext"
            )
        return datasets.load_dataset(HUB_NAMES.get(name, name), config)
    except UserError:
        raise
    except Exception as error:
        # `datasets` wraps what went wrong; the innermost message names the line or the column.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = one_line(cause)
        if "corresponds to no data" in reason:
            reason = "there is not one document in it"
        raise UserError(f"--dataset_name {name} cannot be read: {reason}") from error


def _documents(split, column, name):
    """A split as documents of one of three kinds, without blank ones.

    - text (column `text`, or the only column of strings): the column `text`;
    - questions (`question`, `context` and `answers`, as SQuAD has them): the columns `text` and `PLACES`;
    - conversations (`messages`, `conversations`, or `prompt` and `completion`): see `render_conversations`.
    """
    there = set(split.column_names)
    strings = [key for key, feature in split.features.items() if getattr(feature, "dtype", "").endswith("string")]
    if column is not None and column not in there:
        raise UserError(f"--text_column {column} is not in {name}, which has {', '.join(split.column_names)}")
    columns = (column,) if column is not None else _find_columns(split, strings, name)
    if columns[0] == "question" and len(columns) > 1:
        for part in ("question", "context"):
            if part not in strings:
                raise UserError(f"--dataset_name {name}: its {part}s are {split.features[part]}, not text")
        return _render(split, render_questions, columns).filter(_not_blank, batched=True, input_columns=["text"])
    if len(columns) > 1 or (columns[0] != "text" and _holds_turns(split.features[columns[0]])):
        features = datasets.Features({"messages": datasets.Value("string"), "row": datasets.Value("int64")})
        return _render(split, render_conversations, columns, with_indices=True, features=features)
    (column,) = columns
    if column not in strings:
        raise UserError(f"--text_column {column} of {name} holds {split.features[column]}, not text")
    split = split.select_columns([column])
    if column != "text":
        split = split.rename_column(column, "text")
    return split.filter(_not_blank, batched=True, input_columns=["text"])


def _find_columns(split, strings, name):
    """The columns to train on: (text,), (question, context, answers), (messages,) or (prompt, completion)."""
    there = set(split.column_names)
    answers = next((key for key in ("answers", "answer") if key in there), "answers")
    kinds = [("text",)] if "text" in there else [("question", "context", answers)]
    kinds += [(key,) for key in ("messages", "conversations") if key in there and _holds_turns(split.features[key])]
    kinds = [kind for kind in (*kinds, ("prompt", "completion")) if there.issuperset(kind)]
    if len(kinds) > 1:
        # A file that mixes formats has the columns of all of them, with gaps.
        gaps = {kind[0]: [row for row, value in enumerate(split[kind[0]]) if value is None] for kind in kinds}
        gap = next(
            (f"; row {rows[0]} and {len(rows) - 1:,} others have no {key}" for key, rows in gaps.items() if rows), ""
        )
        raise UserError(
            f"--dataset_name {name} has several columns to train on ({', '.join(map(' and '.join, kinds))}){gap}: "
            "--text_column names one"
        )
    if not kinds and len(strings) != 1:
        raise UserError(
            f"--dataset_name {name}: say which column holds the text with --text_column; it has "
            f"{', '.join(split.column_names)}"
        )
    return kinds[0] if kinds else (strings[0],)


def _holds_turns(feature):
    """Whether a column holds lists of turns, or anything (`Json`), which is checked row by row."""
    return isinstance(getattr(feature, "feature", feature), dict | datasets.Json)


def _render(split, function, columns, **options):
    split = split.select_columns(list(columns))
    options |= {"batched": True, "input_columns": list(columns), "remove_columns": split.column_names}
    return split.map(function, num_proc=num_proc(split), **options)


def _not_blank(texts):
    return [bool(text and text.strip()) for text in texts]


def _not_held_out(indices, start_idx):
    return [(start_idx + index) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1 for index in indices]


def render_questions(questions: list[str | None], contexts: list[str | None], answers: list) -> dict[str, list]:
    """SQuAD's columns as text to learn from: `Question: … Context: … Answer: …`.

    Args:
        answers: one for each question: a string, a list of strings, or SQuAD's `{"text": [...]}`. The first counts.

    Returns:
        Columns `text`, empty if question or answer is blank (SQuAD 2 has questions without an answer), and `PLACES`.
    """
    columns = {name: [] for name in ("text", *PLACES)}
    for question, context, answer in zip(questions, contexts, answers, strict=True):
        question, context, answer = ((part or "").strip() for part in (question, context, _first_answer(answer)))
        asked = f"Question: {question} Context:"
        given = f"{asked} {context}"
        text = f"{given} Answer: {answer}" if question and answer else ""
        for column, value in zip(columns, (text, len(asked), len(given), len(text) - len(answer)), strict=True):
            columns[column].append(value)
    return columns


def _first_answer(answers):
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list):
        return _first_answer(answers[0]) if answers else ""
    if isinstance(answers, int | float):  # the type of a CSV column that holds only numbers
        return "" if answers != answers else f"{answers:.15g}"
    if not isinstance(answers, str | None):
        raise UserError(f"an answer is {one_line(answers)}: neither text, nor a list of texts, nor SQuAD's answers")
    return answers
