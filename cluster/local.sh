#!/usr/bin/env bash
# A Ray cluster of one node on this machine: try `ray job submit` here before renting machines.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster/local.sh start [OPTIONS OF `ray start`]   start it, e.g. with --num-cpus=2
       cluster/local.sh stop                             stop it

environment:
  RAY             the ray program                            (default: ray)
  SNR_DASHBOARD   where the dashboard and jobs are served    (default: 127.0.0.1:8265)
  SNR_RAY_PORT    first of the three ports Ray gets besides  (default: 6479)
  SNR_RAY_DIR     sessions, logs and the process number      (default: /tmp/snr-ray-UID)
  RAY_AUTH_MODE   token or disabled        (default: disabled on loopback, token elsewhere)
TEXT
}

ray=${RAY:-ray}
dashboard=${SNR_DASHBOARD:-127.0.0.1:8265}
host=${dashboard%:*} port=${dashboard##*:}
first_port=${SNR_RAY_PORT:-6479}
# Not $TMPDIR: the paths of Ray's sockets may have about 100 characters, which macOS' exceeds.
dir=${SNR_RAY_DIR:-/tmp/snr-ray-$(id -u)}
pid_file=$dir/head.pid log=$dir/head.log

case $host in
127.0.0.1 | localhost)
    # Loopback for all of Ray's ports and not only the dashboard's; Ray has no option for it, and
    # --node-ip-address=127.0.0.1 is replaced by the address that other machines see.
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    # No other machine reaches it, so a token is not asked for. Without this line one left in the
    # home folder would switch authentication on. Other users of this machine do reach it: set
    # RAY_AUTH_MODE=token (see README.md) where you do not trust them.
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}
    ;;
*)
    # Whoever reaches the dashboard runs code here: without a token Ray must refuse to start.
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    ;;
esac

# The process number of our head, or nothing. The number alone could by now be someone else's.
running() {
    local pid
    pid=$(cat "$pid_file" 2>/dev/null) || return 0
    if ps -o args= -p "$pid" 2>/dev/null | grep -qF -- "--temp-dir=$dir"; then
        echo "$pid"
    fi
}

start() {
    if [[ -n $(running) ]]; then
        echo "local.sh: the cluster in $dir runs already; cluster/local.sh stop ends it." >&2
        return 1
    fi
    if (: <>"/dev/tcp/$host/$port") 2>/dev/null; then
        echo "local.sh: $dashboard is taken; set SNR_DASHBOARD=127.0.0.1:PORT." >&2
        return 1
    fi
    mkdir -p "$dir"
    if [[ ! -O $dir ]]; then
        echo "local.sh: $dir belongs to someone else; set SNR_RAY_DIR." >&2
        return 1
    fi
    chmod 700 "$dir"
    # --block keeps one process above all others of this cluster: `stop` needs no other number.
    # On its end Ray waits 30 s for work to move to other nodes, and there are none.
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
    # The ports lie below 10002-19999, which Ray gives to its workers, and differ from the
    # defaults, which another Ray on this machine may hold.
    set -m # in a process group of its own, so that Ctrl-C in this terminal does not reach it
    nohup "$ray" start --head --block --temp-dir="$dir" --port="$first_port" \
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
            echo "local.sh: Ray did not start; the end of $log:" >&2
            tail -n 20 "$log" >&2
            stop >/dev/null
            return 1
        fi
        sleep 1
    done
    cat <<TEXT
Ray runs; dashboard http://$dashboard, logs in $dir. Submit a job and stop with

  ray job submit --address http://$dashboard --runtime-env cluster/runtime_env.yaml \\
      --working-dir . -- python jobs/train.py --images glyphs --out "\$PWD/runs/train"
  cluster/local.sh stop
TEXT
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
    echo "Stopped. Sessions and logs remain in $dir."
}

case ${1:-} in
start) shift && start "$@" ;;
stop) (($# == 1)) || { usage >&2; exit 2; }; stop ;;
-h | --help) usage ;;
*) usage >&2; exit 2 ;;
esac
