"""The sample: small models and texts, so that every script runs without downloading anything.

`--model_name sample --dataset_name sample` are files made on first use, always the same bytes: a Hugging Face directory
with a randomly initialized model of about a million parameters, and .jsonl files of text from the templates and word
lists in `sample_data/`. They are in `$XDG_CACHE_HOME/deepspeed-by-hand/sample-<version>` (`~/.cache` by default); the
version is a hash of this module and of `sample_data/`.
"""

import functools
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import make_once

DATA = Path(__file__).with_name("sample_data")
VOCABULARY = 2048  # tokens
END_OF_TEXT = "<|endoftext|>"
DEVIATION = 0.088  # of the initial weights, 1 / sqrt(hidden size): a model this small learns slowly with 0.02

# Class in transformers, longest document in tokens, config.
MODELS = {
    "llama": (
        "LlamaForCausalLM", 2048,
        {
            "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", 1024, {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024}),
    "bloom": ("BloomForCausalLM", 2048, {"hidden_size": 128, "n_layer": 4, "n_head": 4, "seq_length": 2048}),
}  # fmt: skip
ROWS = {"abstracts": 1000, "questions": 600}
SPLIT_ROWS = {"train": 6000, "validation": 600, "test": 600}  # of paragraphs; the number of a split is its seed


def is_sample(name: str) -> bool:
    """Returns whether a model or dataset name is that of a sample: `sample` or `sample-…`."""
    return name == "sample" or name.startswith("sample-")


def full_name(name: str, default: str) -> str:
    """Returns `name`, but for plain `sample` the full name of the default, such as `sample-abstracts`."""
    return f"sample-{default}" if name == "sample" else name


def sample_model_directory(name: str) -> Path:
    """Returns the directory of a sample model, for `from_pretrained`: float32 weights, config and tokenizer.

    Args:
        name: a key of `MODELS`, with or without `sample-`.
    """
    architecture = _known("--model_name", name, MODELS)
    return _cached(architecture, lambda path: _save_model(path, architecture))


def sample_dataset_file(name: str) -> Path:
    """Returns the .jsonl file of "abstracts" (column `text`) or "questions" (SQuAD's columns).

    For "paragraphs" (column `text`, rows like WikiText's: headings, blank lines and paragraphs) it is a directory with
    train.jsonl, validation.jsonl and test.jsonl.
    """
    kind = _known("--dataset_name", name, KINDS)
    if kind == "paragraphs":
        return _cached(kind, _save_splits)
    return _cached(f"{kind}.jsonl", lambda path: write_documents(path, kind, ROWS[kind], seed=0))


def _known(flag: str, name: str, known: Mapping[str, Any]) -> str:
    key = name.removeprefix("sample-")
    if key not in known:
        raise UserError(f"{flag} {name}: no such sample; there are {', '.join(f'sample-{each}' for each in known)}")
    return key


def write_documents(path: Path, kind: str, count: int, seed: int) -> None:
    """Writes generated text to a .jsonl file; the same seed gives the same bytes.

    No abstract, paragraph or question is repeated within a file; headings and blank lines are.

    Args:
        kind: a key of `KINDS`.
        count: of rows, including headings and blank lines.
    """
    # `random()` is the only method of `random` whose sequence Python promises to keep.
    rows = KINDS[kind](random.Random(seed).random)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(next(rows), ensure_ascii=False) + "\n" for _ in range(count))


@functools.cache
def _version() -> str:
    files = [Path(__file__), *sorted(DATA.glob("*.json"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _cached(name: str, make: Callable[[Path], object]) -> Path:
    """Returns the path of `name` in the cache, made by `make(path)` if it does not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(home, "deepspeed-by-hand", f"sample-{_version()}", name)
    try:
        make_once(path, make)
    except OSError as error:
        raise UserError(
            f"cannot make the sample in {path.parent} ({error}); set XDG_CACHE_HOME to a writable directory"
        ) from error
    return path


def _save_splits(path: Path) -> None:
    path.mkdir()
    for seed, (split, count) in enumerate(SPLIT_ROWS.items()):
        write_documents(path / f"{split}.jsonl", "paragraphs", count, seed)


def _save_model(path: Path, architecture: str) -> None:
    import torch
    import transformers

    class_name, longest, settings = MODELS[architecture]
    model_class = getattr(transformers, class_name)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(_cached("tokenizer.json", _save_tokenizer)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    ids = {f"{token}_token_id": tokenizer.eos_token_id for token in ("bos", "eos", "pad")}
    config = model_class.config_class(vocab_size=VOCABULARY, **ids, **settings)
    # Building a model draws random numbers; the caller's must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).float()
    # Weights in a fixed order, because transformers' initialization changes from version to version.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):  # a tied weight appears once
            if parameter.ndim > 1:
                # Rounded from float64, whose last bits differ between CPUs.
                weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(weight * DEVIATION)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)


def _save_tokenizer(path: Path) -> None:
    """Trains byte-level BPE on the sample texts of all kinds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        files = [sample_dataset_file("abstracts"), sample_dataset_file("questions")]
        for file in [*files, sample_dataset_file("paragraphs") / "train.jsonl"]:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                yield row["text"] if "text" in row else f"{row['question']} {row['context']}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(path))


# ------------------------------------------------------------------------------------------------ documents


def _load(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def _load_words() -> dict[str, Sequence]:
    """Returns the words or numbers for each kind of slot."""
    data = _load("words")
    return {slot: range(*bounds) for slot, bounds in data["numbers"].items()} | data["words"]


class Slots(dict):
    """Fills the slots of a template: `template.format_map(slots)`.

    `{study}` draws a word each time. `{place_1}` draws one that no other kept slot has, and keeps it, so that a
    document sticks to its subject.
    """

    def __init__(self, words: Mapping[str, Sequence], uniform: Callable[[], float]):
        super().__init__()
        self.words, self.uniform = words, uniform

    def __missing__(self, slot: str) -> Any:
        kind, kept, _ = slot.partition("_")
        word = _choose(self.words[kind], self.uniform)
        if kept:
            while word in self.values():
                word = _choose(self.words[kind], self.uniform)
            self[slot] = word
        return word

    def sentence(self, template: str) -> str:
        """Fills a template, turns "a" into "an" before vowels, and capitalizes the first letter."""
        text = re.sub(r"\b([Aa])(?= (?!uni)[aeiou])", r"\1n", template.format_map(self))
        return text[0].upper() + text[1:]


def _choose(options: Sequence, uniform: Callable[[], float]) -> Any:
    return options[int(uniform() * len(options))]


def _choose_some(options: Sequence, count: int, uniform: Callable[[], float]) -> list:
    """Returns `count` of the options, or all of them, in their order."""
    chosen: list[Any] = []
    for left, option in zip(range(len(options), 0, -1), options, strict=True):
        if uniform() * left < count - len(chosen):
            chosen.append(option)
    return chosen


def _is_new(text: str, seen: set[int]) -> bool:
    """Returns whether the text is not in `seen`, and adds its hash (a file may be larger than memory)."""
    before = len(seen)
    seen.add(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))
    return len(seen) > before


def abstracts(uniform: Callable[[], float]) -> Iterator[dict[str, str]]:
    """Yields {"text"}: abstracts of 1 to 14 sentences on one topic from one field."""
    data, words, seen = _load("abstracts"), _load_words(), set[int]()
    fields = [words | field for field in data["fields"]]
    positions = range(len(data["sentences"]))  # each has several sentences to choose from
    while True:
        slots = Slots(_choose(fields, uniform), uniform)
        some = _choose_some(positions, int(len(positions) * uniform()), uniform)
        # The other sentences refer to the proposal, so every abstract has it.
        some = sorted({data["proposal"], *some})
        text = " ".join([slots.sentence(_choose(data["sentences"][position], uniform)) for position in some])
        if _is_new(text, seen):
            yield {"text": text}


def _articles(uniform: Callable[[], float]) -> Iterator[tuple[Slots, dict[str, list[dict[str, str]]]]]:
    """Yields (slots with the title, {heading: facts}); the introduction's heading is empty."""
    data, words = _load("articles"), _load_words()
    while True:
        article = _choose(data, uniform)
        slots = Slots(words, uniform)
        slots["title"] = article["title"].format_map(slots)
        yield slots, article["sections"]


def paragraphs(uniform: Callable[[], float]) -> Iterator[dict[str, str]]:
    """Yields {"text"}: encyclopedia articles line by line, blank lines and headings as in WikiText."""
    seen: set[int] = set()
    for slots, sections in _articles(uniform):
        for heading, facts in sections.items():
            line = f" = = {heading} = = \n" if heading else f" = {slots.sentence('{title}')} = \n"
            yield from ({"text": text} for text in ("", line, ""))
            text = ""
            while not text or not _is_new(text, seen):
                some = _choose_some(facts, 3 + int(uniform() * (len(facts) - 2)), uniform)
                text = " ".join(re.sub(r"[\[\]]", "", slots.sentence(fact["sentence"])) for fact in some)
            yield {"text": f" {text} \n"}


def questions(uniform: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields SQuAD's rows: up to four questions about one context, each with one answer."""
    seen: set[int] = set()
    for slots, sections in _articles(uniform):
        facts = [fact for section in sections.values() for fact in section]
        context, asked = "", []
        for fact in _choose_some(facts, 3 + int(uniform() * 6), uniform):
            # The square brackets in a sentence enclose the answer to its question.
            before, answer, after = re.split(r"[\[\]]", slots.sentence(fact["sentence"]))
            context += " " * bool(context) + before
            asked.append((slots.sentence(fact["question"]), answer, len(context)))
            context += answer + after
        for question, answer, start in _choose_some(asked, 4, uniform):
            if _is_new(question + context, seen):
                yield {
                    "id": hashlib.sha256((question + context).encode()).hexdigest()[:24],
                    "title": slots.sentence("{title}").replace(" ", "_"),
                    "context": context,
                    "question": question,
                    "answers": {"text": [answer], "answer_start": [start]},
                }


KINDS = {"abstracts": abstracts, "questions": questions, "paragraphs": paragraphs}
