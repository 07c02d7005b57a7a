"""Text from outside, such as file names, class names and messages of servers, made safe for a console, log, CSV or Markdown."""

import re
from collections.abc import Iterable, Sequence

from utils.urls import without_secrets

CONTINUATION = "  "  # start of every line of a log record after its first line; records start in the first column
_FORMULA_STARTS = ("=", "+", "-", "@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # control the terminal, or the order of characters
_BARE_LINE = re.compile(r"(?<!\\)\|")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~<>&$-])")


def printable(text: object) -> str:
    """Text for a console or a log, in which no name or message can imitate another log line.

    Control characters (escape sequences, carriage returns), Unicode's invisible and direction-changing characters and invalid
    Unicode are replaced by their Python escapes. Lines after the first one are indented. URLs lose their secrets, see
    ``utils.urls.without_secrets``.
    """
    return f"\n{CONTINUATION}".join(map(escape, without_secrets(str(text)).split("\n")))


def escape(text: str) -> str:
    """Replace every character that is not printable by its Python escape, including line breaks but not tabs."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character == "\t" else ascii(character)[1:-1] for character in text)


def csv_cell(value: object) -> object:
    """Value of a CSV cell, in which control characters are replaced by their Python escapes.

    Text that a spreadsheet would execute as a formula gets a leading apostrophe; numbers do not.
    """
    if not isinstance(value, str):
        return value
    value = _CONTROL.sub(lambda match: ascii(match.group())[1:-1], value)
    if not value.startswith(_FORMULA_STARTS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def markdown(text: object) -> str:
    """Text as Markdown that shows exactly this text: without markup, HTML, lists or line breaks."""
    return re.sub(r"^(\d+)\.", r"\1\\.", _MARKDOWN.sub(r"\\\1", escape(str(text))))


def markdown_code(text: object) -> str:
    """Text as a Markdown code span."""
    shown = escape(str(text))
    fence = code_fence(shown, minimum=1)
    return f"{fence}{shown}{fence}" if fence == "`" else f"{fence} {shown} {fence}"


def code_fence(text: str, *, minimum: int = 3) -> str:
    """Backticks that delimit ``text`` as code in Markdown: more of them than anywhere in the text."""
    return "`" * max(minimum, 1 + max(map(len, re.findall("`+", text)), default=0))


def markdown_table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table. Cells are Markdown: escape text from outside with ``markdown`` or ``markdown_code``.

    A vertical line would end its cell, also within code, so it is escaped.
    """
    escaped = ([_BARE_LINE.sub(r"\|", str(cell)) for cell in row] for row in (header, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([first, "|---" * len(header) + "|", *others])


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
