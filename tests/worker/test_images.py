"""Weight images: an engine that starts from one has the weights and adapters of the engine that wrote it, bit by bit;
one that cannot be used is named, and the engine reads its files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid.adapters.adapter import Adapter
from inlaid.config import EngineConfig
from inlaid.model.image import ImageError, WeightImage
from inlaid.runner.base_weights import tensors_of
from inlaid.worker.build import Loaded, build_engine
from inlaid.worker.images import reader_from

DEMO = Path(__file__).parents[2] / "models" / "demo"
CONFIG = EngineConfig(model=str(DEMO / "base"))
ADAPTERS = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, str]:
    """Return an engine read from disk, and the image that it has written."""
    loaded = build_engine(CONFIG, ADAPTERS)
    path = tmp_path_factory.mktemp("image") / "image"
    path.touch()
    assert loaded.prepare_image is not None
    assert loaded.prepare_image(str(path))() == path.stat().st_size
    return loaded, str(path)


def model_of(loaded: Loaded) -> Any:
    return loaded.engine.runner.model  # type: ignore[attr-defined]


def store_of(loaded: Loaded) -> dict[str, Adapter]:
    return {each.identity: each for each in loaded.adapters._model.adapters.in_host_memory()}  # type: ignore[attr-defined]


def test_an_engine_from_an_image_is_the_one_that_wrote_it(
    written: tuple[Loaded, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from inlaid.worker import loading

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("an adapter of the image was read from disk")

    monkeypatch.setattr(loading, "read_adapter", never)
    before, path = written
    after = build_engine(CONFIG, ADAPTERS, image=path)
    old, new = model_of(before), model_of(after)
    for mine, other in ((old.blocks, new.blocks), (old.norm, new.norm), (old.head.packed, new.head.packed)):
        pairs = list(zip(tensors_of(mine), tensors_of(other), strict=True))
        assert pairs
        assert all(torch.equal(one, two) for one, two in pairs)
    assert torch.equal(old.embedding.weight_VD, new.embedding.weight_VD)
    found = store_of(after)
    assert found.keys() == store_of(before).keys()
    for identity, adapter in store_of(before).items():
        assert torch.equal(adapter.flat, found[identity].flat)
        assert adapter.entries == found[identity].entries
    cards = {info.name: info.identity for info in after.adapters.list()}
    assert cards == {info.name: info.identity for info in before.adapters.list()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"linear_backend": "reference"}, "reference")],
)
def test_an_image_of_another_engine_is_named_and_files_are_read(
    written: tuple[Loaded, str], change: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = build_engine(EngineConfig(model=str(DEMO / "base"), **change), {}, image=written[1])  # type: ignore[arg-type]
    assert "weights are read from disk" in caplog.text
    assert reason in caplog.text
    assert loaded.model.base_version == written[0].model.base_version


def test_a_file_that_is_not_whole_is_no_image(written: tuple[Loaded, str], tmp_path: Path) -> None:
    whole = Path(written[1]).read_bytes()
    for wrong in (b"", b"\0" * 4096, whole[:100], b"\x20" + b"\0" * 7 + b"x" * 100):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ImageError, match="wrong is not a"):
            WeightImage(str(tmp_path / "wrong"))


def test_an_adapter_that_the_image_does_not_hold_is_read(written: tuple[Loaded, str]) -> None:
    asked: list[str] = []

    def read(path: str) -> Any:
        asked.append(path)

    take = reader_from(WeightImage(written[1]), read)
    assert take(ADAPTERS["maths"]).identity in store_of(written[0])
    take("elsewhere")
    assert asked == ["elsewhere"]
