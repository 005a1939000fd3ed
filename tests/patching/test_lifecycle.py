"""What an accelerated model goes through: training, other dtypes and devices, copies, checkpoints, compilers, contexts."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowformer
import lowkernels
from lowkernels import BackendError, FrozenError
from lowkernels.patching.batchnorm import FoldedNorm, FoldedNormConv
from lowkernels.testing import assert_within_budget
from tests.patching.helpers import (
    LONGEST_SUM,
    InvertedResidual,
    Snapshot,
    assert_same_function,
    counts,
    fused,
    image,
    randomise,
    row,
    run,
)


class Gate(nn.Module):
    """A block that no operator serves, with BatchNorms to fold around it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=True)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        out: Tensor = x + y * torch.sigmoid(self.fc(y.mean((2, 3), keepdim=True)))
        return out


class Small(nn.Module):
    """Everything accelerate() changes, small: blocks, folded norms, plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(InvertedResidual(), Gate(), InvertedResidual(act=nn.Hardswish))
        self.last = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        out: Tensor = self.head(self.last(self.blocks(x)).mean((2, 3)))
        return out


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return randomise(Small(), seed)  # type: ignore[return-value]


X = image(2, 3, 20, 17)
EXPECTED = {"BatchNorm2d": 2, "conv_act": 1, "mbconv": 2}


def accelerate(model: nn.Module, **arguments: Any) -> nn.Module:
    return lowkernels.accelerate(model, **{"backend": "eager", **arguments})


def assert_accelerated(model: nn.Module) -> None:
    assert counts(lowkernels.report(model)) == EXPECTED


def assert_matches(model: nn.Module, plain: nn.Module, x: Tensor = X) -> None:
    """``model`` gives what ``plain`` gives, within the error budget."""
    if x.dtype == torch.float64:
        return torch.testing.assert_close(run(model, x), run(plain, x), rtol=1e-9, atol=1e-9)
    truth = copy.deepcopy(plain).double()
    for got, eager, exact in zip(run(model, x), run(plain, x), run(truth, x.double()), strict=True):
        assert_within_budget(got, eager, exact, LONGEST_SUM)


def test_the_small_model_is_what_these_tests_take_it_for() -> None:
    model = small()
    assert_same_function(model, accelerate, X, image(1, 3, 64, 64))
    assert_accelerated(model)
    assert sum(isinstance(m, FoldedNorm) for m in model.modules()) == 2


# Options.


def test_folding_is_an_option() -> None:
    model = accelerate(small(), fold_batch_norm=False)
    assert counts(lowkernels.report(model)) == {"conv_act": 1, "mbconv": 2}
    assert_matches(model, small())


def test_channels_last_is_an_option() -> None:
    with_it, without = accelerate(small()), accelerate(small(), channels_last=False)
    assert with_it.last.weight.is_contiguous(memory_format=torch.channels_last)
    assert without.last.weight.is_contiguous()
    assert "channels_last" in row(with_it, "").reason
    assert not any(r.name == "" for r in lowkernels.report(without))


def test_a_model_with_nothing_to_do_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4))
    snapshot = Snapshot(model)
    accelerate(model)
    assert model[0].weight.is_contiguous()
    lowkernels.restore(model)
    snapshot.assert_restored()


def test_an_example_input_is_used() -> None:
    class TwoChannels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 8)
            self.body = small().blocks

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(self.fc(x)[:, :, None, None].expand(-1, -1, 6, 6))
            return out

    model = randomise(TwoChannels())
    without = accelerate(model, copy=True)
    assert counts(lowkernels.report(without)) == {"mbconv": 2}
    assert "did not run on the example" in row(without, "").reason
    x = image(3, 5)
    assert_same_function(model, lambda m: accelerate(m, example_input=x), x)
    assert counts(lowkernels.report(model)) == {"BatchNorm2d": 1, "conv_act": 1, "mbconv": 2}


def test_models_that_return_structures() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = F.relu(self.body.stem_norm(self.body.stem(x)))
            return {"maps": [y, self.body.blocks(y)], "size": x.shape[2]}

    model = assert_same_function(randomise(Maps()), accelerate, X)
    # The classifier is never called.
    assert counts(lowkernels.report(model)) == {"BatchNorm2d": 2, "mbconv": 2}


# Train mode.


def trained(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of one step in train mode, and the state after it."""
    model.train()
    F.cross_entropy(model(X.to(next(model.parameters()).dtype)), torch.tensor([1, 3])).backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None for g in gradients)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    return [g.clone() for g in gradients], {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_training_is_what_it_was(mode: bool) -> None:
    plain, model = small().train(mode), small().train(mode)
    accelerate(model, channels_last=False)
    assert model.training == mode
    assert all(m.training == mode for m in model.modules())
    assert_accelerated(model)
    for _ in range(2):
        (one, one_state), (other, other_state) = trained(plain), trained(model)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert list(one_state) == list(other_state)
        assert all(torch.equal(one_state[k], other_state[k]) for k in one_state)
        # From the next eval() on, the blocks run as operators, on what has been learnt.
        assert_matches(model.eval(), plain.eval())
    assert all(block.last_call is not None for block in fused(model) if not isinstance(block, FoldedNormConv))


def test_channels_last_trains_to_the_same_numbers() -> None:
    plain, model = small().double(), accelerate(small().double())
    (one, one_state), (other, other_state) = trained(plain), trained(model)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one_state, other_state, rtol=1e-10, atol=1e-12)


def test_accelerating_in_train_mode_changes_no_statistics_and_keeps_no_weights() -> None:
    model = small().train()
    snapshot = Snapshot(model)
    accelerate(model)
    snapshot.assert_state_kept()
    assert not any(name.startswith("_folded") for m in fused(model) for name in m._buffers)
    lowkernels.restore(model)
    snapshot.assert_restored()


def test_gradients_in_eval_mode() -> None:
    plain, model = small().double(), accelerate(small().double())
    for m in (plain, model):
        m(X.double()).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_modes_of_single_modules_are_kept() -> None:
    plain = small().double().train()
    plain.blocks[1].norm.eval()
    plain.stem.eval()
    plain.blocks[2].eval()
    model = copy.deepcopy(plain)
    modes = [m.training for m in model.modules()]
    accelerate(model)
    assert [m.training for m in model.modules()] == modes
    assert_matches(model, plain, X.double())
    lowkernels.restore(model)
    assert [m.training for m in model.modules()] == modes


def test_a_folded_norm_alone_in_train_mode() -> None:
    plain, model = small().double(), accelerate(small().double())
    for m in (plain, model):
        m.stem_norm.train()
        m.blocks[1].norm.train()
    assert_matches(model, plain, X.double())
    torch.testing.assert_close(model.stem_norm.running_mean, plain.stem_norm.running_mean)
    for m in (plain, model):
        m.eval()
    assert_matches(model, plain, X.double())


@pytest.mark.parametrize("transform", ["vmap", "jvp", "functional_call"])
def test_function_transforms(transform: str) -> None:
    plain, model = small().double(), accelerate(small().double())
    x = X.double()

    def apply(m: nn.Module) -> Any:
        if transform == "vmap":
            return torch.func.vmap(lambda one: m(one[None])[0])(x)
        if transform == "jvp":
            return torch.func.jvp(m, (x,), (torch.ones_like(x),))
        other = {k: v + 0.1 for k, v in small().double().state_dict().items() if v.is_floating_point()}
        return torch.func.functional_call(m, other, (x,))

    torch.testing.assert_close(apply(model), apply(plain), rtol=1e-9, atol=1e-9)


# Dtypes and devices.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain = small().to(dtype)
    model = accelerate(copy.deepcopy(plain))
    assert_accelerated(model)
    assert_matches(model, plain, X.to(dtype))


def test_conversion_after_accelerating() -> None:
    model = accelerate(small())
    run(model, X)
    assert_matches(model.half(), small().half(), X.half())
    assert_matches(model.float(), small().half().float())


def test_moving_after_accelerating() -> None:
    """To the meta device and back, where a norm and its convolution are apart for a while."""
    plain, model = small(), accelerate(small())
    state = plain.state_dict()
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_matches(model, plain)


def test_a_model_without_data() -> None:
    with torch.device("meta"):
        model = Small().eval()
    accelerate(model)
    assert_accelerated(model)
    assert model(torch.empty(2, 3, 9, 9, device="meta")).shape == (2, 7)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.load_state_dict(small().state_dict())
    assert_matches(model, small())


# Copies.


def test_a_copy_leaves_the_original_alone() -> None:
    model = small()
    snapshot, attributes = Snapshot(model), [dict(vars(m)) for m in model.modules()]
    other = accelerate(model, copy=True)
    assert other is not model
    assert_accelerated(other)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    snapshot.assert_restored()
    assert [dict(vars(m)).keys() for m in model.modules()] == [a.keys() for a in attributes]
    assert len(lowkernels.report(model)) == 0
    assert_matches(other, model)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_accelerated_model(way: str, ran: bool) -> None:
    model = accelerate(small())
    if ran:
        run(model, X)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_accelerated(other)
    assert torch.equal(run(other, X)[0], run(model, X)[0])
    # The two share nothing, and each follows its own parameters.
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    plain = small()
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    assert_matches(other, plain)
    assert_matches(model, small())
    # And can be restored on its own.
    lowkernels.restore(other)
    assert not fused(other)
    assert_matches(other, plain)
    assert_accelerated(model)


# Twice, again, after, partly.


def test_twice_is_once() -> None:
    model = accelerate(small())
    modules, report = list(model.modules()), lowkernels.report(model)
    accelerate(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert lowkernels.report(model) == report
    assert_matches(model, small())


def test_restored_and_accelerated_again() -> None:
    model = small()
    snapshot = Snapshot(model)
    report = None
    for _ in range(2):
        accelerate(model)
        report = report or lowkernels.report(model)
        assert lowkernels.report(model) == report
        assert_matches(model, small())
        lowkernels.restore(model)
        snapshot.assert_restored()


def test_restoring_what_was_never_accelerated_changes_nothing() -> None:
    model = small()
    snapshot = Snapshot(model)
    lowkernels.restore(model)
    snapshot.assert_restored()


def test_a_part_first_and_then_the_whole() -> None:
    model = small()
    snapshot = Snapshot(model)
    accelerate(model.blocks)
    assert row(model, "blocks.1.norm").reason.startswith("folded into")
    accelerate(model)
    assert_accelerated(model)
    assert_matches(model, small())
    lowkernels.restore(model)
    snapshot.assert_restored()


def test_only_a_part_is_restored() -> None:
    model = accelerate(small())
    lowkernels.restore(model.blocks[0:2])
    assert_matches(model, small())


def test_on_a_model_made_with_kernels() -> None:
    torch.manual_seed(0)
    model = randomise(lowformer.create_model("lowformer_b0", kernels="auto"))
    blocks = fused(model)
    plain = copy.deepcopy(lowkernels.restore(copy.deepcopy(model)))
    accelerate(model)
    assert [id(b) for b in fused(model)] == [id(b) for b in blocks]
    assert_matches(model, plain, image(1, 3, 70, 64))
    lowkernels.restore(model)
    assert not fused(model)


def test_hooks_on_children_of_kernels_do_not_let_folding_in() -> None:
    model = small()
    accelerate(model, fold_batch_norm=False)
    model.blocks[0].act1.register_forward_hook(lambda *a: None)
    accelerate(model)
    assert isinstance(model.blocks[0].expand, nn.Conv2d)
    assert_matches(model, small())


# Checkpoints.


def test_loaded_weights_are_used() -> None:
    model, other = accelerate(small()), small(seed=1)
    run(model, X)
    model.load_state_dict(other.state_dict())
    assert_matches(model, other)


def test_assigned_weights_are_used() -> None:
    model, other = accelerate(small()), small(seed=1)
    run(model, X)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_matches(model, other)
    lowkernels.restore(model)
    assert_matches(model, other)


def test_a_changed_norm_alone_is_noticed() -> None:
    model, plain = accelerate(small()), small()
    run(model, X)
    for m in (model, plain):
        with torch.no_grad():
            m.stem_norm.bias.add_(1)
            m.stem_norm.running_var.mul_(2)
            m.blocks[1].norm.weight.mul_(-1)
            m.blocks[0].norm2.running_mean.add_(1)
    assert_matches(model, plain)


def test_checkpoints_from_before_batches_were_counted() -> None:
    state = {k: v for k, v in small(seed=1).state_dict().items() if "num_batches_tracked" not in k}
    model = accelerate(small(), fold_batch_norm=True)
    model.load_state_dict(state)
    assert_matches(model, small(seed=1))


def test_a_checkpoint_of_an_accelerated_model_is_an_ordinary_one() -> None:
    model = accelerate(small(seed=1))
    plain = small()
    plain.load_state_dict(model.state_dict())
    assert_matches(plain, small(seed=1))


def test_frozen_models_compute_the_same_and_cannot_be_restored() -> None:
    model = accelerate(small())
    lowkernels.freeze(model)
    assert_matches(model, small())
    with pytest.raises(FrozenError):
        lowkernels.restore(model)
    with pytest.raises(FrozenError):
        model.train()


def test_freezing_in_train_mode_is_refused_and_changes_nothing() -> None:
    model = accelerate(small()).train()
    with pytest.raises(FrozenError):
        lowkernels.freeze(model)
    lowkernels.restore(model)
    assert not fused(model)


# Errors.


def test_an_unknown_backend_is_an_error() -> None:
    model = small()
    snapshot = Snapshot(model)
    with pytest.raises(BackendError, match=r"unknown backend 'quick'.*eager"):
        lowkernels.accelerate(model, "quick")
    snapshot.assert_restored()


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_a_backend_that_cannot_serve_is_an_error(mode: bool) -> None:
    # The Triton kernels need a GPU.
    model = small().train(mode)
    snapshot = Snapshot(model)
    with pytest.raises(BackendError, match="'triton'"):
        lowkernels.accelerate(model, "triton")
    snapshot.assert_restored()


@pytest.mark.parametrize("where", ["_to_channels_last", "fold_batch_norms", "_find_blocks", "_try"])
def test_whatever_goes_wrong_the_model_is_untouched(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowkernels.patching import swap

    model = small().train()
    snapshot = Snapshot(model)
    real: Callable[..., Any] = getattr(swap, where)

    def breaks(*args: Any) -> Any:
        result = real(*args)
        if isinstance(result, Iterator):
            list(result)
        raise KeyboardInterrupt

    monkeypatch.setattr(swap, where, breaks)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    snapshot.assert_restored()


# Contexts.


def test_random_state_is_untouched() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x + 0 * torch.rand_like(x))
            return out

    model = randomise(Draws())
    before = torch.get_rng_state(), random.getstate()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.set_grad_enabled(True),
        lambda: torch.device("meta"),
        lambda: lowkernels.use_backend("eager"),
    ],
    ids=["autocast", "inference mode", "no grad", "grad", "default device", "backend"],
)
def test_contexts_around_accelerate(context: Callable[[], Any]) -> None:
    model = small()
    parameters = list(model.parameters())
    with context():
        accelerate(model)
    assert_accelerated(model)
    assert all(a is b and not a.is_inference() for a, b in zip(parameters, model.parameters(), strict=True))
    assert_matches(model, small())
    # It trains, too: nothing that was made in the context has got into it.
    one, other = trained(model.double()), trained(small().double())
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_default_dtype() -> None:
    model = small()
    torch.set_default_dtype(torch.float64)
    try:
        accelerate(model)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert_accelerated(model)
    assert_matches(model, small())


def test_autocast_around_the_forward() -> None:
    plain, model = small(), accelerate(small())
    truth = run(small().double(), X.double())[0]
    run(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = run(model, X)[0], run(plain, X)[0]
    assert_within_budget(got, eager, truth, LONGEST_SUM)
    assert_matches(model, plain)


def test_deterministic_mode_and_anomaly_detection() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            model = accelerate(small())
    finally:
        torch.use_deterministic_algorithms(False)
    assert_accelerated(model)


# Compilers and wrappers.


def test_compile() -> None:
    model = accelerate(small())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_matches(compiled, small())
    assert_matches(compiled, small(), image(3, 3, 24, 24))


def test_compile_after_loading_uses_what_was_loaded() -> None:
    model = accelerate(small())
    run(model, X)
    model.load_state_dict(small(seed=1).state_dict())
    assert_matches(torch.compile(model, fullgraph=True, backend="aot_eager"), small(seed=1))


def test_accelerating_a_compiled_model() -> None:
    compiled = torch.compile(small(), backend="aot_eager")
    assert_matches(compiled, small())
    accelerate(compiled)
    assert_accelerated_inside(compiled)
    assert_matches(compiled, small())


def assert_accelerated_inside(wrapper: nn.Module) -> None:
    assert counts(lowkernels.report(wrapper)) == EXPECTED


def test_export_with_any_batch() -> None:
    model = accelerate(small())
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    assert_matches(program.module(), small())
    assert_matches(program.module(), small(), image(5, 3, 20, 17))


def test_trace() -> None:
    model = accelerate(small())
    with torch.no_grad():
        traced = torch.jit.trace(model, X)
    assert_matches(traced, small(), image(3, 3, 20, 17))


def test_onnx_of_the_restored_model(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = lowkernels.restore(accelerate(small()))
    torch.onnx.export(model, (X,), tmp_path / "model.onnx", dynamo=True)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not any(node.domain == "lowkernels" for node in graph.node)
    assert sum(node.op_type == "Conv" for node in graph.node) == sum(isinstance(m, nn.Conv2d) for m in small().modules())


def test_inside_distributed_data_parallel(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, model = small().double(), small().double()
        wrapped = nn.parallel.DistributedDataParallel(model)
        accelerate(wrapped)
        assert_accelerated_inside(wrapped)
        assert_matches(wrapped, plain, X.double())
        (one, _), (other, _) = trained(plain), trained(wrapped)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert_matches(wrapped.eval(), plain.eval(), X.double())
        lowkernels.restore(wrapped)
        assert not fused(wrapped)
        # Accelerated first, wrapped afterwards.
        late = nn.parallel.DistributedDataParallel(accelerate(small().double()))
        assert_accelerated_inside(late)
        assert_matches(late, small().double(), X.double())
        plain = small().double()
        for _ in range(2):
            (one, _), (other, _) = trained(plain), trained(late)
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            late.zero_grad()
            plain.zero_grad()
            lowkernels.restore(late)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("function", [lowkernels.accelerate, lowkernels.restore, lowkernels.report])
def test_what_is_no_module_is_refused(function: Callable[[Any], object]) -> None:
    with pytest.raises(lowkernels.InputError, match=f"lowkernels.{function.__name__}: argument model: is a str; allowed"):
        function("model")
