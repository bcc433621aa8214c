"""What the page does, without the page: one model, runs one at a time, dense ones kept so that a change of the sparsity
makes the sparse one alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from draftdiff.compare.metrics import psnr, ssim
from draftdiff.compare.video_run import Run, run_setting
from draftdiff.errors import UserError
from draftdiff.models.loading import inputs_refused
from draftdiff.models.video import EMBEDDED, Model, check_sizes, world_judge
from draftdiff.ui.steps import Cancelled, Progress, watched
from draftdiff.video.config import DraftAttentionConfig
from draftdiff.video.patch import disable

_CLOCKED = DraftAttentionConfig(dense_steps=1.0, min_tokens=0)  # dense, with clocks around its attention
_KEPT = 1 << 30  # bytes of dense frames
_LONGEST = 2000  # letters of a prompt
_NAMES = {"steps": "num_inference_steps", "frames": "num_frames", "width": "width", "height": "height"}


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for. sparsity: None is the profile's.  The others: None is the model's own default."""

    prompt: str
    seed: int = 0
    sparsity: float | None = 0.75
    steps: int | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Shown:
    """A dense and a sparse run of the same prompt and seed. notes: what a reader of the figures should know."""

    asked: Asked
    dense: Run
    sparse: Run
    psnr: float
    ssim: float
    notes: list[str] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        return self.dense.timing.seconds / self.sparse.timing.seconds

    @property
    def attention_speedup(self) -> float | None:
        """Of the video self-attentions alone, dense steps and layers included; None where none was clocked."""
        times = self.dense.timing.attention, self.sparse.timing.attention
        return times[0] / times[1] if all(times) else None


class Session:
    """A model and what was made with it. base: settings of sparse runs, whose sparsity the visitor chooses.
    profile: a tuned config to choose instead of one.  call: arguments of the pipeline's call where a visitor chooses
    none; None is the model's own."""

    def __init__(
        self,
        model: Model,
        base: DraftAttentionConfig,
        profile: DraftAttentionConfig | None = None,
        call: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.base, self.profile = model, base, profile
        self.call = dict(model.defaults if call is None else call)
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._warm: set[Any] = set()
        self._lock = threading.Lock()
        self._asked_to_stop: dict[str, threading.Event] = {}

    def config(self, sparsity: float | None) -> DraftAttentionConfig:
        """Raises UserError for a sparsity outside [0, 1), and for a profile where there is none."""
        if sparsity is not None:
            return replace(self.base, sparsity=float(sparsity))
        if self.profile is None:
            raise UserError("there is no profile: start draftdiff ui with --profile FILE")
        return self.profile

    def cancel(self, visitor: str) -> None:
        """Stop the run of a visitor before its next step; nothing if there is none."""
        if visitor in self._asked_to_stop:
            self._asked_to_stop[visitor].set()

    def cancel_all(self) -> None:
        for stop in list(self._asked_to_stop.values()):
            stop.set()

    def run(self, asked: Asked, tell: Callable[[Progress], None] = lambda _: None, visitor: str = "") -> Shown:
        """Make both. Raises UserError for what cannot be made, before anything is, and Cancelled after `cancel`."""
        config, call = self._checked(asked)
        stop = self._asked_to_stop[visitor] = threading.Event()
        try:
            with self._lock, inputs_refused(self.model.pipeline):
                self._warm_up(asked, call, config, tell, stop)
                kept = (asked.prompt, asked.seed, *(call.get(name) for name in _NAMES.values()))
                dense = self._runs.pop(kept, None)
                notes = [] if dense is None else ["the dense clip is that of an earlier run, its time too"]
                if dense is None:
                    dense = self._one(asked, call, _CLOCKED, "dense", tell, stop)
                self._keep(kept, dense)
                sparse = self._one(asked, call, config, "sparse", tell, stop)
        finally:
            disable(self.model.pipeline)
            if self._asked_to_stop.get(visitor) is stop:
                del self._asked_to_stop[visitor]
        likeness = psnr(sparse.frames, dense.frames), ssim(sparse.frames, dense.frames)
        return Shown(asked, dense, sparse, *likeness, notes=[*notes, *self._notes(asked, sparse)])

    def _checked(self, asked: Asked) -> tuple[DraftAttentionConfig, dict[str, Any]]:
        if not asked.prompt.strip():
            raise UserError("the prompt is empty")
        if len(asked.prompt) > _LONGEST:
            raise UserError(f"the prompt must have at most {_LONGEST} letters, got {len(asked.prompt)}")
        if not 0 <= asked.seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 to {2**63 - 1}, got {asked.seed}")
        chosen = {_NAMES[name]: value for name in _NAMES if (value := getattr(asked, name)) is not None}
        unknown = [name for name in chosen if name not in self.model.parameters]
        if unknown:
            raise UserError(f"{type(self.model.pipeline).__name__} takes no {', '.join(unknown)}")
        call = self.call | chosen
        check_sizes(self.model, call)
        return self.config(asked.sparsity), call

    def _one(
        self,
        asked: Asked,
        call: dict[str, Any],
        config: DraftAttentionConfig,
        name: str,
        tell: Callable[[Progress], None],
        stop: threading.Event,
    ) -> Run:
        with watched(self.model.pipeline, name, tell, stop.is_set):
            return run_setting(self.model.pipeline, config, asked.prompt, asked.seed, call)

    def _warm_up(
        self,
        asked: Asked,
        call: dict[str, Any],
        config: DraftAttentionConfig,
        tell: Callable[[Progress], None],
        stop: threading.Event,
    ) -> None:
        """Kernels are compiled and memory is found on first use of a size: that is not to be timed."""
        size = tuple(call.get(name) for name in ("num_frames", "height", "width"))
        if size in self._warm or "num_inference_steps" not in self.model.parameters:
            return
        few = {**call, "num_inference_steps": 2}
        self._one(asked, few, _CLOCKED, "warm-up, dense", tell, stop)
        # The dense steps would hide the sparse ones.
        self._one(asked, few, replace(config, dense_steps=0, dense_end=0), "warm-up, sparse", tell, stop)
        self._warm.add(size)

    def _keep(self, key: Any, run: Run) -> None:
        self._runs[key] = replace(run, latents=None)
        while len(self._runs) > 1 and sum(one.frames.nbytes for one in self._runs.values()) > _KEPT:
            self._runs.popitem(last=False)

    def _notes(self, asked: Asked, sparse: Run) -> list[str]:
        notes = world_judge([asked.prompt])[1] if self.model.name == EMBEDDED else []
        for one in sparse.reports:
            notes += [f"{one.transformer}, dense {count} times: {reason}" for reason, count in one.reasons.items()]
        if not any(one.sparse_steps for one in sparse.reports):
            notes.append("no step was sparse: too few steps or tokens for these settings")
        return notes


__all__ = ["Asked", "Cancelled", "Progress", "Session", "Shown"]
