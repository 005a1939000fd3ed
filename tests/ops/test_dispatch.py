"""The dispatcher: whose request counts, what refusals say, what is told about a choice, and what asking costs."""

from __future__ import annotations

import threading
import time
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowkernels
from lowkernels import BackendError, backends, dispatch, ops
from lowkernels.ops import OPERATORS
from lowkernels.ops import operator as operator_module

from .cases import NAMES, arguments
from .probe import NAME, Probe


def call(operator: str = "mbconv", backend: str | None = None) -> dispatch.Choice:
    OPERATORS[operator].overload(*arguments(operator), None, None, backend)
    last = dispatch.last_call()
    assert last is not None
    return last[0]


def test_argument_then_context_then_environment_then_auto(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (call().backend, call().reason) == (NAME, "first choice of auto")
    monkeypatch.setenv("LOWKERNELS_BACKEND", "eager")
    assert (call().backend, call().reason) == ("eager", "asked for by the environment variable LOWKERNELS_BACKEND")
    with lowkernels.use_backend(NAME):
        assert (call().backend, call().reason) == (NAME, "asked for by lowkernels.use_backend")
        choice = call(backend="eager")
        assert (choice.backend, choice.reason) == ("eager", "asked for by the backend argument")
        with lowkernels.use_backend("auto"):
            assert call().reason == "first choice of auto"
        assert call().backend == NAME
    assert call().backend == "eager"
    assert call(backend="auto").backend == NAME
    monkeypatch.setenv("LOWKERNELS_BACKEND", "")
    assert call().reason == "first choice of auto"


def test_context_ends_with_an_exception(probe: Probe) -> None:
    with pytest.raises(KeyError), lowkernels.use_backend("eager"):
        raise KeyError
    assert call().backend == NAME


def test_context_belongs_to_its_thread(probe: Probe) -> None:
    seen: dict[str, str] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        seen["started in a context"] = call().backend
        with lowkernels.use_backend("eager"):
            inside.set()
            done.wait(10)
            seen["own context"] = call().backend

    with lowkernels.use_backend("eager"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    seen["main thread"] = call().backend
    main_call = dispatch.last_call()
    done.set()
    thread.join()
    assert seen == {"started in a context": NAME, "own context": "eager", "main thread": NAME}
    assert dispatch.last_call() is main_call


@pytest.mark.parametrize("operator", NAMES)
def test_named_backend_that_cannot_serve(probe: Probe, operator: str) -> None:
    for attribute in ("missing", "bad_weights", "bad_input"):
        setattr(probe, attribute, f"the {attribute} reason")
        with pytest.raises(BackendError) as error:
            call(operator, NAME)
        assert str(error.value) == (
            f"lowkernels.{operator}: backend 'probe', asked for by the backend argument, cannot serve this call: "
            f"the {attribute} reason"
        )
        with lowkernels.use_backend(NAME), pytest.raises(BackendError, match=r"asked for by lowkernels\.use_backend"):
            call(operator)
        setattr(probe, attribute, None)
    assert probe.forwards == []
    assert call(operator, NAME).backend == NAME


def test_named_backend_without_a_kernel(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    patched = dispatch.kernel
    monkeypatch.setattr(dispatch, "kernel", lambda op, name: None if (op, name) == ("gn_mlp", NAME) else patched(op, name))
    with pytest.raises(BackendError, match="cannot serve this call: it has no gn_mlp kernel"):
        call("gn_mlp", NAME)
    assert call("gn_mlp").rejected == ((NAME, "it has no gn_mlp kernel"),)


def test_a_missing_kernel_file_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "load", lambda name: SimpleNamespace(KERNEL=name))
    assert dispatch.kernel.__wrapped__("mbconv", "not_there") is None
    assert dispatch.kernel.__wrapped__("mbconv", "reference") is not None


@pytest.mark.parametrize("attribute", ["missing", "bad_weights", "bad_input"])
@pytest.mark.parametrize("operator", NAMES)
def test_auto_goes_on_and_keeps_the_reason(probe: Probe, operator: str, attribute: str) -> None:
    setattr(probe, attribute, "a reason of its own")
    choice = call(operator)
    assert choice == dispatch.Choice(
        operator, "eager", "first in auto's order that can serve the call", ((NAME, "a reason of its own"),)
    )
    assert str(choice) == f"{operator}: eager (first in auto's order that can serve the call); probe: a reason of its own"
    assert probe.asked_about_devices[0] == "cpu"


def test_auto_does_not_ask_backends_of_other_devices(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DEVICES", ("cuda",))
    choice = call()
    assert (choice.backend, choice.rejected, probe.asked_about_devices) == ("eager", (), [])


def test_auto_without_any_backend(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PRIORITY", (NAME,))
    probe.missing = "switched off"
    with pytest.raises(BackendError, match=r"lowkernels.mbconv: no backend can serve this call: .*switched off"):
        call()


@pytest.mark.parametrize("where", ["argument", "use_backend", "environment"])
def test_unknown_name_and_where_it_came_from(probe: Probe, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    allowed = "unknown backend 'fast': allowed are auto, probe, eager"
    if where == "argument":
        with pytest.raises(BackendError, match=rf"^lowkernels.mbconv: the backend argument: {allowed}$"):
            call(backend="fast")
    elif where == "use_backend":
        with pytest.raises(BackendError, match=rf"^lowkernels.use_backend: {allowed}$"), lowkernels.use_backend("fast"):
            pass
    else:
        monkeypatch.setenv("LOWKERNELS_BACKEND", "fast")
        with pytest.raises(BackendError, match=rf"^lowkernels.mbconv: the environment variable LOWKERNELS_BACKEND: {allowed}$"):
            call()


@pytest.mark.parametrize("operator", NAMES)
def test_explain_runs_nothing(probe: Probe, operator: str) -> None:
    args = arguments(operator)
    probe.bad_input = "too odd"
    choice = OPERATORS[operator].explain(*args)
    assert (choice.backend, choice.rejected) == ("eager", ((NAME, "too odd"),))
    with pytest.raises(BackendError, match="too odd"):
        OPERATORS[operator].explain(*args, backend=NAME)
    probe.bad_input = None
    assert OPERATORS[operator].explain(*args).backend == NAME
    assert probe.forwards == []


def test_explain_fills_in_defaults(probe: Probe) -> None:
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 1, 1)
    assert ops.OPERATORS["conv_act"].explain(x, weight).backend == NAME


def test_layout_copies_are_counted() -> None:
    args = arguments("mbconv")
    for x, copies in ((args[0], 0), (args[0].contiguous(), 1), (args[0][:, :, ::2], 1)):
        OPERATORS["mbconv"].overload(x, *args[1:])
        last = dispatch.last_call()
        assert last is not None
        assert last[1] == copies


@pytest.mark.parametrize("operator", NAMES)
def test_packing_asks_about_everything_but_the_input(probe: Probe, operator: str) -> None:
    op = OPERATORS[operator]
    weights = op.weights(arguments(operator))
    probe.bad_input = "not this input"
    assert op.pack(*weights).backend == NAME
    probe.bad_weights = "not these weights"
    packed = op.pack(*weights)
    assert (packed.backend, packed.tensors) == ("eager", [])
    with pytest.raises(BackendError, match=rf"lowkernels.{operator}: backend 'probe'.*not these weights"):
        op.pack(*weights, backend=NAME)


@pytest.mark.parametrize("operator", NAMES)
def test_packed_weights_reach_the_backend_that_made_them_only(probe: Probe, operator: str) -> None:
    op, args = OPERATORS[operator], arguments(operator)
    packed = op.pack(*op.weights(args))
    assert packed.backend == NAME
    assert len(packed.tensors) == 1
    expected = op.overload(*args, None, None, "eager")
    assert torch.equal(op.overload(*args, packed.tensors, packed.backend, None), expected)
    assert torch.equal(op.overload(*args, packed.tensors, "eager", None), expected)
    assert torch.equal(op.overload(*args, None, None, None), expected)
    assert torch.equal(op.overload(*args, packed.tensors, NAME, "eager"), expected)
    received = [given for _, given in probe.forwards]
    assert len(received) == 3
    assert received[0] is not None
    assert torch.equal(received[0][0], packed.tensors[0])
    assert received[1:] == [None, None]


@pytest.mark.parametrize("operator", NAMES)
def test_gradients_do_not_touch_packed_weights(probe: Probe, operator: str) -> None:
    op = OPERATORS[operator]
    args = [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments(operator)]
    packed = op.pack(*op.weights(tuple(args)))
    wanted = [a for a in args if isinstance(a, Tensor)]
    with_packs = torch.autograd.grad(op.overload(*args, packed.tensors, NAME, None).sum(), wanted)
    without = torch.autograd.grad(op.overload(*args, None, None, "eager").sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(with_packs, without, strict=True))


def test_empty_batch_starts_no_kernel(probe: Probe) -> None:
    out = OPERATORS["mbconv"].overload(*arguments("mbconv", batch=0))
    assert out.numel() == 0
    assert probe.forwards == []
    last = dispatch.last_call()
    assert last is not None
    assert last[0].backend == NAME


def test_output_in_another_layout_is_laid_out(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may answer in any layout; callers always get NHWC."""
    args = arguments("mbconv")
    expected = OPERATORS["mbconv"].overload(*args)
    kernel = dispatch.kernel("mbconv", NAME)
    assert kernel is not None
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *a: forward(*a).contiguous())
    out = OPERATORS["mbconv"].overload(*args)
    assert out.stride() == expected.stride()
    assert torch.equal(out, expected)


def test_decisions_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPERATORS["gn_mlp"]
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.setattr(operator_module, "_PLANS_KEPT", 4)
    for width in range(1, 12):
        op.overload(*arguments("gn_mlp", width=width), None, None, "eager")
        assert len(op._plans) <= 4


def test_many_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "_PLANS_KEPT", 3)
    calls = [arguments("fused_mbconv", width=width) for width in range(1, 9)]
    expected = [OPERATORS["fused_mbconv"].overload(*args, None, None, "eager") for args in calls]
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(10):
            for args, wanted in zip(calls, expected, strict=True):
                if not torch.equal(OPERATORS["fused_mbconv"].overload(*args, None, None, "eager"), wanted):
                    failures.append(str(args[0].shape))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("operator", NAMES)
def test_cost_of_asking(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """A call costs at most three times one of a bare operator with the same schema, registered in the same way.

    Both kernels return at once, so that what remains is PyTorch's own way through its dispatcher, and ours.
    """
    op, args = OPERATORS[operator], arguments(operator)
    out = op.overload(*args, None, None, "eager")
    schema = str(op.overload._schema)
    library = torch.library.Library(f"bare_{operator}", "DEF")
    library.define(f"{operator}{schema[schema.index('(') :]}")
    library.impl(operator, lambda *_: out, "CPU")
    torch.library.register_autograd(f"bare_{operator}::{operator}", lambda ctx, grad: None, lib=library)
    bare: Callable[..., Any] = getattr(getattr(torch.ops, f"bare_{operator}"), operator).default

    monkeypatch.setattr(op, "_plans", {})
    op.overload(*args, None, None, "eager")
    (key, plan), *others = op._plans.items()
    assert not others
    op._plans[key] = plan._replace(kernel=SimpleNamespace(forward=lambda *_: out))

    def cost(function: Callable[..., Any]) -> float:
        return timeit.timeit(lambda: function(*args, None, None, "eager"), timer=time.thread_time, number=20) / 20

    # This thread's own time, in turns and short ones, so that a busy machine is as busy for both; the least of many is what
    # undisturbed calls cost.
    rounds = [(cost(op.overload), cost(bare)) for _ in range(100)]
    ours, theirs = (min(column) for column in zip(*rounds, strict=True))
    assert ours <= 3 * theirs, f"{ours * 1e6:.1f} us, a bare operator {theirs * 1e6:.1f} us"
