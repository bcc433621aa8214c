"""Values that several commands read."""

from __future__ import annotations

import argparse


def seed(text: str) -> int:
    """A seed that PyTorch's generators take."""
    try:
        number = int(text)
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {text!r}")
    return number
