# shellcheck shell=bash
# What the batch scripts have in common. `crossrank launch slurm --dry-run` writes it into the script, for copying.
#
# Variables that a user may set before sbatch:
#   CROSSRANK_VENV       virtual environment; default: .venv, where there is one
#   CROSSRANK_CONTAINER  image that apptainer runs Python in
#   CROSSRANK_NPROC      ranks of a node under torchrun; default: one for each GPU that Slurm gave

fail() {
    echo "crossrank: error: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script, and this shell is no Slurm job; hand it to sbatch"

inside=() venv=${CROSSRANK_VENV:-.venv}
if [ -n "${CROSSRANK_CONTAINER:-}" ]; then
    inside=(apptainer exec --nv "$CROSSRANK_CONTAINER")
elif [ -n "${CROSSRANK_VENV:-}" ] || [ -e .venv ]; then
    # shellcheck source=/dev/null
    source "$venv/bin/activate" || fail "$venv is not a virtual environment on $(hostname)"
fi

# shellcheck disable=SC2034  # for the scripts
nproc=${CROSSRANK_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Since 22.05 srun does not take this over from sbatch by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# How long torchrun waits for its ranks' checkpoints; its own default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# The first node, and a port of this job's own; the next one where something listens on it.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT

# option NAME ARGUMENT...: the value that the last --NAME has; nothing where there is none.
option() {
    local name=$1 value=''
    shift
    while [ $# -gt 0 ]; do
        case ${1//-/_} in
        "__$name") value=${2-} ;;
        "__$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "${value/#\~/$HOME}"
}

# begin ARGUMENT...: says what runs where, and checks every node before any rank starts. Sets run_folder: --output_dir,
# else one of this job's own, so that a requeued job finds its run.
begin() {
    run_folder=$(option output_dir "$@")
    run_folder=${run_folder:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
    export CROSSRANK_EXIT_FILE=$run_folder/.exit-$SLURM_JOB_ID
    echo "START $(date -Is) job $SLURM_JOB_ID ($SLURM_JOB_NAME) on $SLURM_JOB_NODELIST," \
        "restart ${SLURM_RESTART_COUNT:-0}, meeting at $MASTER_ADDR:$MASTER_PORT"
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${inside[@]}" \
        python -m crossrank preflight "$run_folder" "$@" || exit 2
    rm -rf "$run_folder/.preflight-$SLURM_JOB_ID" "$run_folder"/*".exit-$SLURM_JOB_ID"*
}

# Of an array that is submitted again, a run may be finished; that it is this one has been seen in `begin`.
leave_finished() {
    if [ -e "$run_folder/results.json" ]; then
        echo "finished before: $run_folder"
        exit 0
    fi
}

# Slurm's warning goes to this shell, which hands it on to the ranks. No trap for TERM: what its user cancels stays so.
step='' warned=''
warn() {
    warned=$1
    echo "WARNED $(date -Is) by SIG$1" >&2
    if [ -n "$step" ]; then kill -s "$1" "$step"; fi
}
trap 'warn USR1' USR1
trap 'warn USR2' USR2

# run COMMAND...: the job step. Exits with the ranks' own code; after a warning that they obeyed (85) the job is queued
# again. The step is in the background because a shell hears signals only while it waits.
#
# COMMAND has srun's --kill-on-bad-exit, so that one rank's failure ends all, and --wait=0: srun must stay until Slurm
# itself has missed a dead node and queued the job again. An srun that gives up before makes the job a failed one.
run() {
    local code=85
    if [ -z "$warned" ]; then
        "$@" &
        step=$!
        while :; do
            wait "$step" && code=0 || code=$?
            kill -0 "$step" 2>/dev/null || break
        done
        # srun ends with the highest code of its tasks, also of one that it killed; the ranks have left theirs here.
        if [ "$code" != 0 ] && [ -s "$CROSSRANK_EXIT_FILE" ]; then code=$(cat "$CROSSRANK_EXIT_FILE"); fi
        rm -f "$run_folder"/*".exit-$SLURM_JOB_ID"*
    fi
    echo "END $(date -Is) job $SLURM_JOB_ID, exit code $code"
    if [ -n "$warned" ] && [ "$code" = 85 ]; then
        echo "REQUEUE job $SLURM_JOB_ID, to resume in $run_folder"
        # Slurm then ends this shell; a shell that exits first would end the job.
        scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi
    exit "$code"
}
