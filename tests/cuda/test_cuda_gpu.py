"""The kernels on a GPU: every shape they were proved on in the shim, LowFormer's own layers, graphs, streams and large tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowkernels import backends
from lowkernels.ops import OPERATORS
from lowkernels.testing import check_call, random_call
from tests.cuda import cases

pytestmark = pytest.mark.gpu
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("conv_act", {"channels": 3, "out_channels": 16, "height": 224, "width": 224, "stride": 2, "act": "hardswish"}),
    ("conv_act", {"channels": 256, "out_channels": 1536, "kernel_size": 1, "act": "hardswish", "pool": True}),
    ("conv_act", {"channels": 256, "out_channels": 1536, "height": 16, "width": 16, "kernel_size": 1, "pool": True}),
    ("conv_act", {"channels": 1536, "out_channels": 1600, "height": 1, "width": 1, "kernel_size": 1}),
    ("conv_act", {"channels": 128, "out_channels": 512, "height": 14, "width": 14, "act": "hardswish"}),
    ("separable_conv", {"channels": 32, "out_channels": 16, "height": 112, "width": 112}),
    ("separable_conv", {"channels": 512, "height": 14, "width": 14}),
    ("mbconv", {"channels": 256, "height": 7, "width": 7}),
    ("mbconv", {"channels": 256, "height": 14, "width": 14}),
    ("mbconv", {"channels": 320, "height": 16, "width": 16}),
    ("mbconv", {"channels": 24, "hidden": 144, "out_channels": 40, "height": 56, "width": 56, "stride": 2, "kernel_size": 5}),
    ("fused_mbconv", {"channels": 16, "hidden": 96, "out_channels": 32, "height": 112, "width": 112, "stride": 2}),
    ("fused_mbconv", {"channels": 20, "hidden": 120, "out_channels": 40, "height": 112, "width": 112, "stride": 2}),
    ("fused_mbconv", {"channels": 64, "hidden": 384, "out_channels": 128, "height": 28, "width": 28, "stride": 2}),
    ("fused_mbconv", {"channels": 128, "height": 14, "width": 14}),
    ("fused_mbconv", {"channels": 160, "height": 14, "width": 14}),
    ("fused_mbconv", {"channels": 128, "height": 28, "width": 28}),
    ("fused_mbconv", {"channels": 128, "hidden": 768, "out_channels": 256, "height": 14, "width": 14, "stride": 2}),
    ("fused_mbconv", {"channels": 256, "hidden": 1536, "out_channels": 512, "height": 14, "width": 14, "stride": 2}),
    ("gn_mlp", {"channels": 128, "height": 14, "width": 14}),
    ("gn_mlp", {"channels": 256, "height": 7, "width": 7}),
    ("gn_mlp", {"channels": 320, "height": 7, "width": 7}),
    ("gn_mlp", {"channels": 256, "height": 14, "width": 14}),
    ("gn_mlp", {"channels": 128, "height": 32, "width": 32}),
    ("lowtention", {"channels": 256, "num_heads": 4, "head_dim": 32, "height": 7, "width": 7}),
    ("lowtention", {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 14, "width": 14, "kernel_size": 5, "stride": 2}),
    ("lowtention", {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 32, "width": 32, "kernel_size": 5, "stride": 2}),
]


@pytest.fixture(autouse=True)
def _usable() -> None:
    reason = backends.load("cuda").unavailable("cuda")
    if reason is not None:
        pytest.skip(reason)


def refusal(operator: str, args: tuple[Any, ...]) -> str | None:
    return dict(OPERATORS[operator].explain(*args).rejected).get("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "shape"), [*LAYERS, *((name, s) for name in cases.OPERATORS for s in cases.NAMED[name])])
def test_layers(operator: str, shape: dict[str, Any], dtype: str) -> None:
    for batch in (1, 17):
        call = random_call(operator, **{**shape, "batch": batch}, dtype=DTYPES[dtype], device="cuda")
        reason = refusal(operator, call.args)
        if reason is None:
            check_call(operator, call.args, "cuda")
        else:
            assert "shared memory" in reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_contract(operator: str, dtype: str) -> None:
    for shape in cases.random_cases(operator, 40):
        call = random_call(operator, **shape, dtype=DTYPES[dtype], device="cuda")
        if refusal(operator, call.args) is None:
            check_call(operator, call.args, "cuda")


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_same_bits_every_time_on_any_stream(operator: str) -> None:
    call = random_call(operator, batch=64, channels=64, dtype=torch.float16, device="cuda")
    overload = OPERATORS[operator].overload
    first = overload(*call.args, None, None, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = overload(*call.args, None, None, "cuda")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(first, second)


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_captured_in_a_graph(operator: str) -> None:
    op = OPERATORS[operator]
    call = random_call(operator, batch=4, channels=64, dtype=torch.bfloat16, device="cuda")
    weights = op.pack(*op.weights(call.args), backend="cuda")
    tail = (weights.tensors, weights.backend, "cuda")
    expected = op.overload(*call.args, *tail)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.overload(*call.args, *tail)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_more_than_2_to_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    call = random_call("separable_conv", batch=1, channels=64, height=64, width=64, dtype=torch.float16, device="cuda")
    overload = OPERATORS["separable_conv"].overload
    x = torch.zeros(2**31 // (64 * 64 * 64) + 2, 64, 64, 64, dtype=torch.float16, device="cuda").permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1:] = call.args[0]
    out = overload(x, *call.args[1:], None, None, "cuda")
    assert torch.equal(out[-1:], overload(x[-1:].clone(memory_format=torch.channels_last), *call.args[1:], None, None, "cuda"))
