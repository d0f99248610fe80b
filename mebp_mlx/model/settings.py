"""Typed access to config.json, with a family's defaults and errors that name the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import UserError


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether the value is a positive number within float's range."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


class Settings:
    """The keys of a decoder's config; null counts as absent. where: the file, for messages."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.config, self.defaults, self.where = config, defaults, where

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, else the family's default, else `default`."""
        value = self.config.get(key)
        return self.defaults.get(key, default) if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """The key's value as a positive number within float's range. Raises UserError."""
        return self.positive(key, self.get(key, default))

    def positive(self, key: str, value: Any) -> float:
        """number() for a value found elsewhere; `key` names it in the error."""
        if not is_positive(value):
            problem = "is missing" if value is None else f"must be a positive number, found {str(value)[:100]!r}"
            raise UserError(f"{self.where}: {key} {problem}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """The key's value as a positive integer. Raises UserError."""
        value = self.number(key, default)
        if value != int(value):
            raise UserError(f"{self.where}: {key} must be an integer, found {value!r}")
        return int(value)

    def flag(self, value: bool | str) -> bool:
        """The value itself, or that of the key it names; False if there is none."""
        return value if isinstance(value, bool) else bool(self.get(value, False))
