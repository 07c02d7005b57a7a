#!/usr/bin/env bash
# From nothing to a FLatten-Swin that is trained, evaluated and fine-tuned on real images, in minutes and without any
# download but packages. All it writes lies in .venv and quickstart/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
processes=$((gpus == 1 ? 1 : 2))
data=quickstart/digits
output=quickstart/output

run() { # a title, then arguments of main.py
  echo
  echo "== $1"
  shift
  torchrun --standalone --nproc_per_node="$processes" main.py --data-path "$data" --output "$output" "$@"
}

[ -d "$data" ] || python scripts/make_digits.py "$data"
batch=$((64 / processes))
run "train at 48 pixels" --cfg configs/quickstart.yaml --batch-size "$batch"
trained="$output/quickstart/default/best.pth"
run "evaluate what was saved" --cfg configs/quickstart.yaml --eval --resume "$trained"
run "evaluate it at 64 pixels" --cfg configs/quickstart_64.yaml --tag before --eval --resume "$trained"
run "fine-tune at 64 pixels" --cfg configs/quickstart_64.yaml --batch-size "$batch" --pretrained "$trained"
run "evaluate what was fine-tuned" --cfg configs/quickstart_64.yaml --eval \
  --resume "$output/quickstart_64/default/best.pth"
echo
runs=("$output/quickstart/default" "$output/quickstart_64/before" "$output/quickstart_64/default")
python scripts/plot_curves.py "${runs[0]}" "${runs[2]}" --png quickstart/curves.png
python scripts/summarise.py "${runs[@]}"
