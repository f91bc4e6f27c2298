#!/bin/sh
# Distils a base model with the paper's settings:
#   [GPUS=8] [BATCH=2] sh distil.sh modelscope|animatediff|wan|wan-ti2v|wan-a14b VIDEOS IMAGES OUTPUT [more flags of train_mcm_distill.py]
# wan-a14b has two experts, a run and an OUTPUT for each: EXPERT=high_noise, which is meant if nothing is said, and EXPERT=low_noise.
# The total batch is 128, for which the paper states its learning rates, whatever the number of GPUs: BATCH clips at a
# time on each (1 if nothing is said, which needs the least memory), the rest by accumulation. Run it again to go on.
# Of a Wan the paper says nothing, and its 30,000 steps would take months: 1,000 of 64 clips are what others distil it with.
# docs/performance.md has the hours and the memory. Nobody has tried these rates; begin with a pilot:
#   sh distil.sh wan VIDEOS IMAGES OUTPUT --height 256 --width 256 --num_frames 17
set -e
model=$1 videos=$2 images=$3 output=$4
shift 4
recipes=$(dirname "$0")
GPUS=${GPUS:-1} BATCH=${BATCH:-1}
total=128
case $model in
  wan*)
    total=64
    set -- --offload_text_encoder --max_train_steps 1000 --lr_warmup_steps 50 --checkpointing_steps 100 \
      --validation_steps 100 --no_scale_lr --learning_rate 5e-5 --discriminator_learning_rate 1e-4 "$@" ;;
esac
if [ $((total % (GPUS * BATCH))) -ne 0 ]; then
  echo "GPUS × BATCH must divide the total batch of $total; $GPUS × $BATCH does not" >&2
  exit 2
fi
if [ "$GPUS" -gt 1 ]; then machine=eight_gpus; else machine=one_gpu; fi

case $model in
  modelscope) teacher=ali-vilab/text-to-video-ms-1.7b ;;                 # 16 frames of 256×256
  animatediff) teacher=stable-diffusion-v1-5/stable-diffusion-v1-5 ;;    # 16 frames of 512×512
  wan) teacher=Wan-AI/Wan2.1-T2V-1.3B-Diffusers ;;                       # 81 frames of 832×480
  wan-ti2v) teacher=Wan-AI/Wan2.2-TI2V-5B-Diffusers ;;                   # 121 frames of 1280×704
  wan-a14b) teacher=Wan-AI/Wan2.2-T2V-A14B-Diffusers                     # 81 frames of 832×480
    set -- --expert "${EXPERT:-high_noise}" "$@"
    if [ "$EXPERT" = low_noise ]; then set -- --validation_prompts "$@"; fi ;;   # which has no clips of its own
  *) echo "the base model must be modelscope, animatediff, wan, wan-ti2v or wan-a14b, not $model" >&2; exit 2 ;;
esac

accelerate launch --config_file "$recipes/../accelerate/$machine.yaml" --num_processes "$GPUS" \
  "$recipes/../train_mcm_distill.py" \
  --pretrained_teacher_model "$teacher" --video_data "$videos" --image_data "$images" --output_dir "$output" \
  --train_batch_size "$BATCH" --gradient_accumulation_steps $((total / (GPUS * BATCH))) --gradient_checkpointing \
  --dataloader_num_workers 4 --max_train_steps 30000 --lr_warmup_steps 500 --lr_scheduler cosine \
  --learning_rate 5e-6 --discriminator_learning_rate 5e-5 --lora_rank 64 --lora_alpha 64 \
  --checkpointing_steps 500 --checkpoints_total_limit 3 --resume_from_checkpoint latest \
  --validation_steps 500 --validation_prompts "a corgi running on the beach" "$@"
