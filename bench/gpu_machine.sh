#!/bin/sh
# Builds, tests and measures the GPU link on a machine with two GPUs; writes to $OUT (default: bench/results).
# Usage: bench/gpu_machine.sh [tests] [bench] [quick]
# Set WHEELS to a folder of wheels where packages are missing and no registry can be reached.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/aiocomm-site "$WHEELS"/*.whl
fi
export PYTHONPATH=/tmp/aiocomm-site
if [ ! -d /tmp/aiocomm-site/aiocomm ]; then
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target /tmp/aiocomm-site .
fi
nvidia-smi --query-gpu=name,driver_version,pstate,clocks.sm --format=csv,noheader
nvidia-smi topo -m | head -4
case "$*" in *tests*)
  python3 -P -m pytest -q -p no:cacheprovider --timeout 120 \
    tests/links/test_gpu.py tests/links/test_gpu_arrays.py tests/links/test_gpu_onesided.py \
    tests/integration/test_gpu_pages.py tests/integration/test_gpu_collectives.py \
    tests/unit/test_fake_driver.py tests/fault/test_cuda_faults.py 2>&1 | tee "$out/gpu-tests.log" | tail -40 ;;
esac
case "$*" in *bench*)
  quick=; rounds=3
  case "$*" in *quick*) quick=--quick; rounds=2 ;; esac
  (cd /tmp && python3 -P -m aiocomm bench gpu $quick --rounds "$rounds" --out "$out/gpu.json") ;;
esac
