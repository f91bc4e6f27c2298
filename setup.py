import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "diffusers_mcm" / "__init__.py").read_text(encoding="utf-8"))
TRAIN = ["datasets>=5.2", "pyarrow>=24", "tensorboard>=2.14"]
EVAL = ["scipy>=1.11"]
TEST = ["pytest>=8", "pytest-xdist>=3", "ruff>=0.9"]

setup(
    name="diffusers-mcm",
    version=VERSION.group(1),
    description="Motion consistency models for diffusers: text to video in one to eight steps",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["diffusers_mcm", "diffusers_mcm.*"]),
    package_data={"diffusers_mcm": ["py.typed", "card_template.md", "shapes/weights/**"]},
    install_requires=[
        "accelerate>=1.0",
        "av>=15",
        "diffusers>=0.42",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "peft>=0.17",
        "Pillow>=10.1",
        "PyYAML>=6.0",
        "safetensors>=0.5",
        "torch>=2.6",
        "tqdm>=4.60",
        "transformers>=5.0",
    ],
    extras_require={"train": TRAIN, "eval": EVAL, "test": [*TRAIN, *EVAL, *TEST]},
    entry_points={"console_scripts": ["diffusers-mcm=diffusers_mcm.cli:main"]},
)
