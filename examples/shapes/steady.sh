#!/bin/sh
# Tries what may keep a shape itself, from the packaged LoRA on: sh steady.sh WORLD DATA OUTPUT
# WORLD is from `diffusers-mcm shapes build`, DATA from prepare.py. One after the other: a steadier decoder, then the
# second stage of distil.sh with as many steps each, as it is (the control) and with what is beyond the paper; each is
# measured with both decoders. Started again, it goes on where it stopped. STEPS and DECODER_STEPS shorten it.
set -e
here=$(cd "$(dirname "$0")" && pwd)
world=$1 data=$2 output=$3
weights=$here/../../diffusers_mcm/shapes/weights
mkdir -p "$output"

measure() { # NAME LORA [more flags of steady.py]
  name=$1 lora=$2
  shift 2
  size=$(echo "$*" | sed -n 's/.*--captions \([0-9]*\) --seeds \([0-9]*\).*/\1x\2/p')
  [ -f "$output/$name-${size:-24x1}.md" ] || python "$here/steady.py" "$lora" --name "$name" --output "$output" "$@"
}

decoder() { # NAME [more flags of steady_decoder.py]
  name=$1
  shift
  [ -f "$output/$name/vae/config.json" ] || python "$here/steady_decoder.py" --data "$data" --work "$output/$name" \
    --output "$output/$name/vae" --init "$weights/mcm-shapes-teacher/vae" --checkpoint_every 50 "$@"
}

lora() { # NAME [more flags of train_mcm_distill.py]
  name=$1
  shift
  [ -e "$output/$name-appearance" ] || cp -r "$weights/mcm-shapes" "$output/$name-appearance"
  [ -f "$output/$name/pytorch_lora_weights.safetensors" ] || sh "$here/distil.sh" mcm "$world" "$output/$name" \
    --max_train_steps "${STEPS:-400}" --checkpointing_steps 25 --report_to none "$@"
  measure "$name" "$output/$name"
  measure "$name-decoder" "$output/$name" --vae "$output/decoder/vae"
}

decoder decoder --steps "${DECODER_STEPS:-2000}"
measure packaged mcm-shapes
measure packaged-decoder mcm-shapes --vae "$output/decoder/vae"
lora paper
lora temporal --lambda_temporal 1
lora change --lambda_change 0.15
lora full-rate --lambda_adv 0.3 --lr_scheduler constant_with_warmup
lora all --lambda_adv 0.3 --lambda_temporal 1 --lambda_change 0.15
for name in paper temporal change full-rate all; do
  measure "$name" "$output/$name" --captions 60 --seeds 4
  measure "$name-decoder" "$output/$name" --vae "$output/decoder/vae" --captions 60 --seeds 4
done
