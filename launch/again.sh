#!/usr/bin/env bash
# Restarts a command after a retryable exit (code 75, or a signal), so that a run resumes from its last checkpoint. SIGTERM, SIGINT,
# SIGHUP, SIGUSR1 or SIGUSR2 to this script stops the command, which saves a checkpoint, and no restart follows. A command that is killed
# three times in a row (code 137) is not restarted either: most likely it runs out of memory.
#
#   bash launch/again.sh COMMAND [ARGUMENT...]
#
#   RPT_RESTARTS   maximum number of restarts (default: 100)
#   RPT_PAUSE      seconds before each restart (default: 10)
#
# The exit code is that of the last command, or 1 after the maximum number of restarts.

# Makes the command with process id $1 save a checkpoint and end. A script that sources this file may define it otherwise.
stop_command() {
    kill -TERM "$1" 2>/dev/null
}

# Sets $stopping if a signal asked to stop: "early" if that was before the command had started, "told" otherwise.
again() {
    local restarts=${RPT_RESTARTS:-100} child='' kills=0 code number
    stopping=''
    trap 'stopping=${child:+told} stopping=${stopping:-early}; [ -z "$child" ] || stop_command "$child"' TERM INT HUP USR1 USR2
    for ((number = 1; ; number++)); do
        "$@" &  # In the background of a script, it ignores the SIGINT of a terminal.
        child=$!
        [ "$stopping" != early ] || stop_command "$child"
        # A trapped signal interrupts `wait` while the command is still running.
        while :; do
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || break
        done
        case $stopping$code in
            75 | 129 | 1[3-9][0-9]) ;;
            *) return "$code" ;;
        esac
        [ "$code" = 137 ] && ((++kills)) || kills=0
        if [ "$kills" = 3 ]; then
            echo "again: killed three times in a row (exit code 137), most likely for using too much memory; not restarted." >&2
            return "$code"
        fi
        if [ "$number" -gt "$restarts" ]; then
            echo "again: exit code $code after $restarts restarts; check the output, and raise RPT_RESTARTS to continue." >&2
            return 1
        fi
        echo "again: exit code $code; restart $number of $restarts in ${RPT_PAUSE:-10} s" >&2
        child=''
        sleep "${RPT_PAUSE:-10}" &
        wait $!
        [ -z "$stopping" ] || return "$code"
    done
}

[ "${BASH_SOURCE[0]}" != "$0" ] || again "$@"
