"""The floors: against numbers worked out by hand, against counts of the authors' code, and against a published-rates table."""

from __future__ import annotations

import pytest
import torch

import lowformer
from lowkernels import InputError, costs
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

# Per image at 224x224, batch 256, bfloat16, at 790 TFLOP/s and 4.3 TB/s, from a count made independently of this code: microseconds
# of the block-fused floor, megabytes of the sequence of kernels, megabytes block-fused.
FLOORS = {
    "lowformer_b0": (2.60, 12.7, 3.5),
    "lowformer_b1": (3.74, 17.6, 4.3),
    "lowformer_b15": (6.69, 25.4, 5.9),
    "lowformer_b3": (15.67, 62.5, 12.5),
    # 3.167 MB by hand, see test_bytes_of_e1_by_hand.
    "lowformer_e1": (3.58, 10.8, 3.2),
    "lowformer_e2": (9.82, 37.5, 8.0),
    "lowformer_e3": (12.55, 48.8, 10.6),
}
RATES = (790e12, 4.3e12)


def blocks(name: str, batch: int) -> tuple[costs.Cost, ...]:
    model = lowformer.create_model(name).eval().bfloat16()
    return costs.of_model(model, (batch, 3, 224, 224), torch.bfloat16)


@pytest.mark.parametrize("name", FLOORS)
def test_floors_of_the_family(name: str) -> None:
    found = blocks(name, 256)
    micros, steps_mb, fused_mb = FLOORS[name]
    # Within the digits of the table: half of the last one.
    assert costs.floor_seconds(found, *RATES) / 256 * 1e6 == pytest.approx(micros, abs=0.0051)
    assert sum(c.step_bytes for c in found) / 256e6 == pytest.approx(steps_mb, abs=0.051)
    assert sum(c.fused.bytes for c in found) / 256e6 == pytest.approx(fused_mb, abs=0.051)


@pytest.mark.parametrize("name", lowformer.list_models())
def test_arithmetic_is_that_of_the_authors_code(name: str) -> None:
    macs = sum(c.fused.flops for c in blocks(name, 1)) / 2e6
    assert round(macs) == lowformer.get_config(name).mmacs_224


def test_bytes_of_e1_by_hand() -> None:
    maps = [3 * 224**2, 20 * 112**2, 40 * 56**2, 80 * 28**2, 160 * 14**2, 320 * 7**2]
    # Every map is written and read once; four residual blocks each in stages 3 and 4 read and write theirs; the head pools.
    between = 2 * sum(maps) - maps[0] + 8 * maps[4] + 8 * maps[5]
    head = 2304 + 2304 + 2560 + 2560 + 1000
    model = lowformer.create_model("lowformer_e1").eval()
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    # Each convolution has a bias once its BatchNorm is folded; of the head's linear layers the last one has.
    weights = sum(m.weight.numel() for m in convs)
    biases = sum(m.weight.shape[0] for m in convs if isinstance(m, torch.nn.Conv2d)) + 1000
    total = sum(c.fused.bytes for c in blocks("lowformer_e1", 1))
    assert total == 2 * (between + head + weights + biases)


def test_fused_mbconv_by_hand() -> None:
    call = random_call("fused_mbconv", batch=2, channels=8, out_channels=12, hidden=32, height=10, width=6, stride=2)
    cost = costs.of_call(*call)
    pixels = 2 * 5 * 3
    conv, project = 2 * pixels * 32 * 8 * 9, 2 * pixels * 32 * 12
    x, middle, out = 4 * 2 * 8 * 60, 4 * pixels * 32, 4 * pixels * 12
    w1, w2 = 4 * (32 * 8 * 9 + 32), 4 * (12 * 32 + 12)
    assert [(s.name, s.flops, s.bytes) for s in cost.steps] == [
        ("conv", conv, x + w1 + middle),
        ("project", project, middle + w2 + out),
    ]
    assert (cost.fused.flops, cost.fused.bytes) == (conv + project, x + out + w1 + w2)


def test_mbconv_by_hand() -> None:
    call = random_call("mbconv", batch=1, channels=4, out_channels=4, hidden=16, height=6, width=6, dtype=torch.bfloat16)
    cost = costs.of_call(*call)
    expand, dw, project = 2 * 36 * 64, 2 * 36 * 16 * 9, 2 * 36 * 64
    assert [s.flops for s in cost.steps] == [expand, dw, project]
    x = 2 * 4 * 36
    middle = 2 * 16 * 36
    weights = [2 * (64 + 16), 2 * (144 + 16), 2 * (64 + 4)]
    # The residual is read by the last kernel; fused, it is at hand already.
    assert [s.bytes for s in cost.steps] == [x + weights[0] + middle, 2 * middle + weights[1], middle + weights[2] + 2 * x]
    assert cost.fused.bytes == 2 * x + sum(weights)


def test_lowtention_by_hand() -> None:
    call = random_call("lowtention", batch=3, channels=8, height=5, width=4, kernel_size=5, num_heads=2, stride=2)
    cost = costs.of_call(*call)
    tokens, inner = 3 * 2, 4
    macs = {"norm": 0, "dw": 8 * 25 * tokens, "qkv": 8 * 12 * tokens, "attention": 2 * tokens**2 * inner}
    macs["up"] = inner * 8 * 16 * tokens
    assert {s.name: s.flops for s in cost.steps} == {k: 2 * 3 * v for k, v in macs.items()}
    x = 3 * 8 * 20
    by_name = {s.name: s.bytes for s in cost.steps}
    assert by_name["norm"] == 4 * (2 * x + 16)
    assert by_name["attention"] == 4 * 3 * tokens * (12 + 4)
    assert by_name["up"] == 4 * (3 * tokens * inner + inner * 8 * 16 + 8 + 2 * x)
    assert cost.fused.bytes == 4 * (2 * x + 16 + 8 * 25 + 8 + 8 * 12 + inner * 8 * 16 + 8)


def test_pooled_conv_and_mlp_and_separable_by_hand() -> None:
    conv = costs.of_call(*random_call("conv_act", batch=2, channels=4, out_channels=6, kernel_size=1, pool=True))
    assert [s.bytes for s in conv.steps] == [4 * (2 * 49 * 10 + 30), 4 * (2 * 49 * 6 + 12)]
    assert conv.fused.bytes == 4 * (2 * 49 * 4 + 30 + 12)
    mlp = costs.of_call(*random_call("gn_mlp", batch=1, channels=4, hidden=8, height=3, width=3))
    assert (mlp.fused.flops, mlp.fused.bytes) == (2 * 2 * 9 * 32, 4 * (2 * 36 + 8 + 32 + 8 + 32 + 4))
    separable = costs.of_call(*random_call("separable_conv", batch=1, channels=4, out_channels=8, height=4, width=4, stride=2))
    assert [s.flops for s in separable.steps] == [2 * 4 * 36, 2 * 4 * 32]
    assert separable.step_bytes == 4 * (64 + 40 + 16) + 4 * (16 + 40 + 32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fused_shares_arithmetic_and_saves_traffic(operator: str) -> None:
    cost = costs.of_call(*random_call(operator, channels=8, out_channels=8))
    assert cost.fused.flops == sum(s.flops for s in cost.steps)
    assert cost.fused.bytes <= cost.step_bytes
    assert cost.fused.seconds(1e12, 1e6) == pytest.approx(cost.fused.bytes / 1e6)
    assert cost.fused.seconds(1e6, 1e12) == pytest.approx(cost.fused.flops / 1e6)


def test_meta_tensors_and_left_out_defaults_do() -> None:
    call = random_call("conv_act", channels=8)
    meta = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in call.args)
    assert costs.of_call("conv_act", meta) == costs.of_call(*call)
    full = costs.of_call("conv_act", (meta[0], meta[1]))
    assert full == costs.of_call("conv_act", (meta[0], meta[1], None, "none", 1, 0, None, False))


def test_arguments_outside_the_contract_are_refused() -> None:
    with pytest.raises(InputError, match="weight"):
        costs.of_call("conv_act", (torch.empty(1, 3, 8, 8), torch.empty(4, 5, 3, 3)))
    with pytest.raises(KeyError):
        costs.of_call("no_such_operator", ())


def test_recording_reads_no_data_and_sees_every_block() -> None:
    model = lowformer.create_model("lowformer_b0").eval()
    found = costs.record(model, (1, 3, 64, 64))
    counts = {name: sum(b.operator == name for b in found) for name in {b.operator for b in found}}
    assert counts == {"conv_act": 2, "fused_mbconv": 4 + 3, "lowtention": 7, "gn_mlp": 7, "mbconv": 4, "linear": 2}
    assert all(isinstance(b.args[0], torch.Tensor) and type(b.args[0]) is not torch.Tensor for b in found)
