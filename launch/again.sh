#!/usr/bin/env bash
# Restarts a command after a retryable exit (code 75, or a signal), so that a run resumes from its last checkpoint. SIGTERM or
# SIGINT to this script stops the command, which saves a checkpoint, and is not followed by a restart.
#
#   bash launch/again.sh COMMAND [ARGUMENT...]
#
#   RPT_RESTARTS   maximum number of restarts (default: 100)
#   RPT_PAUSE      seconds before each restart (default: 10)
#
# The exit code is that of the last command, or 1 after the maximum number of restarts.

again() {
    local restarts=${RPT_RESTARTS:-100} child='' stopping='' code number
    trap 'stopping=stopping; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
    for ((number = 1; ; number++)); do
        "$@" &
        child=$!
        # The signal may have arrived before $child was set.
        [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
        # A trapped signal interrupts `wait` while the command is still running.
        while :; do
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || break
        done
        case $stopping$code in
            75 | 1[2-9][0-9]) ;;
            *) return "$code" ;;
        esac
        if [ "$number" -gt "$restarts" ]; then
            echo "again: exit code $code after $restarts restarts; check the output, and raise RPT_RESTARTS to continue." >&2
            return 1
        fi
        echo "again: exit code $code; restart $number of $restarts in ${RPT_PAUSE:-10} s" >&2
        sleep "${RPT_PAUSE:-10}" &
        child=$!
        wait "$child"
        child=''
        [ -z "$stopping" ] || return "$code"
    done
}

[ "${BASH_SOURCE[0]}" != "$0" ] || again "$@"
