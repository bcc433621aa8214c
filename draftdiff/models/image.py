"""From a model's name to a next-scale pipeline (VAR, Infinity) in a setting of CoDe and ScaleKV, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftdiff.errors import UserError, user_errors
from draftdiff.models.devices import find_device, find_dtype
from draftdiff.models.frames import to_uint8
from draftdiff.models.loading import inputs_refused, loading, quiet_diffusers
from draftdiff.pipelines.hub import local_folder
from draftdiff.pipelines.infinity import InfinityPipeline
from draftdiff.pipelines.var import VARPipeline
from draftdiff.stored import read_json
from draftdiff.var.collaborative import check_draft_scales, check_pair
from draftdiff.var.scale_kv import check_cache_budget
from draftdiff.var.transformer_var import VARTransformer2DModel

EMBEDDED = "mini-image"
PIPELINES: dict[str, Any] = {kind.__name__: kind for kind in (VARPipeline, InfinityPipeline)}

Judge = Callable[[Any, np.ndarray], bool]


@dataclass(frozen=True)
class Setting:
    """What is switched on. draft_scales: scales that CoDe's drafter draws.  budget: share of the cache that ScaleKV
    keeps.  unguided: so many last scales without their unconditional half. None: off.  per: "layer" or "head", whose
    budget it is."""

    draft_scales: int | None = None
    budget: float | None = None
    per: str = "layer"
    unguided: int | None = None

    @property
    def name(self) -> str:
        parts = [] if self.draft_scales is None else [f"CoDe N={self.draft_scales}"]
        parts += [] if self.budget is None else [f"ScaleKV {100 * self.budget:g}%{' per head' * (self.per == 'head')}"]
        parts += [] if self.unguided is None else [f"last {self.unguided} unguided"]
        return " + ".join(parts) or "plain"


PLAIN = Setting()


@dataclass(frozen=True)
class ImageModel:
    """A loaded pipeline. refiner: CoDe's second model, if there is one.  defaults: arguments of its call that are not
    the pipeline's own defaults.  drafters: which layers look widely, by the keys of the file of `calibrate`.
    judge: (class name or id, picture) -> whether the picture shows it."""

    name: str
    pipeline: Any
    refiner: VARTransformer2DModel | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    drafters: dict[str, Any] = field(default_factory=dict)
    judge: Judge | None = None

    @property
    def by_class(self) -> bool:
        return isinstance(self.pipeline, VARPipeline)

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device

    @property
    def saved_setting(self) -> Setting:
        """That of the folder it came from: a pair of models decodes together."""
        return Setting(self.pipeline.config.draft_scales) if self.by_class and self.refiner is not None else PLAIN

    def tokens(self, call: dict[str, Any]) -> list[int]:
        """How many tokens each scale of a picture has."""
        if self.by_class:
            return [side**2 for side in self.pipeline.scheduler.patch_nums]
        sizes: dict[str, Any] = {name: call.get(name) for name in ("height", "width")}
        sizes |= {"aspect_ratio": call.get("aspect_ratio", 1.0), "size": call.get("size", "1M")}
        with user_errors():
            scales = self.pipeline._scales(**sizes)
        return [height * width for height, width in scales]

    def scales(self, call: dict[str, Any]) -> int:
        """How many scales a picture has. Raises UserError for a size or aspect ratio that is unknown."""
        return len(self.tokens(call))

    def check(self, setting: Setting, call: dict[str, Any]) -> None:
        """Raise UserError for a setting that this model cannot have."""
        if setting.draft_scales is not None:
            if not self.by_class:
                raise UserError("--draft-scales is for VAR, whose models come in pairs; Infinity's do not")
            with user_errors():
                check_draft_scales(setting.draft_scales, self.scales(call))
                if self.refiner is None:
                    raise UserError(f"--draft-scales needs a second model: {self.name} has none; name one by --refiner")
                check_pair(self.pipeline.transformer, self.refiner, setting.draft_scales)
        if setting.budget is not None:
            with user_errors():
                check_cache_budget(setting.budget)
            needed = ["missed", *(["refiner_missed"] if setting.draft_scales is not None else [])]
            if setting.per == "head" and not all(name in self.drafters for name in needed):
                raise UserError(
                    "--scale-kv-per head needs --scale-kv-drafters FILE: draftdiff image calibrate makes one"
                )
        if setting.unguided is not None and not 1 <= setting.unguided < self.scales(call):
            raise UserError(f"--unguided-scales must be from 1 to {self.scales(call) - 1}, got {setting.unguided}")

    def check_subjects(self, subjects: Sequence[Any]) -> None:
        """Raise UserError for a class that the model does not know, and prompts that are empty or not understood."""
        if self.by_class:
            with user_errors():
                self.pipeline.get_label_ids(list(subjects) or [0])
        elif self.pipeline.text_encoder is None:
            raise UserError(f"{self.name} holds no text encoder: convert it with --text-encoder")
        elif not all(str(text).strip() for text in subjects):
            raise UserError("--prompt is empty: say what the picture shall show")

    def apply(self, setting: Setting) -> None:
        """Switch all on or off. Raises UserError for drafters that are not of this model."""
        if self.by_class:
            self.pipeline.disable_collaborative()
            if setting.draft_scales is not None:
                assert self.refiner is not None
                self.pipeline.enable_collaborative(self.refiner, setting.draft_scales)
        if setting.unguided is None:
            self.pipeline.disable_unguided_scales()
        else:
            self.pipeline.enable_unguided_scales(setting.unguided)
        if setting.budget is None:
            self.pipeline.disable_scale_kv()
            return
        kind = "missed" if setting.per == "head" else "drafters"
        names = [kind] if setting.draft_scales is None else [kind, f"refiner_{kind}"]
        found = {name.replace("drafters", "wide_layers"): self.drafters.get(name) for name in names}
        with user_errors():
            self.pipeline.enable_scale_kv(setting.budget, per=setting.per, **found)

    def pictures(self, subjects: Sequence[Any], seed: int, **call: Any) -> np.ndarray:
        """One picture per subject (class or prompt), the i-th drawn from seed + i whatever the others are: uint8
        [pictures, height, width, 3]."""
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(subjects))]
        with inputs_refused(self.pipeline):
            made = self.pipeline(list(subjects), generator=generators, output_type="np", **call)
        return to_uint8(np.asarray(made.images))


def load(
    name: str | None, *, refiner: str | None = None, dtype: str | None = None, device: str | None = None
) -> ImageModel:
    """Load a next-scale pipeline and put it on its device.

    name: folder or hub repository; None is the embedded mini model.  refiner: likewise, of a second VAR model.
    dtype: float32, float16 or bfloat16; None is bfloat16 on a GPU, and float32 on a CPU and for the embedded model.
    Raises UserError, in one line, for what cannot be loaded.
    """
    place = find_device(device)
    wanted = find_dtype(dtype, place, embedded=name is None)
    if name is None:
        model = _embedded(wanted)
    else:
        pipeline = _pretrained(name, wanted)
        model = ImageModel(name, pipeline, getattr(pipeline, "refiner", None))
    if refiner is not None:
        if not model.by_class:
            raise UserError("--refiner is for VAR, whose models come in pairs; Infinity's do not")
        model = replace(model, refiner=_pretrained(refiner, wanted, expect="VARPipeline").transformer)
    model.pipeline.to(place)
    if model.refiner is not None:
        model.refiner.to(place)
    return model


def _embedded(dtype: torch.dtype) -> ImageModel:
    from draftdiff.pipelines.mini.image import load_mini_image, load_mini_refiner, mini_image_defaults
    from draftdiff.pipelines.mini.picture_judge import judge

    with loading(EMBEDDED), quiet_diffusers():
        pipeline, refiner = load_mini_image(dtype=dtype), load_mini_refiner(dtype)
        defaults = mini_image_defaults()["generate"]

    def shows(subject: Any, picture: np.ndarray) -> bool:
        label = pipeline.get_label_ids(subject)[0] if isinstance(subject, str) else subject
        return judge(picture / 255).shows(label)

    return ImageModel(EMBEDDED, pipeline, refiner, defaults, judge=shows)


def _pretrained(name: str, dtype: torch.dtype, expect: str | None = None) -> Any:
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"model {name!r} is a file; make a folder of original checkpoints by: draftdiff convert")
    with loading(name):
        folder = local_folder(path if path.is_dir() else name, {})
        kind = read_json(folder / "model_index.json", "index of a pipeline").get("_class_name")
    allowed = list(PIPELINES) if expect is None else [expect]
    if kind not in allowed:
        hint = "" if expect else "; diffusers' own pipelines run by: draftdiff generate"
        raise UserError(f"model {name!r} is a {kind}, not a {' or '.join(allowed)}{hint}")
    with loading(name), quiet_diffusers():
        return PIPELINES[kind].from_pretrained(folder, dtype=dtype)


def default_settings(scales: int, pair: bool) -> tuple[list[int], list[float]]:
    """Numbers of drafted scales (the last four possible) and budgets that a comparison tries."""
    return list(range(max(scales - 4, 1), scales)) if pair else [], [0.2, 0.1, 0.04]


def settings_of(
    draft_scales: Sequence[int],
    budgets: Sequence[float],
    scales: int,
    per: Sequence[str] = ("layer",),
    unguided: Sequence[int] = (),
) -> list[Setting]:
    """Each alone, and each budget with the number of drafted scales nearest to the paper's (all but two)."""
    cut = [Setting(budget=budget, per=whose) for whose in per for budget in budgets]
    alone = [Setting(n) for n in draft_scales] + cut + [Setting(unguided=n) for n in unguided]
    if not draft_scales:
        return alone
    middle = min(draft_scales, key=lambda n: (abs(n - (scales - 2)), n))
    return alone + [replace(setting, draft_scales=middle) for setting in cut]
