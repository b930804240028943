#!/usr/bin/env bash
#SBATCH --job-name=jlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Slurm, GPUs: one process a node, its eight GPUs in it.   OUTPUT=/shared/run sbatch slurm.sh
# In a Python environment on a shared disk:   pip install -e "jlora[cuda,data]"
# Slurm sends SIGTERM two minutes before the end; the run saves, ends with 143, and is queued again.
set -uo pipefail
: "${OUTPUT:?}"
folder="${SLURM_SUBMIT_DIR:-$(dirname "$0")}"
srun --kill-on-bad-exit=1 "$folder/run.sh"
code=$?
if [ "$code" -eq 143 ] || [ "$code" -eq 134 ]; then # 134: ended by JAX's runtime, as another node was lost
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
