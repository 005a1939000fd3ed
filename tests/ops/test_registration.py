"""The operators as PyTorch sees them: schema, fake, autograd, compile, export."""

from __future__ import annotations

import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lowkernels import ops
from lowkernels.ops import OPERATORS

from .cases import (
    BACKENDS,
    CASES,
    FIRST_CASES,
    LAID_OUT,
    LAYOUTS,
    NAMES,
    Target,
    arguments,
    map_tensors,
    named,
    run,
    run_on,
    tensors,
    with_grad,
)


class _Call(nn.Module):
    """An operator with everything but its inputs fixed, so that a batch can be traced."""

    def __init__(self, operator: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.operator = operator
        self.args = args
        self.weights = nn.ParameterList([nn.Parameter(t) for t in tensors(args)[1:]])

    def forward(self, x: Tensor) -> Tensor:
        weights = iter(self.weights)
        args = [x]
        for name, value in zip(OPERATORS[self.operator].argument_names[1:], self.args[1:], strict=True):
            weight = next(weights) if isinstance(value, Tensor) else value
            args.append(x if name == "residual" and isinstance(value, Tensor) else weight)
        return run(self.operator, tuple(args))


@pytest.mark.parametrize(("operator", "config", "layout"), LAID_OUT)
@pytest.mark.parametrize("target", BACKENDS, ids=str)
def test_opcheck(target: Target, operator: str, config: dict[str, Any], layout: str) -> None:
    args = with_grad(map_tensors(arguments(operator, config, device=target.device), LAYOUTS[layout]))
    run_on(target, operator, args)
    torch.library.opcheck(OPERATORS[operator].overload, (*args, None, None, target.backend))


@pytest.mark.parametrize(("operator", "config", "layout"), LAID_OUT)
def test_opcheck_of_the_backward(operator: str, config: dict[str, Any], layout: str) -> None:
    args = map_tensors(arguments(operator, config), LAYOUTS[layout])
    grad = LAYOUTS[layout](torch.randn_like(run(operator, args)))
    optional = zip(args, OPERATORS[operator].overload._schema.arguments, strict=False)
    needs = [value is not None for value, argument in optional if "Tensor" in str(argument.type)]
    torch.library.opcheck(
        OPERATORS[operator].backward_overload, (grad, *args), {"needs": needs}, test_utils=("test_schema", "test_faketensor")
    )


def test_gradient_of_a_residual_is_not_the_incoming_gradients_memory() -> None:
    args = arguments("conv_act", {"residual": True})
    grad = torch.randn_like(args[0])
    needs = [False, False, False, True]
    (of_residual,) = OPERATORS["conv_act"].backward_overload(grad, *args, needs=needs)
    assert torch.equal(of_residual, grad)
    assert of_residual.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("operator", NAMES)
def test_backward_under_a_dispatch_mode(operator: str) -> None:
    """Kernels called from a mode (profilers, flop counters) run below autograd, which the recomputation needs all the same."""
    args = with_grad(arguments(operator))
    expected = torch.autograd.grad(run(operator, args).sum(), tensors(args))
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(run(operator, args).sum(), tensors(args))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("operator", NAMES)
def test_fake_has_the_strides_of_the_real_output(operator: str) -> None:
    for shape in ((2, 4, 5, 3), (1, 4, 1, 1), (1, 1, 2, 1), (3, 1, 1, 4), (2, 5, 1, 3)):
        n, c, h, w = shape
        args = arguments(operator, batch=n, channels=c, height=h, width=w, num_heads=1, head_dim=1)
        on_meta = map_tensors(args, lambda t: torch.empty_strided(t.shape, t.stride(), device="meta"))
        real, meta = run(operator, args), run(operator, on_meta)
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(("operator", "config"), CASES)
def test_compile_with_backward_and_dynamic_batch(operator: str, config: dict[str, Any]) -> None:
    args = with_grad(arguments(operator, config))
    counter = CompileCounterWithBackend("aot_eager")

    def call(*args: Any) -> Tensor:
        return run(operator, args) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for batch in (3, 2, 5):
        by_name = named(operator, args)
        for name in ("x", "residual"):
            if isinstance(by_name.get(name), Tensor):
                by_name[name] = torch.randn(batch, *by_name[name].shape[1:], requires_grad=True)
                torch._dynamo.mark_dynamic(by_name[name], 0)
        given = tuple(by_name.values())
        expected, out = call(*given), compiled(*given)
        assert torch.equal(out, expected)
        direction = torch.randn_like(out)
        grads = torch.autograd.grad(out, tensors(given), direction)
        for grad, wanted in zip(grads, torch.autograd.grad(expected, tensors(given), direction), strict=True):
            assert torch.equal(grad, wanted)
    assert counter.frame_count == 1


def test_inductor_keeps_gradients_right_through_all_operators() -> None:
    calls = [_Call(name, arguments(name, channels=4, out_channels=4)) for name in NAMES]
    stack = nn.Sequential(*calls).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return (stack(x.sin()) + x).square().mean()

    torch._dynamo.reset()
    wanted = [x, *stack.parameters()]
    wanted = [t for t in wanted if torch.autograd.grad(loss(x), t, allow_unused=True)[0] is not None]
    expected = torch.autograd.grad(loss(x), wanted)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), wanted)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(("operator", "config"), CASES)
def test_export_with_dynamic_batch(operator: str, config: dict[str, Any]) -> None:
    args = arguments(operator, config, batch=3)
    module = _Call(operator, args).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (args[0],), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for n in (1, 3, 4):
        x = torch.randn(n, *args[0].shape[1:])
        expected = module(x)
        for exported in (program, loaded):
            assert torch.equal(exported.module()(x), expected)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(OPERATORS[operator].overload) == 1


@pytest.mark.parametrize("operator", NAMES)
def test_typed_function_is_the_operator(operator: str) -> None:
    """Every argument lands in its place, given by its name."""
    args = arguments(operator)
    names = OPERATORS[operator].argument_names
    by_name = dict(zip(names, args, strict=True))
    function, pack = getattr(ops, operator), getattr(ops, f"pack_{operator}")
    assert torch.equal(function(**by_name, backend="eager"), run(operator, args))
    weights = {k: v for k, v in by_name.items() if k not in ("x", "residual") or not (v is None or isinstance(v, Tensor))}
    packed = pack(**weights, backend="eager")
    assert packed.backend == "eager"
    assert torch.equal(function(**by_name, packed=packed, backend="eager"), run(operator, args))


@pytest.mark.parametrize("operator", NAMES)
def test_defaults_of_the_typed_function_are_the_schemas(operator: str) -> None:
    schema = {a.name: a.default_value for a in OPERATORS[operator].overload._schema.arguments if a.has_default_value()}
    typed = {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(ops, operator)).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {k: v for k, v in schema.items() if k != "packed_for"} == typed


@pytest.mark.parametrize(("operator", "config"), FIRST_CASES)
def test_functional_tracing_sees_one_operator(operator: str, config: dict[str, Any]) -> None:
    args = arguments(operator, config)
    graph = make_fx(lambda x: run(operator, (x, *args[1:])))(args[0])
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [OPERATORS[operator].overload]
