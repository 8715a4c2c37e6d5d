#!/usr/bin/env bash
# Train `lite` on a GPU (experimental), on reduced copies of the data; see docs/train-on-gpu.md.
#     on-gpu.sh DATA START OUT HEAD_MINUTES REFINE_MINUTES
# DATA: folder into which the tar files of icm_cli.training.data.export were unpacked. START: initial checkpoint.
# OUT: folder for lite.safetensors, in parts of 15 MB (join them with cat), and the logs; written after an interrupt, too.
set -euo pipefail
mkdir -p "$3"
data=$(realpath "$1") start=$(realpath "$2") out=$(realpath "$3") minutes=$4 refine=$5
here=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$here OMP_NUM_THREADS=2
runs=$data/runs
train() { (cd "$data" && python3 -m icm_cli.cli train --data data.yaml --device "${DEVICE:-cuda}" --quiet "$@"); }
collect() {
    head=$start edges=$start
    [ -f "$runs/end-to-end/last.safetensors" ] && head=$runs/end-to-end/last.safetensors
    [ -f "$runs/refine/last.safetensors" ] && edges=$runs/refine/last.safetensors
    (cd "$here" && python3 -m icm_cli.model.packing "$data/lite.safetensors" "$head" --edges "$edges")
    split -b 15m -d -a 1 "$data/lite.safetensors" "$out/lite.safetensors."
    for run in end-to-end refine; do [ -f "$runs/$run/log.csv" ] && cp "$runs/$run/log.csv" "$out/$run.csv"; done
}
trap collect EXIT
# Both run at the same time, on a machine with 16 CPU cores.
train --config "$here/configs/train/lite-refine.yaml" --checkpoint "$start" --out runs/refine --resume --workers 6 \
    --set train.minutes="$refine" --set train.batch_size=24 --set train.learning_rate=1e-3 --set train.refine.crop_px=224 \
    --set train.canvas_px=512 --set train.refine.photograph_probability=0.35 &
refining=$!
train --config "$here/configs/train/lite-end-to-end.yaml" --checkpoint "$start" --out runs/end-to-end --resume --workers 9 \
    --set train.minutes="$minutes"
wait "$refining"
