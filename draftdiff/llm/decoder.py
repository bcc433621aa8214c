"""A causal model with its cache that is fed trees of tokens and then rolled back to the path that was accepted.

Used for the target, which sees a whole tree at once, and for drafts, which grow one level by level. Rows of a batch
keep paths of different lengths: shorter ones leave masked slots, which are closed once they are a fifth of the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from draftdiff.core.importance import gather_kv
from draftdiff.hosts.transformers import (
    attention_name,
    borrows_keys,
    cache_argument,
    device_of,
    is_recurrent,
    last_logits_only,
)
from draftdiff.hosts.transformers_quirks import layer_kinds
from draftdiff.llm.checks import require
from draftdiff.llm.kept_cache import WindowLayer
from draftdiff.llm.rollback import check_cache, no_branches
from draftdiff.llm.tree import ROOT, ancestors, as_mask


class TreeDecoder:
    """Feeds trees to a model. What was committed stays; what came after is pending until `keep`.

    Models with recurrent layers take chains of one row, with a second forward for what was accepted of a chain that was
    not wholly.
    forwards: of the model so far.  replays: those that brought recurrent states back to what was accepted.
    cache: the host's, in which a WindowLayer stands for each sliding layer.  next: position of each row's next token.
    valid, places: of the committed slots, [rows, slots]: a place counts padding too, as windows of attention do.
    layers: whose hidden states are read: i is what layer i is fed, -1 what leaves the last one's norm.
    states: those of the tokens that each row committed last, in order, [tokens, layers * width], layers side by side.
    """

    def __init__(self, model: PreTrainedModel, cache: Any, rows: int, *, layers: Sequence[int] = ()) -> None:
        self.model, self.cache, self.rows, self.layers = model, cache, rows, tuple(layers)
        self.states: list[Tensor] = [torch.empty(0, 0, device=device_of(model))] * rows
        self.forwards = self.replays = 0
        self.next = [0] * rows
        self.valid, self.places = np.ones((rows, 0), dtype=bool), np.zeros((rows, 0), dtype=np.int64)
        self._length = [0] * rows  # place of each row's next token
        self._unseen = np.zeros(rows, dtype=bool)  # rows whose first pending token none may see, not even itself
        # What a model finds out anew each time it is asked.
        self._device, self._attention, self._argument = (
            device_of(model),
            attention_name(model.config),
            cache_argument(model),
        )
        self._last_only, self._kinds = last_logits_only(model), layer_kinds(model)
        self._window = getattr(model.config.get_text_config(), "sliding_window", None)
        self._no_branches: str | None = None
        self._windows: list[WindowLayer] = []
        self._recurrent: dict[int, Any] = {}  # layers of the cache as they were when all they had seen was committed
        self._fed: list[int] = []  # pending tokens, to be fed again to recurrent layers
        self._pending: list[Tensor] = []  # hidden states of what was fed, [rows, tokens, layers * width] for each feed
        # Of each row's pending tokens: their parents, what they see, and their depths.
        self._parents: list[list[int]] = [[] for _ in range(rows)]
        self._seen: list[list[int]] = [[] for _ in range(rows)]
        self._depths: list[list[int]] = [[] for _ in range(rows)]

    @classmethod
    def prefill(
        cls,
        model: PreTrainedModel,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        *,
        last_position: Tensor | None = None,
        chunk: int | None = None,
        layers: Sequence[int] = (),
        whole: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
        media: Mapping[str, Any] | None = None,
        positions: Tensor | None = None,
    ) -> TreeDecoder:
        """A decoder that has read all tokens but the last, which is the first to be fed.

        model: a decoder-only language model of transformers.  ids: int64 [batch, tokens], left-padded.  attention_mask:
        [batch, tokens], None without padding; a host that guesses it from the ids may hide the last token, too.  cache:
        may hold the first of these tokens already.  last_position: of the last tokens, int64 [batch], if the host has
        counted them otherwise.  chunk: most tokens of a forward.  layers: whose hidden states are read, of all these
        tokens if `whole`, else of the last that is fed here (of none if the cache holds it).  inputs: more that the
        forward takes, [batch, tokens, ...] each.  media: what else it takes for these tokens, in one piece, such as the
        pictures of a prompt.  positions: [..., batch, tokens] of the prompt, where a model of several media has others.
        Raises ValueError for a model or a cache that cannot be rolled back, a model without hidden states where they
        are read, and a cache that holds tokens if those of all are.
        """
        cache = DynamicCache(config=model.config) if cache is None else cache
        check_cache(model, cache, len(ids), ids.shape[1])
        held = cache.get_seq_length()
        require(
            not (layers and whole and held),
            f"the drafter reads the target's hidden states of the whole prompt, got a cache that holds {held} of its "
            "tokens already",
        )
        decoder, tokens = cls(model, cache, len(ids), layers=layers), ids.shape[1] - 1
        if attention_mask is None:
            attention_mask = torch.ones_like(ids)
        real = attention_mask[:, :tokens].bool()
        counted = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        fed_positions = counted if positions is None else positions
        require(not (media and held), f"the prompt has media: the cache must be empty, it holds {held} tokens")
        chunk = None if media else chunk
        for start in range(held, tokens, chunk or max(tokens, 1)):
            stop = min(start + (chunk or tokens), tokens)
            mask = None if bool(real.all()) else real[:, :stop].to(ids.dtype)
            more = {name: x[:, start:stop] for name, x in (inputs or {}).items()} | dict(media or {})
            read = bool(layers) and (whole or stop == tokens)
            output = decoder._forward(
                ids[:, start:stop], mask, fed_positions[..., start:stop], read=read, **decoder._last_only, **more
            )
            if read:
                decoder._collect(output, slice(None) if whole else slice(-1, None))
        decoder._commit_prompt(real, counted)
        if decoder._pending:
            states = torch.cat(decoder._pending, dim=1)
            known = real[:, -states.shape[1] :].to(states.device)
            decoder.states = [of_row[those] for of_row, those in zip(states, known)]
            decoder._pending = []
        decoder._unseen = (attention_mask[:, -1] == 0).cpu().numpy()
        if last_position is not None:
            decoder.next = last_position.tolist()
        return decoder

    def _commit_prompt(self, real: Tensor, positions: Tensor) -> None:
        layers = self.cache.layers  # some caches make them as they are fed
        for index, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                layers[index] = WindowLayer(layer)
        self._windows = [layer for layer in layers if isinstance(layer, WindowLayer)]
        self._recurrent = {index: layer for index, layer in enumerate(layers) if is_recurrent(layer)}
        self._no_branches = no_branches(self.model, recurrent=bool(self._recurrent))
        self._remember()
        self.next = positions[:, -1].tolist()
        rows, length = real.shape
        self.valid, self.places = real.cpu().numpy(), np.tile(np.arange(length), (rows, 1))
        self._length = [length] * rows

    def _remember(self) -> None:
        """Copy recurrent states, which cannot forget a token once they have seen it."""
        self._recurrent = {index: _snapshot(self.cache.layers[index]) for index in self._recurrent}
        self._fed = []

    def _replay(self, length: int) -> None:
        """Go back to the committed state and feed the first `length` pending tokens again."""
        tokens = torch.tensor([self._fed[:length]], dtype=torch.int64, device=self._device)
        for index, layer in enumerate(self.cache.layers):
            if index in self._recurrent:
                self.cache.layers[index] = self._recurrent[index]
            else:
                layer.crop(-len(self._fed))
        if length:
            self.replays += 1
            positions = self.next[0] + torch.arange(length, device=tokens.device)[None]
            self._forward(tokens, None, positions, **self._last_only)

    def _collect(self, output: Any, which: slice = slice(None)) -> None:
        """Remember hidden states of the tokens of a forward."""
        found = getattr(output, "hidden_states", None)
        require(found is not None, f"{type(self.model).__name__} returns no hidden states, which the drafter reads")
        states = [found[layer][:, which].to(self._device) for layer in self.layers]  # type: ignore[index]
        self._pending.append(torch.cat(states, dim=-1) if len(states) > 1 else states[0])

    def _forward(self, ids: Tensor, mask: Any, positions: Tensor, *, read: bool = False, **kwargs: Any) -> Any:
        self.forwards += 1
        if read:
            kwargs["output_hidden_states"] = True
        kwargs[self._argument] = self.cache
        held = self.cache.get_seq_length() if self.forwards == 1 else 0
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True, **kwargs
        )
        if self.forwards == 1:
            require(
                self.cache.get_seq_length() == held + ids.shape[1],
                f"{type(self.model).__name__} does not keep its past in a cache of keys and values",
            )
        return output

    def feed(
        self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], *, block: int = 1, **inputs: Tensor
    ) -> Any:
        """The model's output for new pending tokens, logits [rows, most new tokens of a row, vocabulary].

        tokens, parents: for each row; a parent is an index of that row's pending tokens, in the order they were fed, or
        ROOT after the committed ones. Rows with fewer tokens are padded behind.  block: each row's new tokens come in
        chains of so many, all of whose tokens see what the last one sees.  inputs: more that the forward takes.
        """
        before = len(self._parents[0])
        width = max(map(len, tokens))
        ids, positions = [], []
        for row, (new, above) in enumerate(zip(tokens, parents)):
            padding = [0] * (width - len(new))
            depths, start = self._depths[row], self.next[row]
            for parent in above:
                depths.append(0 if parent == ROOT else depths[parent] + 1)
            depths += padding
            ids.append([*new, *padding])
            positions.append([start + depth for depth in depths[before:]])
            self._parents[row] += [*above, *[ROOT] * len(padding)]
            seen = self._seen[row] = ancestors(self._parents[row], self._seen[row])
            for start in range(before, before + len(new), block) if block > 1 else ():
                stop = min(start + block, before + len(new))
                seen[start:stop] = [seen[stop - 1]] * (stop - start)
        if self._recurrent:
            self._fed += tokens[0]
        both = torch.tensor([ids, positions], dtype=torch.int64, device=self._device)
        output = self._forward(both[0], self._mask(before), both[1], read=bool(self.layers), **inputs)
        if self.layers:
            self._collect(output)
        return output

    def _is_plain_chain(self) -> bool:
        """Whether the host's own causal mask is the right one."""
        parents = self._parents[0]
        # The last one decides most of the time, without a walk.
        return (
            self.rows == 1
            and parents[-1] == len(parents) - 2
            and parents == list(range(-1, len(parents) - 1))
            and bool(self.valid.all() and not self._unseen.any())
        )

    def _mask(self, before: int) -> Any:
        if self._is_plain_chain():
            return None
        require(not self._no_branches, self._no_branches or "")
        require(
            self._attention in ("sdpa", "eager"),
            f"trees and batches need attention 'sdpa' or 'eager', got {self._attention!r}",
        )
        pending = len(self._seen[0])
        full = np.empty((self.rows, pending - before, self.valid.shape[1] + pending), dtype=bool)
        full[:, :, :-pending] = self.valid[:, None]
        for row, seen in enumerate(self._seen):
            full[row, :, -pending:] = as_mask(seen[before:], pending)
        full[self._unseen, :, -pending] = False
        if self._window is None or "sliding_attention" not in self._kinds:
            return self._fitted(full, self._physical(windowed=False))
        places = np.array(self._depths).reshape(self.rows, -1) + np.array(self._length)[:, None]
        keys = np.concatenate([self.places, places], axis=1)
        near = places[:, before:, None] - keys[:, None, :] < self._window
        sliding = self._fitted(full & near, self._physical(windowed=True))
        if len(self._kinds) < 2:
            return sliding
        return {
            "full_attention": self._fitted(full, self._physical(windowed=False)),
            "sliding_attention": sliding,
        }

    def _physical(self, *, windowed: bool) -> int:
        """Keys that the layers of a kind hold, pending ones included: evicted caches hold fewer than `length`."""
        for layer in self.cache.layers:
            if isinstance(layer, WindowLayer) == windowed and layer.is_initialized and layer.keys is not None:
                return layer.keys.shape[-2]
        return self.valid.shape[1]

    def _fitted(self, seen: np.ndarray, held: int) -> Tensor:
        """The mask of a forward, [rows, 1, new, held + new]: the last keys of `seen`, as the attention takes it."""
        mask = torch.from_numpy(seen)[:, None, :, -(held + seen.shape[1]) :].to(self._device)
        if self._attention == "sdpa":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit one path of pending tokens for each row, from below ROOT down, and forget the other pending ones."""
        pending = len(self._parents[0])
        width = max(map(len, paths))
        padded = [[*path, *[0] * (width - len(path))] for path in paths]
        if self.layers:
            states = torch.cat(self._pending, dim=1)
            which = torch.tensor(padded, dtype=torch.int64, device=self._device)
            states = states.gather(1, which[..., None].expand(-1, -1, states.shape[-1]))
            self.states = [states[row, : len(path)] for row, path in enumerate(paths)]
            self._pending = []
        if not all(list(path) == list(range(len(path))) for path in paths):
            index = torch.tensor(padded, device=self._device)
            for layer in self.cache.layers:
                if layer.is_initialized and layer.keys is not None:
                    _move(layer, index, pending)
        if self._recurrent:
            if width < pending:
                self._replay(width)
            self._remember()
        elif width < pending:
            for layer in self.cache.layers:
                layer.crop(width - pending)
        if self.rows == 1:  # in a batch a row with gaps may still see slots that are out of the others' windows
            for layer in self._windows:
                layer.forget()
        steps = np.arange(width)
        kept = steps < np.array([len(path) for path in paths])[:, None]
        kept[self._unseen, :1] = False
        self._unseen[:] = False
        places = steps + np.array(self._length)[:, None]
        self.valid = np.concatenate([self.valid, kept], axis=1)
        self.places = np.concatenate([self.places, places], axis=1)
        self.next = [start + len(path) for start, path in zip(self.next, paths)]
        self._length = [start + len(path) for start, path in zip(self._length, paths)]
        for pending_of_rows in (self._parents, self._seen, self._depths):
            pending_of_rows[:] = [[] for _ in range(self.rows)]
        if self.rows > 1:
            self._close_gaps()

    def committed(self, layer: int = -1) -> tuple[Tensor, Tensor, Tensor] | None:
        """What a layer holds of the committed tokens, of which it is one that keeps keys; None before the first token.

        keys, values [rows, key heads, slots, head_dim], rotated as the model has left them: views, to be read between
        `keep` and the next feed.  valid: bool [rows, slots], false for padding and gaps; a row's tokens stand in order.
        A layer that slides over a window, or was evicted from, holds some of the last slots only.
        """
        held = self.cache.layers[layer]
        require(
            not is_recurrent(held) and not borrows_keys(held),
            f"layer {layer} of {type(self.model).__name__} keeps no keys and values of its own",
        )
        assert not self._parents[0], "committed while tokens are pending"
        if not held.is_initialized or held.keys is None:
            return None
        valid = torch.from_numpy(self.valid[:, self.valid.shape[1] - held.keys.shape[-2] :])
        return held.keys, held.values, valid.to(held.keys.device)

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
        self.places = np.take_along_axis(self.places, order, axis=1)


def _snapshot(layer: Any) -> Any:
    """A copy of a layer. Keys and values, which some have beside their states, are only added to and so shared."""
    shared = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    return copy.deepcopy(layer, {id(x): x for x in shared})


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
