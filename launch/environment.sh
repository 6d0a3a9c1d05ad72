# Sourced: makes and activates .venv unless an environment is active, and installs a requirements file.
#   source launch/environment.sh requirements.txt

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  source .venv/bin/activate
fi
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.installed-$1"
if ! cmp --silent "$1" "$stamp"; then
  echo "installing $1"
  pip install --quiet --disable-pip-version-check -r "$1"
  cp "$1" "$stamp"
fi
