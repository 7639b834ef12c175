#!/usr/bin/env bash
# Measures jaxii, Flax and PyTorch on this machine's GPU, in under 8 minutes.
#
#   tests/benchmarks/on_gpu.sh OUT
#   JAX_PLATFORMS=cpu tests/benchmarks/on_gpu.sh OUT --tiny      # rehearse it
#
# The machine needs no network. Its Python needs JAX with CUDA, Flax, Optax, Orbax,
# PyTorch, torchvision, OpenCV, Jinja2 and Matplotlib; other packages are installed from
# wheels in the folder WHEELS, which tests/benchmarks/fetch_wheels.sh fills. Writes the
# measurements listed in on_gpu.py to OUT.
# Environment: PYTHON [python3]; WHEELS [wheels].
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
python=${PYTHON:-python3} wheels=${WHEELS:-wheels}
export PYTHONPATH
PYTHONPATH=$(cd "$(dirname "$0")/../.." && pwd)
if [[ -d $wheels ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
        "$wheels"/*.whl
    PYTHONPATH+=:$site
fi
export JAXII_PEERS_PYTHON=${JAXII_PEERS_PYTHON:-$python}
# Two processes share the card's memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.45}
"$python" -m tests.benchmarks.on_gpu "$@"
