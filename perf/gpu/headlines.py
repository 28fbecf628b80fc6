"""One line about a stage's result, for the console and the last lines of a call."""

from __future__ import annotations

from typing import Any


def headline(result: dict[str, Any]) -> str:
    """Return the figures of a result that matter most, in one line."""
    parts = [f"ready in {result['ready_s']:.1f} s"] if "ready_s" in result else []
    if "parts" in result:
        seconds = ", ".join(f"{part} {spent:.1f}" for part, spent in result["parts"].items())
        parts.append(f"{result['seconds']:.1f} s ({seconds})")
    parts += [about_row(row) for row in result.get("rows", ())]
    for start in result.get("starts", ()):
        parts.append(f"{start['caches']} {start.get('ready_s', float('nan')):.1f} s")
    for step in result.get("steps", ()):
        timed = [choice for choice in step["choices"] if "us" in choice]
        if timed:
            best = min(timed, key=lambda choice: choice["us"])
            about = f"{step['adapters']}@{step['rows']} {timed[0]['us']:.0f} us"
            parts.append(f"{about}, {best['variant']} {best['us']:.0f} ({timed[0]['same_bits']} equal)")
    for name, found in result.items():
        if isinstance(found, dict) and "all_equal" in found:
            parts.append(f"{name}: {found['all_equal']} of {found['repetitions']} equal")
    for name in (
        "passed", "mixed_over_uniform", "share", "error", "failed", "not_reached", "different_alone", "left_over",
    ):  # fmt: skip
        if result.get(name) not in (None, False, [], {}):
            parts.append(f"{name} {str(result[name])[:200]}")
    for entry in result.get("entries", ()):
        parts.append(f"{entry['inputs']}x{entry['outputs']}@{entry['rows']} {entry['own_us']}->{entry['best_us']}")
    return "; ".join(parts)


def about_row(row: dict[str, Any]) -> str:
    """Return a served row's speed and mean time to the first token; of another row its figures, shortened."""
    if "ms_per_token" not in row:
        figures = [value for value in row.values() if not isinstance(value, dict)]
        return " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in figures)[:160]
    name = f"{row.get('names', '')}{row['adapters']}@{row['concurrency']}"
    if row["concurrency"] == 1:
        return f"{name} {row['ms_per_token']:.2f} ms"
    return f"{name} {row['output_tokens_per_second']:.0f} tok/s, first {row['ttft_ms']:.0f} ms"
