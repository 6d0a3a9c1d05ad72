# shellcheck shell=bash
# What launch/paper.sh and launch/study.sh share; to be sourced.
failed=()

# known FLAG VALUES ALLOWED: ends with one line if a value is not allowed.
known() {
  local name
  for name in ${2//,/ }; do
    [[ " $3 " == *" $name "* ]] || { echo "error: $1=$name: expected some of $3" >&2 && exit 2; }
  done
}

# step OUTPUT COMMAND…: runs the command unless its output is there; with $dry set it is printed alone.
step() {
  local output=$1 status=0
  shift
  [ ! -e "$output" ] || return 0
  printf '%q ' "$@" | sed 's/\\,/,/g; s/ $/\n/'
  [ -z "${dry:-}" ] || return 0
  "$@" || status=$?
  if [ $status = 75 ]; then # prom_jax.train was told to stop
    echo "stopped: run the same command to go on"
    exit 75
  fi
  [ $status = 0 ] || failed+=("$*")
  return $status
}

# Ends with the steps that failed, if there are any.
end_with_failures() {
  [ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2 && exit 1; }
}
