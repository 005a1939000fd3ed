"""Every argument outside the contract is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowkernels import BackendError, InputError, dispatch
from lowkernels.ops import OPERATORS

from .cases import NAMES, arguments, named, run

Change = Callable[[dict[str, Any]], Any]

WEIGHTS = {
    "conv_act": ("weight",),
    "separable_conv": ("dw_weight", "pw_weight"),
    "mbconv": ("expand_weight", "dw_weight", "project_weight"),
    "fused_mbconv": ("conv_weight", "project_weight"),
    "lowtention": ("dw_weight", "qkv_weight", "up_weight"),
    "gn_mlp": ("fc1_weight", "fc2_weight"),
}
SPATIAL = {
    "conv_act": "weight",
    "separable_conv": "dw_weight",
    "mbconv": "dw_weight",
    "fused_mbconv": "conv_weight",
    "lowtention": "dw_weight",
}


def _resize(name: str, *axes: int) -> Change:
    """A weight that is one too large in these dimensions."""
    return lambda a: torch.zeros([n + (i in axes) for i, n in enumerate(a[name].shape)])


def _kernel(name: str, height: int, width: int) -> Change:
    return lambda a: torch.zeros(*a[name].shape[:2], height, width)


def _cases() -> list[Any]:
    found: list[Any] = []

    def case(operator: str, what: str, argument: str, value: Any, came: str, allowed: str, blamed: str | None = None) -> None:
        found.append(pytest.param(operator, argument, value, blamed or argument, came, allowed, id=f"{operator}-{argument}-{what}"))

    for op in NAMES:
        tensor_names = [a.name for a in OPERATORS[op].overload._schema.arguments[:-3] if "Tensor" in str(a.type)]
        case(op, "rank3", "x", torch.zeros(4, 5, 5), "3 dimensions (4, 5, 5)", "4: (N, C, H, W)")
        case(op, "rank5", "x", torch.zeros(1, 4, 5, 5, 1), "5 dimensions", "4: (N, C, H, W)")
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
            case(op, str(dtype), "x", torch.zeros(1, 4, 5, 5).to(dtype), str(dtype), "torch.float16, torch.bfloat16, torch.float32")
        case(op, "no-channels", "x", torch.zeros(1, 0, 5, 5), "(1, 0, 5, 5)", "must be at least 1")
        case(op, "no-height", "x", torch.zeros(1, 4, 0, 5), "(1, 4, 0, 5)", "must be at least 1")
        case(op, "no-width", "x", torch.zeros(1, 4, 5, 0), "(1, 4, 5, 0)", "must be at least 1")
        for name in tensor_names[1:]:
            if name == "residual":
                continue
            case(op, "double", name, lambda a, n=name: a[n].double(), "torch.float64", "x has torch.float32")
            case(op, "integer", name, lambda a, n=name: a[n].int(), "torch.int32", "x has torch.float32")
            case(op, "meta", name, lambda a, n=name: a[n].to("meta"), "is on meta", "x is on cpu")
        for name in WEIGHTS[op]:
            case(op, "rank3", name, lambda a, n=name: a[n][0], "has shape", "allowed is")
            empty_axis = 1 if name == "up_weight" else 0
            case(op, "empty", name, lambda a, n=name, d=empty_axis: a[n].narrow(d, 0, 0), "", "")
        for name in (n for n in tensor_names if n.endswith("bias")):
            case(op, "too-long", name, _resize(name, 0), "has shape", "one value per output channel")
            case(op, "rank2", name, lambda a, n=name: a[n][None], "has shape", "one value per output channel")
        if op in SPATIAL:
            name = SPATIAL[op]
            case(op, "even", name, _kernel(name, 4, 4), "kernel size 4", "odd sizes up to 7")
            case(op, "9x9", name, _kernel(name, 9, 9), "kernel size 9", "odd sizes up to 7")
            case(op, "3x5", name, _kernel(name, 3, 5), "3, 5)", "k, k)")
            for stride in (0, 3, -1):
                case(op, str(stride), "stride", stride, f"is {stride};", "1 and 2")
        if op in SPATIAL and op != "lowtention":
            for padding in (-1, 2):
                case(op, str(padding), "padding", padding, f"is {padding};", "0 to 1 for kernel size 3")
        for name in ("act", "dw_act", "pw_act"):
            if name in OPERATORS[op].argument_names:
                case(op, "tanh", name, "tanh", "is 'tanh'", "none, relu, relu6, hardswish, silu, gelu, gelu_tanh")
        if "residual" in OPERATORS[op].argument_names and op != "conv_act":
            last = {"separable_conv": "pw", "mbconv": "project", "fused_mbconv": "project", "gn_mlp": "fc2", "lowtention": "up"}[op]
            axis = 1 if op == "lowtention" else 0
            widened = _resize(f"{last}_weight", axis)
            found.append(
                pytest.param(
                    op,
                    f"{last}_weight",
                    lambda a, w=widened, b=f"{last}_bias": (a.__setitem__(b, None), w(a))[1],
                    "residual",
                    "is true, but the output (2, 5, 5, 4)",
                    "x (2, 4, 5, 4)",
                    id=f"{op}-residual-widening",
                )
            )
        if "norm_weight" in tensor_names:
            for eps in (0.0, -1e-5, float("nan")):
                case(op, str(eps), "eps", eps, f"is {eps}", "positive")
            case(op, "too-long", "norm_weight", _resize("norm_weight", 0), "has shape (5,)", "(4,)")

    case("conv_act", "channels", "weight", _resize("weight", 1), "(4, 5, 3, 3)", "(4, 4, 3, 3)")
    case("conv_act", "groups", "weight", lambda a: a["weight"][:, :2], "(4, 2, 3, 3)", "groups = 1")
    case("conv_act", "other-size", "residual", torch.zeros(2, 4, 5, 5), "(2, 4, 5, 5)", "(2, 4, 5, 4)")
    case("conv_act", "other-channels", "residual", torch.zeros(2, 1, 5, 4), "(2, 1, 5, 4)", "(2, 4, 5, 4)")
    case("conv_act", "other-batch", "residual", torch.zeros(1, 4, 5, 4), "(1, 4, 5, 4)", "(2, 4, 5, 4)")
    case("conv_act", "rank2", "residual", torch.zeros(2, 4), "2 dimensions (2, 4)", "4: (N, C, H, W)")
    case("conv_act", "double", "residual", torch.zeros(2, 4, 5, 4).double(), "torch.float64", "x has torch.float32")
    case("conv_act", "meta", "residual", torch.zeros(2, 4, 5, 4, device="meta"), "is on meta", "x is on cpu")
    case("fused_mbconv", "channels", "conv_weight", _resize("conv_weight", 1), "(8, 5, 3, 3)", "(8, 4, 3, 3)")
    case("fused_mbconv", "groups", "conv_weight", lambda a: a["conv_weight"][:, :1], "(8, 1, 3, 3)", "groups = 1")
    case("fused_mbconv", "hidden", "project_weight", _resize("project_weight", 1), "(4, 9, 1, 1)", "(4, 8, 1, 1)")
    case("fused_mbconv", "3x3", "project_weight", _kernel("project_weight", 3, 3), "(4, 8, 3, 3)", "(4, 8, 1, 1)")
    case("separable_conv", "channels", "dw_weight", _resize("dw_weight", 0), "(5, 1, 3, 3)", "(4, 1, 3, 3)")
    case("separable_conv", "multiplier", "dw_weight", _resize("dw_weight", 1), "(4, 2, 3, 3)", "groups = C")
    case("separable_conv", "channels", "pw_weight", _resize("pw_weight", 1), "(4, 5, 1, 1)", "(4, 4, 1, 1)")
    case("mbconv", "channels", "expand_weight", _resize("expand_weight", 1), "(8, 5, 1, 1)", "(8, 4, 1, 1)")
    case("mbconv", "3x3", "expand_weight", _kernel("expand_weight", 3, 3), "(8, 4, 3, 3)", "(8, 4, 1, 1)")
    case("mbconv", "channels", "dw_weight", _resize("dw_weight", 0), "(9, 1, 3, 3)", "(8, 1, 3, 3)")
    case("mbconv", "groups", "dw_weight", lambda a: torch.zeros(8, 8, 3, 3), "(8, 8, 3, 3)", "groups = C")
    case("mbconv", "hidden", "project_weight", _resize("project_weight", 1), "(4, 9, 1, 1)", "(4, 8, 1, 1)")
    case("gn_mlp", "channels", "fc1_weight", _resize("fc1_weight", 1), "(8, 5, 1, 1)", "(8, 4, 1, 1)")
    case("gn_mlp", "hidden", "fc2_weight", _resize("fc2_weight", 1), "(4, 9, 1, 1)", "(4, 8, 1, 1)")
    for heads in (0, -2):
        case("lowtention", str(heads), "num_heads", heads, f"is {heads}", "1 or more")
    case("lowtention", "3", "num_heads", 3, "12 output channels", "multiples of 3 * 3", blamed="qkv_weight")
    case("lowtention", "no-third", "qkv_weight", _resize("qkv_weight", 0), "13 output channels", "multiples of 3 * 1")
    case("lowtention", "channels", "qkv_weight", _resize("qkv_weight", 1), "(12, 5, 1, 1)", "(12, 4, 1, 1)")
    case("lowtention", "channels", "dw_weight", _resize("dw_weight", 0), "(5, 1, 3, 3)", "(4, 1, 3, 3)")
    case("lowtention", "inner", "up_weight", _resize("up_weight", 0), "(5, 4, 3, 3)", "(4, 4, 3, 3)")
    case("lowtention", "4x4", "up_weight", _kernel("up_weight", 4, 4), "(4, 4, 4, 4)", "k = 3 for stride 1")
    case("lowtention", "2", "stride", 2, "(4, 4, 3, 3)", "k = 4 for stride 2", blamed="up_weight")
    case("lowtention", "alone", "norm_bias", None, "norm_weight and norm_bias", "or None for both")
    case("lowtention", "alone", "norm_weight", None, "norm_weight and norm_bias", "or None for both", blamed="norm_bias")
    return found


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel may start."""

    def fail(*_: object) -> Tensor:
        raise AssertionError("a kernel was started")

    kernel = SimpleNamespace(unsupported_weights=fail, unsupported_input=fail, pack=fail, forward=fail)
    monkeypatch.setattr(dispatch, "kernel", lambda operator, backend: kernel)
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "_plans", {})


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("operator", "argument", "value", "blamed", "came", "allowed"), _cases())
@pytest.mark.usefixtures("nothing_runs")
def test_bad_argument(operator: str, argument: str, value: Any, blamed: str, came: str, allowed: str, grad: bool) -> None:
    by_name = named(operator, arguments(operator))
    by_name[argument] = value(by_name) if callable(value) else value
    if grad:
        by_name = {
            k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() and v.is_leaf else v
            for k, v in by_name.items()
        }
    with pytest.raises(InputError) as error:
        run(operator, tuple(by_name.values()))
    message = str(error.value)
    assert message.startswith(f"lowkernels.{operator}: argument {blamed}: ")
    assert came in message
    assert allowed in message
    with pytest.raises(InputError) as explained:
        OPERATORS[operator].explain(*by_name.values())
    assert str(explained.value) == message


@pytest.mark.parametrize("operator", [name for name in SPATIAL if name != "lowtention"])
def test_image_smaller_than_the_kernel(operator: str) -> None:
    by_name = named(operator, arguments(operator, kernel_size=5, padding=0))
    by_name["x"] = torch.zeros(1, 4, 9, 4)
    with pytest.raises(
        InputError, match=rf"^lowkernels.{operator}: argument x: is 9x4, smaller than the 5x5 kernel with padding 0"
    ):
        run(operator, tuple(by_name.values()))


@pytest.mark.parametrize("operator", NAMES)
def test_packed_weights_without_their_backends_name(operator: str) -> None:
    args = arguments(operator)
    with pytest.raises(InputError, match=rf"^lowkernels.{operator}: argument packed_for: is None"):
        OPERATORS[operator].overload(*args, [torch.zeros(1)], None, "eager")


@pytest.mark.parametrize("operator", NAMES)
def test_unknown_backend(operator: str) -> None:
    args = arguments(operator)
    with pytest.raises(BackendError, match=rf"^lowkernels.{operator}: .*unknown backend 'quick': allowed are auto, .*eager"):
        run(operator, args, "quick")
    with pytest.raises(BackendError, match=rf"^lowkernels.{operator}: .*unknown backend 'quick'"):
        OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend="quick")


@pytest.mark.parametrize("operator", NAMES)
def test_bad_argument_while_compiling(operator: str) -> None:
    """The fake implementation refuses what the real one refuses, so a trace stops at the same place."""
    args = arguments(operator)
    with pytest.raises(InputError, match=rf"^lowkernels.{operator}: argument x: has 3 dimensions"):
        run(operator, (torch.zeros(4, 5, 5, device="meta"), *args[1:]))


@pytest.mark.parametrize("error", [InputError, BackendError])
def test_errors_can_be_caught_as_the_builtin_ones(error: type[Exception]) -> None:
    assert issubclass(error, {InputError: ValueError, BackendError: RuntimeError}[error])
