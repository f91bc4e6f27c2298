#!/bin/sh
# Distils the packaged teacher: [PROCESSES=2] sh distil.sh mcm|lcm WORLD OUTPUT [more flags of train_mcm_distill.py]
set -e
method=$1 world=$2 output=$3
shift 3
case $method in
  # its small feature network cannot see through the augmentation: with it the discriminator learns nothing
  mcm) set -- --image_data "$world/images/clean" --lambda_real 0.9 --lambda_adv 0.5 --discriminator_augmentation "$@" ;;
  lcm) set -- --motion raw --lambda_real 1 --lambda_adv 0 "$@" ;;
  *) echo "the method must be mcm or lcm, not $method" >&2; exit 2 ;;
esac
exec torchrun --nproc_per_node "${PROCESSES:-1}" "$(dirname "$0")/../train_mcm_distill.py" \
  --pretrained_teacher_model mcm-shapes-teacher --video_data "$world/videos" --output_dir "$output" \
  --discriminator_features mcm-shapes-features --discriminator_text mcm-shapes-clip \
  --frame_interval 1 --train_batch_size 4 --max_train_steps 3000 --lr_warmup_steps 20 --lora_rank 32 --lora_alpha 32 \
  --no_scale_lr --learning_rate 2e-4 --discriminator_learning_rate 2e-4 --gradient_penalty_weight 1e-3 \
  --guidance_min 1 --guidance_max 1 --num_solver_steps 8 --timesteps visited --fold_lora --ema_decay 0.995 \
  --checkpointing_steps 100 --checkpoints_total_limit 1 \
  --validation_steps 3000 --validation_prompts "a red circle moving left on a black background" --resume_from_checkpoint latest --save_dtype fp16 "$@"
