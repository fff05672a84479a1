"""The resolutions of convolutional networks: an image is halved until its shorter side has 4 to 7 pixels."""

from __future__ import annotations

from collections.abc import Sequence

_LEAST = 4
# Sides up to here are looked at for a size that would do.
_MOST = 4096


def halvings(height: int, width: int) -> int | None:
    """How often an image is halved, at least once; None for one that cannot be."""
    times = (min(height, width) // _LEAST).bit_length() - 1
    if times < 1 or height % (1 << times) or width % (1 << times):
        return None
    return times


def size_fault(name: str, height: int, width: int) -> str | None:
    """Why an architecture cannot make such images, and which it can; None if it can."""
    if halvings(height, width) is not None:
        return None
    sides = [side for side in range(2 * _LEAST, _MOST) if halvings(side, side) is not None]
    shorter = min(height, width)
    near = [max((s for s in sides if s <= shorter), default=None), min((s for s in sides if s > shorter), default=None)]
    told = " or ".join(f"{side}x{side}" for side in near if side is not None)
    return (
        f"network: {name} makes images whose sides are 4 to 7 times a power of two (the longer one any multiple of "
        f"it), such as {told} pixels, but the data set's are {height}x{width}"
    )


def base_of(height: int, width: int) -> tuple[int, int, int]:
    """How often an image is halved, and the height and width that it has then."""
    times = halvings(height, width)
    if times is None:
        raise ValueError(size_fault("this network", height, width))
    return times, height >> times, width >> times


def channels_at(channels: Sequence[int], level: int) -> int:
    """The channels at a resolution, of which 0 is the finest; the last ones are those of all that are coarser."""
    return channels[min(level, len(channels) - 1)]
