# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices for all tests, and datasets in a folder of their own."""

import gc
import importlib.metadata
import os
import signal
import tempfile
from pathlib import Path

# `make test PYTHON=...` exports it, and the launch scripts would take it for theirs.
os.environ.pop("PYTHON", None)
# A shell ignores Ctrl-C in what it starts in the background, and so would the commands of tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before jax is imported.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
# Most of the time goes into compilation, of programs that run for a moment.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Processes of pytest use the cores already.
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# Halves the time of compilation; later versions of XLA have no such choice.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Many tests compile the same step: the second time it comes from here, in all processes of pytest.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="vit_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags

from vit_jax.data.sources import open_source
from vit_jax.observe import console
from vit_jax.utils import streams

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escapes what is captured of names that are not UTF-8, which can't be sent to pytest-xdist."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Keeps garbage collection out of a tenth of the time.

    Modules and collected tests stay until the end, so that no collection need walk them; and JAX
    makes so many objects while it traces that collections would follow each other closely.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled programs are given up after each module: together they take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A TFDS folder with `digits` prepared."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    open_source("digits", "train", data_dir=folder, key="split")
    return folder


@pytest.fixture(scope="session")
def captions_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A TFDS folder with `digits_captions` prepared."""
    folder = str(tmp_path_factory.mktemp("captions"))
    open_source("digits_captions", "train", data_dir=folder, key="split")
    return folder


@pytest.fixture(scope="session")
def segment_run(tmp_path_factory: pytest.TempPathFactory, data_dir: str) -> Path:
    """The workdir of a run that finds the class of each pixel of images of 16x16."""
    from tests.trained import write_segmentation

    return write_segmentation(tmp_path_factory.mktemp("runs") / "segment", data_dir)


class Stripes(tfds.core.GeneratorBasedBuilder):
    """Images of varying size, with vertical (0) or horizontal (1) stripes: a foreign dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=2),
                    "name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(64), "validation": self._generate_examples(13)}

    def _generate_examples(self, count: int):
        for i in range(count):
            image = np.zeros((40 + i, 60, 3), np.uint8)
            label = i % 2
            if label:
                image[::8] = 255
            else:
                image[:, ::8] = 255
            jpeg = cv2.imencode(".jpg", image)[1].tobytes()
            yield i, {"image": jpeg, "label": label, "name": f"stripes {i}"}


@pytest.fixture(autouse=True)
def restore_screen():
    """What a command sets for its process does not outlive the test."""
    yield
    console.console.quiet = console.console.stderr = False
    console.settings.verbosity = "normal"


@pytest.fixture
def said(monkeypatch):
    """The lines that the package prints, as its log and as results."""
    lines = []
    monkeypatch.setattr(console.console, "print", lambda *text, **_: lines.append(str(text[0])))
    printed = streams.result_stream

    class Both:
        def write(self, text):
            lines.extend(text.splitlines() if text != "\n" else ())
            return printed().write(text)

        def flush(self):
            printed().flush()

    monkeypatch.setattr(streams, "result_stream", Both)
    return lines
