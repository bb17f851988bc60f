"""Text for people and files: without secrets, and without characters that a terminal would obey."""

from __future__ import annotations

import re

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


def _escape(character: str) -> str:
    return ascii(character)[1:-1]
