"""The kernels on a real GPU: results on every LowFormer layer, the same bits every time, CUDA graphs, streams, launch counts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowformer
import lowkernels
from lowkernels.ops import OPERATORS
from lowkernels.testing import assert_within_budget, check_call, random_call
from tests.triton.cases import CASES, call

pytest.importorskip("triton", reason="the Triton package is not installed")
layers = pytest.importorskip("lowkernels.backends.triton.layers")
launch = pytest.importorskip("lowkernels.backends.triton.launch")

pytestmark = pytest.mark.gpu
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
LAYERS = {(size, layers.name(layer)): layer for size in (224, 512) for layer in layers.layers(size)}


@pytest.fixture(autouse=True)
def _unwritten_memory_shows() -> Iterator[None]:
    """Allocations are filled with NaN; convolutions of the eager reference may use any algorithm."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype of a kind of arithmetic, with PyTorch's tf32 flags set for it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield DTYPES[request.param]
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def run(operator: str, args: tuple[Any, ...]) -> Tensor:
    packed = OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend="triton")
    return OPERATORS[operator].overload(*args, packed.tensors, packed.backend, "triton")


@pytest.mark.parametrize("arithmetic", list(DTYPES), indirect=True)
@pytest.mark.parametrize(("operator", "number"), [(op, n) for op in CASES for n in range(len(CASES[op]))])
def test_nasty_case(operator: str, number: int, arithmetic: torch.dtype) -> None:
    check_call(*call(operator, number, arithmetic, "cuda"), backend="triton")


@pytest.mark.parametrize("arithmetic", list(DTYPES), indirect=True)
@pytest.mark.parametrize("key", list(LAYERS), ids=lambda key: f"{key[1]} at {key[0]}")
def test_layer_as_in_a_large_batch(key: tuple[int, str], arithmetic: torch.dtype) -> None:
    """A device of one processor has many tiles for it even in a small batch: the configurations of large batches are run."""
    made = layers.random_layer(LAYERS[key], 3, arithmetic, "cuda")
    with launch.planning_for(launch.Target(launch.target(made.args[0]).arch, 1)):
        check_call(*made, backend="triton")


@pytest.mark.parametrize("arithmetic", ["float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("key", [key for key in LAYERS if key[0] == 224], ids=lambda key: f"{key[1]} at {key[0]}")
def test_layer_alone(key: tuple[int, str], arithmetic: torch.dtype) -> None:
    check_call(*layers.random_layer(LAYERS[key], 1, arithmetic, "cuda"), backend="triton")


@pytest.mark.parametrize("batch", [64, 257])
@pytest.mark.parametrize("key", [key for key in LAYERS if key[0] == 224], ids=lambda key: f"{key[1]}")
def test_same_bits_100_times(key: tuple[int, str], batch: int) -> None:
    """A missing barrier between the phases of a kernel would show here first."""
    operator, args = layers.random_layer(LAYERS[key], batch, torch.float16, "cuda")
    packed = OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend="triton")
    first = OPERATORS[operator].overload(*args, *reversed(packed), "triton")
    for _ in range(100):
        assert torch.equal(OPERATORS[operator].overload(*args, *reversed(packed), "triton"), first)


@pytest.mark.parametrize("operator", list(CASES))
def test_captured_in_a_graph(operator: str) -> None:
    """After one warm-up, capture and replay; the replay reads what the input holds then."""
    args = list(call(operator, 1, torch.float16, "cuda").args)
    packed = OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend="triton")
    other = torch.randn_like(args[0])
    expected = OPERATORS[operator].overload(other, *args[1:], *reversed(packed), "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPERATORS[operator].overload(*args, *reversed(packed), "triton")
    args[0].copy_(other)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("operator", list(CASES))
def test_on_two_streams(operator: str) -> None:
    args = call(operator, 1, torch.float16, "cuda").args
    expected = run(operator, args)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, outs in zip(streams, found, strict=True):
            with torch.cuda.stream(stream):
                outs.append(run(operator, args))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for outs in found for out in outs)


@pytest.mark.parametrize("operator", list(CASES))
def test_one_launch(operator: str) -> None:
    args = random_call(operator, channels=32, dtype=torch.float16, device="cuda").args
    packed = OPERATORS[operator].pack(*OPERATORS[operator].weights(args), backend="triton")
    torch.use_deterministic_algorithms(False)
    OPERATORS[operator].overload(*args, *reversed(packed), "triton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        OPERATORS[operator].overload(*args, *reversed(packed), "triton")
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels


def test_offsets_beyond_32_bits() -> None:
    """The last image of a tensor of more than 2**31 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    for operator in CASES:
        made = random_call(operator, channels=32, batch=1, height=64, width=64, hidden=32, dtype=torch.float16, device="cuda")
        image = made.args[0]
        batch = 2**31 // image.numel() + 2
        x = torch.zeros((batch, *image.shape[1:]), dtype=torch.float16, device="cuda").contiguous(memory_format=torch.channels_last)
        x[-1] = image[0]
        rest = list(made.args[1:])
        if operator == "conv_act":
            rest[5] = None
        assert torch.equal(run(operator, (x, *rest))[-1:], run(operator, (image, *rest))), operator
        del x


def test_other_memory_layouts_and_alignments() -> None:
    for operator in CASES:
        args = list(random_call(operator, channels=20, dtype=torch.float16, device="cuda").args)
        expected = run(operator, tuple(args))
        buffer = torch.zeros(args[0].numel() + 1, dtype=torch.float16, device="cuda")
        n, c, h, w = args[0].shape
        shifted = buffer[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        shifted.copy_(args[0])
        for x in (args[0].contiguous(memory_format=torch.contiguous_format), shifted):
            assert torch.equal(run(operator, (x, *args[1:])), expected), operator


@pytest.mark.parametrize("name", lowformer.list_models())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_model(name: str, dtype: torch.dtype) -> None:
    eager = lowformer.create_model(name, kernels="eager").eval().cuda()
    model = lowformer.create_model(name, kernels="triton").eval().cuda()
    model.load_state_dict(eager.state_dict())
    x = torch.randn(2, 3, 224, 224, device="cuda").to(dtype)
    with torch.no_grad():
        found = model.to(dtype)(x)
        expected = eager.to(dtype)(x)
        reference = eager.double()(x.double())
    assert_within_budget(found, expected, reference.cpu(), 9 * 512, name)


def test_compiled_model_keeps_the_kernels() -> None:
    model = lowformer.create_model("lowformer_b0", kernels="triton").eval().cuda().half()
    x = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-2, atol=1e-2)


def test_graphed_model() -> None:
    model = lowformer.create_model("lowformer_b0", kernels="triton").eval().cuda().half()
    x = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    fast = lowkernels.graphed(model, x)
    with torch.no_grad():
        for batch in (2, 1, 2):
            other = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
            assert torch.equal(fast(other), model(other))


@pytest.mark.parametrize("operator", list(CASES))
def test_memory_checker(operator: str) -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch; from tests.triton.cases import call; from lowkernels.testing import check_call;"
        f"check_call(*call({operator!r}, 1, torch.float16, 'cuda'), backend='triton')"
    )
    command = [checker, "--error-exitcode", "9", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
