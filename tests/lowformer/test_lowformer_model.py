"""The model's interface: arguments, heads, stage maps, compile, export, initialisation."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lowformer
from lowformer.blocks import DropPath
from tests.lowformer.helpers import images, reference_model, small_model

CHANNELS = (32, 64, 128, 256)
STRIDES = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def model() -> lowformer.LowFormer:
    return reference_model("lowformer_b0", "eager")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(2, 65, 97)


def test_import_is_light() -> None:
    heavy = ["timm", "torchvision", "PIL", "rich", "huggingface_hub", "safetensors", "triton"]
    code = f"import torch, sys; old = set(sys.modules); import lowformer; print(set({heavy}) & (set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_all_is_what_there_is() -> None:
    assert all(hasattr(lowformer, name) for name in lowformer.__all__)


def test_name_with_timms_tag() -> None:
    assert lowformer.create_model("lowformer_b0.in1k", kernels="eager").config.name == "lowformer_b0"
    assert lowformer.get_config("lowformer_b2.untrained").name == "lowformer_b2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lowformer_b9", "unknown model 'lowformer_b9': the models are lowformer_b0, .*, lowformer_e3"),
        ("", "unknown model ''"),
        (
            "lowformer_b1.in22k",
            "unknown tag in 'lowformer_b1.in22k': lowformer_b1 has only lowformer_b1.in1k",
        ),
        ("lowformer_b2.in1k", "lowformer_b2 has only lowformer_b2.untrained"),
    ],
)
def test_unknown_name(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowformer.create_model(name, kernels="eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"drop_rate": 1.0}, r"drop_rate is 1\.0"),
        ({"drop_rate": -0.1}, r"drop_rate is -0\.1"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate is 1\.5"),
        ({"features_only": True, "out_indices": (0, 4)}, r"stage indices are \(0, 4\)"),
        ({"features_only": True, "out_indices": (1, -3)}, r"stage indices are \(1, -3\)"),
        ({"features_only": True, "out_indices": ()}, r"stage indices are \(\)"),
        ({"features_only": True, "out_indices": 5}, "the last 5 stages"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        lowformer.create_model("lowformer_b0", kernels="eager", **arguments)


def test_in_chans_and_num_classes() -> None:
    small = lowformer.create_model("lowformer_b0", kernels="eager", in_chans=5, num_classes=7).eval()
    assert small(torch.zeros(2, 5, 32, 32)).shape == (2, 7)
    headless = lowformer.create_model("lowformer_b0", kernels="eager", num_classes=0).eval()
    assert isinstance(headless.get_classifier(), nn.Identity)
    assert headless(torch.zeros(2, 3, 32, 32)).shape == (2, headless.head_hidden_size)
    assert headless.head_hidden_size == 1600
    assert headless.num_features == 256


def test_forward_is_features_then_head(model: lowformer.LowFormer, x: Tensor) -> None:
    with torch.no_grad():
        features = model.forward_features(x)
        hidden = model.forward_head(features, pre_logits=True)
        logits = model(x)
        assert features.shape == (2, 256, 3, 4)
        assert hidden.shape == (2, 1600)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(hidden), logits)


def test_head_takes_an_in_conv_that_pools(model: lowformer.LowFormer, x: Tensor) -> None:
    class Pooled(nn.Module):
        pooled = True

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x).mean((2, 3))
            return y

    other = copy.deepcopy(model)
    other.in_conv = Pooled(other.in_conv)
    with torch.no_grad():
        assert (other(x) - model(x)).abs().max() <= 1e-9
        assert other.forward_features(x).shape == (2, 256, 3, 4)


def test_forward_intermediates(model: lowformer.LowFormer, x: Tensor) -> None:
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, model.forward_features(x))
        assert [tuple(m.shape) for m in maps] == [(2, c, -(-65 // s), -(-97 // s)) for c, s in zip(CHANNELS, STRIDES, strict=True)]
        assert torch.equal(maps[-1], last)

        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert all(map(torch.equal, last_two, maps[2:]))
        chosen = model.forward_intermediates(x, indices=(-3, 0), intermediates_only=True)
        assert all(map(torch.equal, chosen, (maps[1], maps[0])))
        early, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, maps[1])
        with pytest.raises(ValueError, match="output_fmt is 'NLC'"):
            model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2, 0), (-1,), 2])
def test_features_only(model: lowformer.LowFormer, x: Tensor, out_indices: int | tuple[int, ...]) -> None:
    backbone = lowformer.create_model("lowformer_b0", kernels="eager", features_only=True, out_indices=out_indices)
    backbone.double().eval()
    lowformer.load_checkpoint(backbone, model.state_dict())
    stages = [2, 3] if out_indices == 2 else [i % 4 for i in out_indices]  # type: ignore[union-attr]
    info = backbone.feature_info
    assert info.channels() == [CHANNELS[i] for i in stages]
    assert info.reduction() == [STRIDES[i] for i in stages]
    assert info.module_name() == [f"stages.{i}" for i in stages]
    assert info.get_dicts() == [info[i] for i in stages]
    assert len(info) == 4
    assert len(backbone.stages) == max(stages) + 1
    kept = ("stem.", *(f"stages.{i}." for i in range(max(stages) + 1)))
    assert list(backbone.state_dict()) == [key for key in model.state_dict() if key.startswith(kept)]
    with torch.no_grad():
        maps = backbone(x)
        assert isinstance(maps, list)
        assert all(map(torch.equal, maps, model.forward_intermediates(x, stages, intermediates_only=True)))
    for feature, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (2, channels, math.ceil(65 / stride), math.ceil(97 / stride))


def test_feature_info_of_the_model(model: lowformer.LowFormer) -> None:
    assert [stage["num_chs"] for stage in model.feature_info] == list(CHANNELS)
    assert [stage["reduction"] for stage in model.feature_info] == list(STRIDES)
    modules = dict(model.named_modules())
    assert all(stage["module"] in modules for stage in model.feature_info)


@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier(training: bool) -> None:
    model = small_model().to(torch.bfloat16).train(training)
    others = {k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    model.reset_classifier(10)
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Linear)
    assert model.num_classes == classifier.out_features == 10
    assert classifier.weight.dtype == torch.bfloat16
    assert classifier.training is training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())
    assert model.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 10)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 1600)
    with pytest.raises(ValueError, match="num_classes is -3"):
        model.reset_classifier(-3)


def test_copy_and_pickle(model: lowformer.LowFormer, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_compiles_to_one_graph_for_all_batches(model: lowformer.LowFormer) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = images(batch, 65, 97)
            torch._dynamo.mark_dynamic(x, 0)
            assert (compiled(x) - model(x)).abs().max() <= 1e-9
    assert counter.frame_count == 1


@pytest.mark.parametrize("features_only", [False, True])
def test_exports_with_a_dynamic_batch(features_only: bool) -> None:
    model = lowformer.create_model("lowformer_b0", kernels="eager", features_only=features_only).double().eval()
    exported = torch.export.export(model, (images(2, 65, 97),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        x = images(3, 65, 97)
        outputs, expected = exported.module()(x), model(x)
    if not features_only:
        outputs, expected = [outputs], [expected]
    for got, want in zip(outputs, expected, strict=True):
        assert (got - want).abs().max() <= 1e-9


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = lowformer.create_model("lowformer_b1", kernels="eager")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            n = module.weight.numel()
            # five standard errors of the mean and of the standard deviation of n normal draws
            assert abs(module.weight.mean()) <= 5 * 0.02 / math.sqrt(n)
            assert abs(module.weight.std() - 0.02) <= 5 * 0.02 / math.sqrt(2 * n)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound
            # of n uniform draws the largest lies below 0.5 of the bound with probability 2^-n
            assert module.weight.abs().max() > 0.5 * bound
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            assert module.eps == 1e-5
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert not isinstance(module, nn.BatchNorm2d) or module.momentum == 0.1


def test_drop_path_rises_linearly() -> None:
    model = small_model("lowformer_b3", drop_path_rate=0.34)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    ramp = [0.34 * i / 17 for i in range(18)]  # 1 + 2 + 3 + 6 + 6 blocks
    # block 0 has rate 0, blocks 1 and 3 have stride 2 and nothing to drop, from 6 on three parts share a rate
    expected = [ramp[2], ramp[4], ramp[5], *(rate for rate in ramp[6:] for _ in range(3))]
    assert rates == pytest.approx(expected)


def test_parameter_groups(model: lowformer.LowFormer) -> None:
    assert model.no_weight_decay() == set()
    assert model.group_matcher(coarse=True) != model.group_matcher()
