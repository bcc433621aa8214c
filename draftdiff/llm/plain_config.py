"""Settings of `generate` that leave a model's distribution as it is, whatever its generation config asks for."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


def own_law(model: Any, **fields: Any) -> GenerationConfig:
    """A config for `generate(generation_config=...)` by which a model continues text after its own law.

    Greedy, or with do_sample=True from the whole distribution at `temperature` (default 1). Of the model's generation
    config only the begin, end and padding tokens are taken; fields, those of GenerationConfig, come before them.
    """
    own = model.generation_config
    law: dict[str, Any] = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if fields.get("do_sample"):
        law["top_k"] = 0  # the host's default is 50
    return _Complete(**law | fields)


class _Complete(GenerationConfig):
    """`generate` fills what a config leaves at None from the model's own; of this one it cannot."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if allow_custom_entries:  # the model's own; the host's defaults, which are to be filled in, come without
            return {}
        return super().update(defaults_only=defaults_only, **kwargs)
