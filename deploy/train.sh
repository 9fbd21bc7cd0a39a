#!/usr/bin/env bash
# Trains the two artifacts that ship, from random weights, on two CPU cores. Every step resumes: run it again after a stop.
#
#   FEWSHOT_DATA=/path/to/data bash deploy/train.sh [characters] [photos]
#
# $FEWSHOT_DATA holds omniglot/ and mini_imagenet/, each with zips of class folders and a splits.json.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${FEWSHOT_DATA:-../shared/data}
RUNS=${RUNS:-runs}
# glibc gives large blocks back and asks for them again at every step; keeping them is up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

finish() { # name, data, flags of evaluate, flags of export...
  local name=$1 data=$2 measure=$3
  shift 3
  local out=$RUNS/$name
  rm -rf "$out/draft" "$out/artifact" "$out/metrics.jsonl"
  python -m training export --checkpoint "$out" --data "$data" --out "$out/draft" --name "$name" "$@"
  local default
  default=$(python -c "import json; print(json.load(open('$out/draft/manifest.json'))['default'])")
  # shellcheck disable=SC2086 - flags, not one word
  python -m training evaluate --artifact "$out/draft" --data "$data" $measure --json-out "$out/metrics.jsonl"
  # shellcheck disable=SC2086
  python -m training evaluate --artifact "$out/draft" --data "$data" $measure --json-out "$out/metrics.jsonl" \
    --precision int8 --learners "$default"
  python -m training export --checkpoint "$out" --data "$data" --out "$out/artifact" --name "$name" "$@" \
    --metrics "$out/metrics.jsonl"
}

characters() {
  local data=$DATA/omniglot out=$RUNS/characters
  python -m training pretrain --data "$data" --out "$out" --shape resnet10-grey --size 28 --augment characters \
    --rotations --objectives contrastive=1 --epochs 30 --batch 512 --optimizer adamw --lr 2e-3 --weight-decay 0.01 \
    --check-epochs 3
  python -m training metatrain --data "$data" --out "$out" --tasks pseudo --rotations --views 11 --per-class 5 \
    --max-shot 5 --queries 3 --steps 600
  # Pseudo-tasks are too easy to calibrate on: at their word half of all genuine characters would be turned away. What
  # the numbers behind "none of these" and the temperatures come from are the labels of the validation classes.
  finish characters "$data" "--way 5,20 --shot 1,5 --rotations" --tasks labels --rotations --default whitened \
    --description "Characters: Omniglot with rotations, 28 px grey"
}

photos() {
  local data=$DATA/mini_imagenet out=$RUNS/photos
  python -m training pretrain --data "$data" --out "$out-84" --shape resnet18 --size 84 --small 64 --small-share 0.615 \
    --objectives supervised=1 --epochs 26 --batch 128 --lr 0.2 --check-epochs 4
  # The photos have 84 pixels. Seen larger they are told apart better, by a network that was trained a little on them so
  # (Touvron et al., "Fixing the train-test resolution discrepancy", 2019, https://arxiv.org/abs/1906.06423).
  python -m training pretrain --data "$data" --out "$out-112" --shape resnet18 --size 112 --start "$out-84" \
    --objectives supervised=1 --epochs 4 --batch 128 --lr 0.05 --warmup 0.1 --seed 1
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 144 --start "$out-112" \
    --objectives supervised=1 --epochs 0
  python -m training metatrain --data "$data" --out "$out" --views 1 --per-class 200 --steps 1000
  finish photos "$data" "--way 5 --shot 1,5,10" --description "Photographs: 64 classes of mini-ImageNet, seen at 144 px, ResNet-18"
}

for name in "${@:-characters photos}"; do
  for part in $name; do "$part"; done
done
