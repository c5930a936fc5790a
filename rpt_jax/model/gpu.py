"""What matrix products of Triton kernels need."""

from __future__ import annotations

_SMALLEST_SIDE = 16


def fill_side(size: int) -> int:
    """Return the size of a side of a product with padding: a power of two, and at least 16."""
    return max(_SMALLEST_SIDE, 1 << (size - 1).bit_length())
