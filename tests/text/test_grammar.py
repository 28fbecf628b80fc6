"""Structured output: what the engine makes of a constraint, through real steps; bad ones are ValueErrors at once."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from inlaid.engine.refusal import Refused
from inlaid.engine.request import Grammar
from inlaid.text import grammar as grammar_module
from inlaid.text.grammar import GrammarCompiler, completing

END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a byte-level tokenizer with an end token and a few merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<end>", *alphabet, "tr", "true", '":', '{"']
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("t", "r"), ('"', ":"), ("{", '"')])
    )
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    return GrammarCompiler(folder, vocab_size=300, eos_ids=(END,))


def allowed(bits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def write(compiler: GrammarCompiler, folder: Path, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """Write random tokens within the mask until the end; None when that took too long."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    random = np.random.default_rng(seed)
    state = compiler.state(grammar)
    outputs: list[int] = []
    for _ in range(most):
        choices = sorted(allowed(state.mask(outputs)))
        assert choices, "nothing is allowed"
        assert max(choices) < tokenizer.get_vocab_size()
        if choices == [END] or (END in choices and random.random() < 0.5):
            return str(tokenizer.decode(outputs))
        outputs.append(int(random.choice([token for token in choices if token != END])))
    return None


def test_choice(compiler: GrammarCompiler, folder: Path) -> None:
    texts = ("yes", "no", 'a "quoted" one', "back\\slash", "grün")
    written = {write(compiler, folder, Grammar(choice=texts), seed) for seed in range(60)}
    assert written == set(texts)


def test_regex(compiler: GrammarCompiler, folder: Path) -> None:
    pattern = r"[a-c]{2,4}-[0-9]+"
    for seed in range(20):
        text = write(compiler, folder, Grammar(regex=pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("text", ['start: "ab" | "cd" /[0-9]/', 'root ::= "ab" | "cd" [0-9]'])
def test_lark_and_gbnf(compiler: GrammarCompiler, folder: Path, text: str) -> None:
    written = {write(compiler, folder, Grammar(lark=text), seed) for seed in range(30)}
    assert "ab" in written
    assert all(one == "ab" or re.fullmatch("cd[0-9]", one or "") for one in written)


def test_the_tokens_that_would_complete_a_word() -> None:
    words = ((1,), (2, 3), (2, 3, 4), (5, 5, 6))
    assert completing([], words) == {1}
    assert completing([2], words) == {1, 3}
    assert completing([2, 3], words) == {1, 4}
    assert completing([5], words) == {1}
    assert completing([9, 5, 5], words) == {1, 6}


def test_json_schema(compiler: GrammarCompiler, folder: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    finished = 0
    for seed in range(20):
        text = write(compiler, folder, Grammar(json_schema=json.dumps(schema)), seed)
        if text is not None:
            finished += 1
            value = json.loads(text)
            assert set(value) == {"ok", "kind"}
            assert isinstance(value["ok"], bool)
    assert finished > 5


def test_json_object_starts_like_one(compiler: GrammarCompiler) -> None:
    tokens = allowed(compiler.state(Grammar(json_object=True)).mask([]))
    assert END not in tokens
    assert tokens


def test_only_the_end_when_complete(compiler: GrammarCompiler, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    state = compiler.state(Grammar(choice=("ab",)))
    outputs = tokenizer.encode("ab").ids
    assert allowed(state.mask(outputs)) == {END}
    assert state.complete


def test_a_broken_grammar_ends_its_own_output(compiler: GrammarCompiler, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    state = compiler.state(Grammar(choice=("ab",)))
    assert state.fault is None
    assert allowed(state.mask(tokenizer.encode("zz").ids)) == {END}
    assert state.fault is not None
    assert "\n" not in state.fault


def test_a_grammar_that_outgrows_the_library_says_so(compiler: GrammarCompiler, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    state = compiler.state(Grammar(regex="a{1000}{1000}"))
    assert allowed(state.mask(tokenizer.encode("a").ids)) == {END}
    assert not state.complete
    assert state.fault is not None
    assert "after 1 tokens" in state.fault


def test_a_constraint_that_allows_nothing_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(Refused, match="cannot be followed after 0 tokens"):
        compiler.state(Grammar(json_schema='{"$ref": "#"}'))


def test_a_tokenizer_larger_than_the_model(folder: Path) -> None:
    small = GrammarCompiler(folder, vocab_size=100, eos_ids=(END,))
    assert small.state(Grammar(choice=("ab",))).mask([]).shape == (4,)


def test_compiled_constraints_are_kept_up_to_a_number_of_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MOST_KEPT", 2 << 20)
    compiler, compiled = GrammarCompiler(folder, 300, [2]), list[str]()
    compile_really = compiler._compile

    def compile_and_note(grammar: Grammar) -> object:
        compiled.append((grammar.regex or "")[0])
        return compile_really(grammar)

    monkeypatch.setattr(compiler, "_compile", compile_and_note)
    constraints = {letter: Grammar(regex=letter * 1200) for letter in "abcd"}  # half a MiB each, so that three are kept
    constraints["e"] = Grammar(regex="e" * 3000)  # more than half of all
    for letter in "abcabcdbcdaeedca":
        compiler.state(constraints[letter])
    assert "".join(compiled) == "abcdaee"
    assert compiler._kept_bytes <= 2 << 20


def test_states_do_not_share_their_place(compiler: GrammarCompiler, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, second = (compiler.state(Grammar(choice=("ab", "cd"))) for _ in range(2))
    before = allowed(second.mask([]))
    first.mask(tokenizer.encode("a").ids)
    assert allowed(second.mask([])) == before


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(),
        Grammar(regex="a", json_object=True),
        Grammar(regex="(["),
        Grammar(json_schema="{"),
        Grammar(json_schema='{"type": "nonsense"}'),
        Grammar(json_schema="[" * 100_000),
        Grammar(regex="a" * 300_000),
        Grammar(choice=()),
        Grammar(lark="start: missing"),
        Grammar(lark="root ::= ("),
        Grammar(lark="nonsense"),
        Grammar(lark="root ::= " + "(" * 100_000),
        Grammar(choice=("a", "")),
    ],
)
def test_bad_constraints_are_value_errors(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(Refused):
        compiler.state(grammar)
    assert issubclass(Refused, ValueError)


def test_absent_library_and_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"needs .*tokenizer\.json"):
        GrammarCompiler(tmp_path, 300, (END,))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Refused, match=r"pip install 'llguidance"):
        GrammarCompiler(folder, 300, (END,))


@pytest.mark.parametrize("whole", [True, False])
def test_a_panic_of_the_library_is_a_refusal_in_our_words(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Raised, it is no Exception and once ended the process; as a message it told of the library's insides."""

    class PanicException(BaseException):
        pass

    def panic(*arguments: object) -> str:
        if whole:
            raise PanicException("panicked at src/lib.rs")
        return "panicked at src/lib.rs:1: index out of bounds"

    library = SimpleNamespace(grammar_from_regex=str, validate_grammar=panic)
    monkeypatch.setattr(compiler._library, "LLMatcher", library)
    with pytest.raises(Refused, match=r"^the constraint is more than the grammar library can take"):
        compiler.state(Grammar(regex="panic"))
