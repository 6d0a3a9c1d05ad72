#!/usr/bin/env bash
# The study of docs/study.md, unit by unit: a unit trains and measures one model, which then is deleted; its small
# results stay in --results. The same command goes on: what is there is not made again.
#   bash launch/study.sh --data=DIR [--units=el-prom-0,base-el] [--list] [--minutes=M]
#     [--runs=DIR]        # where models are while they are needed (default ~/.cache/prom_jax_runs/study)
#     [--results=DIR]     # default docs/study
#     [--model=MODEL]     # default: Gemma-3-270M, from launch/model.sh
#     [--bos=no]          # for a model that was not trained with a token at the beginning of a text
#     [--config.KEY=VALUE …]   # of prom_jax.train, such as --config.optimizer.learning_rate=5e-5
# DIR is what launch/study_data.py makes. --list prints the units that are still to do. No unit begins after M minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/matrix.sh
source launch/matrix.sh

data="" units="" list="" minutes=100000 runs=$HOME/.cache/prom_jax_runs/study results=docs/study model="" bos=yes training=() unknown=""
for argument; do
  value=${argument#*=}
  case $argument in
    --data=*) data=$value ;;
    --units=*) units=${value//,/ } ;;
    --list) list=yes ;;
    --minutes=*) minutes=$value ;;
    --runs=*) runs=$value ;;
    --results=*) results=$value ;;
    --model=*) model=$value ;;
    --bos=yes | --bos=no) bos=$value ;;
    --config=* | --workdir=* | --config.seed=* | --config.language=*) unknown=$argument ;;
    --config.*) training+=("$argument") ;;
    *) unknown=$argument ;;
  esac
  if [ -n "$unknown" ]; then
    echo "error: $unknown is not a flag of launch/study.sh: its first lines list them" >&2
    exit 2
  fi
done
[ -d "$data/test" ] || { echo "error: --data=$data: expected a folder that launch/study_data.py made" >&2 && exit 2; }

# LANGUAGE-METHOD-SEED in the order in which they are to be done: each seed of the main question before the next one.
all() {
  local language method seed
  printf 'base-%s\n' el ar th
  for seed in 0 1 2; do
    for language in el ar th; do
      for method in prom bactrian xllama2; do echo "$language-$method-$seed"; done
    done
    for method in frozen_head shared_head shuffled english_last deep_supervision pcgrad; do echo "el-$method-$seed"; done
  done
}
[ -n "$units" ] || units=$(all)
for unit in $units; do
  grep -qx -- "$unit" <(all) || { echo "error: --units=$unit: expected some of" "$(all | paste -sd" ")" >&2 && exit 2; }
done
if [ -n "$list" ]; then
  for unit in $units; do [ -e "$results/$unit/unit.json" ] || echo "$unit"; done
  exit
fi
# shellcheck disable=SC1091 # environment.sh is checked by itself
source launch/environment.sh requirements.txt
[ -n "$model" ] || model=$(bash launch/model.sh gemma)

measure() { # MODEL LANGUAGE RUN: answers in both languages, translations, and the probe
  local flags=(--model="$1" --data_dir="$data/test")
  [ "$bos" = no ] || flags+=(--bos)
  step "$3/questions/results.json" python -m prom_jax.evaluate "${flags[@]}" --tasks="xquad_$2,xquad_en" --limit=300 \
    --out="$3/questions" &&
    step "$3/translations/results.json" python -m prom_jax.evaluate "${flags[@]}" --tasks="flores_$2" --limit=200 \
      --out="$3/translations" &&
    step "$3/probe/grid.png" python -m prom_jax.probe --model="$1" --languages="$2" --task=translation --out="$3/probe"
}

# Cosines between the gradients of a method's texts before, amid and after training.
interference() { # RUN METHOD [FLAGS of its training]
  local run=$1 method=$2 when
  declare -A models
  models=([start]="$model" [middle]="$run/checkpoints/24" [end]="$run/hf")
  for when in start middle end; do
    step "$run/interference-$when/interference.json" python -m prom_jax.interference "${@:3}" --methods="$method" \
      --model="${models[$when]}" --batches=4 --out="$run/interference-$when" || return
  done
}

adapt() { # LANGUAGE METHOD SEED: one model, from its data to its scores
  local language=$1 method=$2 seed=$3 run=$runs/$unit gradients=yes flags=()
  flags=(
    --config="configs/study.py:${method%prom}" --workdir="$run" --config.model="$model" --config.language="$language"
    --config.seed="$seed" --config.data.english="$data/en.jsonl" --config.data.target="$data/{language}.jsonl"
    --config.data.translation="$data/ntrex.{language}.tsv" --config.eval.text="$data/flores.{language}.tsv"
    "${training[@]}"
  )
  # λ of the controls is the method's own, which the units of PROM have asked the probe for.
  [ "$method" = prom ] || flags+=(--config.pivot.regulate=never)
  [[ $seed = 0 && $method =~ ^(prom|xllama2)$ ]] || gradients=no
  [ $gradients = no ] || flags+=(--config.checkpoint.every=24)
  step "$run/hf/config.json" python -m prom_jax.train "${flags[@]}" || return
  [ $gradients = no ] || interference "$run" "$method" "${flags[@]}" || return
  measure "$run/hf" "$language" "$run"
}

begun=$SECONDS
for unit in $units; do
  [ ! -e "$results/$unit/unit.json" ] || continue
  [ $((SECONDS - begun)) -lt $((minutes * 60)) ] || { echo "the $minutes minutes are over" && break; }
  started=$SECONDS
  if [[ $unit == base-* ]]; then
    measure "$model" "${unit#base-}" "$runs/$unit" || continue
  else
    IFS=- read -r language method seed <<< "$unit"
    adapt "$language" "$method" "$seed" || continue
  fi
  python launch/study_results.py "$runs/$unit" "$results/$unit" --seconds=$((SECONDS - started))
  rm -rf "${runs:?}/$unit"
done
end_with_failures
