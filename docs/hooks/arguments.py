"""Shows the lines `name: meaning` of our docstrings as a list; Markdown would run them together."""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^([a-z_][a-z0-9_]*(?:, \*{0,2}[a-z_][a-z0-9_]*)*): (?=\S)")


class Arguments(griffe.Extension):
    """Rewrites each docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """`name: meaning` at the left edge becomes `- **name**: meaning`, its indented lines follow it."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        match = ENTRY.match(line)
        if match is not None:
            if not inside and out and out[-1].strip():
                out.append("")
            out.append(f"- **{match[1]}**: {line[match.end() :]}")
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            out.extend(["", line])  # prose again
            inside = False
        else:
            inside = inside and bool(line.strip())
            out.append(line)
    return "\n".join(out)
