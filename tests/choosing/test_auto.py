"""How auto chooses: measured here, measured elsewhere, estimated, in order; and what it says about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lowkernels
from lowkernels import backends, dispatch
from lowkernels.choosing import auto, estimates, measured, settings
from lowkernels.choosing.measured import Machine, Row
from lowkernels.ops import OPERATORS
from lowkernels.testing import Call, random_call
from tests.ops.probe import NAME, Probe, install

CALL = random_call("gn_mlp", batch=2, height=6, width=7)
NAMES = ("cuda", "triton", "eager")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    return install(monkeypatch)


def here() -> Machine:
    machine = measured.machine(torch.device("cpu"))
    assert machine is not None
    return machine


def know(us: dict[str, float], call: Call = CALL, shipped: bool = False, setting: dict[str, dict[str, int]] | None = None) -> None:
    described = measured.describe(*call)
    assert described is not None
    path = measured.shipped_path(here(), measured.SHIPPED) if shipped else measured.user_path(here())
    measured.write(path, here(), [Row(*described, us, setting or {}, "2026-01-02, torch 9")])
    measured.forget()


def explain(call: Call = CALL, backend: str | None = None) -> dispatch.Choice:
    return lowkernels.explain(call.operator, *call.args, backend=backend)


def test_a_measured_table_decides(probe: Probe) -> None:
    assert explain() == dispatch.Choice("gn_mlp", NAME, "first choice of auto", basis="order")
    know({NAME: 60.0, "eager": 41.26}, shipped=True)
    found = explain()
    assert (found.backend, found.basis) == ("eager", "shipped")
    assert found.reason == f"measured on {here().device}: 41.3 us against 60 us for {NAME} (2026-01-02, torch 9)"
    know({NAME: 1200.0, "eager": 2346.0})
    found = explain()
    assert (found.backend, found.basis, found.rejected) == (NAME, "measured", ())
    assert found.reason == "measured here: 1.2 ms against 2.35 ms for eager (2026-01-02, torch 9)"
    smaller = random_call("gn_mlp", batch=1, height=6, width=7)
    assert " at 2 x 6x7 (" in explain(smaller).reason
    assert explain(random_call("gn_mlp", batch=9, height=6, width=7)).basis == "order"
    assert explain(backend="eager").basis == "request"


def test_what_is_within_noise_does_not_decide(probe: Probe) -> None:
    know({NAME: 10.4, "eager": 10.0})
    assert explain().backend == NAME
    know({NAME: 10.6, "eager": 10.0})
    assert explain().backend == "eager"


def test_the_fastest_may_refuse(probe: Probe) -> None:
    know({NAME: 1.0, "eager": 2.0})
    probe.bad_input = "too odd"
    found = explain()
    assert (found.backend, found.rejected, found.basis) == ("eager", ((NAME, "too odd"),), "measured")


def test_backends_that_were_not_measured_come_last(probe: Probe) -> None:
    know({"eager": 2.0})
    found = explain()
    assert (found.backend, found.reason) == ("eager", "measured here: 2 us (2026-01-02, torch 9)")


def test_a_call_and_its_plan_follow_the_table(probe: Probe) -> None:
    op = OPERATORS[CALL.operator]

    def served() -> tuple[str, str]:
        op.overload(*CALL.args, None, None, None)
        last = dispatch.last_call()
        assert last is not None
        return last[0].backend, last[0].basis

    assert served() == (NAME, "order")
    know({NAME: 2.0, "eager": 1.0})
    assert served() == ("eager", "measured")
    know({NAME: 1.0, "eager": 2.0})
    assert served() == (NAME, "measured")


def test_tables_may_change_while_threads_call(probe: Probe) -> None:
    op = OPERATORS[CALL.operator]
    expected = op.overload(*CALL.args, None, None, "eager")
    done = threading.Event()
    failures: list[object] = []

    def work() -> None:
        try:
            while not done.is_set():
                if not torch.equal(op.overload(*CALL.args, None, None, None), expected):
                    failures.append("wrong result")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        know({NAME: 1.0 + turn % 2, "eager": 2.0 - turn % 2})
        time.sleep(0.005)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    op.overload(*CALL.args, None, None, None)
    last = dispatch.last_call()
    assert last is not None
    assert (last[0].backend, last[0].basis) == ("eager", "measured")


def test_a_block_follows_the_table_and_says_so(probe: Probe) -> None:
    block = lowkernels.nn.GroupNormMLP(8, expansion=2).eval()
    x = torch.randn(2, 8, 5, 5)
    described = measured.describe("gn_mlp", block._arguments(x, block._kept_weights()))
    assert described is not None
    with torch.no_grad():
        block(x)
        for us, expected in (({NAME: 2.0, "eager": 1.0}, "eager"), ({NAME: 1.0, "eager": 2.0}, NAME)):
            measured.write(measured.user_path(here()), here(), [Row(*described, us)])
            measured.forget()
            for _ in range(3):
                block(x)
                (row,) = lowkernels.report(torch.nn.Sequential(block))
                assert row.ran_on == expected
                assert row.reason.startswith("measured here: 1 us against 2 us for ")
    assert len(probe.forwards) == 4
    assert all(packed is not None for _, packed in probe.forwards)


def test_a_block_is_packed_for_whoever_serves_it(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend is first in order for the weights alone, another serves the input: nothing is packed on the spot."""
    second = Probe()
    load, kernel = backends.load, dispatch.kernel
    kernels = {operator: second.kernel(operator) for operator in OPERATORS}
    monkeypatch.setattr(backends, "PRIORITY", (NAME, "second", "eager"))
    monkeypatch.setattr(backends, "load", lambda name: second if name == "second" else load(name))
    monkeypatch.setattr(dispatch, "kernel", lambda op, name: kernels[op] if name == "second" else kernel(op, name))
    block = lowkernels.nn.GroupNormMLP(8, expansion=2).eval()
    assert list(block._packed) == [NAME]
    large, small = torch.randn(3, 8, 5, 5), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        block(small)
        probe.bad_input = "too large"
        for _ in range(2):
            block(large)
            assert block.last_call is not None
            assert block.last_call[0].backend == "second"
        kept = dict(block.named_buffers())
        block(small)
        block.fc1.bias.add_(1.0)
        block(large)
    assert list(block._packed) == [NAME, "second"]
    # Written in place, as graphs that hold them need.
    assert all(buffer is kept[name] for name, buffer in block.named_buffers())
    assert [packed is not None for _, packed in (*probe.forwards, *second.forwards)] == [True] * 5


def test_settings_reach_the_kernel(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = dispatch.kernel(CALL.operator, NAME)
    assert kernel is not None
    seen: list[dict[str, int]] = []

    def forward(x: Tensor, *args: Any) -> Tensor:
        seen.append(dict(settings.current()))
        return torch.empty_like(x)

    monkeypatch.setattr(kernel, "forward", forward)
    op = OPERATORS[CALL.operator]

    def run(backend: str | None) -> None:
        op.overload(*CALL.args, None, None, backend)

    run(None)
    know({NAME: 1.0, "eager": 2.0}, setting={NAME: {"BM": 64}})
    run(None)
    run(NAME)
    with settings.using({"BM": 32}):
        run(NAME)
    with settings.using({}):
        run(NAME)
    run(NAME)
    assert seen == [{}, {"BM": 64}, {"BM": 64}, {"BM": 32}, {}, {"BM": 64}]
    assert settings.current() == {}


@pytest.mark.parametrize("backend", [None, NAME])
def test_where_sizes_are_from(probe: Probe, monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    assert explain(backend=backend).sizes == "", "there is nothing to choose"
    monkeypatch.setattr(dispatch.kernel(CALL.operator, NAME), "candidates", lambda *args: [], raising=False)
    assert explain(backend=backend).sizes == "rule"
    monkeypatch.setattr(probe, "sizes", lambda operator, call: f"of {operator} in {len(call)}", raising=False)
    found = explain(backend=backend)
    assert found.sizes == f"of gn_mlp in {len(CALL.args)}"
    assert str(found).endswith(f"; sizes: {found.sizes})")
    for setting in ({}, {NAME: {"BM": 64}}):
        know({NAME: 1.0, "eager": 2.0}, shipped=True, setting=setting)
        assert explain(backend=backend).sizes == "shipped"
    know({NAME: 1.0, "eager": 2.0})
    assert explain(backend=backend).sizes == "tuned"
    know({"eager": 2.0})
    assert explain(backend=NAME).sizes == found.sizes, "the table has only eager"
    block = lowkernels.nn.GroupNormMLP(8, expansion=2, backend=backend or "auto").eval()
    with torch.no_grad():
        block(torch.randn(1, 8, 50, 50))
    (row,) = lowkernels.report(torch.nn.Sequential(block))
    assert row.sizes == f"of gn_mlp in {len(CALL.args)}"
    assert row.reason.endswith(f"; sizes: {row.sizes}")


def test_weights_at_hand_are_only_compared_with_eager() -> None:
    know({"cuda": 1.0, "triton": 3.0, "eager": 2.0})
    rank = auto.rank
    assert rank("gn_mlp", NAMES, CALL.args).order == ("cuda", "eager", "triton")
    assert rank("gn_mlp", NAMES, CALL.args, "triton").order == ("eager", "triton", "cuda")
    assert rank("gn_mlp", NAMES, CALL.args, "cuda").order == ("cuda", "eager", "triton")
    assert rank("gn_mlp", NAMES, CALL.args, "eager").order == ("cuda", "eager", "triton")
    assert rank("gn_mlp", NAMES, None).order == NAMES


def test_what_has_to_be_asked_for_by_name_is_not_chosen() -> None:
    know({"triton": 1.0, "eager": 3.0, "cpu": 2.0})
    assert auto.rank("gn_mlp", ("cpu", "eager", "triton"), CALL.args).order == ("cpu", "eager", "triton")


def gpu_call(operator: str, **options: Any) -> Call:
    """A call on GPU tensors without data; it needs no GPU."""
    call = random_call(operator, device="meta", **options)
    with FakeTensorMode():
        args = (torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a for a in call.args)
        return Call(operator, tuple(args))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "compute_capability", lambda device: 90)
    monkeypatch.setattr(measured, "machine", lambda device: Machine("NVIDIA Test", "sm_90"))


def test_estimates_decide_where_nothing_is_measured(hopper: None) -> None:
    call = gpu_call("gn_mlp", batch=256, channels=128, height=14, width=14, dtype=torch.float16)
    found = auto.rank("gn_mlp", NAMES, call.args)
    assert found.basis == "estimate"
    assert found.order == NAMES
    assert found.why("cuda", True).startswith("estimated: ")
    assert " for triton, " in found.why("cuda", True)
    assert "not measured here (lowkernels tune)" in found.why("cuda", True)


def test_an_estimate_may_prefer_eager(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    call = gpu_call("gn_mlp", dtype=torch.float16)
    times = {"cuda": 1.4, "triton": 1.6, "eager": 1.0}
    monkeypatch.setattr(estimates, "seconds", lambda backend, *_: times[backend])
    assert auto.rank("gn_mlp", NAMES, call.args).order == ("cuda", "eager", "triton")
    times["cuda"] = 1.6
    assert auto.rank("gn_mlp", NAMES, call.args).order == ("eager", "cuda", "triton")


def test_dense_float32_without_tensor_cores_is_left_to_the_vendor(hopper: None) -> None:
    """Triton multiplies float32 without tensor cores: in a large dense convolution it cannot win."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    dense: dict[str, Any] = {"batch": 64, "channels": 256, "hidden": 1024, "height": 28, "width": 28}
    try:
        orders = {}
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
            orders[precision] = auto.rank("fused_mbconv", ("triton", "eager"), gpu_call("fused_mbconv", **dense).args).order
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]
    assert orders == {"ieee": ("eager", "triton"), "tf32": ("triton", "eager")}


@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 103, 120])
def test_every_operator_has_an_estimate(operator: str, arch: int) -> None:
    args = random_call(operator, dtype=torch.float16).args
    for backend in NAMES:
        seconds = estimates.seconds(backend, operator, args, arch, "float16")
        assert seconds is not None
        assert estimates.LAUNCH_S < seconds < 1e-3
    assert estimates.seconds("eager", operator, args, 130, "float16") is None
    assert estimates.seconds("eager", operator, args, arch, "float64") is None


def test_without_an_estimate_the_order_decides(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.setattr(estimates, "compute_capability", lambda device: 130)
    call = gpu_call("gn_mlp", dtype=torch.float16)
    found = auto.rank("gn_mlp", NAMES, call.args)
    assert (found.order, found.basis) == (NAMES, "order")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_tensors_where_there_is_no_gpu_are_not_estimated() -> None:
    call = gpu_call("gn_mlp", dtype=torch.float16)
    assert auto.rank("gn_mlp", NAMES, call.args) == auto.Ranking(NAMES)


def test_cpu_calls_are_not_estimated() -> None:
    assert auto.rank("gn_mlp", ("cpu", "eager"), CALL.args).basis == "order"


def test_nothing_is_timed_or_read_once_a_call_is_planned(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPERATORS[CALL.operator]
    op.overload(*CALL.args, None, None, None)

    def never(*args: object, **kwargs: object) -> Any:
        raise AssertionError("a planned call asks nobody")

    for module, name in ((auto, "rank"), (measured, "find"), (measured, "describe"), (estimates, "seconds")):
        monkeypatch.setattr(module, name, never)
    op.overload(*CALL.args, None, None, None)


def test_with_setting_is_the_kernel_otherwise() -> None:
    kernel = SimpleNamespace(forward=lambda x, *args: x + len(args), LIMITS="small x")
    wrapped: Callable[..., Any] = settings.WithSetting(kernel, {"a": 1}).forward
    assert wrapped(torch.zeros(1), 1, 2).item() == 2
    assert settings.WithSetting(kernel, {"a": 1}).LIMITS == "small x"
