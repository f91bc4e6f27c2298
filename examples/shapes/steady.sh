#!/bin/sh
# Tries what may keep a shape itself, from the packaged LoRA on: sh steady.sh WORLD OUTPUT
# WORLD is from `diffusers-mcm shapes build`. One after the other: the second stage of distil.sh with as many steps each,
# as it is (the control), with another λ_adv, and with a stronger one and both terms beyond the paper. Started again, it
# goes on where it stopped. STEPS shortens it. Each term alone, from a fresh LoRA, is in ablate.py.
set -e
here=$(cd "$(dirname "$0")" && pwd)
world=$1 output=$2
mkdir -p "$output"

measure() { # NAME LORA [more flags of steady.py]
  name=$1 lora=$2
  shift 2
  size=$(echo "$*" | sed -n 's/.*--captions \([0-9]*\) --seeds \([0-9]*\).*/\1x\2/p')
  [ -f "$output/$name-${size:-24x1}.md" ] || python "$here/steady.py" "$lora" --name "$name" --output "$output" "$@"
}

lora() { # NAME [more flags of train_mcm_distill.py]
  name=$1
  shift
  [ -e "$output/$name-appearance" ] || cp -r "$here/../../diffusers_mcm/shapes/weights/mcm-shapes" "$output/$name-appearance"
  [ -f "$output/$name/pytorch_lora_weights.safetensors" ] || sh "$here/distil.sh" mcm "$world" "$output/$name" \
    --max_train_steps "${STEPS:-400}" --checkpointing_steps 25 --report_to none "$@"
  measure "$name" "$output/$name"
}

measure packaged mcm-shapes
lora paper
lora calm --lambda_adv 0.03
lora all --lambda_adv 0.3 --lambda_temporal 1 --lambda_change 0.15
for name in paper calm all; do
  measure "$name" "$output/$name" --captions 60 --seeds 4
done
