#!/usr/bin/env bash
# Trains every GAN preset on MNIST, CIFAR-10 and a folder of emoji, so many minutes each, and measures them:
#
#     examples/gans.sh DATA OUT [MINUTES]
#
# DATA holds mnist/, cifar10/cifar10-imagefolder.zip and emoji/emoji-twitter.zip. What is there already goes on or is left.
set -u
data=${1:?DATA} out=${2:?OUT} minutes=${3:-15}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

declare -A sets=(
  [mnist]="mnist:$data/mnist"
  [cifar10]="images:$data/cifar10/cifar10-imagefolder.zip"
  [emoji]="images:$data/emoji/emoji-twitter.zip --set data.size=32 --set data.label=category"
)
# A schedule must know its end: what one core of a quiet machine does in a quarter of an hour, or less.
declare -A steps=([r3gan]=500)

for set in mnist cifar10 emoji; do
  for model in gan dcgan lsgan cgan wgan wgan-gp sngan r3gan; do
    run=$out/$set/$model
    # shellcheck disable=SC2086
    timeout --signal=INT "${minutes}m" gencore train "$model" --data ${sets[$set]} --out "$run" \
      --steps "${steps[$model]:-100000}" --ema 0.99 --set train.sample_every=500 --resume
    gencore sample "$run" -n 100 --out "$run/grid.png"
    gencore evaluate "$run" -n 2000 --out "$run/evaluation.json"
  done
done
