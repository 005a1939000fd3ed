"""The model against timm's own LowFormer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lowformer
from lowformer.blocks import DropPath
from tests.lowformer.helpers import VARIANTS, images
from tests.torchvision_stub import install


@pytest.fixture(scope="module")
def timm() -> Any:
    install()
    pytest.importorskip("torchvision")
    module = pytest.importorskip("timm")
    if not module.list_models("lowformer_*"):
        pytest.skip(f"timm {module.__version__} has no LowFormer: it came with 1.0.29")
    return module


def pair(timm: Any, name: str, **arguments: Any) -> tuple[Any, lowformer.LowFormer]:
    torch.manual_seed(0)
    theirs = timm.create_model(name, **arguments)
    torch.manual_seed(0)
    return theirs, lowformer.create_model(name, kernels="eager", **arguments)


def test_same_names(timm: Any) -> None:
    assert set(timm.list_models("lowformer_*")) == set(VARIANTS)
    assert {m for m in timm.list_pretrained() if m.startswith("lowformer_")} == {
        f"{name}.in1k" for name in VARIANTS if lowformer.get_config(name).has_weights
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_same_initialisation_and_same_outputs(timm: Any, name: str) -> None:
    theirs, ours = pair(timm, name)
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(expected) == list(got)
    # timm draws its linear layers' normal distribution in a way of its own
    linear = ("pre_classifier.0.weight", "classifier.weight")
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == list(linear)
    for key in linear:
        n = expected[key].numel()
        # five standard errors of a difference of two means, and of two standard deviations, of n normal draws
        assert abs(expected[key].mean() - got[key].mean()) <= 5 * 0.02 * math.sqrt(2 / n)
        assert abs(expected[key].std() - got[key].std()) <= 5 * 0.02 / math.sqrt(n)
    assert ours.training is theirs.training is True

    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.6, 1.4)
    lowformer.load_checkpoint(ours, theirs.state_dict())
    theirs.double().eval()
    ours.double().eval()
    x = images(2, 65, 97)
    with torch.no_grad():
        close(ours(x), theirs(x))
        features = theirs.forward_features(x)
        close(ours.forward_features(x), features)
        close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
        for ours_map, their_map in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
            close(ours_map, their_map)
    assert ours.num_features == theirs.num_features
    assert ours.head_hidden_size == theirs.head_hidden_size
    assert ours.feature_info == theirs.feature_info
    for coarse in (True, False):
        assert ours.group_matcher(coarse) == theirs.group_matcher(coarse)


def test_same_training_step(timm: Any) -> None:
    theirs, ours = pair(timm, "lowformer_b0", drop_rate=0.2, drop_path_rate=0.3)
    lowformer.load_checkpoint(ours, theirs.state_dict())
    x = images(4, 64, 64)
    outputs = []
    for model in (theirs.double(), ours.double()):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
    close(*outputs)
    for (name, expected), (_, got) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (expected.grad - got.grad).abs().max() <= 1e-9, name


def test_same_drop_path_rates(timm: Any) -> None:
    theirs, ours = pair(timm, "lowformer_e2", drop_path_rate=0.3)
    rates = {name: m.drop_prob for name, m in ours.named_modules() if isinstance(m, DropPath)}
    # timm gives the stride-2 blocks of stages 1 and 2 a rate that they have no use for
    expected = {
        f"{name}.drop_path": m.drop_path.drop_prob
        for name, m in theirs.named_modules()
        if hasattr(m, "drop_path") and hasattr(m.drop_path, "drop_prob") and m.shortcut is not None
    }
    assert rates == expected


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_same_rule_for_other_image_channels(timm: Any, channels: int) -> None:
    from timm.models import adapt_input_conv

    ours = lowformer.create_model("lowformer_b0", kernels="eager")
    state = ours.state_dict()
    other = lowformer.create_model("lowformer_b0", kernels="eager", in_chans=channels)
    lowformer.load_checkpoint(other, state, adapt_stem=True)
    key = "stem.0.conv.weight"
    assert torch.equal(other.state_dict()[key], adapt_input_conv(channels, state[key]))


def test_features_only_gives_timms_maps(timm: Any) -> None:
    theirs, ours = pair(timm, "lowformer_b0", features_only=True, out_indices=(1, 3))
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    x = images(1, 65, 97)
    with torch.no_grad():
        for got, expected in zip(ours.double().eval()(x), theirs.double().eval()(x), strict=True):
            close(got, expected)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-9
