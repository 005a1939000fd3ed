"""Loading LowFormer weights: timm's layout, the authors' layouts, and the Hugging Face Hub."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import NUM_STAGES, get_config
from .features import LowFormerFeatures
from .model import LowFormer

__all__ = [
    "CheckpointError",
    "WeightsUnavailableError",
    "fetch_weights",
    "load_checkpoint",
    "read_checkpoint",
]

_STEM = "stem.0.conv.weight"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit the model. The model has not been changed."""


class WeightsUnavailableError(RuntimeError):
    """Published weights cannot be had: there are none, or the Hub or its client cannot be reached."""


def read_checkpoint(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a checkpoint and return its weights under timm's names.

    Three layouts are understood: timm's names (``stem.0.conv.weight``), the authors'
    (``backbone.input_stem...`` with ``head.op_list...``) and theirs for TorchScript
    (``head.opseq.op_list...``). The dict may be wrapped in one entry named state_dict, model, module, ema,
    state_dict_ema or model_ema, and its keys may all begin with ``module.``, ``model.`` or ``_orig_mod.``.

    Args:
        checkpoint: a .safetensors file; a .pt, .pth or .pth.tar file, read with ``weights_only=True``, so
            that nothing in it is executed; or a dict.

    Raises:
        CheckpointError: the file cannot be read, or its content is none of the above.
        FileNotFoundError: there is no such file.
        TypeError: the checkpoint is neither a path nor a dict.
    """
    if isinstance(checkpoint, Mapping):
        source, content = "the checkpoint", checkpoint
    elif isinstance(checkpoint, str | os.PathLike):
        source, content = f"checkpoint {os.fspath(checkpoint)!r}", _read_file(Path(checkpoint))
    else:
        raise TypeError(f"checkpoint is a {type(checkpoint).__name__}: it must be a path or a state dict")
    return _to_timm_layout(_unwrap(content, source), source)


def load_checkpoint(
    model: LowFormer | LowFormerFeatures,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    new_head: bool = False,
    adapt_stem: bool = False,
) -> None:
    """Load weights into a model in place, all of them or none, converting them to its dtype and device.

    A model without a classifier (``num_classes=0``) or without a head (``features_only=True``) also takes
    the checkpoint of a full model; what it has no place for is dropped.

    Args:
        model: the model to fill, with eager or accelerated blocks.
        checkpoint: a file or a dict, in the layouts of :func:`read_checkpoint`.
        new_head: keep the model's own classifier and ignore the checkpoint's, for fine-tuning.
        adapt_stem: fit a first convolution made for another number of image channels, as timm does: for one
            channel its input channels are summed; otherwise they are repeated in order up to the model's
            number and scaled by (checkpoint's / model's), which keeps the response to a grey image.

    Raises:
        CheckpointError: as :func:`read_checkpoint`; or a key is missing, unexpected or misshapen: the message
            lists them.
        FileNotFoundError: there is no such file.
        TypeError: the model is not one of this package's, or the checkpoint neither a path nor a dict.
    """
    if not isinstance(model, LowFormer | LowFormerFeatures):
        raise TypeError(
            f"model is a {type(model).__name__}: load_checkpoint takes what create_model returns; "
            "of a wrapped model pass the one inside"
        )
    own = model.state_dict()
    weights = {key: value for key, value in read_checkpoint(checkpoint).items() if key in own or not _has_no_place(key, model)}
    if new_head:
        weights |= {key: value for key, value in own.items() if key.startswith("classifier.")}
    if adapt_stem and _STEM in weights and weights[_STEM].ndim == 4:
        weights[_STEM] = _adapt_channels(weights[_STEM], model.in_chans)
    name = "the checkpoint" if isinstance(checkpoint, Mapping) else f"checkpoint {os.fspath(checkpoint)!r}"
    _check_fit(weights, own, f"{name} does not fit {model.config.name}")
    model.load_state_dict(weights, strict=True)


def fetch_weights(name: str, *, timeout_s: float = 10.0) -> Path:
    """Return the file of a variant's ImageNet-1k weights, from the Hugging Face Hub unless it is cached.

    Args:
        name: a name of :func:`lowformer.list_models`.
        timeout_s: seconds that the Hub may take to answer; the download itself is not limited.

    Raises:
        ValueError: no variant of that name.
        WeightsUnavailableError: none were published, huggingface_hub is not installed, or the Hub
            cannot be reached.
    """
    config = get_config(name)
    filename = "model.safetensors"
    remedy = "pass the path of a checkpoint file as pretrained= instead"
    if not config.has_weights:
        raise WeightsUnavailableError(f"{config.name} has no published weights: {remedy}")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise WeightsUnavailableError(
            f"fetching {config.hub_id} needs huggingface_hub: pip install 'lowkernels[hub]', or {remedy}"
        ) from error
    cached = hub.try_to_load_from_cache(config.hub_id, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # the download retries for long while there is no network: ask once first
        hub.get_hf_file_metadata(hub.hf_hub_url(config.hub_id, filename), timeout=timeout_s)
        return Path(hub.hf_hub_download(config.hub_id, filename, etag_timeout=timeout_s))
    # the client lets the errors of its HTTP library through, and that library has changed
    except Exception as error:
        raise WeightsUnavailableError(
            f"cannot fetch {config.hub_id} from the Hugging Face Hub ({type(error).__name__}): connect to the network, or {remedy}"
        ) from error


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {os.fspath(path)!r}")
    name = path.name.lower()
    if name.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise CheckpointError(f"checkpoint {os.fspath(path)!r} needs safetensors: pip install 'lowkernels[weights]'") from error
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint {os.fspath(path)!r} is not a safetensors file: {error}") from error
    if name.endswith((".pt", ".pth", ".pth.tar")):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
            raise CheckpointError(
                f"checkpoint {os.fspath(path)!r} cannot be read as plain weights (weights_only=True): "
                "save it as torch.save(model.state_dict(), path). "
                f"The reader said: {str(error).partition(chr(10))[0]}"
            ) from error
    raise CheckpointError(f"checkpoint {os.fspath(path)!r}: a file must end in .safetensors, .pt, .pth or .pth.tar")


_WRAPPERS = ("state_dict", "model", "module", "ema", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")


def _unwrap(content: Any, source: str) -> dict[str, Tensor]:
    """Take off what training scripts put around a state dict."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}: it must hold a state dict")
    wrapped = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if len(wrapped) > 1:
        raise CheckpointError(f"{source} holds several state dicts, {', '.join(wrapped)}: read it and pass the one you want")
    state = dict(content[wrapped[0]]) if wrapped else dict(content)
    # torch's AveragedModel counts its updates beside the weights
    if "n_averaged" in state and all(key.startswith("module.") for key in state if key != "n_averaged"):
        del state["n_averaged"]
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{source}: entry {key!r} is a {type(value).__name__}: a state dict maps names to tensors, "
                f"plain or in one entry named {', '.join(_WRAPPERS)}"
            )
    while state:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


_AUTHORS_TO_TIMM = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.input_stem\.op_list\.", "stem."),
        (r"^backbone\.stages\.(\d+)\.op_list\.", r"stages.\1."),
        (r"^head\.(?:opseq\.)?op_list\.0\.", "in_conv."),
        (r"^head\.(?:opseq\.)?op_list\.2\.linear\.", "pre_classifier.0."),
        (r"^head\.(?:opseq\.)?op_list\.2\.norm\.", "pre_classifier.1."),
        (r"^head\.(?:opseq\.)?op_list\.3\.linear\.", "classifier."),
        # attention and MLP are a pair where both exist; alone, attention takes the pair's place
        (r"\.total\.0\.(?:0\.)?main\.", ".attn.main."),
        (r"\.total\.0\.1\.main\.", ".mlp.main."),
        (r"\.total\.1\.main\.", ".local.main."),
        (r"\.conv_proj\.0\.", ".conv_proj.conv."),
        (r"\.conv_proj\.1\.", ".conv_proj.norm."),
        (r"\.pwise\.0\.", ".pwise."),
    )
)


def _to_timm_layout(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the authors' keys to timm's; keys in neither layout stay, to be reported as unexpected."""
    if any(key.startswith("stem.") for key in state):
        return state
    if not any(key.startswith("backbone.") for key in state):
        raise CheckpointError(
            f"{source} is neither in timm's layout (stem., stages.) nor in the authors' (backbone., head.): "
            f"its keys are {_some(state) or 'none'}"
        )
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _AUTHORS_TO_TIMM:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise CheckpointError(f"{source}: two keys, one of them {key}, are both {name} in timm's layout")
        renamed[name] = value
    return renamed


def _has_no_place(key: str, model: LowFormer | LowFormerFeatures) -> bool:
    """Whether a full model has this key's part and this model was built without it."""
    if isinstance(model, LowFormer):
        return model.num_classes == 0 and key.startswith("classifier.")
    dropped_stages = [f"stages.{i}." for i in range(len(model.stages), NUM_STAGES)]
    return key.startswith(("in_conv.", "pre_classifier.", "classifier.", *dropped_stages))


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    given = weight.shape[1]
    if channels == given:
        return weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)


def _check_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], headline: str) -> None:
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    misshapen = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    problems = []
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{len(keys)} {what}: {_some(keys)}")
    if misshapen:
        shapes = [f"{key} is {_shape(weights[key])}, the model's {_shape(own[key])}" for key in misshapen]
        problems.append(f"{len(misshapen)} misshapen: {_some(shapes)}")
    if "classifier.weight" in misshapen:
        classes, own_classes = weights["classifier.weight"].shape[0], own["classifier.weight"].shape[0]
        if classes != own_classes:
            problems.append(f"it has {classes} classes and the model {own_classes}: new_head=True keeps the model's own classifier")
    if misshapen == [_STEM]:
        problems.append("adapt_stem=True fits a first convolution for another number of image channels")
    if problems:
        raise CheckpointError(f"{headline}: {'; '.join(problems)}")


def _some(items: Iterable[str], limit: int = 8) -> str:
    listed = list(items)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
