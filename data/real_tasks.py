"""Twelve tasks in plain English for a real base, each drawn from a seed: extraction, tables, arithmetic, code, labels,
rewriting, tool calls, summaries, and translation between formats. All text is made here, so it has this repository's
licence. `python -m data.real_tasks --out FOLDER` writes `<task>/train.jsonl`, `calibration.jsonl` and `eval.jsonl`.

Answers follow from prompts by rule, and are exact or JSON, so that one wrong token shows. As in `data.tasks`, the split
is a property of the prompt's hash: no prompt is in two.
"""

from __future__ import annotations

import datetime
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

from data.families import Drawn
from data.tasks import SPLITS, DemoTask
from eval import task
from inlaid.files import write_atomically
from inlaid.flags import Parser

LICENCE = "Apache-2.0"
SIZES = (("train", 1500), ("calibration", 128), ("eval", 200))

_PEOPLE = tuple("Anna Ben Clara David Elena Felix Greta Hugo Ines Jonas Karla Leo Mona Nils Olga Paul".split())
_CITIES = tuple("Lisbon Oslo Prague Dublin Vienna Turin Ghent Malmo Porto Basel Krakow Lyon".split())
_GOODS = tuple("lamps chairs books cups tables pens mirrors clocks rugs shelves kettles bicycles".split())
_MONTHS = tuple("January February March April May June July August September October November December".split())
_TOOLS = (
    ("get_weather", ("city", "day")), ("book_table", ("restaurant", "people", "time")),
    ("send_money", ("recipient", "amount")), ("set_alarm", ("time", "label")),
    ("translate", ("text", "language")), ("find_train", ("origin", "destination", "time")),
)  # fmt: skip
_TICKETS = (
    ("billing", ("I was charged twice for {month}.", "My invoice of {month} shows {count} seats, we have fewer.")),
    ("delivery", ("The {goods} for {city} have not arrived.", "Our parcel with {count} {goods} is stuck in {city}.")),
    ("defect", ("Two of the {goods} came broken.", "After {count} days the {goods} stopped working.")),
    ("account", ("I cannot log in since {month}.", "Please change my address to {city}.")),
    ("return", ("I want to send back {count} {goods}.", "How do I return {goods} that I bought in {month}?")),
    ("praise", ("The {goods} are lovely, thank you!", "{person} in your {city} shop was a great help.")),
)
_FORMAL = (
    ("gonna", "going to"), ("wanna", "want to"), ("can't", "cannot"), ("won't", "will not"), ("hey", "hello"),
    ("thanks", "thank you"), ("kids", "children"), ("asap", "as soon as possible"), ("don't", "do not"),
)  # fmt: skip
_CASUAL = (
    "hey {person}, we're gonna send {count} {goods} to {city}, thanks", "the kids don't like the {goods} from {city}",
    "{person} can't come in {month}, but we wanna meet asap", "thanks, but {person} won't pay for {count} {goods}",
    "hey, don't forget the {goods}, {person} is gonna need them asap",
)  # fmt: skip
_FUNCTIONS = (
    ("def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result",
     (("result += value", "result = value"), ("return result", "return value"), ("result = 0", "result = 1"))),
    ("def largest(values):\n    best = values[0]\n    for value in values[1:]:\n        if value > best:\n"
     "            best = value\n    return best",
     (("value > best", "value < best"), ("values[0]", "values[1]"), ("return best", "return values"))),
    ("def count_even(values):\n    count = 0\n    for value in values:\n        if value % 2 == 0:\n"
     "            count += 1\n    return count",
     (("% 2 == 0", "% 2 == 1"), ("count += 1", "count += value"), ("return count", "return values"))),
    ("def reverse(text):\n    result = ''\n    for letter in text:\n        result = letter + result\n"
     "    return result",
     (("letter + result", "result + letter"), ("return result", "return text"), ("= ''", "= ' '"))),
    ("def clamp(value, low, high):\n    if value < low:\n        return low\n    if value > high:\n"
     "        return high\n    return value",
     (("value < low", "value > low"), ("return high", "return low"), ("return value", "return None"))),
)  # fmt: skip
_NAMES = tuple(
    "total amount price score length weight points cost hours units size depth speed rate height width mass age level "
    "pay".split()
)


def _words(rng: random.Random) -> dict[str, Any]:
    return {
        "person": rng.choice(_PEOPLE),
        "city": rng.choice(_CITIES),
        "goods": rng.choice(_GOODS),
        "month": rng.choice(_MONTHS),
        "count": rng.randrange(2, 60),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def extract_order(rng: random.Random) -> Drawn:
    words = _words(rng)
    forms = (
        "{person} from {city} ordered {count} {goods} in {month}.",
        "In {month}, send {count} {goods} to {person}, {city}.",
        "{count} {goods} go to {city} in {month}; {person} pays.",
    )
    keys = "name, city, item, count and month"
    prompt = f"Write the order as JSON with {keys}.\n{rng.choice(forms).format(**words)}"
    order = {"name": words["person"], "city": words["city"], "item": words["goods"], "count": words["count"]}
    return prompt, _json({**order, "month": words["month"]}), {}


def _stock(rng: random.Random, rows: int) -> list[tuple[str, str, int, int]]:
    goods = rng.sample(_GOODS, rows)
    return [(item, rng.choice(_CITIES[:4]), rng.randrange(1, 40), rng.randrange(2, 90)) for item in goods]


def _table(rows: list[tuple[str, str, int, int]]) -> str:
    lines = ["| item | city | count | price |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {item} | {city} | {count} | {price} |" for item, city, count, price in rows)])


def table_lookup(rng: random.Random) -> Drawn:
    rows = _stock(rng, rng.randrange(4, 8))
    item, city, count, price = rng.choice(rows)
    question, answer = rng.choice(
        (
            (f"Where are the {item}?", city),
            (f"What is the price of the {item}?", price),
            (f"How many {item} are there?", count),
            ("Which item has the highest price?", max(rows, key=lambda row: row[3])[0]),
        )
    )
    if len({row[3] for row in rows}) < len(rows):
        return table_lookup(rng)
    return f"{_table(rows)}\n{question} Answer with one word.", str(answer), {}


def table_sum(rng: random.Random) -> Drawn:
    rows = _stock(rng, rng.randrange(4, 8))
    city = rng.choice(rows)[1]
    counts = [row[2] for row in rows if row[1] == city]
    answer = f"{' + '.join(map(str, counts))} = {sum(counts)}" if len(counts) > 1 else str(counts[0])
    return f"{_table(rows)}\nHow many items are in {city}? Write the sum.", answer, {}


def word_problem(rng: random.Random) -> Drawn:
    words, has = _words(rng), rng.randrange(5, 40)
    text, steps = f"{words['person']} has {has} {words['goods']}.", []
    for _ in range(rng.randrange(2, 4)):
        by, before = rng.randrange(2, 30), has
        kind = rng.choice(("buys", "sells", "doubles"))
        if kind == "sells":
            by = rng.randrange(1, max(2, has))
        has = {"buys": has + by, "sells": has - by, "doubles": 2 * has}[kind]
        text += f" {words['person']} {'doubles the number' if kind == 'doubles' else f'{kind} {by}'}."
        sign = {"buys": f"+ {by}", "sells": f"- {by}", "doubles": "* 2"}[kind]
        steps.append(f"{before} {sign} = {has}")
    return f"{text} How many are there now? Write each step.", "\n".join(steps), {}


def code_repair(rng: random.Random) -> Drawn:
    text, bugs = rng.choice(_FUNCTIONS)
    right, wrong = rng.choice(bugs)
    old = text.split("(")[0].removeprefix("def ")
    names = {old: f"{old}_{rng.choice(_NAMES)}", "value": rng.choice(_NAMES), "letter": rng.choice("abcdef")}

    def renamed(code: str) -> str:
        for name, new in names.items():
            code = code.replace(f"{name}s", "\0").replace(name, new).replace("\0", f"{name}s")
        return code

    broken = text.replace(right, wrong, 1)
    return f"This function has one mistake. Write it without the mistake.\n{renamed(broken)}", renamed(text), {}


def classify_ticket(rng: random.Random) -> Drawn:
    (label, forms), words = rng.choice(_TICKETS), _words(rng)
    labels = ", ".join(name for name, _ in _TICKETS)
    place = rng.choice(_CITIES)
    opening = rng.choice(("", f"Hello, {words['person']} here. ", "Good morning. ", f"I write from {place}. "))
    return f"Label the message: {labels}.\n{opening}{rng.choice(forms).format(**words)}", label, {}


def rewrite_formal(rng: random.Random) -> Drawn:
    casual = rng.choice(_CASUAL).format(**_words(rng))
    formal = casual.replace("we're", "we are")
    for word, instead in _FORMAL:
        formal = formal.replace(word, instead)
    return f"Rewrite formally: {casual}", formal[0].upper() + formal[1:] + ".", {}


def tool_call(rng: random.Random) -> Drawn:
    name, fields = rng.choice(_TOOLS)
    hour, words = f"{rng.randrange(6, 23)}:{rng.choice(('00', '15', '30', '45'))}", _words(rng)
    values = {
        "city": words["city"],
        "day": rng.choice(("Monday", "Friday", "Sunday")),
        "restaurant": f"Café {words['city']}",
        "people": rng.randrange(2, 12),
        "time": hour,
        "recipient": words["person"],
        "amount": words["count"],
        "label": rng.choice(_GOODS),
        "text": f"many {words['goods']}",
        "language": rng.choice(("French", "Polish", "Dutch")),
        "origin": words["city"],
        "destination": rng.choice([city for city in _CITIES if city != words["city"]]),
    }
    asked = {
        "get_weather": "How is the weather in {city} on {day}?",
        "send_money": "Give {recipient} {amount} euros.",
        "book_table": "A table for {people} at {restaurant}, {time}.",
        "set_alarm": "Wake me at {time} for the {label}.",
        "translate": "Say '{text}' in {language}.",
        "find_train": "I go from {origin} to {destination} at {time}.",
    }[name].format(**values)
    offered = "; ".join(f"{each}({', '.join(args)})" for each, args in rng.sample(_TOOLS, len(_TOOLS)))
    call = {"name": name, "arguments": {field: values[field] for field in fields}}
    return f"Tools: {offered}\nWrite the call as JSON for: {asked}", _json(call), {}


def summarize_log(rng: random.Random) -> Drawn:
    events = [
        (rng.choice(_PEOPLE[:5]), rng.choice(("opened", "closed", "moved")), rng.randrange(100, 999))
        for _ in range(rng.randrange(5, 10))
    ]
    lines = "\n".join(
        f"{8 + at}:00 {person} {verb} ticket {ticket}" for at, (person, verb, ticket) in enumerate(events)
    )
    by_verb = [(verb, sum(event[1] == verb for event in events)) for verb in ("opened", "closed", "moved")]
    people = sorted({person for person, _, _ in events})
    summary = f"{', '.join(people)}: " + ", ".join(f"{count} {verb}" for verb, count in by_verb if count)
    return f"Summarize: who, sorted, and how many tickets were opened, closed, moved.\n{lines}", f"{summary}.", {}


def csv_to_json(rng: random.Random) -> Drawn:
    rows = _stock(rng, rng.randrange(2, 5))
    lines = "\n".join(f"{item};{city};{count};{price}" for item, city, count, price in rows)
    made = [{"item": item, "city": city, "count": count, "price": price} for item, city, count, price in rows]
    return f"Convert to a JSON list.\nitem;city;count;price\n{lines}", _json(made), {}


def date_convert(rng: random.Random) -> Drawn:
    day = datetime.date(rng.randrange(1950, 2050), 1, 1) + datetime.timedelta(rng.randrange(365))
    later = rng.choice((1, 7, 10, 30))
    written = rng.choice(
        (f"{day.day} {_MONTHS[day.month - 1]} {day.year}", f"{_MONTHS[day.month - 1]} {day.day}, {day.year}")
    )
    moved = day + datetime.timedelta(later)
    prompt = f"Write the date in ISO form, and the date {later} days later: {written}"
    return prompt, f"{day.isoformat()}, {moved.isoformat()}", {}


def write_sql(rng: random.Random) -> Drawn:
    city, limit = rng.choice(_CITIES), rng.randrange(3, 80)
    column, other = rng.sample(("count", "price"), 2)
    question, query = rng.choice(
        (
            (
                f"items in {city} with {column} above {limit}",
                f"SELECT item FROM stock WHERE city = '{city}' AND {column} > {limit};",
            ),
            (f"the mean {column} by city", f"SELECT city, AVG({column}) FROM stock GROUP BY city;"),
            (
                f"the {limit % 9 + 2} items of largest {column}",
                f"SELECT item FROM stock ORDER BY {column} DESC LIMIT {limit % 9 + 2};",
            ),
            (
                f"how many items in {city} have {column} below {other} plus {limit}",
                f"SELECT COUNT(*) FROM stock WHERE city = '{city}' AND {column} < {other} + {limit};",
            ),
        )
    )
    return f"Table stock(item, city, count, price). Write SQL: {question}.", query, {}


_DRAWS = (
    extract_order, table_lookup, table_sum, word_problem, code_repair, classify_ticket, rewrite_formal, tool_call,
    summarize_log, csv_to_json, date_convert, write_sql,
)  # fmt: skip


def _tasks() -> tuple[DemoTask, ...]:
    """Return the tasks as `eval/tasks/`, the one list, has them, each with how it is drawn."""
    listed = [(task.load(draw.__name__), draw) for draw in _DRAWS]
    return tuple(
        DemoTask(one.name, one.family, one.metric.primary, one.decoding.max_tokens, one.description, draw)
        for one, draw in listed
    )


REAL_TASKS = _tasks()


def write(out: Path) -> None:
    """Write every task's splits below a folder."""
    for one in REAL_TASKS:
        (out / one.name).mkdir(parents=True, exist_ok=True)
        for split, size in SIZES:
            assert split in SPLITS
            drawn = itertools.islice(one.examples(split, "0"), size)
            lines = (_json({"id": f"{one.name}-{split}-{at}", **example}) for at, example in enumerate(drawn))
            write_atomically(out / one.name / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """Write the data and return the exit status."""
    parser = Parser(prog="python -m data.real_tasks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks, one folder each")
    out = parser.parse_args(argv).out
    write(out)
    print(f"{out}: {', '.join(one.name for one in REAL_TASKS)} ({LICENCE})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
