#!/usr/bin/env bash
# Runs a command, and runs it again where it ends with 75 or by a signal (see README.md, exit codes): it goes on from its last
# checkpoint. Whoever stops this script by SIGTERM or SIGINT stops the command, which saves, and no other one follows.
#
#   bash launch/again.sh COMMAND [ARGUMENT...]
#
#   RPT_RESTARTS   at most so many restarts (default: 100)
#   RPT_PAUSE      seconds before each (default: 10)
#
# The exit code is the command's last one; 1 where it was restarted too often.

again() {
    local restarts=${RPT_RESTARTS:-100} child='' stopping='' code number
    trap 'stopping=stopping; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
    for ((number = 1; ; number++)); do
        "$@" &
        child=$!
        # The trap may have come before its number was known.
        [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
        # A trap ends the wait; the command has not ended yet.
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
            echo "again: ended with $code after $restarts restarts, see its output; raise RPT_RESTARTS to go on." >&2
            return 1
        fi
        echo "again: ended with $code; restart $number of $restarts in ${RPT_PAUSE:-10} s" >&2
        sleep "${RPT_PAUSE:-10}" &
        child=$!
        wait "$child"
        child=''
        [ -z "$stopping" ] || return "$code"
    done
}

[ "${BASH_SOURCE[0]}" != "$0" ] || again "$@"
