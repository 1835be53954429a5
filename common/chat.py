"""Tokenizes conversations with a chat template and marks the assistant's tokens."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from common.errors import UserError, one_line

# Roles of ShareGPT's `from` values; any other value is a role itself.
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# The date in templates. Fixed, so that tokens and cache do not depend on the day; it is Llama-3.2's own default.
TODAY = date(2024, 7, 26)
DATE_STRING = TODAY.strftime("%d %b %Y")
# Prepended to a template that calls `strftime_now`, to format TODAY instead. (A function passed to the template would
# not reach it: transformers replaces everything but plain data.)
REPLACEMENTS = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "YymdBbAajHMS")
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{REPLACEMENTS} }}}}{{%- endmacro +%}}"


def render_conversations(*columns: list) -> dict[str, list]:
    """Converts conversations to one format.

    Args:
        columns: conversations, as lists of turns with `role` and `content` or `from` and `value`; or prompts and
            completions, as strings or lists of turns. Last the row numbers.

    Returns:
        Columns `messages`, JSON of a list of turns or of an error message; and `row`.
    """
    *parts, rows = columns
    pair: list[tuple[str, str | None]] = [("the prompt", "user"), ("the completion", "assistant")]
    names = pair if len(parts) == 2 else [("the conversation", None)]
    messages = []
    for values in zip(*parts, strict=True):
        try:
            turns: Any = [turn for value, name in zip(values, names, strict=True) for turn in _turns(value, *name)]
        except UserError as error:
            turns = str(error)
        messages.append(json.dumps(turns, default=str))  # some datasets have the time of each turn
    return {"messages": messages, "row": rows}


def _turns(value: Any, name: str, role: str | None) -> list[dict]:
    """Returns the turns of a conversation, a prompt or a completion; with a `role`, a string is one turn."""
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}] if value.strip() else []
    if isinstance(value, dict) and {type(items) for items in value.values()} == {list}:  # a Sequence of `datasets`
        value = [dict(zip(value, items, strict=True)) for items in itertools.zip_longest(*value.values())]
    if not value:
        raise UserError(f"{name} is empty")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{name} is {one_line(value, 60)!r}, not a list of turns with role and content")
    turns = [{key: item for key, item in turn.items() if item is not None} for turn in value]
    for number, turn in enumerate(turns):
        if "role" not in turn and "from" in turn:
            sender = turn.pop("from")
            turn |= {"role": ROLES.get(str(sender), sender), "content": turn.pop("value", None)}
        if not isinstance(turn.get("role"), str):
            raise UserError(f"turn {number} of {name} has the role {turn.get('role')!r}, not a string")
        if turn.get("content") is None and "tool_calls" not in turn:
            raise UserError(f"turn {number} of {name} has no content")
    return turns


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: gets the template of `file`, if given, which is then saved with the model.
        file: a Jinja template (--chat_template).

    Attributes:
        source: the template's text, with the fixed date.
        state: must be unchanged when a run resumes.

    Raises:
        UserError: the template is missing or cannot be read, or the tokenizer has no character offsets.
    """

    def __init__(self, tokenizer: Tokenizer, file: str | None = None):
        try:
            if file:
                tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8-sig")
            template = tokenizer.get_chat_template()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template {file} cannot be read: {one_line(error)}") from error
        except ValueError as error:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: pass one with --chat_template, for "
                "example common/chatml.jinja"
            ) from error
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no character offsets: it is not a fast one")
        self.tokenizer = tokenizer
        self.source = FIXED_DATE + template if "strftime_now" in template else template
        self.state = {"chat_template": hashlib.sha256(template.encode()).hexdigest()[:12], "date_string": DATE_STRING}
        self._has_generation_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._rendered_roles: set[str] = set()  # whose content is known to appear in the text

    def render(self, turns: list[dict], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text and the character spans of its {% generation %} blocks."""
        options = self.tokenizer.special_tokens_map | {"date_string": DATE_STRING} | options
        options |= {"chat_template": self.source, "return_assistant_tokens_mask": self._has_generation_blocks}
        try:
            texts, spans = cast(tuple, render_jinja_template([turns], **options))  # it is annotated as `str`
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(f"the chat template fails: {one_line(error, 200)}") from error
        return texts[0], spans[0] if spans else []

    def encode(
        self, turns: list[dict], max_length: int, assistant_only: bool = True
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokenizes a conversation; if longer than `max_length` tokens, it loses turns from its end until it fits.

        Returns:
            (token ids, loss mask, number of dropped turns), int32 and bool [tokens]; no tokens if nothing fits.

        Raises:
            UserError: the template fails, drops a turn, or does not show which tokens are the assistant's.
        """
        self._check_roles(turns)
        for kept in range(len(turns), 0, -1):
            try:
                text, blocks = self.render(turns[:kept])
            except UserError:
                if kept == len(turns):
                    raise
                continue  # a template may refuse the beginning of a conversation that it accepts
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            if len(encoded["input_ids"]) <= max_length:
                break
        else:
            return np.empty(0, np.int32), np.empty(0, bool), len(turns)
        first, last = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        mask = np.zeros(len(first), dtype=bool)
        spans = self._assistant_spans(turns[:kept], text, blocks) if assistant_only else [(0, len(text))]
        for begin, end in spans:
            mask |= (first < end) & (last > begin)
        return np.array(encoded["input_ids"], dtype=np.int32), mask, len(turns) - kept

    def _assistant_spans(self, turns: list[dict], text: str, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns the character spans of the assistant's turns: generation blocks, or differences between prefixes."""
        if self._has_generation_blocks:
            return blocks
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            after, _ = self.render(turns[: number + 1])
            before, _ = self.render(turns[: number or 1], add_generation_prompt=True)
            if not number:  # there is no prefix without this turn: look for the header that is added after it
                header = before.removeprefix(after)
                before = after[: after.find(header) + len(header)] if header in after else header
            if not text.startswith(after) or not after.startswith(before):
                raise UserError(
                    "the chat template renders a turn differently when others follow, so the assistant's tokens "
                    "cannot be located: pass --chat_template with a template that encloses them in {% generation %}"
                )
            spans.append((len(before), len(after)))
        return spans

    def _check_roles(self, turns: list[dict]) -> None:
        """Raises UserError if the template silently drops the content of a turn."""
        for number, turn in enumerate(turns):
            role, content = turn["role"], turn.get("content")
            if isinstance(content, str) and role not in self._rendered_roles and "tool_calls" not in turn:
                longer = [*turns[:number], turn | {"content": content + "."}, *turns[number + 1 :]]
                if self.render(longer) == self.render(turns):
                    raise UserError(f"the chat template drops turn {number} (role {role!r})")
                self._rendered_roles |= {role} & {"user", "assistant"}  # others may depend on where the turn is

    def encode_row(
        self, messages: str, max_length: int, assistant_only: bool
    ) -> tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray, int, str | None]:
        """Tokenizes one of the `messages` of `render_conversations`.

        Returns:
            The tuple of `encode`, without tokens if none contributes to the loss; and an error message or None.
        """
        turns = json.loads(messages)
        try:
            if isinstance(turns, str):
                raise UserError(turns)
            if assistant_only and all(turn["role"] != "assistant" for turn in turns):
                raise UserError("the conversation has no assistant turn")
            ids, mask, dropped = self.encode(turns, max_length, assistant_only)
            if not assistant_only or mask[1:].any():
                return ids, mask, dropped, None
            if not dropped:
                raise UserError("the chat template marks no token as the assistant's")
        except UserError as error:
            return [], [], 0, str(error)
        return [], [], len(turns), None
