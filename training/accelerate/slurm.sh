#!/bin/bash
# The paper's GPT-2 small on one node of eight GPUs, in bfloat16, 512 sequences a step:
#     sbatch training/accelerate/slurm.sh
# A job that was killed continues from its last checkpoint when it is submitted again.
#SBATCH --job-name=entropy-gpt
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
export OMP_NUM_THREADS=8
torchrun --standalone --nproc-per-node 8 "$(which entropy-gpt)" train codeparrot-128 \
    fp16=false bf16=true per_device_train_batch_size=64 gradient_accumulation_steps=1
