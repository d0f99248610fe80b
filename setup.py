"""The packages; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ stands beside the package here, and inside it where it is installed: PyPI has another `kernels`.
    packages=[*find_packages(include=["mebp_mlx", "mebp_mlx.*"]), "mebp_mlx.kernels"],
    package_dir={"mebp_mlx": "mebp_mlx", "mebp_mlx.kernels": "kernels"},
)
