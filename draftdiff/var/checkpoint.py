"""Reading the original checkpoints of VAR, CoDe and Infinity.

Each model says for each of its parameters which original tensor that is; so whatever is missing, left over or
mis-shaped can be named as it stands in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from draftdiff.core.devices import chosen_dtype
from draftdiff.errors import UserError, printable
from draftdiff.hosts.diffusers import with_one_dtype
from draftdiff.stored import inside, read_json, read_weights

Tensors = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

# A tensor that only checkpoints of this kind have.
KINDS = {
    "pos_1LC": "VARTransformer2DModel",
    "quantize.embedding.weight": "VQModel",
    "cfg_uncond": "InfinityTransformer2DModel",
    "decoder.conv_in.conv.weight": "AutoencoderBSQ",
}
# Where training checkpoints keep the weights; their running averages only if there is nothing else.
NESTED = ("trainer", "gpt_fsdp", "var_wo_ddp", "vae", "state_dict", "model_state_dict", "model", "module", "weights")
AVERAGES = ("ema", "ema_state_dict", "model_ema", "ema_model")
_DEEPEST = 4  # a dictionary may hold itself
# What wrappers of a model put into names: these anywhere, "module." only in front, for Infinity has modules of its own.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Buffers that follow from the configuration, or that only training reads.
DERIVED = re.compile(
    r"(^|\.)(lvl_1L|attn_bias_for_masking|zero_k_bias|ema_vocab_hit_SV)$|^quantizer?\.lfq\.|^quantizer?\.mask$"
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file (.pth, .pt, .bin, .safetensors) or of a folder of shards with its index, by original names.

    Training checkpoints are opened up to their weights. Nothing in the file is executed. Raises FileNotFoundError, or
    ValueError for a file that is damaged, truncated or of another kind.
    """
    path = Path(path)
    return _unwrapped(_read_shards(path) if path.is_dir() else _state_dict(path), path)


def _state_dict(path: Path) -> Tensors:
    """The state dict inside whatever a training run has saved around it."""
    content = read_weights(path)
    found = _state_dicts(content, NESTED) or _state_dicts(content, AVERAGES) or _state_dicts(content, NESTED + AVERAGES)
    if len({id(tensors) for tensors in found.values()}) > 1:
        raise UserError(
            f"{path} holds several state dicts, {' and '.join(found)}: save the one that is meant, "
            f"as by torch.save(checkpoint{next(iter(found))}, 'weights.pth')"
        )
    if not found:
        raise UserError(f"{path} holds no state dict of weights but {_described(content)}")
    return next(iter(found.values()))


def _state_dicts(content: Any, names: Sequence[str], depth: int = _DEEPEST) -> dict[str, Tensors]:
    """Those in nested dictionaries of these names, by the keys that lead there."""
    if not isinstance(content, Mapping) or not content or depth == 0:
        return {}
    if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()):
        return {"": content}
    inner = {name: _state_dicts(content[name], names, depth - 1) for name in names if name in content}
    return {f"[{name!r}]{path}": tensors for name, paths in inner.items() for path, tensors in paths.items()}


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return _listed([f"{name} ({type(value).__name__})" for name, value in content.items()]) or "nothing"


def _unwrapped(tensors: Tensors, path: Path) -> dict[str, Tensor]:
    """By the names that the model itself gave, without those of what was wrapped around it."""
    names = {name: re.sub(r"^(module\.)+", "", _WRAPPERS.sub("", name)) for name in tensors}
    marker = next((new for new in names.values() if new.endswith(tuple(f".{kind}" for kind in KINDS))), "")
    prefix = marker.removesuffix(next((kind for kind in KINDS if marker.endswith(f".{kind}")), ""))
    if all(name.startswith(prefix) for name in names.values()):
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
    kept: dict[str, str] = {}
    for name, new in names.items():
        if new in kept:
            raise UserError(f"{path} holds {new} twice, as {kept[new]} and as {name}")
        kept[new] = name
    return {new: tensors[name] for new, name in kept.items()}


def _read_shards(folder: Path) -> Tensors:
    indices = sorted(folder.glob("*.index.json"))
    if not indices:
        raise FileNotFoundError(f"{folder} is a folder without an index of shards (*.index.json): name a file in it")
    placed = read_json(indices[0], "index of shards").get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{indices[0]} is not a readable index of shards: its weight_map names no files")
    tensors: dict[str, Tensor] = {}
    names = sorted(set(placed.values()))
    files = [inside(folder, name) for name in names]
    for file in tqdm(files, desc=f"reading {folder.name}", unit="shard", disable=len(names) < 2):
        tensors |= _state_dict(file)
    absent = [name for name in placed if name not in tensors]
    if absent:
        raise UserError(f"the shards of {folder} lack {_listed(absent)}")
    return tensors


def kind_of(tensors: Tensors) -> str:
    """Class name of the model that a checkpoint holds. Raises ValueError for an unknown one."""
    for marker, kind in KINDS.items():
        if marker in tensors:
            return kind
    some = _listed(sorted(tensors), 3)
    raise UserError(f"not a checkpoint of VAR, Infinity or one of their VAEs; it holds {some}")


class OriginalCheckpointMixin:
    """`from_single_file` for a model that knows its original configuration and names, and `from_pretrained` with dtypes
    by name; stands before diffusers' classes."""

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        raise NotImplementedError

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls: type[Any], pretrained_model_name_or_path: str | Path | None, **kwargs: Any) -> Any:
        """See diffusers; dtype, or by its old name torch_dtype, may also be a name such as "bfloat16" or "bf16"."""
        parent: Any = super()
        return parent.from_pretrained(pretrained_model_name_or_path, **with_one_dtype(kwargs))

    @classmethod
    def from_single_file(
        cls: type[Any],
        path: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **config: Any,
    ) -> Any:
        """Load an original checkpoint: a file, or a folder of shards.

        dtype, or by its old name torch_dtype: that of the file if None.  config: constructor arguments that the file
        cannot tell. Raises FileNotFoundError, or ValueError that names what does not fit.
        """
        wanted = chosen_dtype(dtype, torch_dtype)
        tensors = read_checkpoint(path)
        try:
            found = kind_of(tensors)
            if found != cls.__name__:
                raise UserError(f"it holds a {found}, not a {cls.__name__}")
            with torch.device("meta"):  # no time for an initialisation that is overwritten
                model = cls(**{**cls.original_config(tensors), **config})
            fill(model, tensors, dtype=wanted)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return model.eval()


def fill(model: Any, tensors: Tensors, *, dtype: torch.dtype | None = None, optional: tuple[str, ...] = ()) -> None:
    """Replace the parameters of a model by the tensors of an original checkpoint.

    dtype: of the parameters, that of the tensors if None.  optional: prefixes of parameters of ours that may be absent
    and then stay as they are. Raises ValueError that names missing, unexpected or mis-shaped tensors, and such as can
    be no weights: not of floating-point numbers, or of NaN and inf.
    """
    original_name = model.original_names(tensors)
    state: dict[str, Tensor] = {}
    found: dict[str, list[str]] = {name: [] for name in ("missing", "unexpected", "wrong shape", "no weights")}
    used: set[str] = set()
    for key, ours in model.state_dict().items():
        sources, assemble = _origin(original_name(key))
        absent = [source for source in sources if source not in tensors]
        if absent:
            found["missing"] += [] if optional and key.startswith(optional) else absent
            continue
        used.update(sources)
        theirs = [tensors[source] for source in sources]
        unfit = [f"{source} is {no}" for source, tensor in zip(sources, theirs) if (no := _no_weights(tensor))]
        if unfit:
            found["no weights"] += unfit
            continue
        try:
            whole = assemble(*theirs)
        except (RuntimeError, IndexError):  # that cannot even be put together
            whole = None
        if whole is None or _without_ones(whole) != _without_ones(ours):
            shapes = " + ".join(str(tuple(tensor.shape)) for tensor in theirs) if whole is None else tuple(whole.shape)
            found["wrong shape"].append(f"{' + '.join(sources)} is {shapes} instead of {tuple(ours.shape)}")
            continue
        state[key] = whole.reshape(ours.shape).to(dtype or whole.dtype, copy=True)
        if not state[key].float().isfinite().all():
            too_large = whole.float().isfinite().all()
            found["no weights"].append(
                f"{' + '.join(sources)} {f'is too large for {dtype}' if too_large else 'holds NaN or inf'}"
            )
    found["unexpected"] = [name for name in tensors if name not in used and not DERIVED.search(name)]
    problems = [f"{what}: {_listed(which)}" for what, which in found.items() if which]
    if problems:
        raise UserError(f"the checkpoint does not fit this {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state, strict=not optional, assign=True)


def _no_weights(tensor: Tensor) -> str | None:
    """What a tensor is that can be no parameter."""
    if tensor.is_meta:
        return "empty (on meta)"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    return None if tensor.is_floating_point() else str(tensor.dtype)


def _origin(name: str) -> tuple[tuple[str, ...], Callable[..., Tensor]]:
    """The original tensors that make up a parameter of that original name, and how they do.

    The originals keep biases of queries and values apart, and an autoencoder's convolutions of attention together.
    """
    prefix, _, last = name.rpartition("to_")
    if last == "qkv.bias":
        return (f"{prefix}q_bias", f"{prefix}v_bias"), lambda q, v: torch.cat([q, torch.zeros_like(v), v])
    if last == "kv.bias":
        return (f"{prefix}v_bias",), lambda v: torch.cat([torch.zeros_like(v), v])
    if re.match(r"[qkv]\.", last):
        return (f"{prefix}qkv{last[1:]}",), lambda qkv: qkv.chunk(3)["qkv".index(last[0])]
    return (name,), lambda tensor: tensor


def rename(key: str, names: Iterable[tuple[str, str]]) -> str:
    """Apply every pattern of a table of regular expressions."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def count(tensors: Tensors, pattern: str) -> int:
    """Number of different values of the group in a pattern, over all names that match it from their start."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def shape(tensors: Tensors, name: str, dimensions: int) -> torch.Size:
    """Shape of a tensor that the configuration is read from. Raises ValueError if it is not there, or has not that many
    dimensions, each of a length."""
    if name not in tensors:
        raise UserError(f"the checkpoint lacks {name}")
    found = tensors[name].shape
    if len(found) != dimensions or 0 in found:
        raise UserError(f"{name} is {tuple(found)}, which is no shape of {dimensions} dimensions")
    return found


def heads(tensors: Tensors, name: str) -> int:
    """Number of attention heads, one for each element of a tensor. Raises ValueError if it is not there, or empty."""
    if name not in tensors:
        raise UserError(f"the checkpoint lacks {name}")
    if not tensors[name].numel():
        raise UserError(f"{name} is empty")
    return tensors[name].numel()


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    return tuple(n for n in tensor.shape if n != 1)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(str(name)[:200] for name in names[:most])) + more
