"""Built or made from a module: the same parameters, the same state dict, the same values, the same training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowkernels
from lowkernels import BackendError, InputError
from lowkernels.nn import ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv

from .blocks import ADOPTED, CASES, FEW, STANDALONE, Case, Mobile, assert_follows, assert_same, each, randomize, within_budget


@each(CASES)
@pytest.mark.parametrize("size", [(6, 5), (7, 7), (1, 1), (1, 4)], ids=str)
def test_float64_parity(case: Case, size: tuple[int, int]) -> None:
    block = case.block()
    assert_follows(case, block, case.x(height=size[0], width=size[1]))
    assert block.last_call is not None


@each(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_budget_in_lower_dtypes(case: Case, dtype: torch.dtype) -> None:
    block = case.block(dtype)
    # Enough numbers that their errors are not a matter of luck.
    x = case.x(dtype, batch=8, height=9, width=8)
    with torch.no_grad():
        found = block(x)
    within_budget(case, block, x, found)


@each(ADOPTED)
def test_children_are_the_originals(case: Case) -> None:
    block = case.make()
    original = block.original
    assert original is not None
    assert list(block.state_dict()) == list(original.state_dict())
    assert [n for n, _ in block.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert all(a is b for a, b in zip(block.parameters(), original.parameters(), strict=True))
    assert dict(block.named_children()) == dict(original.named_children())
    assert block.training == original.training


@each(CASES)
def test_state_dict_is_free_of_packs(case: Case) -> None:
    block = case.make()
    keys = list(block.state_dict())
    block.eval()(case.x(torch.float32))
    assert list(block.state_dict()) == keys
    parameters = {name for name, _ in block.named_parameters()}
    assert {key for key in keys if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))} == parameters
    persistent_and_more = {name for name, _ in block.named_buffers()}
    assert persistent_and_more > set(keys) - parameters, "the folded weights are buffers, so that they move with the model"


@each(CASES)
def test_training_is_the_originals_bit_by_bit(case: Case) -> None:
    block = case.make().double()
    twin = copy.deepcopy(block)
    x = case.x()
    results = []
    for module, forward in ((block, block), (twin, lambda x: case.plain(twin, x))):
        torch.manual_seed(3)  # dropout and drop path
        given = x.clone().requires_grad_()
        out = forward(given)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append((out, given.grad, grads, dict(module.named_buffers())))
    (out, of_x, grads, buffers), (plain_out, plain_of_x, plain_grads, plain_buffers) = results
    adopted = block.original is not None
    same: Callable[[Tensor, Tensor], object] = _assert_equal if adopted else assert_same
    same(out, plain_out)
    same(of_x, plain_of_x)
    for name, grad in grads.items():
        same(grad, plain_grads[name])
    for name, buffer in buffers.items():
        _assert_equal(buffer, plain_buffers[name])


def _assert_equal(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


@each({name: case for name, case in CASES.items() if any(isinstance(m, nn.BatchNorm2d) for m in case.make().modules())})
def test_batch_statistics_are_learned_and_used(case: Case) -> None:
    block = case.block().train()
    before = {name: b.clone() for name, b in block.named_buffers() if name.endswith("running_mean")}
    assert before
    evaluated = block.eval()(case.x()).detach()
    block.train()
    with torch.no_grad():
        for seed in range(3):
            block(case.x(seed=seed) * 2 + 1)
    after = dict(block.named_buffers())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    block.eval()
    assert_follows(case, block)
    assert not torch.allclose(block(case.x()), evaluated)


@each(CASES)
def test_repr_names_operator_and_backend(case: Case) -> None:
    text = repr(case.make())
    assert f"operator={case.make().operator_name}, backend='auto'" in text


@each(STANDALONE)
def test_standalone_trains_from_its_default_initialisation(case: Case) -> None:
    block = case.make()
    optimizer = torch.optim.SGD(block.parameters(), 1e-3)
    x = case.x(torch.float32)
    target = torch.zeros_like(block(x))
    first = None
    for _ in range(5):
        loss = (block(x) - target).square().mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first


class Holder(nn.Module):
    """conv and norm, under these names."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.norm is None else self.norm(y)


class Own(Holder):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1))
        self.gamma = nn.Parameter(torch.ones(1))


def _conv_block(conv: nn.Module, norm: nn.Module | None = None) -> ConvNormAct:
    return ConvNormAct.from_module(Holder(conv, norm), conv="conv", norm=None if norm is None else "norm")


def _separable_block(dw: nn.Module, pw: nn.Module) -> SeparableConv:
    return SeparableConv.from_module(nn.Sequential(dw, pw), dw="0", pw="1")


def _mlp_block(norm: nn.Module) -> GroupNormMLP:
    module = nn.Sequential(norm, nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1))
    return GroupNormMLP.from_module(module, norm="0", fc1="1", fc2="2", act="gelu", residual=False)


WRONG_PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "grouped": (lambda: _conv_block(nn.Conv2d(4, 4, 3, padding=1, groups=2)), r"conv \(conv\): has 2 groups; allowed is 1"),
    "dilated": (lambda: _conv_block(nn.Conv2d(4, 4, 3, dilation=2)), r"conv \(conv\): has dilation \(2, 2\); allowed is 1"),
    "reflecting": (
        lambda: _conv_block(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        r"conv \(conv\): is Conv2d.*reflect.*zero padding",
    ),
    "same-padding": (lambda: _conv_block(nn.Conv2d(4, 4, 3, padding="same")), r"conv \(conv\): is Conv2d.*explicit zero padding"),
    "even-kernel": (lambda: _conv_block(nn.Conv2d(4, 4, 4, padding=1)), "argument weight: has kernel size 4; allowed are odd"),
    "large-kernel": (lambda: _conv_block(nn.Conv2d(4, 4, 9, padding=1)), "argument weight: has kernel size 9; allowed are odd"),
    "oblong-kernel": (lambda: _conv_block(nn.Conv2d(4, 4, (3, 5), padding=1)), r"has kernel_size \(3, 5\); allowed are equal"),
    "oblong-stride": (lambda: _conv_block(nn.Conv2d(4, 4, 3, (1, 2), padding=1)), r"has stride \(1, 2\); allowed are equal"),
    "oblong-padding": (lambda: _conv_block(nn.Conv2d(4, 4, 3, padding=(1, 0))), r"has padding \(1, 0\); allowed are equal"),
    "stride-3": (lambda: _conv_block(nn.Conv2d(4, 4, 3, 3, padding=1)), "argument stride: is 3; allowed are 1 and 2"),
    "much-padding": (lambda: _conv_block(nn.Conv2d(4, 4, 3, padding=2)), "argument padding: is 2; allowed are 0 to 1"),
    "linear": (lambda: _conv_block(nn.Linear(4, 4)), r"conv \(conv\): is Linear.*allowed is an nn.Conv2d"),
    "subclass": (lambda: _conv_block(type("Odd", (nn.Conv2d,), {})(4, 4, 3)), r"conv \(conv\): is Odd.*allowed is an nn.Conv2d"),
    "layer-norm": (lambda: _conv_block(nn.Conv2d(4, 4, 1), nn.LayerNorm(4)), r"conv_norm \(norm\): is LayerNorm.*nn.BatchNorm2d"),
    "no-statistics": (
        lambda: _conv_block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        r"conv_norm \(norm\): is BatchNorm2d.*with running statistics",
    ),
    "norm-of-one-channel": (
        lambda: _conv_block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(1)),
        r"conv_norm \(norm\): has 1 features; allowed is 4",
    ),
    "own-parameter": (lambda: ConvNormAct.from_module(Own(), conv="conv"), "Own has parameters or buffers of its own"),
    "residual-that-cannot-be": (lambda: ConvNormAct(4, 8, residual=True), "argument residual: has shape"),
    "unknown-activation": (lambda: ConvNormAct(4, 8, act="tanh"), "argument act: is 'tanh'; allowed are none, relu"),
    "depthwise-missing-groups": (
        lambda: _separable_block(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)),
        r"dw \(0\): has 1 groups; allowed is 4",
    ),
    "depthwise-multiplier": (
        lambda: _separable_block(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1)),
        r"dw \(0\): has 8 output channels; allowed is 4",
    ),
    "pointwise-stride": (
        lambda: _separable_block(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 1, stride=2)),
        r"pw \(1\): is a 1x1 convolution with stride \(2, 2\)",
    ),
    "pointwise-3x3": (
        lambda: _separable_block(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 3, padding=1)),
        r"argument pw_weight: has shape \(8, 4, 3, 3\); allowed is \(8, 4, 1, 1\)",
    ),
    "group-norm-of-two": (lambda: _mlp_block(nn.GroupNorm(2, 4)), r"norm \(0\): is GroupNorm\(2, 4.*with one group"),
    "group-norm-without-weights": (lambda: _mlp_block(nn.GroupNorm(1, 4, affine=False)), r"norm \(0\): is GroupNorm.*affine"),
    "no-group-norm": (lambda: _mlp_block(nn.Identity()), r"norm \(0\) is no GroupNorm"),
    "heads": (lambda: Lowtention(8, num_heads=0), "num_heads is 0; allowed is 1 or more"),
}


@pytest.mark.parametrize("what", WRONG_PARTS)
def test_wrong_parts(what: str) -> None:
    make, message = WRONG_PARTS[what]
    with pytest.raises(InputError, match=message) as error:
        make()
    assert str(error.value).startswith("lowkernels.")


def _attention_parts(**changes: nn.Module) -> nn.ModuleDict:
    parts = {
        "dw": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "qkv": nn.Conv2d(8, 12, 1, bias=False),
        "up": nn.ConvTranspose2d(4, 8, 3, 1, padding=1),
    }
    return nn.ModuleDict(parts | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": nn.Conv2d(8, 12, 1)}, r"qkv \(qkv\): has a bias; allowed is none"),
        ({"up": nn.ConvTranspose2d(4, 8, 4, 2, padding=1)}, r"up \(up\): has stride \(2, 2\)"),
        ({"up": nn.ConvTranspose2d(4, 8, 3, 1, padding=1, groups=4)}, r"up \(up\): has 4 groups"),
        ({"up": nn.ConvTranspose2d(4, 8, 3, 1, padding=0)}, r"up \(up\): is ConvTranspose2d.*padding 1"),
        ({"up": nn.Conv2d(4, 8, 3, padding=1)}, r"up \(up\): is Conv2d.*allowed is an nn.ConvTranspose2d"),
        ({"up": nn.ConvTranspose2d(4, 8, 5, 1, padding=1)}, r"argument up_weight: has shape \(4, 8, 5, 5\)"),
        ({"dw": nn.Conv2d(8, 8, 5, padding=1, groups=8)}, r"dw \(dw\): has padding \(1, 1\); allowed is kernel_size // 2"),
        ({"qkv": nn.Conv2d(8, 13, 1, bias=False)}, "argument qkv_weight: has 13 output channels"),
    ],
    ids=["qkv-bias", "up-stride", "up-groups", "up-padding", "up-conv", "up-kernel", "dw-padding", "qkv-channels"],
)
def test_wrong_parts_of_attention(changes: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lowtention.from_module(_attention_parts(**changes), dw="dw", qkv="qkv", up="up", num_heads=1, residual=True)
    Lowtention.from_module(_attention_parts(), dw="dw", qkv="qkv", up="up", num_heads=1, residual=True)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
@pytest.mark.parametrize("child", ["", "layers.mix", "layers.mix.1"])
def test_hooked_modules_are_not_adopted(register: str, child: str) -> None:
    original = Mobile(4)
    getattr(original.get_submodule(child), register)(lambda *_: None)
    with pytest.raises(InputError, match=rf"Mobile has hooks that would not run, on {child or 'the module itself'}"):
        MBConv.from_module(
            original, expand="layers.grow.0", dw="layers.mix.0", project="layers.shrink.0", act="relu6", residual=True
        )


@pytest.mark.parametrize("kind", [ConvNormAct, SeparableConv, MBConv, FusedMBConv])
def test_unknown_backend(kind: type[FusedBlock]) -> None:
    with pytest.raises(BackendError, match=rf"lowkernels.nn.{kind.__name__}: unknown backend 'fast': allowed are auto"):
        kind(4, 8, backend="fast")  # type: ignore[call-arg]


@each(FEW)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], "argument x: has 3 dimensions"),
        (lambda x: x[:, :-1], r"argument \w+: has shape"),
        (lambda x: x.long(), "argument x: has dtype torch.int64"),
        (lambda x: x.float(), "has dtype torch.float64; x has torch.float32"),
        (lambda x: x[:, :, :0], "height and width must be at least 1"),
        (lambda x: x.to("meta"), "is on cpu; x is on meta"),
    ],
    ids=["rank", "channels", "integer", "other-dtype", "empty", "meta"],
)
def test_bad_input(case: Case, change: Callable[[Tensor], Tensor], message: str) -> None:
    block = case.block()
    with pytest.raises(InputError, match=message), torch.no_grad():
        block(change(case.x()))
    assert_follows(case, block)


def test_repack_and_freeze_return_the_model() -> None:
    model = nn.Sequential(CASES["conv"].make(), nn.ReLU())
    randomize(model)
    assert lowkernels.repack(model) is model
    assert lowkernels.freeze(model.eval()) is model
