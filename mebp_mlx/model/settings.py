"""Typed access to config.json, with a family's defaults and errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError


class Settings:
    """The keys of a decoder's config; null counts as absent. where: the file, for messages."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.config, self.defaults, self.where = config, defaults, where

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, else the family's default, else `default`."""
        value = self.config.get(key)
        return self.defaults.get(key, default) if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. Raises UserError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            found = "is missing" if value is None else f"must be a positive number, found {value!r}"
            raise UserError(f"{self.where}: {key} {found}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises UserError."""
        value = self.number(key, default)
        if value != int(value):
            raise UserError(f"{self.where}: {key} must be an integer, found {value!r}")
        return int(value)

    def flag(self, value: bool | str) -> bool:
        """The value itself, or that of the key it names; False where there is none."""
        return value if isinstance(value, bool) else bool(self.get(value, False))
