# What up, down and node share: the places of a cluster, and its processes. Read by them, not run.
NODES=(node1 node2 node3 node4 node5 node6)
ACCOUNTING=yes

# Sets BASE, NAME and PORT from the environment and --no-accounting. A cluster keeps the name it was born with;
# the port keeps the names of two clusters that are up together apart.
choose_cluster() {
  local suffix="" offset=0
  if [ "$ACCOUNTING" = no ]; then suffix=-bare offset=100; fi
  BASE=${FINLLM_DEVCLUSTER:-/tmp/finllm-devcluster}$suffix
  PORT=$((${FINLLM_DEVCLUSTER_PORT:-16800} + offset))
  NAME=$(cat "$BASE/state/clustername" 2>/dev/null || echo "devcluster-$PORT")
  [[ $BASE =~ ^/[[:alnum:]._/-]{1,70}$ ]] || cannot "FINLLM_DEVCLUSTER is '$BASE': SLURM wants an absolute path without blanks, and sockets one of at most 70 characters"
  export SLURM_CONF=$BASE/slurm.conf
  MARK="# finllm-devcluster $BASE"
}

say() { echo "$(basename "$0"): $*" >&2; }
cannot() { say "$*"; exit 3; }  # there is no cluster to be had here
failed() { say "$*"; exit 1; }  # there should be one, and is not

# One command at a time per cluster, and one at a time with /etc/hosts and apt.
lock_cluster() { mkdir -p "$(dirname "$BASE")"; exec 8>"$BASE.lock"; flock 8; }
with_machine_lock() { ( flock 7; "$@" ) 7>/tmp/finllm-devcluster.machine.lock; }

# Process ids of this cluster's daemons of the named kind (munged, slurmd, ...): its folder is in their command
# or among their open files.
daemons() {
  local pid
  for pid in $(programs "$1"); do
    if grep -qsF -- "$BASE/" "/proc/$pid/cmdline" || opens "$pid" "$BASE/*"; then echo "$pid"; fi
  done
}
programs() { find /proc -mindepth 2 -maxdepth 2 -path "/proc/[0-9]*/exe" \( -lname "*/$1" -o -lname "*/$1-wlm" \) 2>/dev/null | cut -d/ -f3; }  # Debian adds -wlm
opens() { find "/proc/$1/fd" -lname "$2" 2>/dev/null | grep -q .; }

# Process id of one node's slurmd.
slurmd_of() {
  local pid
  for pid in $(daemons slurmd); do
    if grep -qszxF "$1" "/proc/$pid/cmdline"; then echo "$pid"; fi
  done
}

# Process ids of what jobs run on the named nodes: each slurmstepd (known by its open log), and all that
# carries a node's and this cluster's name in its environment.
job_processes() {
  local node pid
  for node in "$@"; do
    for pid in $(programs slurmstepd); do
      if opens "$pid" "$BASE/log/slurmd-$node.log"; then echo "$pid"; fi
    done
    for pid in $(grep -lszxF "SLURMD_NODENAME=$node" /proc/[0-9]*/environ | cut -d/ -f3); do
      if grep -qszxF "SLURM_CLUSTER_NAME=$NAME" "/proc/$pid/environ"; then echo "$pid"; fi
    done
  done
}

# Ends what the given function lists, until it lists nothing.
kill_all() {
  local pids
  for _ in $(seq 50); do
    pids=$("$@")
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086
    kill -KILL $pids 2>/dev/null
    sleep 0.1
  done
  failed "these processes do not die: $pids"
}

# A slurmd reads nothing of the caller's environment.
start_slurmd() { env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" slurmd -f "$SLURM_CONF" -N "$1" </dev/null >>"$BASE/log/start.log" 2>&1 7>&- 8>&-; }
