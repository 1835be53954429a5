"""Conversations as tokens: rendered by a chat template, with a mask of the tokens that the assistant says."""

import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.errors import UserError, one_line

# The roles that a `from` of ShareGPT's format stands for; any other name is a role of its own.
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# What templates take for today, so that neither the tokens nor their cache depend on the day. It is what Llama-3.2's
# template itself falls back to.
TODAY = date(2024, 7, 26)
DATE_STRING = TODAY.strftime("%d %b %Y")
# Put before a template that asks for the date: a strftime of that one day.
CODES = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "YymdBbAajHMS")
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{CODES} }}}}{{%- endmacro +%}}"


def render_conversations(*columns: list) -> dict[str, list]:
    """Brings conversations into one form.

    Args:
        columns: one of lists of turns, each with `role` and `content` or with `from` and `value`; or one of prompts and
            one of completions, each a string or a list of turns. Last the row numbers.

    Returns:
        Columns `messages`, JSON of a list of turns with `role` and `content`, or of a string that says what is wrong;
        and `row`.
    """
    *columns, rows = columns
    names = (
        [("the prompt", "user"), ("the completion", "assistant")] if len(columns) == 2 else [("the conversation", "")]
    )
    messages = []
    for values in zip(*columns, strict=True):
        try:
            turns = [turn for name, value in zip(names, values, strict=True) for turn in _turns(value, *name)]
        except UserError as error:
            turns = str(error)
        messages.append(json.dumps(turns))
    return {"messages": messages, "row": rows}


def _turns(value, name, role):
    """The turns of a conversation, or of a prompt or completion, which may be a string: what `role` says."""
    if role and isinstance(value, str):
        value = [{"role": role, "content": value}] if value.strip() else []
    if isinstance(value, dict):  # `datasets` turns a Sequence of dicts into a dict of lists
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
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
            raise UserError(f"turn {number} of {name} has no role")
        if turn.get("content") is None and "tool_calls" not in turn:
            raise UserError(f"turn {number} of {name} has no content")
    return turns


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: gets the template of `file`, if given, so that it is also saved with the model.
        file: a Jinja template (--chat_template).

    Attributes:
        state: what a resumed run must have in common with the earlier one.

    Raises:
        UserError: there is no template, it cannot be read, or the tokenizer cannot say where its tokens are.
    """

    def __init__(self, tokenizer: Tokenizer, file: str | None = None):
        try:
            if file:
                tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
            template = tokenizer.get_chat_template()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template {file} cannot be read: {one_line(error)}") from error
        except ValueError as error:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: --chat_template names a file with "
                "one, such as common/chatml.jinja"
            ) from error
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} cannot tell where in a text its tokens are")
        self.tokenizer = tokenizer
        self.template = FIXED_DATE + template if "strftime_now" in template else template
        self.state = {"chat_template": hashlib.sha256(template.encode()).hexdigest()[:12], "date_string": DATE_STRING}
        self.marks_assistant = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self.known_roles = {}  # whether the template renders what a role says

    def render(self, turns: list[dict], header: bool = False, **options: Any) -> Any:
        """The conversation as text, or what the `options` of transformers' `apply_chat_template` ask for.

        Args:
            header: whether the header of an assistant's turn follows.

        Raises:
            UserError: the template fails.
        """
        options = {"tokenize": False, "date_string": DATE_STRING, "add_generation_prompt": header} | options
        try:
            return self.tokenizer.apply_chat_template(turns, chat_template=self.template, **options)
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(f"the chat template fails: {one_line(error, 200)}") from error

    def prompt(self, text: str) -> str:
        """`text` as a user's turn, up to where the assistant begins."""
        return self.render([{"role": "user", "content": text}], header=True)

    def encode(self, turns: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, whether the assistant says the token), int32 and bool [tokens].

        Raises:
            UserError: the template fails, leaves out a turn, or does not show which tokens are the assistant's.
        """
        self._check_roles(turns)
        if self.marks_assistant:
            encoded = self.render(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], bool)
        text = self.render(turns)
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        first, last = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        mask = np.zeros(len(first), dtype=bool)
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before, after = self._prefixes(turns, number)
                if not text.startswith(after) or not after.startswith(before):
                    raise UserError(
                        "the chat template renders earlier turns differently once others follow, so it is unclear "
                        "which tokens are the assistant's: use --chat_template with a template that marks them with "
                        "{% generation %}"
                    )
                mask |= (first < len(after)) & (last > len(before))
        return np.array(encoded["input_ids"], np.int32), mask

    def _prefixes(self, turns, number):
        """The text up to where an assistant's turn begins, its header included, and up to where it ends."""
        after = self.render(turns[: number + 1])
        if number:
            return self.render(turns[:number], header=True), after
        header = self.render(turns[:1], header=True).removeprefix(after)
        return after[: after.find(header) + len(header)], after

    def _check_roles(self, turns):
        """Raises UserError if the template silently leaves out what a role says."""
        for number, turn in enumerate(turns):
            role, content = turn["role"], turn.get("content")
            if role not in self.known_roles and isinstance(content, str):
                longer = [*turns[:number], turn | {"content": content + "."}, *turns[number + 1 :]]
                self.known_roles[role] = self.render(longer) != self.render(turns)
            if not self.known_roles.get(role, True):
                raise UserError(f"the chat template leaves out turn {number}, whose role is {role!r}")

    def fit(self, messages: str, max_length: int, assistant_only: bool) -> tuple[Any, Any, int, str | None]:
        """The tokens of a conversation; one longer than a row loses whole turns from its end until it fits.

        Args:
            messages: as `render_conversations` makes them.
            max_length: T, tokens per row.
            assistant_only: whether only the assistant's tokens contribute to the loss.

        Returns:
            (token ids, whether each contributes to the loss, number of turns lost, what is wrong or None). There are no
            ids if no turn is left to learn from.
        """
        turns, lost = json.loads(messages), 0
        try:
            if isinstance(turns, str):
                raise UserError(turns)
            ids, mask = self.encode(turns)
            if assistant_only and not mask.any():
                raise UserError("the conversation has no assistant turn")
            while len(ids) > max_length and lost < len(turns) - 1:
                lost += 1
                ids, mask = self.encode(turns[:-lost])
        except UserError as error:
            return [], [], 0, str(error)
        if len(ids) > max_length or (assistant_only and not mask[1:].any()):
            return [], [], len(turns), None
        return ids, mask, lost, None
