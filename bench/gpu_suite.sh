#!/usr/bin/env bash
# Everything that needs a GPU, in sections of less than eight minutes that each run alone:
#
#     bench/gpu_suite.sh OUT [tests|kernels|vision|table_g|decode|quantised|engine|split ...]
#
# JSON and logs go to the folder OUT, a short table comes last. PYTHON names the interpreter, by default the checkout's
# own environment or else python3; vitrail need not be installed.
set -uo pipefail

usage="usage: bench/gpu_suite.sh OUT [tests|kernels|vision|table_g|decode|quantised|engine|split ...]"
out=$(realpath -m "${1:?$usage}")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
mkdir -p "$out"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=$root/.venv/bin/python; fi
fi
# The root is the package: where it is not installed, a link under the package's name makes it importable.
link=$(mktemp -d)
trap 'rm -rf "$link"' EXIT
ln -s "$root" "$link/vitrail"
export PYTHONSAFEPATH=1
"$PYTHON" -c "import vitrail" 2>/dev/null || export PYTHONPATH=$link

run_section() {
    case $1 in
        tests)
            # Kernels compile on all cores; an image's older pytest will do.
            timeout 480 "$PYTHON" -m pytest -o minversion=7 -m gpu -q -p no:cacheprovider --numprocesses=8 --dist=worksteal \
                tests/kernels tests/runtime/test_graphs.py tests/runtime/test_upload.py \
                tests/bench/test_harness.py ;;
        kernels) timeout 480 "$PYTHON" bench/kernels.py --out "$out" ;;
        vision) timeout 480 "$PYTHON" bench/vision.py --out "$out" ;;
        table_g) timeout 480 "$PYTHON" bench/table_g.py --out "$out" ;;
        decode) timeout 480 "$PYTHON" bench/decode.py --out "$out" ;;
        quantised) timeout 480 "$PYTHON" bench/quantised.py --device cuda --out "$out" ;;
        engine)
            timeout 180 "$PYTHON" bench/latency.py --device cuda --models v1.5 --dtypes bfloat16 --out "$out"
            timeout 300 "$PYTHON" bench/throughput.py --device cuda --models v1.5 --out "$out" ;;
        split) timeout 480 "$PYTHON" bench/split.py --device cuda --out "$out" ;;
    esac
}

failed=0
sections=("$@")
if [ $# -eq 0 ]; then sections=(tests kernels vision table_g decode quantised engine split); fi
for section in "${sections[@]}"; do
    case $section in
        tests | kernels | vision | table_g | decode | quantised | engine | split) ;;
        *) echo "gpu_suite.sh: no section $section; $usage" >&2; exit 2 ;;
    esac
done
for section in "${sections[@]}"; do
    start=$SECONDS
    run_section "$section" >"$out/$section.log" 2>&1
    status=$?
    if [ $status -ne 0 ]; then failed=1; fi
    echo "$section: exit status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
done
for section in "${sections[@]}"; do
    echo
    echo "== $section"
    tail -n 60 "$out/$section.log"
done
exit $failed
