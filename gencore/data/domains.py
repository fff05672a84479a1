"""Images of two domains without pairs, as CycleGAN has them: ``domains:some/folder`` or ``domains:archive.zip``.

They lie in ``trainA``, ``trainB``, ``testA`` and ``testB``, or in ``A`` and ``B`` as those of the data set ``pairs``,
with any one folder around all of it. The image is B; its condition ``source`` is an image of A, drawn independently.
"""

from __future__ import annotations

from pathlib import Path

from gencore.data._assembly import Plan, Row, assembled
from gencore.data._layout import two_sided
from gencore.data._sources import opened
from gencore.data.base import DatasetPlugin, NamedDataset, Split
from gencore.data.images import check_pillow
from gencore.data.pairs import TwoSidedSettings

_NAME = "domains"


def load_domains(path: Path, split: Split, settings: TwoSidedSettings | None = None) -> NamedDataset:
    """The images of two domains in a folder or zip archive.

    Args:
        path: the folder or the archive.
        split: ``"train"`` or ``"test"``.
        settings: a common size, which domain is that of the images, and whether those that cannot be read are skipped.

    Raises:
        MissingSplitError: one of the domains has no image of this split, or none that can be read.
        DataError: nothing to read, no folders of two domains, files that are no images; the message names the files.
    """
    check_pillow(_NAME)
    settings = settings or TwoSidedSettings()
    with opened(path, _NAME) as source:
        sides = two_sided(source)
        if sides is None:
            raise source.error(" has no folders of two domains, such as trainA and trainB, or A and B")
        target = 1 if settings.direction == "AtoB" else 0
        rows = {half: [Row(name) for name in both[target]] for half, both in sides.splits.items()}
        domain = {half: list(both[1 - target]) for half, both in sides.splits.items()}
        return assembled(source, split, settings, Plan(rows, domain, notes=sides.notes))


plugin = DatasetPlugin(
    name=_NAME,
    load=load_domains,
    needs_path=True,
    summary="unpaired images of two domains, trainA and trainB, or A and B: domains:PATH",
    settings=TwoSidedSettings,
)
