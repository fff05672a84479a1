"""The picture of a report: what is in it, and that it is one."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from bench import reports
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gencore.bench import picture


@pytest.fixture
def drawn(monkeypatch):
    """The texts in the figure that is saved."""
    texts = []
    savefig = Figure.savefig

    def saved(figure, *args, **options):
        texts.extend(text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text")))
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return texts


def test_it_is_a_picture_of_800_points_on_white_paper(tmp_path):
    picture.save(reports.report(), tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as image:
        assert image.format == "PNG"
        assert image.width == 1600
        assert 400 < image.height < 3200
        assert {image.convert("RGBA").getpixel(at) for at in ((0, 0), (1599, image.height - 1))} == {(255,) * 4}
        assert image.convert("RGBA").getextrema()[3] == (255, 255)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_the_same_report_makes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        picture.save(reports.report(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_largest_float32_case_of_each_use_of_an_op_is_chosen():
    assert [(one.op, one.benchmark, one.case) for one in picture.chosen(reports.report())] == [
        ("normal", "into a tensor", "64x4x64x64"),
        ("group_norm", "forward", "4x320x64x64-32groups"),
        ("group_norm", "forward and backward", "1x32x4x4-32groups"),
        ("attention", "forward", "4x8x1024x1024x40-heads"),
    ]


def test_it_says_what_it_shows(tmp_path, drawn):
    picture.save(reports.report(), tmp_path / "picture.png")
    told = "\n".join(drawn)
    for words in (
        "AMD EPYC 9575F, 2 threads", "v0.1.0-84-ga349dde", "2026-11-21", "eager", "best of torch.compile",
        "group norm, forward", "0.82, gencore slower", "14.3", "52.0", "1×", "10×",
    ):  # fmt: skip
        assert words in told
    # Liger-Kernel computes something else in that report, and the better of two ways to run eagerly stands for it.
    assert "0.71" not in told
    assert "1.20" in drawn
    assert "1.40" not in drawn


def test_other_rows_can_be_drawn(tmp_path, drawn):
    report = reports.report()
    rows = [one for one in report.results if one.section == "networks" or one.dtype == "bfloat16"]
    picture.save(report, tmp_path / "picture.png", rows)
    told = "\n".join(drawn)
    assert "unet, forward" in told
    assert "bfloat16" in told
    assert "1.36, diffusers" in told
    assert "normal" not in told


def test_there_must_be_something_to_draw(tmp_path):
    report = reports.report()
    hostile = [one for one in report.results if one.op == reports.HOSTILE]
    for rows in ([], hostile):
        with pytest.raises(ValueError, match="rows must hold a result with a peer"):
            picture.save(report, tmp_path / "picture.png", rows)
    with pytest.raises(ValueError, match="rows must"):
        picture.save(dataclasses.replace(report, results=()), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_ours_where_it_computes_something_else_is_not_drawn():
    wrong = reports.result("a", "b", "c", reports.ours(error=1.0), reports.peer("eager", 2.0))
    assert picture.chosen(reports.report(results=(wrong,))) == ()


@pytest.mark.parametrize("interval", [None, (math.nan, math.inf), (0.0, 2.0)])
def test_intervals_that_are_none_are_not_drawn(tmp_path, interval):
    one = reports.result(
        "$a", "b$", "c" * 99, reports.ours(), reports.peer("eager", 2.0, ratio_interval=interval),
        reports.peer("ours, Triton", 1.5), reports.peer("compile", math.nan), reports.failed("diffusers"),
    )  # fmt: skip
    report = reports.report(results=(one,), machine={"name": "x" * 200, "threads": 1, "device": "cpu"})
    picture.save(report, tmp_path / "picture.png")
    assert Image.open(io.BytesIO((tmp_path / "picture.png").read_bytes())).width == 1600


def test_ratios_of_many_sizes_fit(tmp_path, drawn):
    rows = tuple(
        reports.result(f"op{i}", "forward", "case", reports.ours(), reports.peer("eager", ratio))
        for i, ratio in enumerate((1e-4, 0.3, 1.0, 7.0, 2e5))
    )
    picture.save(reports.report(results=rows), tmp_path / "picture.png")
    assert "200000" in drawn


def test_no_text_is_cut_off_at_the_edges(tmp_path, monkeypatch):
    seen = []

    def looked_at(figure, *args, **options):
        figure.draw_without_rendering()
        width, height = figure.bbox.width, figure.bbox.height
        for text in figure.findobj(Text):
            box = text.get_window_extent()
            if text.get_text() and text.get_visible():
                seen.append(text.get_text())
                assert 0 <= box.x0 < box.x1 <= width, text.get_text()
                assert 0 <= box.y0 < box.y1 <= height, text.get_text()

    monkeypatch.setattr(Figure, "savefig", looked_at)
    picture.save(reports.report(), tmp_path / "picture.png", reports.report().results)
    wide = reports.result("a" * 80, "b", "c" * 80, reports.ours(), reports.peer("a peer with a long name", 90.0))
    picture.save(reports.report(results=(wide,), machine={"name": "GPU " * 40}), tmp_path / "picture.png")
    assert "1.36, diffusers" in seen
