#!/usr/bin/env bash
# Runs one command on all hosts of a Cloud TPU slice, got as a queued resource.
#
#   launch/pod/queued_resources.sh create NAME v5litepod-256 v2-alpha-tpuv5-lite [--spot ...]
#   launch/pod/queued_resources.sh setup  NAME
#   launch/pod/queued_resources.sh run    NAME launch/train.py --config configs/jodiffusion.py \
#       --workdir gs://BUCKET/runs/jodiffusion
#   launch/pod/queued_resources.sh delete NAME
#
# create waits until the slice is there. setup copies this checkout to ~/jointseg_jax on every host
# and installs it with jax for TPU. run starts the same command on every host; jax finds the others
# through the metadata server. Run it again after a stop (75), a lost host (76, 134) or a new slice:
# it goes on from the newest checkpoint.
#
# Environment: PROJECT and ZONE (default: gcloud's own).

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 2
}

[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2

place=()
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
[ -z "${ZONE:-}" ] || place+=(--zone="$ZONE")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

case $action in
  create)
    [ $# -ge 2 ] || usage
    gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
      --accelerator-type="$1" --runtime-version="$2" "${@:3}"
    until state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)') && [ "$state" = ACTIVE ]; do
      case $state in
        FAILED | SUSPENDED)
          echo "queued_resources.sh: $name is $state" >&2
          exit 1
          ;;
      esac
      echo "queued_resources.sh: $name is $state; waiting" >&2
      sleep 30
    done
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name":jointseg_jax.tar.gz "${place[@]}" --worker=all
    on_all_hosts "mkdir -p jointseg_jax && tar -xzf jointseg_jax.tar.gz -C jointseg_jax &&
      python3 -m pip install --quiet --editable 'jointseg_jax[tpu,gcs]'"
    ;;
  run)
    [ $# -ge 1 ] || usage
    on_all_hosts "cd jointseg_jax && python3 $(printf '%q ' "$@")"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    ;;
  *) usage ;;
esac
