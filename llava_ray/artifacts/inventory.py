"""What lies in a storage, why one artifact is another than the last of its kind, what can go."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_ray.artifacts.records import ChosenVariant, Record, SweepResult

_SHOWN = 60
"""Characters of a value that are shown."""


def describe(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each artifact, and below it how it differs from the last of its kind.

    `records` in the order in which they were made. Variants compare with those of their slug.
    """
    last: dict[tuple[str, Any], Record] = {}
    for record in records:
        yield f"{record.id}  {record.created}  {record.size_bytes / 1e6:,.1f} MB  {record.uri}"
        like = (record.kind, record.settings.get("slug", getattr(record, "slug", None)))
        if like in last:
            yield from (f"    {line}" for line in differences(last[like], record))
        last[like] = record


def differences(before: Record, after: Record) -> Iterator[str]:
    """Yield each setting, file, version, revision and parent that is another."""
    yield from changes(before.settings, after.settings)
    if before.code_revision != after.code_revision:
        yield f"revision of the code: {before.code_revision} -> {after.code_revision}"
    elif before.code_digest != after.code_digest:
        yield f"code, said to be without effect: {before.code_digest} -> {after.code_digest}"
    if set(before.parents) != set(after.parents):
        gone, new = (
            ", ".join(sorted(set(a.parents) - set(b.parents))) or "nothing"
            for a, b in ((before, after), (after, before))
        )
        yield f"made from: {gone} -> {new}"


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield each setting that is another, sections by dotted keys below `prefix`."""
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def unneeded(records: Sequence[Record]) -> list[Record]:
    """Return what no chosen variant, no deployment and no sweep was made from, and from what none
    was made that is newer: a line that is under way, or of another project, is not touched."""
    by_id = {record.id: record for record in records}
    roots = [r.id for r in records if isinstance(r, ChosenVariant | SweepResult)]
    if not roots:
        return []
    done = max(by_id[name].created for name in roots)
    roots += [record.id for record in records if record.created > done]
    needed, left = set[str](), roots
    while left:
        name = left.pop()
        if name in by_id and name not in needed:
            needed.add(name)
            left += by_id[name].parents
    # A deployment is needed with its choice, and nothing is made from it.
    needed |= {r.id for r in records if r.kind == "deployment" and needed & set(r.parents)}
    return [record for record in records if record.id not in needed]


def made_from(records: Sequence[Record], roots: Sequence[Record]) -> list[Record]:
    """Return the roots and all that was made from them; `records` in the order of their making."""
    found = {record.id: record for record in roots}
    for record in records:
        if not found.keys().isdisjoint(record.parents):
            found[record.id] = record
    return list(found.values())
