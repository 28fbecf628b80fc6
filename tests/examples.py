"""Settings of hypothesis with half of the examples named, or all with --long. Each run draws others."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

LONG = "long"


def load_profile(long: bool) -> None:
    """Set what `examples` goes by, before any test file is imported."""
    for name in ("short", LONG):
        settings.register_profile(name, deadline=None)
    settings.load_profile(LONG if long else "short")


def examples(most: int, **options: Any) -> settings:
    """Return settings with `most` examples, or half of them."""
    share = 1 if settings.get_current_profile_name() == LONG else 2
    return settings(max_examples=most // share, deadline=None, **options)
