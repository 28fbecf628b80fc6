"""The state that the page shows, as sections of rows, and the difference between two states.

A section maps a key to a value. A delta holds the values that are new or changed, and the keys that are gone; the page
merges it into its own state. Sections that a viewer may not see are left out of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Section = dict[str, Any]
State = dict[str, Section]
Delta = dict[str, dict[str, Any]]


def difference(before: Mapping[str, Section], after: Mapping[str, Section]) -> Delta:
    """Return {section: {"set": {key: value}, "drop": [keys]}} for the sections that changed."""
    found: Delta = {}
    for name in before.keys() | after.keys():
        old, new = before.get(name, {}), after.get(name, {})
        changed: dict[str, Any] = {}
        if fresh := {key: value for key, value in new.items() if key not in old or old[key] != value}:
            changed["set"] = fresh
        if gone := [key for key in old if key not in new]:
            changed["drop"] = gone
        if changed:
            found[name] = changed
    return found


def merged(before: Mapping[str, Section], delta: Mapping[str, Mapping[str, Any]]) -> State:
    """Return the state after a delta; sections without keys count as none. The page does the same in stream.js."""
    after = {name: dict(section) for name, section in before.items()}
    for name, changed in delta.items():
        section = after.setdefault(name, {})
        section.update(changed.get("set", {}))
        for key in changed.get("drop", ()):
            section.pop(key, None)
    return {name: section for name, section in after.items() if section}
