"""The base of the drop-in modules: one block of a model that runs as one operator in eval mode.

A block keeps the children of the module it replaces as its own, under their old names, so parameters and state dict stay what
they were. In train mode it runs the replaced module's own code. In eval mode it runs the operator on weights with BatchNorm folded
in and laid out for the backend. Those are kept and follow the parameters: every eager call compares the identity, version counter
and storage of each source with what they were when the weights were made, and makes them again where they differ.

Of the folded weights, what is the block's own is kept as non-persistent buffers. Two kinds take no memory and are plain attributes,
so that whoever writes to a module's buffers (DistributedDataParallel, averaging) does not write to them: a parameter's own memory,
where folding changes nothing; and stand-ins, where weights packed for a backend can be unpacked again and nobody reads plain ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import dispatch
from ..dispatch import Choice
from ..errors import BackendError, FrozenError, InputError
from ..ops import OPERATORS
from ..ops.operator import Operator, PackedWeights, Prepared, is_stand_in, looks, nobody_listens, stand_in
from .folding import fold

BlockT = TypeVar("BlockT", bound="FusedBlock")
_PLAIN_TENSORS = (Tensor, nn.Parameter)
# Leaf modules that compute the same in train and eval mode.
_MODELESS = (nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU)
_packing = threading.RLock()
# Names of the buffers and attributes that hold what is kept.
_FOLDED = tuple(f"_folded_{i}" for i in range(32))
_PACKED = tuple(f"_packed_{i}" for i in range(32))
# Input shapes a block remembers how to serve without asking anew.
PREPARED_KEPT = 16


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody registered a forward or backward hook on ``module`` itself."""
    return any(hook_dicts(module))


def hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def _count_fused_writes(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Kernels of optimizers with ``fused=True`` leave the versions as they were of the parameters they write."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if not p.is_inference()])


register_optimizer_step_post_hook(_count_fused_writes)


def check_is_module(model: object, function: str) -> None:
    """Raise InputError where a function of the package is given anything but a module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"lowkernels.{function}: argument model: is a {type(model).__name__}; allowed is a torch.nn.Module")


class FusedBlock(nn.Module):
    """A block of a model that runs as one operator in eval mode. Use its subclasses.

    Attributes:
        backend: the backend asked for: a name, or ``"auto"``.
    """

    operator_name: ClassVar[str]
    # Roles of convolutions, in the order the operator takes their weights. The BatchNorm after one has the role ``<role>_norm``.
    _CONVS: ClassVar[tuple[str, ...]]
    # Roles of GroupNorms, whose weights the operator takes before those of the convolutions, followed by eps.
    _NORMS: ClassVar[tuple[str, ...]] = ()
    # Whether the block computes with plain weights itself once it is frozen, so that stand-ins will not do.
    _READS_WEIGHTS: ClassVar[bool] = False

    backend: str
    _kept_dtype: torch.dtype | None
    # By backend, which of the packed tensors are for it; and the last of those that have any.
    _packed: dict[str, slice]
    _packed_last: str | None
    _signature: list[tuple[dict[str, Any], str, Tensor, int | None, int]] | None
    _last_call: tuple[Choice, int] | None
    _prepared: dict[tuple[Any, ...], Prepared]
    _lead: tuple[Any]
    # Of every child its attributes; and the dicts of children with what is in them. Blocks that are their only part have none.
    _attributes_of_children: Sequence[dict[str, Any]] = ()
    _places_of_children: Sequence[tuple[dict[str, Any], tuple[Any, ...]]] = ()
    # Whether this is a copy of a block with other children than it was made with.
    _exchanged: bool = False

    def _setup(self, parts: dict[str, str | None], config: dict[str, Any], backend: str, original: nn.Module | None = None) -> None:
        self.backend = dispatch.check_name(backend, f"lowkernels.nn.{type(self).__name__}: ")
        # In a tuple, so that it is not a child: its children are this block's already.
        self._original = (original,)
        self._parts = {role: path for role, path in parts.items() if path is not None}
        self._config = config
        self._frozen = False
        self._forget()
        self._check_parts()
        self._check_operator()
        self._watch()
        self.register_load_state_dict_post_hook(_after_load)
        self._refresh()

    @classmethod
    def _adopt(
        cls: type[BlockT], original: nn.Module, parts: dict[str, str | None], config: dict[str, Any], backend: str
    ) -> BlockT:
        kind = f"lowkernels.nn.{cls.__name__}: {type(original).__name__}"
        if any(v is not None for v in (*original._parameters.values(), *original._buffers.values())):
            raise InputError(f"{kind} has parameters or buffers of its own besides its children's")
        hooked = [name or "the module itself" for name, m in original.named_modules() if has_hooks(m)]
        if hooked:
            raise InputError(f"{kind} has hooks that would not run, on {', '.join(hooked)}")
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._modules.update(original._modules)
        block.training = original.training
        block._setup(parts, config, backend, original)
        return block

    @property
    def original(self) -> nn.Module | None:
        """The module this block was made from; None if it was not made from one, or is frozen."""
        original = self._original[0]
        if original is not None:
            # Its children are this block's, whatever was put in the place of one.
            original._modules.update(self._modules)
        return original

    @property
    def operator(self) -> Operator:
        """The operator this block runs in eval mode."""
        return OPERATORS[self.operator_name]

    @property
    def last_call(self) -> tuple[Choice, int] | None:
        """How the latest eager eval-mode forward was served: the dispatcher's choice, and the number of inputs copied to NHWC."""
        return self._last_call

    @property
    def frozen(self) -> bool:
        """Whether :func:`freeze` dropped the original weights."""
        return self._frozen

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: (N, C, H, W). In eval mode channels_last is read as it is, any other layout is copied once.

        Returns:
            The block's output; channels_last in eval mode.

        Raises:
            InputError: x does not fit the block.
            BackendError: the backend asked for by name cannot serve x.
        """
        if self.training or self.must_run_its_children():
            return self._ordinary(x)
        # PyTorch has no grad, jvp or vmap rules for operators defined in Python; the ordinary path has them all.
        if torch._C._are_functorch_transforms_active() and not self._frozen:
            return self._ordinary(x)
        if torch.compiler.is_compiling():
            weights, packed = self._traced_weights(x)
            return self._call_operator(x, weights, packed)
        if not nobody_listens(x) or (torch.is_grad_enabled() and not self._frozen):
            return self._dispatched(x)
        key = looks(x, self.backend_argument())
        prepared = self._prepared.get(key)
        if prepared is None or not (self._frozen or self.up_to_date()):
            out = self._dispatched(x)
            self._prepare(x, key)
            return out
        self.__dict__["_last_call"] = prepared.served
        return prepared.run(x)

    def _dispatched(self, x: Tensor) -> Tensor:
        weights, packed = self._eager_weights(x)
        out = self._call_operator(x, weights, packed)
        self.__dict__["_last_call"] = dispatch.last_call()
        return out

    def _prepare(self, x: Tensor, key: tuple[Any, ...]) -> None:
        """Settle what a call like the one just made will need: most of a small block's time is Python's."""
        with _packing:
            if not self._frozen and self._stale(self._compute_dtype(x.device.type)):
                return
            packed = self._packs_for(x)
            prepared = self.operator.prepare(x, self._arguments(x, self._kept_weights()), packed, self.backend_argument())
            if len(self._prepared) >= PREPARED_KEPT:
                self._prepared.clear()
            if prepared is not None:
                self._prepared[key] = prepared

    def _call_operator(self, x: Tensor, weights: list[Tensor | None], packed: PackedWeights | None) -> Tensor:
        tensors, packed_for = (None, None) if packed is None else (packed.tensors, packed.backend)
        out: Tensor = self.operator.overload(*self._arguments(x, weights), tensors, packed_for, self.backend_argument())
        return out

    def must_run_its_children(self) -> bool:
        """Whether a child was left in train mode (BatchNorm, dropout), is watched by a hook, was exchanged or given a forward of
        its own. Traces do not ask about the last two."""
        for module in self._mode_sensitive:
            if module.training:
                return True
        return any(self._hooks_of_children) or not (torch.compiler.is_compiling() or self.has_its_children())

    def has_its_children(self) -> bool:
        """Whether every child is the module it was, with the forward of its class."""
        if self._exchanged:
            return False
        for place, before in self._places_of_children:
            if tuple(place.values()) != before:
                return False
        return not any("forward" in attributes for attributes in self._attributes_of_children)

    def backend_argument(self) -> str | None:
        """The operator's ``backend`` argument: None asks the context and the environment."""
        return None if self.backend == dispatch.AUTO else self.backend

    def _ordinary(self, x: Tensor) -> Tensor:
        if self._frozen:
            raise FrozenError(f"lowkernels.nn.{type(self).__name__}: was frozen, so it has no weights to train and no children")
        original = self.original
        out: Tensor = self._compose(x) if original is None else original.forward(x)
        return out

    def _compose(self, x: Tensor) -> Tensor:
        """The ordinary path of a block that was not made from another module."""
        raise NotImplementedError

    def _arguments(self, x: Tensor, weights: list[Tensor | None]) -> tuple[Any, ...]:
        """The operator's arguments without the dispatch ones, for :meth:`_folded_weights` or what is kept of them."""
        raise NotImplementedError

    def _part(self, role: str) -> Any:
        path = self._parts.get(role)
        return None if path is None else self.get_submodule(path)

    def _wrong(self, role: str, problem: str) -> NoReturn:
        raise InputError(f"lowkernels.nn.{type(self).__name__}: {role} ({self._parts.get(role)}): {problem}")

    def _check_parts(self) -> None:
        """Every part is exactly of the kind its role needs; what shapes cannot tell, the operator's own checks do not see."""
        for role in self._CONVS:
            if role not in self._parts:
                self._wrong(role, "is missing")
        for role in self._parts:
            module = self._part(role)
            if role in self._NORMS:
                if not (isinstance(module, nn.GroupNorm) and module.num_groups == 1 and module.affine):
                    self._wrong(role, f"is {module}; allowed is an affine nn.GroupNorm with one group")
            elif role.endswith("_norm"):
                if not (isinstance(module, nn.BatchNorm2d) and module.track_running_stats):
                    self._wrong(role, f"is {module}; allowed is an nn.BatchNorm2d with running statistics")
                channels = getattr(self._part(role.removesuffix("_norm")), "out_channels", None)
                if module.num_features != channels:
                    self._wrong(role, f"has {module.num_features} features; allowed is {channels}, the convolution's channels")
            elif role == "up":
                if not (type(module) is nn.ConvTranspose2d and module.output_padding == (0, 0) and module.padding == (1, 1)):
                    self._wrong(role, f"is {module}; allowed is an nn.ConvTranspose2d with padding 1 and no output padding")
            elif not (type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)):
                self._wrong(role, f"is {module}; allowed is an nn.Conv2d with explicit zero padding")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                self._check_conv(role, module)

    def _check_conv(self, role: str, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        groups = conv.in_channels if role == "dw" else 1
        if conv.groups != groups:
            self._wrong(role, f"has {conv.groups} groups; allowed is {groups}")
        if role == "dw" and conv.out_channels != groups:
            self._wrong(role, f"has {conv.out_channels} output channels; allowed is {groups}, one for each input channel")
        if conv.dilation != (1, 1):
            self._wrong(role, f"has dilation {conv.dilation}; allowed is 1")
        for name, value in (("stride", conv.stride), ("padding", conv.padding), ("kernel_size", conv.kernel_size)):
            if value[0] != value[1]:
                self._wrong(role, f"has {name} {value}; allowed are equal ones for height and width")
        if conv.kernel_size == (1, 1) and role not in ("conv", "dw") and (conv.stride != (1, 1) or conv.padding != (0, 0)):
            self._wrong(role, f"is a 1x1 convolution with stride {conv.stride} and padding {conv.padding}; allowed are 1 and 0")

    def _check_operator(self) -> None:
        """The operator accepts these weights: asked on meta tensors, so nothing is computed."""
        weights = self._folded_weights(exact=False)
        meta = [w if w is None else torch.empty_like(w, device="meta", dtype=torch.float32) for w in weights]
        first = meta[2 * len(self._NORMS)]
        assert first is not None
        channels = first.shape[0] if self._CONVS[0] == "dw" else first.shape[1]
        x = torch.empty(1, channels, 16, 16, device="meta", dtype=torch.float32)
        self.operator.infer_shape(*self._arguments(x, meta))

    def _watch(self) -> None:
        """Note the children whose state decides between the operator and the ordinary path."""
        children = [m for m in self.modules() if m is not self]
        self._mode_sensitive = [
            m for m in children if isinstance(m, nn.BatchNorm2d) or (not m._modules and not isinstance(m, _MODELESS))
        ]
        self._hooks_of_children = [d for m in children for d in hook_dicts(m)]
        self._attributes_of_children = [m.__dict__ for m in children]
        self._places_of_children = [(m._modules, tuple(m._modules.values())) for m in (self, *children) if m._modules]
        # In a tuple, so that it is not a child. Frozen blocks have none.
        self._lead = (self._part(self._CONVS[0]),)

    def _folded_weights(self, exact: bool) -> list[Tensor | None]:
        """Two per role, GroupNorms first, as differentiable functions of the parameters."""
        weights: list[Tensor | None] = []
        for role in self._NORMS:
            norm = self._part(role)
            weights += [None, None] if norm is None else [norm.weight, norm.bias]
        for role in self._CONVS:
            weights += fold(self._part(role), self._part(f"{role}_norm"), exact)
        return weights

    def _live_weights(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [w if w is None else w.to(dtype) for w in self._folded_weights(exact=False)]

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        weight: Tensor = self._lead[0].weight
        # Meta tensors have no autocast, not even to ask about.
        if device_type != "meta" and torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device_type)
        return weight.dtype

    def _traced_weights(self, x: Tensor) -> tuple[list[Tensor | None], PackedWeights | None]:
        # Version counters cannot be compared in a trace: it takes the weights kept at its start. See repack().
        if not self._frozen:
            dtype = self._compute_dtype(x.device.type)
            needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
            if self._kept_dtype != dtype or needs_grad:
                return self._live_weights(dtype), None
        return self._kept_weights(), self._kept_packs(self._packed_last)

    def _eager_weights(self, x: Tensor) -> tuple[list[Tensor | None], PackedWeights | None]:
        if self._frozen:
            with _packing:
                # In this order, here and below: asking for packs brings plain weights back where the backend needs them.
                packs = self._packs_for(x)
                return self._kept_weights(), packs
        dtype = self._compute_dtype(x.device.type)
        if type(x) not in _PLAIN_TENSORS:
            # Fake tensors, functorch wrappers and the like must not leave traces in what is kept.
            return self._live_weights(dtype), None
        # Another thread may want another dtype (autocast): what is kept must not change between the check and the reading.
        with _packing:
            if self._stale(dtype):
                if any(type(t) not in _PLAIN_TENSORS or t.is_meta for _, _, t in self._sources()):
                    return self._live_weights(dtype), None
                self._make_weights(dtype)
            packs = self._packs_for(x)
            kept = self._kept_weights()
        # A traced graph (torch.jit) is checked without gradients and used with them.
        gradients = torch.is_grad_enabled() or torch._C._is_tracing()
        if gradients and any(p.requires_grad for p in self.parameters()):
            # The packed weights give the value; the live ones carry gradients back to the parameters.
            return self._live_weights(dtype), packs
        return kept, packs

    def _kept_weights(self) -> list[Tensor | None]:
        """Plain weights, or stand-ins for them; the block's own are buffers."""
        own = self._buffers
        return [own[name] if name in own else getattr(self, name) for name in _FOLDED[: self._folded_count]]

    def _kept_packs(self, backend: str | None) -> PackedWeights | None:
        """The weights packed for ``backend``; None if it reads them as they are."""
        if backend is None:
            return None
        names, buffers = _PACKED[self._packed[backend]], self._buffers
        return PackedWeights(backend, [cast(Tensor, buffers[name]) for name in names]) if names else None

    def _packs_for(self, x: Tensor) -> PackedWeights | None:
        """The weights packed for the backend that serves ``x`` best, which is only known now; made if they are not there yet."""
        weights = self._kept_weights()
        kept = weights[2 * len(self._NORMS)]
        assert kept is not None
        plain = type(x) in _PLAIN_TENSORS and not x.is_meta and not torch._C._is_tracing()
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if not plain or capturing or (x.dtype, x.device) != (kept.dtype, kept.device):
            return self._kept_packs(self._packed_last)
        backend = self.operator.serving(self._arguments(x, weights), self.backend_argument())
        if backend not in self._packed:
            with _packing, torch.inference_mode(False), torch.no_grad():
                self._make_packs(backend)
        return self._kept_packs(backend)

    def _sources(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Every tensor the folded weights depend on: the dict that holds it, its key there, itself."""
        for role in self._parts:
            # A part has children of its own where it is parametrized. BatchNorm's running statistics are written by a kernel that
            # leaves their version as it was, but num_batches_tracked counts those writes.
            for module in self._part(role).modules():
                for place in (module._parameters, module._buffers):
                    for key, tensor in place.items():
                        if tensor is not None:
                            yield place, key, tensor

    def _stale(self, dtype: torch.dtype) -> bool:
        return self._kept_dtype != dtype or not self.up_to_date()

    def up_to_date(self) -> bool:
        """Whether the sources are what they were when the weights were made, in whatever dtype."""
        if self._signature is None:
            return False
        for place, key, tensor, version, pointer in self._signature:
            if place.get(key) is not tensor or tensor.data_ptr() != pointer:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def _make_weights(self, dtype: torch.dtype) -> None:
        # Leaving inference mode turns gradients on, whatever they were.
        with torch.inference_mode(False), torch.no_grad():
            # Inference tensors count no versions.
            self._signature = [
                (place, key, t, None if t.is_inference() else t._version, t.data_ptr()) for place, key, t in self._sources()
            ]
            if dtype != self._kept_dtype:
                # They look the same in every dtype, and another thread may still be reading those that are there.
                self._keep("packed", ())
            self._folded_count = self._keep("folded", self._plain_weights(dtype))
            self._kept_dtype = dtype
            self._make_packs()

    def _plain_weights(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Folded anew from the parameters; those that folding leaves as they are stay where they are."""
        sources = self._source_pointers()
        return [w if w is None else _laid_out(w, dtype, sources) for w in self._folded_weights(exact=True)]

    def _source_pointers(self) -> set[int]:
        return {pointer for *_, pointer in self._signature or ()}

    def _make_packs(self, *more: str) -> None:
        """Pack for every backend there are packs for, in the same order, or for the first choice if that is none.

        With ``more``, the packs there are stay, and those for these backends are added.
        """
        if more:
            self._bring_back()
        weights = self.operator.weights(self._arguments(torch.empty(0), self._kept_weights()))
        tensors: list[Tensor] = []
        before, places = self._packed, {}
        for backend in (*before, *more) or (self.backend_argument(),):
            try:
                if more and backend in before:
                    packed = self._kept_packs(backend) or PackedWeights(backend, [])
                else:
                    packed = self.operator.pack(*weights, backend=backend)
            except BackendError:
                # It served these weights in another dtype.
                if backend not in before:
                    raise
                continue
            places[packed.backend] = slice(len(tensors), len(tensors) + len(packed.tensors))
            tensors += packed.tensors
        self._keep("packed", tensors)
        self._packed = places
        # Where it cannot be asked which backend is best for an input, as in a trace, it is taken to be the one that the inputs so
        # far turned out to need.
        self._packed_last = next((name for name in reversed(places) if places[name].stop > places[name].start), None)
        self._leave_stand_ins()

    def _leave_stand_ins(self) -> None:
        """Drop the plain weights of the block's own if every backend in use has packed ones, from which they could be had back."""
        if not self._packed or (self._frozen and self._READS_WEIGHTS):
            return
        if all(place.stop > place.start and self.operator.unpacks(backend) for backend, place in self._packed.items()):
            own = [self._buffers.get(name) for name in _FOLDED[: self._folded_count]]
            self._keep("folded", [kept if o is None else stand_in(o) for o, kept in zip(own, self._kept_weights(), strict=True)])

    def _bring_back(self) -> None:
        """Have plain weights again, for a backend that has to lay them out, or reads them as they are."""
        kept = self._kept_weights()
        if not any(map(is_stand_in, kept)):
            return
        if self._frozen:
            packed = self._kept_packs(self._packed_last)
            assert packed is not None
            call = self._arguments(torch.empty(0), kept)
            unpacked = self.operator.plain(call, packed.tensors, packed.backend)
            found = {id(old): new for old, new in zip(call, unpacked, strict=True)}
            self._keep("folded", [w if w is None else found[id(w)] for w in kept])
        else:
            assert self._kept_dtype is not None
            self._keep("folded", self._plain_weights(self._kept_dtype))

    def _keep(self, kind: str, tensors: Any) -> int:
        """Keep tensors; buffers of the same kind as before are written in place, so that captured graphs follow."""
        self._prepared = {}
        names = {"folded": _FOLDED, "packed": _PACKED}[kind]
        for name in names[len(tensors) :]:
            self._drop(name)
        others = self._source_pointers()
        for name, tensor in zip(names, tensors, strict=False):
            kept = self._buffers.get(name)
            if kept is not None and kept is tensor:
                continue
            if tensor is not None and (is_stand_in(tensor) or tensor.data_ptr() in others):
                self._drop(name)
                self.__dict__[name] = tensor
            elif (
                kept is not None
                and tensor is not None
                and not kept.is_inference()
                and (kept.shape, kept.stride(), kept.dtype, kept.device)
                == (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            ):
                kept.copy_(tensor)
            else:
                self._drop(name)
                self.register_buffer(name, tensor, persistent=False)
        return len(tensors)

    def _drop(self, name: str) -> None:
        self.__dict__.pop(name, None)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _forget(self) -> None:
        """Drop what is kept; the next use in eval mode makes it anew."""
        self._signature = None
        self._keep("folded", ())
        self._keep("packed", ())
        self._folded_count = 0
        self._kept_dtype = None
        self._packed, self._packed_last = {}, None
        self._last_call = None

    def _refresh(self) -> None:
        """In eval mode, make the weights now if need be, so that a trace or a capture finds them."""
        if self.training or self._frozen or not self.has_its_children():
            return
        if any(type(t) not in _PLAIN_TENSORS or t.is_meta for _, _, t in self._sources()):
            return
        dtype = self._part(self._CONVS[0]).weight.dtype
        if self._stale(dtype):
            with _packing:
                self._make_weights(dtype)

    def repack(self) -> None:
        """Make the folded and packed weights from the parameters again, whatever the version counters say, in place."""
        if self._frozen:
            raise FrozenError(f"lowkernels.nn.{type(self).__name__}: was frozen, so there are no parameters to repack from")
        self._check_parts()
        self._exchanged = False
        self._watch()
        if self.training:
            self._forget()
        else:
            with _packing:
                self._make_weights(self._kept_dtype or self._part(self._CONVS[0]).weight.dtype)

    def freeze(self) -> None:
        """Drop the original weights and every child; keep only what the operator reads. See :func:`lowkernels.freeze`."""
        self._check_freezable()
        if not self._frozen:
            self._refresh()
            with torch.inference_mode(False), torch.no_grad():
                if self._READS_WEIGHTS:
                    self._bring_back()
                # What was the parameters' own memory is the block's alone from now on, whoever else has the parameters.
                shared = self._source_pointers()
                kept = [w.clone() if w is not None and w.data_ptr() in shared else w for w in self._kept_weights()]
                self._signature = None
                self._frozen = True
                self._keep("folded", kept)
                self._leave_stand_ins()
            self._original = (None,)
            self._modules.clear()
            self._parts = {}
            self._watch()

    def _check_freezable(self) -> None:
        name = f"lowkernels.nn.{type(self).__name__}"
        if self.training or any(m.training for m in self._mode_sensitive):
            raise FrozenError(f"{name}: is in train mode, or a child of it is; call eval() before freezing")
        if any(self._hooks_of_children):
            raise FrozenError(f"{name}: has hooks on its children, which would never run again; remove them before freezing")
        if any(type(t) not in _PLAIN_TENSORS or t.is_meta for _, _, t in self._sources()):
            raise FrozenError(f"{name}: has parameters without data (meta or fake); load them before freezing")

    def train(self: BlockT, mode: bool = True) -> BlockT:
        if mode and self._frozen:
            raise FrozenError(
                f"lowkernels.nn.{type(self).__name__}: was frozen, so it cannot train; what a model's train() reached before it "
                "is in train mode now, and eval() takes that back"
            )
        super().train(mode)
        if self.original is not None:
            self.original.training = mode
        if mode:
            self._forget()
        else:
            self._refresh()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._prepared = {}
        if self._frozen:
            self._bring_back()
        else:
            self._forget()
        super()._apply(fn, recurse)
        if self._frozen:
            kept = self._kept_weights()[2 * len(self._NORMS)]
            assert kept is not None
            self._kept_dtype = kept.dtype
            if not kept.is_meta:
                self._packed = {}
                self._make_packs()
        else:
            self._refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self._frozen:
            # What is kept can be made again, and refers to the tensors it was made from.
            kept = {*_FOLDED, *_PACKED}
            state = {n: value for n, value in state.items() if n not in kept}
            state["_buffers"] = {n: b for n, b in self._buffers.items() if n not in kept}
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - kept
            state.update(_folded_count=0, _kept_dtype=None, _packed={}, _packed_last=None, _signature=None)
        for derived in ("_mode_sensitive", "_hooks_of_children", "_attributes_of_children", "_places_of_children", "_lead"):
            state.pop(derived, None)
        state.update(_last_call=None, _prepared={}, _exchanged=not self.has_its_children())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()
        self._refresh()

    def extra_repr(self) -> str:
        config = ", ".join(f"{k}={v!r}" for k, v in self._config.items())
        frozen = ", frozen" if self._frozen else ""
        return f"operator={self.operator_name}, backend={self.backend!r}, {config}{frozen}"


def _laid_out(weight: Tensor, dtype: torch.dtype, sources: set[int]) -> Tensor:
    """``weight`` in ``dtype`` and in the layout PyTorch's own channels_last convolutions want.

    Its own memory if it is one of ``sources``, parameters by address, and is all that already; otherwise a copy.
    """
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    as_it_is = weight.dtype == dtype and weight.is_contiguous(memory_format=layout) and weight.data_ptr() in sources
    # Autograd may want to save what is kept; it refuses inference tensors.
    if as_it_is and not weight.is_inference():
        # Sizes of 1 leave strides free.
        stride = torch.empty(weight.shape, device="meta", memory_format=layout).stride()
        return weight.detach().as_strided(weight.shape, stride)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=layout).copy_(weight)


def _after_load(block: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(block, FusedBlock)
    block._refresh()


def repack(model: nn.Module) -> nn.Module:
    """Make every block's folded and packed weights from the parameters again, in place.

    Eager calls notice changed parameters by themselves. Call this after changes that leave no trace in version counters (writes
    through ``.data`` or ``.numpy()``, parameters made in inference mode); where children were exchanged for others of their kind,
    which until then are called one by one; and whenever parameters change under a model that is already compiled, exported or
    captured in a CUDA graph. Exported and captured ones may read weights that folding does not change where the parameters are:
    they follow what is written into a parameter, not a tensor put in its place.

    Returns:
        ``model``.

    Raises:
        FrozenError: the model was frozen.
        InputError: a block's child is not of the kind it needs any more.
    """
    for module in list(model.modules()):
        if isinstance(module, FusedBlock):
            module.repack()
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Drop the original weights of every block, for deployment: only what the operators read stays in memory, packed if it can be.

    Afterwards the blocks have no parameters: ``state_dict()`` lacks theirs, and training, ``repack`` and ``restore`` raise
    :class:`~lowkernels.errors.FrozenError`. Checkpoints cannot be loaded: to ``load_state_dict`` the blocks' keys are unexpected
    ones, an error, or with ``strict=False`` part of what it returns. Moving to another device or dtype still works.

    Returns:
        ``model``.

    Raises:
        FrozenError: a block is in train mode, has hooks on its children, or its parameters have no data; nothing is frozen then.
    """
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    for block in blocks:
        block._check_freezable()
    for block in blocks:
        block.freeze()
    from .whole import forget  # it imports this module

    # What is called at once remembers the parameters it has to look after.
    forget(model)
    return model
