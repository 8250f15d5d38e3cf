#!/usr/bin/env bash
# A real Ray cluster on this Linux machine: a head and N-1 more raylets, for trying out `ray job submit`.
# Every node has its own loopback address and requests need the cluster's token. Ray's internal ports still listen on
# every interface (only the dashboard and the job server do not), and its metrics ports answer without a token.
#
#   clusters/local.sh up [N]     start N nodes (default 2), wait until all have joined, print how to submit
#   clusters/local.sh up --autoscaling   start a head without CPUs, whose autoscaler starts and ends nodes as jobs need them
#   eval "$(clusters/local.sh env)"   what `ray job submit` needs, in this shell: address and token
#   clusters/local.sh status     one line per node; exit status 0 if all are up, 1 otherwise
#   clusters/local.sh down       end these nodes, and no other Ray on the machine
#
# With --autoscaling, to see what a cloud does:
#   clusters/local.sh refuse TYPE    from now on no machine of this type is to be had, until `offer TYPE`
#   clusters/local.sh reclaim NODE   give a node, by its name in `status`, the notice that a spot machine gets
#
# Settings, by environment variable:
#   CLUSTER_DIR          state, logs and token (default ${TMPDIR:-/tmp}/bit_ray_cluster_$UID; a short path: sockets live in it)
#   CLUSTER_PORT         first of the ports, 20 per node; the head's is this one, the dashboard's the next (default 26000)
#   CLUSTER_CPUS         CPUs per node: one number, or one per node as in 4,2,2 (default 2)
#   CLUSTER_STORE_BYTES  object store per node in bytes (default 200000000)
#   CLUSTER_TIMEOUT_S    how long to wait for the nodes in seconds (default 120)
#   CLUSTER_NODES        with --autoscaling: the types of nodes (default clusters/local-autoscaling/cluster.yaml)
#   CLUSTER_NOTICE_S     with --autoscaling: seconds from a node's notice to its end (default 30)
#   PYTHON               the Python that has Ray (default .venv/bin/python of this checkout if there, else python3)
#
# Workers inherit the environment of `up`: set AWS_* and the like before it.
set -euo pipefail

HOST=127.0.0.1 # of the dashboard and the job server
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DIR=${CLUSTER_DIR:-${TMPDIR:-/tmp}/bit_ray_cluster_$UID}
PORT=${CLUSTER_PORT:-26000}
STORE=${CLUSTER_STORE_BYTES:-200000000}
TIMEOUT=${CLUSTER_TIMEOUT_S:-120}
NODES=${CLUSTER_NODES:-$ROOT/clusters/local-autoscaling/cluster.yaml}
NOTICE=${CLUSTER_NOTICE_S:-30}
IFS=, read -r -a CPUS <<<"${CLUSTER_CPUS:-2}"

fail() {
  echo "error: $*" >&2
  exit 1
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

find_ray() {
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$ROOT/.venv/bin/python" ] && PYTHON=$ROOT/.venv/bin/python
  fi
  local python
  python=$(command -v "$PYTHON") || fail "PYTHON: given $PYTHON; accepted: a Python with Ray; run make first"
  RAY=$(dirname "$python")/ray
  [ -x "$RAY" ] || fail "PYTHON: given $python, which has no ray next to it; run make first, or set PYTHON"
}

# A process that has ended but was not waited for (a zombie) does not count.
is_alive() {
  local state
  state=$(ps -o stat= -p "$1" 2>/dev/null) && [ "${state:0:1}" != Z ]
}

# All that the recorded processes started and that still runs: their descendants, and the orphans in their sessions. The
# driver of a job has a session of its own.
started_by() {
  ps -e -o pid=,ppid=,sess=,stat= | awk -v roots="$*" '
    BEGIN { split(roots, list); for (i in list) mine[list[i]] = root[list[i]] = 1 }
    $4 !~ /^Z/ { parent[$1] = $2; if ($3 in root) mine[$1] = 1 }
    END {
      do { grown = 0; for (p in parent) if (!(p in mine) && parent[p] in mine) grown = mine[p] = 1 } while (grown)
      for (p in parent) if (p in mine) print p
    }'
}

# Of node number $1. Not 127.0.0.1, for which Ray would take the machine's outer address.
address() {
  echo "127.0.0.$(($1 + 2))"
}

start_node() {
  local index=$1 ports=$((PORT + 20 * $1)) cpus=${CPUS[$1]:-${CPUS[-1]}}
  local -a command=("$RAY" start --block --disable-usage-stats "--node-ip-address=$(address "$index")" "--num-cpus=$cpus" --num-gpus=0
    "--object-store-memory=$STORE" "--temp-dir=$DIR/node$index"
    # Own ports per node: those picked at random collide when several raylets start on one address.
    "--node-manager-port=$((ports + 2))" "--object-manager-port=$((ports + 3))"
    "--runtime-env-agent-port=$((ports + 4))" "--dashboard-agent-grpc-port=$((ports + 5))"
    "--dashboard-agent-listen-port=$((ports + 6))" "--metrics-export-port=$((ports + 7))"
    --min-worker-port=0 --max-worker-port=0)
  if [ "$index" = 0 ]; then
    [ -z "$AUTOSCALING" ] || command+=("--autoscaling-config=$DIR/cluster.yaml")
    export AUTOSCALER_METRIC_PORT=$((PORT + 9)) DASHBOARD_METRIC_PORT=$((PORT + 10))
    command+=(--head "--port=$PORT" "--dashboard-host=$HOST" "--dashboard-port=$((PORT + 1))"
      "--ray-client-server-port=$((ports + 8))")
  else
    command+=("--address=$(address 0):$PORT")
  fi
  setsid "${command[@]}" >"$DIR/node$index.log" 2>&1 </dev/null &
  echo $! >"$DIR/node$index.pid"
}

# What the head's autoscaler and its provider, local-autoscaling/local_nodes.py, are told.
autoscaling() {
  AUTOSCALING=1 CPUS=(0)
  cp "$NODES" "$DIR/cluster.yaml" 2>/dev/null || fail "CLUSTER_NODES: given $NODES; accepted: a readable file"
  export CLUSTER_DIR=$DIR CLUSTER_PORT=$PORT CLUSTER_STORE_BYTES=$STORE CLUSTER_NOTICE_S=$NOTICE CLUSTER_RAY=$RAY
  export PYTHONPATH=$ROOT/clusters/local-autoscaling${PYTHONPATH:+:$PYTHONPATH}
  export RAY_enable_autoscaler_v2=1 RAY_CLOUD_INSTANCE_ID=node0 RAY_NODE_TYPE_NAME=head
  export AUTOSCALER_UPDATE_INTERVAL_S=1
  # A type that was not to be had comes second for so long; by default ten minutes.
  export RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S=${RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S:-60}
}

# Waits until the head reports N nodes alive; asks the dashboard, which also proves that the token works.
wait_for_nodes() {
  local num_nodes=$1 deadline=$((SECONDS + TIMEOUT)) file alive=0
  while [ $SECONDS -lt $deadline ]; do
    for file in "$DIR"/node*.pid; do
      is_alive "$(cat "$file")" || {
        tail -n 20 "${file%.pid}.log" >&2
        return 1
      }
    done
    alive=$("$PYTHON" - "http://$HOST:$((PORT + 1))/nodes?view=summary" "$DIR/auth_token" 2>/dev/null <<'PY' || echo 0
import json, pathlib, sys, urllib.request
token = pathlib.Path(sys.argv[2]).read_text().strip()
request = urllib.request.Request(sys.argv[1], headers={"Authorization": f"Bearer {token}"})
nodes = json.load(urllib.request.urlopen(request, timeout=5))["data"]["summary"]
print(sum(node["raylet"].get("state") == "ALIVE" for node in nodes))
PY
    )
    [ "$alive" -ge "$num_nodes" ] && { [ -z "$AUTOSCALING" ] || [ -e "$DIR/autoscaler" ]; } && return 0
    sleep 0.5
  done
  echo "$alive of $num_nodes nodes are up after $TIMEOUT s; see $DIR/node*.log" >&2
  return 1
}

print_env() {
  echo "export RAY_API_SERVER_ADDRESS=http://$HOST:$((PORT + 1))"
  echo "export RAY_AUTH_MODE=token"
  printf 'export RAY_AUTH_TOKEN_PATH=%q\n' "$DIR/auth_token"
}

up() {
  local num_nodes=$1 index port
  AUTOSCALING=
  [ "$num_nodes" != --autoscaling ] || AUTOSCALING=1 num_nodes=1
  [[ $num_nodes =~ ^[1-9][0-9]?$ ]] || fail "N: given $num_nodes; accepted: 1 to 99 nodes, or --autoscaling"
  [ ${#DIR} -le 60 ] || fail "CLUSTER_DIR: given $DIR; accepted: at most 60 characters, as sockets live in it"
  compgen -G "$DIR/node*.pid" >/dev/null && fail "$DIR: a cluster is there; run $0 down first, or set CLUSTER_DIR"
  for port in "$PORT" $((PORT + 1)); do
    (exec 3<>"/dev/tcp/$HOST/$port") 2>/dev/null && fail "CLUSTER_PORT: given $PORT, and port $port is taken; set another"
  done
  find_ray
  mkdir -p "$DIR"
  chmod 700 "$DIR"
  rm -rf "${DIR:?}"/{node[0-9]*,refused*,cluster.yaml,autoscaler} # what an earlier cluster left
  (umask 077 && "$PYTHON" -c 'import secrets; print(secrets.token_hex(32))' >"$DIR/auth_token")
  echo "$PORT" >"$DIR/port"
  export PATH="$(dirname "$RAY"):$PATH" # so that `python` in a job is this one
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$DIR/auth_token"
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
  [ -z "$AUTOSCALING" ] || autoscaling
  start_node 0
  if ! wait_for_nodes 1; then
    down
    fail "the head did not start"
  fi
  for ((index = 1; index < num_nodes; index++)); do start_node "$index"; done
  if ! wait_for_nodes "$num_nodes"; then
    down
    fail "not all nodes started"
  fi
  if [ -n "$AUTOSCALING" ]; then
    echo "the head is up, and starts nodes when a job needs them; logs in $DIR. To submit a job:"
  else
    echo "$num_nodes nodes are up; logs in $DIR. To submit a job:"
  fi
  print_env
  echo "ray job submit --working-dir . -- python jobs/pretrain_jft.py --dry-run"
}

down() {
  local file nodes=() all left pid
  compgen -G "$DIR/node*.pid" >/dev/null || {
    echo "no cluster in $DIR"
    return 0
  }
  touch "$DIR/refused" # the autoscaler would start others
  for file in "$DIR"/node*.pid; do nodes+=("$(cat "$file")"); done
  mapfile -t all < <(started_by "${nodes[@]}")
  for pid in "${nodes[@]}"; do is_alive "$pid" && kill -TERM "$pid" 2>/dev/null || true; done
  local deadline=$((SECONDS + 8)) # Ray gives busy workers longer than anyone wants to wait
  while [ $SECONDS -lt $deadline ]; do
    mapfile -t left < <(ps -o pid=,stat= -p "$(IFS=, && echo "${all[*]}")" | awk '$2 !~ /^Z/ { print $1 }')
    [ ${#left[@]} -gt 0 ] || break
    sleep 0.2
  done
  mapfile -t left < <(started_by "${nodes[@]}" "${left[@]}")
  [ ${#left[@]} = 0 ] || kill -KILL "${left[@]}" 2>/dev/null || true
  rm -f "$DIR"/node*.pid
  rm -f "$DIR"/{auth_token,port,cluster.yaml,autoscaler,refused*}
  echo "down"
}

status() {
  local file pid all=0
  compgen -G "$DIR/node*.pid" >/dev/null || {
    echo "no cluster in $DIR"
    return 1
  }
  for file in "$DIR"/node*.pid; do
    pid=$(cat "$file" 2>/dev/null) || continue # the autoscaler has just ended it
    if is_alive "$pid"; then
      echo "$(basename "$file" .pid) up, process $pid"
    else
      echo "$(basename "$file" .pid) ended; see ${file%.pid}.log"
      all=1
    fi
  done
  return $all
}

# Whether machines of a type are to be had.
refuse() {
  [ -f "$DIR/cluster.yaml" ] && [ -f "$DIR/node0.pid" ] || fail "no autoscaling cluster in $DIR; run $0 up --autoscaling first"
  grep -q "^  $1:" "$DIR/cluster.yaml" || fail "TYPE: given $1; accepted: a type of nodes in $DIR/cluster.yaml"
  touch "$DIR/refused-$1"
  echo "no machine of type $1 is to be had, until $0 offer $1"
}

offer() {
  [ -f "$DIR/refused-$1" ] || fail "TYPE: given $1, which is not refused; accepted: a type after $0 refuse"
  rm "$DIR/refused-$1"
  echo "machines of type $1 are to be had again"
}

reclaim() {
  local pid
  [[ $1 == node*-* ]] && pid=$(cat "$DIR/$1.pid" 2>/dev/null) && is_alive "$pid" ||
    fail "NODE: given $1; accepted: a node that the autoscaler has started, as $0 status prints it"
  kill -TERM "$pid"
  echo "$1 has been given notice"
}

[ -f "$DIR/port" ] && [ "${1:-}" != up ] && PORT=$(cat "$DIR/port")
case ${1:-} in
  up) up "${2:-2}" ;;
  down) down ;;
  status) status ;;
  refuse | offer | reclaim) [ $# = 2 ] && "$1" "$2" || usage ;;
  env) [ -f "$DIR/auth_token" ] || fail "no cluster in $DIR; run $0 up first" && print_env ;;
  *) usage ;;
esac
