"""Every picture that gencore draws: grids of images (Pillow) and curves (matplotlib), as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gencore.files import write_atomically

# Images are enlarged to about this many pixels a side: 8x8 digits can be seen, and stay as sharp as they are.
_CELL = 56
_GAP, _MARGIN = 4, 12
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def grid(images: Tensor, columns: int, row_labels: Sequence[str] = (), rows_per_group: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [0, 1], C of 1 or 3, row by row; small ones enlarged.

    Args:
        columns: images in a row.
        row_labels: a word left of each row.
        rows_per_group: a wider gap follows each group of rows.

    Raises:
        ValueError: another number of channels, or no image.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be (N, 1 or 3, H, W) with N >= 1 to be drawn, got {tuple(images.shape)}")
    pixels = (images.detach().float().cpu().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
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
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        x = _MARGIN + label_width + column * (width + _GAP)
        y = _MARGIN + row * (height + _GAP) + (row // rows_per_group * _GAP * 2 if rows_per_group > 1 else 0)
        if column == 0 and row < len(row_labels):
            draw.text((_MARGIN, y + height // 2), row_labels[row], _INK, _font(), anchor="lm")
        array = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        # Smoothly: the eye reads a digit of eight pixels better when it does not see the pixels.
        canvas.paste(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC), (x, y))
    return canvas


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
