# SPDX-License-Identifier: Apache-2.0
"""A job of two processes, two devices each, does what one process with four devices does."""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.buckets import server
from tests.images import write_folder
from vit_jax.checkpoint.pretrained.load import load_params, load_pretrained
from vit_jax.config.load import load_config
from vit_jax.observe.jsonl import read_metrics
from vit_jax.runtime import processes
from vit_jax.training.experiment import Experiment
from vit_jax.training.run import train
from vit_jax.utils import mirrors
from vit_jax.utils.errors import UserError

__all__ = ["server"]

ROOT = Path(__file__).parents[2]

# Over fsdp each process holds a half of the large kernels, and writes it to the checkpoint.
CONFIG_FILE = """
from tests.tiny import tiny_config
def get_config(data_dir):
    return tiny_config(
        data_dir,
        total_steps=6,
        model__num_layers=1,
        model__mlp_dim=64,
        mesh={"data": -1, "fsdp": 4},
        evals__val__every=3,
        checkpoint__every=3,
        log_every=1,
        ema_decay=0.9,
    )
"""


# Runs in each process at its start, and tells which files of the workdir it opens to write to.
SITE_FILE = """
import sys
from pathlib import Path

def tell(event, args):
    if event == "open" and args[1] and set(args[1]) & set("wa"):
        path = Path(str(args[0]))
        if "workdir" in (path.parent.name, path.parent.parent.name):
            print("opened", path.name, file=sys.stderr)

sys.addaudithook(tell)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(*args, **kwargs):
    """Runs a job to its end; the exit codes, and what each process wrote to stdout and stderr."""
    with start(*args, **kwargs) as started:
        return finish(started)


def finish(started):
    outputs = [process.communicate(timeout=600) for process in started]
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


@contextlib.contextmanager
def start(folder, data_dir, *, processes, devices, arguments=(), text=CONFIG_FILE):
    """Starts a job, and ends what is left of it."""
    config = folder / "config.py"
    config.write_text(text)
    (folder / "sitecustomize.py").write_text(SITE_FILE)
    command = [sys.executable, "-m", "vit_jax.main", f"--config={config}:{data_dir}"]
    command += [f"--workdir={folder / 'workdir'}", *arguments]
    if processes > 1:
        command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    started = []
    try:
        for i in range(processes):
            started.append(
                subprocess.Popen(
                    [*command, f"--process_id={i}"] if processes > 1 else command,
                    cwd=ROOT,
                    env=os.environ
                    | {
                        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
                        "JAX_PLATFORMS": "cpu",
                        "XLA_FLAGS": re.sub(
                            r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"]
                        ),
                    },
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one(data_dir, tmp_path_factory):
    """Folder of the job of one process."""
    folder = tmp_path_factory.mktemp("one")
    train_on(4, folder, data_dir)
    return folder


def train_on(count, folder, data_dir, overrides=None):
    """Runs the job to its end within this process, on as many of its devices."""
    config = folder / "config.py"
    config.write_text(CONFIG_FILE)
    train(
        load_config(f"{config}:{data_dir}", overrides or {}),
        folder / "workdir",
        make_experiment=functools.partial(Experiment.from_config, devices=jax.devices()[:count]),
    )


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """Folder of the job of two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    done = run(folder, data_dir, processes=2, devices=2)
    assert [code for code, _, _ in done] == [0, 0], done
    return folder, done


def metric(folder, name):
    """Values of a metric by step; none comes twice."""
    found = [(r["step"], r[name]) for r in read_metrics(folder / "workdir") if name in r]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_two_processes_train_as_one(one, two):
    folder, _ = two
    want, got = metric(one, "train/loss"), metric(folder, "train/loss")
    assert list(want) == list(got) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def test_two_processes_evaluate_as_one(one, two):
    folder, _ = two
    for name in ("val/top1", "val_ema/top1"):
        assert metric(folder, name) == metric(one, name)
    for name in ("val/count", "val_ema/count"):
        assert metric(folder, name) == {3: 50, 6: 50}
    for name in ("val/loss", "val_ema/loss"):
        want, got = metric(one, name), metric(folder, name)
        assert list(want) == list(got) == [3, 6]
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def said(output):
    """What the package printed, without what the transport between CPU processes does."""
    # Its threads write at once, so that the beginning of a line may be missing.
    return [line for line in output.splitlines() if "peer ranks" not in line]


def opened(errors):
    """Names of the files of the workdir that a process opened to write to."""
    lines = errors.splitlines()
    return [line.removeprefix("opened ") for line in lines if line.startswith("opened ")]


def test_only_the_first_process_prints_and_writes_metrics(two):
    folder, ((_, first, first_errors), (_, second, second_errors)) = two
    assert "finished at step 6 of 6" in said(first)
    assert sum(line.startswith("step 6/6  loss") for line in said(first)) == 1
    assert said(second) == []
    workdir = folder / "workdir"
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "evals",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "tensorboard",
    ]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    details = {f"{name}_6{part}" for name in ("val", "val_ema") for part in ("", "_confusion")}
    written = {name.split(".")[0] for name in opened(first_errors)}
    # "checkpoints": whether there is room in it.
    files = {"config", "events", "ledger", "lock", "metrics", "report", "run"}
    assert written == {"checkpoints"} | files | details
    assert opened(second_errors) == []


@pytest.mark.slow
def test_two_processes_that_share_no_folder_resume_from_a_bucket(server, two, data_dir, tmp_path):
    arguments = [f"--workdir=gs://{server.bucket}/run"]
    want = load_pretrained(str(two[0] / "workdir")).params

    def finish_run():
        ended = run(tmp_path, data_dir, processes=2, devices=2, arguments=arguments)
        assert [code for code, _, _ in ended] == [0, 0], ended
        mirrors._mirrors.clear()
        return load_pretrained(arguments[0].partition("=")[2]).params

    for _ in range(2):
        found = finish_run()
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[path], x) for path, x in want.items())
        # Both are killed before the last checkpoint counts.
        names = [name for name, _ in server.history]
        server.rewind(names.index("run/checkpoints/6/manifest.json"))


def test_one_process_goes_on_from_the_checkpoint_of_two(two, data_dir, tmp_path, capsys):
    workdir = tmp_path / "workdir"
    shutil.copytree(two[0] / "workdir", workdir)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    stored, losses = load_params(workdir)[0], metric(tmp_path, "train/loss")
    train_on(1, tmp_path, data_dir, {"total_steps": 8, "mesh.fsdp": 1})
    output = capsys.readouterr().out
    assert f"resuming from {workdir / 'checkpoints' / '6'}" in said(output)
    assert "finished at step 8 of 8" in said(output)
    after = metric(tmp_path, "train/loss")
    assert list(after) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {step: after[step] for step in losses} == losses
    # The first new loss is that of the stored parameters on the next batch.
    config = load_config(f"{tmp_path / 'config.py'}:{data_dir}", {"mesh.fsdp": 1})
    experiment = Experiment.from_config(config, devices=jax.devices()[:1])
    objective, key = experiment.objective, jax.random.key(0)
    batch = jax.jit(objective.augment)(next(experiment.train_batches(6)), key)
    loss, _ = jax.jit(objective.loss)(stored, batch, key)
    np.testing.assert_allclose(after[7], loss, rtol=1e-5)


@pytest.fixture
def in_two_processes(monkeypatch):
    """Calls a function with the number of each process of a job; gives the errors of both."""
    values, barrier, here = [None, None], threading.Barrier(2, timeout=60), threading.local()

    def gather(value):
        values[here.process] = np.asarray(value)
        barrier.wait()
        rows = np.stack(values)
        barrier.wait()
        return rows

    def call(function):
        def run_process(process):
            here.process = process
            with pytest.raises(UserError) as error:
                function(process)
            return str(error.value)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run_process, range(2)))

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    return call


def test_an_error_of_one_process_ends_all(in_two_processes):
    def refuse(process):
        with processes.fail_together():
            if process == 1:
                raise UserError("not here")

    first, second = in_two_processes(refuse)
    assert first == "process 1 refused its input; its line says why"
    assert second == "not here"


def test_processes_with_other_values_are_refused_by_key(in_two_processes):
    first, second = in_two_processes(
        lambda process: processes.check_same({"seed": 0, "total_steps": 6 + process})
    )
    assert first == second
    assert "processes 0 and 1 were not started alike: total_steps is 6 there and 7 here" in first


# The test of `fail_together` has the same without a job.
@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(data_dir, tmp_path):
    text = "import sys\n" + CONFIG_FILE.replace(
        "def get_config(data_dir):\n",
        'def get_config(data_dir):\n    assert "--process_id=1" not in sys.argv, "not here"\n',
    )
    done = run(tmp_path, data_dir, processes=2, devices=2, text=text)
    assert [code for code, _, _ in done] == [2, 2], done
    first, second = (errors for _, _, errors in done)
    assert "vit_jax: error: process 1 refused its input" in first
    assert "AssertionError: not here" in second


@pytest.mark.slow
def test_images_that_one_process_can_not_read_stop_all(tmp_path):
    for name in ("good", "bad"):
        write_folder(tmp_path / name, {"train/cat": 40, "train/dog": 40, "test/cat": 1})
    for path in sorted((tmp_path / "bad").glob("train/*/*.png"))[:60]:
        path.write_bytes(b"")
    # The same config, and another folder behind the same name.
    text = "import os, sys\n" + CONFIG_FILE.replace(
        "def get_config(data_dir):\n",
        "def get_config(data_dir):\n"
        '    os.chdir(data_dir + ("bad" if "--process_id=1" in sys.argv else "good"))\n',
    ).replace(
        "total_steps=6,",
        """total_steps=6,
        data__name="folder:.",
        data__preprocess="decode|resize(8)",
        evals__val__split="test",
        evals__val__preprocess="decode|resize(8)",""",
    )
    done = run(tmp_path, f"{tmp_path}/", processes=2, devices=2, text=text)
    assert [code for code, _, _ in done] == [2, 2], done
    (_, screen, first), (_, _, second) = done
    for errors in (first, second):
        assert re.search("vit_jax: error: .* data.max_corrupt=0.001 allows no more", errors)
    assert ".png" not in screen + first
    assert "0 bytes that are not a readable image" in second


# The test of `check_same` above has the line, and tests/test_main.py what is compared and when.
@pytest.mark.slow
def test_processes_that_were_not_started_alike_are_refused_by_key(data_dir, tmp_path):
    text = "import sys\n" + CONFIG_FILE.replace(
        "total_steps=6,", 'total_steps=7 if "--process_id=1" in sys.argv else 6,'
    )
    done = run(tmp_path, data_dir, processes=2, devices=2, text=text)
    assert [code for code, _, _ in done] == [2, 2], done
    for _, _, errors in done:
        assert "processes 0 and 1 were not started alike: --config.total_steps is 6" in errors
    assert not (tmp_path / "workdir").exists()


@pytest.mark.slow
def test_four_processes_train_as_one_and_two_and_one_go_on(one, data_dir, tmp_path):
    done = run(tmp_path, data_dir, processes=4, devices=1, arguments=["--expect_devices=4"])
    assert [code for code, _, _ in done] == [0] * 4, done
    for name in ("train/loss", "val/loss"):
        want, got = metric(one, name), metric(tmp_path, name)
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    assert set(metric(tmp_path, "val/count").values()) == {50}
    for count, steps in ((2, 7), (1, 8)):
        longer = [f"--config.total_steps={steps}", "--config.mesh.fsdp=2"]
        done = run(tmp_path, data_dir, processes=count, devices=2, arguments=longer)
        assert [code for code, _, _ in done] == [0] * count, done
    assert list(metric(tmp_path, "train/loss")) == [1, 2, 3, 4, 5, 6, 7, 8]
