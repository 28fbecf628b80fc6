"""Settings of hypothesis with a third of the examples named, or all with --long. Each run draws others."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

LONG = "long"


def load_profile(long: bool) -> None:
    """Set what `examples` goes by, before any test file is imported."""
    settings.register_profile("short", deadline=None, max_examples=40)
    settings.register_profile(LONG, deadline=None)
    settings.load_profile(LONG if long else "short")


def examples(most: int, **options: Any) -> settings:
    """Return settings with `most` examples, or a third of them."""
    share = 1 if settings.get_current_profile_name() == LONG else 3
    return settings(max_examples=most // share, deadline=None, **options)
