"""What an error of a hub's client means, in one sentence without secrets."""

from __future__ import annotations

import os
import re

from tiphys.dataio.errors import Explained


class FetchError(Explained, RuntimeError):
    """A policy could not be fetched. The message says from where, why, and what to do."""


_HINTS = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "this key has no permission there",
    404: "check the name, and log in with `hf auth login` if it is private",
    429: "the hub gets too many requests; try again later",
}


def hub_message(url: str, error: Exception) -> str:
    """What an error of a hub's client says, in one line without secrets, and what to do."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and os.environ.get("HF_HUB_OFFLINE") in ("1", "true")
    ):
        return f"{url}: HF_HUB_OFFLINE is set, so the hub cannot be used; unset it"
    status = getattr(getattr(error, "response", None), "status_code", 0) or 0
    kind = type(error).__name__
    said = " ".join(str(error).split())[:300] or kind
    if not status:
        place = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return without_secrets(
            f"{url}: the hub {place} cannot be reached ({kind}: {said}); check the network, then try again"
        )
    hint = _HINTS.get(status, "the hub has a fault; try again later" if status >= 500 else "")
    return without_secrets(f"{url}: {said}" + (f"; {hint}" if hint else ""))


def without_secrets(text: str) -> str:
    """The text, with everything that looks like a hub's key replaced by ***."""
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"hf_\w{8,}", "***", text)
