#!/bin/sh
# Distils a teacher: [PROCESSES=2] [TEACHER=FOLDER] sh distil.sh mcm|lcm WORLD OUTPUT [more flags of train_mcm_distill.py]
# The teacher is mcm-shapes-teacher where no other is named; FIRST and SECOND are the steps of the two stages, SCRIPT is
# what trains where a base model of the examples has to be known (distil_flow.py).
# MCM in two stages, the first in OUTPUT-appearance: a strong adversarial loss takes the appearance of the images, and some
# of the motion with it; a weaker one keeps the appearance while the motion comes back. An OUTPUT-looks of before goes on.
set -e
method=$1 world=$2 output=$3 first=${FIRST:-1250} second=${SECOND:-1750}
shift 3

distil() {
  torchrun --nproc_per_node "${PROCESSES:-1}" "${SCRIPT:-$(dirname "$0")/../train_mcm_distill.py}" \
    --pretrained_teacher_model "${TEACHER:-mcm-shapes-teacher}" --video_data "$world/videos" \
    --frame_interval 1 --train_batch_size $((8 / ${PROCESSES:-1})) --lr_warmup_steps 20 --lora_rank 32 --lora_alpha 32 \
    --no_scale_lr --learning_rate 2e-4 --guidance_min 1 --guidance_max 1 \
    --num_solver_steps 8 --timesteps visited --fuse_lora --ema_decay 0.995 \
    --checkpointing_steps 125 --checkpoints_total_limit 1 --resume_from_checkpoint latest --save_dtype fp16 \
    --validation_steps 3000 --validation_prompts "a red circle moving left on a black background" "$@"
}

adversarial() {
  distil --image_data "$world/images/clean" --lambda_real 0.9 --discriminator_augmentation \
    --discriminator_features mcm-shapes-features --discriminator_text mcm-shapes-clip \
    --discriminator_learning_rate 2e-4 --gradient_penalty_weight 1e-3 --gradient_penalty_growth 1 "$@"
}

case $method in
  mcm)
    appearance=$output-appearance
    if [ ! -e "$appearance" ] && [ -e "$output-looks" ]; then
      appearance=$output-looks
      echo "warning: going on with $appearance; rename it to $output-appearance" >&2
    fi
    [ -f "$appearance/pytorch_lora_weights.safetensors" ] ||
      adversarial --output_dir "$appearance" --lambda_adv 0.5 --max_train_steps "$first" --lr_scheduler constant_with_warmup "$@"
    adversarial --output_dir "$output" --lambda_adv 0.15 --max_train_steps "$second" --pretrained_lora "$appearance" "$@"
    ;;
  lcm) distil --output_dir "$output" --motion raw --lambda_real 1 --lambda_adv 0 --max_train_steps $((first + second)) "$@" ;;
  *) echo "the method must be mcm or lcm, not $method" >&2; exit 2 ;;
esac
