"""What nvcc makes: what kernels take of the machine, that the library loads without CUDA, and what is said when it cannot."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lowkernels import BackendError, backends
from lowkernels.backends import native
from lowkernels.backends.cuda import build, chains, library
from lowkernels.backends.native import CACHE_VARIABLE, JIT_VARIABLE, BuildError, Link, Unit
from lowkernels.ops import OPERATORS
from lowkernels.testing import random_call
from tests.cuda import cases, execution

# Of what the package is built for, machine code only: what every run of the tests compiles (the oldest, the one with kernels of its
# own, and the one where registers are shortest), and the others, which take as long again.
TIGHTEST = "8.0;9.0a;12.0"
OTHERS = "8.6;8.9;10.0"
# In two dtypes: four shapes of CTA of two operators; two of lowtention in one launch, and the attention of its three, for four
# widths of a head; the first and the last of the three.
KERNELS = 2 * (2 * 4 + 3 * 4 + 2)
# The shape of mbconv's CTA that several may share.
KERNELS += 2
# Five shapes of conv_act's CTA, three of which also pool.
KERNELS += 2 * (5 + 3)
# Seven shapes of fused_mbconv's CTA, six of gn_mlp's, and the statistics of large images.
KERNELS += 2 * (7 + 6 + 1)
# Those of compute capability 9.0: in two dtypes four shapes of CTA of two operators, two of conv_act, with and without
# pooling, and two of mbconv.
TIER = "_sm90"
WARPGROUP_KERNELS = 2 * (2 * 4 + 2 * 2 + 2)


class Built(NamedTuple):
    """The library, what it was compiled for, and what ptxas said of it."""

    path: Path
    listed: str
    report: str


@pytest.fixture(scope="module")
def built() -> Built:
    return compiled_for(TIGHTEST)


def compiled_for(listed: str) -> Built:
    """Compiled once for all workers and sessions with these sources."""
    if build.compiler() is None:
        pytest.skip("nvcc is not installed")
    folder = Path(tempfile.gettempdir()) / f"lowkernels-nvcc-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"{build.version()}-{listed.replace(';', '-')}.so"
    report = path.with_suffix(".txt")
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.is_file():
            said: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
            logger = logging.getLogger("lowkernels")
            level = logger.level
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
            try:
                build.compile_library(path, listed=listed)
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)
            report.write_text("\n".join(said))
    return Built(path, listed, report.read_text())


def compiled(built: Built, tier: str = "") -> list[tuple[str, ...]]:
    """Name, architecture, stack, spill stores, spill loads and registers of each kernel, of ``tier`` or of none."""
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        built.report,
        re.S,
    )
    # Those of headers come with each file that launches them.
    return [kernel for kernel in dict.fromkeys(kernels) if (TIER in kernel[0]) == bool(tier)]


def test_kernels_keep_their_budget(built: Built) -> None:
    kernels = compiled(built)
    assert len(kernels) == KERNELS * len(built.listed.split(";"))
    for name, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for sm_{arch} spills"
        shape = re.search(r"ConfigILi(\d+)ELi(\d+)ELi(\d+)E", name)
        chain = re.search(r"ChainILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", name)
        if chain:
            ctas = chains.Chain(*map(int, chain.groups())).per_processor
        elif shape:
            tiles, warps, groups = map(int, shape.groups())
            accumulators = tiles * groups // (8 // warps)
            ctas = 1 if accumulators > 4 else 2
        else:
            # Of lowtention: steps of a head's channels, and 16-row tiles at a time.
            attention = re.search(r"_tELi(\d)E(?:Li(\d)E)?EEv", name)
            ctas = 1 if attention and (int(attention[1]) > 2 or int(attention[2] or 0) > 4) else 2
        assert int(registers) <= min(255, 65536 // 256 // ctas), f"{name} for sm_{arch}: {registers} registers, {ctas} CTAs wanted"


def test_warpgroup_kernels_keep_their_budget(built: Built) -> None:
    assert "(C75" not in built.report, "a warpgroup product is serialised"
    kernels = compiled(built, TIER)
    assert len(kernels) == WARPGROUP_KERNELS * len(built.listed.split(";"))
    for name, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} for sm_{arch} spills"
        # Warpgroups of a CTA, and the CTAs that an SM is to hold.
        warpgroups, ctas = shape_of(name)
        most = min(255, 65536 // (128 * warpgroups * ctas) // 8 * 8)
        assert int(registers) <= most, f"{name} for sm_{arch}: {registers} registers"


@pytest.mark.slow
def test_kernels_keep_their_budget_on_the_others(request: pytest.FixtureRequest) -> None:
    assert {*TIGHTEST.split(";"), *OTHERS.split(";")} == {*build.ARCHITECTURES.replace("+PTX", "").split(";")}
    if "slow" not in request.config.option.markexpr:
        pytest.skip(f"compiles for {OTHERS}, two minutes of two quiet cores; `pytest -m slow` runs it")
    built = compiled_for(OTHERS)
    test_kernels_keep_their_budget(built)
    test_warpgroup_kernels_keep_their_budget(built)


def shape_of(name: str) -> tuple[int, int]:
    if "WideMBConv" in name:
        return 2, 1
    found = re.search(r"WideConvILi(\d)ELi\dELi(\d)E", name)
    return (int(found[1]), int(found[2])) if found else (int(re.findall(r"WideChainILi(\d)E", name)[0]), 1)


def machine_code(built: Built, arch: str) -> dict[str, str]:
    found = importlib.util.find_spec("triton")
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin" if found and found.origin else None
    if tools is None or not (tools / "nvdisasm").is_file():
        pytest.skip("no nvdisasm: it comes with the triton package")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), "-sass", "-arch", arch, str(built.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return {text.split(maxsplit=1)[0]: text for text in re.split(r"\bFunction : ", done.stdout)[1:]}


def test_warpgroup_kernels_are_for_hopper_only(built: Built) -> None:
    for arch in ("sm_80", "sm_90a"):
        functions = {name: text for name, text in machine_code(built, arch).items() if TIER in name}
        assert len(functions) == WARPGROUP_KERNELS
        for name, text in functions.items():
            if arch == "sm_80":
                assert "HGMMA" not in text
                assert "BPT.TRAP" in text, f"{name} does not refuse to run"
                continue
            # Four steps of a slab for the first product, eight for each part of the second; of mbconv the other way round.
            columns = re.search(r"WideChainILi\dELi(\d+)E", name)
            parts = -(-int(columns[1]) // 128) if columns else 0
            products = 8 + 4 * 2 if "WideMBConv" in name else 4 + 8 * parts
            assert len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", text)) == products, name
            wanted = ("LDGSTS.E.BYPASS.128", "WARPGROUP.ARRIVE", "gsb0, 0x1", "FENCE.VIEW.ASYNC")
            for instruction in (*wanted, *["LDSM"] * ("WideMBConv" not in name)):
                assert instruction in text, f"{name} has no {instruction}"
            assert not re.search(r"\b(LDL|STL|HMMA)\b", text), f"{name} uses local memory or a warp's products"


def test_machine_code_has_the_instructions(built: Built) -> None:
    for arch in ("sm_80", "sm_90a"):
        functions = {name: text for name, text in machine_code(built, arch).items() if TIER not in name}
        assert len(functions) == KERNELS
        for name, text in functions.items():
            wanted = ["HMMA.16816", "LDSM"] * ("partial_moments" not in name)
            wanted += ["LDGSTS"] * any(
                part in name for part in ("Config", "Chain", "conv_act", "attention_kernel", "upsample_kernel")
            )
            wanted += ["LDSM.16.MT88"] * any(part in name for part in ("lowtentionI", "attention_kernel"))
            for instruction in wanted:
                assert instruction in text, f"{name} has no {instruction}"
            assert not re.search(r"\b(LDL|STL)\b", text), f"{name} uses local memory"


CODE = """
import sys, torch
from pathlib import Path
from lowkernels.backends.cuda import build
print(build.load_library(Path(sys.argv[1])))
for name in ("conv_act", "separable_conv", "mbconv", "fused_mbconv", "gn_mlp", "lowtention"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lowkernels_cuda::" + name, "CUDA") == (sys.argv[2] == "loads"), name
"""


def load(path: Path, what: str) -> str:
    # A process of its own: what is loaded stays.
    done = subprocess.run([sys.executable, "-c", CODE, str(path), what], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_library_loads_without_cuda(built: Built) -> None:
    assert load(built.path, "loads") == "None"
    assert build.library_version(built.path) == build.version()
    assert build.library_architectures(built.path) == built.listed


def test_library_of_another_version_is_refused(built: Built, tmp_path: Path) -> None:
    other = tmp_path / "lowkernels_cuda.so"
    other.write_bytes(built.path.read_bytes().replace(build.version().encode(), b"0" * 20))
    assert "is of version 00000000000000000000, not of " in load(other, "refused")
    other.write_bytes(b"not a library")
    assert "is of version None" in load(other, "refused")


def test_stable_abi_of_2_10_only(built: Built) -> None:
    undefined = subprocess.run(["nm", "-D", "-u", str(built.path)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in undefined.splitlines()}
    # PyTorch's C interface; its C++ symbols, Python's and the CUDA runtime's are of one version.
    stable = {name for name in names if name.startswith(("aoti_torch_", "torch_"))}
    assert "torch_library_impl" in stable
    unwanted = ("Py", "_ZN3c10", "_ZN2at", "_ZN5torch", "cu")
    assert not [name for name in names - stable if name.startswith(unwanted)]


def test_stale_prebuilt_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lowkernels_cuda.so").write_bytes(b"lowkernels-cuda-version:old\0")
    version = build.version()
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setattr(build, "version", lambda: version)
    build._prebuilt.cache_clear()
    try:
        path, reason = build._prebuilt()
    finally:
        build._prebuilt.cache_clear()
    assert path is None
    assert reason is not None
    assert "is of version old, not of" in reason


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert "nvcc is neither in $CUDA_HOME/bin nor on PATH" in (build.unusable() or "")
    with pytest.raises(BuildError, match="no CUDA compiler"):
        build.compile_library(tmp_path / "x.so")


def test_building_can_be_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(JIT_VARIABLE, "0")
    assert f"{JIT_VARIABLE}=0 forbids building" in (build.unusable() or "")


def test_header_edit_reaches_nvcc(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nvcc = build.compiler()
    if nvcc is None or native.ninja() is None:
        pytest.skip("needs nvcc and ninja")
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "value.h").write_text("#define VALUE 1\n")
    (folder / "kernel.cu").write_text('#include "value.h"\nextern "C" __global__ void kernel(int* to) { *to = VALUE; }\n')
    units = [Unit("kernel", "kernel.cu", build.kernel_command(nvcc, [("compute_80", "sm_80")]))]

    def steps() -> int:
        native.digest.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "lowkernels"):
            said = native.build_library(
                tmp_path / "toy.so", folder, units, Link((nvcc, "-shared"), ()), objects=tmp_path, depends_on=None
            )
        assert ("Used" in said) == bool(caplog.records), "what ptxas says of registers"
        return len(caplog.records)

    assert steps() == 2
    assert steps() == 0
    (folder / "value.h").write_text("#define VALUE 2\n")
    assert steps() == 2


def test_no_ninja_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: "nvcc")
    monkeypatch.setattr(native, "ninja", lambda: None)
    assert "not built, and there is no ninja: it is neither installed (pip install ninja) nor on PATH" in (build.unusable() or "")


@pytest.mark.parametrize(
    ("says", "words"), [("release 11.8, V11.8.89", "is nvcc 11.8; needed is 12.8"), ("hello", "names no release")]
)
def test_old_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, words: str) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{says}'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.compiler() == str(home / "bin" / "nvcc")
    with pytest.raises(BuildError, match=words):
        build.compile_library(tmp_path / "x.so")


def test_architectures() -> None:
    assert build.architectures("8.0") == [("compute_80", "sm_80")]
    assert build.architectures("7.5 9.0a+PTX") == [("compute_90a", "sm_90a"), ("compute_90a", "compute_90a")]
    assert [code for _, code in build.architectures(build.ARCHITECTURES)] == [
        "sm_80", "compute_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120",
    ]  # fmt: skip
    with pytest.raises(BuildError, match="'Hopper'; allowed are compute capabilities"):
        build.architectures("Hopper")
    with pytest.raises(BuildError, match=r"need a compute capability of 8\.0 or more"):
        build.architectures("7.0;7.5")


@pytest.mark.parametrize(
    ("capability", "entry"),
    [
        ((8, 0), "8.0"),
        ((8, 7), "8.6"),
        ((8, 9), "8.9"),
        ((9, 0), "9.0a"),
        ((10, 3), "10.0"),
        ((12, 1), "12.0"),
        ((13, 0), "8.0+PTX"),
    ],
)
def test_code_for_the_gpu_that_is_there(capability: tuple[int, int], entry: str) -> None:
    assert build.architecture_for(capability) == entry


def test_import_neither_loads_nor_defines_anything() -> None:
    code = "import torch, lowkernels; print(hasattr(torch.ops.lowkernels_cuda, 'mbconv'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_not_for_cpu_tensors(operator: str) -> None:
    call = random_call(operator, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="it serves tensors on NVIDIA GPUs; these are on cpu"):
        OPERATORS[operator].overload(*call.args, None, None, "cuda")
    assert OPERATORS[operator].explain(*call.args).backend != "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_there_is_no_gpu() -> None:
    cuda = backends.load("cuda")
    assert cuda.unavailable("cuda") in ("this PyTorch is built without CUDA", "no CUDA device is available")
    assert cuda.unavailable("cuda") in cuda.describe()


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_opcheck(kernels: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    overload = getattr(torch.ops.lowkernels_cuda, operator).default
    calls = []

    class Recorder:
        def default(self, *args: object) -> None:
            calls.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.lowkernels_cuda, operator, Recorder())
        execution.run(operator, random_call(operator, dtype=torch.float16).args)
    (args,) = calls
    with execution.watched(kernels):
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


def test_schemas_name_their_operators() -> None:
    # A tier has operators of its own.
    assert {name.removesuffix("_sm90") for name in library.SCHEMAS} == set(cases.OPERATORS)
