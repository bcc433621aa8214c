"""A causal model with its cache that is fed trees of tokens and then rolled back to the path that was accepted.

Used for the target, which sees a whole tree at once, and for drafts, which grow one level by level. Rows of a batch
keep paths of different lengths: shorter ones leave masked slots, which are closed once they are a fifth of the cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from draftdiff.core.importance import gather_kv
from draftdiff.llm.kept_cache import KeptLayer
from draftdiff.llm.tree import ROOT, ancestors, as_mask

# Models whose attention tells distances by the place in the cache, not by position ids: branches confuse them.
_BY_PLACE = {"bloom", "gpt_neo", "mpt"}
# Models with recurrent layers that start anew whenever several tokens come at once.
_START_ANEW = {"jamba", "zamba", "recurrent_gemma"}


class WindowLayer(KeptLayer):
    """A sliding-window layer that keeps what it is fed until told to forget, so that branches can be taken back."""

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        super().__init__()
        self.window = layer.sliding_window
        if layer.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values
        self.dropped = layer.get_seq_length() - self.physical_length

    def forget(self) -> None:
        """Drop what is out of the window, once that is most of the layer."""
        if self.keys is not None and self.values is not None and self.physical_length > 2 * self.window:
            self.dropped += self.physical_length - (self.window - 1)
            self.keys = self.keys[..., 1 - self.window :, :].clone()
            self.values = self.values[..., 1 - self.window :, :].clone()


def cache_argument(model: PreTrainedModel) -> str:
    """Under which name the model's forward takes its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _is_linear(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states")


class TreeDecoder:
    """Feeds trees to a model. `length` slots are committed; what came after them is pending until `keep`.

    model: a decoder-only language model of transformers.  ids: int64 [batch, tokens], left-padded.  attention_mask:
    [batch, tokens], None without padding.  cache: may hold the first of these tokens already.  chunk: most tokens of a
    forward of the prompt.  hidden: also return the last hidden states.
    Prefills all tokens but the last, which is the first to be fed. Models with linear-attention layers take chains of
    one row, with a second forward for what was accepted of a chain that was not wholly.
    Raises ValueError for a cache that cannot be rolled back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        chunk: int | None = None,
        hidden: bool = False,
    ) -> None:
        self.model, self.hidden = model, hidden
        self._device = model.device  # a model looks for it among its parameters each time
        self._attention = model.config._attn_implementation  # through several layers of properties
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        self.forwards = self.replays = 0  # replays are forwards, too
        self._argument = cache_argument(model)
        self._check_cache(len(ids), ids.shape[1])
        tokens = ids.shape[1] - 1
        if attention_mask is None:
            attention_mask = torch.ones_like(ids)
        real = attention_mask[:, :tokens].bool()
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        for start in range(self.cache.get_seq_length(), tokens, chunk or max(tokens, 1)):
            stop = min(start + (chunk or tokens), tokens)
            mask = None if bool(real.all()) else real[:, :stop].to(ids.dtype)
            self._forward(ids[:, start:stop], mask, positions[:, start:stop], logits_to_keep=1)
        self.next = (positions[:, -1]).tolist()
        self._windows: list[WindowLayer] = []
        self._prepare_rollback()
        self.valid = real.cpu().numpy()
        self.positions = positions[:, :tokens].cpu().numpy()
        self._reset_pending()

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.valid)

    def _reset_pending(self) -> None:
        self._parents: list[list[int]] = [[] for _ in range(self.rows)]
        self._seen: list[list[int]] = [[] for _ in range(self.rows)]
        self._depths: list[list[int]] = [[] for _ in range(self.rows)]

    def _check_cache(self, batch: int, tokens: int) -> None:
        name, cache = type(self.model).__name__, self.cache
        if self.model.config.get_text_config().model_type in _START_ANEW:
            raise ValueError(
                f"{name} cannot take drafts: its recurrent layers forget the past when tokens come at once"
            )
        layers = getattr(cache, "layers", None)
        if layers and all(_is_linear(layer) for layer in layers):
            raise ValueError(f"{name} cannot take drafts: it has no attention, and its states cannot be rolled back")
        allowed = layers is not None and all(
            _is_linear(layer)
            or type(layer).__name__ == "DummyLayer"  # of a layer that uses another's keys
            or type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer, WindowLayer)
            for layer in layers
        )
        if layers is None or not allowed or type(cache).__name__ in ("EncoderDecoderCache", "QuantizedCache"):
            kinds = sorted({type(layer).__name__ for layer in layers or ()}) or [type(cache).__name__]
            raise ValueError(f"speculative needs a dynamic cache, got {type(cache).__name__} of {', '.join(kinds)}")
        if cache.get_seq_length() >= tokens:
            raise ValueError(
                f"the cache holds {cache.get_seq_length()} tokens, which must be fewer than the prompt's {tokens}"
            )
        held = {
            len(layer.keys) for layer in layers if getattr(layer, "is_initialized", False) and layer.keys is not None
        }
        if held - {batch}:
            raise ValueError(f"the cache holds {held.pop()} rows, the prompt {batch}")

    def _prepare_rollback(self) -> None:
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                layers[index] = WindowLayer(layer)
        self._windows = [layer for layer in layers if isinstance(layer, WindowLayer)]
        self.linear = any(_is_linear(layer) for layer in layers)
        name, config = type(self.model).__name__, self.model.config.get_text_config()
        self._window = getattr(config, "sliding_window", None)
        alone = "full_attention" if self._window is None else "sliding_attention"
        self._kinds = set(getattr(config, "layer_types", None) or (alone,))
        self._no_branches = None
        if self.linear:
            self._no_branches = f"{name} has linear-attention layers: draft chains, one row at a time"
        elif config.model_type in _BY_PLACE or getattr(config, "alibi", False) or not _takes_positions(self.model):
            self._no_branches = f"{name} attends by place, not by position: draft chains, one row at a time, unpadded"
        elif "chunked_attention" in self._kinds:
            self._no_branches = f"{name} has chunked attention: draft chains, one row at a time, unpadded"
        if "conv" in self._kinds and not hasattr(self.cache, "activate_past_recording"):
            # Their layers start anew whenever several tokens come at once.
            raise ValueError(f"{name} takes drafts from transformers 5.15 on")
        self._save()

    def _save(self) -> None:
        """Remember recurrent states, which cannot forget a token once they have seen it."""
        layers = enumerate(self.cache.layers)
        self._saved = {index: copy.deepcopy(layer) for index, layer in layers if _is_linear(layer)}
        self._fed: list[int] = []

    def _replay(self, length: int) -> None:
        """Go back to the committed state and feed the first `length` pending tokens again."""
        tokens = torch.tensor([self._fed[:length]], dtype=torch.int64, device=self._device)
        for index, layer in enumerate(self.cache.layers):
            if index in self._saved:
                self.cache.layers[index] = self._saved[index]
            else:
                layer.crop(-len(self._fed))
        if length:
            self.replays += 1
            self._forward(
                tokens, None, self.next[0] + torch.arange(length, device=tokens.device)[None], logits_to_keep=1
            )

    def _forward(self, ids: Tensor, mask: Any, positions: Tensor, **kwargs: Any) -> Any:
        self.forwards += 1
        if self.hidden:
            kwargs["output_hidden_states"] = True
        if "logits_to_keep" in kwargs and not self.model._supports_logits_to_keep():
            del kwargs["logits_to_keep"]
        kwargs[self._argument] = self.cache
        held = self.cache.get_seq_length() if self.forwards == 1 else 0
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True, **kwargs
        )
        if self.forwards == 1 and self.cache.get_seq_length() != held + ids.shape[1]:
            raise ValueError(f"{type(self.model).__name__} does not keep its past in a cache of keys and values")
        return output

    def feed(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> Any:
        """The model's output for new pending tokens, logits [rows, most new tokens of a row, vocabulary].

        tokens, parents: for each row; a parent is an index of that row's pending tokens, in the order they were fed, or
        ROOT after the committed ones. Rows with fewer tokens are padded behind.
        """
        before = len(self._parents[0])
        width = max(map(len, tokens))
        ids, places = [], []
        for row, (new, above) in enumerate(zip(tokens, parents)):
            padding = [0] * (width - len(new))
            depths, start = self._depths[row], self.next[row]
            for parent in above:
                depths.append(0 if parent == ROOT else depths[parent] + 1)
            depths += padding
            ids.append([*new, *padding])
            places.append([start + depth for depth in depths[before:]])
            self._parents[row] += [*above, *[ROOT] * len(padding)]
            self._seen[row] = ancestors(self._parents[row], self._seen[row])
        if self.linear:
            self._fed += tokens[0]
        both = torch.tensor([ids, places], dtype=torch.int64, device=self._device)
        return self._forward(both[0], self._mask(before, places), both[1])

    def _is_plain_chain(self) -> bool:
        """Whether the host's own causal mask is the right one."""
        parents = self._parents[0]
        # The last one decides most of the time, without a walk.
        return (
            self.rows == 1
            and parents[-1] == len(parents) - 2
            and parents == list(range(-1, len(parents) - 1))
            and bool(self.valid.all())
        )

    def _mask(self, before: int, places: list[list[int]]) -> Any:
        if self._is_plain_chain():
            return None
        if self._no_branches:
            raise ValueError(self._no_branches)
        implementation = self._attention
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"trees and batches need attention 'sdpa' or 'eager', got {implementation!r}")
        pending = len(self._seen[0])
        full = np.empty((self.rows, len(places[0]), self.valid.shape[1] + pending), dtype=bool)
        full[:, :, :-pending] = self.valid[:, None]
        for row, seen in enumerate(self._seen):
            full[row, :, -pending:] = as_mask(seen[before:], pending)
        if self._window is None or "sliding_attention" not in self._kinds:
            return self._fitted(full, self._physical(windowed=False), implementation)
        slots = np.array([[self.next[r] + d for d in self._depths[r]] for r in range(self.rows)]).reshape(self.rows, -1)
        keys = np.concatenate([self.positions, slots], axis=1)
        near = np.array(places)[:, :, None] - keys[:, None, :] < self._window
        sliding = self._fitted(full & near, self._physical(windowed=True), implementation)
        if len(self._kinds) < 2:
            return sliding
        return {
            "full_attention": self._fitted(full, self._physical(windowed=False), implementation),
            "sliding_attention": sliding,
        }

    def _physical(self, *, windowed: bool) -> int:
        """Keys that the layers of a kind hold, pending ones included: evicted caches hold fewer than `length`."""
        for layer in self.cache.layers:
            if isinstance(layer, WindowLayer) == windowed and layer.is_initialized and layer.keys is not None:
                return layer.keys.shape[-2]
        return self.valid.shape[1]

    def _fitted(self, seen: np.ndarray, held: int, implementation: str) -> Tensor:
        """The mask of a forward, [rows, 1, new, held + new]: the last keys of `seen`, as the attention takes it."""
        mask = torch.from_numpy(seen)[:, None, :, -(held + seen.shape[1]) :].to(self._device)
        if implementation == "sdpa":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit one path of pending tokens for each row, from below ROOT down, and forget the other pending ones."""
        pending = len(self._parents[0])
        width = max(map(len, paths))
        if not all(list(path) == list(range(len(path))) for path in paths):
            index = torch.tensor([[*path, *[0] * (width - len(path))] for path in paths], device=self._device)
            for layer in self.cache.layers:
                if layer.is_initialized and layer.keys is not None:
                    _move(layer, index, pending)
        if self.linear:
            if width < pending:
                self._replay(width)
            self._save()
        elif width < pending:
            for layer in self.cache.layers:
                layer.crop(width - pending)
        if self.rows == 1:  # in a batch a row with gaps may still see slots that are out of the others' windows
            for layer in self._windows:
                layer.forget()
        kept = np.array([[j < len(path) for j in range(width)] for path in paths], dtype=bool).reshape(self.rows, width)
        places = np.array([[self.next[r] + j for j in range(width)] for r in range(self.rows)]).reshape(
            self.rows, width
        )
        self.valid = np.concatenate([self.valid, kept], axis=1)
        self.positions = np.concatenate([self.positions, places], axis=1)
        self.next = [start + len(path) for start, path in zip(self.next, paths)]
        self._reset_pending()
        if self.rows > 1:
            self._close_gaps()

    def _close_gaps(self) -> None:
        """Bring the rows of a batch to the right once there are many more slots than the longest row needs, or a window
        holds far more than it sees. Not in an evicted cache, whose layers hold fewer slots than the rows have tokens.
        """
        slots, needed = self.valid.shape[1], int(self.valid.sum(1).max())
        layers = [layer for layer in self.cache.layers if layer.is_initialized and layer.keys is not None]
        whole = {layer.keys.shape[-2] for layer in layers if not isinstance(layer, WindowLayer)} <= {slots}
        wide = any(window.physical_length > 2 * window.window for window in self._windows)
        if not whole or not (wide or slots > 1.25 * needed + 16):
            return
        for layer in layers:
            # What a window still holds of a row begins with a whole window, or with the row.
            valid = self.valid[:, -layer.keys.shape[-2] :]
            length = needed
            if isinstance(layer, WindowLayer):
                length = min(needed, layer.window - 1)
                layer.dropped = needed - length
            index = torch.from_numpy(_to_the_right(valid, length))[:, None].to(layer.keys.device)
            index = index.expand(-1, layer.keys.shape[1], -1)
            layer.keys, layer.values = gather_kv(layer.keys, layer.values, index)
        order = _to_the_right(self.valid, needed)
        self.valid = np.take_along_axis(self.valid, order, axis=1)
        self.positions = np.take_along_axis(self.positions, order, axis=1)


def _to_the_right(valid: np.ndarray, length: int) -> np.ndarray:
    """For each row its last `length` slots when those that are not valid go to the left, int64 [rows, length]."""
    return np.argsort(valid, axis=1, kind="stable")[:, -length:]


def _move(layer: DynamicLayer, index: Tensor, pending: int) -> None:
    """Bring the pending slots `index` [rows, kept] of a layer to the front of its pending ones."""
    for x in (layer.keys, layer.values):
        tail = x[:, :, x.shape[2] - pending :]
        where = index.to(x.device)
        if len(where) == 1:
            kept = tail.index_select(2, where[0])
        else:
            kept = tail.gather(2, where[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        tail[:, :, : index.shape[1]] = kept
