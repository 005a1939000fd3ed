"""Is a module what a pattern says? A float64 copy with random weights is watched, rebuilt as the operator, and compared."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict, deque
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import use_backend
from ..errors import LowkernelsError
from ..nn.block import has_hooks
from ..testing import measure_error
from .patterns import LAYOUT_OPS, Match, NoMatch, find
from .recording import Recording, record

# (N, H, W) of the random inputs: odd and even, either side longer, one image and two, so that rules that differ show.
_SIZES = ((2, 5, 4), (1, 6, 7))
# What else it is run on without data, for which size costs nothing: rules that depend on the size or the dtype show.
_SIZES_WITHOUT_DATA = ((1, 14, 14), (8, 33, 64), (1, 224, 192), (200, 512, 800))
DTYPES_WITHOUT_DATA = (torch.float32, torch.float16, torch.bfloat16)
# The largest block that is looked at as a whole: an inverted residual with squeeze-and-excitation has five convolutions.
_MOST_CONVOLUTIONS = 8
# How many different random numbers weights are made of. Prime, so that no two rows of a weight are alike.
_RANDOM_NUMBERS = 65537
# Half of float64's digits: rounding in another order stays far below, any other function is far above.
SAME = torch.finfo(torch.float64).eps ** 0.5
# What a module may change about its own handling besides forward(); a drop-in module would not do it.
_HANDLING = (
    "__call__",
    "__getattr__",
    "_apply",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "_version",
    "eval",
    "get_extra_state",
    "load_state_dict",
    "named_parameters",
    "parameters",
    "requires_grad_",
    "set_extra_state",
    "state_dict",
    "to",
    "train",
)
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def recognise(module: nn.Module) -> Match:
    """The operator ``module`` computes in eval mode, proven on random inputs.

    Args:
        module: left untouched; copies are watched.

    Raises:
        NoMatch: it computes none of them; the message is the reason, for the user to read.
    """
    reason = unusual_handling(module, nn.Module)
    if reason:
        raise NoMatch(reason)
    twin = random_twin(module)
    before = _python_state(twin)
    inputs, recordings = _watch(twin)
    if _changed(before, _python_state(twin)):
        raise NoMatch("its forward keeps state")
    for recording in recordings:
        if not isinstance(recording.returned, Tensor):
            raise NoMatch(f"returns {type(recording.returned).__name__}, not one tensor")
        if recording.input_changed:
            raise NoMatch("changes its input in place")
        if recording.strangers:
            raise NoMatch("uses a tensor that is neither its input nor a parameter")
    matches = list(find(twin, recordings[0]))
    problem = _changes(module, inputs[0].shape[1], recordings)
    if problem:
        raise NoMatch(problem)
    for match in matches:
        try:
            block = match.build(twin, "eager")
            with use_backend("eager"), torch.no_grad():
                results = [block(x) for x in inputs]
        except LowkernelsError as error:
            problem = problem or _first_line(error)
            continue
        worst = max(_difference(result, recording.tensor) for result, recording in zip(results, recordings, strict=True))
        if worst <= SAME:
            return match
        problem = f"looks like {match.module.operator_name}, but gives other numbers (relative difference {worst:.1e})"
    raise NoMatch(problem)


def unusual_handling(module: nn.Module, usual: type[nn.Module]) -> str:
    """What about ``module``, besides its forward, a drop-in module in its place would not do as ``usual`` does; or nothing."""
    hooked = [name or "itself" for name, m in module.named_modules() if has_hooks(m)]
    if hooked:
        return f"has hooks that would not run ({', '.join(hooked)})"
    if any(vars(module).get(hooks) for hooks in _STATE_DICT_HOOKS):
        return "has hooks on its state dict"
    own = [n for n in _HANDLING if n in vars(module) or getattr(type(module), n, None) is not getattr(usual, n, None)]
    if own:
        return f"has its own {', '.join(own)}"
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return "has a forward of unknown arguments"
    if len(parameters) != 1 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        return f"takes ({', '.join(map(str, parameters))}), not one tensor alone"
    return ""


def _changes(module: nn.Module, channels: int, recordings: list[Recording]) -> str:
    """How ``module`` does different things for different inputs, or nothing."""
    if _arithmetic(recordings[0]) != _arithmetic(recordings[1]):
        return "does different things for different input sizes"
    twins = {dtype: empty_twin(module, torch.device("meta"), dtype) for dtype in DTYPES_WITHOUT_DATA}
    runs = [(torch.float32, size) for size in (*_SIZES, *_SIZES_WITHOUT_DATA)]
    runs += [(dtype, _SIZES[0]) for dtype in DTYPES_WITHOUT_DATA[1:]]
    first: list[Any] = []
    for dtype, (n, h, w) in runs:
        x = torch.empty(n, channels, h, w, dtype=dtype, device="meta")
        try:
            recording = record(twins[dtype], x)
        except Exception as error:  # the module is anybody's code
            return f"does not run on a tensor without data: {type(error).__name__}: {_first_line(error)}"
        if not isinstance(recording.returned, Tensor) or recording.returned.dtype != dtype:
            return f"does not return {dtype} for {dtype}"
        first = first or _arithmetic(recording)
        if _arithmetic(recording) != first:
            return f"does different things for different input {'sizes' if dtype is torch.float32 else 'dtypes'}"
    return ""


def _arithmetic(recording: Recording) -> list[Any]:
    """The operations that compute something, with their numbers; how tensors are viewed in between may depend on sizes.

    Casts are left out: attention in half precision casts its logits. The dtype they lead to is checked.
    """
    steps = [s for s in recording.steps if s.op not in LAYOUT_OPS and s.op != "_to_copy"]
    # A GroupNorm is told the sizes of its input; that its groups are one, the pattern has seen.
    return [(s.op, () if s.op == "native_group_norm" else [_numbers(v) for v in s.args.values()]) for s in steps]


def _numbers(found: Any) -> Any:
    if isinstance(found, list | tuple):
        return [_numbers(f) for f in found]
    return found if isinstance(found, bool | int | float | str) else None


def _difference(result: Tensor, expected: Tensor) -> float:
    return float("inf") if result.shape != expected.shape else measure_error(result, expected).frobenius


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def signature(module: nn.Module) -> Hashable:
    """All that ``module``'s computation can depend on, but for the values of its parameters: equal ones compute the same.

    Returns:
        What compares equal; None if it holds something whose equality says nothing.
    """
    order: dict[int, int] = {}
    parts: list[Hashable] = []
    try:
        for name, m in module.named_modules(remove_duplicate=False):
            parts.append((name, type(m), order.setdefault(id(m), len(order))))
            parts += [(k, _plain(v)) for k, v in vars(m).items() if k not in _TENSORS]
            for key, tensor in (*m._parameters.items(), *m._buffers.items()):
                parts.append((key, None if tensor is None else _tensor_signature(m, tensor, order)))
    except _NotPlain:
        return None
    return tuple(parts)


_TENSORS = ("_parameters", "_buffers", "_modules")


class _NotPlain(Exception):
    pass


def _plain(value: Any) -> Hashable:
    if value is None or isinstance(value, type | FunctionType | BuiltinFunctionType | torch.dtype):
        return value
    kind = type(value)
    if kind in (bool, int, float, str, torch.device):
        return kind, value
    if kind in (list, tuple, torch.Size):
        return kind, *map(_plain, value)
    if kind in (dict, OrderedDict):
        return kind, *((_plain(k), _plain(v)) for k, v in value.items())
    if kind in (set, frozenset) and all(type(v) is str for v in value):
        return kind, frozenset(value)
    raise _NotPlain


def _tensor_signature(module: nn.Module, tensor: Tensor, order: dict[int, int]) -> Hashable:
    if not tensor.is_floating_point() and not (isinstance(module, nn.BatchNorm2d) and tensor is module.num_batches_tracked):
        # An index may decide anything.
        raise _NotPlain
    return type(tensor), tuple(tensor.shape), tensor.dtype, order.setdefault(id(tensor), len(order))


def empty_twin(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode on another device, its floating tensors in ``dtype`` and without their values.

    Raises:
        NoMatch: the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise NoMatch(f"holds a {type(tensor).__name__}, which is no plain tensor")
        if tensor.is_floating_point():
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        elif tensor.is_meta and device.type != "meta":
            empty = torch.zeros_like(tensor, device=device)
        else:
            empty = tensor.detach().to(device, copy=True)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:  # the module is anybody's object
        raise NoMatch(f"cannot be copied: {type(error).__name__}: {_first_line(error)}") from error


def random_twin(module: nn.Module) -> nn.Module:
    """A float64 CPU copy in eval mode whose weights are random: an initialisation with zeros or ones would hide what they do.

    Raises:
        NoMatch: the module cannot be copied.
    """
    twin = empty_twin(module, torch.device("cpu"), torch.float64)
    numbers, start = _random_numbers(), 0
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if not tensor.is_floating_point():
                continue
            # Each starts where the one before ended, so that no two are alike, whatever their sizes.
            rolled = torch.cat([numbers[start:], numbers[:start]])
            drawn = rolled.repeat(-(-tensor.numel() // _RANDOM_NUMBERS))[: tensor.numel()].reshape(tensor.shape)
            start = (start + max(1, tensor.numel())) % _RANDOM_NUMBERS
            if name.endswith("running_var"):
                tensor.copy_(drawn.abs() + 0.5)
            elif tensor.dim() > 1:
                # Twice the size that keeps variance, so that clamps and saturations are reached.
                tensor.copy_(drawn).mul_(2 / max(1, tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(drawn).mul_(0.5).add_(1)
    return twin


@functools.cache
def _random_numbers() -> Tensor:
    return torch.randn(_RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _watch(twin: nn.Module) -> tuple[list[Tensor], list[Recording]]:
    """Inputs the module runs on, and what it does with them."""
    convolutions = [m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)]
    problem: NoMatch | None = None
    # A mixed convolution takes as many as its parts together.
    for channels in dict.fromkeys((*convolutions[:1], *convolutions, sum(convolutions))):
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(n, channels, h, w, generator=generator, dtype=torch.float64) * 2 for n, h, w in _SIZES]
        try:
            return inputs, [record(twin, x) for x in inputs]
        except Exception as error:  # the module is anybody's code
            # The first is the likeliest number, so its error says most.
            what = f"{type(error).__name__}: {_first_line(error)}"
            problem = problem or NoMatch(f"does not run on one (N, C, H, W) tensor alone: {what}")
    raise problem or NoMatch("has no convolution that would tell how many channels it takes")


def _python_state(module: nn.Module) -> tuple[list[Any], list[int]]:
    """The objects the attributes of ``module`` and its children are and hold, and how often each tensor was written.

    The objects themselves, not their ids: these are only unique among the living.
    """
    state: list[Any] = []
    for m in module.modules():
        for value in (v for k, v in vars(m).items() if k not in _TENSORS):
            state.append(value)
            if isinstance(value, list | tuple | set | frozenset | deque):
                state += value
            elif isinstance(value, dict):
                state += [*value.keys(), *value.values()]
            elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type | FunctionType):
                state += vars(value).values()
    state += [*module.parameters(), *module.buffers()]
    return state, [v._version for v in state if isinstance(v, Tensor)]


def _changed(before: tuple[list[Any], list[int]], after: tuple[list[Any], list[int]]) -> bool:
    if len(before[0]) != len(after[0]) or before[1] != after[1]:
        return True
    return any(one is not other for one, other in zip(before[0], after[0], strict=True))


def is_candidate(module: nn.Module) -> bool:
    """Whether it is worth watching: it holds a few convolutions, as a block does, and is neither a bare layer nor a list of blocks.

    Containers of blocks are never swapped as a whole: models index them and iterate over them.
    """
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and any(child._modules for child in children):
        return False
    convolutions = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.modules())
    return bool(children) and 1 <= convolutions <= _MOST_CONVOLUTIONS
