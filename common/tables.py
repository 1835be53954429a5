"""Tables and texts for a terminal or a Markdown file."""

import html
import re
from collections.abc import Sequence

import tabulate

tabulate.MIN_PADDING = 0  # columns need not be wider than their heads


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] | None = None) -> str:
    """Returns a Markdown table whose columns also line up in a terminal.

    Args:
        left: heads of the left-aligned columns, the others are right-aligned; default: all of them.
    """
    return tabulate.tabulate(
        [[cell.replace("|", "\\|") for cell in row] for row in [heads, *rows]],
        headers="firstrow",
        tablefmt="pipe",
        colalign=["left" if left is None or head in left else "right" for head in heads],
        disable_numparse=True,
    )


def shown(value: float | None, form: str = "{}") -> str:
    """Returns a formatted number, or a dash if there is none."""
    return "–" if value is None else form.format(value)


def gib(value: float | None) -> str:
    return shown(value, "{:.2f}" if value is not None and value < 10 else "{:,.1f}")


def side_by_side(heads: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Returns the texts in columns under their heads, wrapped to lines of at most `width` characters."""
    each = max(10, width // len(heads) - 3)
    return tabulate.tabulate(
        [list(map(printable, texts))],
        headers=list(map(printable, heads)),
        tablefmt="presto",
        maxcolwidths=each,
        maxheadercolwidths=each,
        disable_numparse=True,
    )


def printable(text: str) -> str:
    """Returns the text as one line without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text).strip()


def escaped(text: str) -> str:
    """Returns the text as one line of Markdown that shows it literally. `table` escapes the vertical bar."""
    text = re.sub(r"([\\`*_\[\]#~$])", r"\\\1", html.escape(text.strip(), quote=False))
    return "<br>".join(text.splitlines())
