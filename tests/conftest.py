"""Shared settings of the suite."""

import gc
import os
from pathlib import Path

# Before triton is imported anywhere: on a machine without a GPU its kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# Their assertions explain themselves like those of a test module.
for path in Path(__file__).parent.glob("golden_*.py"):
    pytest.register_assert_rewrite(f"tests.{path.stem}")

# Test workers share the cores; threads of their own would only get into each other's way.
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: collections, of which a measurement asks for dozens, need not go through it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def own_attention_backend():
    """A backend that the test sets for a model, and diffusers for all, is taken back."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    active = Registry._active_backend
    yield
    Registry._active_backend = active


@pytest.fixture
def bf16_attention():
    """Skips where PyTorch's own attention fails in bf16: on a processor with AMX that is told to do without AVX-512."""
    x = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(f"PyTorch {torch.__version__} cannot attend in bf16 here: {error}")


@pytest.fixture(autouse=True, scope="session")
def _interpreted_language_is_patched_once():
    """Triton's interpreter swaps all functions of the language at every call of a device function: a third of its time.
    They are in place from the launch on, or from the first call of one of the language's own files."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patch = interpreter._patch_lang

    def once(function):
        modules = [one for one in function.__globals__.values() if one is language or one is language.core]
        return patch(function) if any(language.core.is_builtin(one.load) for one in modules) else None

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch


@pytest.fixture
def triton_interpreter():
    """Runs Triton kernels on CPU tensors."""
    pytest.importorskip("triton")
