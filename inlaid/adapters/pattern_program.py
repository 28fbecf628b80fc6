"""The program of a pattern: its instructions, and the compiler that writes them while it reads the pattern from left to
right. `pattern.py` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_LENGTH = 65_536  # characters of a pattern
MAX_INSTRUCTIONS = 65_536  # of a program; counted repetition is written out
MAX_DEPTH = 50  # groups within groups

Test = Callable[[str], bool]


class PatternError(ValueError):
    """The pattern cannot be matched; the message says why."""


@dataclass(frozen=True)
class Char:
    """Take one character that passes the test."""

    test: Test


@dataclass(frozen=True)
class Split:
    """Go on at each of these."""

    targets: tuple[int, ...]


@dataclass(frozen=True)
class Assert:
    """Go on if the text holds here what the test says of (text, position)."""

    test: Callable[[str, int], bool]


@dataclass(frozen=True)
class Look:
    """Go on if the program from `begin` on matches here; with `negated` if it does not."""

    begin: int
    target: int
    negated: bool


@dataclass(frozen=True)
class Match:
    """The text matches up to here."""


Instruction = Char | Split | Assert | Look | Match


def compile_pattern(text: str) -> list[Instruction]:
    """Return the program of a pattern. PatternError: it is not a regular expression, or not of the syntax supported."""
    return _Compiler(text).program()


def _is_word(c: str) -> bool:
    return c.isalnum() or c == "_"


def _at_boundary(text: str, position: int) -> bool:
    before = position > 0 and _is_word(text[position - 1])
    return before != (position < len(text) and _is_word(text[position]))


def _not(test: Test) -> Test:
    return lambda c: not test(c)


def _any_of(tests: list[Test]) -> Test:
    return lambda c: any(test(c) for test in tests)


def _one(wanted: str) -> Test:
    return lambda c: c == wanted


def _between(first: str, last: str) -> Test:
    return lambda c: first <= c <= last


def _class_of(letter: str) -> Test | None:
    """Return the set of characters that an escaped letter stands for, if it is one."""
    tests: tuple[tuple[str, Test], ...] = (("d", str.isdecimal), ("w", _is_word), ("s", str.isspace))
    for name, test in tests:
        if letter.lower() == name:
            return test if letter == name else _not(test)
    return None


def _anchor_of(letter: str) -> Callable[[str, int], bool] | None:
    """Return the place in a text that an escaped letter stands for, if it is one."""
    if letter == "b":
        return _at_boundary
    if letter == "B":
        return lambda text, position: not _at_boundary(text, position)
    if letter == "A":
        return lambda text, position: position == 0
    if letter == "Z":
        return lambda text, position: position == len(text)
    return None


_COUNTS = re.compile(r"\{(\d+)\}|\{(\d*),(\d*)\}")
_OPENING = re.compile(r"\?(?::|P<[A-Za-z_]\w*>)")


class _Compiler:
    """Reads a pattern from left to right and writes its program."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"it has {len(text)} characters, more than {MAX_LENGTH}")
        self._text = text
        self._at = 0
        self._depth = 0

    def program(self) -> list[Instruction]:
        """Return the whole program."""
        body = self._alternatives()
        if self._at < len(self._text):
            raise PatternError("unbalanced parenthesis")
        return [*_placed(body, 0), Match()]

    def _next(self) -> str:
        return self._text[self._at] if self._at < len(self._text) else ""

    def _takes(self, token: str) -> bool:
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _alternatives(self) -> list[Instruction]:
        ways = [self._sequence()]
        while self._takes("|"):
            ways.append(self._sequence())
        if len(ways) == 1:
            return ways[0]
        size = 1 + sum(len(way) + 1 for way in ways)
        begins, program, at = [], list[Instruction](), 1
        for way in ways:
            begins.append(at)
            program += [*_placed(way, at), Split((size,))]
            at += len(way) + 1
        return _bounded([Split(tuple(begins)), *program])

    def _sequence(self) -> list[Instruction]:
        program: list[Instruction] = []
        while self._next() not in ("", "|", ")"):
            program += _placed(self._repeated(), len(program))
            _bounded(program)
        return program

    def _repeated(self) -> list[Instruction]:
        piece = self._piece()
        counts = self._counts()
        if counts is None:
            return piece
        if not self._takes("?") and self._takes("+"):
            raise PatternError("possessive repetition is not supported")
        if self._counts() is not None:
            raise PatternError("multiple repeat")
        return _repeat(piece, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        """Read a repetition, if one stands here: how often at least, and at most (None: without end)."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return counts
        found = _COUNTS.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        if max(map(len, found.groups(""))) > 6:
            raise PatternError("it repeats more often than can be written out")
        if found[1]:
            return int(found[1]), int(found[1])
        least, most = int(found[2] or 0), int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise PatternError("min repeat greater than max repeat")
        return least, most

    def _piece(self) -> list[Instruction]:
        c = self._next()
        self._at += 1
        if c == "(":
            return self._group()
        if c == "[":
            return [Char(self._set())]
        if c == ".":
            return [Char(_not(_one("\n")))]
        if c == "^":
            return [Assert(lambda text, position: position == 0)]
        if c == "$":
            return [Assert(lambda text, position: position == len(text) or text[position:] == "\n")]
        if c in "*+?":
            raise PatternError("nothing to repeat")
        if c == "\\":
            return self._escape()
        return [Char(_one(c))]

    def _group(self) -> list[Instruction]:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"it has groups more than {MAX_DEPTH} deep")
        ahead, not_ahead = self._takes("?="), self._takes("?!")
        if not ahead and not not_ahead and self._next() == "?":
            opening = _OPENING.match(self._text, self._at)
            if opening is None:
                raise PatternError("of the groups that begin with (?, only (?:, (?P<name>, (?= and (?! are supported")
            self._at = opening.end()
        body = self._alternatives()
        if not self._takes(")"):
            raise PatternError("missing ), unterminated subpattern")
        self._depth -= 1
        if ahead or not_ahead:
            return [Look(1, len(body) + 2, not_ahead), *_placed(body, 1), Match()]
        return body

    def _escape(self) -> list[Instruction]:
        letter = self._next()
        anchor = _anchor_of(letter)
        if anchor is not None:
            self._at += 1
            return [Assert(anchor)]
        return [Char(self._escaped())]

    def _escaped(self) -> Test:
        letter = self._next()
        self._at += 1
        if not letter:
            raise PatternError("bad escape (end of pattern)")
        return _class_of(letter) or _one(self._literal(letter))

    def _literal(self, letter: str) -> str:
        if letter in "tnrfva":
            return {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}[letter]
        if letter.isdigit():
            raise PatternError("back-references are not supported")
        if letter.isascii() and letter.isalpha():
            raise PatternError(f"the escape \\{letter} is not supported")
        return letter

    def _set(self) -> Test:
        negated = self._takes("^")
        tests: list[Test] = []
        while tests == [] or self._next() != "]":
            if self._at >= len(self._text):
                raise PatternError("unterminated character set")
            first = self._member()
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._member()
                if not isinstance(first, str) or not isinstance(last, str) or last < first:
                    raise PatternError("bad character range")
                tests.append(_between(first, last))
            else:
                tests.append(_one(first) if isinstance(first, str) else first)
        self._at += 1
        found = _any_of(tests)
        return _not(found) if negated else found

    def _member(self) -> str | Test:
        c = self._next()
        self._at += 1
        if c != "\\":
            return c
        letter = self._next()
        self._at += 1
        if letter == "b":
            return "\b"
        if not letter:
            raise PatternError("unterminated character set")
        return _class_of(letter) or self._literal(letter)


def _placed(program: list[Instruction], at: int) -> list[Instruction]:
    """Move a program behind `at` other instructions: targets are counted from the start of the whole."""
    if at == 0:
        return program
    moved: list[Instruction] = []
    for one in program:
        if isinstance(one, Split):
            one = Split(tuple(target + at for target in one.targets))
        elif isinstance(one, Look):
            one = Look(one.begin + at, one.target + at, one.negated)
        moved.append(one)
    return moved


def _repeat(piece: list[Instruction], least: int, most: int | None) -> list[Instruction]:
    """Write a piece `least` times, then up to `most` times or for ever."""
    if (least + (1 if most is None else most - least)) * (len(piece) + 2) > MAX_INSTRUCTIONS:
        raise PatternError(f"it becomes more than {MAX_INSTRUCTIONS} steps when its repetitions are written out")
    program: list[Instruction] = []
    for _ in range(least):
        program += _placed(piece, len(program))
    if most is None:
        loop = len(program)
        program += [Split((loop + 1, loop + len(piece) + 2)), *_placed(piece, loop + 1), Split((loop,))]
    else:
        end = len(program) + (most - least) * (len(piece) + 1)
        for _ in range(most - least):
            at = len(program)
            program += [Split((at + 1, end)), *_placed(piece, at + 1)]
    return _bounded(program)


def _bounded(program: list[Instruction]) -> list[Instruction]:
    if len(program) > MAX_INSTRUCTIONS:
        raise PatternError(f"it becomes more than {MAX_INSTRUCTIONS} steps when its repetitions are written out")
    return program
