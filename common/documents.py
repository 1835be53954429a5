"""Loads documents: the text, questions or conversations of a dataset, its slice and its held-out part.

From text to rows of tokens:

1. `load_documents` finds the columns of a dataset, takes the slice that the flags select, and holds out the validation
   split or every fiftieth document.
2. `common.tokens.tokenize` turns a document into token ids that end with an end-of-text token, which is a target too.
   Conversations are rendered by a chat template (`common.chat`); by default only the assistant's tokens are targets.
   With --loss_on answer only a question's answer is. The ids are in Arrow files, which all ranks memory-map.
3. `common.tokens.lay_out` splits documents longer than `max_length` into chunks that overlap by one token, so that
   every token except a document's first is a target once. (Questions and conversations are shortened in step 2
   instead.) With packing a row holds several chunks, otherwise one.
4. `common.rows` has the order of rows in an epoch, each rank's share of a step, and the tensors of its micro-batches.
"""

import ctypes
import glob
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import datasets
import multiprocess
import numpy as np
import transformers
from datasets.fingerprint import Hasher

from common import sample
from common.chat import render_conversations
from common.errors import UserError, one_line

# Every fiftieth document is held out, whatever the slice, so that perplexities are comparable across slices and no run
# trains on another's evaluation text.
HELD_OUT_EVERY = 50
DOCUMENTS_PER_PROCESS = 10_000  # at least
# Part of every cache key: files written by other versions of the code or of transformers are not reused.
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
        train: the slice to train on, without held-out documents.
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
    """Loads a dataset. Drops blank texts, but no conversations.

    Args:
        dataset_name: `sample` or `sample-KIND`, a file or directory (see `FORMATS`), or NAMESPACE/NAME on the Hub.
        dataset_config: the Hub dataset's configuration name.
        text_column: holds the text or the conversations; None finds the columns, see `_find_columns`.
        start_idx, end_idx: slice of the non-blank training documents, end exclusive; None is the last.
        sample_kind: which sample text `sample` is.
        test: whether to load the test split.
    """
    splits = _load_splits(dataset_name, dataset_config, sample_kind)
    if "train" not in splits:
        raise UserError(f"--dataset_name {dataset_name} has no train split; it has {', '.join(splits)}")
    documents = _documents(splits["train"], text_column, dataset_name)
    if not len(documents):
        raise UserError(f"--dataset_name {dataset_name}: every document is blank")
    last = len(documents) if end_idx is None else end_idx
    if not 0 <= start_idx < last <= len(documents):
        raise UserError(
            f"--start_idx {start_idx} --end_idx {last}: expected a range, 0 <= start < end, within the "
            f"{len(documents):,} non-blank documents of {dataset_name}"
        )
    train = documents.select(range(start_idx, last))
    validation = next((splits[name] for name in ("validation", "dev", "valid") if name in splits), None)
    if validation is not None:
        held_out = _documents(validation, text_column, dataset_name)
    else:
        held_out = documents.select(range(HELD_OUT_EVERY - 1, len(documents), HELD_OUT_EVERY))
        train = train.select(np.flatnonzero(np.arange(start_idx, last) % HELD_OUT_EVERY != HELD_OUT_EVERY - 1))
    if not len(train):
        raise UserError(
            f"--start_idx {start_idx} --end_idx {last}: the only document is held out, as every fiftieth is"
        )
    has_test = test and "test" in splits
    test_split = _documents(splits["test"], text_column, dataset_name) if has_test else train.select([])
    return Documents(train, held_out, test_split, len(documents))


def in_batches(transform: MethodType, function: Callable, key: Any, **options: Any) -> datasets.Dataset:
    """Calls `Dataset.map` or `Dataset.filter` in batches, cached in HF_DATASETS_CACHE/rows.

    Large datasets are processed by one process per core, each with at least `DOCUMENTS_PER_PROCESS` documents.

    Args:
        transform: a bound method of the dataset.
        key: what determines the result, besides the dataset and this code.
    """
    documents: Any = transform.__self__
    processes = min(len(os.sched_getaffinity(0)), len(documents) // DOCUMENTS_PER_PROCESS)
    if processes > 1:
        os.register_at_fork(after_in_child=_end_with_parent)
        options["num_proc"] = processes
    # `datasets` hashes an imported function by its name, and would not notice a change of its code.
    fingerprint = Hasher.hash([CODE, documents._fingerprint, key])
    options |= {"new_fingerprint": fingerprint, "cache_file_name": str(cache_directory() / f"{fingerprint}.arrow")}
    try:
        result = transform(function, batched=True, **options)
    except multiprocess.TimeoutError as error:  # raised by `datasets` while it handles Ctrl-C or another error
        raise error.__context__ or error from None
    result._split = documents.split  # lost with several processes
    return result


def cache_directory() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "rows"


def _end_with_parent() -> None:
    """Runs in a forked process: leaves Ctrl-C to the parent, and has the kernel kill it if the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _load_splits(name: str, config: str | None, sample_kind: str) -> dict[str, datasets.Dataset]:
    if sample.is_sample(name):
        name = str(sample.sample_dataset_file(sample.full_name(name, sample_kind)))
    path, hub_name = Path(name).expanduser(), HUB_NAMES.get(name, name)
    is_file = path.is_file()
    if is_file and path.suffix not in FORMATS:
        raise UserError(f"--dataset_name {name}: cannot read '{path.suffix}' files, only {' '.join(FORMATS)}")
    if is_file and not path.stat().st_size:
        raise UserError(f"--dataset_name {name}: the file is empty")
    is_local = bool(name) and path.exists()
    if not is_local and (path.suffix in FORMATS or not re.fullmatch(r"[^./~][^/]*/[^/]+", hub_name)):
        raise UserError(
            f"--dataset_name {name}: no such file or directory, and datasets on the Hub are named NAMESPACE/NAME, "
            "such as Salesforce/wikitext"
        )
    try:
        if is_file:
            return datasets.load_dataset(FORMATS[path.suffix], data_files={"train": glob.escape(str(path))})
        if not is_local:
            return datasets.load_dataset(hub_name, config)
        if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            return {"train": saved} if isinstance(saved, datasets.Dataset) else saved
        return datasets.load_dataset(str(path))
    except Exception as error:
        # `datasets` wraps the cause; the innermost message names the line or the column.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = "it contains no documents" if "corresponds to no data" in str(cause) else one_line(cause)
        raise UserError(f"--dataset_name {name} cannot be read: {reason}") from error


def _documents(split: datasets.Dataset, column: str | None, name: str) -> datasets.Dataset:
    """Converts a split to one of the three kinds of `Documents`."""
    split, names = split.with_format(None), split.column_names
    if column not in (None, *names):
        raise UserError(f"--text_column {column} is not in {name}, which has {', '.join(names)}")
    columns = _find_columns(split, name) if column is None else [column]
    if len(columns) == 2 or (columns[0] != "text" and _holds_turns(split.features[columns[0]])):
        features = datasets.Features({"messages": datasets.Value("string"), "row": datasets.Value("int64")})
        options = {"input_columns": columns, "remove_columns": names, "with_indices": True, "features": features}
        return in_batches(split.map, render_conversations, columns, **options)
    for text in columns[:2]:  # the third is a question's answers
        if not _is_text(split.features[text]):
            raise UserError(f"--dataset_name {name}: column {text} holds {split.features[text]}, not text")
    if len(columns) == 3:
        split = in_batches(split.map, render_questions, columns, input_columns=columns, remove_columns=names)
    else:
        split = split.select_columns(columns).rename_columns({columns[0]: "text"})
    return in_batches(split.filter, _not_blank, "not blank", input_columns=["text"])


def _find_columns(split: datasets.Dataset, name: str) -> list[str]:
    """Returns the columns to train on: text; question, context and answers; messages; or prompt and completion."""
    features = split.features
    answers = "answer" if "answer" in features and "answers" not in features else "answers"
    kinds = [["text"]] if "text" in features else [["question", "context", answers]]
    kinds += [[key] for key in ("messages", "conversations") if key in features and _holds_turns(features[key])]
    kinds = [kind for kind in (*kinds, ["prompt", "completion"]) if features.keys() >= set(kind)]
    if len(kinds) > 1:
        first = kinds[0][0]
        missing = split.data.column(first).null_count  # not 0 if the rows have several formats
        if missing or first not in ("text", "question"):
            gap = f" ({missing:,} rows have no {first})" if missing else ""
            raise UserError(
                f"--dataset_name {name} has several columns to train on, {', '.join(map(' and '.join, kinds))}{gap}: "
                "name one with --text_column, or remove the others"
            )
    texts = [key for key, feature in features.items() if _is_text(feature)]
    if not kinds and len(texts) != 1:
        has = ", ".join(features)
        raise UserError(f"--dataset_name {name}: name the text column with --text_column; the columns are {has}")
    return kinds[0] if kinds else texts


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "").endswith("string")


def _holds_turns(feature: Any) -> bool:
    # `Json` can hold anything; `render_conversations` checks each row.
    return isinstance(getattr(feature, "feature", feature), dict | datasets.Json)


def _not_blank(texts: list[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]


def render_questions(questions: list[str | None], contexts: list[str | None], answers: list) -> dict[str, list]:
    """Renders SQuAD's columns as text: `Question: … Context: … Answer: …`.

    Args:
        answers: one per question: a string, a list of strings, or SQuAD's `{"text": [...]}`. Only the first is used.

    Returns:
        Columns `text`, empty if question or answer is blank (SQuAD 2 has such questions), and `CHAR_OFFSETS`.
    """
    columns: dict[str, list] = {name: [] for name in ("text", *CHAR_OFFSETS)}
    for row in zip(questions, contexts, map(_first_answer, answers), strict=True):
        question, context, answer = ((part or "").strip() for part in row)
        asked = f"Question: {question} Context:"
        given = f"{asked} {context}"
        text = f"{given} Answer: {answer}" if question and answer else ""
        offsets = len(asked), len(given), len(text) - len(answer)
        for column, value in zip(columns.values(), (text, *offsets), strict=True):
            column.append(value)
    return columns


def _first_answer(answers: Any) -> str | None:
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list):
        return _first_answer(answers[0]) if answers else ""
    if isinstance(answers, int | float):  # a CSV column of numbers, NaN where it has none
        return "" if answers != answers else f"{answers:.15g}"
    if not isinstance(answers, str | None):
        raise UserError(f"an answer is {one_line(answers)}: expected a string, a list of strings, or SQuAD's answers")
    return answers
