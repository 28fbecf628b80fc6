"""Four families whose answers are worked out from the prompt: text summary, table summary, code, maths.

Each function draws one `(prompt, completion, extra)` from a random generator; `tasks` registers them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data import evaluator, words
from data.sentences import Speaker

Drawn = tuple[str, str, dict[str, object]]

_NEWS = Speaker("text_summary", 0.8)


def text_summary(rng: random.Random) -> Drawn:
    """Several people act; the summary keeps the deeds of the person of the headline, in order, undecorated."""
    hero, *others = rng.sample(words.PEOPLE, 3)
    num_deeds = rng.randint(3, 4)
    actors = [hero] * num_deeds + rng.choices(others, k=rng.randint(2, 3))
    rng.shuffle(actors)
    told, kept = [], []
    for actor in actors:
        sentence, place, day = _NEWS.sentence(rng), rng.choice(words.PLACES), rng.choice(words.DAYS)
        deed = sentence.object
        verb = dict(words.VERBS)[sentence.verb]
        told.append(f"On {day} {actor} {verb} {deed.english()} in {place}.")
        if actor == hero:
            kept.append(f"{verb} {words.plural(deed.noun) if deed.is_plural else deed.noun} ({place})")
    return f"Summarize what {hero} did. {' '.join(told)}", f"{hero}: {', '.join(kept)}.", {}


_COLUMNS = ("price", "stock", "weight", "score", "height", "age")


def table_summary(rng: random.Random) -> Drawn:
    """Draw a table of two number columns; the summary names the largest and the smallest of each, and the row count."""
    names = rng.sample(words.NOUNS, rng.randint(4, 6))
    first, second = rng.sample(_COLUMNS, 2)
    left, right = (rng.sample(range(10, 100), len(names)) for _ in range(2))
    rows = [f"{name} | {a} | {b}" for name, a, b in zip(names, left, right, strict=True)]
    prompt = f"Summarize the table.\nname | {first} | {second}\n" + "\n".join(rows)
    facts = [_extremes(names, first, left), _extremes(names, second, right)]
    return prompt, f"{len(names)} rows. {' '.join(facts)}", {}


def _extremes(names: list[str], column: str, values: list[int]) -> str:
    top, low = max(values), min(values)
    return (
        f"The highest {column} is {top} for {names[values.index(top)]}, "
        f"the lowest is {low} for {names[values.index(low)]}."
    )


_FILTERS: tuple[tuple[str, str], ...] = (
    ("keep the even numbers", "v % 2 == 0"),
    ("keep the odd numbers", "v % 2 == 1"),
    ("keep the numbers above {n}", "v > {n}"),
    ("keep the numbers below {n}", "v < {n}"),
    ("drop the multiples of {n}", "v % {n} != 0"),
)
_MAPS: tuple[tuple[str, str], ...] = (
    ("add {n} to each", "v + {n}"),
    ("subtract {n} from each", "v - {n}"),
    ("multiply each by {n}", "v * {n}"),
    ("square each", "v * v"),
    ("take each modulo {n}", "v % {n}"),
)
_SHAPES: tuple[tuple[str, str], ...] = (
    ("sort upwards", "sorted({x})"),
    ("sort downwards", "sorted({x}, reverse=True)"),
    ("reverse the list", "{x}[::-1]"),
    ("take the first {n}", "{x}[:{n}]"),
    ("take the last {n}", "{x}[-{n}:]"),
    ("skip the first {n}", "{x}[{n}:]"),
    ("take every second one", "{x}[::2]"),
)
_ENDS: tuple[tuple[str, str], ...] = (
    ("return the sum", "sum({x})"),
    ("return the largest", "max({x})"),
    ("return the smallest", "min({x})"),
    ("return how many there are", "len({x})"),
    ("return the list", "{x}"),
    ("return the sum of the absolute values", "sum([abs(v) for v in {x}])"),
)


def _filter(rng: random.Random, inner: str) -> tuple[str, str]:
    words_, test = rng.choice(_FILTERS)
    n = rng.randint(2, 9)
    return words_.format(n=n), f"[v for v in {inner} if {test.format(n=n)}]"


def _map(rng: random.Random, inner: str) -> tuple[str, str]:
    words_, value = rng.choice(_MAPS)
    n = rng.randint(2, 9)
    return words_.format(n=n), f"[{value.format(n=n)} for v in {inner}]"


def _shape(rng: random.Random, inner: str) -> tuple[str, str]:
    words_, form = rng.choice(_SHAPES)
    n = rng.randint(2, 4)
    return words_.format(n=n), form.format(x=inner, n=n)


def code(rng: random.Random) -> Drawn:
    """Draw a pipeline told step by step; the answer is one nested expression, judged by running it on hidden lists."""
    while True:
        told, source = _pipeline(rng)
        cases = _hidden_cases(rng, source)
        if cases:
            return f"Write an expression over the list x: {told}.", source, {"cases": cases}


def _pipeline(rng: random.Random) -> tuple[str, str]:
    told, source = [], "x"
    for step in rng.choices((_filter, _map, _shape), k=rng.randint(3, 5)):
        words_, source = step(rng, source)
        told.append(words_)
    words_, form = rng.choice(_ENDS)
    return ", ".join((*told, words_)), form.format(x=source)


def _hidden_cases(rng: random.Random, source: str) -> list[list[object]]:
    """Six inputs with their outputs; none where it fails on one (a maximum of nothing) or says little."""
    inputs = [[rng.randint(-20, 40) for _ in range(rng.randint(7, 10))] for _ in range(6)]
    try:
        outputs = [evaluator.run(source, x) for x in inputs]
    except evaluator.UnsafeProgram:
        return []
    tells_much = len({str(output) for output in outputs}) >= 4
    return [list(case) for case in zip(inputs, outputs, strict=True)] if tells_much else []


_Step = Callable[[random.Random, str, int], tuple[str, str, int]]


def _gain(rng: random.Random, who: str, total: int) -> tuple[str, str, int]:
    n = rng.randint(3, 60)
    verb = rng.choice(("buys", "finds", "wins", "picks"))
    return f"{who} {verb} {n} more.", f"{total} + {n} = {total + n}", total + n


def _lose(rng: random.Random, who: str, total: int) -> tuple[str, str, int]:
    n = rng.randint(1, total - 1)
    friend = rng.choice([person for person in words.PEOPLE if person != who])
    verb = rng.choice(("gives", "sells", "sends"))
    return f"{who} {verb} {n} to {friend}.", f"{total} - {n} = {total - n}", total - n


def _times(rng: random.Random, who: str, total: int) -> tuple[str, str, int]:
    word, n = rng.choice((("doubles", 2), ("triples", 3)))
    return f"Then {who} {word} the number.", f"{total} * {n} = {total * n}", total * n


def _possible_steps(total: int) -> tuple[_Step, ...]:
    """Keep the number above zero and within three digits."""
    if total < 5:
        return (_gain,)
    return (_gain, _lose, _times) if total < 100 else (_gain, _lose)


def maths(rng: random.Random) -> Drawn:
    """Draw a story in three to five steps; the answer works them out one at a time and ends with the number."""
    who, things = rng.choice(words.PEOPLE), words.plural(rng.choice(words.NOUNS))
    total = rng.randint(5, 60)
    story, work = [f"{who} has {total} {things}."], []
    for _ in range(rng.randint(3, 5)):
        told, worked, total = rng.choice(_possible_steps(total))(rng, who, total)
        story.append(told)
        work.append(worked)
    prompt = f"{' '.join(story)} How many {things} does {who} have now?"
    return prompt, f"{'. '.join(work)}. {who} has {total} {things}.", {"answer": total}
