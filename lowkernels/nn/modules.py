"""The drop-in modules, one per operator. Each can be built on its own or from a module of any model, adopting its children."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import activations
from ..ops.eager import group_norm_input
from .block import FusedBlock


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, bias: bool, kind: dict[str, Any]
) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias, **kind)


def _norm(channels: int, wanted: bool, kind: dict[str, Any]) -> nn.BatchNorm2d | None:
    return nn.BatchNorm2d(channels, **kind) if wanted else None


def _path(module: nn.Module | None, name: str) -> str | None:
    return None if module is None else name


class ConvNormAct(FusedBlock):
    """Dense k x k convolution -> BatchNorm -> activation [+ x] [-> global average pool], as one operator in eval mode.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out), or (N, C_out) with ``pool``. Supported by every backend: k odd up to 7, stride 1 or
    2, zero padding up to k // 2, dilation 1, groups 1.

    Args:
        in_channels, out_channels: channels.
        kernel_size: odd, at most 7; padding is ``kernel_size // 2``.
        stride: 1 or 2.
        bias: the convolution has one.
        norm: BatchNorm after the convolution.
        act: one of :data:`lowkernels.ops.ACTIVATIONS`.
        residual: add x after the activation.
        pool: average over H and W at the end.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "conv_act"
    _CONVS = ("conv",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        bias: bool = False,
        norm: bool = True,
        act: str = "hardswish",
        residual: bool = False,
        pool: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = _conv(in_channels, out_channels, kernel_size, stride, 1, bias, kind)
        self.norm = _norm(out_channels, norm, kind)
        config = {"act": act, "stride": stride, "padding": kernel_size // 2, "residual": residual, "pool": pool}
        self._setup({"conv": "conv", "conv_norm": _path(self.norm, "norm")}, config, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        conv: str,
        norm: str | None = None,
        act: str = "none",
        residual: bool = False,
        pool: bool = False,
        backend: str = "auto",
    ) -> ConvNormAct:
        """Adopt a module's children.

        Args:
            original: computes ``act(norm(conv(x)))``, then ``+ x`` if ``residual``. With ``pool`` this block also averages over H
                and W what ``original`` gives.
            conv, norm: dotted names of its nn.Conv2d and nn.BatchNorm2d; None where there is none.
            act, residual, pool, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        module = original.get_submodule(conv)
        config = {"act": act, **_window(module), "residual": residual, "pool": pool}
        return cls._adopt(original, {"conv": conv, "conv_norm": norm}, config, backend)

    @property
    def pooled(self) -> bool:
        """Whether the output is averaged over H and W, (N, C_out)."""
        return bool(self._config["pool"])

    def _ordinary(self, x: Tensor) -> Tensor:
        out = super()._ordinary(x)
        return out.mean((2, 3)) if self.pooled else out

    def _compose(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = activations.activate(out if self.norm is None else self.norm(out), self._config["act"])
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        return (x, *weights, c["act"], c["stride"], c["padding"], x if c["residual"] else None, c["pool"])


class SeparableConv(FusedBlock):
    """Depthwise k x k -> BatchNorm -> activation -> 1x1 -> BatchNorm -> activation [+ x], as one operator in eval mode.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out). Source: Howard et al., "MobileNets", arXiv 1704.04861.

    Args:
        in_channels, out_channels: channels.
        kernel_size: odd, at most 7; padding is ``kernel_size // 2``.
        stride: 1 or 2.
        dw_act, pw_act: activations after each convolution, of :data:`lowkernels.ops.ACTIVATIONS`.
        bias: the convolutions have one.
        norm: BatchNorm after each convolution.
        residual: add x at the end.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "separable_conv"
    _CONVS = ("dw", "pw")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        dw_act: str = "relu6",
        pw_act: str = "none",
        bias: bool = False,
        norm: bool = True,
        residual: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dw = _conv(in_channels, in_channels, kernel_size, stride, in_channels, bias, kind)
        self.dw_norm = _norm(in_channels, norm, kind)
        self.pw = _conv(in_channels, out_channels, 1, 1, 1, bias, kind)
        self.pw_norm = _norm(out_channels, norm, kind)
        parts = {"dw": "dw", "pw": "pw", "dw_norm": _path(self.dw_norm, "dw_norm"), "pw_norm": _path(self.pw_norm, "pw_norm")}
        window = {"stride": stride, "padding": kernel_size // 2}
        self._setup(parts, {"dw_act": dw_act, "pw_act": pw_act, **window, "residual": residual}, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        dw: str,
        dw_norm: str | None = None,
        dw_act: str = "none",
        pw: str,
        pw_norm: str | None = None,
        pw_act: str = "none",
        residual: bool = False,
        backend: str = "auto",
    ) -> SeparableConv:
        """Adopt a module's children.

        Args:
            original: computes ``pw_act(pw_norm(pw(dw_act(dw_norm(dw(x))))))``, then ``+ x`` if ``residual``.
            dw, dw_norm, pw, pw_norm: dotted names of its convolutions and BatchNorms; None where there is none.
            dw_act, pw_act, residual, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        config = {"dw_act": dw_act, "pw_act": pw_act, **_window(original.get_submodule(dw)), "residual": residual}
        parts = {"dw": dw, "dw_norm": dw_norm, "pw": pw, "pw_norm": pw_norm}
        return cls._adopt(original, parts, config, backend)

    def _compose(self, x: Tensor) -> Tensor:
        out = self.dw(x)
        out = self.pw(activations.activate(out if self.dw_norm is None else self.dw_norm(out), self._config["dw_act"]))
        out = activations.activate(out if self.pw_norm is None else self.pw_norm(out), self._config["pw_act"])
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        dw, pw = weights[:2], weights[2:]
        return (x, *dw, c["dw_act"], *pw, c["pw_act"], c["stride"], c["padding"], c["residual"])


class MBConv(FusedBlock):
    """Inverted residual: 1x1 expansion -> depthwise k x k -> 1x1 projection [+ x], as one operator in eval mode.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out). Source: Sandler et al., "MobileNetV2", arXiv 1801.04381.

    Args:
        in_channels, out_channels: channels.
        expansion: expanded channels are ``round(in_channels * expansion)``.
        kernel_size: of the depthwise convolution, odd, at most 7; padding is ``kernel_size // 2``.
        stride: of the depthwise convolution, 1 or 2.
        act: after expansion and depthwise convolution, of :data:`lowkernels.ops.ACTIVATIONS`.
        bias: the convolutions have one.
        norm: BatchNorm after each convolution.
        residual: add x at the end; None means wherever the shapes allow it.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "mbconv"
    _CONVS = ("expand", "dw", "project")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float = 4.0,
        kernel_size: int = 3,
        stride: int = 1,
        act: str = "hardswish",
        bias: bool = False,
        norm: bool = True,
        residual: bool | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = round(in_channels * expansion)
        self.expand = _conv(in_channels, hidden, 1, 1, 1, bias, kind)
        self.expand_norm = _norm(hidden, norm, kind)
        self.dw = _conv(hidden, hidden, kernel_size, stride, hidden, bias, kind)
        self.dw_norm = _norm(hidden, norm, kind)
        self.project = _conv(hidden, out_channels, 1, 1, 1, bias, kind)
        self.project_norm = _norm(out_channels, norm, kind)
        parts = {role: role for role in self._CONVS} | {f"{r}_norm": f"{r}_norm" if norm else None for r in self._CONVS}
        residual = stride == 1 and in_channels == out_channels if residual is None else residual
        config = {"act": act, "stride": stride, "padding": kernel_size // 2, "residual": residual}
        self._setup(parts, config, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        expand: str,
        expand_norm: str | None = None,
        dw: str,
        dw_norm: str | None = None,
        project: str,
        project_norm: str | None = None,
        act: str,
        residual: bool,
        backend: str = "auto",
    ) -> MBConv:
        """Adopt a module's children.

        Args:
            original: computes expansion, ``act``, depthwise convolution, ``act``, projection, then ``+ x`` if ``residual``.
            expand, expand_norm, dw, dw_norm, project, project_norm: dotted names of its convolutions and BatchNorms; None where
                there is none.
            act, residual, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        parts = {
            "expand": expand,
            "expand_norm": expand_norm,
            "dw": dw,
            "dw_norm": dw_norm,
            "project": project,
            "project_norm": project_norm,
        }
        config = {"act": act, **_window(original.get_submodule(dw)), "residual": residual}
        return cls._adopt(original, parts, config, backend)

    def _compose(self, x: Tensor) -> Tensor:
        out = x
        for role in self._CONVS:
            out = self._part(role)(out)
            norm = self._part(f"{role}_norm")
            out = out if norm is None else norm(out)
            out = out if role == "project" else activations.activate(out, self._config["act"])
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        return (x, *weights, c["act"], c["stride"], c["padding"], c["residual"])


class FusedMBConv(FusedBlock):
    """Fused inverted residual: dense k x k expansion -> activation -> 1x1 projection [+ x], as one operator in eval mode.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out). Source: Tan and Le, "EfficientNetV2", arXiv 2104.00298.

    Args:
        in_channels, out_channels: channels.
        expansion: expanded channels are ``round(in_channels * expansion)``.
        kernel_size: odd, at most 7; padding is ``kernel_size // 2``.
        stride: 1 or 2.
        act: after the k x k convolution, of :data:`lowkernels.ops.ACTIVATIONS`.
        bias: the convolutions have one.
        norm: BatchNorm after each convolution.
        residual: add x at the end; None means wherever the shapes allow it.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "fused_mbconv"
    _CONVS = ("conv", "project")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: float = 4.0,
        kernel_size: int = 3,
        stride: int = 1,
        act: str = "hardswish",
        bias: bool = False,
        norm: bool = True,
        residual: bool | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = round(in_channels * expansion)
        self.conv = _conv(in_channels, hidden, kernel_size, stride, 1, bias, kind)
        self.conv_norm = _norm(hidden, norm, kind)
        self.project = _conv(hidden, out_channels, 1, 1, 1, bias, kind)
        self.project_norm = _norm(out_channels, norm, kind)
        parts = {role: role for role in self._CONVS} | {f"{r}_norm": f"{r}_norm" if norm else None for r in self._CONVS}
        residual = stride == 1 and in_channels == out_channels if residual is None else residual
        config = {"act": act, "stride": stride, "padding": kernel_size // 2, "residual": residual}
        self._setup(parts, config, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        conv: str,
        conv_norm: str | None = None,
        project: str,
        project_norm: str | None = None,
        act: str,
        residual: bool,
        backend: str = "auto",
    ) -> FusedMBConv:
        """Adopt a module's children.

        Args:
            original: computes the k x k convolution, ``act``, the projection, then ``+ x`` if ``residual``.
            conv, conv_norm, project, project_norm: dotted names of its convolutions and BatchNorms; None where there is none.
            act, residual, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        parts = {"conv": conv, "conv_norm": conv_norm, "project": project, "project_norm": project_norm}
        config = {"act": act, **_window(original.get_submodule(conv)), "residual": residual}
        return cls._adopt(original, parts, config, backend)

    def _compose(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.project(activations.activate(out if self.conv_norm is None else self.conv_norm(out), self._config["act"]))
        out = out if self.project_norm is None else self.project_norm(out)
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        return (x, *weights, c["act"], c["stride"], c["padding"], c["residual"])


class Lowtention(FusedBlock):
    """LowFormer's attention at reduced resolution and half the channels, as one operator in eval mode.

    [GroupNorm(1)] -> depthwise k x k, stride s, BatchNorm -> 1x1 to q, k, v -> softmax(q k^T / sqrt(d)) v -> transposed convolution
    with stride s -> crop [+ x]. (N, C, H, W) -> (N, C, H, W). Source: Nottebaum et al., WACV 2025, arXiv 2409.03460, section 3.

    Args:
        channels: C.
        num_heads: default max(1, floor(C / 60)), the paper's.
        head_dim: d; default floor((C // num_heads) / 2), the paper's.
        kernel_size: of the depthwise convolution, odd, at most 7.
        stride: 1 or 2.
        group_norm: with the GroupNorm in front.
        norm: BatchNorm after the depthwise convolution.
        residual: add x at the end.
        eps: of the GroupNorm.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "lowtention"
    _NORMS = ("norm",)
    _CONVS = ("dw", "qkv", "up")

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        group_norm: bool = True,
        norm: bool = True,
        residual: bool = True,
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        num_heads = max(1, channels // 60) if num_heads is None else num_heads
        if num_heads < 1:
            raise InputError(f"lowkernels.nn.{type(self).__name__}: num_heads is {num_heads}; allowed is 1 or more")
        head_dim = (channels // num_heads) // 2 if head_dim is None else head_dim
        inner = num_heads * head_dim
        self.norm = nn.GroupNorm(1, channels, eps=eps, **kind) if group_norm else None
        self.dw = _conv(channels, channels, kernel_size, stride, channels, False, kind)
        self.dw_norm = _norm(channels, norm, kind)
        self.qkv = _conv(channels, 3 * inner, 1, 1, 1, False, kind)
        self.up = nn.ConvTranspose2d(inner, channels, 3 if stride == 1 else 4, stride, padding=1, **kind)
        parts = {"norm": _path(self.norm, "norm"), "dw": "dw", "dw_norm": _path(self.dw_norm, "dw_norm")}
        config = {"num_heads": num_heads, "stride": stride, "residual": residual, "eps": eps}
        self._setup(parts | {"qkv": "qkv", "up": "up"}, config, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        norm: str | None = None,
        dw: str,
        dw_norm: str | None = None,
        qkv: str,
        up: str,
        num_heads: int,
        residual: bool,
        backend: str = "auto",
    ) -> Lowtention:
        """Adopt a module's children.

        Args:
            original: computes the block described above, with head-major q | k | v channels.
            norm, dw, dw_norm, qkv, up: dotted names of its GroupNorm, depthwise convolution, BatchNorm, 1x1 convolution and
                nn.ConvTranspose2d; None where there is none.
            num_heads, residual, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        parts = {"norm": norm, "dw": dw, "dw_norm": dw_norm, "qkv": qkv, "up": up}
        window = _window(original.get_submodule(dw))
        eps = 1e-5 if norm is None else float(getattr(original.get_submodule(norm), "eps", 0.0))
        config = {"num_heads": num_heads, "stride": window["stride"], "residual": residual, "eps": eps}
        return cls._adopt(original, parts, config, backend)

    def _check_parts(self) -> None:
        super()._check_parts()
        dw, up, qkv = self._part("dw"), self._part("up"), self._part("qkv")
        if dw.padding[0] != dw.kernel_size[0] // 2:
            self._wrong("dw", f"has padding {dw.padding}; allowed is kernel_size // 2")
        if up.stride != dw.stride or up.groups != 1:
            self._wrong("up", f"has stride {up.stride} and {up.groups} groups; allowed are the stride of dw and 1")
        if qkv.bias is not None:
            self._wrong("qkv", "has a bias; allowed is none")

    def _compose(self, x: Tensor) -> Tensor:
        out = x if self.norm is None else self.norm(group_norm_input(x, self.norm.weight, self.norm.bias))
        out = self.dw(out)
        qkv = self.qkv(out if self.dw_norm is None else self.dw_norm(out))
        heads = qkv.flatten(2).unflatten(1, (self._config["num_heads"], -1)).transpose(2, 3)
        o = F.scaled_dot_product_attention(*heads.chunk(3, dim=3)).transpose(2, 3).flatten(1, 2)
        out = self.up(o.unflatten(2, qkv.shape[2:]))[:, :, : x.shape[2], : x.shape[3]]
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        norm, (dw, dw_bias, qkv, _, up, up_bias) = weights[:2], weights[2:]
        return (x, *norm, c["eps"], dw, dw_bias, qkv, up, up_bias, c["num_heads"], c["stride"], c["residual"])


class GroupNormMLP(FusedBlock):
    """GroupNorm(1) -> 1x1 expansion -> activation -> 1x1 projection [+ x], as one operator in eval mode.

    (N, C, H, W) -> (N, C, H, W). Source: Nottebaum et al., WACV 2025, arXiv 2409.03460, section 3.

    Args:
        channels: C.
        expansion: expanded channels are ``round(channels * expansion)``.
        act: one of :data:`lowkernels.ops.ACTIVATIONS`.
        bias: the convolutions have one.
        residual: add x at the end.
        eps: of the GroupNorm.
        backend: a backend's name, or ``"auto"``.
        device, dtype: of the parameters.

    Raises:
        InputError: an argument is outside the contract.
        BackendError: ``backend`` is unknown or can never serve this block.
    """

    operator_name: ClassVar[str] = "gn_mlp"
    _NORMS = ("norm",)
    _CONVS = ("fc1", "fc2")

    def __init__(
        self,
        channels: int,
        *,
        expansion: float = 4.0,
        act: str = "gelu",
        bias: bool = True,
        residual: bool = True,
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = round(channels * expansion)
        self.norm = nn.GroupNorm(1, channels, eps=eps, **kind)
        self.fc1 = _conv(channels, hidden, 1, 1, 1, bias, kind)
        self.fc2 = _conv(hidden, channels, 1, 1, 1, bias, kind)
        config = {"act": act, "residual": residual, "eps": eps}
        self._setup({"norm": "norm", "fc1": "fc1", "fc2": "fc2"}, config, backend)

    @classmethod
    def from_module(
        cls,
        original: nn.Module,
        *,
        norm: str,
        fc1: str,
        fc1_norm: str | None = None,
        fc2: str,
        fc2_norm: str | None = None,
        act: str,
        residual: bool,
        backend: str = "auto",
    ) -> GroupNormMLP:
        """Adopt a module's children.

        Args:
            original: computes the block described above.
            norm, fc1, fc2: dotted names of its GroupNorm and 1x1 convolutions.
            fc1_norm, fc2_norm: dotted names of BatchNorms after them, if any.
            act, residual, backend: as in the constructor.

        Raises:
            InputError: a part is not what its role needs.
            BackendError: as in the constructor.
        """
        eps = getattr(original.get_submodule(norm), "eps", None)
        if eps is None:
            raise InputError(f"lowkernels.nn.{cls.__name__}: norm ({norm}) is no GroupNorm")
        parts = {"norm": norm, "fc1": fc1, "fc1_norm": fc1_norm, "fc2": fc2, "fc2_norm": fc2_norm}
        return cls._adopt(original, parts, {"act": act, "residual": residual, "eps": eps}, backend)

    def _compose(self, x: Tensor) -> Tensor:
        out = self.norm(group_norm_input(x, self.norm.weight, self.norm.bias))
        out = self.fc2(activations.activate(self.fc1(out), self._config["act"]))
        return out + x if self._config["residual"] else out

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        c = self._config
        norm, fcs = weights[:2], weights[2:]
        return (x, *norm, c["eps"], *fcs, c["act"], c["residual"])


def _window(conv: nn.Module) -> dict[str, int]:
    """Stride and padding of a convolution; what is not one, or has none, is found by the checks of its role."""
    stride, padding = getattr(conv, "stride", (1, 1)), getattr(conv, "padding", (0, 0))
    return {"stride": stride[0], "padding": padding[0] if isinstance(padding, tuple) else 0}
