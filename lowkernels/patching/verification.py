"""Is a module what a pattern says? A float64 copy with random weights is watched, rebuilt as the operator, and compared."""

from __future__ import annotations

import copy

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
# The largest block that is looked at as a whole: an inverted residual with squeeze-and-excitation has five convolutions.
_MOST_CONVOLUTIONS = 8
# How many different random numbers weights are made of. Prime, so that no two rows of a weight are alike.
_RANDOM_NUMBERS = 65537
# Half of float64's digits: rounding in another order stays far below, any other function is far above.
_SAME = torch.finfo(torch.float64).eps ** 0.5


def recognise(module: nn.Module) -> Match:
    """The operator ``module`` computes in eval mode, proven on random inputs.

    Args:
        module: left untouched; a copy is watched.

    Raises:
        NoMatch: it computes none of them; the message is the reason, for the user to read.
    """
    hooked = [name or "itself" for name, m in module.named_modules() if has_hooks(m)]
    if hooked:
        raise NoMatch(f"has hooks that would not run ({', '.join(hooked)})")
    twin = _random_twin(module)
    before = _python_state(twin)
    inputs, recordings = _watch(twin)
    if _python_state(twin) != before:
        raise NoMatch("its forward keeps state")
    if _arithmetic(recordings[0]) != _arithmetic(recordings[1]):
        raise NoMatch("does different things for different input sizes")
    problem = ""
    for match in find(twin, recordings[0]):
        try:
            block = match.build(twin, "eager")
            with use_backend("eager"), torch.no_grad():
                results = [block(x) for x in inputs]
        except LowkernelsError as error:
            problem = problem or _first_line(error)
            continue
        worst = max(_difference(result, recording.tensor) for result, recording in zip(results, recordings, strict=True))
        if worst <= _SAME:
            return match
        problem = f"looks like {match.module.operator_name}, but gives other numbers (relative difference {worst:.1e})"
    raise NoMatch(problem)


def _arithmetic(recording: Recording) -> list[str]:
    """The operations that compute something; how tensors are viewed in between may depend on sizes."""
    return [s.op for s in recording.steps if s.op not in LAYOUT_OPS]


def _difference(result: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float("inf") if result.shape != expected.shape else measure_error(result, expected).frobenius


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _random_twin(module: nn.Module) -> nn.Module:
    """A float64 CPU copy in eval mode whose weights are random: an initialisation with zeros or ones would hide what they do."""
    twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
    numbers = torch.randn(_RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def draw(tensor: Tensor) -> Tensor:
        return numbers.repeat(-(-tensor.numel() // _RANDOM_NUMBERS))[: tensor.numel()].reshape(tensor.shape)

    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(draw(tensor).abs() + 0.5)
            elif tensor.dim() > 1:
                # Twice the size that keeps variance, so that clamps and saturations are reached.
                tensor.copy_(draw(tensor) * 2 / max(1, tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(draw(tensor) * 0.5 + 1)
    return twin


def _watch(twin: nn.Module) -> tuple[list[Tensor], list[Recording]]:
    """Inputs the module runs on, and what it does with them."""
    convolutions = [m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)]
    problem = NoMatch("has no convolution that would tell how many channels it takes")
    # A mixed convolution takes as many as its parts together.
    for channels in dict.fromkeys((*convolutions[:1], *convolutions, sum(convolutions))):
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(n, channels, h, w, generator=generator, dtype=torch.float64) * 2 for n, h, w in _SIZES]
        try:
            return inputs, [record(twin, x) for x in inputs]
        except Exception as error:  # the module is anybody's code
            what = f"{type(error).__name__}: {_first_line(error)}"
            problem = NoMatch(f"does not run on one (N, C, H, W) tensor alone: {what}")
    raise problem


def _python_state(module: nn.Module) -> list[dict[str, int]]:
    """Which Python objects every submodule's attributes are."""
    hidden = {"_parameters", "_buffers", "_modules"}
    return [{k: id(v) for k, v in vars(m).items() if k not in hidden} for m in module.modules()]


def is_candidate(module: nn.Module) -> bool:
    """Whether it is worth watching: it holds a few convolutions, as a block does, and is neither a bare layer nor a list of blocks.

    Containers of blocks are never swapped as a whole: models index them and iterate over them.
    """
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and any(child._modules for child in children):
        return False
    convolutions = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.modules())
    return bool(children) and 1 <= convolutions <= _MOST_CONVOLUTIONS
