"""Price of guesses: what a step with guesses takes beside one without, learned from the steps that ran; and when to
look for drafts at all.

All is counted in plain steps: steps of as many decodes in which nobody looked for drafts. With an overlapping runner a
look costs the host's work, since the newest token must be known first; so a step without guesses has two prices. A step
with E guesses takes first + slope * E; of few rows, where another kernel may serve a row more, each number of rows up
to a power of two has a price of its own. Medians, of ratios to plain steps of the same time: the clock of a busy
machine tells more than the step took, now and then, and the machine is slower at one time than at another.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FEW_ROWS = 16  # of a step whose prices are a table
WINDOW, PLAIN = 15, 9  # steps of each kind that are remembered, and of plain ones
FEWEST_STEPS = 3  # of a kind, before they are believed
STALE = 96  # steps since the last plain one, after which some are made; more where looks gain much
DOUBT = 0.9  # what is left of a price after a look that found it too high

SHORTEST_PAUSE, LONGEST_PAUSE = 4, 256  # steps without a look, after looks in vain
LEAST_GAIN = 0.02  # of tokens a second, as a share; less is within the error of what is known
FIRST_GAIN = 0.1  # assumed before the first look
LOOKS = 8  # over which a gain is averaged; fewer of many requests, whose luck evens out
MANY = 8  # requests
KEPT = 0.98  # of hopes and what became of them, after each step
MOST_KEYS = 1024  # numbers of decodes and adapters that pauses are known of


@dataclass(frozen=True)
class Curve:
    """Seconds of a step with a look, in plain steps: `look` without guesses, those in `few` with few guesses, and
    first + slope * E with E guesses else."""

    look: float = 1.0
    first: float = 1.0
    slope: float = 0.0
    few: Sequence[float] = ()  # by the number of guesses, from 1

    def of(self, guesses: int) -> float:
        """Return what a step of so many guesses takes."""
        if guesses <= len(self.few):
            return self.few[guesses - 1] if guesses else self.look
        return self.first + self.slope * guesses

    def doubted(self, trust: float) -> Curve:
        """Return the curve with a share of what guesses add."""
        look = self.look
        few = tuple(look + trust * (each - look) for each in self.few)
        return Curve(look, look + trust * (self.first - look), trust * self.slope, few)


FREE = Curve()


class Prices:
    """The last steps of one number of decodes: seconds of plain ones, and how much longer the others took."""

    __slots__ = ("_base", "_decodes", "_guessed", "_looked", "_overlaps", "_plain", "_prior", "_trust", "age", "curve")

    def __init__(self, decodes: int, prior: Curve = FREE) -> None:
        """`prior`: what about as many decodes take."""
        self._decodes = decodes
        self._prior = Curve(prior.look, prior.first, prior.slope)
        self._plain: deque[float] = deque(maxlen=PLAIN)
        self._looked: deque[float] = deque(maxlen=WINDOW)
        self._guessed: dict[int, deque[tuple[int, float]]] = {}  # by `_kind`
        self._overlaps = False  # steps overlap when nobody looks: only those are plain
        self._base = 0.0
        self._trust = 1.0
        self.age = 0  # steps since the last plain one
        self.curve = self._prior

    def add(self, guesses: int, seconds: float, overlapped: bool) -> None:
        """Learn from a step. `overlapped`: the host made it while the device computed the one before."""
        if overlapped and not self._overlaps:
            self._overlaps = True
            self._plain.clear()
        if not guesses and overlapped == self._overlaps:
            self._plain.append(seconds)
            self._base, self.age = max(1e-9, _median(self._plain)), 0
            return
        self.age += 1
        if len(self._plain) < FEWEST_STEPS:
            return
        if guesses:
            kind = self._guessed.setdefault(self._kind(guesses), deque(maxlen=WINDOW))
            kind.append((guesses, seconds / self._base))
            self._trust = 1.0
        else:
            self._looked.append(seconds / self._base)
        self._fit()

    @property
    def has_plain(self) -> bool:
        return len(self._plain) >= FEWEST_STEPS

    @property
    def known(self) -> bool:
        """Return True if enough steps with guesses were seen."""
        return sum(map(len, self._guessed.values())) >= (FEWEST_STEPS if self._decodes < MANY else FEWEST_STEPS - 1)

    @property
    def doubted(self) -> bool:
        """Return True if the price of guesses is taken for less than it was when they were last made."""
        return self._trust < 1.0

    def doubt(self) -> None:
        """Take guesses for cheaper than they were, here or in steps of other sizes, as no step has confirmed it: in the
        end they are tried again."""
        self._trust *= DOUBT
        self._fit()

    def _fit(self) -> None:
        prior = self._prior
        look = max(1.0, _median(self._looked)) if len(self._looked) >= FEWEST_STEPS else prior.look
        if not self.known:
            more = look - prior.look
            self.curve = Curve(look, prior.first + more, prior.slope).doubted(self._trust)
            return
        points = {
            number: (_median(n for n, _ in kind), _median(ratio for _, ratio in kind), len(kind))
            for number, kind in self._guessed.items()
        }
        first, slope = _line(list(points.values()), look)
        few = [self._price(guesses, points, first, slope) for guesses in range(1, 1 + FEW_ROWS - self._decodes)]
        self.curve = Curve(look, first, slope, few).doubted(self._trust)

    def _kind(self, guesses: int) -> int:
        """Return what steps of one price share: of few rows, the power of two up to which those are; else the power of
        two of guesses."""
        rows = self._decodes + guesses
        return (rows - 1).bit_length() if rows <= FEW_ROWS else FEW_ROWS + guesses.bit_length()

    def _price(self, guesses: int, points: Mapping[int, tuple[float, float, int]], first: float, slope: float) -> float:
        """Return the price of a step of few rows: its median, or the line's where it was not seen, but no more than of
        the next smaller ones that were: so it is tried."""
        seen = points.get(self._kind(guesses))
        if seen is not None:
            return max(1.0, seen[1])
        smaller = [kind for kind in points if kind < self._kind(guesses)]
        line = first + slope * guesses
        return min(line, max(1.0, points[max(smaller)][1])) if smaller else line


class StepCosts:
    """Prices of steps by their decodes, four sizes to each power of two."""

    def __init__(self) -> None:
        self._prices: dict[int, Prices] = {}

    def of(self, decodes: int) -> Prices:
        """Return what is known of steps of about so many decodes."""
        size = size_class(decodes)
        prices = self._prices.get(size)
        if prices is None:
            known = [(abs(other - size), other) for other, one in self._prices.items() if one.known]
            nearest = self._prices[min(known)[1]].curve if known else FREE
            prices = self._prices[size] = Prices(decodes, nearest)
        return prices


class Looks:
    """Pauses after looks for drafts in vain, by what they gain: the mean of the last looks, in plain steps."""

    __slots__ = ("_gain", "_growth", "_hoped", "_right", "_shortest", "_weight", "last", "pause")

    def __init__(self, pause: int, num_running: int) -> None:
        self.pause = pause  # steps left until the next look
        self.last = 0  # the last pause after looks in vain; 0: looks pay
        self._weight = min(0.5, max(1.0, num_running / 4) / LOOKS)
        # One look at many requests tells more, and costs more.
        self._growth, self._shortest = (2, SHORTEST_PAUSE) if num_running < MANY else (4, 4 * SHORTEST_PAUSE)
        self._gain = FIRST_GAIN
        self._hoped = self._right = 2.0  # guesses that should have been right, and that were

    def hope(self, expected: float, right: int) -> float:
        """Take in how many guesses of a step should have been right, and were. Return how many of as many to expect:
        where chances are high by accident, fewer are right."""
        self._hoped = self._hoped * KEPT + expected
        self._right = self._right * KEPT + right
        return expected * min(1.2, (1.0 + self._right) / (1.0 + self._hoped))

    def note(self, gain: float) -> bool:
        """Take in what a look has gained, as a share of a plain step's tokens a second. Return True if a pause begins,
        longer than the one before."""
        self._gain += (gain - self._gain) * self._weight
        if self._gain >= LEAST_GAIN:
            self.last = self.last // 2 if self.last > self._shortest else 0
            return False
        self.pause = self.last = min(max(self._shortest, self._growth * self.last), LONGEST_PAUSE)
        return True

    def stale_after(self) -> float:
        """Return after how many steps without a plain one some are made, to compare with."""
        return STALE * (1.0 + 10.0 * self._gain)

    def follow(self, fewer: Looks) -> None:
        """Begin with the pause of fewer requests: where looks are in vain, they are for more requests."""
        self.pause, self.last, self._gain = max(self.pause, fewer.last), fewer.last, min(self._gain, fewer._gain)


class AllLooks:
    """Looks by number of running requests, as a power of two; a request alone, by its adapter."""

    def __init__(self, first_pause: int) -> None:
        self._first_pause = first_pause
        self._looks: OrderedDict[tuple[int, str | None], Looks] = OrderedDict()

    def of(self, num_running: int, adapter: str | None) -> Looks:
        """Return the looks of steps of so many requests."""
        bits = num_running.bit_length()
        key = bits, adapter if num_running == 1 else None
        looks = self._looks.get(key)
        if looks is None:
            looks = self._looks[key] = Looks(self._first_pause, num_running)
            fewer = [one for size in range(2, bits) if (one := self._looks.get((size, None))) is not None]
            if fewer:
                looks.follow(fewer[-1])
            if len(self._looks) > MOST_KEYS:
                self._looks.popitem(last=False)
        return looks


def size_class(count: int) -> int:
    """Return a number that counts within a quarter of a power of two share."""
    bits = count.bit_length()
    return count if bits <= 3 else 4 * bits + (count >> bits - 3) - 8


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _line(points: Sequence[tuple[float, float, int]], look: float) -> tuple[float, float]:
    """Return first and slope of the line nearest to (guesses, ratio, weight) that nowhere falls, nor begins below a
    step that only looked. One point alone does not tell which: half of what it adds is the step's."""
    total = sum(weight for _, _, weight in points)
    mean_x = sum(x * weight for x, _, weight in points) / total
    mean_y = sum(y * weight for _, y, weight in points) / total
    spread = sum(weight * (x - mean_x) ** 2 for x, _, weight in points)
    if spread > 0.0:
        slope = sum(weight * (x - mean_x) * (y - mean_y) for x, y, weight in points) / spread
        first = mean_y - slope * mean_x
        if slope < 0.0:
            return max(look, mean_y), 0.0
        if first >= look:
            return first, slope
    more = max(0.0, mean_y - look) / 2
    return (look + more, more / mean_x) if len(points) == 1 else (look, 2 * more / mean_x)
