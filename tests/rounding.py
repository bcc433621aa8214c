"""How far two results of one computation may differ that sum in another order: measured on the computation itself.

Monte Carlo arithmetic (Parker, 1997) with few samples: it is run again with every operand of a sum moved at random by
at most its last bit, and how far the result moves is what any order may differ by, times a small factor. So the bound
knows the model, the data and the dtypes in between, and neither the processor nor the order.
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
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

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


def rounded(run: Callable[[], Any], times: float = 4, samples: int = 1) -> Rounded:
    """What run() gives, and how far the same computation in another order may be from it.

    samples: more than one where a result hangs on few sums, so that one sample may be lucky.
    run must give the same at every call.  A bound that allows a hundredth of the largest number is refused: nothing
    could fail it.
    """
    out = run()
    others = []
    for seed in range(samples):
        with _MovedByRounding(seed):
            others.append(tree_leaves(run()))
    bounds = []
    for a, *moved in zip(tree_leaves(out), *others):
        largest = float(a.detach().abs().max())
        far = max(float((a.detach().double() - b.detach().double()).abs().max()) for b in moved)
        bound = times * far + torch.finfo(a.dtype).eps * largest
        assert bound < 1e-2 * largest or largest == 0, f"bound {bound:.3g} of numbers up to {largest:.3g} says nothing"
        bounds.append(bound)
    return Rounded(out, bounds)
