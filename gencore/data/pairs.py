"""Paired images, as pix2pix has them: ``pairs:some/folder`` or ``pairs:archive.zip``.

Layouts, with any one folder around all of it::

    train/1.jpg test/2.jpg                              A and B side by side in one file, which is parted in the middle
    trainA/1.png trainB/1.png testA/2.png testB/2.png   of equal names, whatever their suffix
    A/1.png B/1.png                                     also with train and test in both, or both in train and test

Splits are called and made as those of the data set ``images``. The image is B, and its condition ``source`` is A.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gencore.config import field
from gencore.data._assembly import PictureSettings, Plan, Row, assembled
from gencore.data._layout import Sides, laid_out, two_sided
from gencore.data._sources import Source, opened
from gencore.data.base import DatasetPlugin, NamedDataset, Split
from gencore.data.images import check_pillow
from gencore.text import LISTED, counted, listed, shown

_NAME = "pairs"


@dataclass(frozen=True)
class TwoSidedSettings(PictureSettings):
    """How images of two kinds are read."""

    direction: Literal["AtoB", "BtoA"] = field("AtoB", doc="AtoB: B is the image, A its condition; BtoA: the reverse")


def load_pairs(path: Path, split: Split, settings: TwoSidedSettings | None = None) -> NamedDataset:
    """The pairs of a folder or zip archive.

    Args:
        path: the folder or the archive.
        split: ``"train"`` or ``"test"``.
        settings: a common size, which of both is the image, and whether images that cannot be read are skipped.

    Raises:
        MissingSplitError: no pair is of this split, or none that can be read.
        DataError: nothing to read, an image without its pair, files that are no images; the message names the files.
    """
    check_pillow(_NAME)
    settings = settings or TwoSidedSettings()
    forth = settings.direction == "AtoB"
    with opened(path, _NAME) as source:
        sides = two_sided(source)
        if sides is not None:
            return assembled(source, split, settings, _matched(source, sides, settings, forth))
        layout = laid_out(source, dict.fromkeys(source.names))
        rows = {of: [Row(item.name, item.name) for item in items] for of, items in layout.splits.items()}
        plan = Plan(rows, halves=(1, 0) if forth else (0, 1), notes=layout.notes)
        return assembled(source, split, settings, plan)


def _matched(source: Source, sides: Sides, settings: TwoSidedSettings, forth: bool) -> Plan:
    """The pairs of equal names."""
    rows: dict[Split, list[Row]] = {}
    alone: list[str] = []
    for split, (a, b) in sides.splits.items():
        by_stem = _by_stem(source, a), _by_stem(source, b)
        common = by_stem[0].keys() & by_stem[1].keys()
        alone += [name for side in by_stem for stem, name in side.items() if stem not in common]
        pairs = [(name, by_stem[1][stem]) for stem, name in by_stem[0].items() if stem in common]
        rows[split] = [Row(second, first) if forth else Row(first, second) for first, second in pairs]
    notes = list(sides.notes)
    if alone:
        what = f"{counted(len(alone), 'image has', 'images have')} no image of the same name on the other side"
        if not settings.skip_bad:
            skipped = "--set data.skip_bad=true skips them"
            raise source.error(f": {what}: {listed(alone, LISTED)}; {skipped}", alone)
        notes.append(f"skipped, as {what}: {listed(alone)}")
    return Plan(rows, notes=notes)


def _by_stem(source: Source, side: dict[str, str]) -> dict[str, str]:
    """The file of each name without suffix."""
    found: dict[str, str] = {}
    for name, stem in side.items():
        if stem in found:
            both = f"{shown(found[stem])} and {shown(name)}"
            raise source.error(f": {both} have the same name but for the suffix, so that pairs are not known", [name])
        found[stem] = name
    return found


plugin = DatasetPlugin(
    name=_NAME,
    load=load_pairs,
    needs_path=True,
    summary="paired images, A|B in one file, trainA and trainB, or A and B: pairs:PATH",
    settings=TwoSidedSettings,
)
