# SPDX-License-Identifier: Apache-2.0
"""Manifests for GKE: they hold what Kubernetes knows, and the job finds itself by them."""

import json
import os

import pytest

from vit_jax.launch import gke
from vit_jax.runtime import cluster
from vit_jax.utils.errors import UserError

TRAIN = ["--", "--config=configs/x.py:a,b", "--workdir=/shared/my runs"]
TPU = ["run", "--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]
GPU = ["run", "--image=i", "--accelerator=nvidia-h100-80gb", "--nodes=2"]

# Of JobSet v1alpha2, batch/v1 and core/v1, what is used here: a dict in a list stands for each
# item, the empty name for all others.
TEXTS = {"": str}
VOLUME = {
    "name": str,
    "emptyDir": {"medium": str},
    "persistentVolumeClaim": {"claimName": str},
}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env": [{"name": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "resources": {"requests": {"": int}, "limits": {"": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": {"Never"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": TEXTS,
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirstWithHostNet"},
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
POD_FAILURE = {
    "action": {"FailJob", "Ignore", "Count"},
    "onPodConditions": [{"type": {"DisruptionTarget"}, "status": {"True"}}],
    "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
}
JOB = {
    "completionMode": {"Indexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [POD_FAILURE]},
    "template": {"spec": POD},
}
FAILURE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
}
SCHEMA = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": TEXTS},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [FAILURE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check(value, schema, where="manifest"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, item in value.items():
            known = schema.get(key, schema.get(""))
            assert known is not None, f"{where}.{key}"
            check(item, known, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, set):
        assert value in schema, where
    else:
        assert type(value) is schema, where


def make(capsys, *arguments):
    """The manifest of a dry run, its Job and its container."""
    assert gke.main([*arguments, "--dry_run", *TRAIN]) == 0
    manifest = json.loads(capsys.readouterr().out)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return manifest, job, job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "arguments",
    [TPU, [*TPU, "--num_slices=2", "--spot"], GPU, [*GPU, "--claim=runs"]],
    ids=["tpu", "slices", "gpu", "claim"],
)
def test_manifests_hold_only_what_kubernetes_knows(arguments, capsys):
    manifest, _, container = make(capsys, *arguments)
    check(manifest, SCHEMA)
    assert container["args"][-2:] == TRAIN[1:]
    with pytest.raises(AssertionError, match=r"manifest.metadata.nam\b"):
        check({"metadata": {"nam": "x"}}, SCHEMA)


@pytest.mark.parametrize(
    ("more", "hosts", "slices", "chips"),
    [
        ([], 4, 1, 4),
        (["--num_slices=3"], 4, 3, 4),
        (["--topology=2x2"], 1, 1, 4),
        (["--topology=2x4", "--chips_per_host=8"], 1, 1, 8),
        (["--topology=4x4x8"], 32, 1, 4),
    ],
)
def test_a_tpu_slice_has_a_pod_for_each_host(more, hosts, slices, chips, capsys):
    manifest, job, container = make(capsys, *TPU, *more)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job["completions"] == job["parallelism"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["args"][:-2] == ["--coordinator=auto", "--platform=tpu"]


def test_gpu_nodes_find_the_first_of_them(capsys):
    _, job, container = make(capsys, *GPU)
    assert job["completions"] == 2
    given = dict(text.removeprefix("--").split("=", 1) for text in container["args"][:-2])
    assert given["process_id"] == f"$({container['env'][0]['name']})"
    # By the name that pods of a JobSet have: NAME-JOB-0-INDEX.NAME.
    found = cluster.find_job(given["coordinator"], int(given["num_processes"]), 1, None, {})
    assert found == cluster.Job(
        source="flags", coordinator="run-hosts-0-0.run:8476", num_processes=2, process_id=1
    )


def test_code_75_is_run_again_and_bad_input_is_not(capsys):
    manifest, job, _ = make(capsys, *TPU)
    codes = job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert 75 in codes
    assert not {1, 2} & set(codes)
    assert job["backoffLimit"] == 0
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["BackoffLimitExceeded"])


def test_kubectl_gets_the_manifest(tmp_path, monkeypatch):
    fake = tmp_path / "kubectl"
    fake.write_text(
        f'#!/usr/bin/env bash\necho "$@" > "{tmp_path}/args"\ncat > "{tmp_path}/manifest"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gke.main([*TPU, *TRAIN]) == 0
    assert (tmp_path / "args").read_text() == "apply --filename=-\n"
    check(json.loads((tmp_path / "manifest").read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Run", *TPU[1:]], "'Run': expected a letter"),
        (TPU[:-1], "--topology=None: expected that of the slice, such as 4x4"),
        ([*TPU, "--topology=16"], "--topology=16: expected"),
        ([*GPU, "--topology=4x4"], "--topology=4x4: is of TPUs"),
        ([*GPU, "--nodes=0"], "--nodes=0: expected at least 1"),
    ],
)
def test_what_makes_no_manifest_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        gke.main([*arguments, *TRAIN])
    assert message in str(error.value)
