"""Every picture that gencore draws: grids of images (Pillow) and curves (matplotlib), as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gencore.cli.common import UserError
from gencore.files import write_atomically

# Pillow's mode of an image with so many channels, as PNG has them.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# Images are enlarged to about this many pixels a side: 8x8 digits can be seen, and stay as sharp as they are.
_CELL = 56
_GAP, _MARGIN = 4, 12
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def grid(images: Tensor, columns: int, row_labels: Sequence[str] = (), rows_per_group: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [0, 1], row by row; small ones enlarged.

    One channel is gray, three are RGB; a second or a fourth one is opacity, before white. Of more channels, each is a
    gray image beside the others.

    Args:
        columns: images in a row.
        row_labels: a word left of each row.
        rows_per_group: a wider gap follows each group of rows.

    Raises:
        ValueError: no image.
        UserError: an image that is not finite.
    """
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"images must be (N, C, H, W) and not empty to be drawn, got {tuple(images.shape)}")
    check_finite(images, "images")
    if images.shape[1] not in MODES:
        images = images.transpose(1, 2).flatten(2).unsqueeze(1)
    cells = pixels(images)
    scale = max(1, round(_CELL / max(images.shape[2:])))
    height, width = images.shape[2] * scale, images.shape[3] * scale
    rows = -(-len(images) // columns)
    label_width = max((_text_width(label) for label in row_labels), default=0) + (_GAP * 2 if row_labels else 0)
    groups = (rows - 1) // rows_per_group
    size = (
        2 * _MARGIN + label_width + columns * (width + _GAP) - _GAP,
        2 * _MARGIN + rows * (height + _GAP) - _GAP + (groups * _GAP * 2 if rows_per_group > 1 else 0),
    )
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        x = _MARGIN + label_width + column * (width + _GAP)
        y = _MARGIN + row * (height + _GAP) + (row // rows_per_group * _GAP * 2 if rows_per_group > 1 else 0)
        if column == 0 and row < len(row_labels):
            draw.text((_MARGIN, y + height // 2), row_labels[row], _INK, _font(), anchor="lm")
        # Smoothly: the eye reads a digit of eight pixels better when it does not see the pixels.
        drawn = picture(cell).resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(drawn, (x, y), mask=drawn.getchannel("A") if drawn.mode in ("LA", "RGBA") else None)
    return canvas


def check_finite(images: Tensor, what: str) -> None:
    """Refuses images that hold a NaN or an infinity, as those of a model that has broken down."""
    broken = int((~images.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise UserError(f"{broken} of {len(images)} {what} are not finite, and no picture is written")


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
