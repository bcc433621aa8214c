"""Empty stand-ins for compiled packages of SGLang that need CUDA to be imported; none of what they have is called."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {"sgl_kernel", "torchvision"}


class _Named(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Module(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return ModuleSpec(name, Finder, is_package=True) if name.split(".")[0] in NAMES else None

    @staticmethod
    def create_module(spec):
        return _Module(spec.name)

    @staticmethod
    def exec_module(module):
        pass


def stand_in() -> None:
    """From now on they can be imported. transformers has to look first: it would use what looks like torchvision."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    if Finder not in sys.meta_path:
        sys.meta_path.append(Finder)
