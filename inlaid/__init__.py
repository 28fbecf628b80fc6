"""inlaid: one quantized base model, hundreds of LoRA adapters inlaid in it, each served as its own model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlaid.engine.request import SamplingParams
    from inlaid.llm import LLM
    from inlaid.program import Program

__version__ = "0.1.0"
__all__ = ("LLM", "Program", "SamplingParams", "__version__")


def __getattr__(name: str) -> Any:
    """Load the heavy names on first use, so that `import inlaid` stays instant and free of torch."""
    if name == "LLM":
        from inlaid.llm import LLM

        return LLM
    if name == "Program":
        from inlaid.program import Program

        return Program
    if name == "SamplingParams":
        from inlaid.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'inlaid' has no attribute {name!r}")
