"""Every picture that gencore draws: grids of images (Pillow) and curves (matplotlib), as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gencore.files import write_atomically

# Pillow's mode of an image with so many channels, as PNG has them.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# Images are enlarged to about this many pixels a side: 8x8 digits can be seen, and stay as sharp as they are.
_CELL = 56
_GAP, _MARGIN = 4, 12
# A caption has so many lines below its image; a longer one is cut. The place of a narrow image is so wide for it.
_LINES, _LINE, _CAPTION_WIDTH = 2, 15, 112
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


class NotFiniteError(ValueError):
    """Images hold a NaN or an infinity, as those of a model that has broken down."""


def grid(
    images: Tensor,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    rows_per_group: int = 1,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Images (N, C, H, W) in [0, 1], row by row; small ones enlarged.

    One channel is gray, three are RGB; a second or a fourth one is opacity, before white. Of more channels, each is a
    gray image beside the others.

    Args:
        columns: images in a row; None: as many as there are rows, or one more.
        row_labels: a word left of each row.
        rows_per_group: a wider gap follows each group of rows.
        captions: what is written below each image, in one line or two; cut where it is longer.

    Raises:
        ValueError: no image, or another number of captions.
        NotFiniteError: an image that is not finite.
    """
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images must be (N, C, H, W) and not empty to be drawn, got {tuple(images.shape)}")
    if captions and len(captions) != len(images):
        raise ValueError(f"captions must be one for each of {len(images)} images, got {len(captions)}")
    check_finite(images, "images")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if images.shape[1] not in MODES:
        images = images.transpose(1, 2).flatten(2).unsqueeze(1)
    cells = pixels(images)
    scale = max(1, round(_CELL / max(images.shape[2:])))
    height, width = images.shape[2] * scale, images.shape[3] * scale
    # What an image takes of the picture: itself, and its caption.
    place = max(width, min(_CAPTION_WIDTH, max(map(_text_width, captions), default=0)))
    lines = [_wrapped(caption, place) for caption in captions]
    pitch = height + _LINE * max(map(len, lines), default=0)
    rows = -(-len(images) // columns)
    label_width = max((_text_width(label) for label in row_labels), default=0) + (_GAP * 2 if row_labels else 0)
    groups = (rows - 1) // rows_per_group
    size = (
        2 * _MARGIN + label_width + columns * (place + _GAP) - _GAP,
        2 * _MARGIN + rows * (pitch + _GAP) - _GAP + (groups * _GAP * 2 if rows_per_group > 1 else 0),
    )
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        left = _MARGIN + label_width + column * (place + _GAP)
        x = left + (place - width) // 2
        y = _MARGIN + row * (pitch + _GAP) + (row // rows_per_group * _GAP * 2 if rows_per_group > 1 else 0)
        if column == 0 and row < len(row_labels):
            draw.text((_MARGIN, y + height // 2), row_labels[row], _INK, _font(), anchor="lm")
        for number, line in enumerate(lines[i] if captions else ()):
            draw.text((left + place // 2, y + height + _LINE * number), line, _INK, _font(), anchor="ma")
        # Smoothly: the eye reads a digit of eight pixels better when it does not see the pixels.
        drawn = picture(cell).resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(drawn, (x, y), mask=drawn.getchannel("A") if drawn.mode in ("LA", "RGBA") else None)
    return canvas


def check_finite(images: Tensor, what: str) -> None:
    """Raises NotFiniteError for images that hold a NaN or an infinity; ``what`` says which they are."""
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise NotFiniteError(f"{broken} of {len(images)} {what} are not finite, and no picture is written")


def pixels(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as uint8 on the CPU."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def picture(image: Tensor) -> Image.Image:
    """A picture of uint8 pixels (C, H, W), of 1 to 4 channels."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if len(image) == 1 else array)


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG with a panel for each run: the loss of each of its phases over the steps, from ``metrics.jsonl``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(runs), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, records) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        names = [name for name in (records[0] if records else {}) if name.endswith("/loss")]
        for name in names:
            axes.plot([record["step"] for record in records], [record.get(name) for record in records], label=name[:-5])
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def latent_map(
    places: Tensor, labels: Tensor | None, names: Sequence[str], decoded: Tensor, reach: float, title: str
) -> bytes:
    """A PNG of codes in the plane, coloured by class, beside the images that are decoded over the same square.

    Args:
        places: (N, 2), where the codes lie.
        labels: (N,), the classes, called ``names``; None without classes.
        decoded: (S * S, C, H, W) in [0, 1], of places from the top left of the square, row by row.
        reach: the square is from -reach to reach in both directions.

    Raises:
        NotFiniteError: a place or an image that is not finite.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_finite(places, "codes")
    check_finite(decoded, "images")
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    points, images = figure.subplots(1, 2)
    if labels is None:
        points.scatter(*places.T.numpy(), s=4, alpha=0.6)
    else:
        colours = colormaps["tab10" if len(names) <= 10 else "gist_rainbow"]
        for i, name in enumerate(names):
            colour = colours(i if len(names) <= 10 else i / len(names))
            points.scatter(*places[labels == i].T.numpy(), s=4, alpha=0.6, color=colour, label=name)
        if len(names) <= 20:
            points.legend(frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    points.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    side = math.isqrt(len(decoded))
    rows = pixels(decoded).unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
    # Gray images hold one channel, others are drawn without opacity.
    shown = rows[0] if len(rows) < 3 else rows[:3].permute(1, 2, 0)
    images.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=255, extent=(-reach, reach, -reach, reach))
    images.set(title="decoded over the same square")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def error_curves(errors: Mapping[str, Mapping[int, float]], title: str) -> bytes:
    """A PNG of errors over sizes, a curve for each name, both on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in errors.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(title=title, xlabel="values of the code", ylabel="mean squared error of a pixel")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({size for points in errors.values() for size in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def save(picture: Image.Image | bytes, path: Path) -> None:
    """Writes a picture as PNG, whole or not at all; ``path`` may have any name."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        picture = buffer.getvalue()
    write_atomically(path, picture)


def _font() -> Any:
    return ImageFont.load_default(size=13)


def _text_width(text: str) -> int:
    return int(_font().getlength(text)) + 1


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most so many pixels, cut after the last one that is drawn."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < _LINES:
        line = words.pop(0)
        while words and _text_width(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        lines.append(line)
    if words:
        lines[-1] += " " + " ".join(words)
    return [_cut(line, width) for line in lines]


def _cut(text: str, width: int) -> str:
    if _text_width(text) <= width:
        return text
    while text and _text_width(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
