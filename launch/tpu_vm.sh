#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Trains on all hosts of a TPU VM (one host or a pod slice), from this checkout.
#
#   launch/tpu_vm.sh NAME ZONE --config=configs/vit_i1k.py:variant=B/16 --workdir=gs://BUCKET/b16
#
# NAME and ZONE are those of a running TPU VM; project and account are gcloud's current ones. The
# workdir is in a bucket that the hosts may write to, or on storage that all of them see; the datasets
# must be seen by all hosts. The same command resumes from the last checkpoint. DRY_RUN=1 prints the
# commands.
set -euo pipefail

if [ "$#" -lt 4 ]; then
  sed -n '/^# Trains/,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
case " $* " in
  *" --workdir=/"* | *" --workdir=gs://"* | *" --workdir=s3://"*) ;;
  *)
    echo "tpu_vm.sh: --workdir must be gs://BUCKET/PATH or an absolute path: the checkout is replaced" >&2
    exit 2
    ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
run git -C "$here" archive --format=tar.gz --output="$archive" HEAD

echo "Copying the last commit to all hosts of $name."
run gcloud compute tpus tpu-vm scp "$archive" "$name:/tmp/vit_jax.tar.gz" --zone="$zone" --worker=all
echo "Installing."
# shellcheck disable=SC2016  # The home is that of the hosts.
on_all_hosts 'rm -rf ~/vit_jax && mkdir -p ~/vit_jax && tar -xzf /tmp/vit_jax.tar.gz -C ~/vit_jax &&
  python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 ~/vit_jax_env &&
  python3 -m uv pip install -q --python ~/vit_jax_env -e "$HOME/vit_jax[tpu]"'
echo "Training."
on_all_hosts "bash ~/vit_jax/launch/tpu_host.sh $(printf '%q ' "$@")"
