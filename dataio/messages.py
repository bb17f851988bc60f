"""Text for people and files: without secrets, and without characters that a terminal would obey."""

from __future__ import annotations

import logging
import re
import sys

# Parameters of signed URLs and connection strings whose values are secret, wherever they stand
_SECRETS = re.compile(
    r"\b(X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AccountKey|SharedAccessSignature|sig)"
    r"=[^\s&\"';,]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without the secrets that URLs may contain: user info and query strings (SAS secrets, signatures)."""
    text = re.sub(r"(://[^\s\"'?]*)\?[^\s\"']*", r"\1", text)
    text = re.sub(r"://[^/\s\"']*@", "://", text)
    return _SECRETS.sub(r"\1=***", text)


def printable(text: str, kept: str = "\n\t") -> str:
    """The text with control characters written as escapes, so that names in data cannot move the cursor or hide what follows.

    The characters in `kept` stay: line breaks and tabs, or none for text that must be one line.
    """
    return "".join(c if c in kept or c.isprintable() else _escape(c) for c in text)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 episode`, `2 episodes`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def say(text: object, *, error: bool = False, start: str = "", end: str = "\n") -> None:
    """Print text for people, made `printable`. It may contain names from data, so Tiphys prints in no other way.

    error        to the standard error output instead of the standard output
    start, end   printed as they are: `start="\\r"` writes over the line of before
    """
    stream = sys.stderr if error else sys.stdout
    stream.write(f"{start}{printable(str(text))}{end}")
    stream.flush()


def logger(name: str) -> logging.Logger:
    """The logger of this name. Its messages are made `printable`, and secrets are removed from them."""
    found = logging.getLogger(name)  # noqa: TID251
    if _clean not in found.filters:
        found.addFilter(_clean)
    return found


def _clean(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(printable(record.getMessage())), None
    return True


def _escape(character: str) -> str:
    return ascii(character)[1:-1]
