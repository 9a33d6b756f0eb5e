"""Locators: ways in which a model says where the evidence of a row is, and the table of all."""

from __future__ import annotations

from opd.locate.attention import Attention
from opd.locate.grounding import Grounding
from opd.locate.locator import Located, Locator, Looker, locate
from opd.locate.tiles import Tiles

__all__ = ["LOCATORS", "Located", "Locator", "Looker", "locate"]

LOCATORS: dict[str, Locator] = {
    locator.name: locator for locator in (Attention(), Tiles(), Grounding())
}
"""All locators by name, which is the value of `--by`."""
