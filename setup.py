"""Packaging of `qstar` and `qstar_kernels`."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

setup(
    name="qstar",
    version="0.1.0",
    description="Exact, fast sampling from q*, the minimax point between two language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "qstar/demo/LICENSE-data.txt"],
    packages=find_packages(include=["qstar", "qstar.*", "qstar_kernels", "qstar_kernels.*"]),
    package_data={
        "qstar.diagnostics": ["page.html.jinja"],
        "qstar.demo": ["*.jsonl", "*.md", "*.txt", "theta/*", "t/*"],
    },
    ext_modules=[
        Extension(
            "qstar_kernels.cpu._rows",
            ["qstar_kernels/cpu/rows.c"],
            depends=["qstar_kernels/cpu/passes.h"],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,  # without a C compiler the package installs, warns and uses its reference on a CPU
        )
    ],
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        "triton>=3.7; platform_system == 'Linux'",
        "numpy>=1.24",
        "pyarrow>=20",
        "transformers>=5.19,<6",
        "datasets>=5.0",
        "accelerate>=1.1",
        "jinja2>=3.1",
        "filelock>=3.12",
        "fsspec>=2023.5",
        "rich>=13",
    ],
    extras_require={
        "4bit": ["bitsandbytes>=0.45"],
        "peft": ["peft>=0.21,<1"],
        "trl": ["trl>=1.16,<1.17"],  # what its trainers call while they generate is no public interface of theirs
        "vllm": ["vllm>=0.32,<0.33"],
        "ray": ["ray[data]>=2.60,<3"],
        "report": ["matplotlib>=3.8"],
        "experiments": ["trl>=1.16", "matplotlib>=3.8"],
        "dev": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "matplotlib>=3.8",
            "playwright>=1.50",
            "hypothesis>=6.100",
            "openai>=3.57",
            "psutil>=5.9",
            "ray[data]>=2.60,<3",
            "scipy>=1.11",
            "peft>=0.21,<1",
            "trl>=1.16,<1.17",
            "ruff>=0.9",
        ],
        "demo-training": ["chatterbot-corpus>=1.2", "pyyaml>=6"],
    },
    entry_points={
        "console_scripts": [
            "qstar-generate=qstar.generate:main",
            "qstar-score=qstar.score:main",
            "qstar-analyze=qstar.analyze:main",
            "qstar-report=qstar.report:main",
            "qstar-serve=qstar.serve:main",
            "qstar-merge=qstar.merge:main",
            "qstar-plan=qstar.plan:main",
        ],
        "vllm.general_plugins": ["qstar=qstar.vllm:register"],
    },
)
