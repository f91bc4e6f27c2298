#!/bin/sh
# Makes the miniature Wan, step by step: sh examples/shapes/wan.sh WORK [vae, to stop after the autoencoder]
# What is done is not done again, and what was stopped goes on from its checkpoint. WORK holds world, data, models, logs,
# and the cache of what both LoRAs' trainings encode.
set -e
work=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}

script() { # NAME OUTPUT FLAGS: train what is not there yet
  [ -e "$2" ] && return
  name=$1 output=$2
  shift 2
  echo "$(date '+%F %T') $name -> $output"
  "$python" "$here/$name.py" --data "$work/data" --output "$output" --work "$work/logs" "$@"
}

[ -e "$work/world" ] ||
  "$python" -m diffusers_mcm shapes build "$work/world" --num_frames 17 --videos 8256 --images 8256
[ -e "$work/data/captions.json" ] || "$python" "$here/prepare.py" --built "$work/world" --data "$work/data"
script train_wan_vae "$work/models/wan_vae" --checkpoint_every 25 --picture_steps 300 --steps 2900
[ "$2" = vae ] && exit
"$python" "$here/encode.py" --data "$work/data" --vae "$work/models/wan_vae"
script train_wan_teacher "$work/models/wan" --vae "$work/models/wan_vae" --checkpoint_every 100
teacher=$work/packaged/mcm-shapes-wan-teacher
[ -e "$teacher/model_index.json" ] ||
  "$python" "$here/package.py" --models "$work/models" --work "$work/logs" --world "$work/world" --output "$work/packaged"
measure() { # what there is
  "$python" "$here/measure_wan.py" --teacher "$teacher" --output "$work/readings" --scores "$work/scores.json" \
    --mcm "$work/models/mcm-shapes-wan" --lcm "$work/models/lcm-shapes-wan"
}
measure
for method in mcm lcm; do
  lora=$work/models/$method-shapes-wan
  if [ ! -e "$lora/pytorch_lora_weights.safetensors" ]; then
    echo "$(date '+%F %T') $method -> $lora"
    export FIRST=800 SECOND=1200 TEACHER="$teacher" PATH="$(dirname "$(command -v "$python")"):$PATH"
    sh "$here/distil.sh" "$method" "$work/world" "$lora" --cache_latents "$work/cache" --windows_per_clip 1
    measure
  fi
done
# once more, with the LoRA
"$python" "$here/package.py" --models "$work/models" --work "$work/logs" --world "$work/world" --output "$work/packaged" \
  --scores "$work/scores.json"
