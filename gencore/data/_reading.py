"""Looking at the files of a source before they are decoded: which can be read, and of what size they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import IO, NamedTuple, TypeVar

from gencore.data._pixels import BadImageError, Fit, Header, decoded, header, reason_of
from gencore.data._sources import Source
from gencore.data.base import DataError, progress
from gencore.progress import Progress
from gencore.text import LISTED, NAMED, counted, listed, shown

_Read = TypeVar("_Read")


class Survey(NamedTuple):
    """What is known of images before anything is decoded: of both splits, so that they agree whichever is loaded."""

    names: tuple[str, ...]
    headers: dict[str, Header]
    bad: dict[str, str]


# The survey is that of both splits, and reading one after the other needs it twice.
@functools.lru_cache(maxsize=1)
def surveyed(source: Source, names: tuple[str, ...]) -> Survey:
    """The headers of these images, and why those without one cannot be read. The result must not be changed."""
    headers: dict[str, Header] = {}
    bad: dict[str, str] = {}
    with reading_progress(source, "headers", len(names)) as told:
        for name in names:
            if name in source.faults:
                bad[name] = source.faults[name]
            elif (found := attempt(source, name, header, bad)) is not None:
                headers[name] = found
            told.update()
    return Survey(names, headers, bad)


def attempt(source: Source, name: str, read: Callable[[IO[bytes], str], _Read], bad: dict[str, str]) -> _Read | None:
    """What ``read`` makes of the file, or None and the reason in ``bad``."""
    try:
        with source.files.open(name) as stream:
            return read(stream, name)
    except BadImageError as error:
        bad[name] = str(error)
    except MemoryError:
        raise
    except Exception as error:
        # The system's errors, and those of damaged archives, which are of many kinds.
        bad[name] = reason_of(error)
    return None


def reading_progress(source: Source, what: str, images: int) -> Progress:
    """Shows how far reading is, where that is wanted."""
    return progress(images, name=f"reading {shown(source.where.absolute().name)}, {what}", unit="image")


def refusal(source: Source, survey: Survey, bad: dict[str, str], decoded_already: Container[str]) -> DataError:
    """The error that names all images of both splits that cannot be read, given those that are known."""
    bad = dict(bad)
    rest = [name for name in survey.headers if name not in bad and name not in decoded_already]
    with reading_progress(source, "to list all bad files", len(rest)) as told:
        for name in rest:
            shape = Fit().shape(survey.headers[name])
            attempt(source, name, functools.partial(decoded, channels=3, fit=Fit(), shape=shape), bad)
            told.update()
    ordered = {name: bad[name] for name in survey.names if name in bad}
    return source.error(
        f": {len(bad)} of {counted(len(survey.names), 'image')} cannot be read: {listed(ordered, LISTED)}; "
        "--set data.skip_bad=true skips them",
        ordered,
    )


def window(source: Source, survey: Survey, names: Iterable[str], fit: Fit) -> tuple[int, int]:
    """Height and width of what is given of these images.

    Raises:
        DataError: none of them can be read, or they have several sizes; the message names them.
    """
    readable = [name for name in names if name in survey.headers]
    if not readable:
        number = counted(len(survey.bad), "image")
        raise source.error(f": none of {number} can be read: {listed(survey.bad, LISTED)}", survey.bad)
    if fit.size is not None:
        return fit.size, fit.size
    sizes: dict[tuple[int, int], list[str]] = {}
    for name in readable:
        sizes.setdefault(fit.shape(survey.headers[name]), []).append(name)
    if len(sizes) > 1:
        common = sorted(sizes.items(), key=lambda pair: -len(pair[1]))
        said = [f"{len(n)} {'is' if len(n) == 1 else 'are'} {w}x{h} ({shown(n[0])})" for (h, w), n in common[:NAMED]]
        more = f" and {counted(len(sizes) - NAMED, 'other size')}" if len(sizes) > NAMED else ""
        raise source.error(
            f": all images must have one size (width x height), but {', '.join(said)}{more}; "
            "--set data.size=64 takes images of any size: it resizes and crops them",
            [name for _, files in common[1:] for name in files],
        )
    return next(iter(sizes))


def channels_of(survey: Survey, names: Iterable[str]) -> int:
    """1 if all of these images are gray, else 3."""
    return 1 if all(survey.headers[name].gray for name in names if name in survey.headers) else 3


def enlarged(survey: Survey, names: Sequence[str], fit: Fit, kind: str) -> list[str]:
    """The note of images that are made larger."""
    if fit.size is None:
        return []
    sizes = {name: Fit(half=fit.half).shape(survey.headers[name]) for name in names}
    small = {name: f"{w}x{h}" for name, (h, w) in sizes.items() if min(w, h) < fit.size}
    below = f"smaller than {fit.size}x{fit.size}"
    return [f"enlarged {counted(len(small), kind)} {below}: {listed(small)}"] if small else []
