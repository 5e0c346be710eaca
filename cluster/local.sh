#!/usr/bin/env bash
# A Ray cluster of one node on this machine: try `ray job submit` here before renting machines.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster/local.sh start [OPTIONS OF `ray start`]   start it, e.g. with --num-cpus=2
       eval "$(cluster/local.sh env)"                    let `ray job submit` of this shell find it
       cluster/local.sh stop                             stop it

environment:
  RAY             the ray program          (default: of the active environment, or of .venv here)
  SNR_DASHBOARD   where the dashboard and jobs are served    (default: 127.0.0.1:8265)
  SNR_RAY_PORT    first of the three ports Ray gets besides  (default: 6479)
  SNR_RAY_DIR     token, sessions, logs, process number      (default: /tmp/snr-ray-UID)
  RAY_AUTH_MODE   token, or disabled: then whoever is on this machine runs code as you
                                                             (default: token)
  RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH   a token of yours     (default: one is made in SNR_RAY_DIR)
TEXT
}

say() { echo "local.sh: $*" >&2; }

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dashboard=${SNR_DASHBOARD:-127.0.0.1:8265}
host=${dashboard%:*} port=${dashboard##*:}
first_port=${SNR_RAY_PORT:-6479}
# Not $TMPDIR: the paths of Ray's sockets may have about 100 characters, which macOS' exceeds.
dir=${SNR_RAY_DIR:-/tmp/snr-ray-$(id -u)}
# Ray opens its own folder to everyone, and jobs run what lies in it: it goes into a closed one.
ray_dir=$dir/ray
pid_file=$dir/head.pid log=$dir/head.log

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} ]]; then
    export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$dir/token}
fi
case $host in
127.0.0.1 | localhost)
    # Loopback for all of Ray's ports and not only the dashboard's; Ray has no option for it, and
    # --node-ip-address=127.0.0.1 is replaced by the address that other machines see.
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    ;;
esac
# A node that is cut off is given up after 25 seconds instead of 7 minutes.
export RAY_grpc_client_keepalive_time_ms=${RAY_grpc_client_keepalive_time_ms:-15000}
export RAY_grpc_client_keepalive_timeout_ms=${RAY_grpc_client_keepalive_timeout_ms:-10000}

# The ray program, whether or not its environment is active.
find_ray() {
    local found
    for found in "${RAY:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/ray}" "$(command -v ray || true)" \
        "$repository/.venv/bin/ray"; do
        if [[ -n $found ]] && command -v "$found" >/dev/null; then
            command -v "$found"
            return
        fi
    done
    say "Ray is needed, but no ray program is found; make an environment with \`make demo\`, or" \
        "activate yours, or set RAY=/path/to/bin/ray."
    return 1
}

# The process number of our head, or nothing. The number alone could by now be someone else's.
running() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 0
    if ps -o args= -p "$pid" 2>/dev/null | grep -qF -- "--temp-dir=$ray_dir"; then
        echo "$pid"
    fi
}

# The folder that only its owner enters; who could put a link or a folder there first, would.
close_folder() {
    # Ray adds up to 68 characters for its sockets, whose paths may have 107.
    if ((${#dir} > 39)); then
        say "SNR_RAY_DIR may have 39 characters, as paths of sockets must be short, but has" \
            "${#dir}; set a shorter one."
        return 1
    fi
    mkdir -m 700 "$dir" 2>/dev/null || true
    if [[ -L $dir || ! -d $dir || ! -O $dir ]]; then
        say "$dir must be a folder of yours, but is a link or belongs to someone else; set" \
            "SNR_RAY_DIR."
        return 1
    fi
    chmod 700 "$dir"
}

make_token() {
    [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} ]] || return 0
    if [[ $RAY_AUTH_TOKEN_PATH == "$dir/token" && ! -s $RAY_AUTH_TOKEN_PATH ]]; then
        (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    fi
    if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
        say "RAY_AUTH_TOKEN_PATH must be a file with a token, but $RAY_AUTH_TOKEN_PATH is missing" \
            "or empty; unset it, and one is made."
        return 1
    fi
}

# Start the head and wait until it takes jobs; leaves nothing behind where it does not.
begin() {
    local ray=$1
    shift
    # --block keeps one process above all others of this cluster: `stop` needs no other number.
    # Jobs inherit the PATH of the head, and say `python`: it is to be the one beside this ray.
    PATH=$(cd "$(dirname "$ray")" && pwd):$PATH
    export PATH
    # On its end Ray waits 30 s for work to move to other nodes, and there are none.
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
    # The ports lie below 10002-19999, which Ray gives to its workers, and differ from the
    # defaults, which another Ray on this machine may hold.
    set -m # in a process group of its own, so that Ctrl-C in this terminal does not reach it
    nohup "$ray" start --head --block --temp-dir="$ray_dir" --port="$first_port" \
        --ray-client-server-port="$((first_port + 1))" \
        --dashboard-agent-listen-port="$((first_port + 2))" \
        --dashboard-host="$host" --dashboard-port="$port" --disable-usage-stats \
        "$@" >"$log" 2>&1 </dev/null &
    local pid=$!
    set +m
    echo "$pid" >"$pid_file"
    local waited=0
    # The port opens before jobs are accepted, and asking Ray costs seconds: first the port.
    until (: <>"/dev/tcp/$host/$port") 2>/dev/null \
        && "$ray" job list --address "http://$dashboard" >/dev/null 2>&1; do
        if ! kill -0 "$pid" 2>/dev/null || ((waited++ >= 120)); then
            stop >/dev/null
            return 1
        fi
        sleep 1
    done
}

start() {
    local ray
    ray=$(find_ray) || return 1
    if [[ -n $(running) ]]; then
        say "the cluster in $dir runs already; cluster/local.sh stop ends it."
        return 1
    fi
    if (: <>"/dev/tcp/$host/$port") 2>/dev/null; then
        say "$dashboard is taken; set SNR_DASHBOARD=127.0.0.1:PORT."
        return 1
    fi
    close_folder || return 1
    make_token || return 1
    # On a busy machine Ray gives up its own start; a second one finds all it reads in memory.
    begin "$ray" "$@" || {
        grep -qE "Timed out waiting for node info|timed out during startup" "$log" \
            && begin "$ray" "$@"
    } || {
        say "Ray did not start; the end of $log:"
        tail -n 20 "$log" >&2
        return 1
    }
    cat <<TEXT
Ray runs; dashboard http://$dashboard, logs in $ray_dir. Submit a job and stop with

  eval "\$(cluster/local.sh env)"
  ray job submit --runtime-env cluster/runtime_env.yaml --working-dir . -- \\
      python jobs/denoise.py --model places64 --images /path/to/scans --out /path/to/cleaned
  cluster/local.sh stop
TEXT
}

# What a shell needs to submit jobs: the address, the token, and ray on its PATH.
environment() {
    local ray
    ray=$(find_ray) || return 1
    echo "export RAY_API_SERVER_ADDRESS=http://$dashboard RAY_AUTH_MODE=$RAY_AUTH_MODE"
    if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-} ]]; then
        printf 'export RAY_AUTH_TOKEN_PATH=%q\n' "$RAY_AUTH_TOKEN_PATH"
    fi
    if [[ $(command -v ray || true) != "$ray" ]]; then
        printf 'export PATH=%q:$PATH\n' "$(dirname "$ray")"
    fi
}

stop() {
    local pid
    pid=$(running)
    if [[ -z $pid ]]; then
        rm -f "$pid_file"
        echo "local.sh: no cluster of this script runs in $dir."
        return 0
    fi
    # Never `ray stop`: it ends every Ray process on the machine, whoever started it.
    kill -TERM "$pid"
    local waited=0
    while [[ -n $(running) ]] && ((waited++ < 30)); do sleep 1; done
    # What ignored the signal or outlived its parent is still in the process group; workers are
    # in groups of their own and end with the raylet.
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$pid_file"
    echo "Stopped. Sessions and logs remain in $ray_dir."
}

case ${1:-} in
start) shift && start "$@" ;;
env) (($# == 1)) || { usage >&2; exit 2; }; environment ;;
stop) (($# == 1)) || { usage >&2; exit 2; }; stop ;;
-h | --help) usage ;;
*) usage >&2; exit 2 ;;
esac
