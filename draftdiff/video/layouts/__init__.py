"""Where the visual tokens are: one table row per transformer class of diffusers.

A row names the self-attentions that see the whole picture or video, says how many visual tokens a forward call brings
and in which grid they lie, and where the other tokens of the joint sequence stand. A call whose attention does not fit
this picture (a mask over visual tokens, tokens in another order) gets no grid and stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from draftdiff.errors import UserError
from draftdiff.video.layouts.image import IMAGE
from draftdiff.video.layouts.layout import Layout
from draftdiff.video.layouts.nothing_to_win import NOTHING_TO_WIN
from draftdiff.video.layouts.video import VIDEO

__all__ = [
    "LAYOUTS",
    "NOTHING_TO_WIN",
    "Layout",
    "layout_for",
    "layout_name",
    "register_layout",
    "supported_models",
]

LAYOUTS: dict[str, Layout] = VIDEO | IMAGE


def layout_for(transformer: nn.Module) -> Layout:
    """The table row of a transformer, a subclass of it, or its `torch.compile` wrapper.

    Raises ValueError for a class that is not in the table.
    """
    return LAYOUTS[layout_name(transformer)]


def layout_name(transformer: nn.Module) -> str:
    """The supported class that a transformer is of. Raises ValueError as `layout_for` does."""
    model = getattr(transformer, "_orig_mod", transformer)
    for cls in type(model).__mro__:
        if cls.__name__ in LAYOUTS:
            return cls.__name__
    name = type(model).__name__
    if name in NOTHING_TO_WIN:
        raise UserError(f"{name} is not supported, since it has nothing to win: {NOTHING_TO_WIN[name]}")
    raise UserError(f"{name} is not supported; supported transformers: {', '.join(LAYOUTS)}")


def register_layout(name: str, layout: Layout) -> Callable[[], None]:
    """Give a transformer class a row of the table, or another one: `name` is the class's `__name__`, also of a base.

    Returns a function that takes the row away again, and puts back the one it replaced. Models that are enabled keep
    the row they were enabled with. Raises ValueError for a name or a row that cannot be one.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"name must be that of a transformer class, got {name!r}")
    if not isinstance(layout, Layout):
        raise UserError(f"layout must be a draftdiff.Layout, got {type(layout).__name__}")
    try:
        re.compile(layout.attention)
    except re.error as error:
        raise UserError(f"attention must be a regular expression, got {layout.attention!r}: {error}") from None
    if (layout.lead is not None) != (layout.text == "around"):
        raise UserError(f"lead goes with text='around' and with nothing else, got text={layout.text!r}")
    before = LAYOUTS.get(name)
    LAYOUTS[name] = layout

    def undo() -> None:
        if LAYOUTS.get(name) is layout:
            LAYOUTS.pop(name) if before is None else LAYOUTS.update({name: before})

    return undo


def supported_models() -> list[tuple[str, str, str]]:
    """(family, class name, note) of every supported transformer, in table order."""
    return [(layout.family, name, layout.note) for name, layout in LAYOUTS.items()]
