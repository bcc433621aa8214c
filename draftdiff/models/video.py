"""From a model's name and the user's sizes to a loaded pipeline and the arguments of its call, checked beforehand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from draftdiff.errors import UserError
from draftdiff.hosts.diffusers import with_one_dtype
from draftdiff.models.devices import find_device, find_dtype
from draftdiff.models.loading import loading, quiet_diffusers
from draftdiff.models.setup import Setup

EMBEDDED = "mini-video"
# What the options of a call are named in the pipelines, first match first.
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_FPS = ("frame_rate", "fps")
_DEFAULT_FPS = 16

# Package of diffusers' quantisation and what it is given.
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "bnb-4bit": ("bitsandbytes_4bit", {"load_in_4bit": True}),
    "bnb-8bit": ("bitsandbytes_8bit", {"load_in_8bit": True}),
    "int8": ("torchao", {"quant_type": "Int8WeightOnlyConfig"}),
    "fp8": ("torchao", {"quant_type": "Float8WeightOnlyConfig"}),
}

# What of a prompt uint8 frames [frames, height, width, 3] show; None for a prompt that cannot be judged.
Judge = Callable[[str, np.ndarray], dict[str, bool] | None]


@dataclass(frozen=True)
class Model:
    """A loaded pipeline. defaults: arguments of its call that are not the pipeline's own defaults."""

    name: str
    pipeline: Any
    defaults: dict[str, Any]
    fps: float

    @property
    def device(self) -> torch.device:
        """Where it computes; with offload the weights are elsewhere."""
        return self.pipeline._execution_device

    @property
    def makes_video(self) -> bool:
        return hasattr(self.pipeline, "video_processor") or "num_frames" in self.parameters

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(type(self.pipeline).__call__).parameters)


def load(
    name: str | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    offload: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    setup: Setup | None = None,
) -> Model:
    """Load a pipeline, put it on its device and set it up.

    name: folder or Hugging Face Hub id; None is the embedded mini model.  dtype: float32, float16 or bfloat16; None is
    bfloat16 on a GPU, and float32 on a CPU and for the embedded model.  device: as in torch; None is CUDA if there is.
    offload: "model", "sequential" or "group" keep weights in main memory until they are needed.  variant: of the weight
    files, as diffusers names them.  quantize: a key of `QUANTIZED`, for the transformer's weights.
    Raises UserError, in one line, for what cannot be loaded.
    """
    place = find_device(device)
    wanted = find_dtype(dtype, place, embedded=name is None)
    if offload is not None and place.type == "cpu":
        raise UserError("--offload needs a GPU")
    if name is None and variant is not None:
        raise UserError("--variant is for --model: the embedded model has none")
    if quantize is not None and (name is None or quantize not in QUANTIZED):
        allowed = ", ".join(QUANTIZED)
        raise UserError(f"--quantize must be one of {allowed}, with --model, got {quantize!r}")
    model = _embedded(wanted) if name is None else _pretrained(name, wanted, variant, quantize)
    (setup or Setup()).apply(model.pipeline)
    if offload == "model":
        model.pipeline.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        model.pipeline.enable_sequential_cpu_offload(device=place)
    elif offload == "group":
        model.pipeline.enable_group_offload(place, offload_type="leaf_level", use_stream=place.type == "cuda")
    else:
        model.pipeline.to(place)
    return model


def _embedded(dtype: torch.dtype) -> Model:
    from draftdiff.pipelines.mini.video import load_mini_video, mini_video_defaults

    with loading(EMBEDDED):
        defaults = mini_video_defaults()
        return Model(EMBEDDED, load_mini_video(dtype), dict(defaults["generate"]), defaults["fps"])


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    """What from_pretrained takes to load the transformers with fewer bits, by the package that has it."""
    from diffusers import PipelineQuantizationConfig

    backend, given = QUANTIZED[quantize]
    if backend == "torchao":
        from torchao import quantization

        given = {"quant_type": getattr(quantization, str(given["quant_type"]))()}
    elif "load_in_4bit" in given:
        given = given | {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_type": "nf4"}
    parts = ["transformer", "transformer_2"]
    return PipelineQuantizationConfig(quant_backend=backend, quant_kwargs=given, components_to_quantize=parts)


def _pretrained(name: str, dtype: torch.dtype, variant: str | None, quantize: str | None) -> Model:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"model folder {name!r} holds no diffusers pipeline (model_index.json)")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(f"model {name!r} is neither a folder nor a Hub id (owner/name)")
    with loading(name), quiet_diffusers():
        place = folder if folder.is_dir() else name
        options = with_one_dtype({"dtype": dtype, "variant": variant})
        if quantize is not None:
            options["quantization_config"] = _quantization(quantize, dtype)
        pipeline = DiffusionPipeline.from_pretrained(place, trust_remote_code=False, **options)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    fps = next((parameters[p].default for p in _FPS if p in parameters), None)
    return Model(name, pipeline, {}, fps if isinstance(fps, (int, float)) else _DEFAULT_FPS)


def world_prompts() -> list[str]:
    """Three prompts of the embedded model's world, each of a combination that it was not trained on."""
    from draftdiff.pipelines.mini import world as mini_world

    looks = zip(mini_world.HELD_OUT[::3], mini_world.SIZES * 2, mini_world.BACKGROUNDS)
    return [mini_world.plain_caption(mini_world.Scene(*scene, *look)) for scene, *look in looks]


def world_judge(prompts: Sequence[str]) -> tuple[Judge, list[str]]:
    """A judge of what the embedded model makes of these prompts, and a note on each that is not of its world."""
    from draftdiff.pipelines.mini import judge as mini_judge
    from draftdiff.pipelines.mini import world as mini_world

    scenes = {prompt: mini_world.parse_caption(prompt) for prompt in prompts}

    def judge(prompt: str, frames: np.ndarray) -> dict[str, bool] | None:
        scene = scenes[prompt]
        return None if scene is None else mini_judge.compare(mini_judge.judge(frames / 255), scene)

    notes = [
        f"the embedded model knows {', '.join(mini_world.COLOURS)} {', '.join(mini_world.SHAPES)} moving "
        f"{', '.join(mini_world.MOTIONS)}; {prompt!r} lacks one of them"
        for prompt, scene in scenes.items()
        if scene is None
    ]
    return judge, notes


def call_arguments(
    model: Model,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    strength: float | None = None,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call, prompt and generator excepted; None leaves the model's default.

    Raises UserError for an argument that the pipeline does not take, or a size that its VAE and patches cannot do.
    """
    named = {
        "frames": ("num_frames", frames),
        "height": ("height", height),
        "width": ("width", width),
        "steps": ("num_inference_steps", steps),
        "guidance": ("guidance_scale", guidance),
        "negative-prompt": ("negative_prompt", negative_prompt),
        "strength": ("strength", strength),
        "image": ("image", image),
        "last-image": ("last_image", last_image),
        "video": ("video", video),
    }
    kind = type(model.pipeline).__name__
    arguments = dict(model.defaults)
    for option, (argument, value) in named.items():
        if value is None:
            continue
        if argument not in model.parameters:
            raise UserError(f"{kind} takes no --{option}")
        arguments[argument] = value
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"--strength must be above 0 and at most 1, got {strength:g}")
    if fps is not None and fps <= 0:
        raise UserError(f"--fps must be above 0, got {fps:g}")
    if fps is not None:
        arguments |= {name: fps for name in _FPS if name in model.parameters}
    if "image" in model.parameters and image is None and model.parameters["image"].default is inspect.Parameter.empty:
        raise UserError(f"{kind} needs an --image to start from")
    if "VideoToVideo" in kind and video is None:  # its own default is None, which it refuses
        raise UserError(f"{kind} needs a --video to start from")
    check_sizes(model, arguments)
    return arguments


def check_sizes(model: Model, arguments: dict[str, Any]) -> None:
    """Raise UserError for sizes that the pipeline would round or fail on."""
    for name, option in (("num_inference_steps", "steps"), ("num_frames", "frames")):
        if arguments.get(name) is not None and arguments[name] < 1:
            raise UserError(f"--{option} must be at least 1, got {arguments[name]}")
    unit = _spatial_unit(model)
    for name in ("height", "width"):
        size = arguments.get(name)
        if size is not None and (size < 1 or size % unit):
            nearest = max(unit, round(size / unit) * unit)
            raise UserError(f"--{name} must be a multiple of {unit} for this model, got {size} (nearest: {nearest})")
    frames, stride = arguments.get("num_frames"), _temporal_stride(model)
    if frames is not None and stride and (frames - 1) % stride:
        nearest = round((frames - 1) / stride) * stride + 1
        raise UserError(
            f"--frames must be a multiple of {stride} plus 1 for this model, got {frames} (nearest: {nearest})"
        )


def _transformer_config(pipeline: Any) -> Any:
    transformer = getattr(pipeline, "transformer", None) or getattr(pipeline, "transformer_2", None)
    return getattr(transformer, "config", {})


def _spatial_unit(model: Model) -> int:
    """Pixels per token along a side: the VAE's scale times the transformer's patch; 1 where that is not known."""
    scale = next((getattr(model.pipeline, name) for name in _SPATIAL if hasattr(model.pipeline, name)), 1)
    patch = _transformer_config(model.pipeline).get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
    # Flux and Qwen-Image pack 2x2 latents in the pipeline, whatever the transformer says.
    return int(scale * (patch if model.makes_video else max(patch, 2)))


def _temporal_stride(model: Model) -> int | None:
    """Frames per latent frame after the first, None where the pipeline's own default does not follow that rule."""
    stride = next((getattr(model.pipeline, name) for name in _TEMPORAL if hasattr(model.pipeline, name)), None)
    default = model.parameters["num_frames"].default if "num_frames" in model.parameters else None
    follows = isinstance(default, int) and stride and (default - 1) % stride == 0
    return int(stride) if follows and stride else None
