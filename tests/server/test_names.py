"""The names of models: what each stands for, and which ones adapters cannot have."""

from __future__ import annotations

import pytest

from inlaid.engine.refusal import RefusalKind, Refused
from inlaid.server.names import ModelNames

NAMES = ModelNames("demo", "models/demo/base")


def test_an_adapter_has_two_names_and_the_base_three() -> None:
    for model in ("maths", "demo:maths"):
        assert NAMES.resolve(model, ["maths"]) == "maths"
    for model in ("", "demo", "models/demo/base"):
        assert NAMES.resolve(model, ["maths"]) is None
    with pytest.raises(Refused, match="'demo:code' does not exist here") as error:
        NAMES.resolve("demo:code", ["maths"], "lora_path")
    assert (error.value.refusal.kind, error.value.refusal.param) == (RefusalKind.NOT_FOUND, "lora_path")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("demo:maths", "means the adapter"),
        ("demo:", "means the adapter"),
        ("demo", "a name of the base"),
        ("models/demo/base", "a name of the base"),
        ("", "printable"),
        ("a\nb", "printable"),
        ("a" * 257, "256"),
    ],
)
def test_names_that_collide_are_refused(name: str, why: str) -> None:
    assert why in (NAMES.why_not(name) or "")


def test_other_names_are_free() -> None:
    for name in ("maths", "demon:x", "a:b", "x" * 256, "über"):
        assert NAMES.why_not(name) is None
