"""What a block keeps besides its parameters: the packed weights where there are such, no copy of what folding does not change."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowformer
import lowkernels
from lowkernels import backends
from lowkernels.nn import ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv, chain_blocks
from lowkernels.ops.operator import is_stand_in
from lowkernels.testing import assert_within_budget
from tests.ops import probe as probe_backend

from .blocks import CASES, FEW, Case, _standalone, each, randomize, within_budget

# Wide enough that 3x3 convolutions take Winograd's form, from which weights come back rounded.
BLOCKS = {
    "conv": _standalone(ConvNormAct, 32, 36, act="silu"),
    "separable": _standalone(SeparableConv, 32, 36, kernel_size=5),
    "mbconv": _standalone(MBConv, 32, 32, expansion=2),
    "fused-mbconv": _standalone(FusedMBConv, 32, 32, expansion=2),
    "attention": _standalone(Lowtention, 32, num_heads=2, head_dim=16),
    "attention-stride2": _standalone(Lowtention, 32, num_heads=2, head_dim=16, stride=2),
    "mlp": _standalone(GroupNormMLP, 32, expansion=2),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def native() -> None:
    reason = backends.load("cpu").unavailable("cpu")
    if reason is not None:
        pytest.skip(f"only the CPU kernels' packed weights can be unpacked: {reason}")


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All there are in attributes, and in lists, tuples and dicts of them."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, seen)


def _kept_bytes(model: nn.Module) -> int:
    """Bytes of all storages that the blocks of a model hold on to, each once, besides those of parameters and statistics."""
    not_counted = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    storages = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FusedBlock):
            for tensor in _tensors(vars(module), seen):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in not_counted:
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _packed_bytes(model: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("_packed"))


def _weight_bytes(block: Any) -> int:
    return sum(w.numel() * w.element_size() for w in block._kept_weights() if w is not None)


def _stand_ins(model: nn.Module) -> int:
    return sum(is_stand_in(w) for m in model.modules() if isinstance(m, FusedBlock) for w in m._kept_weights())


def _assert_packed_alone(model: nn.Module, dtype: torch.dtype) -> None:
    """A stand-in is a number."""
    assert 0 < _packed_bytes(model) <= _kept_bytes(model) <= _packed_bytes(model) + _stand_ins(model) * dtype.itemsize


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each(BLOCKS)
def test_packed_weights_alone(case: Case, dtype: torch.dtype) -> None:
    block = case.block(dtype)
    with torch.inference_mode():
        for batch in (1, 3, 1):
            block(case.x(dtype, batch=batch))
        _assert_packed_alone(block, dtype)
        for parameter in block.parameters():
            parameter.mul_(1.25)
        within_budget(case, block, case.x(dtype), block(case.x(dtype)))
        _assert_packed_alone(block, dtype)
    lowkernels.freeze(block)
    assert not list(block.parameters())
    assert all(w is None or is_stand_in(w) for w in block._kept_weights())
    _assert_packed_alone(block, dtype)


@pytest.mark.usefixtures("native")
def test_freezing_a_chain_releases_parameters() -> None:
    model = nn.Sequential(nn.Sequential(BLOCKS["mbconv"].block(torch.float32), BLOCKS["mlp"].block(torch.float32)))
    for parent, name, chain in chain_blocks(model):
        setattr(parent, name, chain)
    x = BLOCKS["mlp"].x(torch.float32)
    with torch.no_grad():
        expected = [model(x) for _ in range(2)][1]
        originals = [weakref.ref(p) for p in model.parameters()]
        lowkernels.freeze(model)
        gc.collect()
        assert not [ref() for ref in originals if ref() is not None]
        assert all(torch.equal(model(x), expected) for _ in range(2))


@pytest.mark.usefixtures("native")
def test_packed_weights_alone_in_a_model() -> None:
    model = lowformer.create_model("lowformer_b0", kernels="eager").eval()
    replaced = sum(p.numel() * p.element_size() for p in model.parameters())
    lowkernels.accelerate(model)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.randn(1, 3, 64, 64))
    assert all(row.ran_on for row in lowkernels.report(model) if row.replaced)
    _assert_packed_alone(model, torch.float32)
    # Winograd's form of a 3x3 convolution is 16 / 9 as large, and channels are filled up to vectors.
    assert _packed_bytes(model) <= 16 / 9 * replaced * 1.05
    lowkernels.restore(model)
    assert not [m for m in model.modules() if isinstance(m, FusedBlock)]


@each(CASES)
def test_no_copy_of_what_folding_does_not_change(case: Case) -> None:
    """In float64, which the reference serves: only convolutions with BatchNorm, and spatial ones laid out otherwise, are copied."""
    block = case.block()
    block(case.x())
    assert _kept_bytes(block) <= sum(
        w.numel() * w.element_size()
        for role, w, own in zip(_roles(block), block._kept_weights(), _originals(block), strict=True)
        if w is not None and (f"{role}_norm" in block._parts or not _is_laid_out(own))
    )
    lowkernels.freeze(block)
    assert _kept_bytes(block) == _weight_bytes(block)


def _roles(block: Any) -> list[str]:
    return [role for role in (*block._NORMS, *block._CONVS) for _ in range(2)]


def _originals(block: Any) -> list[Tensor | None]:
    parts = [block._part(role) for role in (*block._NORMS, *block._CONVS)]
    return [tensor for part in parts for tensor in ((None, None) if part is None else (part.weight, part.bias))]


def _is_laid_out(weight: Tensor | None) -> bool:
    return weight is not None and (weight.dim() == 1 or weight.is_contiguous(memory_format=torch.channels_last))


def test_a_replaced_parameter_keeps_its_values() -> None:
    """What is kept may be its memory: weights made anew are not written there."""
    block = CASES["mlp"].block()
    x = CASES["mlp"].x()
    with torch.no_grad():
        block(x)
        old = block.fc1.weight
        before = old.clone()
        block.fc1.weight = nn.Parameter(old * 2)
        assert torch.equal(block(x), copy.deepcopy(block)(x))
        block.fc1.weight.data = old.data * 3
        block(x)
        lowkernels.repack(block)
        block.load_state_dict({k: v * 2 for k, v in block.state_dict().items()}, assign=True)
        block(x)
    assert torch.equal(old, before)


def test_a_frozen_block_is_on_its_own() -> None:
    """Whatever happens to parameters that somebody else still has."""
    block = CASES["mlp"].block()
    x = CASES["mlp"].x()
    others = list(block.parameters())
    with torch.no_grad():
        expected = block(x)
        lowkernels.freeze(block)
        for parameter in others:
            parameter.zero_()
        assert torch.equal(block(x), expected)


@each(BLOCKS)
def test_buffers_are_the_blocks_own_memory(case: Case) -> None:
    """DistributedDataParallel and averaging write into every buffer."""
    block = case.block(torch.float32)
    x = case.x(torch.float32)
    with torch.no_grad():
        expected = block(x)
        versions = [p._version for p in block.parameters()]
        for buffer in block.buffers():
            buffer.copy_(buffer.clone())
        assert [p._version for p in block.parameters()] == versions
        assert torch.equal(block(x), expected)


def test_averaging_with_buffers() -> None:
    case = CASES["mlp"]
    model = nn.Sequential(case.block())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        averaged.update_parameters(model)
    assert torch.allclose(averaged.module[0].fc1.weight * 2.25, model[0].fc1.weight * 1.875)


def test_what_was_saved_for_backward_is_not_overwritten_unnoticed() -> None:
    block = CASES["mlp"].block().requires_grad_(False)
    x = CASES["mlp"].x().requires_grad_()
    out = block(x).square().sum()
    block.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@each(BLOCKS)
def test_another_backend_folds_anew(case: Case, dtype: torch.dtype) -> None:
    """From the parameters, so that nothing is lost; what it needs is kept from then on, next to the packed weights."""
    block, eager = case.block(dtype), case.block(dtype)
    eager.backend = "eager"
    x = case.x(dtype)
    with torch.no_grad():
        first = block(x)
        packed = block._buffers["_packed_0"]
        for _ in range(2):
            with lowkernels.use_backend("eager"):
                assert torch.equal(block(x), eager(x))
                kept = block._kept_weights()
            assert torch.equal(block(x), first)
        assert not _stand_ins(block)
        assert block._buffers["_packed_0"] is packed
        assert all(a is b for a, b in zip(block._kept_weights(), kept, strict=True))


@pytest.mark.usefixtures("native")
@each(BLOCKS)
def test_packs_for_one_that_needs_plain_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_backend.install(monkeypatch)
    monkeypatch.setattr(backends, "PRIORITY", ("cpu", probe_backend.NAME, "eager"))
    x = case.x(torch.float32)
    for freeze in (False, True):
        block = case.block(torch.float32)
        with torch.no_grad():
            expected = block(x)
            if freeze:
                lowkernels.freeze(block)
            assert freeze <= bool(_stand_ins(block))
            with lowkernels.use_backend(probe_backend.NAME):
                out = block(x)
            assert probe.forwards[-1][1] is not None
            assert not _stand_ins(block)
            within_budget(case, case.block(torch.float32), x, out)
            assert torch.equal(block(x), expected)


def _compiled(block: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(block, backend="aot_eager", fullgraph=True)
    compiled(x)
    return compiled


def _exported(block: Any, x: Tensor, strict: bool = False) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},), strict=strict)
    assert {*program.state_dict} == {*block.state_dict()}
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded: Callable[[Tensor], Tensor] = torch.export.load(buffer).module()
    return loaded


def _traced(block: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(block, x), buffer)
        buffer.seek(0)
        loaded: Callable[[Tensor], Tensor] = torch.jit.load(buffer)
    return loaded


GRAPHS: dict[str, Callable[[Any, Tensor], Callable[[Tensor], Tensor]]] = {
    "compiled": _compiled,
    "exported": _exported,
    "exported-strict": lambda block, x: _exported(block, x, strict=True),
    "traced": _traced,
}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@each(BLOCKS)
def test_graphs_fall_back_within_the_budget(case: Case, frozen: bool, graph: str) -> None:
    block = case.block(torch.float32)
    if frozen:
        lowkernels.freeze(block)
    x = case.x(torch.float32)
    with torch.no_grad():
        run = GRAPHS[graph](block, x)
        assert torch.equal(run(x), block(x))
        with lowkernels.use_backend("eager"):
            found = run(x)
        assert lowkernels.dispatch.last_call()[0].backend == "eager"
        within_budget(case, case.block(torch.float32), x, found)


@pytest.mark.usefixtures("native")
def test_inductor_hands_stand_ins_on() -> None:
    torch._dynamo.reset()
    names = ["mbconv", "fused-mbconv", "attention", "mlp"]
    model = nn.Sequential(*(BLOCKS[name].block(torch.float32) for name in names))
    x = BLOCKS["mlp"].x(torch.float32)
    with torch.no_grad():
        run = torch.compile(model, fullgraph=True)
        assert torch.equal(run(x), model(x))
        expected = model(x)
        with lowkernels.use_backend("eager"):
            found = run(x)
            wanted = model(x)
        assert lowkernels.dispatch.last_call()[0].backend == "eager"
        double = copy.deepcopy(model).double()(x.double())
    assert found.isfinite().all()
    assert_within_budget(found, wanted, double, x[0].numel(), "inductor")
    assert not torch.equal(found, expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@each(BLOCKS)
def test_gradients_of_a_frozen_blocks_input(case: Case, compiled: bool) -> None:
    block = lowkernels.freeze(case.block(torch.float32))
    wide = case.block().requires_grad_(False)
    x = case.x(torch.float32)
    plain = case.block(torch.float32).requires_grad_(False)
    grads = []
    for run, value in (
        (torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block, x),
        (lambda x: case.plain(plain, x), x.contiguous()),
        (lambda x: case.plain(wide, x), x.double().contiguous()),
    ):
        torch._dynamo.reset()
        leaf = value.clone(memory_format=torch.preserve_format).requires_grad_()
        grads.append(torch.autograd.grad(run(leaf).square().sum(), leaf)[0])
    assert grads[0].isfinite().all()
    longest = max([x[0].numel(), *(p[0].numel() for p in plain.parameters() if p.dim() == 4)])
    assert_within_budget(*grads, longest, type(block).__name__)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@each(BLOCKS)
def test_autocast_of_a_frozen_block(case: Case, compiled: bool) -> None:
    block = lowkernels.freeze(case.block(torch.float32))
    x = case.x(torch.float32)
    torch._dynamo.reset()
    run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = run(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, copy.deepcopy(block).bfloat16()(x.bfloat16()))
    assert _stand_ins(block)


@pytest.mark.usefixtures("native")
@each(BLOCKS)
def test_compiled_graphs_follow(case: Case) -> None:
    """Parameters written to, and others put in their places, without compiling again."""
    block = case.block(torch.float32)
    x = case.x(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = run(x)
        for assign in (False, True):
            block.load_state_dict(
                {k: v * 1.25 if v.is_floating_point() else v for k, v in block.state_dict().items()}, assign=assign
            )
            lowkernels.repack(block)
            after = run(x)
            assert torch.equal(after, block(x))
            assert not torch.equal(after, before)
            before = after
    assert counter.frame_count == 1


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@each(BLOCKS)
def test_threads_that_ask_for_different_backends(case: Case, frozen: bool) -> None:
    """Half of them make the others' stand-ins into weights under way."""
    x = case.x(torch.float32)
    for _ in range(3):
        block = case.block(torch.float32)
        if frozen:
            lowkernels.freeze(block)
        results: list[Any] = [None] * 6
        barrier = threading.Barrier(len(results))

        def work(i: int, block: Any = block, results: Any = results, barrier: Any = barrier) -> None:
            barrier.wait()
            try:
                with torch.no_grad(), lowkernels.use_backend("eager" if i % 2 else "cpu"):
                    results[i] = [block(x) for _ in range(4)]
            except Exception as error:
                results[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, found in enumerate(results):
            assert isinstance(found, list), found
            assert all(torch.equal(out, results[i % 2][0]) for out in found)
            within_budget(case, case.block(torch.float32), x, found[0])


@pytest.mark.usefixtures("native")
def test_compiled_for_any_size() -> None:
    """Sizes are symbols then, and what is kept is still known for what it is."""
    case = BLOCKS["fused-mbconv"]
    block = lowkernels.freeze(case.block(torch.float32))
    torch._dynamo.reset()
    run = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (6, 9):
        x = case.x(torch.float32, height=size)
        with torch.no_grad():
            assert torch.equal(run(x), block(x))
            with lowkernels.use_backend("eager"):
                within_budget(case, case.block(torch.float32), x, run(x))
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (grad,) = torch.autograd.grad(run(leaf).sum(), leaf)
        assert torch.equal(grad, torch.autograd.grad(block(leaf).sum(), leaf)[0])


def _saved(block: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)), _saved], ids=["deepcopy", "pickle", "torch.save"]
)
@each(BLOCKS)
def test_copies(case: Case, duplicate: Callable[[Any], Any], frozen: bool) -> None:
    block = case.block(torch.float32)
    x = case.x(torch.float32)
    with torch.no_grad():
        expected = block(x)
        if frozen:
            lowkernels.freeze(block)
        twin = duplicate(block)
        assert torch.equal(twin(x), expected)
        twin(x)
        _assert_packed_alone(twin, torch.float32)
        with lowkernels.use_backend("eager"):
            within_budget(case, case.block(torch.float32), x, twin(x))


@pytest.mark.usefixtures("native")
@each(BLOCKS)
def test_a_frozen_block_moves(case: Case) -> None:
    block = lowkernels.freeze(case.block(torch.float32))
    x = case.x(torch.float32)
    with torch.no_grad():
        expected = block(x)
        block.share_memory()
        assert all(b.is_shared() for b in block.buffers())
        block.to(memory_format=torch.channels_last)
        within_budget(case, case.block(torch.float32), x, block(x))
        _assert_packed_alone(block, torch.float32)
        wide = copy.deepcopy(block).double()
        assert not _stand_ins(wide), "float64 is the reference's"
        assert (wide(x.double()) - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        block.bfloat16()
        _assert_packed_alone(block, torch.bfloat16)
        assert block(x.bfloat16()).isfinite().all()
        block.to("meta")
        assert block(x.bfloat16().to("meta")).shape == expected.shape


@pytest.mark.usefixtures("native")
@each(BLOCKS)
def test_packs_of_another_dtype_are_others(case: Case) -> None:
    """They are bytes, whatever they are for, and must not be written into those that another thread reads."""
    block = case.block(torch.float32)
    x = case.x(torch.float32)
    with torch.no_grad():
        block(x)
        packed = block._buffers["_packed_0"]
        before = packed.clone()
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        assert block._buffers["_packed_0"] is not packed
        assert torch.equal(packed, before)


@each(FEW)
def test_parameters_in_shared_memory(case: Case) -> None:
    """Those are read where they are."""
    block = case.block()
    x = case.x()
    with torch.no_grad():
        expected = block(x)
        block.share_memory()
        assert torch.equal(block(x), expected)


@pytest.mark.usefixtures("native")
def test_a_frozen_linear_keeps_both() -> None:
    """It multiplies many rows by the plain weights itself."""
    layer = lowkernels.nn.Linear(randomize(nn.Linear(32, 16)).eval(), backend="cpu")  # type: ignore[arg-type]
    x = torch.randn(5, 32)
    with torch.no_grad():
        one, many = layer(x[:1]), layer(x[None])
        assert _kept_bytes(layer) == _packed_bytes(layer)
        lowkernels.freeze(layer)
        assert torch.equal(layer(x[:1]), one)
        assert torch.equal(layer(x[None]), many)
    assert _kept_bytes(layer) == _packed_bytes(layer) + _weight_bytes(layer)
