"""`${key}` in a recipe: the value of another key of the same recipe, and of nothing else.

A recipe goes into checkpoints, model cards and published policies, and its URLs go to servers. So `${oc.env:NAME}` and every
other resolver of OmegaConf is refused: it could carry a secret of this machine there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

MOST_VALUES = 5_000
LONGEST = 10_000  # characters of a text
DEEPEST = 20  # keys that refer to each other

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_KEY = re.compile(r"\w+(\.[\w-]+|\[\d+\])*")
ABSENT = object()


class _Unresolved(ValueError):
    """Why a `${…}` has no value."""


def resolve(values: Any, default: Callable[[str], Any]) -> tuple[Any, list[tuple[str, str]]]:
    """A copy of a recipe's values in which each `${key}` is replaced, and (key path, reason) for each that cannot be.

    default  gives the default of a key path that the values do not have, or ABSENT
    """
    resolver = _Resolver(values, default)
    return resolver.copy(values, ""), resolver.errors


class _Resolver:
    def __init__(self, values: Any, default: Callable[[str], Any]) -> None:
        self.root, self.default = values, default
        self.errors: list[tuple[str, str]] = []
        self.left = MOST_VALUES
        self.open: list[str] = []  # the keys whose values are being looked up

    def copy(self, node: Any, path: str) -> Any:
        """A copy of a node; where a text cannot be resolved, it stays and is an error."""
        if isinstance(node, str) and "${" in node:
            try:
                return self.text(node)
            except _Unresolved as error:
                self.errors.append((path, str(error)))
                return node
        if isinstance(node, dict):
            return {key: self.copy(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.copy(value, f"{path}[{i}]") for i, value in enumerate(node)]
        return node

    def text(self, text: str) -> Any:
        found = list(_REFERENCE.finditer(text))
        if _REFERENCE.sub("", text).find("${") >= 0:
            raise _Unresolved(f"{shown(text)}: `${{` begins a reference to a key; write it as ${{section.key}}")
        if len(found) == 1 and found[0].group() == text:
            return self.reference(found[0])
        out, at = "", 0
        for match in found:
            value = self.reference(match)
            if isinstance(value, dict | list) or value is None:
                raise _Unresolved(f"{match.group()} is not a text or number that can be part of a text")
            out += text[at : match.start()] + str(value)
            at = match.end()
            if len(out) > LONGEST:
                raise _Unresolved(f"the text would have more than {LONGEST} characters")
        return out + text[at:]

    def reference(self, match: re.Match[str]) -> Any:
        key = match[1].strip()
        if ":" in key:
            raise _Unresolved(
                f"{match.group()} calls the resolver {key.partition(':')[0]!r}; a recipe is stored in checkpoints and published "
                "policies, so ${…} may only name a key of the recipe, such as ${run.dir}"
            )
        if not _KEY.fullmatch(key):
            raise _Unresolved(
                f"{match.group()}: {key!r} is not a key of the recipe; write its whole path, such as run.dir"
            )
        if key in self.open:
            raise _Unresolved(f"{match.group()}: the value would contain itself ({' -> '.join([*self.open, key])})")
        if len(self.open) >= DEEPEST:
            raise _Unresolved(f"{match.group()}: more than {DEEPEST} keys refer to each other")
        self.open.append(key)
        try:
            return self.resolved(self.find(key, match.group()))
        finally:
            self.open.pop()

    def find(self, key: str, shown: str) -> Any:
        node: Any = self.root
        for name, index in re.findall(r"([\w-]+)|\[(\d+)\]", key):
            inner: Any = int(index) if index else name
            inside = inner < len(node) if index and isinstance(node, list) else isinstance(node, dict) and inner in node
            if not inside:
                value = self.default(key)
                if value is ABSENT:
                    raise _Unresolved(f"{shown}: the recipe has no key {key!r}")
                return value
            node = node[inner]
        return node

    def resolved(self, node: Any) -> Any:
        """A resolved copy of what a reference names. Its size counts, because references to references multiply."""
        self.left -= 1
        if self.left < 0:
            raise _Unresolved(f"the references of the recipe make more than {MOST_VALUES} values")
        if isinstance(node, str) and "${" in node:
            return self.text(node)
        if isinstance(node, dict):
            return {key: self.resolved(value) for key, value in node.items()}
        if isinstance(node, list):
            return [self.resolved(value) for value in node]
        return node


def shown(text: str) -> str:
    """A text for a message, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:60] + "…")
