"""accelerate() and restore(): put drop-in modules into anyone's model, and take them out again."""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .. import dispatch
from ..errors import FrozenError
from ..nn.block import FusedBlock
from ..report import NOTES, Row
from .batchnorm import FoldedNorm, FoldedNormConv, fold_batch_norms
from .patterns import Match, NoMatch
from .verification import is_candidate, recognise

# Where accelerate() keeps what restore() needs besides the modules: the strides parameters had before channels_last.
_STRIDES = "_lowkernels_strides"


def accelerate(
    model: nn.Module,
    backend: str = "auto",
    *,
    fold_batch_norm: bool = True,
    channels_last: bool = True,
    copy: bool = False,
    example_input: Tensor | None = None,
) -> nn.Module:
    """Run every block of ``model`` that an operator serves as that operator, in eval mode; training stays as it was.

    A block is recognised by what it computes, never by its name: a float64 copy with random weights is watched on two small inputs,
    its operations must form exactly one of the operators, and the operator must then give the same numbers. Whatever is not exactly
    understood stays untouched. :func:`lowkernels.report` says what happened to each module and why, :func:`restore` undoes it.

    Parameters, buffers and the state dict stay the same objects under the same names; the blocks keep one copy of their weights with
    BatchNorm folded in, which follows changes (see :func:`lowkernels.repack` for those that cannot be seen).

    Args:
        model: any model, in train or eval mode, on any device; changed in place.
        backend: what the operators run on: ``"auto"`` or a backend's name.
        fold_batch_norm: also fold, in eval mode, each BatchNorm that follows a convolution outside the replaced blocks. To see which
            do, the model runs once on ``example_input``; this is skipped, with the reason in the report, where it does not run.
        channels_last: lay out the remaining convolutions' weights as channels_last too, which is how the blocks hand on their
            outputs. Left alone if nothing else was changed.
        copy: leave ``model`` alone and change a deep copy.
        example_input: what the model takes, one tensor; default: a random image of 64 x 64.

    Returns:
        ``model``, or its copy.

    Raises:
        BackendError: the backend asked for by name is unknown, or cannot serve the weights of a recognised block.
    """
    dispatch.check_name(backend)
    if copy:
        model = copying.deepcopy(model)
    notes: dict[str, Row] = dict(model.__dict__.get(NOTES, {}))
    swaps = list(_find_blocks(model, notes))
    replaced = [(parent, name, match.build(getattr(parent, name), backend)) for parent, name, match in swaps]
    inside = {id(m) for _, _, block in replaced for m in block.modules()}
    folded = fold_batch_norms(model, example_input, inside, notes) if fold_batch_norm else 0
    for parent, name, block in replaced:
        parent._modules[name] = block
    if channels_last and (replaced or folded):
        count = _to_channels_last(model)
        if count:
            reason = f"{count} weights of other convolutions laid out as channels_last"
            notes[""] = Row("", type(model).__name__, False, "", _join(notes.get(""), reason))
    model.__dict__[NOTES] = notes
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`, and ``kernels=`` of ``lowformer.create_model``: every module is the object it was before.

    Parameters and buffers are shared with the replaced modules, so their values stay; the layout of weights that were moved to
    channels_last is what it was.

    Returns:
        ``model``.

    Raises:
        FrozenError: the model was frozen, so there is nothing to go back to.
    """
    modules = list(model.modules())
    if any(isinstance(m, FusedBlock) and m.frozen for m in modules):
        raise FrozenError("lowkernels.restore: the model was frozen, so the original modules are gone")
    for parent in modules:
        for name, child in list(parent._modules.items()):
            original = child.original if isinstance(child, FusedBlock | FoldedNorm | FoldedNormConv) else None
            if original is not None:
                parent._modules[name] = original
    parameters = dict(model.named_parameters())
    for name, stride in model.__dict__.pop(_STRIDES, {}).items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.stride() != stride:
            plain = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
            parameter.data = plain.copy_(parameter.data)
    model.__dict__.pop(NOTES, None)
    return model


def _find_blocks(model: nn.Module, notes: dict[str, Row]) -> Iterator[tuple[nn.Module, str, Match]]:
    """Yield (parent, name, match) of every module to swap, outermost first; note why the others are not."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, Match]]:
        for name, child in parent.named_children():
            full = f"{prefix}{name}"
            if isinstance(child, FusedBlock | FoldedNorm | FoldedNormConv):
                continue
            if is_candidate(child):
                try:
                    if any(places[id(m)] > 1 for m in child.modules()):
                        raise NoMatch("is, or holds, a module that is used in two places")
                    yield parent, name, recognise(child)
                    continue
                except NoMatch as reason:
                    notes[full] = Row(full, type(child).__name__, False, "", str(reason))
            yield from walk(child, f"{full}.")

    if is_candidate(model):
        notes[""] = Row("", type(model).__name__, False, "", "the model itself cannot be swapped in place; its children can")
    yield from walk(model, "")


def _to_channels_last(model: nn.Module) -> int:
    """Lay out the weights of plain convolutions as channels_last; how many changed."""
    strides: dict[str, tuple[int, ...]] = model.__dict__.setdefault(_STRIDES, {})
    inside = {id(m) for b in model.modules() if isinstance(b, FusedBlock) for m in b.modules()}
    count = 0
    for name, module in model.named_modules():
        if id(module) in inside or not isinstance(module, nn.Conv2d | FoldedNormConv):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_contiguous(memory_format=torch.channels_last):
            strides.setdefault(f"{name}.weight", weight.stride())
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            count += 1
    return count


def _join(row: Row | None, reason: str) -> str:
    return reason if row is None else f"{row.reason}; {reason}"

