"""What a model needs beside its noise, taken from a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gencore import ops
from gencore.data.base import DataError, NamedDataset
from gencore.models.base import GenerativeModel
from gencore.noise import Key

# Of the images whose conditions are taken: in a data set, those of a class often follow each other.
_ORDER_KEY = Key(int.from_bytes(b"order", "big"))


def conditions_for(
    model: GenerativeModel,
    images: NamedDataset,
    n: int,
    *,
    required: bool = False,
    in_turns: bool = False,
    in_order: bool = False,
) -> dict[str, Tensor | Sequence[str]]:
    """What a model takes of the conditions of ``n`` images, which begin anew if there are less.

    Args:
        required: give those alone that the model cannot do without; otherwise, those that the images have.
        in_turns: give classes in turns, instead of those of the images.
        in_order: take the first images, instead of some in an order that is always the same.

    Raises:
        DataError: the images lack a condition that is required, or have another one of its name than the model was
            trained with.
    """
    needs = model.takes.items()
    names = [name for name, need in needs if (need == "required" if required else name in images.spec)]
    for name in names:
        if name not in images.spec:
            raise DataError(f"data set {images.name} has no {name}, which model {model.plugin_name} needs")
        ours, theirs = model.spec[name], images.spec[name]
        if (ours.kind, ours.names, ours.shape) != (theirs.kind, theirs.names, theirs.shape):
            what = {"class": "other classes", "image": "another shape"}[ours.kind] if ours.kind == theirs.kind else ""
            differs = f"has {what}" if what else f"is of another kind, {theirs.kind},"
            raise DataError(f"data set {images.name}: its {name} {differs} than the model was trained with")
    if not names:
        return {}
    rows = torch.arange(n) % len(images)
    if not in_order:
        rows = ops.uniform((len(images), 1), _ORDER_KEY)[:, 0].argsort(stable=True)[rows]
    given = images.batch(rows).conditions
    found = {name: given[name] for name in names}
    if in_turns:
        found |= {name: torch.arange(n) % len(model.spec[name].names) for name in names if model.spec[name].names}
    return found
