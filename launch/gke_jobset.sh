#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: fills in launch/gke_jobset.yaml and creates it.
#
#   launch/gke_jobset.sh NAME FLAGS OF JAXII [--dry-run]
#
# One image is one commit, built from the commit and not from the tree, and named by digest:
#
#   git archive HEAD | docker build -t REGISTRY/jaxii -f launch/Dockerfile - &&
#       docker push REGISTRY/jaxii          # prints sha256:..., the digest
#   IMAGE=REGISTRY/jaxii@sha256:... TOPOLOGY=4x4 launch/gke_jobset.sh my-run \
#       --config=configs/f2_multitask.py:open_images_v4 \
#       --data_dir=gs://my-bucket/open_images --workdir=gs://my-bucket/runs/first
#
#   kubectl get jobset my-run                                    # how it goes
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=my-run     # what it says
#   kubectl delete jobset my-run             # ends it; the same command as above goes on
#
# Preempted (75, or a node taken), it starts again as often as that happens; after 1, a
# process lost, RETRIES times; after 2, misuse, it stops as failed.
# Needed: kubectl for a cluster with JobSet 0.10 or newer and a TPU node pool.
# Environment: IMAGE; ACCELERATOR [tpu-v5-lite-podslice]; TOPOLOGY [4x4]; CHIPS_PER_HOST
# [4]; SERVICE_ACCOUNT of Kubernetes that may use the bucket [default]; RETRIES [3].
# shellcheck disable=SC2034 # the names in the manifest are looked up by name
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${#words[@]} -ge 2 ]] || usage
NAME=${words[0]} flags=("${words[@]:1}")
check_places '^gs://' "is not in a bucket; a pod's disks go with it: use gs://."
[[ ${IMAGE:-} == *@sha256:* ]] || stop 2 \
    "IMAGE=${IMAGE:-} is not one build for ever; give REGISTRY/jaxii@sha256:DIGEST."
: "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${CHIPS_PER_HOST:=4}"
: "${SERVICE_ACCOUNT:=default}" "${RETRIES:=3}"
[[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || stop 2 "TOPOLOGY=$TOPOLOGY; give one like 4x4."
chips=$((${TOPOLOGY//x/ * }))
((chips % CHIPS_PER_HOST == 0)) ||
    stop 2 "$TOPOLOGY is $chips chips; CHIPS_PER_HOST=$CHIPS_PER_HOST does not divide it."
HOSTS=$((chips / CHIPS_PER_HOST))

# The flags as JSON, which YAML reads.
ARGS=''
for word in "${flags[@]}"; do
    word=${word//\\/\\\\}
    ARGS+=", \"${word//\"/\\\"}\""
done
ARGS="[${ARGS#, }]"

manifest=$(< launch/gke_jobset.yaml)
for name in NAME IMAGE ACCELERATOR TOPOLOGY CHIPS_PER_HOST SERVICE_ACCOUNT RETRIES \
    HOSTS ARGS; do
    manifest=${manifest//"\${$name}"/"${!name}"}
done
echo "$manifest" | grep -v '^#'
act kubectl create -f - <<< "$manifest"
