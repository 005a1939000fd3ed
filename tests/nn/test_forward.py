"""Which way a forward goes, in which layout and dtype, on whose weights, from how many threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowkernels
from lowkernels import BackendError, dispatch
from lowkernels.ops import OPERATORS
from tests.ops import probe as probe_backend
from tests.ops.probe import NAME, Probe

from .blocks import ADOPTED, CASES, FEW, Case, assert_follows, assert_same, each


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    return probe_backend.install(monkeypatch)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were run, by name."""
    ran: list[str] = []
    record = dispatch.record

    def note(choice: dispatch.Choice, copies: int) -> None:
        ran.append(choice.operator)
        record(choice, copies)

    monkeypatch.setattr(dispatch, "record", note)
    return ran


def _leaf(block: nn.Module) -> nn.Module:
    return next(m for m in block.modules() if type(m) is nn.Conv2d)


@each(CASES)
def test_eval_runs_one_operator_and_train_none(case: Case, calls: list[str]) -> None:
    block = case.block()
    block(case.x())
    assert calls == [block.operator_name]
    block.train()
    block(case.x())
    assert calls == [block.operator_name]
    block.eval()
    with torch.no_grad():
        block(case.x())
    assert calls == [block.operator_name] * 2


@each(CASES)
def test_layouts_are_copied_once_and_never_wrong(case: Case) -> None:
    block = case.block()
    x = case.x()
    expected = block(x)
    larger = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1, 2 * x.shape[3]), float("nan"), dtype=x.dtype)
    sliced = larger[:, 1:-1, 1:, ::2]
    sliced.copy_(x)
    for given, copies in ((x, 0), (x.contiguous(), 1), (sliced, 1), (x.transpose(2, 3).contiguous().transpose(2, 3), 1)):
        assert torch.equal(block(given), expected)
        assert block.last_call is not None
        choice, counted = block.last_call
        assert (choice.operator, counted) == (block.operator_name, copies)
    assert_same(block(x[:1].expand(x.shape)), expected[:1].expand(expected.shape))
    assert block(x[:0]).shape == (0, *expected.shape[1:])
    if expected.dim() == 4:
        assert expected.is_contiguous(memory_format=torch.channels_last)


@each(FEW)
def test_last_call_is_the_blocks_own(case: Case) -> None:
    block, other = case.block(), case.block()
    assert block.last_call is None
    block(case.x())
    of_block = block.last_call
    other(case.x().contiguous())
    assert block.last_call is of_block
    assert of_block is not None
    assert of_block[1] == 0
    assert other.last_call is not None
    assert other.last_call[1] == 1


# Ways to leave the operator


@each({k: v for k, v in CASES.items() if any(isinstance(m, nn.BatchNorm2d) for m in v.make().modules())})
def test_batch_norm_in_train_mode_runs_itself(case: Case, calls: list[str]) -> None:
    block = case.block()
    norm = next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    twin = copy.deepcopy(block)
    out = block(case.x())
    assert calls == []
    assert_same(out, case.plain(twin, case.x()))
    assert norm.num_batches_tracked == 1
    norm.eval()
    assert_follows(case, block)
    assert calls == [block.operator_name]


@pytest.mark.parametrize("name", ["mobilenet-like", "lowformer-fused-mbconv"])
def test_dropout_in_train_mode_runs_itself(name: str, calls: list[str]) -> None:
    """Sampling at inference time: dropout or drop path on, everything else in eval mode."""
    case = CASES[name]
    block = case.block()
    expected = block(case.x())
    calls.clear()
    dropout = next(m for m in block.modules() if type(m).__name__ in ("Dropout", "DropPath"))
    dropout.train()
    samples = [block(case.x()) for _ in range(8)]
    assert calls == []
    assert any(not torch.equal(sample, samples[0]) for sample in samples)
    dropout.eval()
    assert torch.equal(block(case.x()), expected)
    assert calls == [block.operator_name]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@each(CASES)
def test_hooks_on_children_run(case: Case, kind: str, calls: list[str]) -> None:
    for duplicate in (lambda b: b, copy.deepcopy):
        block = duplicate(case.block())
        seen: list[nn.Module] = []
        child = _leaf(block)
        handle = getattr(child, f"register_{kind}_hook")(lambda module, *_, seen=seen: seen.append(module))
        x = case.x().requires_grad_()
        calls.clear()
        out = block(x)
        out.sum().backward()
        assert seen == [child]
        assert calls == []
        assert_same(out, case.plain(block, x))
        handle.remove()
        assert_follows(case, block)
        assert calls == [block.operator_name]


@each(ADOPTED)
def test_hooks_on_containers_run(case: Case) -> None:
    block = case.block()
    containers = [m for m in block.modules() if m is not block and m._modules and type(m).forward is not nn.Module.forward]
    for container in containers:
        if isinstance(container, nn.ModuleList | nn.ModuleDict):
            continue
        seen: list[nn.Module] = []
        with container.register_forward_hook(lambda module, *_, seen=seen: seen.append(module)):
            block(case.x())
        assert seen == [container]


@each(FEW)
def test_hooks_that_change_the_result_do(case: Case) -> None:
    block = case.block()
    expected = block(case.x())
    with _leaf(block).register_forward_hook(lambda module, args, out: out * 2):
        changed = block(case.x())
    assert not torch.allclose(changed, expected)
    assert torch.equal(block(case.x()), expected)


@each(FEW)
def test_hooks_on_the_block_itself(case: Case, calls: list[str]) -> None:
    block = case.block()
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, out: seen.append(out))
    out = block(case.x())
    assert seen[0] is out
    assert calls == [block.operator_name]


# Backends and packs


@each(CASES)
def test_weights_are_packed_once(case: Case, probe: Probe) -> None:
    block = case.block()
    packs = []
    for _ in range(3):
        with torch.no_grad():
            block(case.x())
        packs.append(probe.forwards[-1][1])
    assert packs[0] is not None
    assert all(given is not None and given[0] is packs[0][0] for given in packs)
    assert block.last_call is not None
    assert block.last_call[0].backend == NAME
    assert not any("packed" in key for key in block.state_dict())


@each(FEW)
def test_packs_are_made_anew_in_place(case: Case, probe: Probe) -> None:
    """Captured graphs and compiled models go on reading the same memory."""
    block = case.block()

    def weights() -> dict[str, Tensor]:
        kept = {f"_folded_{i}": w for i, w in enumerate(block._kept_weights()) if w is not None}
        return kept | {n: b for n, b in block.named_buffers() if n.startswith("_packed")}

    pointers = {n: w.data_ptr() for n, w in weights().items()}
    assert any(n.startswith("_packed") for n in pointers)
    before = {n: w.clone() for n, w in weights().items()}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.5)
    for follow in (lambda: block(case.x()), lambda: lowkernels.repack(block)):
        follow()
        after = weights()
        assert {n: w.data_ptr() for n, w in after.items()} == pointers
    assert any(not torch.equal(w, before[n]) for n, w in after.items() if n.startswith("_folded"))


@each(FEW)
def test_gradients_come_with_packs(case: Case, probe: Probe) -> None:
    block = case.block()
    x = case.x().requires_grad_()
    block(x).sum().backward()
    assert probe.forwards[-1][1] is not None
    assert all(p.grad is not None for p in block.parameters())


@each(FEW)
def test_backend_of_the_block_before_the_context(case: Case, probe: Probe) -> None:
    block = case.block()
    assert block.backend == "auto"
    with lowkernels.use_backend("eager"):
        block(case.x())
    assert block.last_call is not None
    assert str(block.last_call[0]) == f"{block.operator_name}: eager (asked for by lowkernels.use_backend)"
    block.backend = "eager"
    with lowkernels.use_backend(NAME):
        block(case.x())
    assert str(block.last_call[0]) == f"{block.operator_name}: eager (asked for by the backend argument)"
    assert probe.forwards == []


@each(FEW)
def test_backend_that_cannot_serve(case: Case, probe: Probe) -> None:
    block = case.block()
    probe.bad_input = "too large"
    block(case.x())
    assert block.last_call is not None
    assert block.last_call[0].rejected == ((NAME, "too large"),)
    block.backend = NAME
    with pytest.raises(BackendError, match=rf"lowkernels.{block.operator_name}: backend 'probe'.*too large"):
        block(case.x())
    # what a train-mode block runs on is no business of a backend
    block.train()(case.x())


def test_weights_no_backend_by_that_name_serves(probe: Probe) -> None:
    probe.bad_weights = "odd channels"
    with pytest.raises(BackendError, match=r"lowkernels\.mbconv: backend 'probe'.*odd channels"):
        lowkernels.nn.MBConv(4, 4, backend=NAME).eval()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each(CASES)
def test_autocast_is_folded_in_float64_and_rounded_once(case: Case, dtype: torch.dtype) -> None:
    block = case.block(torch.float32)
    x = case.x(torch.float32)
    with torch.no_grad():
        plain = block(x)
        with torch.autocast("cpu", dtype):
            low = block(x)
        assert low.dtype == dtype
        exact = copy.deepcopy(block).double()
        folded = [w if w is None else w.to(dtype) for w in exact._kept_weights()]
        args = exact._arguments(x.to(dtype), folded)
        assert torch.equal(low, OPERATORS[block.operator_name].overload(*args))
        assert torch.equal(block(x), plain)


@each(FEW)
def test_autocast_keeps_packs(case: Case, probe: Probe) -> None:
    block = case.block(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x in (case.x(torch.float32), case.x(torch.bfloat16)):
            block(x)
            assert probe.forwards[-1][1] is not None
            block(x)
        first, second = probe.forwards[-2:]
        assert first[1] is not None
        assert second[1] is not None
        assert first[1][0] is second[1][0]


@each(CASES)
def test_autocast_gradients_arrive_in_float32(case: Case) -> None:
    block = case.block(torch.float32)
    x = case.x(torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    out.float().square().sum().backward()
    found = torch.cat([p.grad.flatten() for p in (x, *block.parameters())])
    assert found.dtype == torch.float32
    exact = copy.deepcopy(block).double()
    x64 = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(case.plain(exact, x64).square().sum(), [x64, *exact.parameters()])
    expected = torch.cat([g.flatten() for g in wanted])
    # PyTorch's own mixed precision on the same block, twice over, as in the error budget
    twin = copy.deepcopy(block)
    x32 = x.detach().clone().contiguous().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        eager_out = case.plain(twin, x32)
    eager_grads = torch.autograd.grad(eager_out.float().square().sum(), [x32, *twin.parameters()])
    eager = torch.cat([g.flatten() for g in eager_grads])
    assert (found - expected).norm() <= 2 * (eager - expected).norm() + torch.finfo(torch.bfloat16).eps * expected.norm()


@each(FEW)
def test_autocast_leaves_float64_alone(case: Case) -> None:
    block = case.block()
    with torch.autocast("cpu", torch.bfloat16):
        assert_follows(case, block)


# Threads


def _in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@each(FEW)
def test_first_forward_from_many_threads(case: Case) -> None:
    x = case.x()
    for _ in range(5):
        block = case.block()
        block._forget()
        with torch.no_grad():
            expected = copy.deepcopy(block)(x)

        def work(_: int, block: Any = block) -> Tensor:
            with torch.no_grad():
                out: Tensor = block(x)
                return out

        for found in _in_threads(6, work):
            assert isinstance(found, Tensor), found
            assert torch.equal(found, expected)


@each(FEW)
def test_threads_with_and_without_autocast(case: Case) -> None:
    """Each dtype wants folded weights of its own, and one thread must never see the other's."""
    block = case.block(torch.float32)
    x = case.x(torch.float32)

    def work(i: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 1):
            for _ in range(30):
                out: Tensor = block(x)
        return out

    expected = [work(0), work(1)]
    for i, found in enumerate(_in_threads(4, work)):
        assert isinstance(found, Tensor), found
        assert torch.equal(found, expected[i % 2])
