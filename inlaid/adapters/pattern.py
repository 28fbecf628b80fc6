"""Regular expressions out of an adapter's config, matched without backtracking: a pattern is compiled to a program that
follows all ways through it at once, so time grows with the length of pattern and text and with nothing else. Python's
`re` can take years for thirty characters of a hostile file, and holds the interpreter meanwhile.

The syntax is the part of `re` that such patterns use: characters, `.`, classes, `\\d \\w \\s \\b` and their opposites,
anchors, groups, `|`, `* + ?` and `{m,n}` (greedy or not: it makes no difference to whether a text matches), and
lookahead. Anything else, such as a back-reference, is refused by name.
"""

from __future__ import annotations

import re

from inlaid.adapters.pattern_program import Assert, Char, Instruction, Look, Match, PatternError, Split, compile_pattern

__all__ = ("Effort", "Pattern", "PatternError")

MAX_WORK = 4_000_000  # instructions followed for all patterns of one config: seconds at most
_COMPILING = 10  # compiling one, which also takes memory, counts as following so many


class Effort:
    """Work that the patterns of one config may still take."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self.left = work

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise PatternError("the patterns in the config take too long to match; write them more simply")


class Pattern:
    """One compiled pattern. PatternError: it is not a regular expression, or not of the syntax above."""

    def __init__(self, text: str, effort: Effort | None = None) -> None:
        self.text = text
        self._effort = effort or Effort()
        self._plain = re.fullmatch(r"[\w.]*", text) is not None  # the common case: a name; "." stands for any character
        self._program: list[Instruction] = []
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._positional = False
        if not self._plain:
            self._program = compile_pattern(text)
            self._effort.spend(_COMPILING * len(self._program))
            self._positional = any(isinstance(one, Assert | Look) for one in self._program)

    def full_match(self, text: str) -> bool:
        """Say whether the whole text matches."""
        self._effort.spend(1)
        if self._plain:
            return self._plain_match(text)
        return self._run(text, 0, 0, whole=True)

    def match_ending(self, path: str) -> bool:
        """Say whether the path, or what follows one of its dots, matches: how PEFT looks up a module's pattern."""
        self._effort.spend(1)
        if self._plain:
            start = len(path) - len(self.text)
            return start >= 0 and (start == 0 or path[start - 1] == ".") and self._plain_match(path[start:])
        starts = [0, *(i + 1 for i, c in enumerate(path) if c == ".")]
        return any(self._run(path, 0, start, whole=True) for start in starts)

    def _plain_match(self, text: str) -> bool:
        if text == self.text:
            return True
        same_length = len(text) == len(self.text)
        return same_length and all(a == b or (a == "." and b != "\n") for a, b in zip(self.text, text, strict=True))

    def _run(self, text: str, begin: int, start: int, whole: bool) -> bool:
        """Follow the program from instruction `begin` at position `start`."""
        states = self._reach({begin}, text, start)
        for position in range(start, len(text)):
            if not states or (not whole and self._matches(states)):
                break
            states = self._step(states, text, position)
        else:
            return self._matches(states)
        return not whole and self._matches(states)

    def _matches(self, states: frozenset[int]) -> bool:
        return any(isinstance(self._program[state], Match) for state in states)

    def _step(self, states: frozenset[int], text: str, position: int) -> frozenset[int]:
        key = (states, text[position])
        known = None if self._positional else self._steps.get(key)
        if known is not None:
            return known
        taken = set()
        self._effort.spend(len(states))
        for state in states:
            instruction = self._program[state]
            if isinstance(instruction, Char) and instruction.test(text[position]):
                taken.add(state + 1)
        reached = self._reach(taken, text, position + 1)
        if not self._positional:
            self._steps[key] = reached
        return reached

    def _reach(self, states: set[int], text: str, position: int) -> frozenset[int]:
        """All instructions that are reached without taking a character."""
        reached: set[int] = set()
        pending = list(states)
        while pending:
            state = pending.pop()
            if state in reached:
                continue
            reached.add(state)
            self._effort.spend(1)
            instruction = self._program[state]
            if isinstance(instruction, Split):
                pending += instruction.targets
            elif isinstance(instruction, Assert) and instruction.test(text, position):
                pending.append(state + 1)
            elif isinstance(instruction, Look):
                found = self._run(text, instruction.begin, position, whole=False)
                if found != instruction.negated:
                    pending.append(instruction.target)
        return frozenset(reached)
