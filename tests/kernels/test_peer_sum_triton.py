"""The joined sum over members, residual and norm, in the interpreter, member after member, all flags raised."""

from __future__ import annotations

import pytest
import torch

from inlaid.kernels.cpu import rms_norm
from inlaid.kernels.peer_sum_triton import PeerMemory, peer_sum_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 64])
def test_sum_residual_and_norm_are_those_of_the_parts(count: int, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(count)
    tokens, eps = 5, 1e-5
    atol, rtol = (0.0, 0.0) if dtype == torch.float16 else (2**-6, 2**-6)  # the interpreter cuts bfloat16 off
    products = [torch.randn(tokens, width, device=DEVICE).to(dtype) for _ in range(count)]
    start, weight = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((tokens, width), (width,)))
    flags = [torch.zeros(tokens, count, dtype=torch.int32, device=DEVICE) for _ in range(count)]
    summed = sum(product.float() for product in products).to(dtype)
    residuals = [start.clone() for _ in range(count)]
    memories = [
        PeerMemory(member, addresses(products), addresses(flags), torch.zeros(tokens, dtype=torch.int32, device=DEVICE))
        for member in range(count)
    ]
    want = start
    for epoch in (1, 2):  # a launch again, as a graph replays it
        for each in flags:
            each.fill_(epoch)  # the others have come
        want = (want.float() + summed.float()).to(dtype)
        outs = []
        for memory, residual in zip(memories, residuals, strict=True):
            outs.append(torch.empty_like(residual))
            peer_sum_norm(memory, residual, weight, eps, outs[-1])
            assert torch.equal(residual, residuals[0])
            assert torch.allclose(residual.float(), want.float(), atol=atol, rtol=rtol)
            assert memory.epochs.tolist() == [epoch] * tokens
        assert all(torch.equal(out, outs[0]) for out in outs), "the same bits on all members"
        assert torch.allclose(outs[0].float(), rms_norm(want, weight, eps).float(), atol=atol + 4e-3, rtol=rtol + 4e-3)


def test_a_member_raises_its_flag_at_all_members() -> None:
    flags = [torch.ones(3, 2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for each in flags:
        each[:, 0] = 0
    products = [torch.randn(3, 16, device=DEVICE, dtype=torch.float16) for _ in range(2)]
    memory = PeerMemory(0, addresses(products), addresses(flags), torch.zeros(3, dtype=torch.int32, device=DEVICE))
    x = torch.zeros(3, 16, device=DEVICE, dtype=torch.float16)
    peer_sum_norm(memory, x, torch.ones(16, device=DEVICE, dtype=torch.float16), 1e-5, torch.empty_like(x))
    assert all(each.tolist() == [[1, 1]] * 3 for each in flags)


def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=DEVICE)
