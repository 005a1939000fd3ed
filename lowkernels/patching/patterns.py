"""Which operator a recorded block is, if any: the wiring of its operations, and the part each of its children plays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import ConvNormAct, FusedBlock, FusedMBConv, GroupNormMLP, Lowtention, MBConv, SeparableConv
from .recording import Own, Recording, Step, Value


class NoMatch(Exception):
    """The block is none of the operators; the message says what it has that they have not."""


@dataclass(frozen=True)
class Match:
    """A block recognised as an operator, still to be verified.

    Attributes:
        module: the class of ``lowkernels.nn`` that runs it.
        arguments: what its ``from_module`` takes.
    """

    module: type[FusedBlock]
    arguments: dict[str, Any]

    def build(self, original: nn.Module, backend: str) -> FusedBlock:
        """The drop-in module for ``original``."""
        block: FusedBlock = self.module.from_module(original, **self.arguments, backend=backend)  # type: ignore[attr-defined]
        return block


@dataclass(frozen=True)
class _Layer:
    """A convolution with what follows it. Names are dotted module names."""

    conv: str
    norm: str | None
    act: str
    groups: int
    weight_shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        out_channels, in_channels_of_group, *window = self.weight_shape
        if self.groups > 1:
            if in_channels_of_group != 1 or self.groups != out_channels:
                raise NoMatch(f"has a grouped convolution ({self.conv}, {self.groups} groups)")
            return "dw"
        return "1x1" if all(w == 1 for w in window) else "kxk"


BATCH_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update"}
# Operations whose presence tells what a block is, for reasons a user can read; what tells most comes first.
_TELLTALES = {
    "_local_scalar_dense": "reads values of tensors to decide what to do",
    "bernoulli": "draws random numbers in eval mode, as an acting drop path does",
    "rand": "draws random numbers in eval mode",
    "native_dropout": "applies dropout in eval mode",
    "mean": "averages over space inside the block, as squeeze-and-excitation does",
    "_adaptive_avg_pool2d": "averages over space inside the block, as squeeze-and-excitation does",
    "constant_pad_nd": "pads explicitly, as asymmetric 'same' padding does",
    "avg_pool2d": "pools inside the block, as anti-aliasing layers do",
    "max_pool2d_with_indices": "pools inside the block",
    "cat": "concatenates, as mixed convolutions do",
    "split_with_sizes": "splits channels, as mixed convolutions do",
    "native_layer_norm": "has a LayerNorm",
    "addmm": "has a Linear layer",
    "mul": "multiplies activations, as squeeze-and-excitation and gates do",
    "add": "adds before its last layer, as residual networks with an activation at the end do",
}
# Operations that move numbers and compute none.
LAYOUT_OPS = {
    "_reshape_alias",
    "_unsafe_view",
    "copy",
    "empty",
    "empty_like",
    "expand",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
# What attention computes, in the forms it comes in.
_ATTENTION_OPS = {
    "_safe_softmax",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_softmax",
    "bmm",
    "div",
}


def find(module: nn.Module, recording: Recording) -> Iterator[Match]:
    """The operators a recorded block may be; attention is proposed with every possible number of heads.

    Raises:
        NoMatch: none.
    """
    if any(step.op == "convolution" and step.args["transposed"] for step in recording.steps):
        yield from _lowtention(module, recording)
    else:
        yield _chain(module, recording)


def _chain(module: nn.Module, recording: Recording) -> Match:
    """Everything but attention is a chain of convolutions, with a GroupNorm in front or a residual around it."""
    value, residual = _strip_residual(recording, recording.output)
    taken = 1 if residual else 0
    layers: list[_Layer] = []
    norm: str | None = None
    while value != recording.input:
        step = _only_producer(recording, value)
        if step.op == "native_group_norm":
            norm = _group_norm(step)
            value, taken = step.args["input"], taken + 1
            if value != recording.input:
                raise NoMatch("has a GroupNorm after its first layer")
            break
        layer, value, steps = _layer(module, recording, step)
        layers.insert(0, layer)
        taken += steps
    if taken != len(recording.steps):
        raise NoMatch(_unexplained(recording))
    return _classify(layers, norm, residual)


def _classify(layers: list[_Layer], norm: str | None, residual: bool) -> Match:
    common: dict[str, Any] = {"residual": residual}
    shape = [layer.kind for layer in layers]
    if norm is not None:
        if shape == ["1x1", "1x1"] and layers[1].act == "none":
            one, two = layers
            names = {"norm": norm, "fc1": one.conv, "fc1_norm": one.norm, "fc2": two.conv, "fc2_norm": two.norm}
            return Match(GroupNormMLP, {**names, "act": one.act, **common})
        raise NoMatch(f"is GroupNorm and then {' -> '.join(shape) or 'nothing'}, which no operator computes")
    if len(layers) == 1 and shape != ["dw"]:
        only = layers[0]
        if only.norm is None and only.act == "none" and not residual:
            raise NoMatch("is a convolution alone: there is nothing to fuse")
        return Match(ConvNormAct, {"conv": only.conv, "norm": only.norm, "act": only.act, **common})
    if shape == ["dw", "1x1"]:
        dw, pw = layers
        parts = {"dw": dw.conv, "dw_norm": dw.norm, "dw_act": dw.act, "pw": pw.conv, "pw_norm": pw.norm, "pw_act": pw.act}
        return Match(SeparableConv, {**parts, **common})
    if shape in (["kxk", "1x1"], ["1x1", "1x1"]):
        conv, project = layers
        if project.act != "none":
            raise NoMatch(f"has an activation ({project.act}) after its projection")
        parts = {"conv": conv.conv, "conv_norm": conv.norm, "project": project.conv, "project_norm": project.norm}
        return Match(FusedMBConv, {**parts, "act": conv.act, **common})
    if shape == ["1x1", "dw", "1x1"]:
        expand, dw, project = layers
        if project.act != "none":
            raise NoMatch(f"has an activation ({project.act}) after its projection")
        if expand.act != dw.act:
            raise NoMatch(f"has two different activations, {expand.act} and {dw.act}")
        parts = {"expand": expand.conv, "expand_norm": expand.norm, "dw": dw.conv, "dw_norm": dw.norm}
        parts |= {"project": project.conv, "project_norm": project.norm}
        return Match(MBConv, {**parts, "act": dw.act, **common})
    raise NoMatch(f"is the chain {' -> '.join(shape) or 'of no convolutions'}, which no operator computes")


def _lowtention(module: nn.Module, recording: Recording) -> Iterator[Match]:
    """Depthwise convolution, 1x1 to q, k, v, transposed convolution; what lies between is settled by numbers."""
    convs = [s for s in recording.steps if s.op == "convolution"]
    if len(convs) != 3 or [bool(s.args["transposed"]) for s in convs] != [False, False, True]:
        raise NoMatch("has a transposed convolution, but is not depthwise -> 1x1 -> attention -> transposed")
    _, residual = _strip_residual(recording, recording.output)
    if sum(s.op == "add" for s in recording.steps) > residual:
        raise NoMatch("attends, but adds something on the way, as positional encodings do")
    _, qkv, up = convs
    if up.args["groups"] != 1:
        raise NoMatch("has a grouped transposed convolution")
    layer, source, _ = _layer(module, recording, _only_producer(recording, qkv.args["input"]))
    if layer.act != "none" or layer.kind != "dw":
        raise NoMatch("has a transposed convolution, but is not depthwise -> 1x1 -> attention -> transposed")
    norm = None
    if source != recording.input:
        step = _only_producer(recording, source)
        if step.op != "native_group_norm" or step.args["input"] != recording.input:
            raise NoMatch(f"applies {step.op} before its depthwise convolution")
        norm = _group_norm(step)
    known = {"convolution", "native_group_norm", "add", *BATCH_NORMS, *_ATTENTION_OPS, *LAYOUT_OPS}
    strange = [s.op for s in recording.steps if s.op not in known and not _is_scaling(s)]
    if strange:
        raise NoMatch(f"attends, but {_tell(strange[0])}")
    qkv_name = _owner(qkv.args["weight"], "weight")
    up_name = _owner(up.args["weight"], "weight")
    inner = module.get_submodule(qkv_name).out_channels // 3  # type: ignore[operator]
    names = {"norm": norm, "dw": layer.conv, "dw_norm": layer.norm, "qkv": qkv_name, "up": up_name}
    for heads in _head_counts(recording, int(inner)):
        yield Match(Lowtention, {**names, "num_heads": heads, "residual": residual})


def _head_counts(recording: Recording, inner: int) -> list[int]:
    """Possible numbers of heads, those that appear as a size of an attention operand first."""
    sizes = [s.shape[1] for s in recording.steps if s.op in _ATTENTION_OPS | LAYOUT_OPS and len(s.shape) == 4]
    divisors = [h for h in range(1, inner + 1) if inner % h == 0]
    return sorted(divisors, key=lambda h: (h not in sizes, h))


def _is_scaling(step: Step) -> bool:
    """A product with a number: attention scales its logits."""
    return step.op == "mul" and not isinstance(step.args.get("other"), Value | Own)


def _strip_residual(recording: Recording, value: Value | Own) -> tuple[Value | Own, bool]:
    step = recording.producer(value)
    if step is None or step.op != "add":
        return value, False
    one, other = step.args["self"], step.args["other"]
    if step.args.get("alpha", 1) != 1 or recording.uses(value) != 1:
        raise NoMatch("adds in a way that is no residual")
    if other == recording.input and isinstance(one, Value) and one != recording.input:
        return one, True
    if one == recording.input and isinstance(other, Value) and other != recording.input:
        return other, True
    raise NoMatch("adds something other than its input")


def _only_producer(recording: Recording, value: Any) -> Step:
    step = recording.producer(value)
    if step is None:
        raise NoMatch("uses a tensor that is neither its input nor a parameter")
    if recording.uses(step.result) != 1:
        raise NoMatch(f"branches: the result of {step.op} is used more than once")
    return step


def _layer(module: nn.Module, recording: Recording, step: Step) -> tuple[_Layer, Any, int]:
    """Walk back over [activation] <- [BatchNorm] <- convolution, from ``step``; also the layer's input and number of steps."""
    steps = 1
    act = _activation(step)
    if act is not None:
        step, steps = _only_producer(recording, step.args["self"]), steps + 1
    norm = None
    if step.op in BATCH_NORMS:
        if step.args.get("training", False):
            raise NoMatch("normalises by batch statistics in eval mode")
        norm = _owner(step.args["running_mean"], "running_mean")
        step, steps = _only_producer(recording, step.args["input"]), steps + 1
    if step.op != "convolution":
        present = {s.op for s in recording.steps} - {"add"}
        raise NoMatch(_tell(next((op for op in _TELLTALES if op in present), step.op)))
    conv = _owner(step.args["weight"], "weight")
    if any(d != 1 for d in step.args["dilation"]):
        raise NoMatch(f"has a dilated convolution ({conv})")
    weight = module.get_parameter(f"{conv}.weight")
    layer = _Layer(conv, norm, act or "none", step.args["groups"], tuple(weight.shape))
    return layer, step.args["input"], steps


def _activation(step: Step) -> str | None:
    if step.op in ("relu", "hardswish", "silu"):
        return step.op
    if step.op == "hardtanh" and (step.args["min_val"], step.args["max_val"]) == (0, 6):
        return "relu6"
    if step.op == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(step.args["approximate"])
    return None


def _group_norm(step: Step) -> str:
    if step.args["group"] != 1:
        raise NoMatch(f"has a GroupNorm with {step.args['group']} groups")
    return _owner(step.args["weight"], "weight")


def _owner(tensor: Any, attribute: str) -> str:
    """The module that owns a parameter or buffer."""
    if not isinstance(tensor, Own) or not tensor.name.endswith(f".{attribute}"):
        raise NoMatch(f"computes a {attribute} on the fly, or owns it directly")
    return tensor.name.removesuffix(f".{attribute}")


def _tell(op: str) -> str:
    return _TELLTALES.get(op, f"applies {op}, which no operator has")


def _unexplained(recording: Recording) -> str:
    known = {"convolution", "native_group_norm", "add", "relu", "hardswish", "silu", "hardtanh", "gelu", *BATCH_NORMS}
    strange = next((s.op for s in recording.steps if s.op not in known), None)
    return "computes something besides its output" if strange is None else _tell(strange)
