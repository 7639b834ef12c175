#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: fills in launch/gke_jobset.yaml and creates it.
#
#   launch/gke_jobset.sh NAME JAXII_FLAGS [--dry-run]
#
# Build the image from a commit, not from the working tree, and pass it by digest:
#
#   git archive HEAD | docker build -t REGISTRY/jaxii -f launch/Dockerfile - &&
#       docker push REGISTRY/jaxii          # prints sha256:..., the digest
#   IMAGE=REGISTRY/jaxii@sha256:... TOPOLOGY=4x4 launch/gke_jobset.sh my-run \
#       --config=configs/f2_multitask.py:open_images_v4 \
#       --data_dir=gs://my-bucket/open_images --workdir=gs://my-bucket/runs/first
#
#   kubectl get jobset my-run              # shows the status
#   kubectl delete jobset my-run           # stops it; run the command above to resume
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=my-run \
#       --prefix --max-log-requests=64     # shows the logs of up to 64 pods
#
# For W&B or MLflow, add `--build-arg EXTRAS=wandb` to `docker build`, and create a secret
# with their variables, such as a line WANDB_API_KEY=... in FILE:
#
#   kubectl create secret generic jaxii --from-env-file=FILE
#
# After a preemption (exit code 75, or a lost node), the job restarts without limit. After
# any other exit code (a lost process), it restarts RETRIES times. After exit code 2
# (invalid input), it fails.
# Requirements: kubectl for a cluster with JobSet 0.10 or newer and a TPU node pool.
# Environment: IMAGE; ACCELERATOR [tpu-v5-lite-podslice]; TOPOLOGY [4x4]; CHIPS_PER_HOST
# [4]; SERVICE_ACCOUNT of Kubernetes with access to the bucket [default]; SECRET with
# environment variables of the run, if it exists [jaxii]; RETRIES [3].
# shellcheck disable=SC2034 # the names in the manifest are looked up by name
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${#words[@]} -ge 2 ]] || usage
NAME=${words[0]} flags=("${words[@]:1}")
check_places '^gs://' \
    "is not in a bucket; a pod's disks are deleted with it, so use gs://."
[[ ${IMAGE:-} == *@sha256:* ]] || stop 2 \
    "IMAGE=${IMAGE:-} has no digest; use REGISTRY/jaxii@sha256:DIGEST."
: "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${CHIPS_PER_HOST:=4}"
: "${SERVICE_ACCOUNT:=default}" "${SECRET:=jaxii}" "${RETRIES:=3}"
[[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] ||
    stop 2 "TOPOLOGY=$TOPOLOGY is not a topology; use one such as 4x4."
chips=$((${TOPOLOGY//x/ * }))
((chips % CHIPS_PER_HOST == 0)) ||
    stop 2 "$TOPOLOGY has $chips chips, not divisible by CHIPS_PER_HOST=$CHIPS_PER_HOST."
HOSTS=$((chips / CHIPS_PER_HOST))
# After a preemption, nodes become ready minutes apart.
((HOSTS == 1)) || allow_start 1800

# The flags as JSON, which is valid YAML.
ARGS=''
for word in "${flags[@]}"; do
    word=${word//\\/\\\\}
    ARGS+=", \"${word//\"/\\\"}\""
done
ARGS="[${ARGS#, }]"

manifest=$(< launch/gke_jobset.yaml)
for name in NAME IMAGE ACCELERATOR TOPOLOGY CHIPS_PER_HOST SERVICE_ACCOUNT SECRET \
    RETRIES HOSTS ARGS; do
    manifest=${manifest//"\${$name}"/"${!name}"}
done
echo "$manifest" | grep -v '^#'
act kubectl create -f - <<< "$manifest"
