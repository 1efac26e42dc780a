"""Packaging that pyproject.toml cannot say: the folder kernels/ is the package vimpac.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vimpac", "vimpac.*"], exclude=["vimpac.kernels"]), "vimpac.kernels"],
    package_dir={"vimpac.kernels": "kernels"},
)
