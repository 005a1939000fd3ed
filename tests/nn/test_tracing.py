"""torch.compile, torch.export, torch.jit.trace, fake and meta tensors."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import lowkernels
from lowkernels.ops import OPERATORS
from tests.ops import probe as probe_backend

from .blocks import CASES, FEW, Case, assert_same, each, within_budget


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def _batch(case: Case, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = case.x(dtype, batch=size, seed=size)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, "no_grad", id=f"{name}-no_grad") for name, case in CASES.items()]
    + [pytest.param(case, mode, id=f"{name}-{mode}") for name, case in FEW.items() for mode in ("inference", "grad", "train")],
)
def test_compiles_whole_and_once(case: Case, mode: str) -> None:
    block = case.block()
    if mode == "train":
        block.train()
        for module in block.modules():
            if type(module).__name__ in ("Dropout", "DropPath"):
                module.eval()  # what is sampled under the compiler is another sample
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    twin = copy.deepcopy(block)
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode in ("grad", "train")):
        for size in (3, 2, 5):
            x = _batch(case, size)
            # For the sake of PyTorch's own GroupNorm, which otherwise cannot train on channels_last.
            x.requires_grad_(mode == "train")
            expected = twin(x)
            found = compiled(x)
            assert_same(found, expected)
            if mode in ("grad", "train"):
                direction = torch.randn_like(expected)
                of_x = [x] if mode == "train" else []
                grads = torch.autograd.grad(found, [*of_x, *block.parameters()], direction)
                for a, b in zip(grads, torch.autograd.grad(expected, [*of_x, *twin.parameters()], direction), strict=True):
                    assert_same(a, b)
    assert counter.frame_count == 1
    for name, buffer in twin.state_dict().items():
        assert torch.allclose(block.state_dict()[name], buffer)


@each(CASES)
def test_compiled_graph_holds_the_operator_and_ready_weights(case: Case) -> None:
    """Without gradients nothing is folded in the graph: it is the operator alone."""
    block = case.block()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with torch.no_grad():
        torch.compile(block, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(case.x())
    called = [n.target for n in graphs[0].graph.nodes if n.op.startswith("call")]
    assert called == [OPERATORS[block.operator_name].overload]


@each(FEW)
def test_compiled_without_having_been_used(case: Case) -> None:
    block = case.make().double()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    block.eval()
    with torch.no_grad():
        assert_same(compiled(case.x()), case.plain(block, case.x()))


@each(FEW)
def test_repack_reaches_a_compiled_model(case: Case) -> None:
    block = case.block()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = compiled(case.x())
        for parameter in block.parameters():
            parameter.mul_(1.25)
        lowkernels.repack(block)
        after = compiled(case.x())
        assert_same(after, case.plain(block, case.x()))
        assert not torch.equal(after, before)
    assert counter.frame_count == 1


@each(FEW)
def test_train_and_eval_of_a_compiled_model(case: Case) -> None:
    """The usual loop: an epoch of training, an evaluation, and again."""
    block = case.block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for step in range(3):
        compiled.train()
        compiled(case.x(seed=step).contiguous().requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled.eval()
        with torch.no_grad():
            assert_same(compiled(case.x()), case.plain(block, case.x()))


@each(FEW)
def test_load_state_dict_reaches_a_compiled_model(case: Case) -> None:
    block = case.block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    state = {k: v * 1.25 if v.is_floating_point() else v for k, v in block.state_dict().items()}
    with torch.no_grad():
        compiled(case.x())
        block.load_state_dict(state)
        assert_same(compiled(case.x()), case.plain(block, case.x()))


@each(FEW)
def test_compile_under_autocast(case: Case) -> None:
    block = case.block(torch.float32)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    # Enough numbers that their errors are not a matter of luck.
    x = case.x(torch.float32, batch=8, height=9, width=8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = block(x)
        found = compiled(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    with torch.no_grad():
        within_budget(case, block, x, compiled(x))


@each(FEW)
def test_compile_of_a_hooked_block(case: Case) -> None:
    block = case.block()
    conv = next(m for m in block.modules() if type(m) is nn.Conv2d)
    conv.register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad():
        assert_same(torch.compile(block, backend="aot_eager", fullgraph=True)(case.x()), case.plain(block, case.x()))


@each(FEW)
def test_function_transforms_inside_a_compiled_function(case: Case) -> None:
    block = case.block().requires_grad_(False)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: block(x).square().sum())(x)

    x = case.x().contiguous()
    assert_same(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


def test_inductor_on_a_stack_of_blocks() -> None:
    names = ["conv-like", "mbconv", "fused-mbconv", "mlp-relu", "separable-residual"]
    model = nn.Sequential(*(CASES[name].block() for name in names))
    x = _batch(CASES["mbconv"], 3)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in (3, 2):
            x = _batch(CASES["mbconv"], size)
            assert_same(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("case", "grad"),
    [pytest.param(case, False, id=f"{name}-no_grad") for name, case in CASES.items()]
    + [pytest.param(case, True, id=f"{name}-grad") for name, case in FEW.items()],
)
def test_export_with_dynamic_batch(case: Case, grad: bool) -> None:
    block = case.block()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, (case.x(batch=3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    with torch.no_grad():
        for size in (1, 3, 4):
            x = case.x(batch=size, seed=size)
            for exported in (program, loaded):
                assert_same(exported.module()(x), case.plain(block, x))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(OPERATORS[block.operator_name].overload) == 1
    if not grad:
        assert len(targets) == 1
    assert {*program.state_dict} == {*block.state_dict()}


@each(FEW)
def test_strict_export(case: Case) -> None:
    block = case.block()
    with torch.no_grad():
        program = torch.export.export(block, (case.x(),), strict=True)
        assert_same(program.module()(case.x()), block(case.x()))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@each(FEW)
def test_jit_trace(case: Case, grad: bool) -> None:
    block = case.block()
    x = case.x()
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(block, x)
        for given in (x, case.x(seed=2)):
            assert_same(traced(given), case.plain(block, given))
    if grad:
        found = torch.autograd.grad(traced(x).square().sum(), list(traced.parameters()))
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


@each(CASES)
def test_fake_tensors_leave_no_trace(case: Case) -> None:
    block = case.block()
    expected = block(case.x())
    kept = {n: b.data_ptr() for n, b in block.named_buffers()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = block(mode.from_tensor(case.x()))
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert {n: b.data_ptr() for n, b in block.named_buffers()} == kept
    assert torch.equal(block(case.x()), expected)


@each(CASES)
def test_built_of_fake_tensors(case: Case) -> None:
    expected = case.block()(case.x())
    with FakeTensorMode():
        block = case.make().eval()
        out = block(torch.empty_like(case.x(torch.float32)))
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.stride()) == (expected.shape, expected.stride())


@each(CASES)
def test_meta_device(case: Case) -> None:
    block = case.block()
    expected = block(case.x())
    block.to("meta")
    out = block(case.x().to("meta"))
    assert out.is_meta
    assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_built_on_the_meta_device() -> None:
    block = lowkernels.nn.MBConv(4, 8, stride=2, device="meta").eval()
    assert block(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 8, 3, 3)
    with torch.device("meta"):
        assert lowkernels.nn.GroupNormMLP(4).eval()(torch.empty(2, 4, 5, 5)).is_meta


@each(FEW)
def test_compiled_graphs_take_packs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_backend.install(monkeypatch)
    block = case.block()
    with torch.no_grad():
        torch.compile(block, backend="aot_eager", fullgraph=True)(case.x())
    _, received = probe.forwards[-1]
    assert received is not None
    assert torch.equal(received[0], dict(block.named_buffers())["_packed_0"])
