# Functions shared by the run.slurm files, which call them in this order under `set -euo pipefail`. baseline/run.slurm,
# whose job is not requeued, starts the training itself.

fail() {
    echo "error: $*" >&2
    exit 1
}

activate_environment() {
    environment=${PYTHON_ENV-${VIRTUAL_ENV:-${CONDA_PREFIX:-deepspeed-finetune}}}
    set +u # what this loads may read unset variables
    [[ -z $MODULES ]] || module load $MODULES # unquoted: may be several
    if [[ -f $environment/pyvenv.cfg ]]; then
        source "$environment/bin/activate"
    elif [[ -n $environment ]]; then
        conda=$(command -v "${CONDA_EXE:-conda}") || fail "PYTHON_ENV: no venv in $environment, and no conda found"
        eval "$("$conda" shell.bash hook)"
        conda activate "$environment" 2>/dev/null ||
            fail "PYTHON_ENV: $environment is neither a venv nor a conda environment"
    fi
    set -u
    local list_versions='from importlib.metadata import version
print(*(f"{package} {version(package)}" for package in ("torch", "deepspeed", "transformers")))'
    versions=$(python -c "$list_versions" 2>/dev/null) ||
        fail "PYTHON_ENV: ${environment:-the python on PATH} lacks packages: pip install -r requirements.txt there"
}

find_hosts() {
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    echo "job $SLURM_JOB_ID on ${hosts[*]} | ${environment:-python on PATH} | $versions"
    env | grep -E '^(NCCL|GLOO|MASTER)_' | sort
    [[ -n ${NCCL_SOCKET_IFNAME:-} ]] || echo "NCCL_SOCKET_IFNAME is not set: NCCL chooses the network interface"
    # Job steps that run at the same time share the job's resources only with --overlap.
    on_each_node=(srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    # Every rank may use all of the job's cores on its node: train.py divides them. A rank that fails ends the others;
    # srun then exits with the highest code of all, which is 143 for the ranks that it ended.
    as_ranks=(srun --overlap --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$SLURM_CPUS_PER_TASK"
        --cpu-bind=none --kill-on-bad-exit=1)
    mkdir -p logs
    hostfile=logs/hostfile_$SLURM_JOB_ID memory_log=
    trap clean_up EXIT
}
clean_up() {
    rm -f "$hostfile"
    [[ -z $memory_log ]] || { kill "$memory_log" && wait "$memory_log"; } 2>/dev/null || true
}

choose_launcher() {
    case ${LAUNCHER:-deepspeed} in
    deepspeed)
        # Without --include the launcher would take each node's first GPUs instead of those that Slurm gave this job.
        local show_gpus='echo "$SLURM_NODEID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"' gpus_of_nodes host gpus include=
        gpus_of_nodes=$("${on_each_node[@]}" bash -c "$show_gpus" | sort -n)
        while read -r _ host gpus; do
            echo "$host slots=$((${gpus##*,} + 1))"
            include+=@$host:$gpus
        done <<<"$gpus_of_nodes" >"$hostfile"
        # Depending on the cluster's ProctrackType, Slurm signals every process of a step or only the one that it
        # started on each node: a shell here, which passes the signal to all the others. The launcher has to ignore it,
        # because it would die and leave the ranks behind.
        local on_node='tell_ranks() { trap "" USR1 TERM; kill -USR1 0; trap tell_ranks USR1 TERM; }
        (trap "" USR1 TERM; exec deepspeed --no_ssh --node_rank="$SLURM_NODEID" "$@") &
        trap tell_ranks USR1 TERM
        while kill -0 $! 2>/dev/null; do wait $!; done; wait $!'
        launcher=("${on_each_node[@]}" --cpus-per-task=$((SLURM_CPUS_PER_TASK * SLURM_NTASKS_PER_NODE)) --cpu-bind=none
            --kill-on-bad-exit=1 bash -c "$on_node" deepspeed --hostfile="$hostfile" --include="${include#@}"
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
        ;;
    srun) launcher=("${as_ranks[@]}" bash -c 'trap "" USR1; exec python -u "$@"' python) ;;
    *) fail "LAUNCHER=$LAUNCHER is neither deepspeed nor srun" ;;
    esac
}

log_gpu_memory() { # [SRUN_OPTION...]; in the background, until the job ends
    if command -v nvidia-smi >/dev/null; then
        "${on_each_node[@]}" --cpus-per-task=1 --output=logs/gpu_memory_%j_%N.csv "$@" --error=/dev/null nvidia-smi \
            --query-gpu=timestamp,index,memory.used,memory.total,utilization.gpu --format=csv --loop=10 2>/dev/null &
        memory_log=$!
    fi
}

# A requeued job resumes from its own newest checkpoint. One from before the job's first start is another run's.
find_checkpoint() { # DEFAULT_OUTPUT_DIR TRAIN_ARGUMENT...
    output_dir=$1 started=logs/started_$SLURM_JOB_ID resume=()
    local argument before=
    for argument in "${@:2}"; do
        [[ ${before//-/_} != __output_dir ]] || output_dir=$argument
        [[ $argument != --output[_-]dir=* ]] || output_dir=${argument#*=}
        before=$argument
    done
    if ((${SLURM_RESTART_COUNT:-0} == 0)) || [[ ! -f $started ]]; then
        touch "$started"
    elif has_saved; then
        resume=(--resume_from_checkpoint latest)
    fi
}
has_saved() { [[ $output_dir/latest -nt $started ]]; }

# srun passes the signal on to every node. Ranks ignore it until their training loop has begun, so repeat it until they
# have ended.
tell_ranks() {
    echo "Slurm is ending this job: waiting for the run to save"
    while kill -USR1 "$step" 2>/dev/null; do sleep 2; done
}

# Runs the training and exits with its code. If Slurm ends the job, the run saves a checkpoint and the job is requeued.
train() { # TRAIN.PY TRAIN_ARGUMENT...
    find_checkpoint "runs/$(basename "$(dirname "$1")")" "${@:2}"
    local command=("${launcher[@]}" "$@" "${resume[@]}") code=0
    echo "+ ${command[*]}"
    "${command[@]}" & # bash runs a trap while it waits, but not while a command is in the foreground
    step=$!
    trap tell_ranks USR1 TERM
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends `wait` too
    wait "$step" || code=$?

    trap '' TERM # the requeue sends it
    if ((code == 0)) && tail -n 1 "$output_dir/metrics.jsonl" | grep -q '"event": "summary"'; then
        rm -f "$started"
    elif ((code == 0)) && has_saved && [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
        # Slurm would also requeue a job that the user has just cancelled, which is not RUNNING.
        scontrol requeue "$SLURM_JOB_ID" || echo "Slurm did not requeue this job"
    fi
    exit "$code"
}
