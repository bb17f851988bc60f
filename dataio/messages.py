"""Text for people and files: without secrets, and without characters that a terminal would obey."""

from __future__ import annotations

import re
import unicodedata

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


def printable(text: str) -> str:
    """The text with control characters written as escapes, so that names in data cannot move the cursor or hide what follows.

    Line breaks and tabs stay.
    """
    return "".join(
        c if c in "\n\t" or not _controls(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")
