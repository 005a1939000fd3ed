"""Replay a model from CUDA graphs: at small batches, launching its kernels one by one takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import InputError

# A graph keeps the memory of its activations; what serves more shapes than this should not be graphed for each.
GRAPHS_KEPT = 16
_WARM_UPS = 2


class Graphed:
    """What :func:`graphed` returns."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self._model = model
        self._graphs: dict[tuple[torch.Size, torch.dtype, torch.device], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The input shapes there is a graph for."""
        return [tuple(shape) for shape, _, _ in self._graphs]

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output for ``x``; a graph is captured at the first input of a shape, dtype and device.

        Raises:
            InputError: x is not a CUDA tensor, or there are graphs of too many shapes already.
        """
        key = (x.shape, x.dtype, x.device)
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(x)
        graph, static_input, static_output = captured
        static_input.copy_(x)
        graph.replay()
        # The next replay overwrites the graph's own output.
        return static_output.clone()

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        if not x.is_cuda:
            raise InputError(f"lowkernels.graphed: argument x: is on {x.device}; CUDA graphs need a CUDA tensor")
        if len(self._graphs) >= GRAPHS_KEPT:
            raise InputError(
                f"lowkernels.graphed: argument x: has shape {tuple(x.shape)}, and there are graphs of {GRAPHS_KEPT} other shapes; "
                "each keeps memory of its own, so call the model itself for inputs of many shapes"
            )
        with torch.cuda.device(x.device), torch.no_grad():
            static_input = x.clone()
            # Lazy initialisation, compilation and choices between algorithms must be over before a capture, and off the
            # stream that is captured.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._model(static_input)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static_output: object = self._model(static_input)
        if not isinstance(static_output, Tensor):
            kind = type(static_output).__name__
            raise InputError(f"lowkernels.graphed: argument model: returns a {kind}; allowed is one tensor")
        return graph, static_input, static_output


def graphed(model: Callable[[Tensor], Tensor], example_input: Tensor) -> Graphed:
    """Capture a model's inference in a CUDA graph and return a callable that replays it.

    One graph is kept for each input shape, dtype and device, with buffers of its own: the first is captured here, others when
    their first input comes. A graph does not look at the weights' version: after changing them, call :func:`lowkernels.repack`
    and capture again. The output is a fresh tensor; no gradients.

    Args:
        model: from one tensor to one tensor, such as an accelerated module in eval mode, on any backend that runs on a GPU.
        example_input: a CUDA tensor of the first shape, with data the model can run on.

    Returns:
        A callable with the model's signature.

    Raises:
        InputError: no CUDA device, ``example_input`` is not on one, the model is in training mode or returns something else than
            one tensor.
    """
    if not torch.cuda.is_available():
        raise InputError("lowkernels.graphed: no CUDA device is available; on the CPU, call the model itself")
    if isinstance(model, nn.Module) and model.training:
        raise InputError("lowkernels.graphed: argument model: is in training mode; call model.eval() first")
    replayed = Graphed(model)
    replayed(example_input)
    return replayed
