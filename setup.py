"""The packages: `kernels/` is imported as `bita_kernels`. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bita_vllm", "bita_vllm.*"]),
        "bita_kernels",
        *(f"bita_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"bita_kernels": "kernels"},
    package_data={"bita_kernels": ["*.cpp", "*.h"]},
)
