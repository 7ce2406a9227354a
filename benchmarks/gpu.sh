#!/usr/bin/env bash
# Everything that matters on one NVIDIA GPU, in under nine minutes:
#     benchmarks/gpu.sh [OUT_DIR [further options of benchmarks.speed]]
# Wants jax with CUDA and flax; torch and timm are measured beside them where they are installed.
# PYTHON, PEAK_SIDE and SUITES in the environment replace the interpreter, the side of the matrices and the suites.
set -euo pipefail
out=$(realpath -m "${1:-gpu-results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out"
"$python" -m benchmarks.peak "${PEAK_SIDE:-8192}" | tee "$out/peak.txt"
# shellcheck disable=SC2086  (several words)
"$python" -m benchmarks.speed ${SUITES:-paper variants step forward} \
    --minutes 7 --turns 5 --seconds 0.15 --out "$out" "${@:2}"
