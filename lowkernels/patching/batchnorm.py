"""BatchNorm folding around blocks that no operator serves: the convolution takes it over in eval mode, and the norm steps aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.block import FusedBlock
from ..ops.operator import Operator, PackedWeights
from ..report import Row
from .patterns import BATCH_NORMS, NoMatch
from .recording import Own, Step, Value
from .trial import Exchanges, Trial
from .verification import random_twin, unusual_handling


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

    @property
    def operator(self) -> Operator:
        """There is none: looking for one is an AttributeError, as for any other name."""
        raise AttributeError("FoldedNormConv runs no operator")

    def _part(self, role: str) -> Any:
        return self._original[0] if role == "conv" else self._norm[0]

    def _check_parts(self) -> None:
        """Checked where it is made: any convolution will do."""

    def _check_operator(self) -> None:
        """There is no operator, hence no contract."""

    def _watch(self) -> None:
        self._mode_sensitive = list(self._norm)
        self._hooks_of_children = []
        self._lead = (self._original[0],)

    def _make_packs(self, *more: str) -> None:
        self._packed, self._packed_last = {}, None

    def _packs_for(self, x: Tensor) -> None:
        return None

    def _prepare(self, x: Tensor, key: object) -> None:
        """It runs no operator of this library."""

    def _call_operator(self, x: Tensor, weights: list[Tensor | None], packed: PackedWeights | None) -> Tensor:
        weight, bias = weights
        assert weight is not None
        return F.conv2d(x, weight, bias, **self._config)

    def _ordinary(self, x: Tensor) -> Tensor:
        if self.training or self._norm[0].training:
            return super()._ordinary(x)
        # The norm has stepped aside, whoever wants the ordinary path.
        return self._call_operator(x, self._live_weights(self._compute_dtype(x.device.type)), None)

    def _setup(self, parts: Any, config: Any, backend: str, original: nn.Module | None = None) -> None:
        assert isinstance(original, nn.Conv2d)
        window = {"stride": original.stride, "padding": original.padding, "dilation": original.dilation}
        super()._setup(parts, {**window, "groups": original.groups}, backend, original)

    def _refresh(self) -> None:
        # While a model moves, one of the two is still where it was; the other's move comes back here.
        if len({t.device for _, _, t in self._sources()}) <= 1:
            super()._refresh()

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

    _version = nn.BatchNorm2d._version

    def __init__(self, norm: nn.BatchNorm2d, conv: FoldedNormConv) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self._non_persistent_buffers_set = norm._non_persistent_buffers_set
        self.training = norm.training
        # In tuples, so that neither is a child.
        self._original, self._conv = (norm,), (conv,)
        self.register_load_state_dict_post_hook(_after_load)

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

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedNorm:
        super()._apply(fn, recurse)
        self._conv[0]._refresh()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        # A BatchNorm also takes checkpoints from before it counted batches.
        self.original._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"{self.original.num_features}, in its convolution in eval mode"


def _after_load(norm: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(norm, FoldedNorm)
    norm._conv[0]._refresh()


def _after_norm(norm: nn.Module, x: Tensor) -> Tensor:
    for child in norm.children():
        x = child(x)
    return x


def fold_batch_norms(model: nn.Module, trial: Trial, untouched: set[int], notes: dict[str, Row], exchanges: Exchanges) -> int:
    """Fold every BatchNorm that follows a convolution and nothing else, outside the modules in ``untouched`` (by id).

    Args:
        model: in eval mode.
        trial: its run on an example.
        notes: gets one for each norm that follows a convolution.
        exchanges: gets the modules.

    Returns:
        The number of norms folded.
    """
    modules = dict(model.named_modules())
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    folded = 0
    for conv_name, norm_name in _pairs(trial):
        conv, norm = modules[conv_name], modules[norm_name]
        if id(conv) in untouched or id(norm) in untouched:
            continue
        if any(places[id(m)] > 1 or trial.calls[id(m)] != 1 for m in (conv, norm)):
            reason = "not folded: it or its convolution is used in two places, or not as a module"
        else:
            reason = _refusal(conv, norm)
        if reason:
            notes[norm_name] = Row(norm_name, type(norm).__name__, False, "", reason)
            continue
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded_conv = FoldedNormConv(conv, norm)
        for name, module in ((conv_name, folded_conv), (norm_name, FoldedNorm(norm, folded_conv))):
            parent, _, child = name.rpartition(".")
            exchanges.put(model.get_submodule(parent), child, module)
        notes[norm_name] = Row(norm_name, type(norm).__name__, True, "", f"folded into {conv_name} in eval mode")
        folded += 1
    return folded


def _pairs(trial: Trial) -> Iterator[tuple[str, str]]:
    """Names of (convolution, BatchNorm) where the norm is all that reads the convolution's result, each used once."""
    steps = trial.recording.steps
    producers = {step.result: step for step in steps}
    used = Counter(value for step in steps for value in step.values())
    used.update(trial.recording.outputs)
    for step in steps:
        source = step.args.get("input")
        conv = producers.get(source) if isinstance(source, Value) and step.op in BATCH_NORMS else None
        if conv is None or conv.op != "convolution" or used[conv.result] != 1:
            continue
        conv_name, norm_name = _owner(conv, "weight"), _owner(step, "running_mean")
        if conv_name is None or norm_name is None or used[Own(f"{conv_name}.weight")] != 1:
            continue
        own = {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
        its_own = [Own(f"{norm_name}.{n}") for n in own]
        given = [step.args[n] for n in own]
        bias = conv.args["bias"]
        if bias in (None, Own(f"{conv_name}.bias")) and all(g in (None, o) for g, o in zip(given, its_own, strict=True)):
            yield conv_name, norm_name


def _owner(step: Step, attribute: str) -> str | None:
    tensor = step.args.get(attribute)
    if not isinstance(tensor, Own) or not tensor.name.endswith(f".{attribute}"):
        return None
    return tensor.name.removesuffix(f".{attribute}")


def _refusal(conv: nn.Module, norm: nn.Module) -> str:
    """Why the pair cannot be folded, or nothing."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or "forward" in vars(conv):
        return f"not folded: its convolution is a {type(conv).__name__} with code of its own"
    if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
        return "not folded: it has no running statistics"
    for what, module, usual in (("its convolution", conv, nn.Conv2d), ("it", norm, nn.BatchNorm2d)):
        unusual = unusual_handling(module, usual)
        if unusual:
            return f"not folded: {what} {unusual}"
    try:
        twin = random_twin(norm)
        assert isinstance(twin, nn.BatchNorm2d)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, norm.num_features, 3, 3, generator=generator, dtype=torch.float64, device="cpu") * 3
        with torch.no_grad():
            plain = F.batch_norm(x, twin.running_mean, twin.running_var, twin.weight, twin.bias, False, 0.0, twin.eps)
            out, expected = twin(x), _after_norm(twin, plain)
    except NoMatch as reason:
        return f"not folded: it {reason}"
    same = isinstance(out, Tensor) and torch.allclose(out, expected, rtol=torch.finfo(x.dtype).eps ** 0.5)
    return "" if same else "not folded: it does more than normalise and apply its children"
