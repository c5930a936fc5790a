"""How a TPU stores arrays."""

# The last axis of an array lies along the lanes of a register, the axis before it along the sublanes.
LANES = 128
SUBLANES = 8


def fill_lanes(size: int) -> int:
    """Return how many numbers of memory `size` numbers of the last axis take: whole registers."""
    return -(-size // LANES) * LANES


def fill_sublanes(size: int) -> int:
    """Return how many rows of registers `size` rows take."""
    return -(-size // SUBLANES) * SUBLANES
