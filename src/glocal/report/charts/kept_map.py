"""Heat map of the kept fraction, layers across and step buckets down; hatched grey = left dense on purpose."""

from __future__ import annotations

from glocal.report.charts import svg
from glocal.report.format import percent
from glocal.report.records import KeptMap


def _legend(right: float) -> list[str]:
    start = right - 118
    parts = [svg.text(start - 6, 11, "kept", "tick", "end")]
    for index in range(10):
        share = (index + 0.5) / 10
        parts.append(svg.rect(start + 5 * index, 2, 5.2, 10, "heat", fill_opacity=0.06 + 0.94 * share))
    parts.append(svg.text(start + 54, 11, "0 to 100 %", "tick"))
    return parts


def draw(kept: KeptMap, width: float, height: float) -> str:
    """The map at the given size in px."""
    longest = max(svg.text_width(name, 12) for name in kept.buckets)
    left, top, right, bottom = min(longest + 10, 0.3 * width), 24.0, width - 2.0, height - 36.0
    across, down = (right - left) / len(kept.layers), (bottom - top) / len(kept.buckets)
    gap = 1.5 if across > 14 else 0.6
    parts = [svg.rect(0, 2, 13, 10, "on-purpose"), svg.text(18, 11, "dense on purpose", "tick"), *_legend(right)]
    for row, bucket in enumerate(kept.buckets):
        y = top + row * down
        parts.append(svg.text(left - 8, y + down / 2 + 4, svg.shorten(bucket, left - 8), "tick", "end"))
        for column, layer in enumerate(kept.layers):
            x = left + column * across
            share = kept.values[column][row]
            hint = "dense on purpose" if share is None else f"{percent(share)} kept"
            words = svg.title(f"layer {layer}, {bucket}: {hint}")
            box = (x + gap / 2, y + gap / 2, across - gap, down - gap)
            if share is None:
                parts.append(svg.rect(*box, "on-purpose", words))
                continue
            parts.append(svg.rect(*box, "heat", words, fill_opacity=0.06 + 0.94 * share))
            if across >= 30 and down >= 17:
                tone = "high" if share > 0.78 else "middle" if share > 0.58 else "low"
                klass = f"heat-number heat-{tone}"
                parts.append(svg.text(x + across / 2, y + down / 2 + 4, f"{100 * share:.0f}", klass, "middle"))
    every = max(1, round(34 / across + 0.499))
    for column in range(0, len(kept.layers), every):
        parts.append(svg.text(left + (column + 0.5) * across, bottom + 15, kept.layers[column], "tick", "middle"))
    parts.append(svg.text(right, height - 3, "layer", "axis-name", "end"))
    parts.append(svg.text(left, height - 3, "noise level, first step on top", "axis-name"))
    dense = sum(share is None for row in kept.values for share in row)
    label = f"Kept fraction of {len(kept.layers)} layers x {len(kept.buckets)} step buckets, {dense} cells left dense"
    return svg.document(width, height, parts, label, "chart")
