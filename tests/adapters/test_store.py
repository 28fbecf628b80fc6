"""The store: names, identities and residence stay whole through any order of loads, uses, replacements and removals."""

from __future__ import annotations

import pytest
import torch

from inlaid.adapters.adapter import Adapter, AdapterEntry, AdapterError
from inlaid.adapters.store import AdapterStore
from inlaid.adapters.tables import default_pool_elements
from inlaid.model.spec import ModelSpec, spec_from_config

SPEC: ModelSpec = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
)
CPU = torch.device("cpu")


def adapter(number: int, sites: int = 2, size: int = 64) -> Adapter:
    """Content and identity follow from the number; each entry takes 2 * size elements."""
    entries = tuple(
        AdapterEntry(site, 2 * size * site, 2 * size * site + size, 2 * size * (site + 1), number + 1, number + 0.5)
        for site in range(sites)
    )
    return Adapter(f"identity-{number}", "", torch.full((2 * size * sites,), float(number + 1)), entries)


def store(max_resident: int = 3, elements: int = 1024, max_held: int = 100) -> AdapterStore:
    return AdapterStore(SPEC, max_resident, elements, CPU, torch.float32, max_held)


def test_tables_point_at_the_weights() -> None:
    adapters = store()
    identity = adapters.add("a", adapter(3))
    adapters.want(identity)
    assert adapters.ready(identity)
    slot = adapters.slot(identity)
    a_start, b_start, rank = adapters.pages.table[slot, 1].tolist()
    assert (b_start - a_start, rank) == (64, 4)
    assert (adapters.pages.pool[a_start : a_start + 128] == 4.0).all()
    assert adapters.pages.scale[slot].tolist() == [3.5, 3.5] + [0.0] * 12
    assert adapters.slot(None) == 0
    assert not adapters.pages.table[0].any()
    assert adapters.used_bytes == 4 * 256
    assert adapters.capacity_bytes == 4 * 1024


def test_an_adapters_parts_are_told_by_module() -> None:
    adapters = store()
    parts = adapters.parts(adapters.add("a", adapter(3)))
    assert parts["q_proj"] == {"layers": [0], "ranks": [4], "scales": [3.5]}
    assert parts["down_proj"] == {"layers": [], "ranks": [], "scales": []}
    assert len(parts) == 7


def test_unknown_and_repeated_names_are_errors() -> None:
    adapters = store()
    with pytest.raises(AdapterError, match="'b' is not loaded; loaded: none"):
        adapters.resolve("b")
    adapters.add("a", adapter(1))
    with pytest.raises(AdapterError, match="already loaded"):
        adapters.add("a", adapter(2))
    with pytest.raises(AdapterError, match="'b' is not loaded; loaded: a"):
        adapters.remove("b")


def test_two_names_share_one_identity() -> None:
    adapters = store()
    assert adapters.add("a", adapter(1)) == adapters.add("b", adapter(1))
    adapters.remove("a")
    assert adapters.resolve("b") == "identity-1"
    adapters.check()


def test_replaced_weights_serve_the_requests_they_have() -> None:
    adapters = store()
    adapters.add("a", adapter(1))
    old = adapters.resolve("a")
    adapters.want(old)
    adapters.pin(old)
    new = adapters.replace("a", adapter(2))
    assert adapters.resolve("a") == new != old
    adapters.want(new)
    assert adapters.slot(old) != adapters.slot(new)
    assert adapters.ready(old)
    adapters.unpin(old)
    adapters.release(old)
    with pytest.raises(RuntimeError, match="no longer loaded"):
        adapters.ready(old)
    assert adapters.used_bytes == 4 * 256
    adapters.check()


def test_removed_adapter_goes_with_its_last_request() -> None:
    adapters = store()
    adapters.add("a", adapter(1))
    identity = adapters.resolve("a")
    adapters.want(identity)
    assert adapters.remove("a") == 1
    with pytest.raises(AdapterError, match="not loaded"):
        adapters.resolve("a")
    assert adapters.ready(identity)
    adapters.release(identity)
    assert adapters.used_bytes == 0
    assert adapters.host_bytes == 0
    adapters.check()


def test_least_recently_used_makes_room_and_pinned_stays() -> None:
    adapters = store(max_resident=2)
    one, two, three = (adapters.add(f"a{n}", adapter(n)) for n in range(3))
    adapters.want(one)
    adapters.want(two)
    adapters.pin(one)
    adapters.want(three)
    assert sorted(adapters.resident()) == sorted([one, three])
    adapters.pin(three)
    adapters.want(two)
    assert not adapters.ready(two)
    adapters.unpin(one)
    adapters.want(two)
    assert sorted(adapters.resident()) == sorted([two, three])
    adapters.check()


def test_wanted_together_they_take_turns() -> None:
    """Requests wait for three adapters and one place: the first stays until it has been used."""
    adapters = store(max_resident=1)
    names = [f"a{n}" for n in range(3)]
    for n, name in enumerate(names):
        adapters.add(name, adapter(n))
    identities = [adapters.resolve(name) for name in names]
    for _ in range(5):
        for identity in identities:
            adapters.want(identity)
        assert adapters.resident() == [identities[0]]
    adapters.pin(identities[0])
    adapters.unpin(identities[0])
    adapters.want(identities[1])
    assert adapters.resident() == [identities[1]]


def test_an_adapter_that_never_runs_does_not_block_for_ever() -> None:
    adapters = store(max_resident=1)
    adapters.add("a", adapter(0))
    adapters.add("b", adapter(1))
    first, second = adapters.resolve("a"), adapters.resolve("b")
    adapters.want(first)
    for _ in range(1000):
        adapters.want(second)
    assert adapters.resident() == [second]


def test_a_pinned_adapter_stays_and_one_place_stays_free() -> None:
    adapters = store(max_resident=3)
    kept = adapters.add("kept", adapter(0), keep=True)
    assert adapters.resident() == [kept]
    for n in range(1, 6):
        adapters.want(adapters.add(f"a{n}", adapter(n)))
    assert kept in adapters.resident()
    adapters.replace("a1", adapter(1), keep=True)
    with pytest.raises(AdapterError, match="2 of 3 places are, and one must stay free"):
        adapters.add("third", adapter(9), keep=True)
    with pytest.raises(AdapterError, match="2 of 3 places are"):
        adapters.replace("a2", adapter(2), keep=True)
    with pytest.raises(AdapterError, match="2 of 3 places are"):
        adapters.pin_name("a2", True)
    adapters.pin_name("a1", False)
    adapters.pin_name("a2", True)
    assert [adapters.kept(name) for name in ("a1", "a2")] == [False, True]
    adapters.pin_name("a2", False)
    adapters.pin_name("a1", True)
    adapters.check()
    swapped = adapters.replace("kept", adapter(10))
    assert adapters.kept("kept")
    for n in range(1, 6):
        adapters.want(f"identity-{n}")
    assert {swapped, "identity-1"} <= set(adapters.resident())
    adapters.replace("kept", adapter(10), keep=False)
    adapters.remove("a1")
    for n in range(2, 6):
        adapters.want(f"identity-{n}")
    assert swapped not in adapters.resident()
    adapters.check()


def test_pins_leave_bytes_for_the_largest_of_the_others() -> None:
    adapters = store(max_resident=8, elements=1024)
    adapters.add("large", adapter(1, sites=4))
    adapters.add("a", adapter(2), keep=True)
    with pytest.raises(AdapterError, match="it would leave too few bytes for the others"):
        adapters.add("b", adapter(3, sites=3), keep=True)
    with pytest.raises(AdapterError, match="beside 1024 that are pinned"):
        adapters.add("larger", adapter(4, sites=7))
    assert adapters.names() == ["a", "large"]
    adapters.check()


def test_too_large_and_too_many_are_refused() -> None:
    adapters = store(elements=512, max_held=2)
    with pytest.raises(AdapterError, match=r"needs 4096 bytes of the 2048.*--adapter-memory-gib"):
        adapters.add("large", adapter(1, sites=8))
    adapters.add("a", adapter(1))
    adapters.add("b", adapter(2))
    with pytest.raises(AdapterError, match="--max-cpu-loras"):
        adapters.add("c", adapter(3))
    with pytest.raises(AdapterError, match="--max-cpu-loras"):
        adapters.add("second name", adapter(1))
    assert adapters.names() == ["a", "b"]
    adapters.replace("b", adapter(1))
    assert adapters.identity("b") == adapters.identity("a")


def test_weights_survive_a_fragmented_pool() -> None:
    adapters = store(max_resident=8, elements=1024)
    small = [adapters.add(f"s{n}", adapter(n, sites=1)) for n in range(8)]
    for identity in small:
        adapters.want(identity)
    for n in (1, 3, 5, 7):
        adapters.remove(f"s{n}")
    scattered = adapters.add("wide", adapter(9, sites=3))
    adapters.want(scattered)
    slot = adapters.slot(scattered)
    starts = adapters.pages.table[slot, :3, 0].tolist()
    assert starts[1] - starts[0] != 128
    for start in starts:
        assert (adapters.pages.pool[start : start + 128] == 10.0).all()
    adapters.check()


def test_default_room_holds_that_many_of_rank_16() -> None:
    per_adapter = 16 * sum(sum(SPEC.module_shape(m)) for m in ("q_proj", "k_proj", "v_proj", "o_proj")) * 2
    assert default_pool_elements(SPEC, 5) > 5 * per_adapter
