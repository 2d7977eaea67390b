"""Packaging of `qstar` and `qstar_kernels`."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

setup(
    name="qstar",
    version=re.search(r'__version__ = "(.+)"', (HERE / "qstar" / "__init__.py").read_text(encoding="utf-8")).group(1),
    description="Exact, fast sampling from q*, the minimax point between two language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "qstar/demo/LICENSE-data.txt"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="language models, sampling, distillation, reinforcement learning, importance weights, vllm, triton",
    packages=[*find_packages(include=["qstar", "qstar.*", "qstar_kernels", "qstar_kernels.*"]), "qstar.docs"],
    package_dir={"qstar.docs": "docs"},  # where the help of an installed command sends its readers
    package_data={
        "qstar.docs": ["guide.md"],
        "qstar.experiments": ["README.md"],
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
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.24",
        "pyarrow>=20",
        "transformers>=5.19,<6",
        "datasets>=5.0",
        "accelerate>=1.1",
        "jinja2>=3.1",
        "filelock>=3.12",
        "fsspec>=2023.5",
        "rich>=13",
        "pyyaml>=6",
        "shtab>=1.7",
    ],
    extras_require={
        "4bit": ["bitsandbytes>=0.45"],
        "peft": ["peft>=0.21,<1"],
        "trl": ["trl>=1.16,<1.17"],  # what its trainers call while they generate is no public interface of theirs
        "vllm": ["vllm>=0.32,<0.33"],
        "ray": ["ray[data]>=2.60,<3"],
        "report": ["matplotlib>=3.8"],
        "experiments": ["trl>=1.16", "matplotlib>=3.8", "scipy>=1.11"],
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
            "qstar=qstar.__main__:main",
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
