"""Maps the top-level folders onto the packages of the `tubelet` namespace; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

PARTS = ("kernels", "engine", "bench")

packages = [f"tubelet.{part}" for part in PARTS]
for part in PARTS:
    packages += [f"tubelet.{part}.{package}" for package in find_packages(part)]

setup(packages=packages, package_dir={f"tubelet.{part}": part for part in PARTS})
