"""From an operator's contract to ``torch.ops.lowkernels.<name>``: schema, fake, dispatch, autograd and autocast, once for all.

``lowkernels::<name>`` belongs to Python. Its CPU and CUDA implementations are the same function, which asks the dispatcher for a
backend; backends register C++ operators, if they have any, under names of their own (``lowkernels_cuda::...``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..choosing.auto import ORDER
from ..dispatch import Choice, Kernel
from ..errors import BackendError, InputError

_LIBRARY = torch.library.Library("lowkernels", "DEF")
_DEVICE_KEYS = ("CPU", "CUDA")
# Appended to every operator's schema. ``packed_for`` names the backend that made ``packed``.
_DISPATCH_SCHEMA = "Tensor[]? packed=None, str? packed_for=None, str? backend=None"
_DISPATCH_ARGUMENTS = 3
# Decisions are cached per combination of shapes, dtypes, devices and configuration; cleared when full, which is only seen by
# programs that go through thousands of input sizes.
_PLANS_KEPT = 4096


class PackedWeights(NamedTuple):
    """Weights in one backend's own layout, made by a ``pack_<operator>`` function and valid for the arguments given there.

    Attributes:
        backend: the backend that made them; no other reads them.
        tensors: opaque; empty for backends that need no packing.
    """

    backend: str
    tensors: list[Tensor]


class _Plan(NamedTuple):
    kernel: Kernel | None
    choice: Choice
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Prepared(NamedTuple):
    """A call whose checks and dispatch are settled, for inputs that look just like one that was served before.

    Running it goes straight to the backend's kernel. That is only right where :func:`nobody_listens`, the input's :func:`looks` are
    the same as then, and so are the weights, which is the caller's to know.

    Attributes:
        served: (choice, inputs copied to NHWC), as :func:`lowkernels.dispatch.last_call` gives it.
    """

    kernel: Kernel
    call: tuple[Any, ...]
    stride: tuple[int, ...]
    served: tuple[Choice, int]

    def run(self, x: Tensor) -> Tensor:
        """The operator's output for ``x``."""
        if self.served[1]:
            x = nhwc(x)
        out = self.kernel.forward(x, *(x if v is _INPUT else v for v in self.call))
        dispatch.record(*self.served)
        return out if out.stride() == self.stride else _laid_out(out)


# In the place of an argument that is x itself.
_INPUT = object()


def looks(x: Tensor, backend: str | None) -> tuple[Any, ...]:
    """All that dispatch sees of an input and a request."""
    return x.shape, x.stride(), x.dtype, x.device, dispatch.requested(backend)


def nobody_listens(x: Tensor) -> bool:
    """Whether nothing between a call from Python and a kernel has a part in it: autograd, autocast, a trace, a mode, a subclass."""
    return (
        type(x) is Tensor
        and not x.is_meta
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def stand_in(weight: Tensor) -> Tensor:
    """What may take the place of a weight in a call that brings it packed too, for a backend that :meth:`Operator.unpacks`.

    It has the weight's shape, dtype and device, and takes no memory. All it holds is NaN, so that nobody takes it for the weight.
    """
    return torch.full((), math.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def is_stand_in(value: Any) -> bool:
    """Whether ``value`` is what :func:`stand_in` returns: known by its strides, which traces and copies keep."""
    return isinstance(value, Tensor) and value.dim() > 0 and not any(value.stride())


def nhwc(x: Tensor) -> Tensor:
    """``x`` with NHWC memory: itself if it already has it, a copy otherwise."""
    return x.contiguous(memory_format=torch.channels_last)


def _nhwc_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return (shape[1], 1)
    _, channels, height, width = shape
    return (channels * height * width, 1, channels * width, channels)


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _laid_out(out: Tensor) -> Tensor:
    """``out`` with exactly the strides that callers, and the fake, count on: sizes of 1 leave them free."""
    return _empty(out, tuple(out.shape)).copy_(out)


def _recording_autograd() -> Any:
    """A context in which autograd records, also inside a kernel that runs below it (as under a TorchDispatchMode)."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _unpack(operator: str, packed_for: str, packed: list[Tensor], weights: list[Tensor | None], wanted: list[int]) -> list[Tensor]:
    kernel: Any = dispatch.kernel(operator, packed_for)
    plain = kernel.unpack(packed, weights)
    return [_laid_out(plain[i]) for i in wanted]


def _fake_unpack(
    operator: str, packed_for: str, packed: list[Tensor], weights: list[Tensor | None], wanted: list[int]
) -> list[Tensor]:
    return [_empty(w, tuple(w.shape)) for w in (cast(Tensor, weights[i]) for i in wanted)]


# In the places ``wanted`` of an operator's weights: what was packed.
_LIBRARY.define(
    "unpack(str operator, str packed_for, Tensor[] packed, Tensor?[] weights, int[] wanted) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key in _DEVICE_KEYS:
    _LIBRARY.impl("unpack", _unpack, _key)
torch.library.register_fake("lowkernels::unpack", _fake_unpack, lib=_LIBRARY)


class Operator:
    """One operator of the library.

    Args:
        contract: the operator's ``contract.py``: ``NAME``; ``SCHEMA``, the arguments without the dispatch ones, starting with
            ``Tensor x``; ``INPUTS``, the names of those that are data rather than weights; and ``infer_shape``, which checks the
            arguments (raising :class:`~lowkernels.errors.InputError`) and returns the output's shape. It reads shapes, dtypes and
            devices only, and must not compare the batch size with anything but another input's.
        reference: the operator's ``reference.py``, whose ``forward`` is differentiable by autograd.

    Attributes:
        name: under ``torch.ops.lowkernels``.
        overload: the operator, as ``torch.ops`` has it.
        argument_names: of the schema without the dispatch arguments.
        infer_shape: the contract's.
        accumulation_length: the contract's: the longest sum one output element is made of, K of the error budget.
    """

    def __init__(self, contract: ModuleType, reference: ModuleType) -> None:
        self.name = name = contract.NAME
        schema = contract.SCHEMA
        self.infer_shape: Callable[..., tuple[int, ...]] = contract.infer_shape
        self.accumulation_length: Callable[..., int] = contract.accumulation_length
        self._reference: Callable[..., Tensor] = reference.forward
        self._plans: dict[Any, _Plan] = {}

        _LIBRARY.define(f"{name}({schema}, {_DISPATCH_SCHEMA}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        self.overload = getattr(torch.ops.lowkernels, name).default
        arguments = self.overload._schema.arguments
        self.argument_names = tuple(a.name for a in arguments[:-_DISPATCH_ARGUMENTS])
        self._inputs = frozenset(contract.INPUTS)
        self._defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)
        self._tensor_positions = tuple(i for i, a in enumerate(arguments[:-_DISPATCH_ARGUMENTS]) if "Tensor" in str(a.type))
        self._weight_positions = tuple(i for i in self._tensor_positions if arguments[i].name not in self._inputs)

        _LIBRARY.define(f"{name}_backward(Tensor grad, {schema}, *, bool[] needs) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
        self.backward_overload = getattr(torch.ops.lowkernels, f"{name}_backward").default
        for key in _DEVICE_KEYS:
            _LIBRARY.impl(name, self._run, key)
            _LIBRARY.impl(f"{name}_backward", self._backward, key)
            _LIBRARY.impl(name, self._autocast(key.lower()), f"Autocast{key}", with_keyset=True)
        torch.library.register_fake(f"lowkernels::{name}", self._fake, lib=_LIBRARY)
        torch.library.register_fake(f"lowkernels::{name}_backward", self._fake_backward, lib=_LIBRARY)
        torch.library.register_autograd(
            f"lowkernels::{name}", self._backward_formula, setup_context=self._setup_context, lib=_LIBRARY
        )

    def __repr__(self) -> str:
        return f"Operator({self.overload._schema})"

    def pack(self, *weights: Any, backend: str | None = None) -> PackedWeights:
        """Lay out weights for one backend, once, so that calls need not.

        Args:
            weights: the schema's arguments without ``x``, without other input tensors and without the dispatch arguments.
            backend: the backend to pack for; None asks the dispatcher, which knows everything but the input.

        Raises:
            BackendError: ``backend`` is unknown or can never serve these weights.
        """
        # The first weight may be a GroupNorm's; all share one device and dtype.
        like = next(w for w in weights if isinstance(w, Tensor))
        kernel, choice = dispatch.choose(self.name, like, backend, lambda candidate: candidate.unsupported_weights(*weights))
        return PackedWeights(choice.backend, kernel.pack(*weights))

    def unpacks(self, backend: str) -> bool:
        """Whether weights packed for ``backend`` can be had back, so that calls may bring stand-ins in their places.

        They can if its file has ``unpack(packed, weights)``. It gets the list that ``pack`` made and the tensors among the weights,
        of which it reads shapes only, and returns a tensor for each in the dtype they had; what it returns for None is ignored.
        """
        return hasattr(dispatch.kernel(self.name, backend), "unpack")

    def plain(self, call: tuple[Any, ...], packed: Sequence[Tensor] | None, packed_for: str | None) -> tuple[Any, ...]:
        """A whole call with weights in the places of stand-ins, a few roundings from what was packed.

        Args:
            call: the schema's arguments without the dispatch ones, all of them.
            packed, packed_for: of the call's weights.
        """
        if packed is None or not self._brings_stand_ins(call, packed_for):
            return call
        weights = [call[p] for p in self._weight_positions]
        wanted = [i for i, weight in enumerate(weights) if is_stand_in(weight)]
        found = torch.ops.lowkernels.unpack.default(self.name, packed_for, packed, weights, wanted)
        new = list(call)
        for i, weight in zip(wanted, found, strict=True):
            new[self._weight_positions[i]] = weight
        return tuple(new)

    def _brings_stand_ins(self, call: tuple[Any, ...], packed_for: str | None) -> bool:
        return packed_for is not None and any(is_stand_in(call[p]) for p in self._weight_positions) and self.unpacks(packed_for)

    def explain(self, *args: Any, backend: str | None = None) -> Choice:
        """Which backend would serve this call, and why; nothing is run.

        Args:
            args: the schema's arguments without the dispatch ones, trailing defaults may be left out.
            backend: as in a call.

        Raises:
            InputError, BackendError: as the call itself would.
        """
        call = self._complete(args)[:-_DISPATCH_ARGUMENTS]
        self.infer_shape(*call)
        return self._choose(call, backend)[1]

    def serving(self, call: tuple[Any, ...], backend: str | None) -> str:
        """The backend that serves a whole call, given weights packed for it; cheap once a call like it was made.

        Args:
            call: the schema's arguments without the dispatch ones, all of them.
            backend: as in a call.

        Raises:
            InputError, BackendError: as the call itself would.
        """
        return self._plan(call, backend, None).choice.backend

    def _complete(self, args: Sequence[Any]) -> tuple[Any, ...]:
        # The dispatcher leaves out trailing arguments that have their default value.
        return (*args, *self._defaults[len(args) :])

    def weights(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a whole call that :meth:`pack` takes: all but the input tensors."""
        return tuple(v for name, v in zip(self.argument_names, call, strict=True) if name not in self._inputs)

    def _choose(self, call: tuple[Any, ...], backend: str | None, packed_for: str | None = None) -> tuple[Kernel, Choice]:
        weights = self.weights(call)
        return dispatch.choose(
            self.name,
            call[0],
            backend,
            lambda kernel: kernel.unsupported_weights(*weights) or kernel.unsupported_input(*call),
            call,
            packed_for,
        )

    def _plan(self, call: tuple[Any, ...], backend: str | None, packed_for: str | None) -> _Plan:
        key = (
            dispatch.requested(backend),
            packed_for,
            *((v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in call),
        )
        plan = self._plans.get(key)
        if plan is None:
            shape = self.infer_shape(*call)
            empty = call[0].shape[0] == 0
            kernel, choice = self._choose(call, backend, packed_for)
            plan = _Plan(None if empty else kernel, choice, shape, _nhwc_stride(shape))
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _run(self, *args: Any) -> Tensor:
        *call_list, packed, packed_for, backend = self._complete(args)
        call = tuple(call_list)
        x: Tensor = call[0]
        kernel, choice, shape, stride = self._plan(call, backend, packed_for)
        if packed is not None and packed_for is None:
            raise InputError(f"lowkernels.{self.name}: argument packed_for: is None; name the backend that made packed")
        if kernel is None:
            dispatch.record(choice, 0)
            return _empty(x, shape)
        if packed is not None and packed_for != choice.backend:
            kernel, choice, call, packed = self._without_packs(kernel, choice, call, packed, packed_for, backend)
        copies = 0
        if not x.is_contiguous(memory_format=torch.channels_last):
            x, copies = nhwc(x), 1
        out = kernel.forward(x, *call[1:], packed)
        dispatch.record(choice, copies)
        return out if out.stride() == stride else _laid_out(out)

    def _without_packs(
        self,
        kernel: Kernel,
        choice: Choice,
        call: tuple[Any, ...],
        packed: list[Tensor],
        packed_for: str,
        backend: str | None,
    ) -> tuple[Kernel, Choice, tuple[Any, ...], list[Tensor] | None]:
        """How a call is served whose packed weights are not for the backend chosen: kernel, choice, arguments, packed weights."""
        if not self._brings_stand_ins(call, packed_for) or dispatch.requested(backend)[0] != dispatch.AUTO:
            return kernel, choice, self.plain(call, packed, packed_for), None
        # Nobody insists, and unpacking on every call takes longer than another backend can save.
        try:
            plan = self._plan(call, packed_for, packed_for)
        except BackendError:
            return kernel, choice, self.plain(call, packed, packed_for), None
        why = f"the weights at hand are laid out for it, and no longer as {choice.backend} reads them"
        return cast(Kernel, plan.kernel), replace(plan.choice, reason=why, basis=ORDER), call, packed

    def prepare(self, x: Tensor, call: tuple[Any, ...], packed: PackedWeights | None, backend: str | None) -> Prepared | None:
        """What :class:`Prepared` does for inputs like ``x`` of this call; None where ``x`` is empty.

        Args:
            x: the call's input.
            call: the schema's arguments without the dispatch ones, all of them, as they were served before.
            packed: of the call's weights.
            backend: as in a call.
        """
        kernel, choice, _, stride = self._plan(call, backend, packed.backend if packed else None)
        if kernel is None:
            return None
        tensors = None if packed is None else packed.tensors
        if packed is not None and packed.backend != choice.backend:
            kernel, choice, call, tensors = self._without_packs(kernel, choice, call, packed.tensors, packed.backend, backend)
        rest = (*call[1:], tensors)
        settled = tuple(_INPUT if v is x else v for v in rest)
        copies = int(not x.is_contiguous(memory_format=torch.channels_last))
        return Prepared(kernel, settled, stride, (choice, copies))

    def _fake(self, *args: Any) -> Tensor:
        call = self._complete(args)[:-_DISPATCH_ARGUMENTS]
        return _empty(call[0], self.infer_shape(*call))

    def _autocast(self, device_type: str) -> Callable[..., Tensor]:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
            torch._C.DispatchKey.AutocastCUDA
        )

        def eligible(value: Any) -> bool:
            return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64

        def autocast(_keyset: Any, *args: Any) -> Tensor:
            dtype = torch.get_autocast_dtype(device_type)
            call, rest = self._complete(args)[:-_DISPATCH_ARGUMENTS], self._complete(args)[-_DISPATCH_ARGUMENTS:]
            # Packed weights belong to the dtype they were made for; what dtype the input came in is nothing to them.
            if any(eligible(w) and w.dtype != dtype for w in self.weights(call)):
                call, rest = self.plain(call, *rest[:2]), (None, None, rest[2])
            casted = tuple(v.to(dtype) if eligible(v) else v for v in call)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*casted, *rest)

        return autocast

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call, (packed, packed_for, _) = inputs[:-_DISPATCH_ARGUMENTS], inputs[-_DISPATCH_ARGUMENTS:]
        bare = self._brings_stand_ins(call, packed_for)
        ctx.packed_for = packed_for if bare else None
        ctx.save_for_backward(*(call[i] for i in self._tensor_positions), *(packed if bare else ()))
        ctx.call = tuple(None if i in self._tensor_positions else v for i, v in enumerate(call))

    def _backward_formula(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        call = list(ctx.call)
        count = len(self._tensor_positions)
        for position, tensor in zip(self._tensor_positions, saved[:count], strict=True):
            call[position] = tensor
        call = list(self.plain(tuple(call), saved[count:], ctx.packed_for))
        # One entry per argument the dispatcher passed on; it leaves out trailing defaults, and those need no gradient.
        given = ctx.needs_input_grad
        needs = [i < len(given) and given[i] for i in self._tensor_positions]
        if torch.is_grad_enabled():
            # Somebody wants gradients of these gradients (create_graph=True): keep the recomputed forward's graph.
            grads = iter(self._reference_grads(grad, call, needs, create_graph=True))
        else:
            grads = iter(self.backward_overload(grad, *call, needs=needs))
        by_position: dict[int, Tensor] = {i: next(grads) for i, need in zip(self._tensor_positions, needs, strict=True) if need}
        # ``packed`` is a list, and wants a list of the same length back.
        return tuple([None] * len(g) if isinstance(g, list) else by_position.get(i) for i, g in enumerate(given))

    def _backward(self, grad: Tensor, *args: Any, needs: Sequence[bool]) -> list[Tensor]:
        # Recomputes the forward through the reference: the operators are for inference first, and keep nothing for training.
        call = list(self._complete(args)[: len(self.argument_names)])
        for position, need in zip(self._tensor_positions, needs, strict=True):
            if call[position] is not None:
                call[position] = call[position].detach().requires_grad_(need)
        grads = self._reference_grads(grad, call, needs, create_graph=False)
        wanted = [call[i] for i, need in zip(self._tensor_positions, needs, strict=True) if need]
        return [self._laid_out_like(t, g, grad) for g, t in zip(grads, wanted, strict=True)]

    def _reference_grads(self, grad: Tensor, call: list[Any], needs: Sequence[bool], create_graph: bool) -> list[Tensor]:
        wanted = [call[i] for i, need in zip(self._tensor_positions, needs, strict=True) if need]
        with torch.enable_grad(), _recording_autograd():
            out = self._reference(*call, None)
        return list(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, materialize_grads=True))

    @staticmethod
    def _laid_out_like(tensor: Tensor, result: Tensor, incoming: Tensor) -> Tensor:
        out = torch.empty_like(tensor)
        # An operator's outputs never share memory with its inputs; the gradient of an addition does.
        fresh = result.data_ptr() != incoming.data_ptr()
        return result if fresh and result.stride() == out.stride() else out.copy_(result)

    def _fake_backward(self, grad: Tensor, *args: Any, needs: Sequence[bool]) -> list[Tensor]:
        call = self._complete(args)
        return [torch.empty_like(call[i]) for i, need in zip(self._tensor_positions, needs, strict=True) if need]
