"""Conversations: rendered, masked, shortened to fit, refused, and trained on."""

import argparse
import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig

from common import data, sample, tokens
from common.chat import ChatTemplate
from common.documents import load_documents
from common.errors import UserError

LONG = 10_000  # tokens: enough for every conversation here
CHATML = Path(__file__).resolve().parents[2] / "common" / "chatml.jinja"
# How Llama-3.2 renders conversations without tools.
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- set system, rest = "", messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'] | trim, messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: " }}
{{- date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# Like Qwen3's, it shows what the assistant thought only after the user's last turn.
QWEN = """\
{%- set last = namespace(user=0) %}
{%- for message in messages if message.role == 'user' %}{%- set last.user = messages.index(message) %}{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.user %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Knows two roles, one of which it refuses in the wrong place, and silently drops any other.
STRICT = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[Q]' + message.content }}
{%- elif message.role == 'assistant' %}
    {%- if loop.first %}{{- raise_exception('an answer needs a question') }}{%- endif %}
    {{- '[A]' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[A]' }}{%- endif %}
"""


def turns(*contents, system=None):
    """A conversation in which user and assistant take turns."""
    rest = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *rest] if system else rest


CONVERSATIONS = [
    turns("Hello", "Hi there!"),
    turns("What is two plus two?", "Four.", "And three?", "  Five, of course. "),
    turns("Ünïcödé?\n\nYes", "日本語 😀", "", "🙂", system="Answer briefly."),
    turns("one", "two", "three"),
    turns("a", "", "b", "c"),
    [{"role": "assistant", "content": "I begin."}, *turns("Fine", "Good")],
    [*turns("x"), {"role": "assistant", "content": "y"}, {"role": "assistant", "content": "z"}],
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer_of(architecture="gpt2", special=()):
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory(architecture))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def template_of(text, tmp_path, tokenizer=None):
    (tmp_path / "template.jinja").write_text(text)
    return ChatTemplate(tokenizer or tokenizer_of(), str(tmp_path / "template.jinja"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(path, **changes):
    values = {
        "dataset_name": str(path), "dataset_config": None, "text_column": None, "start_idx": 0, "end_idx": None,
        "max_length": 256, "loss_on": None, "chat_template": str(CHATML), "seed": 1,
    }  # fmt: skip
    return argparse.Namespace(**values | changes)


def load(path, tokenizer=None, packing=True, **changes):
    """(training rows, template) of a file."""
    args = flags(path, **changes)
    documents = load_documents(args.dataset_name, text_column=args.text_column)
    tokenizer = tokenizer or tokenizer_of()
    template = data.find_template(args, tokenizer, documents.train)
    loss_on = data.choose_loss(args.loss_on, args.dataset_name, documents.train, template)
    return tokens.tokenize_and_pack(documents.train, tokenizer, args, packing, loss_on, template), template


def learned(rows):
    """For each document of unpacked rows: (all token ids, ids of the targets)."""
    batch = rows.collate(np.arange(len(rows)))
    lengths = rows.lengths(np.arange(len(rows)))
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
        assert ((labels == ids) | (labels == -100)).all()
        yield ids[:length].tolist(), labels[labels != -100].tolist()


# ------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("packing", [True, False])
def test_rows_with_generation_blocks_have_the_mask_of_transformers(tmp_path, packing):
    tokenizer = tokenizer_of()
    rows, _ = load(write(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS]), tokenizer, packing)
    found, expected = [], []
    for row in range(len(rows)):
        found += [(ids.tolist(), mask.astype(bool).tolist()) for _, ids, mask in rows.chunks(row)]
    for conversation in CONVERSATIONS:
        reference = tokenizer.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        expected.append((reference["input_ids"], [bool(each) for each in reference["assistant_masks"]]))
    assert sorted(found) == sorted(expected)
    assert (len(rows) == len(CONVERSATIONS)) is not packing


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_prefixes_give_the_mask_of_generation_blocks(tmp_path, conversation):
    marked = """\
        {%- for message in messages %}
            {{- '<|im_start|>' + message.role + '\n' }}
            {%- if message.role == 'assistant' %}{% generation %}
                {{- message.content + '<|im_end|>\n' }}{% endgeneration %}
            {%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
    by_block = template_of(marked, tmp_path)
    by_prefix = template_of(marked.replace("{% generation %}", "").replace("{% endgeneration %}", ""), tmp_path)
    assert by_block._has_generation_blocks and not by_prefix._has_generation_blocks
    for one, other in zip(by_prefix.encode(conversation, LONG), by_block.encode(conversation, LONG), strict=True):
        np.testing.assert_array_equal(one, other)


def test_labels_under_llama_3_2s_template_are_the_answers_and_their_ends(tmp_path):
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tokenizer_of("llama", special)
    tokenizer.bos_token = special[0]
    (tmp_path / "llama.jinja").write_text(LLAMA)
    path = write(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS[1]}, {"messages": CONVERSATIONS[2]}])
    rows, _ = load(path, tokenizer, packing=False, chat_template=str(tmp_path / "llama.jinja"), max_length=512)

    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    date = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    expected = [
        (
            f"<|begin_of_text|>{header('system')}{date}<|eot_id|>{header('user')}What is two plus two?<|eot_id|>"
            f"{header('assistant')}Four.<|eot_id|>{header('user')}And three?<|eot_id|>"
            f"{header('assistant')}Five, of course.<|eot_id|>",
            "Four.<|eot_id|>Five, of course.<|eot_id|>",
        ),
        (
            f"<|begin_of_text|>{header('system')}{date}Answer briefly.<|eot_id|>{header('user')}Ünïcödé?\n\nYes"
            f"<|eot_id|>{header('assistant')}日本語 😀<|eot_id|>{header('user')}<|eot_id|>"
            f"{header('assistant')}🙂<|eot_id|>",
            "日本語 😀<|eot_id|>🙂<|eot_id|>",
        ),
    ]  # fmt: skip
    assert [(tokenizer.decode(ids), tokenizer.decode(targets)) for ids, targets in learned(rows)] == expected


@pytest.mark.parametrize("content", [" leads", "trails ", "emoji 🙂", " "])
def test_mask_of_a_block_is_every_token_in_it_and_no_other(tmp_path, content):
    # A tokenizer without spans for spaces at the ends of words, with which transformers' own mask goes wrong.
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    source = (
        "{% for message in messages %}[{{ message.role }}]"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    ids, mask, _ = template_of(source, tmp_path, tokenizer).encode(turns("one", content, "two", "end"), LONG)
    learned = tokenizer.decode(ids[mask])
    assert learned.endswith("end") and "user" not in learned and "two" not in learned
    assert learned.removesuffix("end").strip() == content.strip()


def test_token_across_the_start_of_a_block_is_a_target_as_in_transformers(tmp_path):
    source = (
        "{% for message in messages %}{{ message.role }}: "
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    )
    template = template_of(source, tmp_path)
    reference = template.tokenizer.apply_chat_template(
        turns("a", "Hi"), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask, _ = template.encode(turns("a", "Hi"), LONG)
    assert template.tokenizer.decode(ids[mask]).startswith(" ")  # the token has the space before the block in it
    assert mask.tolist() == [bool(each) for each in reference["assistant_masks"]]


def test_blocks_of_a_shortened_conversation_are_its_own(tmp_path):
    source = (
        "{% for message in messages %}[{{ message.role }}]"
        "{% if loop.index > messages | length - 2 and message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    template = template_of(source, tmp_path)
    ids, mask, dropped = template.encode(turns("one", "first", "two " * 50, "last"), 40)
    assert dropped == 2
    assert template.tokenizer.decode(ids[mask]) == "first"


def test_answer_before_any_question_is_a_target_without_its_header(tmp_path):
    begins = CONVERSATIONS[5]
    source = STRICT.replace("{%- if loop.first %}", "{%- if false %}")
    ids, mask, _ = (template := template_of(source, tmp_path)).encode(begins, LONG)
    assert template.tokenizer.decode(ids[mask]) == "I begin.Good"
    with pytest.raises(UserError, match="cannot be located"):  # conversations do not have the header that is asked for
        template_of(source.replace("{{- '[A]' }}", "{{- '[A]<think>' }}"), tmp_path).encode(begins, LONG)


def test_loss_on_text_makes_every_token_but_the_first_a_target(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": each} for each in CONVERSATIONS])
    rows, _ = load(path, packing=False, loss_on="text")
    assert not rows.has_loss_mask
    assert all(targets == ids[1:] for ids, targets in learned(rows))


def test_template_whose_prefixes_disagree_is_refused_but_not_on_one_exchange(tmp_path):
    template = template_of(QWEN, tmp_path)
    ids, mask, _ = template.encode(turns("Hello", "Hi"), LONG)
    assert template.tokenizer.decode(ids[mask]) == "<think>\n\n</think>\n\nHi<|im_end|>\n"
    with pytest.raises(UserError, match="--chat_template"):
        template.encode(turns("Hello", "Hi", "Bye", "Ciao"), LONG)
    ids, _, _ = template.encode(turns("Hello", "Hi", "Bye", "Ciao"), LONG, assistant_only=False)
    assert len(ids) > 0  # no need to know them


@pytest.mark.parametrize("asks", ["{{ strftime_now('%Y-%m-%d, %d %B') }}", "{{ date_string }}"])
def test_date_in_templates_is_fixed(tmp_path, asks):
    template = template_of(asks + STRICT, tmp_path)
    assert template.render(turns("x"))[0].startswith(("2024-07-26, 26 July", "26 Jul 2024"))
    assert datetime.now().year > 2024
    assert template.state["date_string"] == "26 Jul 2024"


# ---------------------------------------------------------------------------------------------------- formats


def sharegpt(conversation):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in conversation]


def as_prompts(conversation):
    return {"prompt": conversation[0]["content"], "completion": conversation[1]["content"]}


@pytest.mark.parametrize("kind", ["conversations", "mixed", "prompts", "lists", "sequence", "named"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    pairs = [turns(f"Question {i}?", f"Answer {i}.") for i in range(20)]
    column, rows = None, [{"messages": each, "source": "s", "id": str(i)} for i, each in enumerate(pairs)]
    expected, _ = load(write(tmp_path / "expected.jsonl", rows))
    path = tmp_path / "a.jsonl"
    if kind == "conversations":
        rows = [{"conversations": sharegpt(each)} for each in pairs]
    elif kind == "mixed":
        rows = [{"messages": sharegpt(each) if i % 2 else each} for i, each in enumerate(pairs)]
    elif kind == "prompts":
        rows = [as_prompts(each) for each in pairs]
    elif kind == "lists":
        rows = [{"prompt": each[:1], "completion": each[1:]} for each in pairs]
    elif kind == "named":
        column, rows = "dialog", [{"dialog": each, "text": "other"} for each in pairs]
    write(path, rows)
    if kind == "sequence":
        path = tmp_path / "saved"
        turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
        columns = [{key: [turn[key] for turn in each] for key in turn} for each in pairs for turn in [each[0]]]
        features = datasets.Features({"messages": {key: datasets.Sequence(value) for key, value in turn.items()}})
        datasets.Dataset.from_list([{"messages": each} for each in columns], features=features).save_to_disk(path)
    found, _ = load(path, text_column=column)
    assert len(found) == len(expected) > 0
    everything = np.arange(len(expected))
    for key, tensor in expected.collate(everything).items():
        np.testing.assert_array_equal(found.collate(everything)[key], tensor, err_msg=key)


def test_text_without_gaps_is_read_as_text_whatever_else_there_is(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i}", "messages": turns("a", "b")} for i in range(10)])
    assert load_documents(str(path)).train.column_names == ["text"]
    assert load_documents(str(path), text_column="messages").train.column_names == ["messages", "row"]


def test_turns_with_other_values_are_rendered(tmp_path):
    path = tmp_path / "saved"
    rows = [{"messages": [turn | {"time": datetime(2024, 1, 1)} for turn in turns("a", "b")]}] * 3
    datasets.Dataset.from_list(rows).save_to_disk(path)
    before = sorted(path.iterdir())
    rows, _ = load(path)
    assert rows.totals.samples == 3
    assert sorted(path.iterdir()) == before  # the cache is elsewhere


def test_message_lists_that_are_strings_are_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": f"just text {i}"} for i in range(10)])
    assert load_documents(str(path)).train.column_names == ["text"]


# -------------------------------------------------------------------------------------------------- too long


def test_conversation_longer_than_a_row_loses_whole_turns_from_its_end(tmp_path):
    tokenizer = tokenizer_of()
    long = turns(*(f"turn number {i} of a long conversation " * 6 for i in range(8)))
    template = ChatTemplate(tokenizer, str(CHATML))
    lengths = [len(template.encode(long[: kept + 1], LONG)[0]) for kept in range(8)]
    path = write(tmp_path / "a.jsonl", [{"messages": long}, {"messages": turns("Hello", "Hi")}])
    for length, kept in ((lengths[7], 8), (lengths[7] - 1, 7), (lengths[5], 6), (lengths[1], 2)):
        rows, _ = load(path, tokenizer, packing=False, max_length=length)
        ids, _ = next(learned(rows))
        assert ids == template.encode(long[:kept], LONG)[0].tolist()
        assert (rows.num_truncated, rows.num_left_out) == (int(kept < 8), 0)
    for length in (lengths[1] - 1, lengths[0]):  # what is left has no answer
        rows, _ = load(path, tokenizer, packing=False, max_length=length)
        assert (len(rows), rows.num_truncated, rows.num_left_out) == (1, 1, 1)
        described = data.describe("train", rows)
        assert "1 conversations were longer than a row and lost turns (1 lost all)" in described
        assert "% of the tokens contribute to the loss" in described
    rows, _ = load(path, tokenizer, packing=False, max_length=lengths[0], loss_on="text")
    assert (len(rows), rows.num_truncated, rows.num_left_out) == (2, 1, 0)


def test_template_that_refuses_a_shortened_conversation_drops_it(tmp_path):
    needs_user = "{% if messages | length < 2 %}{{ raise_exception('no question') }}{% endif %}" + CHATML.read_text()
    (tmp_path / "template.jinja").write_text(needs_user)
    rows = [{"messages": turns("Hello", "Hi")}, {"messages": turns("Hello " * 50, "Hi", system="Be brief.")}]
    rows, _ = load(write(tmp_path / "a.jsonl", rows), max_length=80, chat_template=str(tmp_path / "template.jinja"))
    assert (rows.totals.samples, rows.num_truncated, rows.num_left_out) == (1, 1, 1)


def test_all_conversations_too_long_is_an_error_that_names_max_length(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": turns("a", "b")}] * 5)
    with pytest.raises(UserError, match="all 5 conversations are longer than --max_length"):
        load_run(path, max_length=8)


# -------------------------------------------------------------------------------------------------- bad input

GOOD = turns("Hello", "Hi")


def refusal(path, **changes):
    with pytest.raises(UserError) as caught:
        load(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "the conversation is empty"),
        (None, "the conversation is empty"),
        (turns("Hello"), "the conversation has no assistant turn"),
        ([*GOOD, {"role": "critic", "content": "No!"}], "drops turn 2 (role 'critic')"),
        (turns("Hello", "Hi", system="Be brief."), "drops turn 0 (role 'system')"),
        ([{"role": "assistant", "content": "Hi"}], "the chat template fails: an answer needs a question"),
        ([{"role": "user", "content": 7}, GOOD[1]], "the chat template fails"),
        ([{"role": "user"}, GOOD[1]], "turn 0 of the conversation has no content"),
        ([{"content": "Hello"}, GOOD[1]], "has the role None, not a string"),
        ("Hello", "not a list of turns"),
        (["Hello", "Hi"], "not a list of turns"),
        (GOOD[0], "not a list of turns"),
    ],
    ids=str,
)  # fmt: skip
def test_error_names_the_first_bad_row_and_counts_the_others(tmp_path, bad, says):
    (tmp_path / "strict.jsonl").write_text("")
    (tmp_path / "strict.jinja").write_text(STRICT)
    rows = [{"messages": GOOD}] * 3 + [{"messages": bad}] + [{"messages": GOOD}] * 2 + [{"messages": bad}] * 2
    message = refusal(write(tmp_path / "a.jsonl", rows), chat_template=str(tmp_path / "strict.jinja"))
    assert (
        "a.jsonl: row 3 of the train split (counting from 0): " in message
        and says in message
        and "(and 2 more invalid rows)" in message
    )


def test_error_names_the_row_of_the_dataset_not_of_the_slice(tmp_path):
    rows = [{"messages": GOOD}] * 70 + [{"messages": []}]
    path = write(tmp_path / "a.jsonl", rows)
    args = flags(path)
    documents = load_documents(str(path), start_idx=60)
    template = data.find_template(args, tokenizer_of(), documents.train)
    with pytest.raises(UserError, match=r"row 70 of the train split .*: the conversation is empty$"):
        tokens.tokenize_and_pack(documents.train, template.tokenizer, args, True, "text", template)


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_empty_prompt_or_completion(tmp_path, empty):
    rows = [as_prompts(GOOD), as_prompts(GOOD) | {empty: " "}]
    assert f"row 1 of the train split (counting from 0): the {empty} is empty" in refusal(
        write(tmp_path / "a.jsonl", rows)
    )


def test_mixed_columns(tmp_path):
    rows = [{"messages": GOOD}, {"text": "plain"}, {"text": "plain"}]
    message = refusal(write(tmp_path / "a.jsonl", rows))
    assert "text, messages (1 rows have no text): " in message and "--text_column" in message
    assert "(counting from 0): the conversation is empty (and 1 more" in refusal(
        tmp_path / "a.jsonl", text_column="messages"
    )
    rows = [{"messages": GOOD}, {"conversations": sharegpt(GOOD)}, as_prompts(GOOD)]
    assert "messages, conversations, prompt and completion" in refusal(write(tmp_path / "b.jsonl", rows))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chat_template": None}, "has no chat template: pass one with --chat_template"),
        ({"chat_template": "nowhere.jinja"}, "--chat_template nowhere.jinja cannot be read"),
        ({"loss_on": "answer"}, "--loss_on answer: "),
    ],
    ids=["no template", "missing file", "wrong loss"],
)
def test_flags_that_do_not_fit(tmp_path, changes, says):
    assert says in refusal(write(tmp_path / "a.jsonl", [{"messages": GOOD}]), **changes)


def load_run(path, **changes):
    info = SimpleNamespace(tokenizer=tokenizer_of(), config=LlamaConfig(vocab_size=4096))
    args = argparse.Namespace(packing=None, **vars(flags(path, **changes)))
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 1}
    log = SimpleNamespace(info=lambda *lines: None)
    return data.load(args, info, "abstracts", sizes, torch.device("cpu"), 0, log)


def test_splits_of_different_kinds(tmp_path):
    splits = {
        "train": datasets.Dataset.from_list([{"messages": GOOD}] * 3),
        "validation": datasets.Dataset.from_list([{"text": "plain"}] * 3),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"held out documents are of another kind .*: text instead of messages, row"):
        load_run(tmp_path / "both")


@pytest.mark.parametrize("damaged", ["*.arrow", "*.pt"])
def test_damaged_cache_is_an_error_that_names_its_directory(tmp_path, damaged):
    path = write(tmp_path / "a.jsonl", [{"messages": GOOD}] * 3)
    load_run(path)
    for file in (tmp_path / "cache" / "rows").glob(damaged):
        file.write_bytes(file.read_bytes()[:-8] if damaged == "*.pt" else b"")
    with pytest.raises(UserError, match=r"the cache in .*/cache/rows cannot be written, or is damaged"):
        load_run(path)


def test_check_of_a_role_does_not_depend_on_earlier_rows(tmp_path):
    first_only = (
        "{% for message in messages %}{% if message.role != 'system' or loop.first %}[{{ message.role }}]"
        "{{ message.tool_calls or message.content }}{% endif %}{% endfor %}"
    )
    (tmp_path / "template.jinja").write_text(first_only)
    good = [*turns("a", "b", system="Be brief."), GOOD[0] | {"tool_calls": "tools"}, GOOD[1]]
    bad = [*turns("a", "b"), {"role": "system", "content": "late"}, *GOOD]
    for rows in ([good, bad], [bad, good]):
        path = write(tmp_path / f"{rows.index(bad)}.jsonl", [{"messages": each} for each in rows])
        message = refusal(path, chat_template=str(tmp_path / "template.jinja"), loss_on="text")
        assert message.endswith(
            f"row {rows.index(bad)} of the train split (counting from 0): the chat template drops "
            "turn 2 (role 'system')"
        )


def test_flags_for_conversations_are_refused_for_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert "contains no conversations" in refusal(path)
    assert "--loss_on assistant" in refusal(path, chat_template=None, loss_on="assistant")
