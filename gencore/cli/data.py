"""``gencore data``: what a data set holds, in words and as a picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gencore import data, pictures
from gencore.cli.common import (
    DataSettings,
    beside,
    check_output,
    one_line,
    only_data,
    picture_file,
    read_images,
    report,
    say,
)
from gencore.data import MissingSplitError, NamedDataset, Split
from gencore.data.summary import Summary, examples, summary
from gencore.text import NAMED, counted, shown
from gencore.train.settings import data_settings


def command(
    name: Annotated[str, typer.Argument(metavar="NAME[:PATH]", help="The data set, such as images:photos.")],
    settings: DataSettings = None,
    split: Annotated[Split | None, typer.Option(help="Read this split alone.  [default: both]")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=4096, help="Images in the picture of --out.")] = 32,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=picture_file, help="Draw images with their conditions, as PNG."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Describe a data set: images, conditions, classes, captions; and draw some of it."""
    if out is not None:
        check_output(out)
    wanted = data_settings(None, name, only_data(settings))
    splits: list[Split] = ["train", "test"] if split is None else [split]
    found: dict[str, Summary] = {}
    read: list[NamedDataset] = []
    for each in splits:
        try:
            images = read_images(name, each, wanted)
        except MissingSplitError as error:
            if split is not None or (each == "test" and not found):
                raise
            say([str(error)])
            continue
        found[each] = summary(images)
        read.append(images)
    if len(read) == 2:
        data.check_same(read[0], read[1], name)
    if not as_json:
        print(
            "\n".join(line for each in found.values() for line in lines(each)),
            file=sys.stdout if out is None else beside(out),
        )
    if out is not None:
        picture, captions = examples(read[0], n)
        below = [shown(caption) for caption in captions] if any(captions) else ()
        pictures.save(pictures.grid(picture, captions=below), out)
        if not as_json:
            report(out, f"{counted(len(picture), f'{read[0].split} image')} of {read[0].name}")
    if as_json:
        told = {"data": name, "settings": wanted, "splits": {each: of.to_dict() for each, of in found.items()}}
        print(json.dumps(told), file=sys.stdout if out is None else beside(out))


def lines(told: Summary) -> list[str]:
    """What there is to say of one split, a line each."""
    rows = [f"{told.name}: {told}"]
    for name, counts in told.class_counts.items():
        common = sorted(counts.items(), key=lambda pair: -pair[1])
        named = [f"{shown(label)} {count:,}" for label, count in common[:NAMED]]
        more = f" and {len(common) - NAMED} more" if len(common) > NAMED else ""
        rows.append(f"{name}: {', '.join(named)}{more}")
    for name, (given, different, first) in told.texts.items():
        rows.append(
            f"{name}: {given:,} of {told.images:,} images, {different:,} different: {', '.join(map(repr, first))}, ..."
        )
    rows.append(f"fingerprint: {told.fingerprint}")
    return [one_line(rows[0]), *(f"  {one_line(row)}" for row in rows[1:])]
