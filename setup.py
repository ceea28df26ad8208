"""Packaging of lsmoe_ds. DeepSpeed and Megatron-core are pinned exactly: lsmoe_ds/parallel/compat.py adapts their internals."""

from setuptools import find_packages, setup

setup(
    name="lsmoe_ds",
    version="0.1.0",
    description="Language-specific mixture-of-experts training for multilingual machine translation, on DeepSpeed and Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lsmoe_ds", "lsmoe_ds.*"]),
    package_data={"lsmoe_ds": ["**/*.tsv", "**/*.html"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed==0.19.8",
        "megatron-core==0.16.1",
        "sentencepiece>=0.2.1,<0.3",
        "protobuf>=6",
        "sacrebleu>=2.5,<3",
        "regex>=2024",
        "lxml>=5",
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
        "serve": ["ctranslate2>=4.6,<5"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "types-PyYAML",
            "transformers>=5",
            "ctranslate2>=4.6,<5",
            "langcodes>=3.5",
            "language_data>=1.4",
        ],
    },
    entry_points={"console_scripts": ["lsmoe = lsmoe_ds.cli:main"]},
)
