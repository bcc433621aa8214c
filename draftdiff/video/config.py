"""All that a user can set about draft attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from draftdiff.attention.rule import Rule
from draftdiff.core.budget import Budget
from draftdiff.core.values import is_number, plain, shown
from draftdiff.errors import UserError

_TOKENS = 0.25  # of the budget


@dataclass(frozen=True)
class MadeFor:
    """The only kind of transformer that a config is for: its class, and its attention layers and heads."""

    transformer: str
    layers: int
    heads: int

    def __str__(self) -> str:
        return f"{self.transformer} with {self.layers} layers of {self.heads} heads"


@dataclass(frozen=True)
class DraftAttentionConfig:
    """How much is computed, by which rule, and when.

    sparsity: share of video key tiles that a head skips, in [0, 1); several are for equal stretches of the sparse
        steps, and a `Budget` spreads one over steps, layers and heads. Text is exact, so with much text the density
        over all tokens is above 1 - sparsity.
    selection: "error" (the tiles that their mean would stand for worst, equally many for each query tile), "draft" (by
        the mass of the draft map: half of the budget evenly, the rest where mass is missed), "upstream" (the paper's
        rule: one threshold per head) or "full".
    tokens: single tokens that a query tile reads, those outside its kept tiles that their mean stands for worst, as
        part of the budget: a number (int) or a share of the budget (float in [0, 1)); None is a quarter of it for
        "error", none for the others.
    tail: count skipped tiles through their mean key and value instead of dropping them.
    tile: box of tokens (frames, rows, columns); None chooses one per grid, (1, 8, 16) for "upstream".
    block_size: tokens of a tile, 64 or 128; None takes 128 from 16,384 video tokens on, where there are tiles enough.
    dense_steps: first denoising steps that stay dense, a number of steps (int) or a share of them (float in [0, 1]).
    dense_end: last denoising steps that stay dense, likewise.
    dense_layers: attention layers that stay dense: the first n (int), or these indices (tuple).
    min_tokens: calls with fewer video tokens are left alone; None is 1,024 on a CPU and 4,096 on other devices.
    backend: "auto" or a name of `draftdiff.kernels.block_sparse.BACKENDS`.
    precision: "full", or "int8": scores against video tiles in 8 bits, for GPUs with slow 16-bit products (GeForce);
        by the backend "triton" alone.
    dense_above: layers whose density is at least this are left to dense attention, in [0, 1]; None is where that is
        the faster one, by backend and kind of device (`draftdiff.kernels.crossover`).
    made_for: what a profile was tuned for; any other transformer is refused.

    Lists and arrays are taken for tuples, and numbers of other libraries for Python's. Raises ValueError that names the
    value for anything else. `of` also takes the names that users of ComfyUI know (`ALIASES`).
    """

    sparsity: float | tuple[float, ...] | Budget = 0.75
    selection: str = "error"
    tail: bool = True
    tokens: int | float | None = None
    tile: tuple[int, int, int] | None = None
    block_size: int | None = None
    dense_steps: int | float = 0.2
    dense_end: int | float = 0
    dense_layers: int | tuple[int, ...] = 1
    min_tokens: int | None = None
    backend: str = "auto"
    precision: str = "full"
    dense_above: float | None = None
    made_for: MadeFor | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = plain(getattr(self, name))
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                allowed = ", ".join("None" if kind is _NONE else kind.__name__ for kind in kinds)
                raise UserError(f"{name} must be of type {allowed}, got {shown(value)}")
            object.__setattr__(self, name, value)

        def require(valid: bool, name: str, allowed: str) -> None:
            if not valid:
                raise UserError(f"{name} must be {allowed}, got {shown(getattr(self, name))}")

        if self.tokens is not None:
            require(
                0 <= self.tokens < 1 if isinstance(self.tokens, float) else self.tokens >= 0,
                "tokens",
                "a number of tokens (int, 0 or more) or a share (float, at least 0 and below 1)",
            )
        may = self.selection in ("draft", "error")
        require(may or not self.tokens, "tokens", f"0 where selection is {self.selection!r}")
        _ = self.budget, self.rule
        for name in ("dense_steps", "dense_end"):
            steps = getattr(self, name)
            require(
                0 <= steps <= 1 if isinstance(steps, float) else steps >= 0,
                name,
                "a number of steps (int, 0 or more) or a share (float between 0 and 1)",
            )
        layers = self.dense_layers if isinstance(self.dense_layers, tuple) else (self.dense_layers,)
        require(
            all(type(n) is int and n >= 0 for n in layers),
            "dense_layers",
            "a number of layers or a tuple of layer indices, 0 or more",
        )
        require(self.min_tokens is None or self.min_tokens >= 0, "min_tokens", "0 or more")
        require(self.dense_above is None or 0 <= self.dense_above <= 1, "dense_above", "between 0 and 1")

    @classmethod
    def of(cls, value: Any) -> DraftAttentionConfig:
        """A config from what people pass for one: itself, None for the defaults, a sparsity, or a mapping of fields.

        Raises ValueError that names anything else.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        if isinstance(value, Budget) or (isinstance(plain(value), (int, float, tuple)) and not isinstance(value, bool)):
            return cls(sparsity=value)
        if not isinstance(value, Mapping):
            raise UserError(
                f"config must be a DraftAttentionConfig, a sparsity or a dict of its fields, got {shown(value)}"
            )
        return cls(**by_field(value))

    @classmethod
    def from_profile(cls, path: str | Path) -> DraftAttentionConfig:
        """The config that `draftdiff tune` wrote. Raises UserError, in one line, for a file that is none."""
        from draftdiff.video.profile import Profile

        return Profile.read(path).config

    @cached_property
    def budget(self) -> Budget:
        if isinstance(self.sparsity, tuple):
            return Budget.over_steps(self.sparsity)
        return self.sparsity if isinstance(self.sparsity, Budget) else Budget(self.sparsity)

    @cached_property
    def rule(self) -> Rule:
        """What a single attention call needs of this."""
        same = {f.name: getattr(self, f.name) for f in fields(Rule) if f.init and f.name != "single"}
        tokens = self.tokens
        if tokens is None:
            tokens = _TOKENS if self.selection == "error" else 0
        return Rule(single=tokens * (1 - self.budget.sparsity) if isinstance(tokens, float) else tokens, **same)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def is_dense_layer(self, index: int) -> bool:
        if isinstance(self.dense_layers, tuple):
            return index in self.dense_layers
        return index < self.dense_layers

    def sparse_steps(self, steps: int) -> range:
        """Which of a run's steps are sparse."""
        first, last = (
            round(dense * steps) if isinstance(dense, float) else dense for dense in (self.dense_steps, self.dense_end)
        )
        return range(first, steps - last)


def by_field(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of the config's fields, from those names and `ALIASES`.

    Raises ValueError that names what is neither, or what is given twice.
    """
    names = [f.name for f in fields(DraftAttentionConfig)]
    unknown = [str(name) for name in given if name not in (*names, *ALIASES)]
    if unknown:
        raise UserError(f"config has no field {', '.join(unknown)}; fields are {', '.join(names)}")
    found: dict[str, Any] = {}
    for key, value in given.items():
        name, _, read = ALIASES.get(key, (key, None, lambda _, same: same))
        if name in found:
            raise UserError(f"config gives {name} twice, also as {key}")
        found[name] = read(key, value)
    return found


def _percent(name: str, value: Any) -> float:
    found = plain(value)
    if not is_number(found) or not 0 <= found <= 1:
        raise UserError(f"{name} must be between 0 and 1, got {shown(value)}")
    return float(found)


def _blocks(name: str, value: Any) -> Any:
    """Layers as numbers, or as text with stretches: "0,1,38-39"."""
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in filter(None, value.replace(" ", "").split(",")):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"{name} must be layers as in '0,1,38-39', got {shown(value)}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


# Names that other tools have: the field, the type of what is written for it, and how that reads as ours.
ALIASES: dict[str, tuple[str, type, Callable[[str, Any], Any]]] = {
    "start_percent": ("dense_steps", float, _percent),
    "end_percent": ("dense_end", float, lambda name, value: 1 - _percent(name, value)),
    "dense_blocks": ("dense_layers", str, _blocks),
    "extra_tokens": ("tokens", int, lambda _, value: value),
}

_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "sparsity": (float, int, tuple, Budget),
    "selection": (str,),
    "tail": (bool,),
    "tokens": (int, float, _NONE),
    "tile": (tuple, _NONE),
    "block_size": (int, _NONE),
    "dense_steps": (int, float),
    "dense_end": (int, float),
    "dense_layers": (int, tuple),
    "min_tokens": (int, _NONE),
    "backend": (str,),
    "precision": (str,),
    "dense_above": (float, int, _NONE),
    "made_for": (MadeFor, _NONE),
}
