"""The fields that the names in a source become. Two names that become one field are an error, never an overwrite."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tiphys.dataio.convert.infer import renamed_role, role_of
from tiphys.dataio.episode import DataError, TaskSpec

_FLAT = ("reward", "terminated", "truncated")  # an array cannot be nested below these


class AmbiguousNames(DataError):
    """Two things in the source have one name: two arrays, or two episodes. Neither is malformed, so `skip_bad` skips neither."""


class FieldNames:
    """Names in the source -> names of fields, with the entries of a mapping file that address names in the source.

    Parameters
    ----------
    entries : Mapping[str, Any], optional
        The section `fields` of a mapping file. A key that is a name in the source renames or drops that array here, before
        two names can collide. `Mapping.resolve` handles the other keys and settings.
    """

    def __init__(self, entries: Mapping[str, Any] | None = None):
        self._entries = dict(entries or {})
        self.seen: dict[str, tuple[str, str | None]] = {}  # name in the source -> (usual field, field; None if dropped)

    def fields(self, usual: Mapping[str, str], where: str) -> dict[str, str]:
        """The field of each name in one episode (or in one file, if all its episodes have the same names).

        Parameters
        ----------
        usual : Mapping[str, str]
            Name in the source -> field that it becomes without a mapping file.
        where : str
            The episode or file, for messages.

        Returns
        -------
        dict[str, str]
            Name in the source -> field. Dropped names are absent.

        Raises
        ------
        AmbiguousNames
            If two names would become one field.
        """
        out: dict[str, str] = {}
        owners: dict[str, str] = {}
        for source, name in usual.items():
            settings = self._entries.get(address(source, self._entries, usual), {})
            field = None if settings.get("drop") else str(settings.get("name", name))
            self.seen[source] = (name, field)
            if field is None:
                continue
            if field in owners:
                raise AmbiguousNames(_collision(owners[field], source, field, {*usual.values()}, where))
            owners[field] = source
            out[source] = field
        return out

    def with_roles(self, task: TaskSpec) -> TaskSpec:
        """The task in which renamed fields keep the role of their usual name, unless the new name states another role."""
        usual = {field: name for name, field in self.seen.values() if field is not None and field != name}
        return replace(
            task,
            fields=tuple(
                replace(f, role=renamed_role(role_of(usual[f.name], f.modality), f.name, f.modality))
                if f.name in usual
                else f
                for f in task.fields
            ),
        )


def address(source: str, entries: Mapping[str, Any], sources: Mapping[str, Any]) -> str:
    """The key by which a mapping file addresses a name in the source: the name itself, or with `.` in place of `/`."""
    dotted = source.replace("/", ".")
    return source if source in entries or dotted in sources else dotted


def _collision(first: str, second: str, field: str, taken: set[str], where: str) -> str:
    head, _, rest = field.partition(".")
    last = re.sub(r"[^A-Za-z0-9_-]", "_", second.replace("/", ".").rpartition(".")[2])
    other = f"info.{last}" if head in _FLAT else f"{field}.{last}" if head == field and not rest else f"{field}_2"
    while other in taken or len(other) > 64:
        other = other[:60] + "_2" if not other.endswith("_2") else other[:-2] + "_3"
    key = second if re.fullmatch(r"[\w./-]+", second) else json.dumps(second)
    return (
        f"{where}: {first!r} and {second!r} would both become the field {field!r}. Name one of them in a mapping file "
        f"(`fields: {{{key}: {{name: {other}}}}}`), or leave it out (`fields: {{{key}: drop}}`)"
    )
