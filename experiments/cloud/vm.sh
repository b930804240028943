#!/usr/bin/env bash
# One TPU VM, or all hosts of a slice: creates it, copies this checkout, runs run.sh on every host, deletes it.
#   PROJECT=p ZONE=us-west4-a OUTPUT=gs://bucket/run ./vm.sh                                  # one host, 8 chips
#   PROJECT=p ZONE=us-west4-a TYPE=v5litepod-16 OUTPUT=gs://bucket/run ./vm.sh                # 4 hosts, 16 chips
# Needs gcloud, and a bucket that the VM's service account may write (roles/storage.objectUser); for a gated model
# HF_TOKEN.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${OUTPUT:?}"
type="${TYPE:-v5litepod-8}"
name="${NAME:-jlora}"
image="${IMAGE:-v2-alpha-tpuv5-lite}"
root="$(cd "$(dirname "$0")/../.." && pwd)"
where=(--project "$PROJECT" --zone "$ZONE")

gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type "$type" --version "$image"
token="$(mktemp)"
trap 'rm -f "$token"; gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet' EXIT
gcloud compute tpus tpu-vm scp --recurse "$root" "$name:jlora" "${where[@]}" --worker=all
if [[ -n "${HF_TOKEN:-}" ]]; then # in a file: everybody on a machine sees its command lines
  printf %s "$HF_TOKEN" >"$token"
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "mkdir -p -m 700 .cache/huggingface"
  gcloud compute tpus tpu-vm scp "$token" "$name:.cache/huggingface/token" "${where[@]}" --worker=all
fi
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "
  pip install -q -e './jlora[tpu,data]' gcsfs && export PATH=\$HOME/.local/bin:\$PATH
  OUTPUT='$OUTPUT' ./jlora/experiments/cloud/run.sh"
