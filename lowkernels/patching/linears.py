"""Fully connected layers around the blocks: a classifier's single row is what PyTorch's matrix product is slowest at."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..nn.linear import Linear
from ..ops import OPERATORS
from ..report import Row
from ..testing import measure_error
from .patterns import LAYOUT_OPS, NoMatch
from .recording import record
from .trial import Exchanges, Trial
from .verification import DTYPES_WITHOUT_DATA, SAME, empty_twin, random_twin, unusual_handling

# Weights kept packed cost as much memory again: not worth it for the giants of old classifiers.
_MOST_WEIGHTS = 1 << 23
# Outputs whose numbers are compared: the operations watched are those of all.
_COMPARED = 64


def replace_linears(
    model: nn.Module, backend: str, trial: Trial, untouched: set[int], notes: dict[str, Row], exchanges: Exchanges
) -> int:
    """Exchange every nn.Linear that is called with one row an image, as classifiers are, outside the modules in ``untouched``.

    Those of transformers, which see a row a token, stay what they are: the operator would never be the faster one.

    Args:
        model: in eval mode.
        backend: what the operators run on.
        trial: the model's run on an example.
        untouched: modules to leave alone, by id.
        notes: gets one for each of these layers that is left.
        exchanges: gets the modules.

    Returns:
        The number of layers exchanged.

    Raises:
        BackendError: the backend asked for by name cannot serve the weights.
    """
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    replaced = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or isinstance(module, Linear) or not name or id(module) in untouched:
            continue
        if trial.dimensions.get(id(module)) != {2}:
            continue
        reason = "is used in two places" if places[id(module)] > 1 else _refusal(module)
        if reason:
            notes[name] = Row(name, type(module).__name__, False, "", reason)
            continue
        parent, _, child = name.rpartition(".")
        exchanges.put(model.get_submodule(parent), child, Linear(module, backend=backend))
        replaced += 1
    return replaced


def _refusal(linear: nn.Linear) -> str:
    """Why the layer stays, or nothing."""
    if linear.weight.numel() > _MOST_WEIGHTS:
        return f"has {linear.weight.numel():,} weights, too many to keep packed as well"
    unusual = unusual_handling(linear, nn.Linear)
    if unusual:
        return unusual
    try:
        twins = [random_twin(linear), *(empty_twin(linear, torch.device("cpu"), dtype) for dtype in DTYPES_WITHOUT_DATA)]
    except NoMatch as reason:
        return str(reason)
    twin = twins[0]
    assert isinstance(twin, nn.Linear)
    generator = torch.Generator().manual_seed(1)
    weight, bias = twin.weight[:_COMPARED, :, None, None], None if twin.bias is None else twin.bias[:_COMPARED]
    try:
        for rows in (1, 3):
            x = torch.randn(rows, linear.in_features, generator=generator, dtype=torch.float64, device="cpu")
            recordings = [record(candidate, x.to(candidate.weight)) for candidate in twins]  # type: ignore[arg-type]
            for recording in recordings:
                if [s.op for s in recording.steps if s.op not in (*LAYOUT_OPS, "t")] != ["mm" if bias is None else "addmm"]:
                    return "computes more, or something else, than a product with its weights"
            with torch.no_grad():
                result = OPERATORS["conv_act"].overload(x[:, :, None, None], weight, bias, backend="eager").flatten(1)
            expected = recordings[0].tensor[:, :_COMPARED]
            if result.shape != expected.shape or not measure_error(result, expected).frobenius <= SAME:
                return "gives other numbers than a product with its weights"
    except Exception as error:  # the layer is anybody's code
        return f"does not run alone: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""
