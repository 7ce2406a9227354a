#!/usr/bin/env bash
# Everything that matters on one NVIDIA GPU, in under nine minutes: benchmarks/gpu.sh [OUT_DIR] [further options of benchmarks.speed]
# Wants jax with CUDA and flax; torch and timm are measured beside them where they are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-results}
python=${PYTHON:-python3}
mkdir -p "$out"
"$python" -m benchmarks.peak | tee "$out/peak.txt"
"$python" -m benchmarks.speed step paper variants forward --minutes 7 --turns 5 --seconds 0.15 --out "$out" "${@:2}"
