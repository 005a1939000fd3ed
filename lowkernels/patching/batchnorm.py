"""BatchNorm folding around blocks that no operator serves: the convolution takes it over in eval mode, and the norm steps aside."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block import FusedBlock, has_hooks
from ..ops.operator import PackedWeights
from ..report import Row
from .patterns import BATCH_NORMS
from .recording import Own, Recording, Value, record

# Sides of the images a model without an example input is tried on: small first.
_EXAMPLE_SIZES = (64, 224)


class FoldedNormConv(FusedBlock):
    """A convolution that includes the BatchNorm after it in eval mode. It stands in the convolution's place.

    Any nn.Conv2d with zero padding; runs as ``torch.nn.functional.conv2d``. Its parameters are the convolution's own.
    """

    operator_name = "conv2d"
    _CONVS = ("conv",)

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self._parameters = conv._parameters
        self.training = conv.training
        self._norm = (norm,)
        self._setup({"conv": "", "conv_norm": ""}, {}, "auto", conv)

    def _part(self, role: str) -> Any:
        return self._original[0] if role == "conv" else self._norm[0]

    def _check_parts(self) -> None:
        """Checked where it is made: any convolution will do."""

    def _check_operator(self) -> None:
        """There is no operator, hence no contract."""

    def _watch(self) -> None:
        self._mode_sensitive = list(self._norm)
        self._hooks_of_children = []

    def _make_packs(self) -> None:
        self._packed_count, self._packed_for = 0, None

    def _call_operator(self, x: Tensor, weights: list[Tensor | None], packed: PackedWeights | None) -> Tensor:
        weight, bias = weights
        assert weight is not None
        return F.conv2d(x, weight, bias, **self._config)

    def _setup(self, parts: Any, config: Any, backend: str, original: nn.Module | None = None) -> None:
        assert isinstance(original, nn.Conv2d)
        window = {"stride": original.stride, "padding": original.padding, "dilation": original.dilation}
        super()._setup(parts, {**window, "groups": original.groups}, backend, original)

    def freeze(self) -> None:
        """Drop the original weights, as :func:`lowkernels.freeze` does with every block."""
        super().freeze()
        self._parameters = {}


class FoldedNorm(nn.Module):
    """A BatchNorm that a convolution before it includes in eval mode. It stands in the norm's place and applies what else it had.

    Args:
        norm: the BatchNorm; one with children (an activation, say) applies them after normalising.
        conv: the convolution that includes it.
    """

    _version = 2

    def __init__(self, norm: nn.BatchNorm2d, conv: FoldedNormConv) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self._non_persistent_buffers_set = norm._non_persistent_buffers_set
        self.training = norm.training
        # In tuples, so that neither is a child.
        self._original, self._conv = (norm,), (conv,)

    @property
    def original(self) -> nn.BatchNorm2d:
        """The BatchNorm it stands for."""
        return self._original[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.training or self._conv[0].training:
            out: Tensor = self.original.forward(x)
            return out
        return _after_norm(self, x)

    def train(self, mode: bool = True) -> FoldedNorm:
        super().train(mode)
        self.original.training = mode
        return self

    def extra_repr(self) -> str:
        return f"{self.original.num_features}, in its convolution in eval mode"


def _after_norm(norm: nn.Module, x: Tensor) -> Tensor:
    for child in norm.children():
        x = child(x)
    return x


def fold_batch_norms(model: nn.Module, example_input: Tensor | None, untouched: set[int], notes: dict[str, Row]) -> int:
    """Fold every BatchNorm that follows a convolution and nothing else, outside the modules in ``untouched`` (by id).

    The model runs in eval mode before and after; if its output changes by more than rounding, nothing stays folded.

    Returns:
        The number of norms folded; each has a note.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and id(m) not in untouched]
    if not norms:
        return 0
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        return _fold(model, example_input, untouched, notes)
    finally:
        for module, training in modes:
            module.training = training
        for module in model.modules():
            if isinstance(module, FoldedNormConv | FoldedNorm):
                module.train(module.original.training if module.original is not None else False)


def _fold(model: nn.Module, example_input: Tensor | None, untouched: set[int], notes: dict[str, Row]) -> int:
    try:
        x, recording = _run(model, example_input)
    except Exception as error:  # the model is anybody's code
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        notes[""] = Row("", type(model).__name__, False, "", f"BatchNorm not folded: the model did not run on the example: {what}")
        return 0
    modules = dict(model.named_modules())
    done: list[tuple[str, nn.Module]] = []
    for conv_name, norm_name in _pairs(recording):
        conv, norm = modules[conv_name], modules[norm_name]
        if id(conv) in untouched or id(norm) in untouched:
            continue
        reason = _refusal(conv, norm)
        if reason:
            notes[norm_name] = Row(norm_name, type(norm).__name__, False, "", reason)
            continue
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        folded = FoldedNormConv(conv, norm)
        _put(model, conv_name, folded)
        _put(model, norm_name, FoldedNorm(norm, folded))
        done += [(conv_name, conv), (norm_name, norm)]
        notes[norm_name] = Row(norm_name, type(norm).__name__, True, "", f"folded into {conv_name} in eval mode")
    if not done:
        return 0
    with torch.no_grad():
        after = model(x)
    before = recording.tensor
    assert before is not None
    worst = torch.linalg.vector_norm((after - before).double()) / torch.linalg.vector_norm(before.double())
    if not worst <= torch.finfo(before.dtype).eps ** 0.5:
        for name, original in done:
            _put(model, name, original)
            notes.pop(name, None)
        notes[""] = Row("", type(model).__name__, False, "", f"BatchNorm not folded: it changed the output by {worst:.1e}")
        return 0
    return len(done) // 2


def _run(model: nn.Module, example_input: Tensor | None) -> tuple[Tensor, Recording]:
    if example_input is not None:
        return example_input, record(model, example_input)
    like = next(model.parameters())
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    for size in _EXAMPLE_SIZES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, channels, size, size, generator=generator).to(like.device, like.dtype)
        try:
            return x, record(model, x)
        except Exception:  # the model is anybody's code; it may want the larger image
            if size == _EXAMPLE_SIZES[-1]:
                raise
    raise AssertionError("unreachable: the last size returns or raises")


def _pairs(recording: Recording) -> Iterator[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the norm is all that reads the convolution's result, each used once."""
    producers = {step.result: step for step in recording.steps}
    readers = Counter(v for step in recording.steps for v in step.args.values() if isinstance(v, Value))
    used = Counter(v.name for step in recording.steps for v in step.args.values() if isinstance(v, Own))
    for step in recording.steps:
        mean, source = step.args.get("running_mean"), step.args.get("input")
        if step.op not in BATCH_NORMS or not isinstance(mean, Own) or not isinstance(source, Value):
            continue
        conv = producers.get(source)
        if conv is None or conv.op != "convolution" or readers[source] != 1 or recording.output == source:
            continue
        weight = conv.args["weight"]
        if isinstance(weight, Own) and used[weight.name] == 1 and used[mean.name] == 1:
            yield weight.name.removesuffix(".weight"), mean.name.removesuffix(".running_mean")


def _refusal(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why the pair cannot be folded, or None."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        return f"not folded: its convolution is a {type(conv).__name__} with code of its own"
    if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
        return "not folded: it has no running statistics"
    if any(has_hooks(m) for m in (conv, *norm.modules())):
        return "not folded: there are hooks on it or on its convolution"
    twin = copy.deepcopy(norm).to("cpu", torch.float64)
    x = torch.randn(2, norm.num_features, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    with torch.no_grad():
        plain = F.batch_norm(x, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, 0.0, twin.eps)
        same = torch.allclose(twin(x), _after_norm(twin, plain), rtol=torch.finfo(x.dtype).eps ** 0.5)
    return None if same else "not folded: it does more than normalise and apply its children"


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
