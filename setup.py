"""Packaging of megatron_occ; tested versions lie in constraints.txt and constraints-latest.txt."""

from setuptools import find_packages, setup

setup(
    name="megatron-occ",
    version="0.1.0",
    description="Joint multi-token-prediction and RL training on Megatron-Core, with OCC",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_occ", "megatron_occ.*"]),
    package_data={f"megatron_occ.{room}": ["*.css"] for room in ("observe", "audit", "compare")},
    install_requires=[
        "torch>=2.6,<3",
        # start-up refuses what is not in megatron_occ/mcore/versions.py
        "megatron-core>=0.16.1,<0.20",
        "omegaconf>=2.3",
        "transformers>=4.50",
        "mpmath>=1.3",
        # files of prompts in Parquet
        "pyarrow>=15",
        "tensorboard",
        "tqdm",
        # imported by megatron-core's checkpoints, not declared by it
        "psutil",
    ],
    extras_require={
        # the version whose verifiers were read: megatron_occ/data/tasks/reasoning_gym.py
        "reasoning": ["reasoning-gym==0.1.25"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow>=2.10"],
        "gpu": ["transformer-engine[pytorch]"],
        "dev": ["pytest", "pytest-timeout", "ruff", "pre-commit"],
    },
    entry_points={"console_scripts": ["megatron-occ = megatron_occ.cli:main"]},
)
