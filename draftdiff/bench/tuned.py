"""What tuning is worth: a tuned spread of work beside schedules of as many query-key pairs, on other prompts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from draftdiff.bench.quality import SCHEDULES, Quality, held_out
from draftdiff.compare.tune import BASE, of_as_many_pairs
from draftdiff.errors import UserError
from draftdiff.video.config import DraftAttentionConfig

_DENSER = "first steps denser"


class Tuned(Quality):
    """The last prompts are tuned with, the others are judged by."""

    name = "tuned"
    file = "{device}-tuned"

    @cached_property
    def _all(self) -> list[str]:
        prompts = self.options.prompt or held_out(self.options.prompts + self.options.calibrate)
        if len(prompts) <= self.options.calibrate:
            raise UserError(f"--calibrate {self.options.calibrate} leaves no --prompt to judge by")
        return list(prompts)

    @cached_property
    def prompts(self) -> list[str]:
        return self._all[: -self.options.calibrate]

    def named_settings(self) -> dict[str, DraftAttentionConfig]:
        found: dict[str, DraftAttentionConfig | None] = {}
        base = DraftAttentionConfig(**{**BASE.to_dict(), **self.common})
        for sparsity in self.options.sparsity:
            at = f"sparsity {sparsity:g}"
            found[f"default, {at}"] = plain = DraftAttentionConfig(sparsity, **self.common)
            work = self.steps - sparsity * len(plain.sparse_steps(self.steps))
            found[f"{_DENSER}, {at}"] = SCHEDULES[_DENSER].config(work, self.steps, self.common)
            found[f"tuned, {at}"] = of_as_many_pairs(
                self.model.pipeline,
                self._all[-self.options.calibrate :],
                plain,
                call_kwargs=self.call,
                config=base,
                seed=self.options.seed,
            )
        return {name: config for name, config in found.items() if config is not None}

    def about(self) -> dict[str, Any]:
        return {**super().about(), "calibrated_with": self._all[-self.options.calibrate :]}
