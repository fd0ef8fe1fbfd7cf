#!/usr/bin/env bash
# One training over several machines of a Slurm cluster. Submit from the repository's folder:
#
#   sbatch --nodes 4 accelerate_configs/slurm.sh examples/train_text_to_image.py --config my_config.yaml
#
# LAUNCH_CONFIG chooses another launch config, VENV another environment. Slurm asks the processes to stop two minutes
# before the time limit; the trainer then saves a checkpoint and ends, and the job, queued again, resumes from it.

#SBATCH --job-name=stable-cascade
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=outputs/slurm-%x-%j.log

set -euo pipefail
[ "$#" -gt 0 ] || { echo "usage: sbatch accelerate_configs/slurm.sh SCRIPT [ARGUMENTS]" >&2; exit 2; }

export LAUNCH_CONFIG="${LAUNCH_CONFIG:-accelerate_configs/fsdp2.yaml}"
export VENV="${VENV:-.venv}"
export GPUS="${SLURM_GPUS_ON_NODE:-8}"
# sed reads to the end of its input; head would not, and end scontrol, and with it this script, with an error.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MASTER_ADDR
# Two jobs on one machine must not meet on one port.
export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-8} / GPUS))}"

# One launcher per machine; it starts one process per GPU. SLURM_PROCID is the machine's rank, known only inside the task.
exec srun --kill-on-bad-exit=1 bash -c '
    exec "$VENV/bin/accelerate" launch \
        --config_file "$LAUNCH_CONFIG" \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * GPUS))" \
        --machine_rank "$SLURM_PROCID" \
        --main_process_ip "$MASTER_ADDR" \
        --main_process_port "$MASTER_PORT" \
        "$@"
' launch "$@"
