"""A row of the table: where the visual tokens of one transformer class are, and how its attention is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from draftdiff.core.grid import LatentGrid

Arguments = dict[str, Any]
GridFunction = Callable[[Any, Arguments], LatentGrid | tuple[int, int, int] | None]
Places = list[tuple[int, LatentGrid]]


@dataclass(frozen=True)
class Layout:
    """How one transformer class lays out its visual tokens.

    Functions get the transformer and the arguments of its forward by name, None for one that was not given.

    family: name of the model family for people.
    attention: regular expression; modules whose whole name matches are the self-attentions over the picture or video.
    grid: -> (frames, rows, columns) of the tokens that are made, or None to leave the call dense.
    text: where the tokens outside the grids stand; "around" means on both sides.
    route: how the processor reaches its kernel. "dispatch": by `dispatch_attention_fn` with the processor's backend;
        "sdpa": by `torch.nn.functional.scaled_dot_product_attention`; "flex": by `dispatch_attention_fn` with
        FlexAttention, whatever its backend; its mask is taken for a sparse attention of the model's own, which ours
        replaces, or for what `own_frames` says; "own": we replace the stock processor.
    lead: -> number of tokens in front of the grid, for text="around" only. In an attention call with less text, such as
        that of a block for the picture alone, all other text is behind the grid, and so much less is in front.
    others: -> further grids in the sequence, such as references, each with the position of its first token.
    keys: -> which tokens of the sequence may be read, bool [batch, tokens], if the model masks pairs of them.
    mask: -> what the model adds to the scores, [batch, tokens, tokens], if numbers that may differ by key.
    queries: in a call with more keys than queries, where the queries' tokens stand among those of the keys: "ends" says
        the grid at the end and the rest in front; "all" if the model makes none such.
    causal: -> frames of a block that see each other and those before, none behind, as the model's mask says; 0 if all
        see all.
    own_frames: -> frames of a reference behind all other keys, each read by the queries of one of the grid's last
        frames alone; grid and reference are each filled up to a multiple of 128 tokens.
    replaces: names of the forward's arguments by which a model asks for a sparse attention of its own; forwards with
        sparse layers get None in their place.
    inputs: names of the forward's arguments that hold the latents, a tensor or lists of them, and the timestep.
    one_stream: the other tokens come in the video's own stream, so that processes which share a sequence (Ulysses) each
        bring a stretch of the whole; else each brings a stretch of the text and one of the video.
    note: what a user should know, such as calls that stay dense.
    example: transformer -> small random arguments of a forward, for `draftdiff doctor --model`.
    """

    family: str
    attention: str
    grid: GridFunction
    text: Literal["none", "first", "last", "around"] = "none"
    route: Literal["dispatch", "sdpa", "flex", "own"] = "dispatch"
    lead: Callable[[Any, Arguments], int] | None = None
    others: Callable[[Any, Arguments], Places] | None = None
    keys: Callable[[Any, Arguments], Tensor | None] | None = None
    mask: Callable[[Any, Arguments], Tensor | None] | None = None
    queries: Literal["all", "first", "last", "ends"] = "all"
    causal: Callable[[Any, Arguments], int] | None = None
    own_frames: Callable[[Any, Arguments], int] | None = None
    replaces: tuple[str, ...] = ()
    inputs: tuple[str, str] = ("hidden_states", "timestep")
    one_stream: bool = False
    note: str = ""
    example: Callable[[Any], Arguments] | None = None
