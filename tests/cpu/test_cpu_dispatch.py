"""What the backend serves, what it refuses, and why."""

from __future__ import annotations

import pytest
import torch

import lowkernels
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

pytestmark = pytest.mark.usefixtures("native")


def reason(operator: str, **shape: object) -> str | None:
    """Why auto did not take the native kernels for a call, or None if it did."""
    choice = OPERATORS[operator].explain(*random_call(operator, **shape).args, backend="auto")
    return None if choice.backend == "cpu" else dict(choice.rejected).get("cpu", "preferred another")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_takes_it(operator: str, dtype: torch.dtype) -> None:
    assert reason(operator, channels=16, dtype=dtype) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_dtypes_are_refused(operator: str, dtype: torch.dtype) -> None:
    assert str(dtype) in reason(operator, channels=16, dtype=dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_channels_that_are_no_multiple_of_4_are_refused(operator: str) -> None:
    shape = {"out_channels": 6} if operator == "conv_act" else {"channels": 8, "out_channels": 6}
    assert "is 6" in reason(operator, **shape)


def test_by_name_it_serves_or_says_why() -> None:
    args = random_call("mbconv", channels=16, dtype=torch.float16).args
    with pytest.raises(lowkernels.BackendError, match="float16"):
        OPERATORS["mbconv"].overload(*args, None, None, "cpu")


def test_tensors_elsewhere_are_refused() -> None:
    assert "on cuda" in lowkernels.backends.load("cpu").unavailable("cuda")


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_weights_are_the_same_as_none(operator: str) -> None:
    args = random_call(operator, channels=40, height=9).args
    op = OPERATORS[operator]
    packed = op.pack(*op.weights(args), backend="cpu")
    assert packed.backend == "cpu"
    with_packed = op.overload(*args, packed.tensors, packed.backend, "cpu")
    assert torch.equal(with_packed, op.overload(*args, None, None, "cpu"))


def test_packed_weights_of_another_kind_are_an_error() -> None:
    call = random_call("gn_mlp", channels=16)
    op = OPERATORS["gn_mlp"]
    tensors = op.pack(*op.weights(call.args), backend="cpu").tensors
    half = random_call("gn_mlp", channels=16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Pack again"):
        op.overload(*half.args, tensors, "cpu", "cpu")
    other = OPERATORS["conv_act"].pack(*OPERATORS["conv_act"].weights(random_call("conv_act", channels=16).args), backend="cpu")
    block = tensors[0]
    for wrong in ([], other.tensors, [block[:-64]], [torch.cat([block, block])], [block[:3]], [block.float()]):
        with pytest.raises(RuntimeError, match="packed"):
            op.overload(*call.args, wrong, "cpu", "cpu")


def test_compiles_and_exports() -> None:
    call = random_call("fused_mbconv", channels=16)

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.lowkernels.fused_mbconv(x, *call.args[1:], None, None, "cpu")

    expected = Block()(call.args[0])
    assert torch.equal(torch.compile(Block(), backend="aot_eager", fullgraph=True)(call.args[0]), expected)
    exported = torch.export.export(Block(), (call.args[0],)).module()
    assert torch.equal(exported(call.args[0]), expected)


def test_describe_names_the_instruction_set() -> None:
    isa = torch.ops.lowkernels_cpu.layout(True)[0]
    assert isa in lowkernels.backends.load("cpu").describe()
