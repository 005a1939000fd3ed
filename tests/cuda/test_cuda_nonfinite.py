"""Infinities and NaNs of single pixels: the kernels' results have them where eager PyTorch's have them, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends.cuda import hopper, tiling
from lowkernels.ops import OPERATORS
from lowkernels.testing import assert_within_budget, random_call
from tests.cuda import execution

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Every count of channels that kernels fill up is no multiple of 16.
SHAPE: dict[str, Any] = {"channels": 20, "out_channels": 36, "hidden": 36, "height": 7, "width": 6, "batch": 5}
ACTS: list[dict[str, Any]] = [{"act": act} for act in ("relu6", "relu", "hardswish", "gelu")]
HIDDEN: dict[str, Any] = {"hidden": 132, "stride": 2, "act": "relu6"}
CALLS: dict[str, list[dict[str, Any]]] = {
    "conv_act": [*ACTS, {"channels": 5, "act": "silu"}, {"pool": True, "act": "relu"}],
    "separable_conv": [*ACTS, {"act": "silu"}],
    "mbconv": [*ACTS, HIDDEN],
    "fused_mbconv": [*ACTS, HIDDEN],
    "gn_mlp": [{"act": "relu"}],
    # A kernel of 1 and stride 2 passes most pixels by.
    "lowtention": [{"norm": norm, "head_dim": 12, "num_heads": 2, "stride": 2, "kernel_size": 1} for norm in (True, False)],
}
# What the tier of compute capability 9.0 serves of mbconv.
WIDE: dict[str, Any] = {"channels": 132}
# What makes channels that only fill up a tile zero, whatever the inputs; and what to leave of it.
MASKS = {
    "mbconv": ("mbconv.cu", "if (!live) clear(acc);", ""),
    "fused_mbconv": ("expand_project.cuh", "= live_group ? pack2", "= true ? pack2"),
    "mbconv_sm90": ("mbconv_sm90.cu", "if (channel + g * kGroup >= p.expanded) clear(v[g]);", ""),
    "fused_mbconv_sm90": ("expand_project_sm90.cuh", "b[i] = live ? pack2", "b[i] = true ? pack2"),
}


def poisoned_call(operator: str, dtype: torch.dtype, shape: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments with one value each of four of five images: in a corner, at an edge, inside, and in the last pixel."""
    x, *rest = random_call(operator, dtype=dtype, **{**SHAPE, **shape}).args
    x[0, 3, 0, 0] = torch.inf
    x[1, 0, 3, 5] = -torch.inf
    x[3, 4, 5, 2] = torch.inf
    x[4, 1, 6, 5] = torch.nan
    return x, *rest


def run(library: Path, operator: str, args: tuple[Any, ...]) -> torch.Tensor:
    with execution.watched(library) as outcome:
        result = execution.run(operator, args)
    assert not outcome.reports, "\n".join(outcome.reports)
    return result


def assert_like_eager(operator: str, args: tuple[Any, ...], result: torch.Tensor) -> None:
    """Positions as in float64: in 16 bits, PyTorch's own CPU convolutions fill up channels and make NaN of infinities too."""
    op = OPERATORS[operator]
    eager = op.overload(*args, None, None, "eager")
    exact = op.overload(*(a.double() if isinstance(a, torch.Tensor) else a for a in args), None, None, "eager")
    finite = torch.isfinite(exact)
    assert 0 < int(finite.sum()) < finite.numel(), "the call shows nothing"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        same = torch.equal(kind(result), kind(exact))
        assert same, f"{kind.__name__}: {int(kind(result).sum())}, eager {int(kind(exact).sum())}"
    finite &= torch.isfinite(eager)
    parts = (torch.where(finite, t, 0.0) for t in (result, eager, exact))
    assert_within_budget(*parts, op.accumulation_length(*args), operator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_where_eager_has_them(kernels: Path, operator: str, dtype: str) -> None:
    for shape in CALLS[operator]:
        args = poisoned_call(operator, DTYPES[dtype], shape)
        assert_like_eager(operator, args, run(kernels, operator, args))


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls on CPU tensors are planned as on an H200."""
    monkeypatch.setattr(hopper, "unusable", lambda device: None)
    monkeypatch.setattr(hopper, "_checked", {})
    monkeypatch.setattr(tiling, "SMALLEST", tiling.Device(227 * 1024, 228 * 1024, 132))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_hopper(on_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    on_hopper(monkeypatch)
    library = execution.kernels(names=("fused_mbconv_sm90", "gn_mlp_sm90", "mbconv_sm90"))
    for operator in ("fused_mbconv", "gn_mlp", "mbconv"):
        for shape in CALLS[operator] if operator != "mbconv" else ({**act, **WIDE} for act in ACTS):
            args = poisoned_call(operator, DTYPES[dtype], shape)
            with hopper.forced(0):
                assert_like_eager(operator, args, run(library, operator, args))


@pytest.mark.parametrize("kernel", MASKS)
def test_without_its_mask_a_kernel_makes_nan_of_an_infinity(on_cpu: None, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    file, mask, none = MASKS[kernel]
    library = execution.kernels({file: lambda text: text.replace(mask, none)}, (kernel,))
    operator = kernel.removesuffix("_sm90")
    if operator != kernel:
        on_hopper(monkeypatch)
    args = poisoned_call(operator, torch.float16, ACTS[0] | (WIDE if kernel == "mbconv_sm90" else {}))
    with hopper.forced(0):
        result = run(library, operator, args)
    with pytest.raises(AssertionError, match="isnan"):
        assert_like_eager(operator, args, result)
