#!/bin/sh
# Builds, tests and measures the GPU link on a machine with GPUs; writes to $OUT (default: bench/results).
# Usage: bench/gpu_machine.sh STEP... ; the steps, in the order in which they are named:
#   bench      suite `gpu`, three rounds            quick      one short round of it
#   mixed      suite `gpu-mixed`                    compute    suite `gpu-compute`
#   ring       suite `gpu-ring`, of all GPUs        collectives  suite `gpu-collectives`, of all GPUs
#   moe        suite `gpu-moe`, of all GPUs, and the tests of it
#   handoff    suite `gpu-handoff`
#   tests      the GPU tests on the real driver, side by side
#   real       what only a GPU can show: sizes up to 4 GiB, killed peers, leaks
#   reductions those of the tests that compute     examples   the examples for GPUs
#   sanitizer  a few tests under compute-sanitizer
# Set WHEELS to a folder of wheels where packages are missing and no registry can be reached.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-bench/results}
site=/tmp/aiocomm-site
export PYTHONPATH=$site PYTHONUNBUFFERED=1
export FAKE_CUDA=${FAKE_CUDA:-0} # tests take the driver of the machine, if it has but one GPU, too
start=$(date +%s)
say() { echo "== $(($(date +%s) - start)) s: $*"; }

if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target $site "$WHEELS"/*.whl
fi
if [ ! -d $site/aiocomm ]; then
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target $site .
fi
say "built"
nvidia-smi --query-gpu=name,driver_version,pstate,clocks.sm --format=csv,noheader
nvidia-smi topo -m | head -6

suite() { # NAME OPTIONS...
  name=$1
  shift
  (cd /tmp && timeout 330 python3 -P -m aiocomm bench "$name" --timeout 60 --out "$out/$name.json" "$@") ||
    echo "suite $name: status $?"
}

# Each in a process of its own and all at once: what is tested is whether they pass, not how fast.
tests() {
  logs=$(mktemp -d)
  where="-o faulthandler_timeout=60" # a thread that is stuck in the driver is not reached by a signal
  for file in links/test_gpu links/test_gpu_giving_back links/test_gpu_onesided links/test_gpu_arrays integration/test_gpu_pages integration/test_gpu_lists \
    integration/test_gpu_collectives integration/test_gpu_repeats integration/test_gpu_pushed integration/test_gpu_words \
    integration/test_gpu_moe integration/test_gpu_moe_ends integration/test_gpu_moe_repeats fault/test_cuda_faults; do
    for loop in asyncio uvloop trio; do
      timeout 200 python3 -P -m pytest -v $where -p no:cacheprovider --timeout 120 -k "$loop" "tests/$file.py" \
        >"$logs/$(basename $file)-$loop" 2>&1 &
    done
  done
  # What no loop is named for.
  timeout 280 python3 -P -m pytest -v $where -p no:cacheprovider --timeout 120 -k "vllm or (not asyncio and not uvloop and not trio)" \
    tests/links/test_gpu*.py tests/integration/test_gpu_pages.py tests/integration/test_gpu_lists.py tests/integration/test_gpu_collectives.py \
    tests/integration/test_gpu_reductions.py tests/integration/test_gpu_repeats.py tests/integration/test_gpu_pushed.py \
    tests/integration/test_gpu_words.py tests/integration/test_gpu_moe*.py tests/integration/test_gpu_vllm.py \
    tests/fault/test_cuda_faults.py tests/unit/test_fake_driver.py >"$logs/others" 2>&1 &
  wait
  for log in "$logs"/*; do
    echo "$(basename "$log"): $(tail -n 1 "$log")"
    grep -E "^(FAILED|ERROR)" "$log" || true
  done | tee "$out/gpu-tests.txt"
  tail -n 400 "$logs"/* >"$out/gpu-tests.log"
}

for step in "$@"; do
  say "$step"
  case $step in
  bench) suite gpu --rounds 3 ;;
  quick) suite gpu --quick --rounds 1 ;;
  mixed) suite gpu-mixed --rounds 3 ;;
  ring) suite gpu-ring --rounds 3 ;;
  moe)
    suite gpu-moe --rounds 3
    timeout 200 python3 -P -m pytest -q -p no:cacheprovider --timeout 60 tests/integration/test_gpu_moe*.py \
      >"$out/gpu-moe.log" 2>&1 || true
    tail -n 25 "$out/gpu-moe.log"
    ;;
  handoff) suite gpu-handoff --rounds 5 ;;
  compute) suite gpu-compute --rounds 2 ;;
  collectives) suite gpu-collectives --rounds 2 ;;
  tests) tests ;;
  real)
    timeout 200 python3 -P -m pytest -q -p no:cacheprovider --durations 10 tests/integration/test_gpu_real.py \
      >"$out/gpu-real.log" 2>&1 || true
    tail -n 25 "$out/gpu-real.log"
    ;;
  reductions)
    timeout 150 python3 -P -m pytest -q -p no:cacheprovider --timeout 30 tests/integration/test_gpu_reductions.py \
      tests/integration/test_gpu_kernels.py tests/integration/test_gpu_gather.py >"$out/gpu-reductions.log" 2>&1 || true
    tail -n 25 "$out/gpu-reductions.log"
    ;;
  examples)
    for example in gpu_torch gpu_cupy gpu_cuda_python; do
      (cd /tmp && timeout 60 python3 -P "$root/examples/$example.py") || echo "$example: status $?"
    done
    (cd /tmp && timeout 60 python3 -P - "$root/examples/gpu.ipynb") <<'PY' || echo "gpu.ipynb: status $?"
# The notebook's cells, one after the other, as a kernel runs them.
import ast, asyncio, inspect, json, pathlib, sys

async def main():
    for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())["cells"]:
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if inspect.isawaitable(done := eval(code, globals())):
                await done

asyncio.run(main())
PY
    ;;
  sanitizer)
    timeout 150 compute-sanitizer --target-processes all --error-exitcode 9 --report-api-errors no \
      python3 -P -m pytest -q -p no:cacheprovider --timeout 140 tests/links/test_gpu.py \
      -k "asyncio and shm and (gpu_to_gpu or every_kind or two_processes) and not stream" \
      >"$out/gpu-sanitizer.log" 2>&1 || echo "compute-sanitizer: status $?"
    grep -E "ERROR SUMMARY|passed|failed|Invalid" "$out/gpu-sanitizer.log" | tail -n 8 || true
    ;;
  *) echo "no step $step" && exit 2 ;;
  esac
done
say "done"
