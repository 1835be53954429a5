"""Loads documents: dataset, columns, slice and held-out part.

How a text becomes rows of tokens:

1. `load_documents` loads a dataset, finds its text, questions or conversations, takes the slice of the flags, and
   holds out the validation split or every fiftieth document.
2. `common.tokens.tokenize`: a text becomes the tokenizer's ids and an end-of-text token, which is a target too. A
   conversation is rendered by a chat template (`common.chat`); by default only the assistant's tokens are targets, and
   with --loss_on answer only a question's answer. The ids are in Arrow files, which all ranks memory-map.
3. `common.tokens.lay_out`: a document longer than `max_length` is cut into chunks that overlap by one token, so every
   token but a document's first is a target once. (Questions and conversations are shortened in step 2 instead.)
   Packing puts several chunks into a row; padding gives each its own.
4. `common.rows`: the order of rows in an epoch, each rank's share of a step, and the tensors of its micro-batches.
"""

import ctypes
import glob
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import multiprocess
import transformers
from datasets.fingerprint import Hasher

from common import sample
from common.chat import render_conversations
from common.errors import UserError, one_line

# Every fiftieth document is held out, whatever slice is trained on, so that perplexities are comparable across slices
# and no run trains on another's evaluation text.
HELD_OUT_EVERY = 50
# Part of every cache key: files from another version of the code or of transformers are not reused.
CODE = [transformers.__version__] + [
    Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("documents", "chat", "tokens")
]
# Character offsets in a question's text.
CHAR_OFFSETS = ("context_start", "context_end", "answer_start")
# Bare names from older tutorials; the Hub's current client accepts only namespace/name.
HUB_NAMES = {"wikitext": "Salesforce/wikitext", "squad": "rajpurkar/squad"}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Documents(NamedTuple):
    """The documents of a run.

    Their columns are `text`; for questions also `CHAR_OFFSETS`; for conversations `messages` and `row`.

    Attributes:
        train: the slice to train on, without those that are held out.
        held_out: the validation split if there is one, otherwise every fiftieth document of the training split.
        test: the test split, empty if the dataset has none.
        num_documents: in the whole training split, where a slice without --end_idx ends.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    test: datasets.Dataset
    num_documents: int


def load_documents(
    dataset_name: str,
    dataset_config: str | None = None,
    text_column: str | None = None,
    start_idx: int = 0,
    end_idx: int | None = None,
    sample_kind: str = "abstracts",
    test: bool = True,
) -> Documents:
    """Loads a dataset. Blank texts are dropped; conversations never are.

    Args:
        dataset_name: "sample", "sample-abstracts", "sample-questions", "sample-paragraphs", a local file or directory
            (.jsonl .json .csv .parquet .txt), or NAMESPACE/NAME on the Hub (or a key of `HUB_NAMES`).
        dataset_config: the Hub dataset's configuration name.
        text_column: column that holds the text or the conversations; None finds it, see `_find_columns`.
        start_idx, end_idx: slice of the non-blank training documents, end exclusive; None is the last.
        sample_kind: which sample text "sample" stands for.
        test: whether to load the test split.

    Raises:
        UserError: the dataset is missing or empty, a column is unknown, or the slice is empty or out of range.
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
        options = {"with_indices": True, "fn_kwargs": {"start_idx": start_idx}}
        train = in_batches(train.filter, _not_held_out, [start_idx, HELD_OUT_EVERY], input_columns=[], **options)
    if not len(train):
        raise UserError(f"{slice_of} leave no document to train on (every fiftieth is held out)")
    test = _documents(splits["test"], text_column, dataset_name) if test and "test" in splits else train.select([])
    return Documents(train, held_out, test, len(documents))


def in_batches(transform: Callable, function: Callable, key: Any, **options: Any) -> datasets.Dataset:
    """`Dataset.map` or `Dataset.filter` in batches, cached in HF_DATASETS_CACHE/rows.

    From 20,000 documents on it uses several processes: at most one per core, each with at least 10,000 documents.

    Args:
        transform: the method of a dataset.
        key: what else determines the result, besides the dataset and this code.
    """
    documents = transform.__self__
    processes = min(len(os.sched_getaffinity(0)), len(documents) // 10_000)
    if processes > 1:
        os.register_at_fork(after_in_child=_end_with_parent)
        options["num_proc"] = processes
    # `datasets` itself hashes an imported function by name only, and would miss a change of its code.
    fingerprint = Hasher.hash([CODE, documents._fingerprint, key])
    options |= {"new_fingerprint": fingerprint, "cache_file_name": str(cache_directory() / f"{fingerprint}.arrow")}
    try:
        result = transform(function, batched=True, **options)
    except multiprocess.TimeoutError as error:  # `datasets` raises it while it handles Ctrl-C or another error
        raise error.__context__ or error from None
    result._split = documents.split  # several processes lose it
    return result


def cache_directory() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "rows"


def _end_with_parent():
    """Runs in each forked process: ignores Ctrl-C, which the parent handles; the kernel kills it if the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
                raise UserError(f"--dataset_name {name}: the file is empty")
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
        reason = "it contains no documents" if "corresponds to no data" in str(cause) else one_line(cause)
        raise UserError(f"--dataset_name {name} cannot be read: {reason}") from error


def _documents(split, column, name):
    """Converts a split to one of three kinds of documents, see `Documents`."""
    split, names = split.with_format(None), split.column_names
    strings = [key for key, feature in split.features.items() if getattr(feature, "dtype", "").endswith("string")]
    if column not in (None, *names):
        raise UserError(f"--text_column {column} is not in {name}, which has {', '.join(names)}")
    columns = [column] if column is not None else _find_columns(split, strings, name)
    if len(columns) == 3:
        for part in ("question", "context"):
            if part not in strings:
                raise UserError(f"--dataset_name {name}: its {part}s are {split.features[part]}, not text")
        split = in_batches(split.map, render_questions, columns, input_columns=columns, remove_columns=names)
        return in_batches(split.filter, _not_blank, "not blank", input_columns=["text"])
    if len(columns) == 2 or (columns[0] != "text" and _holds_turns(split.features[columns[0]])):
        features = datasets.Features({"messages": datasets.Value("string"), "row": datasets.Value("int64")})
        options = {"input_columns": columns, "remove_columns": names, "with_indices": True, "features": features}
        return in_batches(split.map, render_conversations, columns, **options)
    (column,) = columns
    if column not in strings:
        raise UserError(f"--text_column {column} of {name} holds {split.features[column]}, not text")
    split = split.select_columns(columns)
    if column != "text":
        split = split.rename_column(column, "text")
    return in_batches(split.filter, _not_blank, "not blank", input_columns=["text"])


def _find_columns(split, strings, name):
    """The columns to train on: text; question, context and answers; messages; or prompt and completion."""
    there = set(split.column_names)
    answers = next((key for key in ("answers", "answer") if key in there), "answers")
    kinds = [["text"]] if "text" in there else [["question", "context", answers]]
    kinds += [[key] for key in ("messages", "conversations") if key in there and _holds_turns(split.features[key])]
    kinds = [kind for kind in (*kinds, ["prompt", "completion"]) if there.issuperset(kind)]
    if len(kinds) > 1:
        first = kinds[0][0]
        values = split.data.column(first)  # has nulls if the rows have several formats
        missing = values.null_count
        if missing or first not in ("text", "question"):
            gap = f"row {values.is_null().index(True)} (from 0) and {missing - 1:,} others have no {first}; "
            raise UserError(
                f"--dataset_name {name} has several columns to train on, {', '.join(map(' and '.join, kinds))}: "
                f"{gap if missing else ''}name one with --text_column, or remove the others"
            )
    if not kinds and len(strings) != 1:
        has = ", ".join(split.column_names)
        raise UserError(f"--dataset_name {name}: name the text column with --text_column; the columns are {has}")
    return kinds[0] if kinds else strings


def _holds_turns(feature):
    # `Json` can hold anything; `_turns` checks each row.
    return isinstance(getattr(feature, "feature", feature), dict | datasets.Json)


def _not_blank(texts):
    return [bool(text and text.strip()) for text in texts]


def _not_held_out(indices, start_idx):
    return [(start_idx + index) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1 for index in indices]


def render_questions(questions: list[str | None], contexts: list[str | None], answers: list) -> dict[str, list]:
    """SQuAD's columns as text to learn from: `Question: … Context: … Answer: …`.

    Args:
        answers: one per question: a string, a list of strings, or SQuAD's `{"text": [...]}`. Only the first is used.

    Returns:
        Columns `text`, empty if question or answer is blank (SQuAD 2 has such questions), and `CHAR_OFFSETS`.
    """
    columns = {name: [] for name in ("text", *CHAR_OFFSETS)}
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
        raise UserError(f"an answer is {one_line(answers)}: expected a string, a list of strings, or SQuAD's answers")
    return answers
