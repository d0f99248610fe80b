"""The version, apart from the interface: modules that the interface imports read it."""

__version__ = "0.2.0.dev0"
