"""Training: batch statistics, gradients, dropout, stochastic depth, checkpointing, autocast, DDP."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowformer
from lowformer.blocks import DropPath, ResidualBlock
from tests.lowformer.helpers import images, small_model

NAMES = ["lowformer_b0", "lowformer_e1", "lowformer_e3"]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter(name: str, training: bool) -> None:
    model = small_model(name, num_classes=10).train(training)
    # 96x96 leaves stage 4 more than one position: with one, softmax is constant and q, k have no gradient
    grads = gradients(model, F.cross_entropy(model(images(2, 96, 96, dtype=torch.float32)), torch.arange(2)))
    assert all(grad.isfinite().all() for grad in grads.values())
    if not training:  # batch statistics take out what a bias in front of them adds, so its gradient is zero
        assert [name for name, grad in grads.items() if not grad.any()] == []


def test_training_uses_and_follows_batch_statistics() -> None:
    model = small_model().double()
    layer = model.stem[0]
    x = images(4, 64, 64)
    mean, var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    with torch.no_grad():
        y = layer.conv(x)
        model.eval()(x)
        assert torch.equal(layer.norm.running_mean, mean)
        assert layer.norm.num_batches_tracked == 0
        model.train()(x)
        normalised = layer.norm(y)
    expected_mean = 0.9 * mean + 0.1 * y.mean((0, 2, 3))
    expected_var = 0.9 * var + 0.1 * y.transpose(0, 1).flatten(1).var(1)
    # the second call on the same input moves the statistics once more
    expected_mean = 0.9 * expected_mean + 0.1 * y.mean((0, 2, 3))
    expected_var = 0.9 * expected_var + 0.1 * y.transpose(0, 1).flatten(1).var(1)
    assert (layer.norm.running_mean - expected_mean).abs().max() <= 1e-9
    assert (layer.norm.running_var - expected_var).abs().max() <= 1e-9
    assert layer.norm.num_batches_tracked == 2
    assert normalised.mean((0, 2, 3)).abs().max() <= 1e-9


def test_one_step_lowers_the_loss() -> None:
    model = small_model(num_classes=4)
    x, y = images(4, 64, 64, dtype=torch.float32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("option", ["drop_rate", "drop_path_rate"])
def test_dropout_and_drop_path_act_in_training_only(option: str) -> None:
    plain, model = small_model(), small_model(**{option: 0.5})
    assert list(plain.state_dict()) == list(model.state_dict())
    x = images(4, 64, 64, dtype=torch.float32)

    def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return tuple(seeded(seed, lambda: model(x)) for seed in (1, 2))  # type: ignore[return-value]

    model.load_state_dict(plain.state_dict())
    for module in (plain, model):
        module.eval()
    expected = outputs(plain)
    assert torch.equal(*expected)
    assert torch.equal(outputs(model)[0], expected[0])
    assert torch.equal(*outputs(model))
    first, second = outputs(model.train())
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(seeded(1, lambda: model(x)), first)


def seeded(seed: int, run: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(seed)
    return run()


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    n, rate = 10_000, 0.3
    layer = DropPath(rate)
    x = torch.rand(n, 3, 2, 2, dtype=torch.float64) + 1
    y = layer(x)
    dropped = y.flatten(1).eq(0).all(1)
    assert (y[~dropped] - x[~dropped] / (1 - rate)).abs().max() <= 1e-9
    # five standard deviations of a binomial
    assert abs(dropped.sum().item() - rate * n) <= 5 * math.sqrt(n * rate * (1 - rate))
    assert torch.equal(layer.eval()(x), x)


def test_a_dropped_block_is_its_shortcut() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(nn.Conv2d(3, 3, 1), drop_path=0.5)
    x = torch.randn(64, 3, 2, 2)
    same = (block(x) == x).flatten(1).all(1)
    assert 0 < same.sum() < 64


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_nothing(training: bool) -> None:
    x = images(2, 64, 64)
    results = []
    for enable in (False, True):
        model = small_model(drop_path_rate=0.3, drop_rate=0.2, num_classes=10).double().train(training)
        model.set_grad_checkpointing(enable)
        runs: list[int] = []
        model.stages[2][1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(5)
        logits = model(x)
        grads = gradients(model, F.cross_entropy(logits, torch.arange(2)))
        assert len(runs) == (2 if enable else 1)
        results.append({"logits": logits.detach(), **grads, **model.state_dict(prefix="state.")})
    # with the same random numbers the recomputation repeats the first pass bit by bit; the state holds
    # BatchNorm's statistics, which must have moved once
    assert equal(*results)


def test_gradient_checkpointing_of_features() -> None:
    x = images(2, 64, 64)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = lowformer.create_model("lowformer_b0", kernels="eager", features_only=True).double()
        model.set_grad_checkpointing(enable)
        results.append(gradients(model, sum((m.square().mean() for m in model(x)), torch.zeros(()))))
    assert equal(*results)


def test_gradient_checkpointing_compiles() -> None:
    x = images(2, 64, 64)
    results = []
    for compiled in (False, True):
        model = small_model(num_classes=10).double()
        model.set_grad_checkpointing(compiled)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        grads = gradients(model, F.cross_entropy(run(x), torch.arange(2)))
        results.append({**grads, **model.state_dict(prefix="state.")})
    for key, expected in results[0].items():
        assert (results[1][key] - expected).abs().max() <= 1e-9, key


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    model = small_model(name, num_classes=10)
    x = images(4, 64, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(4))
    assert logits.dtype == torch.bfloat16
    grads = gradients(model, loss)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model(dtype: torch.dtype) -> None:
    model = small_model(num_classes=10).to(dtype).eval()
    with torch.no_grad():
        logits = model(images(2, 64, 64, dtype=dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_ddp(mode: str, tmp_path: Path) -> None:
    model = small_model(num_classes=10).double().train(mode == "train")
    x, y = images(4, 64, 64), torch.tensor([3, 1, 4, 1])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save((x, y), tmp_path / "batch.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(lowformer.__file__).parents[1])}
    script = Path(__file__).with_name("ddp_worker.py")
    workers = [subprocess.Popen([sys.executable, script, str(rank), tmp_path, mode], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    first, second = (torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second)

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return gradients(model, F.cross_entropy(model(x), y))

    if mode == "train":
        # each process has its own batch statistics: the mean of the two halves' gradients
        halves = [step(*half) for half in zip(x.chunk(2), y.chunk(2), strict=True)]
        expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    else:
        # with fixed statistics samples are independent: the gradient of the whole batch
        expected = step(x, y)
    assert list(first) == list(expected)
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (first[name] - grad).abs().max() <= 1e-9 * scale, name
