"""How far two results of one computation may differ that sum in another order: measured on the computation itself.

Monte Carlo arithmetic (Parker, 1997) with one sample: it is run once more with every operand of a sum moved at random
by at most its last bit, and how far the result moves is what any order may differ by, times a small factor. So the
bound knows the model, the data and the dtypes in between, and neither the processor nor the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Their results depend on the order of summing, or on the instruction set's approximation.
_SUMS = ("mm", "convolution", "attention", "softmax", "norm", "sum", "mean")


class _MovedByRounding(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(word in func.__name__ for word in _SUMS) and not func._schema.is_mutable:
            args, kwargs = tree_map(self.moved, (args, kwargs))
        return func(*args, **kwargs)

    def moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return x
        last = torch.finfo(torch.float32).eps  # sums are kept in fp32, whatever they are of
        share = (2 * torch.rand(x.shape, generator=self.generator) - 1) * last
        return (x.float() * (1 + share)).to(x.dtype)


@dataclass(frozen=True)
class Rounded:
    """out: a tensor, or tensors in a list or dict.  bounds: by leaf of out, the largest difference of another order."""

    out: Any
    bounds: list[float]

    def holds(self, got: Any) -> bool:
        """Whether `check` has nothing to say."""
        try:
            self.check(got)
        except AssertionError:
            return False
        return True

    def check(self, got: Any) -> None:
        """Raise AssertionError, with the worst excess, unless got is out but for rounding."""
        expected, found = tree_leaves(self.out), tree_leaves(got)
        assert len(expected) == len(found)
        for i, (a, b, bound) in enumerate(zip(expected, found, self.bounds)):
            assert a.shape == b.shape and a.dtype == b.dtype
            far = float((a.double() - b.double()).abs().max())
            assert far <= bound, f"tensor {i}: {far:.3g} apart, rounding explains {bound:.3g}"


def rounded(run: Callable[[], Any], times: float = 4) -> Rounded:
    """What run() gives, and how far the same computation in another order may be from it.

    run must give the same at every call.  A bound that allows a hundredth of the largest number is refused: nothing
    could fail it.
    """
    out = run()
    with _MovedByRounding():
        other = run()
    bounds = []
    for a, b in zip(tree_leaves(out), tree_leaves(other)):
        largest = float(a.detach().abs().max())
        bound = times * float((a.double() - b.double()).abs().max()) + torch.finfo(a.dtype).eps * largest
        assert bound < 1e-2 * largest or largest == 0, f"bound {bound:.3g} of numbers up to {largest:.3g} says nothing"
        bounds.append(bound)
    return Rounded(out, bounds)
