"""Puts the parity rows into a built wheel, so that `glocal list` tells the same there as in a checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Evidence(BuildHookInterface):
    """An editable install reads `results/` in the checkout itself: a copy would grow stale, and hide the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["results/parity.csv"] = "glocal/evidence/parity.csv"
