"""Loading: every layout, every wrapper, every way it can fail."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowformer
from lowformer import CheckpointError, WeightsUnavailableError, load_checkpoint, read_checkpoint
from tests.lowformer.helpers import VARIANTS, authors_shapes

hub = pytest.importorskip("huggingface_hub")
safetensors_torch = pytest.importorskip("safetensors.torch")

NAME = "lowformer_b0"

State = dict[str, Tensor]


def numbered_state(name: str = NAME) -> State:
    """A state dict under the authors' names in which every tensor holds a number of its own."""
    shapes = authors_shapes(name)
    return {
        key: torch.full(shape, i, dtype=torch.int64 if key.endswith("tracked") else torch.float32)
        for i, (key, shape) in enumerate(shapes.items(), start=1)
    }


def create(name: str = NAME, **arguments: Any) -> Any:
    return lowformer.create_model(name, kernels="eager", **arguments)


def blank(name: str = NAME, **arguments: Any) -> Any:
    """A model filled with zeros, which takes less time than initialising one."""
    with torch.device("meta"):
        model = create(name, **arguments)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    return model


@pytest.fixture(scope="module")
def authors() -> State:
    return numbered_state()


@pytest.fixture(scope="module")
def timms(authors: State) -> State:
    model = blank()
    load_checkpoint(model, authors)
    return dict(model.state_dict())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_key_of_the_authors_finds_its_place(name: str) -> None:
    state = numbered_state(name)
    model = blank(name)
    load_checkpoint(model, state)
    loaded = model.state_dict()
    # same tensors in the same order, every one of them filled
    assert [value.flatten()[0].item() for value in loaded.values()] == list(range(1, len(state) + 1))
    assert [list(value.shape) for value in loaded.values()] == list(authors_shapes(name).values())


def test_read_checkpoint_gives_timms_names(authors: State, timms: State) -> None:
    assert same(read_checkpoint(authors), timms)
    assert same(read_checkpoint(timms), timms)


LAYOUTS: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "timm": lambda authors, timms: timms,
    "authors": lambda authors, timms: authors,
    "authors, opseq": lambda authors, timms: {
        key.replace("head.op_list.", "head.opseq.op_list."): value for key, value in authors.items()
    },
    "authors, wrapped": lambda authors, timms: {"state_dict": authors, "epoch": 319, "best_val": 78.4},
    "ordered": lambda authors, timms: collections.OrderedDict(timms),
    "model": lambda authors, timms: {"model": timms, "optimizer": {"state": {}}},
    "ema": lambda authors, timms: {"state_dict_ema": timms, "args": None},
    "DDP": lambda authors, timms: {"state_dict": prefixed(timms, "module.")},
    "DDP, authors": lambda authors, timms: prefixed(authors, "module."),
    "compiled": lambda authors, timms: prefixed(timms, "_orig_mod."),
    "compiled in DDP": lambda authors, timms: prefixed(timms, "module._orig_mod."),
    "submodule": lambda authors, timms: prefixed(timms, "model."),
    "AveragedModel": lambda authors, timms: {"n_averaged": torch.tensor(7), **prefixed(timms, "module.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_as_dicts(layout: str, authors: State, timms: State) -> None:
    model = blank()
    load_checkpoint(model, LAYOUTS[layout](authors, timms))
    assert same(model.state_dict(), timms)


@pytest.mark.parametrize("layout", ["timm", "authors", "authors, opseq", "authors, wrapped", "DDP"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pth.tar"])
def test_layouts_round_trip(layout: str, suffix: str, authors: State, timms: State, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](authors, timms), tmp_path / f"weights{suffix}")
    model = blank()
    load_checkpoint(model, tmp_path / f"weights{suffix}")
    assert same(model.state_dict(), timms)


@pytest.mark.parametrize("layout", ["timm", "authors", "authors, opseq"])
@pytest.mark.parametrize("as_string", [True, False])
def test_safetensors_round_trip(layout: str, as_string: bool, authors: State, timms: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors_torch.save_file(LAYOUTS[layout](authors, timms), path)
    model = create(pretrained=str(path) if as_string else path)
    assert same(model.state_dict(), timms)


def test_loading_converts_to_the_models_dtype(timms: State) -> None:
    model = blank().double()
    load_checkpoint(model, {k: v.half() if v.is_floating_point() else v for k, v in timms.items()})
    assert same(model.state_dict(), {k: v.double() if v.is_floating_point() else v for k, v in timms.items()})


def test_loading_does_not_alias_or_change_the_checkpoint(timms: State) -> None:
    given = {key: value.clone() for key, value in timms.items()}
    model = blank()
    load_checkpoint(model, given, new_head=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(given, timms)


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


BROKEN: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        lambda s: without(s, "stem.0.conv.weight", "classifier.bias"),
        "^the checkpoint does not fit lowformer_b0: 2 missing: stem.0.conv.weight, classifier.bias$",
    ),
    "unexpected": (
        lambda s: {**s, "stages.9.weight": torch.zeros(1)},
        "does not fit lowformer_b0: 1 unexpected: stages.9.weight$",
    ),
    "misshapen": (
        lambda s: {**s, "in_conv.norm.weight": torch.zeros(3, 4)},
        r"1 misshapen: in_conv.norm.weight is \(3, 4\), the model's \(1536\)$",
    ),
    "all three": (
        lambda s: {
            **without(s, "classifier.bias"),
            "extra": torch.zeros(()),
            "in_conv.norm.bias": torch.zeros(()),
        },
        r"1 missing: classifier.bias; 1 unexpected: extra; 1 misshapen: in_conv.norm.bias is \(\), ",
    ),
    "long lists are cut": (
        lambda s: {"stem.0.conv.weight": s["stem.0.conv.weight"]},
        r"\d{3} missing: (\S+, ){7}\S+ and \d{3} more$",
    ),
    "other classes": (
        lambda s: {**s, "classifier.weight": torch.zeros(10, 1600), "classifier.bias": torch.zeros(10)},
        "2 misshapen: .*; it has 10 classes and the model 1000: new_head=True keeps the model's own",
    ),
    "other image channels": (
        lambda s: {**s, "stem.0.conv.weight": torch.zeros(16, 1, 3, 3)},
        "adapt_stem=True fits a first convolution",
    ),
    "another variant": (lambda s: numbered_state("lowformer_b1"), "unexpected: .*; 24 misshapen: "),
    "authors' key without a rule": (
        lambda s: {**numbered_state(), "head.op_list.5.weight": torch.zeros(1)},
        "1 unexpected: head.op_list.5.weight$",
    ),
    "two keys for one": (
        lambda s: {**numbered_state(), "head.opseq.op_list.0.conv.weight": torch.zeros(1)},
        "two keys, one of them head.opseq.op_list.0.conv.weight, are both in_conv.conv.weight",
    ),
    "neither layout": (
        lambda s: {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
        r"neither in timm's layout .* nor in the authors' .*: its keys are conv1.weight, fc.bias$",
    ),
    "empty": (lambda s: {}, "its keys are none$"),
    "not tensors": (
        lambda s: {**s, "epoch": 3},
        "entry 'epoch' is a int: a state dict maps names to tensors",
    ),
    "several dicts": (
        lambda s: {"state_dict": s, "state_dict_ema": s},
        "holds several state dicts, state_dict, state_dict_ema: read it and pass the one you want",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(case: str, timms: State) -> None:
    make, message = BROKEN[case]
    model = blank()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, make(timms))
    assert same(model.state_dict(), before)


def write_pickle(path: Path) -> None:
    torch.save({"state_dict": {}, "args": collections.UserDict()}, path)


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("a.pt", lambda p: p.write_bytes(b""), "cannot be read as plain weights"),
    "garbage": ("a.pth", lambda p: p.write_bytes(b"garbage" * 100), "cannot be read as plain weights"),
    "text": ("a.pth", lambda p: p.write_bytes(b"hello"), "cannot be read as plain weights"),
    "objects": ("a.pt", write_pickle, r"weights_only=True\): save it as torch.save\(model.state_dict"),
    "a tensor": (
        "a.pt",
        lambda p: torch.save(torch.zeros(2), p),
        "holds a Tensor: it must hold a state dict",
    ),
    "empty safetensors": ("a.safetensors", lambda p: p.write_bytes(b""), "is not a safetensors file"),
    "garbage safetensors": ("a.safetensors", lambda p: p.write_bytes(b"x" * 99), "is not a safetensors file"),
    "suffix": ("a.npz", lambda p: p.write_bytes(b""), "must end in .safetensors, .pt, .pth or .pth.tar"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, tmp_path: Path) -> None:
    filename, write, message = BAD_FILES[case]
    write(tmp_path / filename)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(blank(), tmp_path / filename)
    assert filename in str(caught.value)


def test_truncated_file(timms: State, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(timms, path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        load_checkpoint(blank(), path)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint file '{path}'"):
            load_checkpoint(blank(), path)


def test_wrong_types(timms: State) -> None:
    with pytest.raises(TypeError, match="model is a Sequential: load_checkpoint takes what create_model returns"):
        load_checkpoint(nn.Sequential(), timms)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="checkpoint is a list: it must be a path or a state dict"):
        load_checkpoint(blank(), [timms])  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [10, 1000])
def test_new_head(classes: int, authors: State, timms: State) -> None:
    model = create(num_classes=classes)
    own = {key: value.clone() for key, value in model.classifier.state_dict().items()}
    load_checkpoint(model, authors, new_head=True)
    assert same(model.classifier.state_dict(), own)
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")}
    assert same(rest, without(timms, "classifier.weight", "classifier.bias"))


def test_new_head_needs_no_classifier_in_the_checkpoint(timms: State) -> None:
    load_checkpoint(blank(num_classes=10), without(timms, "classifier.weight", "classifier.bias"), new_head=True)


def test_a_model_without_classifier_drops_the_checkpoints(timms: State) -> None:
    model = blank(num_classes=0)
    load_checkpoint(model, timms)
    assert same(model.state_dict(), without(timms, "classifier.weight", "classifier.bias"))


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 1)])
def test_features_only_takes_full_checkpoints_and_its_own(out_indices: tuple[int, ...], authors: State, timms: State) -> None:
    backbone = blank(features_only=True, out_indices=out_indices)
    load_checkpoint(backbone, authors)
    assert all(torch.equal(value, timms[key]) for key, value in backbone.state_dict().items())
    again = blank(features_only=True, out_indices=out_indices)
    load_checkpoint(again, backbone.state_dict())
    assert same(again.state_dict(), backbone.state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"1 missing: stages\.1\.0\.main\.point_conv\.conv\.weight; 1 unexpected: stages.4",
    ):
        load_checkpoint(
            again,
            {**without(timms, "stages.1.0.main.point_conv.conv.weight"), "stages.4.0.weight": torch.zeros(1)},
        )


@pytest.mark.parametrize(("channels", "scale"), [(1, None), (2, 3 / 2), (3, 1), (4, 3 / 4), (7, 3 / 7)])
def test_adapt_stem(channels: int, scale: float | None, timms: State) -> None:
    torch.manual_seed(0)
    given = torch.randn(16, 3, 3, 3)
    model = blank(in_chans=channels)
    load_checkpoint(model, {**timms, "stem.0.conv.weight": given}, adapt_stem=True)
    weight = model.state_dict()["stem.0.conv.weight"]
    if scale is None:
        expected = given.sum(1, keepdim=True)
    else:
        expected = torch.stack([given[:, i % 3] for i in range(channels)], 1) * scale
    assert torch.equal(weight, expected)


def test_pretrained_file_must_have_the_models_classes(timms: State, tmp_path: Path) -> None:
    torch.save(timms, tmp_path / "a.pt")
    assert same(create(pretrained=tmp_path / "a.pt").state_dict(), timms)
    with pytest.raises(CheckpointError, match="1000 classes and the model 10: new_head=True"):
        create(pretrained=tmp_path / "a.pt", num_classes=10)
    one = create(pretrained=tmp_path / "a.pt", in_chans=1).state_dict()["stem.0.conv.weight"]
    assert torch.equal(one, timms["stem.0.conv.weight"].sum(1, keepdim=True))


@pytest.fixture
def hub_holds(timms: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Let the Hub's cache hold the weights; gives the list of what was asked for."""
    asked: list[tuple[str, str]] = []
    path = tmp_path / "cached.safetensors"
    safetensors_torch.save_file(timms, path)

    def lookup(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(path)

    monkeypatch.setattr(hub, "try_to_load_from_cache", lookup)
    return asked


def test_pretrained_true(hub_holds: list[tuple[str, str]], timms: State) -> None:
    assert same(create(pretrained=True).state_dict(), timms)
    assert hub_holds == [("timm/lowformer_b0.in1k", "model.safetensors")]
    for arguments in ({"num_classes": 10}, {"num_classes": 0}, {"in_chans": 1}, {"features_only": True}):
        state = create(pretrained=True, **arguments).state_dict()
        kept = [key for key in state if not key.startswith(("classifier.", "stem.0.conv."))]
        assert all(torch.equal(state[key], timms[key]) for key in kept)


def test_download(monkeypatch: pytest.MonkeyPatch, timms: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    timeouts = []

    def ask(url: str, *, timeout: float) -> None:
        assert url.endswith("/timm/lowformer_e3.in1k/resolve/main/model.safetensors")
        timeouts.append(timeout)

    def download(repository: str, filename: str, *, etag_timeout: float) -> str:
        assert (repository, filename) == ("timm/lowformer_e3.in1k", "model.safetensors")
        timeouts.append(etag_timeout)
        return str(path)

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert lowformer.fetch_weights("lowformer_e3", timeout_s=2.5) == path
    assert timeouts == [2.5, 2.5]


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionError("Name or service not known\nand a long tail")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    with pytest.raises(WeightsUnavailableError) as caught:
        create(pretrained=True)
    assert str(caught.value) == (
        "cannot fetch timm/lowformer_b0.in1k from the Hugging Face Hub (ConnectionError): "
        "connect to the network, or pass the path of a checkpoint file as pretrained= instead"
    )


def test_hub_offline_for_real(tmp_path: Path) -> None:
    code = (
        "import lowformer\n"
        "try:\n    lowformer.create_model('lowformer_b0', kernels='eager', pretrained=True)\n"
        "except lowformer.WeightsUnavailableError as error:\n    print(error)"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(lowformer.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot fetch timm/lowformer_b0.in1k from the Hugging Face Hub (OfflineModeIsEnabled)")
    assert done.stderr == ""


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsUnavailableError, match=r"needs huggingface_hub: pip install 'lowkernels\[hub\]'"):
        create(pretrained=True)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"needs safetensors: pip install 'lowkernels\[weights\]'"):
        load_checkpoint(blank(), tmp_path / "a.safetensors")


def test_b2_has_no_weights() -> None:
    with pytest.raises(WeightsUnavailableError, match="lowformer_b2 has no published weights: pass the path"):
        create("lowformer_b2", pretrained=True)
    with pytest.raises(ValueError, match="unknown model 'resnet50'"):
        lowformer.fetch_weights("resnet50")
