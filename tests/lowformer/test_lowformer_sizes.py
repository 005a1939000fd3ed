"""Sizes: parameters, multiply-accumulates, every layer at 224x224, and inputs of any size."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import lowformer
from lowformer.blocks import Lowtention
from tests.lowformer.helpers import KERNELS, OFFICIAL, VARIANTS, authors_shapes, images, reference_model

LAYERS: dict[str, list[list[str]]] = json.loads((OFFICIAL / "layers_224.json").read_text())

# in, out, kernel, stride, groups, rows in, rows out, bias; of the attention core heads, positions, head width
Layer = tuple[int | bool, ...]


def test_list_models() -> None:
    assert lowformer.list_models() == [f"lowformer_{v}" for v in ("b0", "b1", "b15", "b2", "b3", "e1", "e2", "e3")]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_parameters(name: str, kernels: str) -> None:
    model = lowformer.create_model(name, kernels=kernels)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == lowformer.get_config(name).params_m
    assert sum(v.numel() for v in model.state_dict().values()) == sum(
        torch.Size(shape).numel() for shape in authors_shapes(name).values()
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_and_macs_at_224(name: str) -> None:
    layers, macs = count_layers(name)
    expected: Counter[Layer] = Counter()
    for _, channels, conv, rows, count, bias, total in LAYERS[name]:
        layer = parse_layer(channels, conv, rows, bias)
        expected[layer] += int(count)
        # the table rounds to 0.1 MMAC
        assert abs(layer_macs(layer) * int(count) / 1e6 - float(total)) <= 0.05 + 1e-9
    assert layers == expected
    assert round(macs / 1e6) == lowformer.get_config(name).mmacs_224


def parse_layer(channels: str, conv: str, rows: str, bias: str) -> Layer:
    if not conv:
        return tuple(int(part.partition("=")[2]) for part in channels.split())
    c_in, c_out = map(int, channels.split("→"))
    if conv == "linear":
        return (c_in, c_out, 1, 1, 1, 1, 1, bias == "y")
    options = {part[0]: int(part[1:]) for part in conv.split()}
    rows_in, _, rows_out = rows.partition("→")
    size = int(rows_in), int(rows_out or rows_in)
    return (c_in, c_out, options["k"], options["s"], options.get("g", 1), *size, bias == "y")


def layer_macs(layer: Layer) -> int:
    if len(layer) == 3:
        heads, positions, width = layer
        return 2 * heads * positions**2 * width
    c_in, c_out, kernel, _, groups, rows_in, rows_out, _ = layer
    # a transposed convolution multiplies each input position, a convolution makes each output one
    rows = min(rows_in, rows_out)
    return c_in // groups * c_out * kernel**2 * rows**2


def count_layers(name: str) -> tuple[Counter[Layer], int]:
    """Every layer that a forward pass at 224x224 runs, and their multiply-accumulates."""
    with torch.device("meta"):
        model = lowformer.create_model(name, kernels="eager").eval()
        image = torch.empty(1, 3, 224, 224)
    layers: Counter[Layer] = Counter()

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        layer: Layer
        match module:
            case nn.Conv2d() | nn.ConvTranspose2d():
                layer = (
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.stride[0],
                    module.groups,
                    args[0].shape[2],
                    output.shape[2],
                    module.bias is not None,
                )
            case nn.Linear():
                layer = (module.in_features, module.out_features, 1, 1, 1, 1, 1, module.bias is not None)
            case Lowtention():
                positions = module.pwise_positions  # type: ignore[attr-defined]
                layer = (module.num_heads, positions, module.head_dim)
            case _:
                return
        layers[layer] += 1

    for module in model.modules():
        module.register_forward_hook(keep)
        if isinstance(module, Lowtention):
            module.pwise.register_forward_hook(
                lambda _, args, output, owner=module: setattr(owner, "pwise_positions", output[0, 0].numel())
            )
    model(image)
    return layers, sum(layer_macs(layer) * count for layer, count in layers.items())


@cache
def shared_model(name: str, kernels: str) -> lowformer.LowFormer:
    return reference_model(name, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["lowformer_b0", "lowformer_e1", "lowformer_e3"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (33, 2), (31, 65), (96, 37)])
def test_any_size(name: str, kernels: str, height: int, width: int) -> None:
    model = shared_model(name, kernels)
    x = images(2, height, width)
    with torch.no_grad():
        logits = model(x)
        alone = torch.cat([model(x[:1]), model(x[1:])])
        features = model.forward_features(x)
    assert logits.shape == (2, 1000)
    assert features.shape == (2, model.num_features, -(-height // 32), -(-width // 32))
    assert (logits - alone).abs().max() <= 1e-9


@pytest.mark.parametrize("kernels", KERNELS)
def test_empty_batch(kernels: str) -> None:
    model = reference_model("lowformer_b0", kernels)
    with torch.no_grad():
        assert model(torch.empty(0, 3, 64, 64, dtype=torch.float64)).shape == (0, 1000)


@pytest.mark.parametrize("kernels", KERNELS)
def test_memory_format_does_not_matter(kernels: str) -> None:
    model = reference_model("lowformer_b0", kernels)
    x = images(2, 65, 97)
    with torch.no_grad():
        plain = model(x)
        assert (model(x.to(memory_format=torch.channels_last)) - plain).abs().max() <= 1e-9
        assert (model.to(memory_format=torch.channels_last)(x) - plain).abs().max() <= 1e-9
