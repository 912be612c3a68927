# SPDX-License-Identifier: Apache-2.0
r"""Starts a job on Google Kubernetes Engine, as a JobSet of TPU slices or of GPU nodes.

The arguments after -- are those of vit_jax.main.

Examples:
  python -m vit_jax.launch.gke b16 --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 \
      -- --config=configs/vit_i1k.py --workdir=gs://BUCKET/b16
"""

import argparse
import json
import math
import re
import subprocess
from collections.abc import Sequence
from typing import Any

from vit_jax.utils.command import CommandParser, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import RUN_AGAIN
from vit_jax.utils.streams import print_result

# Mount path of the volume of --claim.
FOLDER = "/shared"
_PORT = 8476
# Exit codes of SIGABRT, by which JAX ends a process that has lost another, SIGKILL and SIGTERM.
_LOST = (134, 137, 143)
# Seconds from SIGTERM to SIGKILL, to end a step and to save. Spot machines give less.
_GRACE_S = 300
# Names of pods have a suffix, and at most 63 characters with it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


def main(arguments: Sequence[str]) -> int:
    """Applies or prints the manifest, and returns the exit code of kubectl."""
    args = _parse(arguments)
    manifest = json.dumps(make_jobset(args), indent=2)
    if args.dry_run:
        print_result(manifest)
        return 0
    command = ["kubectl", "apply", "--filename=-"]
    try:
        return subprocess.run(command, input=manifest, text=True).returncode
    except FileNotFoundError:
        raise UserError("kubectl is not installed; --dry_run shows the manifest") from None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m vit_jax.launch.gke", description=__doc__)
    add = parser.add_argument
    default = "The default is %(default)s."
    add("name", help="Name the JobSet so, in small letters, digits and hyphens.")
    add(
        "--image",
        required=True,
        help="Run this image, made from launch/docker, in a registry of the cluster.",
    )
    add(
        "--accelerator",
        required=True,
        help="Use these machines, such as tpu-v5-lite-podslice or nvidia-h100-80gb.",
    )
    add("--topology", help="Use TPU slices of this topology, such as 4x4.")
    add("--num_slices", type=int, default=1, help=f"Use this many TPU slices. {default}")
    add(
        "--chips_per_host",
        type=int,
        default=4,
        help=f"Expect this many chips a host in a TPU slice of several hosts. {default}",
    )
    add("--nodes", type=int, default=1, help=f"Use this many GPU nodes. {default}")
    add("--gpus_per_node", type=int, default=8, help=f"Use this many GPUs a node. {default}")
    add(
        "--claim",
        help="Mount this PersistentVolumeClaim, which all pods may write to, at " + FOLDER + ".",
    )
    add(
        "--max_restarts",
        type=int,
        default=100,
        help=f"Restart a job that failed at most this many times. {default}",
    )
    add("--spot", action="store_true", help="Use spot machines, which may be taken away.")
    add("--dry_run", action="store_true", help="Print the manifest and start nothing.")
    add("train", nargs="+", help="Pass these arguments to vit_jax.main; they come after --.")
    args = parser.parse_args(arguments)
    if not _NAME.fullmatch(args.name):
        parser.error(f"{args.name!r}: expected a letter, then at most 39 of a-z, 0-9 and -")
    is_tpu = args.accelerator.startswith("tpu")
    if is_tpu and not re.fullmatch(r"\d+(x\d+){1,2}", args.topology or ""):
        parser.error(f"--topology={args.topology}: expected that of the slice, such as 4x4")
    if not is_tpu and args.topology is not None:
        parser.error(f"--topology={args.topology}: is of TPUs; GPUs take --nodes")
    counts = dict.fromkeys(("num_slices", "chips_per_host", "nodes", "gpus_per_node"), 1)
    for key, least in (counts | {"max_restarts": 0}).items():
        if getattr(args, key) < least:
            parser.error(f"--{key}={getattr(args, key)}: expected at least {least}")
    return args


def make_jobset(args: argparse.Namespace) -> dict[str, Any]:
    """The manifest: a Job for each TPU slice, or one for all GPU nodes, with a pod per machine."""
    is_tpu = args.accelerator.startswith("tpu")
    if is_tpu:
        chips = math.prod(map(int, args.topology.split("x")))
        per_host = min(chips, args.chips_per_host)
        slices, hosts = args.num_slices, chips // per_host
        pod = _make_pod(args, {"google.com/tpu": per_host}, ["--coordinator=auto"], "tpu")
        pod["nodeSelector"] |= {
            "cloud.google.com/gke-tpu-accelerator": args.accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
        if slices > 1:  # The network of the machines is faster than that of pods.
            pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    else:
        slices, hosts = 1, args.nodes
        job = [
            f"--coordinator={args.name}-hosts-0-0.{args.name}:{_PORT}",
            f"--num_processes={hosts}",
            "--process_id=$(PROCESS_ID)",
        ]
        pod = _make_pod(args, {"nvidia.com/gpu": args.gpus_per_node}, job, "gpu")
        pod["nodeSelector"]["cloud.google.com/gke-accelerator"] = args.accelerator
    # Each slice is a node pool: all pods of a Job are placed in one, exclusively.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    # Failures that no rule of a Job matches are bad input or errors of the run.
    failed = {"action": "FailJobSet", "onJobFailureReasons": ["BackoffLimitExceeded"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name} | ({"annotations": exclusive} if is_tpu else {}),
        "spec": {
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "rules": [{"name": "stayFailed"} | failed],
            },
            "replicatedJobs": [
                {"name": "hosts", "replicas": slices, "template": {"spec": _make_job(hosts, pod)}}
            ],
        },
    }


def _make_job(hosts: int, pod: dict[str, Any]) -> dict[str, Any]:
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    again = {"containerName": "train", "operator": "In", "values": [RUN_AGAIN, *_LOST]}
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,
        # The Job fails by these rules, not by its limit, if it should run again.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": disrupted},
                {"action": "FailJob", "onExitCodes": again},
            ]
        },
        "template": {"spec": pod},
    }


def _make_pod(
    args: argparse.Namespace, resources: dict[str, int], job: list[str], platform: str
) -> dict[str, Any]:
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # Processes of a machine communicate through /dev/shm; the default of 64 MiB is too small.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if args.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}})
        mounts.append({"name": "shared", "mountPath": FOLDER})
    container = {
        "name": "train",
        "image": args.image,
        "args": [*job, f"--platform={platform}", *args.train],
        "env": [{"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}}],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": mounts,
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "nodeSelector": {"cloud.google.com/gke-spot": "true"} if args.spot else {},
        "containers": [container],
        "volumes": volumes,
    }


if __name__ == "__main__":
    run_command(main)
