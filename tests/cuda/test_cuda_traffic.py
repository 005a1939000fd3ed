"""The bytes that kernels move: the shim counts what the formulas of traffic.py say, and those say what the kernels' headers say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lowkernels.backends.cuda import chains, hopper, hopper_conv, hopper_mbconv, library, tiling
from lowkernels.choosing import settings
from lowkernels.ops.conv_act import cuda as conv_act
from lowkernels.ops.lowtention import cuda as lowtention
from lowkernels.testing import random_call
from tests.cuda import execution, traffic
from tests.cuda.execution import Traffic
from tests.cuda.traffic import Moved

H200 = traffic.H200


@pytest.fixture
def hopper_kernels(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels of Hopper; calls on CPU tensors are planned as on an H200."""
    monkeypatch.setattr(hopper, "unusable", lambda device: None)
    monkeypatch.setattr(tiling, "SMALLEST", H200)
    return execution.kernels(names=("conv_act_sm90", "fused_mbconv_sm90", "gn_mlp_sm90", "mbconv_sm90"))


@contextmanager
def named() -> Iterator[dict[int, str]]:
    """Within it, the names of the tensors that the backend's operators are called with, by address."""
    names: dict[int, str] = {}

    class Recorded:
        def __init__(self, overload: Any) -> None:
            self._overload = overload

        def default(self, *args: Any) -> None:
            for argument, value in zip(self._overload._schema.arguments, args, strict=True):
                if isinstance(value, torch.Tensor):
                    names[value.data_ptr()] = argument.name
                elif isinstance(value, list):
                    tensors = (item for item in value if isinstance(item, torch.Tensor))
                    names.update({tensor.data_ptr(): f"{argument.name}[{i}]" for i, tensor in enumerate(tensors)})
            self._overload(*args)

    namespace = torch.ops.lowkernels_cuda
    with pytest.MonkeyPatch.context() as patch:
        for name in library.SCHEMAS:
            patch.setattr(namespace, name, Recorded(getattr(namespace, name).default))
        yield names


def counted(kernels: Path, operator: str, **shape: Any) -> list[dict[str, Traffic]]:
    """What each launch of a call moves."""
    call = random_call(operator, dtype=torch.float16, **shape)
    with named() as names, execution.watched(kernels, count=True) as outcome:
        execution.run(operator, call.args)
    assert not outcome.reports, "\n".join(outcome.reports)
    return [{names[address]: moved for address, moved in launch.items()} for launch in outcome.traffic]


def agree(found: list[dict[str, Traffic]], *expected: Moved) -> None:
    assert len(found) == len(expected)
    for launch, moved in zip(found, expected, strict=True):
        assert {name: launch[name] for name in moved.tensors} == moved.tensors
        # What the formulas leave out is small, and not written.
        rest = [t for name, t in launch.items() if name not in moved.tensors]
        assert all(t.written == 0 for t in rest)
        assert sum(t.once for t in rest) < 0.1 * moved.read[0] + 4096


SEPARABLE: list[tuple[tiling.Tile, dict[str, Any]]] = [
    (tiling.Tile(1, 7, 7, 1), {"channels": 64, "out_channels": 128, "height": 14, "width": 14, "batch": 2}),
    (
        tiling.Tile(2, 5, 5, 1),
        {"channels": 128, "out_channels": 256, "height": 9, "width": 9, "stride": 2, "batch": 3, "kernel_size": 5},
    ),
    (tiling.Tile(1, 4, 9, 0), {"channels": 64, "height": 10, "width": 20, "batch": 1, "out_channels": 32}),
    (tiling.Tile(1, 7, 7, 1), {"channels": 64, "height": 14, "width": 14, "batch": 1}),
]


def sized(operator: str, shape: dict[str, Any]) -> dict[str, Any]:
    """All sizes of a call."""
    kernel = 1 if operator == "gn_mlp" else shape.get("kernel_size", 3)
    plain = {"out_channels": shape["channels"], "stride": 1, "kernel_size": kernel, "hidden": 0}
    return {**plain, "padding": kernel // 2, **shape}


def planned(operator: str, shape: dict[str, Any]) -> tuple[int, ...]:
    """The sizes as tiling.Shape and chains.Shape have them."""
    s = sized(operator, shape)
    names = ("batch", "channels", "height", "width", "out_channels", "kernel_size", "stride", "padding", "hidden")
    return tuple(s[name] for name in names)


def chained(operator: str, shape: dict[str, Any]) -> chains.Shape:
    norm = operator == "gn_mlp"
    sizes = chains.Shape(*planned(operator, shape), norm)
    return sizes._replace(height=sizes.height * sizes.width, width=1) if norm else sizes


def has_residual(shape: tiling.Shape | chains.Shape) -> bool:
    return shape.stride == 1 and shape.channels == shape.out_channels


@pytest.mark.parametrize(("tile", "shape"), SEPARABLE)
@pytest.mark.parametrize("operator", ["separable_conv", "mbconv"])
def test_depthwise(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str, tile: tiling.Tile, shape: dict[str, Any]) -> None:
    monkeypatch.setattr(tiling, "choose", lambda *args: tile)
    if operator == "mbconv":
        shape = {**shape, "hidden": 128}
    sizes = tiling.Shape(*planned(operator, shape), False)
    expected = getattr(traffic, operator)(sizes, tile, has_residual(sizes))
    agree(counted(kernels, operator, **shape), expected)


CHAINS: list[tuple[str, tiling.Tile, dict[str, Any]]] = [
    (
        "fused_mbconv",
        tiling.Tile(1, 4, 7, 1),
        {"channels": 64, "hidden": 64, "out_channels": 128, "height": 14, "width": 14, "batch": 1},
    ),
    ("fused_mbconv", tiling.Tile(0, 1, 100, 2), {"channels": 128, "hidden": 64, "height": 9, "width": 7, "batch": 3}),
    ("fused_mbconv", tiling.Tile(0, 1, 90, 3), {"channels": 64, "hidden": 128, "height": 13, "width": 12, "batch": 2, "stride": 2}),
    ("gn_mlp", tiling.Tile(0, 1, 98, 1), {"channels": 64, "hidden": 128, "height": 7, "width": 7, "batch": 3}),
    ("gn_mlp", tiling.Tile(0, 1, 64, 4), {"channels": 128, "hidden": 64, "out_channels": 192, "height": 7, "width": 9, "batch": 2}),
    ("gn_mlp", tiling.Tile(0, 1, 256, 1), {"channels": 64, "hidden": 64, "height": 33, "width": 32, "batch": 1}),
]


@pytest.mark.parametrize(("operator", "tile", "shape"), CHAINS)
def test_two_products(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str, tile: tiling.Tile, shape: dict[str, Any]
) -> None:
    monkeypatch.setattr(chains, "choose", lambda *args: tile)
    sizes = chained(operator, shape)
    pieces = chains.pieces(sizes, tile) if sizes.norm else 0
    before = [traffic.partial_moments(sizes, pieces)] if pieces else []
    agree(counted(kernels, operator, **shape), *before, traffic.chain(sizes, tile, has_residual(sizes)))


WIDE: list[tuple[str, int, dict[str, Any]]] = [
    ("fused_mbconv", 1, {"channels": 64, "hidden": 128, "out_channels": 128, "height": 14, "width": 14, "batch": 2}),
    ("fused_mbconv", 3, {"channels": 64, "hidden": 128, "out_channels": 192, "height": 9, "width": 7, "stride": 2, "batch": 5}),
    ("gn_mlp", 1, {"channels": 128, "hidden": 256, "height": 14, "width": 7, "batch": 3}),
    ("gn_mlp", 0, {"channels": 64, "hidden": 128, "height": 33, "width": 32, "batch": 1}),
]


@pytest.mark.parametrize(("operator", "config", "shape"), WIDE)
def test_two_products_on_hopper(hopper_kernels: Path, operator: str, config: int, shape: dict[str, Any]) -> None:
    sizes = chained(operator, shape)
    tile = hopper.divisions(sizes, H200, config)[0]
    pieces = chains.pieces(sizes, tile) if sizes.norm else 0
    before = [traffic.partial_moments(sizes, pieces)] if pieces else []
    with hopper.forced(config):
        found = counted(hopper_kernels, operator, **shape)
    agree(found, *before, traffic.wide_chain(sizes, tile, has_residual(sizes)))


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (0, {"channels": 256, "hidden": 128, "height": 7, "width": 7, "batch": 3}),
        (1, {"channels": 192, "hidden": 64, "out_channels": 384, "height": 14, "width": 14, "batch": 1}),
    ],
)
def test_mbconv_on_hopper(hopper_kernels: Path, config: int, shape: dict[str, Any]) -> None:
    sizes = tiling.Shape(*planned("mbconv", shape), False)
    tile = hopper_mbconv.divisions(sizes, H200, config)[0]
    with hopper.forced(config):
        found = counted(hopper_kernels, "mbconv", **shape)
    agree(found, traffic.wide_mbconv(sizes, tile, has_residual(sizes)))


ATTENTION: list[dict[str, Any]] = [
    {"channels": 128, "num_heads": 2, "head_dim": 32, "height": 14, "width": 14, "kernel_size": 5, "stride": 2, "batch": 2},
    {"channels": 256, "num_heads": 2, "head_dim": 32, "height": 7, "width": 7, "batch": 1},
    {"channels": 128, "num_heads": 1, "head_dim": 48, "height": 9, "width": 10, "norm": False, "batch": 1},
    {"channels": 128, "num_heads": 2, "head_dim": 16, "height": 20, "width": 16, "batch": 1},
    {"channels": 128, "num_heads": 1, "head_dim": 32, "height": 20, "width": 16, "norm": False, "batch": 2},
]


def attention(shape: dict[str, Any]) -> traffic.Attention:
    s = {"kernel_size": 3, "stride": 1, "norm": True, **shape}
    inner = s["num_heads"] * s["head_dim"]
    sides = s["height"], s["width"], s["kernel_size"], s["stride"]
    return traffic.Attention(s["batch"], s["channels"], *sides, s["num_heads"], inner, s["norm"], True)


@pytest.fixture
def undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image has several CTAs."""
    monkeypatch.setattr(lowtention, "shares_of", lambda *args: 1)


@pytest.mark.usefixtures("undivided")
def test_lowtention_of_several_images(kernels: Path) -> None:
    shape = {**ATTENTION[0], "batch": 5}
    with settings.using({"images": 2}):
        agree(counted(kernels, "lowtention", **shape), traffic.lowtention(attention(shape), 2))


def test_lowtention_of_several_ctas_an_image(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowtention, "shares_of", lambda *args: 3)
    agree(counted(kernels, "lowtention", **ATTENTION[0]), traffic.lowtention(attention(ATTENTION[0]), shares=3))


@pytest.mark.usefixtures("undivided")
@pytest.mark.parametrize("shape", ATTENTION)
def test_lowtention(kernels: Path, shape: dict[str, Any]) -> None:
    call = attention(shape)
    expected = traffic.lowtention_in_three(call) if call.tokens > 256 else [traffic.lowtention(call)]
    agree(counted(kernels, "lowtention", **shape), *expected)


CONVOLUTIONS: list[tuple[int, dict[str, Any]]] = [
    (0, {"channels": 64, "out_channels": 128, "height": 14, "width": 13, "stride": 2, "batch": 3}),
    (1, {"channels": 128, "out_channels": 192, "height": 7, "width": 9, "batch": 2}),
    (2, {"channels": 64, "out_channels": 64, "height": 8, "width": 7, "kernel_size": 1, "residual": True, "batch": 3}),
    (2, {"channels": 64, "out_channels": 128, "height": 6, "width": 5, "pool": True, "batch": 3}),
    (
        1,
        {"channels": 64, "out_channels": 64, "height": 9, "width": 8, "kernel_size": 1, "pool": True, "residual": True, "batch": 2},
    ),
    (4, {"channels": 512, "out_channels": 64, "height": 1, "width": 1, "kernel_size": 1, "batch": 17}),
]


@pytest.mark.parametrize(("number", "shape"), CONVOLUTIONS)
def test_conv_act(kernels: Path, monkeypatch: pytest.MonkeyPatch, number: int, shape: dict[str, Any]) -> None:
    config = conv_act.CONFIGS[number]
    monkeypatch.setattr(conv_act, "configs", lambda *args: [config])
    sizes = chained("conv_act", shape)
    images = conv_act._images(config, sizes.batch, sizes.output[0] * sizes.output[1]) if shape.get("pool") else 0
    expected = traffic.conv_act(sizes, config.rows, config.columns, shape.get("residual", False), images)
    agree(counted(kernels, "conv_act", **shape), expected)


WIDE_CONVOLUTIONS: list[tuple[int, dict[str, Any]]] = [
    (0, {"channels": 64, "out_channels": 256, "height": 14, "width": 14, "batch": 2}),
    (1, {"channels": 128, "height": 8, "width": 7, "residual": True, "batch": 3}),
    (1, {"channels": 64, "out_channels": 384, "height": 7, "width": 7, "kernel_size": 1, "pool": True, "batch": 3}),
]


@pytest.mark.parametrize(("config", "shape"), WIDE_CONVOLUTIONS)
def test_conv_act_on_hopper(hopper_kernels: Path, config: int, shape: dict[str, Any]) -> None:
    sizes = chained("conv_act", shape)
    tile = hopper_conv.divisions(hopper_conv.Conv(sizes, shape.get("pool", False)), H200, config)[0]
    with hopper.forced(config):
        found = counted(hopper_kernels, "conv_act", **shape)
    agree(found, traffic.wide_conv(sizes, tile, shape.get("residual", False), shape.get("pool", False)))


def test_every_kernel_has_a_layer() -> None:
    assert set(traffic.LAYERS) == {path.stem for path in execution.SOURCES.glob("*.cu")}


@pytest.mark.parametrize("kernel", traffic.LAYERS)
def test_headers_say_what_comes_from_l2(kernel: str) -> None:
    header = (execution.SOURCES / f"{kernel}.cu").read_text().split("#include", 1)[0]
    stated = re.search(r"from L2 [^:]*:\s+(?:(\d+) to )?(\d+) KB an image\n", header.replace("\n// ", ""))
    assert stated, f"the budget of {kernel}.cu names no layer and its KB an image"
    least, most = traffic.kilobytes_an_image(kernel)
    assert (int(stated[1] or stated[2]), int(stated[2])) == (least, most)
