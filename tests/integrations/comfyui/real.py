"""ComfyUI itself, from the folder that COMFYUI_PATH names, on the CPU; what it needs and is not installed is empty."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

_NEEDS = (
    "av",
    "torchaudio",
    "torchsde",
    "torchvision",
    "kornia",
    "spandrel",
    "aiohttp",
    "alembic",
    "sqlalchemy",
    "yarl",
)


class _Empty(types.ModuleType):
    """A package in which every name is a class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        is_needed = name.partition(".")[0] in _NEEDS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_needed else None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def folder() -> Path | None:
    found = os.environ.get("COMFYUI_PATH")
    return Path(found) if found else None


def load():
    """Import it once in a process. It reads the command line."""
    if "comfy.options" in sys.modules:
        return
    sys.path.insert(0, str(folder()))
    sys.meta_path.append(_Finder())  # after those that find what is installed
    sys.modules["server"] = _Empty("server")
    argv, sys.argv = sys.argv, ["comfyui", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sample
        import comfy.supported_models
    finally:
        sys.argv = argv


def patcher(config, seed=0):
    """A ModelPatcher around a model of a configuration of `comfy.supported_models`, with weights that chance makes."""
    from comfy.model_patcher import ModelPatcher

    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.diffusion_model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def sample(patcher, latent, context, steps=4, cfg=1.0, **given):
    """What KSampler does with it."""
    import comfy.sample

    noise = torch.randn(latent, generator=torch.Generator().manual_seed(1))
    conditioning = [[[context, dict(given)]], [[context * 0.5, dict(given)]]]
    return comfy.sample.sample(
        patcher, noise, steps, cfg, "euler", "simple", *conditioning, torch.zeros(latent), disable_pbar=True, seed=1
    )
