"""A fully connected layer as conv_act on images of one pixel, wherever that is faster than PyTorch's own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from ..choosing.auto import REQUESTED
from ..dispatch import Choice
from ..errors import InputError
from ..ops.activations import activate
from .block import PREPARED_KEPT, FusedBlock, has_hooks

# Rows up to which the operator is the faster one, by backend; where there is none it never is. On a CPU reading the weights is all
# there is to a row or two, and packed ones are read in one stream; with more rows PyTorch's matrix products are better. On a GPU up
# to 16 rows are one tile of the kernel that divides the depth among its warps: one launch instead of two or three.
FASTER_UP_TO = {"cpu": 2, "cuda": 16}


class Linear(FusedBlock, nn.Linear):
    """A fully connected layer with activation, in eval mode as one operator for the few rows of a small batch.

    (N, C_in) -> (N, C_out). A backend asked for by name serves any number of rows. Everything else (many rows, inputs of more
    dimensions, backends that are slower at it, gradients, train mode, compiled graphs) runs the original's own code. To those who
    look it is an nn.Linear: weight, bias, in_features and out_features are the original's.

    Args:
        original: an nn.Linear, or a subclass that computes the same; this shares its parameters and stands in its place.
        act: applied to the result, of :data:`lowkernels.ops.ACTIVATIONS`.
        backend: a backend's name, or ``"auto"``.

    Raises:
        InputError: ``original`` is no nn.Linear, has more than weight and bias, or has hooks.
        BackendError: ``backend`` is unknown or can never serve these weights.
    """

    operator_name: ClassVar[str] = "conv_act"
    _CONVS = ("linear",)
    # Unpacking takes as long as the product of dozens of rows (1280 x 1000 in float32: 1.7 ms), which plain ones are for.
    _READS_WEIGHTS = True

    def __init__(self, original: nn.Linear, *, act: str = "none", backend: str = "auto") -> None:
        own = {name for name, _ in (*original.named_parameters(), *original.named_buffers())}
        if not isinstance(original, nn.Linear) or own - {"weight", "bias"}:
            what = f"is {type(original).__name__} with {', '.join(sorted(own)) or 'no parameters'}"
            raise InputError(f"lowkernels.nn.Linear: argument original: {what}; allowed is an nn.Linear with weight and bias alone")
        if has_hooks(original):
            raise InputError("lowkernels.nn.Linear: argument original: has hooks that would not run")
        nn.Module.__init__(self)
        self._parameters = original._parameters
        self.in_features, self.out_features = original.in_features, original.out_features
        self.training = original.training
        # By input, whether the operator is faster, and what is said where it is not.
        self._decisions: dict[Any, Choice | None] = {}
        self._setup({"linear": ""}, {"act": act}, backend, original)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., C_in).

        Returns:
            (..., C_out).
        """
        if (
            self.training
            or x.dim() != 2
            or type(x) is not Tensor
            or x.is_meta
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch._C._is_tracing()
            or torch._C._are_functorch_transforms_active()
        ):
            return self._plain(x)
        slower = self._slower(x)
        if slower is not None:
            self.__dict__["_last_call"] = (slower, 0)
            return self._plain(x)
        return super().forward(x[:, :, None, None]).flatten(1)

    def _slower(self, x: Tensor) -> Choice | None:
        """What is reported if PyTorch's own product serves ``x``; None if the operator does."""
        autocast = torch.is_autocast_enabled(x.device.type)
        key = x.shape, x.dtype, x.device, autocast, dispatch.requested(self.backend_argument())
        if key not in self._decisions:
            if len(self._decisions) >= PREPARED_KEPT:
                self._decisions.clear()
            self._decisions[key] = self._decide(x)
        return self._decisions[key]

    def _decide(self, x: Tensor) -> Choice | None:
        weights = self._kept_weights() if self.frozen else self._live_weights(self._compute_dtype(x.device.type))
        assert weights[0] is not None
        image = torch.empty(x.shape[0], self.in_features, 1, 1, dtype=weights[0].dtype, device=x.device)
        choice = self.operator.explain(*self._arguments(image, weights), backend=self.backend_argument())
        most = FASTER_UP_TO.get(choice.backend, 0)
        if x.shape[0] <= most or (choice.basis == REQUESTED and choice.backend != "eager"):
            return None
        if choice.backend == "eager":
            return choice
        few = f", which is for at most {most} row{'s' * (most > 1)}" if most else ""
        return Choice(self.operator_name, "eager", f"PyTorch's own product is faster than {choice.backend}'s{few}", choice.rejected)

    def _plain(self, x: Tensor) -> Tensor:
        if self.frozen:
            weight, bias = self._kept_weights()
            assert weight is not None
            out = F.linear(x, weight.flatten(1), bias)
        else:
            out = self._part("linear").forward(x)
        return activate(out, self._config["act"])

    def _part(self, role: str) -> Any:
        return self._original[0]

    def _check_parts(self) -> None:
        """The constructor has seen that it is an nn.Linear."""

    def _watch(self) -> None:
        self._mode_sensitive = []
        self._hooks_of_children = []
        self._lead = (self._original[0],)

    def _folded_weights(self, exact: bool) -> list[Tensor | None]:
        linear = self._part("linear")
        return [linear.weight[:, :, None, None], linear.bias]

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        return (x, *weights, self._config["act"], 1, 0, None, False)

    def _forget(self) -> None:
        self._decisions = {}
        super()._forget()

    def freeze(self) -> None:
        """Drop the original weights, as :func:`lowkernels.freeze` does with every block."""
        super().freeze()
        self._parameters = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decisions": {}}
