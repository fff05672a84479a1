"""From files that are known to a data set: decoded at once if all of it fits into memory, or else when asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gencore.config import Config, field
from gencore.data._columns import Block, Column, Held, Ragged, Shape
from gencore.data._files import FileColumn, FileImages
from gencore.data._pixels import Crop, Fit, decoded
from gencore.data._reading import (
    Survey,
    attempt,
    channels_of,
    enlarged,
    reading_progress,
    refusal,
    surveyed,
    window,
)
from gencore.data._sources import Source
from gencore.data.base import DataError, MissingSplitError, NamedDataset, Split
from gencore.data.memory import ColumnDataset, ImageDataset
from gencore.spec import SOURCE, TEXT
from gencore.text import LISTED, counted, listed, shown

# What the images of a split are called.
KINDS: dict[Split, str] = {"train": "training image", "test": "test image"}

_GIB = 1 << 30


@dataclass(frozen=True)
class PictureSettings(Config):
    """How pictures are read."""

    size: int | None = field(None, ge=1, le=8192, doc="height and width of all images, so that files may have any size")
    crop: Literal["center", "random", "none"] = field(
        "center",
        doc="center: the shorter side becomes size, the middle is kept; random: a window of it, another each time a "
        "training image is used; none: both sides become size, whatever the proportion",
    )
    flip: bool = field(False, doc="mirror half of the training images left to right, others each time")
    skip_bad: bool = field(False, doc="skip images that cannot be read, and say how many")
    cache: float = field(
        4.0, ge=0, doc="GiB of decoded images in memory; where there are more, they are decoded when they are used"
    )

    def check(self) -> Iterable[str]:
        if self.size is None and self.crop != "center":
            yield f"crop: must be center without a size (data.size), was {self.crop}"


class Row(NamedTuple):
    """An image and what is known of it."""

    image: str
    source: str | None = None
    class_name: str | None = None
    text: str = ""


class Plan(NamedTuple):
    """What the splits are made of, before any image is read.

    Attributes:
        rows: the images by split.
        domain: those of the unpaired condition ``source``, if there is one.
        class_names: of all classes; empty where classes are no condition.
        captioned: whether texts are a condition.
        halves: which half of its file the image is, and which its source; None for all of it.
        notes: what is to be said.
    """

    rows: Mapping[Split, Sequence[Row]]
    domain: Mapping[Split, Sequence[str]] | None = None
    class_names: Sequence[str] = ()
    captioned: bool = False
    halves: tuple[Literal[0, 1], Literal[0, 1]] | None = None
    notes: Sequence[str] = ()


class _Column(NamedTuple):
    """A column before it is read: its files and how each is made to fit."""

    names: list[str]
    fit: Fit
    shape: Shape
    sizes: np.ndarray

    @property
    def bytes(self) -> int:
        return self.shape[0] * int(self.sizes.prod(axis=1).sum())


def assembled(source: Source, split: Split, settings: PictureSettings, plan: Plan) -> NamedDataset:
    """The data set of a split.

    Raises:
        MissingSplitError: no image is of this split, or none that can be read.
        DataError: several sizes, files that are no images; the message names the files.
    """
    fits = _fits(settings, split, plan)
    survey = _survey(source, plan, fits)
    if survey.bad and not settings.skip_bad:
        raise refusal(source, survey, survey.bad, decoded_already=())
    if not plan.rows[split] or (plan.domain is not None and not plan.domain[split]):
        raise source.error(f" has no {KINDS[split]}s", kind=MissingSplitError)
    rows = [row for row in plan.rows[split] if row.image in survey.headers and row.source not in survey.bad]
    domain = None if plan.domain is None else [name for name in plan.domain[split] if name in survey.headers]
    columns = _columns(source, survey, plan, fits, rows, domain)
    bad: dict[str, str] = {}
    lazy = sum(column.bytes for column in columns.values()) > settings.cache * _GIB
    if lazy:
        read: dict[str, Column] = dict(_lazy(source, survey, columns, settings))
    else:
        paired = {name: column for name, column in columns.items() if name != "domain"}
        with reading_progress(source, split, len(rows) + len(domain or ())) as told:
            read, kept = _decoded(source, paired, bad, told.update)
            rows = [rows[i] for i in kept]
            if "domain" in columns:
                read |= _decoded(source, {"domain": columns["domain"]}, bad, told.update)[0]
    if bad and not settings.skip_bad:
        names = {name for column in columns.values() for name in column.names}
        raise refusal(source, survey, bad, decoded_already=names)
    bad = {**{name: survey.bad[name] for name in _names(plan, split) if name in survey.bad}, **bad}
    lost = _lost(plan, split, rows)
    if lost is None and domain is not None and not read["domain"]:
        lost = f"no {KINDS[split]} of the other domain"
    if lost:
        kind = DataError if rows else MissingSplitError
        raise source.error(f": {lost} can be read: {listed(bad, LISTED)}", bad, kind)
    notes = list(plan.notes)
    if bad:
        notes.append(f"skipped {counted(len(bad), KINDS[split])} that cannot be read: {listed(bad)}")
    used = dict.fromkeys(name for column in columns.values() for name in column.names if name not in bad)
    notes += enlarged(survey, list(used), columns["image"].fit, KINDS[split])
    return _made(source, split, settings, plan, rows, read, notes, lazy)


def _made(
    source: Source,
    split: Split,
    settings: PictureSettings,
    plan: Plan,
    rows: Sequence[Row],
    read: Mapping[str, Column],
    notes: Sequence[str],
    lazy: bool,
) -> NamedDataset:
    """The data set of columns that are read, or will be."""
    index = {name: i for i, name in enumerate(plan.class_names)}
    labels: Tensor | None = None
    if index:
        labels = torch.tensor([index[row.class_name] for row in rows if row.class_name is not None])
    conditions: dict[str, Column | Sequence[str]] = {}
    if plan.captioned:
        conditions[TEXT] = tuple(row.text for row in rows)
    if "source" in read:
        conditions[SOURCE] = read["source"]
    unpaired = {SOURCE: read["domain"]} if "domain" in read else {}
    name = shown(source.where.absolute().stem)
    training, images = split == "train", read["image"]
    options: dict[str, Any] = {"notes": notes, "flip": settings.flip and training}
    first = (labels, plan.class_names)
    columns = [images, *(values for values in conditions.values() if isinstance(values, Column)), *unpaired.values()]
    if all(isinstance(column, Held) for column in columns):
        options["conditions"] = {name: _pixels(v) if isinstance(v, Column) else v for name, v in conditions.items()}
        options["unpaired"] = {name: _pixels(column) for name, column in unpaired.items()}
        return ImageDataset(name, split, _pixels(images), *first, **options)
    options |= {"conditions": conditions, "unpaired": unpaired, "crop": settings.crop == "random" and training}
    if isinstance(images, FileColumn):
        where = f"data set {source.kind}: {shown(str(source.where))}"
        return FileImages(name, split, images, *first, where=where, skip_bad=settings.skip_bad, **options)
    return ColumnDataset(name, split, images, *first, **options)


def _pixels(column: Column) -> Tensor:
    assert isinstance(column, Held)
    return column.pixels


def _names(plan: Plan, split: Split) -> list[str]:
    """The files of a split, each once."""
    rows = plan.rows[split]
    names = [row.image for row in rows] + [row.source for row in rows if row.source is not None]
    return list(dict.fromkeys([*names, *(plan.domain[split] if plan.domain else ())]))


def _fits(settings: PictureSettings, split: Split, plan: Plan) -> tuple[Fit, Fit]:
    """How images are made to fit, and how those that are their conditions are."""
    crop: Crop = "center" if settings.crop == "random" and split == "test" else settings.crop
    image, other = plan.halves or (None, None)
    return Fit(settings.size, crop, image), Fit(settings.size, crop, other)


def _survey(source: Source, plan: Plan, fits: tuple[Fit, Fit]) -> Survey:
    """The headers of the images of both splits; bad are also those that cannot be made to fit."""
    names = dict.fromkeys([*_names(plan, "train"), *_names(plan, "test")])
    found = surveyed(source, tuple(names))
    unfit = {name: fault for name, header in found.headers.items() if (fault := fits[0].fault(header))}
    if not unfit:
        return found
    fitting = {name: header for name, header in found.headers.items() if name not in unfit}
    return Survey(found.names, fitting, {**found.bad, **unfit})


def _columns(
    source: Source,
    survey: Survey,
    plan: Plan,
    fits: tuple[Fit, Fit],
    rows: Sequence[Row],
    domain: Sequence[str] | None,
) -> dict[str, _Column]:
    """What is to be read of a split. Channels and sizes are those of both splits, so that these agree."""
    both = [*plan.rows["train"], *plan.rows["test"]]
    images = [row.image for row in both]
    sources = [row.source for row in both if row.source is not None]
    # A paired image has the height and width of its image; one of another domain may have others.
    height, width = window(source, survey, [*images, *sources], fits[0])
    made = {"image": _column(survey, [row.image for row in rows], images, fits[0], (height, width))}
    if sources:
        names = [row.source for row in rows if row.source is not None]
        made["source"] = _column(survey, names, sources, fits[1], (height, width))
    if plan.domain is not None and domain is not None:
        all_names = [*plan.domain["train"], *plan.domain["test"]]
        place = window(source, survey, all_names, fits[1])
        made["domain"] = _column(survey, domain, all_names, fits[1], place)
    return made


def _column(
    survey: Survey, names: Sequence[str], of_both_splits: Sequence[str], fit: Fit, place: tuple[int, int]
) -> _Column:
    sizes = np.array([fit.shape(survey.headers[name]) for name in names], np.int64).reshape(-1, 2)
    return _Column(list(names), fit, (channels_of(survey, of_both_splits), *place), sizes)


def _lazy(
    source: Source, survey: Survey, columns: Mapping[str, _Column], settings: PictureSettings
) -> dict[str, FileColumn]:
    source.files.keep()
    total = sum(column.bytes for column in columns.values())
    made = {}
    for name, column in columns.items():
        lengths = np.array([source.sizes.get(file, 0) for file in column.names], np.int64)
        limit = int(settings.cache * _GIB * column.bytes / total)
        made[name] = FileColumn(column.shape, column.sizes, source.files, column.names, lengths, column.fit, limit)
    return made


def _decoded(
    source: Source, columns: Mapping[str, _Column], bad: dict[str, str], told: Callable[[], None]
) -> tuple[dict[str, Column], list[int]]:
    """The columns, of the rows all of whose pictures can be decoded, and these rows; ``bad`` gets the other files."""
    # One piece of memory each; what bad rows leave unused is at its end.
    blocks = {name: np.empty(column.bytes, np.uint8) for name, column in columns.items()}
    ends = dict.fromkeys(columns, 0)
    kept: list[int] = []
    for row in range(len(next(iter(columns.values())).names)):
        pictures = {}
        for name, column in columns.items():
            height, width = column.sizes[row].tolist()
            read = functools.partial(decoded, channels=column.shape[0], fit=column.fit, shape=(height, width))
            pictures[name] = attempt(source, column.names[row], read, bad)
        told()
        if any(pixels is None for pixels in pictures.values()):
            continue
        kept.append(row)
        for name, pixels in pictures.items():
            if pixels is not None:
                ends[name] += pixels.size
                place = blocks[name][ends[name] - pixels.size : ends[name]]
                place.reshape(pixels.shape)[...] = pixels
    made: dict[str, Column] = {}
    for name, column in columns.items():
        sizes, filled = column.sizes[kept], torch.from_numpy(blocks[name][: ends[name]])
        if (sizes == column.shape[1:]).all():
            made[name] = Held(filled.view(len(kept), *column.shape))
        else:
            made[name] = Ragged(column.shape, Block(column.shape[0], sizes, filled))
    return made, kept


def _lost(plan: Plan, split: Split, kept: Sequence[Row]) -> str | None:
    """What nothing is left of: the split, or a class of it that no other split has either."""
    if not kept:
        return f"no {KINDS[split]}"
    had = {row.class_name for row in plan.rows[split]}
    others = set() if split == "train" else {row.class_name for row in plan.rows["train"]}
    lost = [name for name in plan.class_names if name in had - others - {row.class_name for row in kept}]
    return f"no {KINDS[split]} of {'class' if len(lost) == 1 else 'classes'} {listed(lost, LISTED)}" if lost else None
