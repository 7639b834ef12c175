#!/usr/bin/env bash
# What the original competitor found, measured: every run of configs/findings.py on a
# prepared data set, the evaluations that need no training, and one table at the end.
#
#   launch/findings.sh DATA RUNS [--dry-run]
#
# DATA  the prepared emoji set; RUNS  a folder for the workdirs.
# In order of value: stop it when you have seen enough. The same command goes on where
# it stopped, inside a run too. SEEDS="0 1 2" (the default) repeats the baseline.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 2 ]] || usage
data=$1 runs=$2 dry=${3:-}
[[ -z $dry || $dry == --dry-run ]] || usage
python=${PYTHON:-python}
cd "$(dirname "$0")/.."

jaxii() {
    echo "+ $python -m jaxii.main $*"
    [[ -n $dry ]] || "$python" -m jaxii.main "$@"
}

# train NAME WORKDIR [FLAG...]: nothing to do where the figures are there already.
train() {
    local name=$1 workdir=$runs/$2
    shift 2
    [[ -e $workdir/metrics.json ]] ||
        jaxii --config="configs/findings.py:$name" --data_dir="$data" \
            --workdir="$workdir" "$@"
}

# evaluate WORKDIR RESULT FLAG...
evaluate() {
    local workdir=$runs/$1 result=$2
    shift 2
    [[ -e $workdir/$result ]] || jaxii evaluate --workdir="$workdir" "$@"
}

# adapt TRAINED OUTPUT FLAG...
adapt() {
    local workdir=$runs/$1 output=$runs/$2
    shift 2
    [[ -e $output/metrics.json ]] ||
        jaxii adapt --workdir="$workdir" --output="$output" --allow_tuning_labels "$@"
}

train baseline baseline
for name in long long_deep; do
    train "$name" "$name"
done
train no_augmentation no_augmentation
for name in bce_soft_f focal focal_from_zero bce_then_focal asl soft_f_fine_tune; do
    train "$name" "$name"
done

# Adaptation, from none to all of it.
evaluate baseline metrics_adabn.json --adapt_bn
evaluate baseline metrics_label_shift.json --label_shift
evaluate baseline metrics_tuned_on_tuning.json --tune_on=tuning --allow_tuning_labels
adapt baseline adapted_last_layer --train=last_layer
adapt baseline adapted_all --train=all

for name in embedding_1 embedding_0.1 embedding_dropped embedding_dim_8 \
    embedding_dim_128; do
    train "$name" "$name"
done
for name in resnet_26 resnet_26_d se_resnet_26 resnext_26; do
    train "$name" "$name"
done
for seed in ${SEEDS:-0 1 2}; do
    [[ $seed == 0 ]] || train baseline "baseline_seed_$seed" --config.seed="$seed"
done

# The table: first the baseline, which the others are compared with.
rows=("$runs/baseline" "$runs"/baseline/metrics_*.json)
for workdir in "$runs"/*/; do
    [[ $workdir == "$runs/baseline/" || ! -e $workdir/metrics.json ]] ||
        rows+=("${workdir%/}")
done
jaxii compare "${rows[@]}" --output="$runs/findings.html"
