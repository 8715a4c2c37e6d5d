#!/usr/bin/env bash
# Trains `lite` on a GPU in a few minutes, from small copies of the data: see docs/train-on-gpu.md.
#     on-gpu.sh DATA START OUT JOINT_MINUTES REFINE_MINUTES
# DATA: the folder in which the tar files of icm_cli.training.data.export were unpacked; START: the .safetensors to begin
# with; OUT: gets lite.safetensors in pieces of 15 MB (cat them together) and the logs, also when it is cut short.
set -euo pipefail
data=$(realpath "$1") start=$(realpath "$2") out=$(realpath "$3") joint=$4 refine=$5
here=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$here OMP_NUM_THREADS=2
runs=$data/runs
train() { (cd "$data" && python3 -m icm_cli.cli train --data data.yaml --device "${DEVICE:-cuda}" --quiet "$@"); }
collect() {
    head=$start edges=$start
    [ -f "$runs/joint/last.safetensors" ] && head=$runs/joint/last.safetensors
    [ -f "$runs/refine/last.safetensors" ] && edges=$runs/refine/last.safetensors
    (cd "$here" && python3 -m icm_cli.model.packing "$data/lite.safetensors" "$head" --edges "$edges")
    split -b 15m -d -a 1 "$data/lite.safetensors" "$out/lite.safetensors."
    for run in joint refine; do [ -f "$runs/$run/log.csv" ] && cp "$runs/$run/log.csv" "$out/$run.csv"; done
}
trap collect EXIT
# Both at once: the refining network's samples are made by the CPU's cores, the mosaics on the GPU.
train --config "$here/configs/train/lite-refine.yaml" --checkpoint "$start" --out runs/refine --resume --workers 12 \
    --set train.minutes="$refine" --set train.batch_size=24 --set train.learning_rate=1e-3 --set train.refine.crop_px=224 \
    --set train.canvas_px=512 --set train.refine.photograph_probability=0.35 &
refining=$!
train --config "$here/configs/train/lite-joint.yaml" --checkpoint "$start" --out runs/joint --resume \
    --set train.minutes="$joint"
wait "$refining"
