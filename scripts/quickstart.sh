#!/usr/bin/env bash
# Train, evaluate and fine-tune a small FLatten-Swin on real images in a few minutes. Only packages are downloaded; all output
# is in .venv and quickstart/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
processes=$((gpus == 1 ? 1 : 2)) # one process per GPU, at most two; two processes on a CPU
data=quickstart/digits
output=quickstart/output

run() { # arguments: a title, then the arguments of main.py
  echo
  echo "== $1"
  shift
  torchrun --standalone --nproc_per_node="$processes" main.py --data-path "$data" --output "$output" "$@"
}

[ -d "$data" ] || python scripts/make_digits.py "$data"
batch=$((64 / processes))
run "train at 48 pixels" --cfg configs/quickstart.yaml --batch-size "$batch"
trained="$output/quickstart/default/best.pth"
run "evaluate the saved checkpoint" --cfg configs/quickstart.yaml --eval --resume "$trained"
run "evaluate the same checkpoint at 64 pixels" --cfg configs/quickstart_64.yaml --tag before --eval --resume "$trained"
run "fine-tune at 64 pixels" --cfg configs/quickstart_64.yaml --batch-size "$batch" --pretrained "$trained"
run "evaluate the fine-tuned checkpoint" --cfg configs/quickstart_64.yaml --eval \
  --resume "$output/quickstart_64/default/best.pth"
echo
runs=("$output/quickstart/default" "$output/quickstart_64/before" "$output/quickstart_64/default")
python scripts/plot_curves.py "${runs[0]}" "${runs[2]}" --png quickstart/curves.png
python scripts/summarise.py "${runs[@]}"
