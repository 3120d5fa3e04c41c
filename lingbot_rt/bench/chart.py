"""A bar chart of stage times as a picture, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from lingbot_rt.bench.figures import Spread

_WIDTH, _MARGIN, _ROW, _BAR = 960, 24, 34, 20
_LABELS = 130  # width of the column of names
_VALUES = 210  # width of the column of figures
_PAPER, _INK, _SOFT = (255, 255, 255), (34, 38, 46), (120, 126, 138)
_COLOUR, _WHISKER = (58, 110, 165), (200, 90, 50)


def bar_chart(stages_ms: Mapping[str, Spread], caption: str) -> Image.Image:
    """One bar per stage: length p50, whisker to p95. ``caption`` stands above. RGB, 960 pixels wide."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    lines = caption.splitlines()
    top = _MARGIN + 20 * len(lines) + 14
    picture = Image.new("RGB", (_WIDTH, top + _ROW * len(stages_ms) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 20 * i), line, _INK if i == 0 else _SOFT, small)
    longest = max(spread.p95 for spread in stages_ms.values())
    left = _MARGIN + _LABELS
    scale = (_WIDTH - _MARGIN - _VALUES - left) / longest
    for i, (name, spread) in enumerate(stages_ms.items()):
        y = top + _ROW * i
        middle = y + _BAR // 2
        draw.text((_MARGIN, middle), name, _INK, font, anchor="lm")
        end, whisker = left + spread.p50 * scale, left + spread.p95 * scale
        draw.rectangle((left, y, max(end, left + 1), y + _BAR), fill=_COLOUR)
        draw.line((end, middle, whisker, middle), fill=_WHISKER, width=2)
        draw.line((whisker, middle - 6, whisker, middle + 6), fill=_WHISKER, width=2)
        figures = f"p50 {spread.p50:,.1f} ms   p95 {spread.p95:,.1f} ms"
        draw.text((whisker + 10, middle), figures, _SOFT, small, anchor="lm")
    return picture
