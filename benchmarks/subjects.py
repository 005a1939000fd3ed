"""What is measured: the operators on the layers of real models, and whole models.

A :class:`Subject` is one of them at one batch size and dtype on one device. Every contender computes the same thing from the same
weights; the float64 truth it is checked against starts from weights and inputs already rounded to the subject's dtype.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lowformer
from lowformer.kernels import use_kernels
from lowkernels import costs
from lowkernels.dispatch import AUTO
from lowkernels.nn.block import FusedBlock
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call

SIZES = (224, 512)
BATCHES = (1, 16, 256)
CHECKED_IMAGES = 4
"""Images of a batch whose outputs are compared with float64: the first ones and the last ones."""
MAX_INPUTS = 64


@dataclass(frozen=True)
class Layer:
    """One distinct layer: an operator and the shapes it is called with, without the batch size."""

    operator: str
    channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    act: str | None = None
    hidden: int | None = None
    num_heads: int = 1
    head_dim: int | None = None
    norm: bool = True
    residual: bool = False
    pool: bool = False

    @property
    def name(self) -> str:
        """One readable word a property, unique among layers."""
        if self.operator == "lowtention":
            middle = f"{self.num_heads}x{self.head_dim}" + ("" if self.norm else " unnormed")
            channels = f"{self.channels}-{middle}-{self.out_channels}"
        else:
            channels = "-".join(str(c) for c in (self.channels, self.hidden, self.out_channels) if c is not None)
        window = "" if self.operator == "gn_mlp" else f" k{self.kernel_size} s{self.stride}"
        tail = (" +x" if self.residual else "") + (" pool" if self.pool else "")
        act = f" {self.act}" if self.act else ""
        return f"{self.operator} {channels}{window}{act} {self.height}x{self.width}{tail}"

    def call(self, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Any, ...]:
        """The operator's arguments, with random data."""
        kwargs = {k: v for k, v in vars(self).items() if v is not None}
        return random_call(batch=batch, dtype=dtype, device=device, seed=seed, **kwargs).args


def layer_of(operator: str, args: tuple[Any, ...]) -> Layer | None:
    """The layer that a recorded call is; None for a linear layer, which no operator computes."""
    if operator not in OPERATORS:
        return None
    named = dict(zip(OPERATORS[operator].argument_names, args, strict=True))
    x = named["x"]
    out = OPERATORS[operator].infer_shape(*args)
    layer = Layer(operator, x.shape[1], out[1], x.shape[2], x.shape[3], stride=named.get("stride", 1))
    if operator == "conv_act":
        return replace(layer, kernel_size=named["weight"].shape[2], act=named["act"], pool=named["pool"])
    layer = replace(layer, residual=named["residual"])
    if operator == "separable_conv":
        return replace(layer, kernel_size=named["dw_weight"].shape[2], act=named["dw_act"])
    if operator == "lowtention":
        heads = named["num_heads"]
        return replace(
            layer,
            kernel_size=named["dw_weight"].shape[2],
            num_heads=heads,
            head_dim=named["up_weight"].shape[0] // heads,
            norm=named["norm_weight"] is not None,
        )
    if operator == "gn_mlp":
        return replace(layer, hidden=named["fc1_weight"].shape[0], act=named["act"])
    spatial = named["dw_weight" if operator == "mbconv" else "conv_weight"]
    return replace(layer, kernel_size=spatial.shape[2], hidden=spatial.shape[0], act=named["act"])


@dataclass(frozen=True)
class Variation:
    """A LowFormer that is not one of the published ones.

    Attributes:
        name: what it is called after the model's name.
        change: makes it, in place, from a published one of plain PyTorch blocks whose weights may still be of any value.
    """

    name: str
    change: Callable[[nn.Module], None]


def plain_network(model: str, variation: Variation | None = None) -> nn.Module:
    """A LowFormer of plain PyTorch blocks."""
    network = lowformer.create_model(model, kernels="eager")
    if variation is not None:
        variation.change(network)
    return network


@functools.cache
def blocks_of(model: str, size: int, batch: int, dtype: torch.dtype, variation: Variation | None = None) -> tuple[costs.Block, ...]:
    """Every operator call and linear layer of one forward pass of a LowFormer, in order, without data."""
    with torch.device("meta"):
        network = use_kernels(plain_network(model, variation)).eval().to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
    return tuple(costs.record(network, (batch, 3, size, size), dtype))


def layers_of(model: str, size: int) -> list[Layer]:
    """The distinct layers of one LowFormer, in the order they run."""
    recorded = blocks_of(model, size, 1, torch.float32)
    found = (layer_of(b.operator, b.args) for b in recorded)
    return list(dict.fromkeys(layer for layer in found if layer is not None))


def lowformer_layers(sizes: Iterable[int] = SIZES) -> list[Layer]:
    """Every distinct layer of every LowFormer at these image sizes."""
    found = (layer for size in sizes for model in lowformer.list_models() for layer in layers_of(model, size))
    return list(dict.fromkeys(found))


def _inverted_residuals(
    stem: int, first: int, stages: Iterable[tuple[int, int, int, int, int]], head: int, size: int
) -> list[Layer]:
    """A mobile network of relu6 blocks: a strided stem, one depthwise separable block, inverted residuals and a 1x1 head.

    A stage is (expansion, channels, blocks, stride of the first, kernel).
    """
    height = -(-size // 2)
    layers = [
        Layer("conv_act", 3, stem, size, size, stride=2, act="relu6"),
        Layer("separable_conv", stem, first, height, height, act="relu6"),
    ]
    channels = first
    for expansion, out, count, first_stride, kernel in stages:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            layers.append(
                Layer(
                    "mbconv",
                    channels,
                    out,
                    height,
                    height,
                    kernel_size=kernel,
                    stride=stride,
                    act="relu6",
                    hidden=channels * expansion,
                    residual=stride == 1 and channels == out,
                )
            )
            channels, height = out, -(-height // stride)
    return [*layers, Layer("conv_act", channels, head, height, height, kernel_size=1, act="relu6", pool=True)]


def mobile_layers(sizes: Iterable[int] = SIZES) -> list[Layer]:
    """The distinct layers of MobileNetV2 1.0 (arXiv 1801.04381, table 2) and EfficientNet-Lite0 (EfficientNet-B0 of arXiv
    1905.11946, table 1, without squeeze-and-excitation and with relu6)."""
    mobilenet_v2 = (
        (6, 24, 2, 2, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )
    efficientnet_lite0 = (
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    return list(
        dict.fromkeys(
            layer
            for size in sizes
            for stages in (mobilenet_v2, efficientnet_lite0)
            for layer in _inverted_residuals(32, 16, stages, 1280, size)
        )
    )


class PlainOperator(nn.Module):
    """One operator as plain PyTorch code that every exporter and compiler reads: the eager reference on fixed weights."""

    def __init__(self, operator: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self._forward: Callable[..., Tensor] = importlib.import_module(f"lowkernels.ops.{operator}.reference").forward
        self._arguments = list(args[1:])
        self._names = [f"weight_{i}" if isinstance(v, Tensor) else None for i, v in enumerate(args[1:])]
        for name, value in zip(self._names, args[1:], strict=True):
            if name is not None:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        rest = [value if name is None else getattr(self, name) for name, value in zip(self._names, self._arguments, strict=True)]
        return self._forward(x, *rest, None)


@dataclass(frozen=True, eq=False)
class Subject:
    """Something to measure. Two are equal only if they are one.

    Attributes:
        kind: ``"op"`` or ``"model"``.
        name: of the layer or the model.
        size: height of the square input images of a model, or of the layer's input.
        batch: images in a batch.
        dtype: of weights, inputs and outputs.
        device: ``"cpu"`` or ``"cuda"``.
        operator: the operator's name, for kind ``"op"``.
        plain: makes the computation as a plain PyTorch module in eval mode, contiguous (NCHW), in ``dtype`` and on ``device``.
        ours: makes it with the library: from a backend's name or ``"auto"``, a callable and how often each backend serves in it.
        inputs: batches to rotate through, contiguous.
        blocks: the least cost of each of its blocks.
        accumulation_length: K of the error budget.
    """

    kind: str
    name: str
    size: int
    batch: int
    dtype: torch.dtype
    device: str
    operator: str | None
    plain: Callable[[], nn.Module]
    ours: Callable[[str], tuple[Callable[[Tensor], Tensor], Callable[[], dict[str, int]]]]
    inputs: list[Tensor]
    blocks: tuple[costs.Cost, ...]
    accumulation_length: int

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What rows of the same subject share."""
        return (self.kind, self.name, self.size, self.batch, dtype_name(self.dtype))

    @property
    def flops(self) -> int:
        return sum(block.fused.flops for block in self.blocks)

    @property
    def bytes(self) -> int:
        return sum(block.fused.bytes for block in self.blocks)

    def checked(self, batch: Tensor) -> Tensor:
        """The images of a batch, or of its output, that are compared with float64."""
        if batch.shape[0] <= CHECKED_IMAGES:
            return batch
        half = CHECKED_IMAGES // 2
        return torch.cat([batch[:half], batch[-half:]])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def module_channels_last(module: nn.Module) -> nn.Module:
    """``module`` with its weights in channels_last memory, in place."""
    # PyTorch's annotations do not know this form of the call.
    changed: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return changed


def inputs_to_rotate(batch_bytes: int, cache_bytes: int) -> int:
    """How many input batches together are twice the cache, within [2, MAX_INPUTS]."""
    return min(MAX_INPUTS, max(2, math.ceil(2 * cache_bytes / batch_bytes)))


def layer_subject(layer: Layer, batch: int, dtype: torch.dtype, device: str, cache_bytes: int) -> Subject:
    """One layer as a subject."""
    args = layer.call(batch, dtype, device)
    operator = OPERATORS[layer.operator]
    count = inputs_to_rotate(args[0].numel() * args[0].element_size(), cache_bytes)
    generator = torch.Generator().manual_seed(1)
    inputs = [args[0].contiguous()]
    inputs += [torch.randn(args[0].shape, generator=generator).to(dtype).to(device) for _ in range(count - 1)]

    def plain() -> nn.Module:
        # A copy of the weights, because channels_last and casts must not reach other contenders.
        return PlainOperator(layer.operator, tuple(copy.deepcopy(a) for a in args)).eval()

    def ours(backend: str) -> tuple[Callable[[Tensor], Tensor], Callable[[], dict[str, int]]]:
        packed = operator.pack(*operator.weights(args), backend=None if backend == AUTO else backend)
        tail = (packed.tensors, packed.backend, None if backend == AUTO else backend)
        rest = args[1:]

        def run(x: Tensor) -> Tensor:
            out: Tensor = operator.overload(x, *rest, *tail)
            return out

        choice = operator.explain(*args, backend=None if backend == AUTO else backend)
        return run, lambda: {choice.backend: 1}

    return Subject(
        "op",
        layer.name,
        layer.height,
        batch,
        dtype,
        device,
        layer.operator,
        plain,
        ours,
        inputs,
        (costs.of_call(layer.operator, args),),
        operator.accumulation_length(*args),
    )


@functools.lru_cache(maxsize=2)
def weights_of(model: str, variation: Variation | None = None) -> dict[str, Tensor]:
    """Random weights of a LowFormer whose BatchNorms have the statistics of what they see, so that values keep a size around one
    to the end and an error in any folded statistic or bias shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = plain_network(model, variation)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            with torch.no_grad():
                module.weight.copy_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
    with torch.no_grad():
        network.train()(torch.randn((2, 3, 224, 224), generator=generator))
    return {k: v.detach().clone() for k, v in network.state_dict().items()}


def served_by(network: nn.Module) -> dict[str, int]:
    """How many blocks of a model each backend served in its latest forward pass."""
    calls = [m.last_call for m in network.modules() if isinstance(m, FusedBlock)]
    return dict(Counter(call[0].backend for call in calls if call is not None))


def model_subject(
    model: str,
    size: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    cache_bytes: int,
    variation: Variation | None = None,
) -> Subject:
    """One LowFormer as a subject."""
    generator = torch.Generator().manual_seed(2)
    shape = (batch, 3, size, size)
    count = inputs_to_rotate(math.prod(shape) * dtype.itemsize, cache_bytes)
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]

    def plain() -> nn.Module:
        network = plain_network(model, variation)
        network.load_state_dict(weights_of(model, variation))
        return network.eval().to(dtype).to(device)

    def ours(backend: str) -> tuple[Callable[[Tensor], Tensor], Callable[[], dict[str, int]]]:
        # `kernels="eager"` would leave the operators out; the backend of that name is asked for here.
        network = module_channels_last(use_kernels(plain(), backend=backend))
        return network, lambda: served_by(network)

    recorded = blocks_of(model, size, batch, dtype, variation)
    lengths = [
        OPERATORS[b.operator].accumulation_length(*b.args) if b.operator in OPERATORS else b.args[1].shape[0] for b in recorded
    ]
    return Subject(
        "model",
        model if variation is None else f"{model}, {variation.name}",
        size,
        batch,
        dtype,
        device,
        None,
        plain,
        ours,
        inputs,
        tuple(b.cost for b in recorded),
        max(lengths),
    )
