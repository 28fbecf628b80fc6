"""Fit of a machine's cost model to measured steps: non-negative least squares on relative errors.

    python -m inlaid.sim.fit STEPS.jsonl --name h200 --out perf/results/h200-cost.json

    python -m inlaid.sim.fit --url http://127.0.0.1:8000 --name mine --out mine.json

STEPS.jsonl has one line per step, {"seconds": ..., "load": {...}, …}, as `python -m perf.validate --steps` writes it. A
server keeps such steps while it serves (`GET /v1/steps`), and knows how long its adapters took to load. A quarter of
the steps is held out; the error on them is in the file. Where the host works a step ahead of the device, as on a GPU,
the steps say what each of both took, and the two are fitted apart (ahead.py).
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from inlaid.flags import Parser
from inlaid.sim.ahead import HOST_TERMS, device_steps, host_steps, is_ahead, sure_decodes
from inlaid.sim.ahead import LEAST as LEAST
from inlaid.sim.cost import CostModel, Load, Step
from inlaid.sim.stairs import Stairs, fit_stairs, values_at

BESIDE = ("prompt_context", "output_context", "prefill_attention", "adapters", "adapter_rows", "ranks")
WORTH = 0.8  # of the linear model's misfit: staircases that gain less are not worth their many numbers
TERMS = ("step", *Load.__struct_fields__)
Array = npt.NDArray[np.float64]


FLOORS = 24  # values tried for the least that a step with prompts takes


def fit(steps: Sequence[Step], name: str, source: str, load_base: float = 0.0, load_rank: float = 0.0) -> CostModel:
    """Fit a model to steps. Of a host that works ahead, its seconds and the device's are fitted apart (ahead.py)."""
    host = [0.0] * len(HOST_TERMS)
    if is_ahead(steps):
        host = _twice(*host_steps(steps))[0].tolist()
        sure = sure_decodes(steps)
        if len(sure) >= LEAST:
            decodes = _fitted(sure, name, source)
            whole = device_steps(steps, decodes.step_seconds)
            steps = whole if len(whole) >= LEAST else steps
    made, prompts, rows, tokens = host
    return replace(
        _with_stairs(_fitted(steps, name, source), steps),
        load_base=load_base,
        load_rank=load_rank,
        host=made,
        host_prompts=prompts,
        host_rows=rows,
        host_tokens=tokens,
    )


def _fitted(steps: Sequence[Step], name: str, source: str) -> CostModel:
    """Fit the device's terms: plain least squares first, then each step weighted by one over what that predicts.

    Longer steps vary more, hence the weights. Weighting by the measured seconds instead would favour the fast steps and
    predict sums that are too small. The floor of a step with prompts is the value, of those tried, that explains the
    steps best.
    """
    if len(steps) < LEAST:
        raise ValueError(f"{len(steps)} steps are too few to fit {len(TERMS)} terms; record at least {LEAST}")
    rows = np.array([[1.0, *msgspec.structs.astuple(step.load)] for step in steps])
    seconds = np.array([step.seconds for step in steps])
    weights = _twice(rows, seconds)[1]
    prompts = rows[:, TERMS.index("prefills")] > 0
    tried = [0.0]
    if prompts.sum() >= FLOORS:
        tried += [float(value) for value in np.quantile(seconds[prompts], np.linspace(0.02, 0.9, FLOORS))]
    _, floor, coefficients = min(
        (_above(rows, seconds, weights, prompts, least) for least in tried), key=lambda t: t[0]
    )
    return _with_terms(CostModel(name=name, source=source, prompt_floor=floor), TERMS, coefficients)


def _with_terms(model: CostModel, terms: Sequence[str], values: Array) -> CostModel:
    """Return a model with these values of its terms."""
    return replace(model, **dict(zip(terms, values.tolist())))


def _with_stairs(model: CostModel, steps: Sequence[Step], rounds: int = 4) -> CostModel:
    """Let staircases of its rows take the place of a step's linear terms, where they explain steps that they have not
    seen better: on a device that pads steps to the sizes of its graphs."""
    seen = [step for place, step in enumerate(steps) if not _is_held_out(place)]
    unseen = [step for place, step in enumerate(steps) if _is_held_out(place)]
    if len(unseen) < LEAST or not any(step.load.prefills for step in seen):
        return model
    stepped, linear = (_misfit(each, unseen) for each in (_stepped(model, seen, rounds), model))
    return _stepped(model, steps, rounds) if stepped < WORTH * linear else model


def _misfit(model: CostModel, steps: Sequence[Step]) -> float:
    return float(np.mean([abs(model.step_seconds(step.load) / step.seconds - 1.0) for step in steps]))


def _stepped(model: CostModel, steps: Sequence[Step], rounds: int) -> CostModel:
    """Fit staircases and the terms of attention and adapters in turns, each to what the others leave."""
    loads = np.array([[getattr(step.load, term) for term in BESIDE] for step in steps], dtype=float)
    rows = np.array([step.load.prefill_tokens + step.load.decodes + step.load.guesses for step in steps], dtype=float)
    prompts = np.array([step.load.prefills > 0 for step in steps])
    seconds = np.array([step.seconds for step in steps])
    weights = 1.0 / np.maximum(np.array([model.step_seconds(step.load) for step in steps]), seconds.mean() / 10)
    beside = np.array([getattr(model, term) for term in BESIDE])
    stairs: dict[bool, Stairs] = {}
    for _ in range(rounds):
        left = seconds - loads @ beside
        on_rows = np.zeros(len(steps))
        for kind in (False, True):
            mine = prompts == kind
            if mine.any():
                stairs[kind] = fit_stairs(rows[mine], left[mine], weights[mine])
                on_rows[mine] = values_at(stairs[kind], rows[mine])
        beside = _solve(loads, seconds - on_rows, weights)
    stepped = replace(model, prompt_floor=0.0, decode_stairs=stairs.get(False, ()), prompt_stairs=stairs.get(True, ()))
    return _with_terms(stepped, BESIDE, beside)


def _twice(rows: Array, seconds: Array) -> tuple[Array, Array]:
    """Fit plainly, then with each row weighted by one over what that predicts; return coefficients and weights."""
    first = rows @ _solve(rows, seconds, np.ones(len(rows)))
    weights = 1.0 / np.maximum(first, seconds.mean() / 10)
    return _solve(rows, seconds, weights), weights


def fit_quickly(steps: Sequence[Step], name: str) -> CostModel:
    """Fit a model to steps within milliseconds: no floor, weights by the mean, and terms that would be negative are
    left out one after the other instead of being bounded together."""
    if len(steps) < LEAST:
        raise ValueError(f"{len(steps)} steps are too few to fit {len(TERMS)} terms; {LEAST} are needed")
    rows = np.array([[1.0, *msgspec.structs.astuple(step.load)] for step in steps])
    seconds = np.array([step.seconds for step in steps])
    usual = min(float(np.quantile(seconds, 0.98)), 20 * float(np.median(seconds)))
    rows, seconds = (
        rows[seconds <= usual],
        seconds[seconds <= usual],
    )  # a step that was held up says nothing of its load
    terms = [place for place in range(len(TERMS)) if rows[:, place].any()]
    coefficients = np.zeros(len(TERMS))
    while terms:
        scale = rows[:, terms].max(axis=0)
        found = np.linalg.lstsq(rows[:, terms] / scale, seconds, rcond=None)[0] / scale
        if (found >= 0).all():
            coefficients[terms] = found
            break
        terms.pop(int(np.argmin(found * scale)))
    return _with_terms(CostModel(name=name, source="fitted to steps"), TERMS, coefficients)


def _above(
    rows: Array, seconds: Array, weights: Array, prompts: npt.NDArray[np.bool_], floor: float, rounds: int = 4
) -> tuple[float, float, Array]:
    """Fit where steps with prompts take at least `floor`; return (weighted squared error, floor, coefficients).

    The coefficients are fitted to the steps above the floor, which depend on the coefficients, hence the rounds.
    """
    free = ~prompts | (seconds > floor)
    coefficients = _solve(rows[free], seconds[free], weights[free])
    for _ in range(rounds if floor else 0):
        now = ~prompts | (rows @ coefficients > floor)
        if (now == free).all():
            break
        free = now
        coefficients = _solve(rows[free], seconds[free], weights[free])
    predicted = np.maximum(rows @ coefficients, np.where(prompts, floor, 0.0))
    return float((weights * (predicted - seconds) ** 2).sum()), floor, coefficients


def _solve(rows: Array, seconds: Array, weights: Array) -> Array:
    """Compute argmin over x >= 0 of sum weights (rows x - seconds)^2, by Lawson and Hanson's active sets.

    One term after the other, that of the steepest gradient first, is let above zero; those that least squares of the
    terms above zero would make negative go back.
    """
    root = np.sqrt(weights)
    design, target = rows * root[:, None], seconds * root
    norms = np.sqrt((design * design).sum(axis=0))
    used = norms > 0
    norms[~used] = np.inf
    design = design / norms
    gram, moments = design.T @ design, design.T @ target
    x, above = np.zeros(len(norms)), np.zeros(len(norms), dtype=bool)
    for _ in range(3 * len(x)):  # rounding may send a term back and forth
        gradient = np.where(used & ~above, moments - gram @ x, 0.0)
        if gradient.max() <= 1e-10 * np.abs(moments).max():
            break
        above[np.argmax(gradient)] = True
        x = _inside(gram, moments, x, above)
    return np.asarray(x / norms)


def _inside(gram: Array, moments: Array, x: Array, above: npt.NDArray[np.bool_]) -> Array:
    """Return the least squares of the terms above zero; those that would be negative leave `above` in place."""
    while above.any():
        free = np.zeros(len(x))
        free[above] = np.linalg.lstsq(gram[np.ix_(above, above)], moments[above], rcond=None)[0]
        below = above & (free <= 0)
        if not below.any():
            return free
        share = (x[below] / (x[below] - free[below] + 1e-300)).min()
        x = x + share * (free - x)
        above &= ~below | (x > 1e-14)
        x = np.where(above, x, 0.0)
    return x


def errors(model: CostModel, steps: Sequence[Step]) -> dict[str, float]:
    """Measure the errors of predictions: median of |relative error|, error of the sum, R squared. Of a host that works
    ahead, the steps are those whose seconds on the device are known."""
    if is_ahead(steps):
        steps = device_steps(steps, model.step_seconds) or steps
    seconds = np.array([step.seconds for step in steps])
    predicted = np.array([model.step_seconds(step.load) for step in steps])
    residual = ((predicted - seconds) ** 2).sum() / max(((seconds - seconds.mean()) ** 2).sum(), 1e-12)
    return {
        "median_relative_error": float(np.median(np.abs(predicted - seconds) / seconds)),
        "relative_error_of_sum": float(predicted.sum() / seconds.sum() - 1.0),
        "r_squared": float(1.0 - residual),
        "steps": float(len(steps)),
    }


def _is_held_out(place: int) -> bool:
    """Say whether the command keeps a step from the fit: eight in a row, of 32, as steps in a row belong together."""
    return place // 8 % 4 == 3


def read_steps(path: Path) -> list[Step]:
    try:
        return [msgspec.json.decode(line, type=Step) for line in path.read_bytes().splitlines() if line]
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a file of steps: {error}") from error


class Measured(msgspec.Struct, frozen=True):
    """Steps and loads that a server measured while it served."""

    steps: list[Step]
    loads: list[dict[str, float]]

    @property
    def load_rank(self) -> float:
        """Seconds that a copy to the device usually takes for each unit of rank; 0: no adapter was copied."""
        known = [load["copy_seconds"] / load["rank"] for load in self.loads if load["copy_seconds"] and load["rank"]]
        return float(np.median(known)) if known else 0.0


def ask_steps(url: str, key: str | None) -> Measured:
    """Ask a server for its steps. ValueError says why it has none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url.rstrip("/") + "/v1/steps", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return msgspec.json.decode(answer.read(), type=Measured)
    except urllib.error.HTTPError as error:
        need = "; give its admin key with --api-key" if error.code in {401, 403} else ""
        raise ValueError(f"{url}/v1/steps answers {error.code}{need}") from error
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"no inlaid server answers at {url}: {error}") from error


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))


def write_cost(path: Path, model: CostModel, held_out: dict[str, float], made: dict[str, Any]) -> None:
    """Write the file that `inlaid sim --machine FILE` reads: the coefficients, and their provenance."""
    record = {**msgspec.to_builtins(model), **{f"held_out_{k}": v for k, v in held_out.items()}, **made}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    from inlaid.report.provenance import provenance

    parser = Parser(description=__doc__)
    parser.add_argument("steps", type=Path, nargs="*", metavar="STEPS.jsonl")
    parser.add_argument("--url", help="of a server: the steps that it measured while it served")
    parser.add_argument("--api-key", help="admin key of that server")
    parser.add_argument("--name", required=True)
    parser.add_argument("--source", default="fitted to measured steps")
    parser.add_argument("--load-base", type=float, default=0.0, help="seconds to load an adapter, whatever its rank")
    parser.add_argument("--load-rank", type=float, default=0.0, help="and per rank")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        steps = [step for path in args.steps for step in read_steps(path)]
        if args.url:
            measured = ask_steps(args.url, args.api_key)
            steps += measured.steps
            args.load_rank = args.load_rank or measured.load_rank
        elif not args.steps:
            parser.error("name files of steps, or a server with --url")
        kept = [step for place, step in enumerate(steps) if not _is_held_out(place)]
        model = fit(kept, args.name, args.source, args.load_base, args.load_rank)
    except (ValueError, OSError) as error:
        print(f"fit: {error}", file=sys.stderr)
        return 2
    held_out = errors(model, [step for place, step in enumerate(steps) if _is_held_out(place)])
    write_cost(args.out, model, held_out, provenance())
    print(json.dumps(held_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
