"""Tests; the files mirror the package."""
