"""accelerate() and restore(): put drop-in modules into anyone's model, and take them out again."""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import dispatch
from ..errors import FrozenError
from ..nn.block import FusedBlock, check_is_module
from ..nn.chain import Chain, chain_blocks
from ..nn.whole import make_whole, unmake_whole
from ..report import NOTES, Row
from .batchnorm import FoldedNorm, FoldedNormConv, fold_batch_norms
from .linears import replace_linears
from .patterns import Match, NoMatch
from .trial import Exchanges, StandIn, Trial, eval_mode, run, undisturbed, unwrapped
from .verification import is_candidate, recognise, signature

# Where accelerate() keeps what restore() needs besides the modules: the strides parameters had before channels_last.
_STRIDES = "_lowkernels_strides"
_OURS = (FusedBlock, FoldedNorm)


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

    Parameters, buffers and the state dict stay the same objects under the same names; the blocks keep one copy of their weights
    with BatchNorm folded in, on GPUs another one laid out for the kernels, and these follow changes (see :func:`lowkernels.repack`
    for those that cannot be seen).

    A block can be an operator and still not be exchangeable: its caller may take it apart or read its attributes. So the model is
    also tried as a whole, on ``example_input`` in eval mode, before anything is exchanged for good. Where it does not run, that and
    the folding of BatchNorm are left out; the report says so.

    In a model that has blocks to exchange or BatchNorms to fold, the fully connected layers that get one row an image, as
    classifiers do, are exchanged by :class:`lowkernels.nn.Linear`, which runs small batches as the operator where that is faster.

    Args:
        model: any model, in train or eval mode, on any device; changed in place.
        backend: what the operators run on: ``"auto"`` or a backend's name.
        fold_batch_norm: also fold, in eval mode, each BatchNorm that follows a convolution outside the replaced blocks.
        channels_last: lay out the remaining convolutions' weights as channels_last too, which is how the blocks hand on their
            outputs. Left alone if nothing else was changed, and inside of a DistributedDataParallel, which cannot follow it:
            accelerate first, then wrap.
        copy: leave ``model`` alone and change a deep copy.
        example_input: what the model takes, one tensor; default: a random image of 64 x 64.

    Returns:
        ``model``, or its copy.

    Raises:
        BackendError: the backend asked for by name is unknown, or cannot serve the weights of a recognised block.
        InputError: ``model`` is no module.
    """
    check_is_module(model, "accelerate")
    dispatch.check_name(backend)
    if copy:
        model = copying.deepcopy(model)
    _accelerate(unwrapped(model), backend, fold_batch_norm, channels_last and not _is_parallel(model), example_input)
    return model


def _is_parallel(model: nn.Module) -> bool:
    """DistributedDataParallel lays its gradient buckets out like the parameters, once: if those change, gradients go wrong."""
    return any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())


def _accelerate(model: nn.Module, backend: str, fold_batch_norm: bool, channels_last: bool, example_input: Tensor | None) -> None:
    notes: dict[str, Row] = dict(model.__dict__.get(NOTES, {}))
    exchanges = Exchanges()
    strides: dict[str, tuple[int, ...]] = {}
    with undisturbed(model):
        try:
            with torch.device("cpu"):
                found = list(_find_blocks(model, notes))
            swaps = [_Swap(parent, name, full, _build(match, parent, name, backend)) for parent, name, full, match in found]
            with eval_mode(model):
                swaps, changed = _try(model, backend, example_input, swaps, fold_batch_norm, notes, exchanges)
            for swap in swaps:
                exchanges.put(swap.parent, swap.name, swap.block)
            for parent, name, chain in chain_blocks(model):
                exchanges.put(parent, name, chain)
            for module in model.modules():
                if isinstance(module, _OURS) and module.original is not None and module.original.training:
                    # Made or tried in eval mode, unlike what it replaces.
                    module.train()
            if channels_last and (swaps or changed):
                _to_channels_last(model, strides)
                if strides:
                    _note(model, notes, f"{len(strides)} weights of other convolutions laid out as channels_last")
        except BaseException:
            exchanges.undo()
            _lay_out(model, strides)
            raise
    model.__dict__[NOTES] = notes
    if strides:
        model.__dict__[_STRIDES] = {**strides, **model.__dict__.get(_STRIDES, {})}
    make_whole(model)


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`, and ``kernels=`` of ``lowformer.create_model``: every module is the object it was before.

    Parameters and buffers are shared with the replaced modules, so their values stay; the layout of weights that were moved to
    channels_last is what it was, but inside of a DistributedDataParallel, which could not follow it.

    Returns:
        ``model``.

    Raises:
        FrozenError: the model was frozen, so there is nothing to go back to.
        InputError: ``model`` is no module.
    """
    check_is_module(model, "restore")
    modules = list(model.modules())
    if any(isinstance(m, FusedBlock) and m.frozen for m in modules):
        raise FrozenError("lowkernels.restore: the model was frozen, so the original modules are gone")
    for parent in modules:
        for name, child in list(parent._modules.items()):
            original = child.original if isinstance(child, (*_OURS, Chain)) else None
            if original is not None:
                parent._modules[name] = original
    parallel = _is_parallel(model)
    for module in modules:
        unmake_whole(module)
        module.__dict__.pop(NOTES, None)
        strides = module.__dict__.pop(_STRIDES, {})
        if not parallel:
            _lay_out(module, strides)
    return model


def _lay_out(model: nn.Module, strides: dict[str, tuple[int, ...]]) -> None:
    """Give parameters the strides they had."""
    parameters = dict(model.named_parameters())
    for name, stride in strides.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.stride() != stride:
            plain = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
            parameter.data = plain.copy_(parameter.data)


@dataclass(frozen=True)
class _Swap:
    """A block to put in the place of ``parent``'s child ``name``; ``full`` is the dotted name."""

    parent: nn.Module
    name: str
    full: str
    block: FusedBlock


def _build(match: Match, parent: nn.Module, name: str, backend: str) -> FusedBlock:
    original = parent.get_submodule(name)
    block = match.build(original, backend)
    if block.training and backend != dispatch.AUTO and not any(p.is_meta for p in block.parameters()):
        # Weights are packed in eval mode only; whether they ever can be is to be known now.
        first = next(block.parameters())
        call = block._arguments(torch.empty(0), block._live_weights(first.dtype))
        weights = block.operator.weights(call)
        dispatch.choose(block.operator_name, first, backend, lambda kernel: kernel.unsupported_weights(*weights))
    return block


def _try(
    model: nn.Module,
    backend: str,
    example_input: Tensor | None,
    swaps: list[_Swap],
    fold_batch_norm: bool,
    notes: dict[str, Row],
    exchanges: Exchanges,
) -> tuple[list[_Swap], int]:
    """Exchange what is not a block, and leave out the blocks that their callers would miss.

    Returns:
        The blocks to swap, and how many other modules were exchanged.
    """
    blocks = [s.block for s in swaps] + [m for m in model.modules() if isinstance(m, FusedBlock)]
    inside = {id(m) for block in blocks for m in block.modules()}
    norms = any(isinstance(m, nn.BatchNorm2d) and id(m) not in inside for m in model.modules())
    if not swaps and not (norms and fold_batch_norm):
        return swaps, 0
    try:
        trial = run(model, example_input)
    except Exception as error:  # the model is anybody's code
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        _note(model, notes, f"not tried as a whole, and BatchNorm not folded: the model did not run on the example: {what}")
        return swaps, 0
    before = dict(notes)
    changed = fold_batch_norms(model, trial, inside, notes, exchanges) if fold_batch_norm else 0
    changed += replace_linears(model, backend, trial, inside, notes, exchanges)
    stand_ins = Exchanges()
    try:
        for swap in swaps:
            stand_ins.put(swap.parent, swap.name, StandIn(swap.parent.get_submodule(swap.name)))
        if not trial.problem(model):
            return swaps, changed
        stand_ins.undo()
        problem = trial.problem(model) if changed else ""
        if problem:
            exchanges.undo()
            notes.clear()
            notes.update(before)
            changed = 0
            _note(model, notes, f"nothing but blocks exchanged, BatchNorm not folded: {problem}")
        return [s for s in swaps if _is_only_called(model, trial, s, stand_ins, notes)], changed
    finally:
        stand_ins.undo()


def _is_only_called(model: nn.Module, trial: Trial, swap: _Swap, stand_ins: Exchanges, notes: dict[str, Row]) -> bool:
    """Whether the model does the same with no more of the block than a drop-in module offers; if not, a note says why."""
    original = swap.parent.get_submodule(swap.name)
    stand_ins.put(swap.parent, swap.name, StandIn(original))
    problem = trial.problem(model)
    if problem:
        swap.parent._modules[swap.name] = original
        reason = f"its caller does more with it than call it: without it, {problem}"
        notes[swap.full] = Row(swap.full, type(original).__name__, False, "", reason)
    return not problem


def _note(model: nn.Module, notes: dict[str, Row], reason: str) -> None:
    """Note something about the model as a whole."""
    before = notes.get("")
    if before is None or reason not in before.reason:
        notes[""] = Row("", type(model).__name__, False, "", reason if before is None else f"{before.reason}; {reason}")


def _find_blocks(model: nn.Module, notes: dict[str, Row]) -> Iterator[tuple[nn.Module, str, str, Match]]:
    """Yield (parent, name, dotted name, match) of every module to swap, outermost first; note why the others are not."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))

    known: dict[Hashable, Match | str] = {}

    def look_at(module: nn.Module) -> Match:
        if any(places[id(m)] > 1 for m in module.modules()):
            raise NoMatch("is, or holds, a module that is used in two places")
        key = signature(module)
        found = None if key is None else known.get(key)
        if found is None:
            try:
                found = recognise(module)
            except NoMatch as reason:
                found = str(reason)
            known[key] = found
        if isinstance(found, str):
            raise NoMatch(found)
        return found

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, Match]]:
        for name, child in parent.named_children():
            full = f"{prefix}{name}"
            if isinstance(child, _OURS):
                continue
            # What holds blocks from an earlier call has been looked at by that.
            if is_candidate(child) and not any(isinstance(m, _OURS) for m in child.modules()):
                try:
                    yield parent, name, full, look_at(child)
                    continue
                except NoMatch as reason:
                    notes[full] = Row(full, type(child).__name__, False, "", str(reason))
            yield from walk(child, f"{full}.")

    if is_candidate(model) and not any(isinstance(m, _OURS) for m in model.modules()):
        notes[""] = Row("", type(model).__name__, False, "", "the model itself cannot be swapped in place; its children can")
    yield from walk(model, "")


def _to_channels_last(model: nn.Module, strides: dict[str, tuple[int, ...]]) -> None:
    """Lay out the weights of plain convolutions as channels_last; ``strides`` gets what they were."""
    inside = {id(m) for b in model.modules() if isinstance(b, FusedBlock) for m in b.modules()}
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Conv2d) and id(module) not in inside
        weight = module._parameters.get("weight") if plain or isinstance(module, FoldedNormConv) else None
        if weight is not None and not weight.is_contiguous(memory_format=torch.channels_last):
            strides[f"{name}.weight"] = weight.stride()
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            if isinstance(module, FoldedNormConv):
                module._refresh()
