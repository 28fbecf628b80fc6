"""Exchanges through shared memory, by threads in the place of processes: sums in a fixed order, and an end to waiting
when a member fails, ends or hangs."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch

from inlaid.kernels import shared_group
from inlaid.kernels.group import GroupBroken, StepFailed
from inlaid.kernels.shared_group import SharedGroup


def members(count: int, seconds: float = 60.0, gone: Callable[[], str | None] = lambda: None) -> list[SharedGroup]:
    memory = mmap.mmap(-1, shared_group.num_bytes(count))
    return [SharedGroup(memory, index, count, seconds, gone) for index in range(count)]


def together(group: list[SharedGroup], act: Callable[[SharedGroup], Any]) -> list[Any]:
    """Let all members do the same, each in its thread; return what each has, or raised."""
    found: list[Any] = [None] * len(group)

    def run(member: SharedGroup) -> None:
        try:
            found[member.index] = act(member)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            found[member.index] = error

    threads = [threading.Thread(target=run, args=(member,)) for member in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_in_the_members_order_and_equal_on_all(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    given = [[torch.randn(5, 33).mul(1000).to(dtype) for _ in range(count)] for _ in range(4)]

    def act(member: SharedGroup) -> list[torch.Tensor]:
        made = []
        for step, tensors in enumerate(given, 1):
            member.begin(step)
            for _ in range(3):
                made.append(tensors[member.index].clone())
                member.sum(made[-1])
        return made

    found = together(members(count), act)
    for place, sums in enumerate(zip(*found, strict=True)):
        want = reduce(torch.add, [tensor.float() for tensor in given[place // 3]]).to(dtype)
        assert all(torch.equal(each, want) for each in sums)


def test_columns_stand_side_by_side_and_large_tensors_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_group, "BUFFER", 256)
    parts = [torch.randn(50, 7) for _ in range(3)]

    def act(member: SharedGroup) -> tuple[torch.Tensor, torch.Tensor]:
        member.begin(1)
        total = parts[member.index].clone()
        member.sum(total)
        return member.gather(parts[member.index]), total

    for gathered, total in together(members(3), act):
        assert torch.equal(gathered, torch.cat(parts, dim=1))
        assert torch.equal(total, parts[0] + parts[1] + parts[2])


def test_a_failed_step_ends_for_all_and_the_next_one_goes_well() -> None:
    def act(member: SharedGroup) -> tuple[bool, torch.Tensor]:
        x, left = torch.ones(4), False
        member.begin(1)
        try:
            for place in range(5):
                if member.index == 1 and place == 3:
                    member.fail()
                    break
                member.sum(x.clone())
        except StepFailed:
            left = True
        member.begin(2)
        member.sum(x)
        return left, x

    found = together(members(3), act)
    assert [left for left, _ in found] == [True, False, True]
    assert all(torch.equal(x, torch.full((4,), 3.0)) for _, x in found)


def test_a_member_that_does_not_come_breaks_the_group() -> None:
    first, _ = members(2, seconds=0.05)
    with pytest.raises(GroupBroken, match=r"member 1 of the group has not answered within 0\.05 s"):
        first.begin(1)
    first, _ = members(2, gone=lambda: "member 1 of the group has ended")
    with pytest.raises(GroupBroken, match="member 1 of the group has ended"):
        first.begin(1)
    assert first.waited()[0] >= 0
