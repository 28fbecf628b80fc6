"""GGUF files become model folders that compute what transformers' own reader of GGUF computes."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inlaid import cli
from inlaid.convert.folder import convert, converted, is_whole
from inlaid.convert.gguf_file import ConvertError, GGUFFile
from inlaid.engine.request import SamplingParams
from inlaid.llm import LLM
from inlaid.server.serving import model_display_name
from inlaid.text.tokenizer import Tokenizer
from tests.convert.tiny import MERGES, SPECIAL, tokens, write_gguf


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(gguf: Path) -> Path:
    convert(gguf, gguf.parent / "out" / "tiny")
    return gguf.parent / "out" / "tiny"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_reader(tmp_path: Path, tied: bool) -> None:
    path = write_gguf(tmp_path / "it.gguf", seed=3, tied=tied)
    convert(path, tmp_path / "made")
    load = AutoModelForCausalLM.from_pretrained
    oracle = load(tmp_path, gguf_file="it.gguf", dtype=torch.float32).eval()
    ours = load(tmp_path / "made", dtype=torch.float32).eval()
    theirs = dict(oracle.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, theirs[name].half().float()), name
    ids = torch.arange(40).remainder(len(tokens()))[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, oracle(ids).logits, rtol=0.01, atol=0.01)


def test_a_gguf_file_is_served_as_its_folder_is(
    gguf: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    answers = [LLM(str(model)).generate(["hello world 12"], params)[0].tokens for model in (gguf, folder)]
    assert answers[0] == answers[1]
    made = converted(gguf)
    assert made.is_relative_to(tmp_path)
    assert made.name == "tiny"
    assert model_display_name(str(gguf)) == "tiny"


def test_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = {token: i for i, token in enumerate(tokens())}
    assert tokenizer.encode("hello w", False) == [ids["hello"], ids["Ġw"]]
    assert tokenizer.encode("12", False) == [ids["1"], ids["2"]], "smollm splits digits before the merges"
    assert tokenizer.encode("<|im_end|>", False) == [2]
    assert all(map(tokenizer.is_special, SPECIAL))
    text = "héllo\n\n wörld 你 1234 it's"
    assert tokenizer.decode(tokenizer.encode(text, False), False) == text
    assert tokenizer.template.render([{"role": "user", "content": "hi"}]).endswith("<|im_start|>assistant\n")


def test_digits_merge_in_the_split_of_gpt2(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf")
    data = path.read_bytes().replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0gpt--2")
    path.write_bytes(data)
    with pytest.raises(ConvertError, match=r"splits texts as 'gpt--2'.*known are gpt-2, smollm.*tokenizer\.json"):
        convert(path, tmp_path / "made")
    assert MERGES[-1] == "1 2"


def test_a_tokenizer_beside_the_file_comes_first(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "it.gguf")
    (tmp_path / "tokenizer.json").write_text('{"mine": 1}')
    convert(path, tmp_path / "made")
    assert json.loads((tmp_path / "made" / "tokenizer.json").read_text()) == {"mine": 1}


def test_the_folder_says_where_it_comes_from_and_notices_a_change(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["eos_token_id"]) == ("llama", True, 2)
    assert json.loads((folder / "source.json").read_text())["source"] == "tiny.gguf"
    assert is_whole(folder)
    kept = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(kept + b" ")
    assert not is_whole(folder)
    (folder / "config.json").write_bytes(kept)
    assert not is_whole(folder / "nowhere")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"llama__expert_count": 8}, "llama.expert_count"),
        ({"llama__attention__sliding_window": 4}, "llama.attention.sliding_window"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type = yarn"),
        ({"llama__attention__key_length": 32}, "rope.dimension_count"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    path = write_gguf(tmp_path / "it.gguf", **fields)
    with pytest.raises(ConvertError, match=said + ".*give the model's Hugging Face folder"):
        convert(path, tmp_path / "made")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["it.gguf"], "nothing half is left"


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="the architecture 'gemma'; read are llama"):
        convert(write_gguf(tmp_path / "it.gguf", kind="gemma"), tmp_path / "made")


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.001, 0.05, 0.2, 0.5, 0.99])
def test_a_cut_file_is_refused(gguf: Path, tmp_path: Path, share: float) -> None:
    data = gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: max(1, int(len(data) * share))])
    with pytest.raises(ConvertError, match=r"is not a GGUF file|cut short|damaged"):
        convert(cut, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_damaged_header_is_refused(gguf: Path, tmp_path: Path) -> None:
    data = gguf.read_bytes()
    for at in range(4, 400, 7):
        (tmp_path / "it.gguf").write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        with suppress(ConvertError):  # nothing else is raised, and no memory is taken for what a number says
            GGUFFile(tmp_path / "it.gguf")


def test_fields_of_the_wrong_kind_and_endless_lists_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "kind.gguf", tokenizer__ggml__padding_token_id="a")
    with pytest.raises(ConvertError, match="a field has a value of the wrong kind"):
        convert(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    lists = struct.pack("<IQ", 9, 1) * 5000
    (deep := tmp_path / "deep.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a\x09\0\0\0" + lists)
    with pytest.raises(ConvertError, match="damaged"):
        GGUFFile(deep)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="does not exist; give a GGUF file"):
        converted(tmp_path / "no.gguf")


def test_the_demo_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SMOLLM2", tmp_path / "smollm2")
    monkeypatch.setattr(cli, "SMOLLM2_ADAPTERS", tmp_path / "bundled")
    with pytest.raises(cli.UsageError, match=r"fetch it: bash models/download\.sh smollm2"):
        cli.model_and_adapters("", {}, "smollm2")
    for name in ("smollm2/config.json", "bundled/a/adapter_config.json", "smollm2-adapters/b/adapter_config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    base, adapters = cli.model_and_adapters("", {"c": "/c"}, "smollm2")
    assert (base, list(adapters)) == (str(tmp_path / "smollm2"), ["a", "b", "c"])
    with pytest.raises(cli.UsageError, match="--demo smollm2 serves a model of its own"):
        cli.model_and_adapters("x/y", {}, "smollm2")
