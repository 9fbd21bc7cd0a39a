#!/usr/bin/env bash
# Trains the artifacts of the results page from random weights, `characters` and `photos`, which ship, among them. Every
# step resumes: run it again after a stop.
#
#   FEWSHOT_DATA=/path/to/data bash deploy/train.sh [characters] [photos-cpu] [photos-free] [photos-64] [photos] \
#     [photos-free-long] [photos-64-long] [photos-free-cpu] [photos-ren] [tasks]
#
# characters, photos-cpu and photos-free-cpu are for two CPU cores and take hours, photos-ren one hour, tasks, which
# goes on from photos-free-long, an hour. The others are for a GPU, but for their learners, which take some minutes of
# two cores each: photos-free, photos-64 and photos, each of which goes on from the one before it, eleven minutes of
# an H100 in all, and photos-free-long and photos-64-long, which go on from photos-free, nine of an H200.
# $FEWSHOT_DATA holds omniglot/ and mini_imagenet/, each with zips of class folders and a splits.json, and, for what
# the artifact says of itself, trashnet/, magnetic_tile/ and gtsrb/. SEED=1 trains `characters`,
# `photos-free-cpu` or `photos-ren` from other random weights, in a folder of its own: three seeds tell how much of a
# figure is chance.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${FEWSHOT_DATA:-../shared/data}
RUNS=${RUNS:-runs}
# glibc gives large blocks back and asks for them again at every step; keeping them is up to 1.6 times faster.
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

finish() { # name, data, flags of evaluate, flags of export...
  local name=$1 data=$2 measure=$3
  shift 3
  local out=$RUNS/$name${SEED:+-$SEED}
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
  local data=$DATA/omniglot out=$RUNS/characters${SEED:+-$SEED} seed=${SEED:-0}
  python -m training pretrain --data "$data" --out "$out" --shape resnet10-grey --size 28 --augment characters \
    --rotations --objectives contrastive=1 --epochs 30 --batch 512 --optimizer adamw --lr 2e-3 --weight-decay 0.01 \
    --check-epochs 3 --seed "$seed"
  python -m training metatrain --data "$data" --out "$out" --tasks pseudo --rotations --views 11 --per-class 5 \
    --max-shot 5 --queries 3 --steps 600 --seed "$seed"
  # Pseudo-tasks are too easy to calibrate on: at their word half of all genuine characters would be turned away. What
  # the numbers behind "none of these" and the temperatures come from are the labels of the validation classes.
  finish characters "$data" "--way 5,20 --shot 1,5 --rotations" --tasks labels --rotations --default whitened \
    --description "Characters: Omniglot with rotations, 28 px grey"
}

photos-cpu() { # with the labels of the 64 training classes
  local data=$DATA/mini_imagenet out=$RUNS/photos-cpu
  python -m training pretrain --data "$data" --out "$out-84" --shape resnet18 --size 84 --small 64 --small-share 0.615 \
    --objectives supervised=1 --epochs 26 --batch 128 --lr 0.2 --check-epochs 4
  # The photos have 84 pixels. Seen larger they are told apart better, by a network that was trained a little on them so
  # (Touvron et al., "Fixing the train-test resolution discrepancy", 2019, https://arxiv.org/abs/1906.06423).
  python -m training pretrain --data "$data" --out "$out-112" --shape resnet18 --size 112 --start "$out-84" \
    --objectives supervised=1 --epochs 4 --batch 128 --lr 0.05 --warmup 0.1 --seed 1
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 144 --start "$out-112" \
    --objectives supervised=1 --epochs 0
  python -m training metatrain --data "$data" --out "$out" --views 1 --per-class 200 --steps 1000 \
    --cell training/cells/lstm
  finish photos-cpu "$data" "--way 5 --shot 1,5,10" --description "Photographs: 64 classes of mini-ImageNet, seen at 144 px"
}

photos-free() { # the 64 training classes, no label read
  local data=$DATA/mini_imagenet out=$RUNS/photos-free
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 112 --small 64 --small-share 0.92 \
    --objectives momentum=1,rotation=0.4 --details 2 --augment strong --epochs 224 --batch 1024 --lr 0.3 \
    --warmup 0.05 --precision bfloat16
  python -m training metatrain --data "$data" --out "$out" --tasks mixed --views 6 --per-class 60 --steps 1000
  finish photos-free "$data" "--way 5 --shot 1,5,10" --description "Photographs: mini-ImageNet without labels"
}

photos-free-cpu() { # without labels as well, and without a GPU: a small network on small images, some three hours of one core
  local data=$DATA/mini_imagenet out=$RUNS/photos-free-cpu${SEED:+-$SEED} seed=${SEED:-0}
  python -m training pretrain --data "$data" --out "$out" --shape resnet10 --size 84 --small 48 --small-share 0.9 \
    --objectives contrastive=1,rotation=0.4 --augment strong --epochs 50 --batch 512 --lr 0.3 --warmup 0.05 \
    --check-epochs 5 --precision bfloat16 --seed "$seed"
  python -m training metatrain --data "$data" --out "$out" --tasks mixed --views 2 --per-class 150 --steps 1000 \
    --seed "$seed"
  finish photos-free-cpu "$data" "--way 5 --shot 1,5,10" --description "Photographs: mini-ImageNet without labels, on a CPU"
}

photos-64() { # photos-free with their labels, from where it ended
  local data=$DATA/mini_imagenet out=$RUNS/photos-64
  python -m training pretrain --data "$data" --out "$out-112" --shape resnet18 --start "$RUNS/photos-free" --size 112 \
    --small 64 --small-share 0.8 --objectives supervised=0.5,projected=0.5,rotation=0.4 --epochs 72 --batch 512 \
    --lr 0.2 --warmup 0.1 --precision bfloat16
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 144 --start "$out-112" \
    --objectives supervised=1 --epochs 0
  python -m training metatrain --data "$data" --out "$out" --views 1 --per-class 200 --steps 1000
  finish photos-64 "$data" "--way 5 --shot 1,5,10" --description "Photographs: 64 classes of mini-ImageNet"
}

photos-free-long() { # photos-free, and 95 more passes with a learning rate that rises again
  local data=$DATA/mini_imagenet out=$RUNS/photos-free-long
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --start "$RUNS/photos-free" --size 112 \
    --small 64 --small-share 0.88 --objectives momentum=1,rotation=0.4 --details 2 --augment strong --epochs 95 \
    --batch 1024 --lr 0.25 --warmup 0.05 --precision bfloat16 --seed 1
  python -m training metatrain --data "$data" --out "$out" --tasks mixed --views 6 --per-class 60 --steps 1000
  finish photos-free-long "$data" "--way 5 --shot 1,5,10" --description "Photographs: mini-ImageNet without labels"
}

photos-ren() { # with the labels of 40 per cent of the images of the 64 training classes, no other image seen; an hour of two cores
  local data=$DATA/mini_imagenet out=$RUNS/photos-ren${SEED:+-$SEED} seed=${SEED:-0}
  python -m training pretrain --data "$data" --out "$out" --shape resnet10 --labelled 0.4 --size 84 --small 64 \
    --small-share 0.75 --mix --objectives supervised=0.5,projected=0.5 --epochs 80 --batch 128 --lr 0.2 --warmup 0.1 \
    --check-epochs 10 --seed "$seed"
  python -m training metatrain --data "$data" --out "$out" --views 2 --per-class 200 --steps 1000 --seed "$seed"
  finish photos-ren "$data" "--way 5 --shot 1,5,10" --description "Photographs: 40 per cent of 64 classes of mini-ImageNet"
}

tasks() { # the learners of photos-free-long once more, over tasks that are made in each way
  local data=$DATA/mini_imagenet made
  for made in pseudo clusters mixed labels; do
    local out=$RUNS/tasks-$made
    mkdir -p "$out"
    cp "$RUNS/photos-free-long/pretrain.safetensors" "$out"
    python -m training metatrain --data "$data" --out "$out" --tasks "$made" --per-class 100 --steps 1000
    rm -rf "$out/draft" "$out/metrics.jsonl"
    python -m training export --checkpoint "$out" --data "$data" --out "$out/draft" --name "tasks-$made" --no-int8
    python -m training evaluate --artifact "$out/draft" --data "$data" --shot 1,5 --json-out "$out/metrics.jsonl"
  done
}

photos-64-long() { # the same with labels, of turned and of mixed images
  local data=$DATA/mini_imagenet out=$RUNS/photos-64-long
  python -m training pretrain --data "$data" --out "$out-128" --shape resnet18 --start "$RUNS/photos-free-long" \
    --size 128 --small 96 --small-share 0.65 --rotations --mix --objectives supervised=0.5,projected=0.5 --epochs 50 \
    --batch 512 --lr 0.2 --warmup 0.1 --precision bfloat16
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 144 --start "$out-128" \
    --objectives supervised=1 --epochs 0
  python -m training metatrain --data "$data" --out "$out" --views 1 --per-class 200 --steps 1000
  finish photos-64-long "$data" "--way 5 --shot 1,5,10" --description "Photographs: 64 classes of mini-ImageNet"
}

photos() { # ships: 80 classes, pictures as people take them; calibrated on the 20 that are left
  local data=$RUNS/mini_imagenet_80 out=$RUNS/photos
  mkdir -p "$data"
  ln -sf "$(realpath "$DATA")"/mini_imagenet/{train,val,test}.zip "$data"
  python - "$DATA/mini_imagenet/splits.json" "$data/splits.json" << 'END'
import json, sys

splits = json.load(open(sys.argv[1]))
splits = {"train": sorted(splits["train"] + splits["val"]), "val": splits["test"], "test": []}
json.dump(splits, open(sys.argv[2], "w"))
END
  python -m training pretrain --data "$data" --out "$out-112" --shape resnet18 --start "$RUNS/photos-64-112" --size 112 \
    --objectives supervised=0.5,projected=0.5,rotation=0.4 --augment snapshots --epochs 11 --batch 512 --lr 0.1 \
    --warmup 0.1 --precision bfloat16
  python -m training pretrain --data "$data" --out "$out" --shape resnet18 --size 128 --start "$out-112" \
    --objectives supervised=0.5,projected=0.5,rotation=0.4 --augment snapshots --epochs 0
  python -m training metatrain --data "$data" --out "$out" --views 1 --per-class 200 --steps 1000 \
    --cell training/cells/lstm
  local about=(--name photos --default discriminant
    --description "Photographs: 80 classes of mini-ImageNet as people take pictures, seen at 128 px, ResNet-18")
  rm -rf "$out/draft" "$out/artifact" "$out/metrics.jsonl"
  python -m training export --checkpoint "$out" --data "$data" --out "$out/draft" "${about[@]}"
  for set in trashnet magnetic_tile "gtsrb --group ^[0-9]+_"; do
    # shellcheck disable=SC2086 - flags, not one word
    python -m training evaluate --artifact "$out/draft" --data "$DATA"/$set --json-out "$out/metrics.jsonl"
  done
  python -m training export --checkpoint "$out" --data "$data" --out "$out/artifact" "${about[@]}" \
    --metrics "$out/metrics.jsonl"
}

for name in "${@:-characters photos-free photos-64 photos}"; do
  for part in $name; do
    if [[ -n ${SEED:-} && $part != characters && $part != photos-free-cpu && $part != photos-ren ]]; then
      echo "SEED is for characters, photos-free-cpu and photos-ren." >&2
      exit 2
    fi
    "$part"
  done
done
