"""Contenders on real subjects: what takes part is right, what is wrong shows its error, what fails or is absent says why."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import measure as measuring
from benchmarks import plans, provenance, rivals, rows, runner
from benchmarks.ceilings import Ceilings
from benchmarks.measure import Session, Truth, measure
from benchmarks.rivals import Built, Contender
from benchmarks.subjects import (
    Layer,
    Subject,
    blocks_of,
    inputs_to_rotate,
    layer_subject,
    layers_of,
    lowformer_layers,
    mobile_layers,
    model_subject,
)
from benchmarks.timing import SMOKE, CpuClock, Turn
from lowkernels.ops import OPERATORS

SMALL = Layer("fused_mbconv", 8, 8, 6, 6, act="hardswish", hidden=16, residual=True)
RIVALS = {c.name: c for c in rivals.RIVALS}


def subject(layer: Layer = SMALL, dtype: torch.dtype = torch.float32) -> Subject:
    return layer_subject(layer, 2, dtype, "cpu", 1 << 16)


def session(*contenders: Contender, seconds: float = 1e3) -> Session:
    rates = {dtype: Ceilings(1e12, 1e11, "a product") for dtype in (torch.float32, torch.bfloat16)}
    return Session("cpu", CpuClock(), SMOKE, rates, contenders, lambda: seconds)


def by_name(found: Sequence[rows.Row]) -> dict[str, rows.Row]:
    return {r.label: r for r in found}


def altered(change: Callable[[Tensor], Tensor]) -> Callable[[Subject], Built]:
    def build(subject: Subject) -> Built:
        module = subject.plain()
        return Built(lambda x: change(module(x)))

    return build


def test_a_wrong_contender_has_its_error_and_no_time() -> None:
    off = Contender("off by a thousandth", altered(lambda y: y * 1.001))
    found = by_name(measure(subject(), session(RIVALS["eager"], off)))
    wrong = found["off by a thousandth"]
    assert wrong.status == rows.WRONG
    assert wrong.ms is None
    assert wrong.error is not None
    assert wrong.error["frobenius"] == pytest.approx(1e-3, rel=1e-2)
    assert wrong.reason is not None
    assert wrong.reason.startswith("error 0.001 (relative)")
    assert found["eager"].status == rows.OK
    assert found["eager"].fastest_rival == "eager"


@pytest.mark.parametrize(
    "change",
    [lambda y: torch.full_like(y, float("nan")), lambda y: torch.cat([y[:-1], y[:1]]), lambda y: y[:1]],
    ids=["nan", "last image", "too few images"],
)
def test_nothing_wrong_is_timed(change: Callable[[Tensor], Tensor]) -> None:
    (row,) = measure(subject(), session(Contender("x", altered(change))))
    assert row.status in (rows.WRONG, rows.FAILED)
    assert row.ms is None


def test_images_at_both_ends_of_a_large_batch_are_compared() -> None:
    found = layer_subject(SMALL, 9, torch.float32, "cpu", 1 << 16)
    index = torch.arange(9.0).view(9, 1).expand(9, 2)
    assert found.checked(index)[:, 0].tolist() == [0, 1, 7, 8]


def test_failed_absent_and_left_out_say_why() -> None:
    def broken(subject: Subject) -> Built:
        raise RuntimeError("out of luck\nsecond line")

    contenders = (
        Contender("broken", broken),
        Contender("absent", altered(lambda y: y), lambda s: "not installed: pip install it"),
        Contender("unwanted", altered(lambda y: y)),
        Contender("slow to build", altered(lambda y: y), cost="compile"),
    )
    found = by_name(measure(subject(), session(*contenders, seconds=5), {"unwanted": "not today"}))
    assert {n: (r.status, r.reason) for n, r in found.items()} == {
        "broken": (rows.FAILED, "RuntimeError: out of luck"),
        "absent": (rows.ABSENT, "not installed: pip install it"),
        "unwanted": (rows.LEFT_OUT, "not today"),
        "slow to build": (rows.LEFT_OUT, "no time left to build it"),
    }


def test_a_row_is_complete_and_adds_up() -> None:
    (row,) = measure(subject(), session(RIVALS["eager"]))
    s = subject()
    assert row.ms is not None
    assert row.ms_low is not None
    assert row.ms_high is not None
    assert row.ms_low <= row.ms <= row.ms_high
    assert row.images_per_s == pytest.approx(2e3 / row.ms)
    assert row.tflops == pytest.approx(s.flops / row.ms / 1e9)
    assert row.gb_per_s == pytest.approx(s.bytes / row.ms / 1e6)
    assert row.share_of_product == pytest.approx(s.flops / (row.ms / 1e3) / 1e12)
    floor_ms = 1e3 * max(s.flops / 1e12, s.bytes / 1e11)
    assert row.floor_ms == pytest.approx(floor_ms)
    assert row.share_of_floor == pytest.approx(floor_ms / row.ms)
    # Convolution, hardswish, convolution, residual.
    assert row.launches == 4
    assert row.operator == "fused_mbconv"
    assert row.build_s is not None


@pytest.mark.parametrize("layer", plans.smoke_layers(), ids=lambda x: x.operator)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_light_contenders_are_right_on_every_operator(layer: Layer, dtype: torch.dtype) -> None:
    s = subject(layer, dtype)
    truth = Truth(s)
    with torch.no_grad():
        for contender in rivals.contenders():
            if contender.cost == "light" and contender.absent(s) is None:
                built = contender.build(s)
                error = truth.error(built.result(built.run(built.prepare(s.inputs[0]))))
                assert error.within(truth.budget), f"{contender.name}: {error}, allowed {truth.budget}"


def test_light_contenders_are_right_on_a_model() -> None:
    s = model_subject("lowformer_b0", 64, 2, torch.float32, "cpu", 1 << 16)
    light = [c for c in rivals.contenders() if c.cost == "light"]
    found = by_name(measure(s, session(*light)))
    bad = {n: r.reason for n, r in found.items() if r.status not in (rows.OK, rows.ABSENT, rows.LEFT_OUT)}
    assert not bad
    assert found["eager"].status == rows.OK
    assert found["eager, BatchNorm folded, channels_last"].status == rows.OK
    ours = found["lowkernels, auto"]
    assert ours.served is not None
    assert sum(ours.served.values()) == len(blocks_of("lowformer_b0", 64, 2, torch.float32))


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exported_contenders(name: str, dtype: torch.dtype) -> None:
    s = subject(dtype=dtype)
    reason = RIVALS[name].absent(s)
    if reason is not None:
        assert "pip install 'lowkernels[" in reason
        pytest.skip(reason)
    (row,) = measure(s, session(RIVALS[name]))
    # ONNX Runtime has no bfloat16 convolution on a CPU, and says so itself.
    expected = (rows.OK, rows.FAILED) if (name, dtype) == ("ONNX Runtime", torch.bfloat16) else (rows.OK,)
    assert row.status in expected, row.reason


def test_folding_leaves_no_batch_norm_and_the_same_function() -> None:
    s = model_subject("lowformer_b0", 32, 1, torch.float64, "cpu", 1 << 16)
    with torch.no_grad():
        expected = s.plain()(s.inputs[0])
        module = rivals.folded(s.plain())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        torch.testing.assert_close(module(s.inputs[0]), expected, rtol=1e-9, atol=1e-9)


def test_weights_tell_a_dropped_bias_or_statistic() -> None:
    s = model_subject("lowformer_b0", 32, 1, torch.float32, "cpu", 1 << 16)
    norms = [m for m in s.plain().modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        for values in (norm.weight - 1, norm.bias, norm.running_mean, norm.running_var - 1):
            assert values.abs().min() > 0


def test_compiled_contenders_have_code_of_their_own_and_leave_no_flag_behind() -> None:
    module = nn.Identity()
    first, second = rivals.own_code(module, "first"), rivals.own_code(module, "second")
    assert first.__code__ is not second.__code__
    assert first.__code__ != second.__code__
    x = torch.ones(1)
    assert first(x) is x


@pytest.mark.slow
@pytest.mark.skipif(rivals._no_compiler(subject()) is not None, reason="no C++ compiler")
def test_compilers_are_right_and_freezing_does_not_leak() -> None:
    from torch._inductor import config

    before = config.freezing
    compilers = [c for c in rivals.RIVALS if c.cost == "compile"]
    found = measure(subject(), session(RIVALS["eager"], *compilers))
    assert {r.label: r.status for r in found} == {c.name: rows.OK for c in (RIVALS["eager"], *compilers)}
    assert config.freezing is before


def test_auto_is_not_measured_twice() -> None:
    found = by_name(measure(subject(), session(RIVALS["eager"], *rivals.ours())))
    timed = [r for r in found.values() if r.ours and r.ms is not None]
    assert len({tuple(sorted((r.served or {}).items())) for r in timed}) == len(timed)
    assert found["lowkernels, auto"].ms is not None


def test_graphs_double_the_contenders_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping of a GPU run, with captures replaced: each contender that can be captured has a second row."""
    log: list[str] = []

    def capture(run: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[list[Callable[[], Any]], Tensor]:
        log.append("captured")
        return [lambda x=x: run(x) for x in inputs], run(inputs[0])

    class Clock:
        source = "a script"

        def turn(self, calls: Sequence[Callable[[], Any]], repetitions: int) -> Turn:
            return Turn(1e-3, False)

    monkeypatch.setattr(measuring, "capture", capture)
    monkeypatch.setattr(measuring, "_count", lambda entry, device: None)
    s = dataclasses.replace(subject(), device="cuda")
    uncapturable = Contender("uncapturable", lambda s: dataclasses.replace(altered(lambda y: y)(s), graph=False))
    found = measure(s, dataclasses.replace(session(RIVALS["eager"], uncapturable), clock=Clock(), device="cuda"))
    assert [(r.label, r.status) for r in found] == [
        ("eager", rows.OK),
        ("eager, CUDA graph", rows.OK),
        ("uncapturable", rows.OK),
    ]
    assert log == ["captured"]


def test_a_capture_that_fails_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(run: object, inputs: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measuring, "capture", capture)
    monkeypatch.setattr(measuring, "_count", lambda entry, device: None)
    s = dataclasses.replace(subject(), device="cuda")
    found = by_name(measure(s, dataclasses.replace(session(RIVALS["eager"]), device="cuda")))
    assert found["eager"].status == rows.OK
    assert found["eager, CUDA graph"].status == rows.FAILED


def test_inputs_exceed_the_cache() -> None:
    assert inputs_to_rotate(10, 100) == 20
    assert inputs_to_rotate(1000, 100) == 2
    assert inputs_to_rotate(1, 10**9) == 64
    s = subject()
    size = s.inputs[0].numel() * 4
    assert len(s.inputs) * size >= 2 * (1 << 16)
    assert not torch.equal(s.inputs[0], s.inputs[1])


def test_layers_are_those_of_the_models() -> None:
    found = layers_of("lowformer_b1", 224)
    assert len(found) == 12
    assert "fused_mbconv 128-512-128 k3 s1 hardswish 14x14 +x" in [x.name for x in found]
    assert "lowtention 128-2x32-128 k5 s2 14x14 +x" in [x.name for x in found]


def test_a_layers_random_call_has_its_shapes() -> None:
    for block in blocks_of("lowformer_b0", 64, 2, torch.float32):
        if block.operator in OPERATORS:
            layer = next(
                x
                for x in layers_of("lowformer_b0", 64)
                if x.operator == block.operator and _shapes(x.call(2, torch.float32, "cpu")) == _shapes(block.args)
            )
            ours, theirs = layer.call(2, torch.float32, "cpu"), block.args
            settings = [(a, b) for a, b in zip(ours, theirs, strict=True) if not isinstance(b, Tensor)]
            assert all(a == b for a, b in settings)


def _shapes(args: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in args if isinstance(a, Tensor)]


@pytest.mark.slow
def test_all_layers_have_names_of_their_own() -> None:
    layers = lowformer_layers() + mobile_layers()
    assert len(layers) > 120
    assert len({(x.name) for x in layers}) == len(set(layers)) == len(layers)


def test_mobile_networks_end_where_their_papers_say() -> None:
    layers = mobile_layers((224,))
    heads = [x for x in layers if x.pool]
    assert {(x.channels, x.out_channels, x.height) for x in heads} == {(320, 1280, 7)}
    assert sum(x.operator == "mbconv" and x.kernel_size == 5 for x in layers) > 3


def test_full_plans_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [item.key for item in plans.full_models("cuda", plans.Choice())]
    assert len(models) == len(set(models)) == 8 * 2 * 3 * 3
    cpu = {(key[2], key[3]) for key in (item.key for item in plans.full_models("cpu", plans.Choice()))}
    assert cpu == {(224, 1), (224, 16), (512, 1), (512, 16)}
    one = list(plans.full_ops("cpu", plans.Choice(models=["lowformer_b0"], layers="^gn_mlp", sizes=[64], batches=[1])))
    assert [item.key[4] for item in one] == ["float32", "float32", "bfloat16", "bfloat16"]


def test_quick_plans_name_whom_they_leave_out() -> None:
    for item in plans.quick_models("cpu"):
        assert set(item.left_out) <= set(RIVALS)
        assert all(reason for reason in item.left_out.values())
    first, *rest = plans.quick_models("cpu")
    assert first.key == ("model", "lowformer_b1", 224, 1, "float32")
    assert set(first.left_out) == {c.name for c in rivals.RIVALS if c.cost == "compile"}
    # The main model is measured against everybody in the end.
    assert [item.left_out for item in rest if item.key == first.key] == [{}]


def test_no_share_of_disturbed_ceilings() -> None:
    s = dataclasses.replace(session(RIVALS["eager"]), ceilings={torch.float32: Ceilings(1e9, 1e9, "x", disturbed=True)})
    (row,) = measure(subject(), s)
    assert row.ms is not None
    assert (row.share_of_product, row.share_of_copy, row.share_of_floor, row.floor_ms) == (None,) * 4
    assert row.tflops is not None


def test_no_build_is_begun_that_would_outlast_the_time() -> None:
    slow = Contender("slow", altered(lambda y: y), cost="compile")
    s = session(slow, seconds=100)
    (row,) = measure(subject(), s)
    assert row.status == rows.OK
    assert s.longest["compile"] == row.build_s
    s.longest["compile"] = 70.0
    (row,) = measure(subject(), s)
    assert (row.status, row.reason) == (rows.LEFT_OUT, "no time left to build it")


def test_contenders_not_asked_for_are_named_as_that() -> None:
    (item,) = plans.only([plans.layer_item(SMALL, 1, torch.float32, "cpu")], "^OpenVINO$")
    assert set(item.left_out.values()) == {"not asked for"}
    assert set(item.left_out) == {c.name for c in rivals.contenders()} - {"eager", "OpenVINO"}
    (item,) = plans.only([plans.layer_item(SMALL, 1, torch.float32, "cpu", {"OpenVINO": "slow"})], None)
    assert item.left_out == {"OpenVINO": "slow"}


def test_a_run_goes_on_after_a_subject_that_fails_and_after_one_that_killed_it(tmp_path: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.touch()
    good, other = plans.layer_item(SMALL, 1, torch.float32, "cpu"), plans.layer_item(SMALL, 2, torch.float32, "cpu")

    def broken(cache: int) -> Subject:
        raise MemoryError("too large")

    bad = plans.Item(("op", "bad", 1, 1, "float32"), broken)
    s = session(RIVALS["eager"])
    writer = rows.Writer(path)
    writer.write({"kind": "started", "key": other.key, "stage": ""})
    said: list[str] = []
    runner.run_items([bad, other, good], s, path, say=said.append)
    facts = rows.read(path)
    reasons = {f["key"][1:4][0] + f" {f['key'][3]}": f["reason"] for f in facts.other if f["kind"] == "unmeasured"}
    assert reasons == {f"{SMALL.name} 2": "the process ended while it was measured", "bad 1": "MemoryError: too large"}
    assert [r.batch for r in facts.rows] == [1]
    said.clear()
    runner.run_items([bad, other, good], s, path, say=said.append)
    assert said == []
    runner.finish(path)
    assert {f["kind"] for f in rows.read(path).other} == {"unmeasured"}


def test_subjects_that_do_not_fit_into_memory_are_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.touch()
    s = subject()
    # Inputs, and four times what the largest step reads and writes: x, 3x3 weights and biases, and 16 channels of 2x6x6.
    expected = sum(4 * x.numel() for x in s.inputs) + 4 * 4 * (8 * 72 + 16 * 72 + 16 + 16 * 72)
    assert runner.memory_needed(s) == expected
    monkeypatch.setattr(provenance, "free_memory", lambda device: expected - 1)
    item = plans.layer_item(SMALL, 2, torch.float32, "cpu")
    runner.run_items([dataclasses.replace(item, make=lambda cache: s)], session(), path, say=lambda line: None)
    fact = rows.read(path).other[-1]
    assert fact["kind"] == "unmeasured"
    assert fact["reason"].startswith("needs about 0.0 GB of memory")


def test_subjects_after_the_deadline_are_named(tmp_path: Any) -> None:
    path = tmp_path / "x.jsonl"
    path.touch()
    runner.run_items([plans.layer_item(SMALL, 1, torch.float32, "cpu")], session(seconds=-1), path, say=lambda line: None)
    (fact,) = rows.read(path).other
    assert (fact["kind"], fact["reason"]) == ("unmeasured", "no time left")


def test_extras_that_are_missing_are_named() -> None:
    assert importlib.util.find_spec("torch") is not None
    assert rivals._missing("torch", extra="x") is None
    assert rivals._missing("torch", "no_such_module", extra="onnx") == (
        "no_such_module not installed: pip install 'lowkernels[onnx]'"
    )
