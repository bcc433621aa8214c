"""Reading the original checkpoints of VAR, CoDe and Infinity.

Each model says for each of its parameters which original tensor that is; so whatever is missing, left over or
mis-shaped can be named as it stands in the file.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from draftdiff.errors import UserError

Tensors = Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

# A tensor that only checkpoints of this kind have.
KINDS = {
    "pos_1LC": "VARTransformer2DModel",
    "quantize.embedding.weight": "VQModel",
    "cfg_uncond": "InfinityTransformer2DModel",
    "decoder.conv_in.conv.weight": "AutoencoderBSQ",
}
# Where training checkpoints keep the weights.
NESTED = ("trainer", "gpt_fsdp", "var_wo_ddp", "vae", "state_dict", "model", "module")
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
    if path.is_dir():
        return _read_shards(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (
        RuntimeError,
        EOFError,
        OSError,
        BadZipFile,
        SafetensorError,
        pickle.UnpicklingError,
        ValueError,
        KeyError,
    ) as error:
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint (truncated, or not one of weights): {first}") from None
    return _weights(content, path)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside whatever a training run has saved around it."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in NESTED if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} holds no state dict of weights")
    return {re.sub(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.)+", "", name): t for name, t in content.items()}


def _read_shards(folder: Path) -> dict[str, Tensor]:
    indices = sorted(folder.glob("*.index.json"))
    if not indices:
        raise FileNotFoundError(f"{folder} has no index of shards (*.index.json)")
    try:
        placed = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{indices[0]} is not an index of shards") from None
    tensors: dict[str, Tensor] = {}
    names = sorted(set(placed.values()))
    for name in tqdm(names, desc=f"reading {folder.name}", unit="shard", disable=len(names) < 2):
        tensors |= read_checkpoint(folder / name)
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
    """`from_single_file` for a model that knows its original configuration and names."""

    @classmethod
    def original_config(cls, tensors: Tensors) -> dict[str, Any]:
        """Constructor arguments that fit a checkpoint."""
        raise NotImplementedError

    def original_names(self, tensors: Tensors) -> Callable[[str], str]:
        """From our parameter names to those of a checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_single_file(
        cls: type[Any], path: str | Path, *, torch_dtype: torch.dtype | None = None, **config: Any
    ) -> Any:
        """Load an original checkpoint: a file, or a folder of shards.

        torch_dtype: that of the file if None.  config: constructor arguments that the file cannot tell.
        Raises ValueError that names what does not fit.
        """
        tensors = read_checkpoint(path)
        try:
            found = kind_of(tensors)
            if found != cls.__name__:
                raise UserError(f"it holds a {found}, not a {cls.__name__}")
            with torch.device("meta"):  # no time for an initialisation that is overwritten
                model = cls(**{**cls.original_config(tensors), **config})
            fill(model, tensors, dtype=torch_dtype)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return model.eval()


def fill(model: Any, tensors: Tensors, *, dtype: torch.dtype | None = None, optional: tuple[str, ...] = ()) -> None:
    """Replace the parameters of a model by the tensors of an original checkpoint.

    dtype: of the parameters, that of the tensors if None.  optional: prefixes of parameters of ours that may be absent
    and then stay as they are. Raises ValueError that names missing, unexpected or mis-shaped tensors.
    """
    original_name = model.original_names(tensors)
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for key, ours in model.state_dict().items():
        sources, assemble = _origin(original_name(key))
        absent = [source for source in sources if source not in tensors]
        if absent:
            missing += [] if optional and key.startswith(optional) else absent
            continue
        used.update(sources)
        theirs = assemble(*(tensors[source] for source in sources))
        if _without_ones(theirs) != _without_ones(ours):
            misshapen.append(f"{' + '.join(sources)} is {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
            continue
        state[key] = theirs.reshape(ours.shape).to(dtype or theirs.dtype, copy=True)
    left = [name for name in tensors if name not in used and not DERIVED.search(name)]
    problems = [
        f"{what}: {_listed(found)}"
        for what, found in (("missing", missing), ("unexpected", left), ("wrong shape", misshapen))
        if found
    ]
    if problems:
        raise UserError(f"the checkpoint does not fit this {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state, strict=not optional, assign=True)


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


def shape(tensors: Tensors, name: str) -> torch.Size:
    """Shape of a tensor that the configuration is read from. Raises ValueError if it is not there."""
    if name not in tensors:
        raise UserError(f"the checkpoint lacks {name}")
    return tensors[name].shape


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    return tuple(n for n in tensor.shape if n != 1)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
