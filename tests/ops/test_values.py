"""Values: against an independent computation for shapes of every kind, in every dtype and memory layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from lowkernels import BackendError
from lowkernels.ops import ACTIVATIONS, OPERATORS
from lowkernels.testing import assert_within_budget, measure_error, random_call

from .cases import (
    BACKENDS,
    CASES,
    FIRST_CASES,
    LAYOUTS,
    NAMES,
    Target,
    arguments,
    canonical_stride,
    map_tensors,
    named,
    run,
    run_on,
    tensors,
    with_grad,
)
from .independent import exact, plain

# The project's bound on float64 results, relative to the largest value.
PARITY = 1e-9

_sizes = st.one_of(st.integers(1, 4), st.integers(5, 17))


@st.composite
def _configurations(draw: st.DrawFn, operator: str) -> dict[str, Any]:
    """Keyword arguments of random_call: anything the contract allows, small."""
    kernel_size = draw(st.sampled_from((1, 3, 5, 7)))
    padding = draw(st.integers(0, kernel_size // 2))
    smallest = 1 if operator in ("lowtention", "gn_mlp") else max(1, kernel_size - 2 * padding)
    # Every second one in multiples of 4, which fast backends ask for.
    step = draw(st.sampled_from((1, 4)))
    some_channels = st.integers(1, 13 if step == 1 else 5).map(lambda n: n * step)
    channels, widening = draw(some_channels), draw(st.booleans())
    return {
        "batch": draw(st.integers(1, 3)),
        "channels": channels,
        "out_channels": draw(some_channels) if widening else channels,
        "hidden": draw(some_channels),
        "height": draw(_sizes.filter(lambda n: n >= smallest)),
        "width": draw(_sizes.filter(lambda n: n >= smallest)),
        "kernel_size": kernel_size,
        "padding": padding,
        "stride": draw(st.sampled_from((1, 2))),
        "act": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "norm": draw(st.booleans()),
        "num_heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 5)) * step,
        "pool": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def _call(operator: str, config: dict[str, Any], pointwise_act: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    by_name = named(operator, random_call(operator, **config, dtype=dtype, device=device).args)
    if operator == "separable_conv":
        by_name["pw_act"] = pointwise_act
    return tuple(by_name.values())


def _check(operator: str, args: tuple[Any, ...], backend: str) -> Tensor:
    """The result, after checking it against the independent one."""
    by_name = named(operator, args)
    with torch.no_grad():
        result = run(operator, args, backend)
        reference = exact(operator, by_name)
        if result.dtype == torch.float64:
            assert result.shape == reference.shape
            scale = max(1.0, reference.abs().max().item())
            assert (result.cpu() - reference).abs().max() <= PARITY * scale
        else:
            # What plain PyTorch loses depends on the layout it is given, which says nothing about the backend.
            plains = [plain(operator, named(operator, map_tensors(args, LAYOUTS[name]))) for name in ("nhwc", "nchw")]
            worst = max(plains, key=lambda out: measure_error(out, reference).frobenius)
            length = OPERATORS[operator].accumulation_length(*args)
            assert_within_budget(result, worst, reference, length, f"{operator} on {backend}")
    assert result.stride() == canonical_stride(tuple(result.shape))
    return result


@pytest.mark.parametrize("operator", NAMES)
def test_reference_in_float64(operator: str) -> None:
    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(config=_configurations(operator), act=st.sampled_from(ACTIVATIONS), layout=st.sampled_from(list(LAYOUTS)))
    def check(config: dict[str, Any], act: str, layout: str) -> None:
        args = _call(operator, config, act, torch.float64, "cpu")
        _check(operator, map_tensors(args, LAYOUTS[layout]), "eager")

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_backend_within_its_budget(target: Target, operator: str, dtype: torch.dtype) -> None:
    if dtype not in target.dtypes:
        pytest.skip(f"{target} does not serve {dtype}")
    run_on(target, operator, arguments(operator, dtype=dtype, device=target.device))

    @settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(
        config=_configurations(operator),
        act=st.sampled_from(ACTIVATIONS),
        layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
    )
    def check(config: dict[str, Any], act: str, layout: str) -> None:
        # Errors of a handful of numbers are a matter of luck; the budget compares those of many.
        per_image = config["out_channels"] * (1 if config["pool"] else config["height"] * config["width"] // 4 + 1)
        config["batch"] = max(config["batch"], -(-64 // per_image))
        args = map_tensors(_call(operator, config, act, dtype, target.device), LAYOUTS[layout])
        try:
            OPERATORS[operator].explain(*args, backend=target.backend)
        except BackendError:
            reject()
        _check(operator, args, target.backend)

    check()


@pytest.mark.parametrize(("operator", "config"), CASES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_layout_of_the_arguments_changes_nothing(target: Target, operator: str, config: dict[str, Any]) -> None:
    args = arguments(operator, config, dtype=torch.float32, device=target.device)
    expected = run_on(target, operator, args)
    for name, layout in LAYOUTS.items():
        if name == "expanded":
            continue
        laid_out = map_tensors(args, layout)
        assert all(torch.equal(a, b) for a, b in zip(tensors(laid_out), tensors(args), strict=True))
        assert torch.equal(run_on(target, operator, laid_out), expected), name


@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_arguments_are_not_written_to(target: Target, operator: str, config: dict[str, Any]) -> None:
    args = arguments(operator, config, device=target.device)
    before = [t.clone() for t in tensors(args)]
    with torch.no_grad():
        out = run_on(target, operator, args)
        out.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), before, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 1), (1, 4, 1, 1), (2, 4, 1, 1), (3, 4, 1, 5), (1, 4, 7, 1)], ids=str)
@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_strides_where_sizes_are_one(target: Target, operator: str, shape: tuple[int, int, int, int]) -> None:
    """Strides of dimensions of size 1 are free in PyTorch's eyes; the output's are fixed."""
    n, c, h, w = shape
    args = arguments(operator, batch=n, channels=c, height=h, width=w, device=target.device)
    for layout in LAYOUTS.values():
        out = run_on(target, operator, (layout(args[0]), *args[1:]))
        assert out.stride() == canonical_stride(tuple(out.shape))


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh memory holds NaNs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("operator", "config"), CASES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_every_element_is_written(target: Target, operator: str, config: dict[str, Any]) -> None:
    for height, width in ((5, 4), (7, 1), (1, 9)):
        smallest = 3 if config.get("padding") == 0 else 1
        size = {"height": max(height, smallest), "width": max(width, smallest)}
        args = with_grad(arguments(operator, config | size, device=target.device))
        out = run_on(target, operator, args)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors(args)))


@pytest.mark.parametrize(("operator", "config"), CASES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_runs_are_bitwise_repeatable(target: Target, operator: str, config: dict[str, Any]) -> None:
    args = with_grad(arguments(operator, config | {"batch": 3, "height": 14, "width": 13}, device=target.device))

    def everything() -> list[Tensor]:
        out = run_on(target, operator, args)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors(args))]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first, strict=True))


@pytest.mark.parametrize(("operator", "config"), CASES)
def test_an_image_does_not_depend_on_its_batch(operator: str, config: dict[str, Any]) -> None:
    args = arguments(operator, config, batch=3, dtype=torch.float64)
    together = run(operator, args)
    for i in range(3):
        one = {k: v[i : i + 1] if k in ("x", "residual") and isinstance(v, Tensor) else v for k, v in named(operator, args).items()}
        alone = run(operator, tuple(one.values()))
        assert (together[i : i + 1] - alone).abs().max() <= PARITY * max(1.0, alone.abs().max().item())


@pytest.mark.parametrize(("operator", "config"), CASES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_empty_batch(target: Target, operator: str, config: dict[str, Any]) -> None:
    full = run_on(target, operator, arguments(operator, config, device=target.device))
    args = with_grad(arguments(operator, config, batch=0, device=target.device))
    out = run_on(target, operator, args)
    assert out.shape == (0, *full.shape[1:])
    assert out.stride() == full.stride()
    for tensor, grad in zip(tensors(args), torch.autograd.grad(out.sum(), tensors(args)), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@pytest.mark.parametrize("operator", NAMES)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_strides_and_offsets_beyond_32_bits(target: Target, operator: str) -> None:
    """Two images 2^31 elements apart. Memory that is never touched costs nothing, so this is cheap on the CPU."""
    args = arguments(operator, dtype=torch.float16, batch=2, device=target.device)
    x = args[0]
    _, c, h, w = x.shape
    far = torch.empty(2**31 + c * h * w + 8, dtype=torch.float16, device=target.device)
    spread = far.as_strided(x.shape, (2**31, 1, w * c, c)).copy_(x)
    last = far.as_strided((1, c, h, w), (2**31, 1, w * c, c), 2**31)
    assert torch.equal(run_on(target, operator, (spread, *args[1:])), run_on(target, operator, args))
    if operator != "conv_act":
        alone = run_on(target, operator, (last, *args[1:]))
        assert torch.equal(alone, run_on(target, operator, (x[1:], *args[1:])))


@pytest.mark.parametrize("operator", NAMES)
def test_a_nan_stays_in_its_image(operator: str) -> None:
    args = arguments(operator, batch=2)
    x = args[0].clone(memory_format=torch.preserve_format)
    x[0, 0, 2, 2] = float("nan")
    out = run(operator, (x, *args[1:]))
    assert out[0].isnan().any()
    assert torch.equal(out[1], run(operator, args)[1])
