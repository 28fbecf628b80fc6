"""The predictor of answer lengths: learned online from the server's own history, per adapter, in microseconds.

A sparse linear model guesses the logarithm of the length from the adapter, the prompt's length and its last tokens. A
histogram per adapter of the guesses' errors turns a guess into a distribution. What is still to come is its mean, given
that the answer is already longer than what was made: in a long tail, the longer an answer has run, the more is
expected. Answers cut off (by max_tokens or a client) only ever raise a guess that was too low.

Policies ask `remaining`; the scheduler reports ends to `observe`. Oracles for experiments are here too.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from inlaid.engine.request import FinishReason, Request

NUM_WEIGHTS = 1 << 14
NUM_TAIL_TOKENS = 12  # where instructions like "in three words" tend to be
BIN_WIDTH = 0.125  # of a residual histogram, in logarithms: one bin is a factor of 1.13
NUM_BINS = 96
CENTRE = NUM_BINS // 2
FACTORS = np.exp((np.arange(NUM_BINS) - CENTRE) * BIN_WIDTH)  # lengths over the guess, per bin
LEARNING_RATE = 0.5
FORGETTING = 0.995  # weight of the past in a histogram, per answer: about 200 answers count
PRIOR_ANSWERS = 8.0  # answers of its own that an adapter needs before its histogram outweighs the shared one
FIRST_GUESS = math.log(128.0)
SHARED = ""

Counts = npt.NDArray[np.float64]


class _Histogram:
    """Decayed counts of residuals log(length) - guess."""

    __slots__ = ("counts", "total")

    def __init__(self, counts: Sequence[float] = ()) -> None:
        self.counts = np.array(counts) if len(counts) else np.zeros(NUM_BINS)
        self.total = float(self.counts.sum())

    def add(self, residual: float) -> None:
        self.counts *= FORGETTING
        index = min(max(round(residual / BIN_WIDTH) + CENTRE, 0), NUM_BINS - 1)
        self.counts[index] += 1.0
        self.total = self.total * FORGETTING + 1.0


@dataclass(frozen=True, slots=True)
class _Prediction:
    """The prediction made when a request was first asked about."""

    log: float  # the guess of log(output tokens)
    length: float  # expected output tokens


class _State(msgspec.Struct):
    """The content of a predictor file."""

    version: int
    weights: dict[int, float]
    squares: dict[int, float]
    histograms: dict[str, list[float]]


class Predictor:
    """Owner of the weights and histograms."""

    def __init__(self, max_adapters: int = 4096) -> None:
        self._weights = [0.0] * NUM_WEIGHTS
        self._squares = [0.0] * NUM_WEIGHTS  # of gradients, so that each weight has its own pace
        self._histograms: dict[str, _Histogram] = {SHARED: _Histogram(_normal_prior())}
        self._predictions: dict[Request, _Prediction] = {}  # kept until the request ends
        self._max_adapters = max_adapters

    # What policies ask.

    def remaining(self, request: Request) -> float:
        """Return the expected output tokens still to come."""
        known = self._predictions.get(request)
        if known is None:
            log = self._guess(*_features(request))
            known = self._predictions[request] = _Prediction(log, self._mean_beyond(request, log, 0))
        if request.num_outputs == 0:
            return known.length
        return self._mean_beyond(request, known.log, request.num_outputs)

    def quantile(self, request: Request, share: float) -> float:
        """Return the length that a given share of such answers stays within; for calibration."""
        guess = self._guess(*_features(request))
        own, shared, weight = self._mixture(request)
        counts = own.counts + weight * shared.counts
        wanted, seen = share * float(counts.sum()), 0.0
        for index, count in enumerate(counts.tolist()):
            if count > 0 and seen + count >= wanted:
                edge = index - CENTRE - 0.5 + (wanted - seen) / count
                return math.exp(guess + edge * BIN_WIDTH)
            seen += count
        return math.exp(guess + (NUM_BINS - CENTRE) * BIN_WIDTH)

    def observe(self, request: Request) -> None:
        """Learn from an answer that has ended."""
        known = self._predictions.pop(request, None)
        if request.num_outputs == 0 or request.finish_reason is FinishReason.ERROR:
            return
        indices, values = _features(request)
        residual = math.log(request.num_outputs) - self._guess(indices, values)
        whole = request.finish_reason is FinishReason.STOP
        if not whole and residual <= 0:
            return  # it was cut off before its guess: nothing is learned
        before = residual if known is None else math.log(request.num_outputs) - known.log
        for name in (SHARED, _name(request)):
            self._histogram(name).add(before)
        self._learn(indices, values, residual)

    # The model.

    def _guess(self, indices: list[int], values: list[float]) -> float:
        total: float = sum(map(mul, map(self._weights.__getitem__, indices), values))
        return FIRST_GUESS + total

    def _learn(self, indices: list[int], values: list[float], residual: float) -> None:
        step = max(-2.0, min(2.0, residual))  # one odd answer moves nothing far
        for index, value in zip(indices, values):
            gradient = step * value
            self._squares[index] += gradient * gradient
            self._weights[index] += LEARNING_RATE * gradient / (1.0 + math.sqrt(self._squares[index]))

    def _mixture(self, request: Request) -> tuple[_Histogram, _Histogram, float]:
        """Return the adapter's own histogram, the shared one, and the weight with which the latter fills up while the
        adapter has few answers."""
        shared = self._histograms[SHARED]
        own = self._histograms.get(_name(request), shared)
        return own, shared, PRIOR_ANSWERS / shared.total

    def _mean_beyond(self, request: Request, log: float, made: int) -> float:
        """Return E[min(length, most) - made | length > made], given the guess of log(length)."""
        most = request.limit - request.num_prompt
        guess = math.exp(log)
        own, shared, weight = self._mixture(request)
        few, many, mass = own.counts, shared.counts, own.total + weight * shared.total
        lengths = np.minimum(FACTORS, most / guess)
        if made:
            first = FACTORS.searchsorted(made / guess, side="right")
            lengths, few, many = lengths[first:], few[first:], many[first:]
            mass = float(few.sum() + weight * many.sum())
        if mass == 0.0:  # longer than any answer before: as much again
            return float(max(1, min(made, most - made)))
        # `@`, which is made for matrices, takes twice as long.
        expected = guess * float(lengths.dot(few) + weight * lengths.dot(many)) / mass
        return max(1.0, expected - made)

    def _histogram(self, name: str) -> _Histogram:
        found = self._histograms.get(name)
        if found is None:
            if len(self._histograms) >= self._max_adapters:
                least = min((t for t in self._histograms if t != SHARED), key=lambda t: self._histograms[t].total)
                del self._histograms[least]
            found = self._histograms[name] = _Histogram()
        return found

    # On disk.

    def save(self, path: Path) -> None:
        """Write everything learned as JSON; the file is replaced whole or not at all."""
        state = _State(
            version=1,
            weights={i: round(w, 6) for i, w in enumerate(self._weights) if w},
            squares={i: round(s, 6) for i, s in enumerate(self._squares) if s},
            histograms={name: [round(c, 4) for c in h.counts.tolist()] for name, h in self._histograms.items()},
        )
        staged = path.with_suffix(path.suffix + ".tmp")
        staged.write_bytes(msgspec.json.encode(state))
        os.replace(staged, path)

    @classmethod
    def load(cls, path: Path) -> Predictor:
        """Read what `save` wrote; any other file raises ValueError."""
        try:
            state = msgspec.json.decode(path.read_bytes(), type=_State)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a predictor's file: {error}; delete it to start afresh") from error
        sizes = {len(counts) for counts in state.histograms.values()}
        indices = {*state.weights, *state.squares}
        if state.version != 1 or sizes != {NUM_BINS} or any(not 0 <= i < NUM_WEIGHTS for i in indices):
            raise ValueError(f"{path} is of another version of the predictor; delete it to start afresh")
        predictor = cls()
        for index, weight in state.weights.items():
            predictor._weights[index] = weight
        for index, square in state.squares.items():
            predictor._squares[index] = square
        predictor._histograms = {name: _Histogram(counts) for name, counts in state.histograms.items()}
        predictor._histograms.setdefault(SHARED, _Histogram(_normal_prior()))
        return predictor


def _name(request: Request) -> str:
    return "base" if request.adapter_name is None else "adapter:" + request.adapter_name


def _features(request: Request) -> tuple[list[int], list[float]]:
    """Sparse: indices of weights, and their values. Every feature is the adapter's own, by hashing."""
    seed, mask, tail = crc32(_name(request).encode()), NUM_WEIGHTS - 1, request.prompt[-NUM_TAIL_TOKENS:]
    indices = [(token * 2654435761 ^ seed) >> 4 & mask for token in tail]
    values = [1.0, math.log(len(request.prompt)) / 8.0] + [0.25] * len(tail)
    return [seed & mask, (seed >> 8) & mask, *indices], values


def _normal_prior() -> list[float]:
    """Before anything is seen: within a factor of about e, a little of it for sure anywhere."""
    return [0.001 + 0.01 * math.exp(-0.5 * ((index - CENTRE) * BIN_WIDTH) ** 2) for index in range(NUM_BINS)]


class Oracle:
    """Knows the true length, or that times a factor drawn within [1 / (1 + noise), 1 + noise], the same at every
    asking. For experiments; requests without a true length count as their max_tokens."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise is {noise}; it must be 0 or more")
        self._spread = math.log1p(noise)
        self._seed = seed

    def remaining(self, request: Request) -> float:
        length = request.true_output_len or request.limit - request.num_prompt
        if self._spread:
            draw = random.Random(f"{self._seed}:{request.id}").uniform(-self._spread, self._spread)
            length = max(1, round(length * math.exp(draw)))
        return float(max(1, length - request.num_outputs))

    def observe(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""
