#!/usr/bin/env bash
# The paper's whole matrix: prepares, trains and evaluates nine languages × its methods and the Thai ablation, and
# reports. The same command again goes on: what is there is not made again. A step that fails does not stop the rest.
#   bash launch/paper.sh [--languages=th,el] [--methods=base,prom] [--seeds=0,1,2] [--runs=runs/paper] [--dry_run]
#     [--tasks=own_{language}.yaml,arc_easy] # in place of the paper's; needed for languages that it has not
#     [--data_dir=DIR] [--limit=N] [--words=FILE] [--include_path=DIR]   # of prom_jax.evaluate
#     [--tokens=8e7] [--parameters=6.74e9] [--device_flops=989e12] [--mfu=0.4]  # what --dry_run reckons with
#     [flags of prom_jax.train]
# --languages takes every language that has a file in configs/. In --tasks and the flags of prom_jax.train,
# {language} stands for the code of the language.
# --dry_run prints the commands and the hours of one device that training takes: the FLOPs of its data card where one
# is prepared, else 6 · parameters · tokens, over device_flops · mfu. The defaults are assumptions: LLaMA-2-7B, an
# H100's bf16 peak at 40 %, and 52,002 Alpaca examples × 3 epochs × 512 tokens. Evaluations and probes come on top.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/matrix.sh
source launch/matrix.sh

languages=ar,bn,el,ml,mr,sw,ta,te,th methods=base,bactrian,xllama2,prom,unregulated,ablation seeds=0 runs=runs/paper
model=meta-llama/Llama-2-7b-hf dry="" hours=0 tokens=8e7 parameters=6.74e9 device_flops=989e12 mfu=0.4
evaluation=() training=() unknown="" own_tasks=""
for argument; do
  value=${argument#*=}
  case $argument in
    --languages=*) languages=$value ;;
    --methods=*) methods=$value ;;
    --seeds=*) seeds=$value ;;
    --runs=*) runs=$value ;;
    --dry-run | --dry_run) dry=yes ;;
    --tokens=*) tokens=$value ;;
    --parameters=*) parameters=$value ;;
    --device-flops=* | --device_flops=*) device_flops=$value ;;
    --mfu=*) mfu=$value ;;
    --tasks=*) own_tasks=$value ;;
    --data-dir=* | --data_dir=* | --limit=* | --words=* | --include-path=* | --include_path=*) evaluation+=("$argument") ;;
    --config=* | --workdir=* | --config.seed=* | --config.language=*) unknown=$argument ;;
    --config.*) training+=("$argument") ;;
    *) unknown=$argument ;;
  esac
  if [ -n "$unknown" ]; then
    echo "error: $unknown is not a flag of launch/paper.sh: its first lines list them" >&2
    exit 2
  fi
  case $argument in --config.model=*) model=$value ;; esac
done
declare -A tasks=(
  [ar]="xquad_ar,mlqa_ar" [bn]=mgsm_bn [el]=xquad_el [ml]=indicqa_ml [mr]=indicqa_mr
  [sw]=mgsm_sw [ta]=indicqa_ta [te]=mgsm_te [th]="xquad_th,mgsm_th"
)

configured=$(cd configs && echo [a-z]*.py)
known --languages "$languages" "${configured//.py/}"
for language in ${languages//,/ }; do
  [ -z "$own_tasks" ] || tasks[$language]=${own_tasks//\{language\}/$language}
  if [ -z "${tasks[$language]:-}" ]; then
    echo "error: --languages=$language: the paper has no tasks in it, give them with --tasks" >&2
    exit 2
  fi
done
known --methods "$methods" "base bactrian xllama2 prom unregulated ablation"

wants() { [[ ,$methods, == *,$1,* ]]; }

evaluate() { # MODEL TASKS OUT
  step "$3/results.json" python -m prom_jax.evaluate --model="$1" --tasks="$2" --out="$3" "${evaluation[@]}"
}

# adapt LANGUAGE CONFIG RUN [FLAGS]: one model, from its data to its scores.
adapt() {
  local language=$1 run=$runs/$3
  local flags=(--config="configs/$2" --workdir="$run" "${@:4}" "${training[@]//\{language\}/$language}")
  step "$run/data_card.json" python -m prom_jax.prepare "${flags[@]}" || return 0
  [ -e "$run/hf/config.json" ] || reckon "$run/data_card.json"
  step "$run/hf/config.json" python -m prom_jax.train "${flags[@]}" || return 0
  evaluate "$run/hf" "${tasks[$language]}" "$run/evaluation" || return 0
}

reckon() { # DATA_CARD: adds a training's device hours
  local flops
  flops=$(sed -n 's/.*"training_flops": *\([0-9.e+]*\).*/\1/p' "$1" 2>/dev/null || true)
  flops=${flops:-6 * $parameters * $tokens}
  hours=$(awk "BEGIN {print $hours + $flops / ($device_flops * $mfu) / 3600}")
}

# Whether regulation kept λ: PROM − regulation is PROM's own run then. A dry run asks the paper where nothing else can.
kept() { # LANGUAGE SEED
  local summary=$runs/$1-prom-seed$2/summary.json
  if [ -e "$summary" ]; then grep -q '"pivot.weight"' "$summary"; else [[ $dry && $1 =~ ^(bn|el|mr|sw|th)$ ]]; fi
}

# shellcheck disable=SC1091 # environment.sh is checked by itself
[ -n "$dry" ] || source launch/environment.sh requirements.txt
all=$(for language in ${languages//,/ }; do tr , '\n' <<< "${tasks[$language]}"; done | awk '!seen[$0]++' | paste -sd,)
! wants base || evaluate "$model" "$all" "$runs/base" || true
for seed in ${seeds//,/ }; do
  for language in ${languages//,/ }; do
    for method in prom bactrian xllama2 unregulated; do
      wants $method || continue
      [ $method != unregulated ] || ! kept "$language" "$seed" || continue
      variant=:$method
      adapt "$language" "$language.py${variant%:prom}" "$language-$method-seed$seed" --config.seed="$seed"
    done
  done
  if wants ablation && [[ ,$languages, == *,th,* ]]; then
    for variant in smoothing_{0,0.03,0.3} layer_{22,23,25,26} weight_{0.3,0.5,1}; do
      # λ is what is tried: no probe may change it.
      adapt th "th.py:$variant" "th-$variant-seed$seed" --config.seed="$seed" --config.pivot.regulate=never
    done
  fi
done
step "" python -m prom_jax.report --runs="$runs" --out="$runs/report" || true
if [ -n "$dry" ]; then
  printf '# training: about %.3g hours of one device at %s FLOP/s × %s\n' "$hours" "$device_flops" "$mfu"
fi
end_with_failures
