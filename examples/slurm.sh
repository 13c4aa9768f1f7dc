#!/bin/bash
# Train on four machines with eight GPUs each. A job that is preempted or runs out of time gets SIGTERM,
# writes a checkpoint and returns to the queue. It then continues from the checkpoint.
#
#     sbatch examples/slurm.sh configs/deit_small_0.7.yaml --output runs/deit_small_0.7
#
# The output folder must be one that all machines share. The global batch, batch_size × 32 × accumulate,
# defines the run: with 32 GPUs, batch_size 32 gives the paper's 1024.
#SBATCH --job-name=dynamicvit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

stopped=
trap 'stopped=yes; kill -TERM "$training"' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
    --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m dynamicvit train --config "$1" --resume "${@:2}" &
training=$!
wait "$training"
status=$?
if [ "$stopped" ]; then
    wait "$training" # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
