#!/usr/bin/env bash
# Runs launch/slurm.sbatch under a SLURM of one node on this machine: two tasks, a stop and a requeue in between.
#   apt-get install -y slurm-wlm munge && bash tests/slurm/run.sh FOLDER [flags of prom_jax.train]
# As root, on Debian 12, in an environment that has requirements.txt, on a machine without a SLURM of its own.
# Everything is written into FOLDER, and the daemons end with the script. Without flags it trains the demo for 12 steps.
set -euo pipefail
folder=$(mkdir -p "${1:?a folder to work in}" && realpath "$1")
shift
cd "$(dirname "$0")/../.."
node=$(hostname -s)
if [ $# = 0 ]; then
  source launch/model.sh smollm2
  set -- --config=configs/demo.py --config.model="$SMOLLM2" --config.steps=12 --config.pivot.regulate=never
fi

# munge vouches for who sends what.
mkdir -p "$folder"/{state,spool,munge}
dd if=/dev/urandom bs=1024 count=1 of="$folder/munge/key" status=none
chmod 600 "$folder/munge/key" && chmod 700 "$folder/munge"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"

export SLURM_CONF=$folder/slurm.conf
cat > "$SLURM_CONF" << EOF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
JobRequeue=1
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=$node Default=YES State=UP
EOF
printf 'CgroupPlugin=autodetect\nIgnoreSystemd=yes\n' > "$folder/cgroup.conf"
trap 'cat "$folder"/{slurmd.pid,slurmctld.pid,munge/pid} 2> /dev/null | xargs --no-run-if-empty kill' EXIT
slurmctld
slurmd -N "$node" || { cat "$folder/slurmd.log" && exit 1; }
until sinfo --noheader --states=idle | grep -q .; do sleep 0.5; done
sinfo

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
job=$(sbatch --parsable --ntasks=2 --ntasks-per-node=2 --output="$folder/job.log" launch/slurm.sbatch \
  "--workdir=$folder/run" "$@")
echo "job $job"
state() { squeue --noheader --format=%T --jobs="$job" 2> /dev/null; }
rows() { grep -c '"loss"' "$folder/run/metrics.jsonl" 2> /dev/null || true; }

until [ "$(rows)" -ge 3 ] 2> /dev/null; do
  [ -n "$(state)" ] || { cat "$folder/job.log" && exit 1; }
  sleep 0.2
done
echo "SIGTERM to its tasks after $(rows) updates"
scancel --signal=TERM "$job"
until [ "$(state)" = PENDING ] || [ -z "$(state)" ]; do sleep 0.2; done
echo "$(state): $(scontrol show job "$job" | grep -o 'Restarts=[0-9]*')"
scontrol update job="$job" StartTime=now # it would wait for two minutes
while state | grep --quiet --invert-match COMPLETED; do sleep 1; done
scontrol show job "$job" | grep -E 'JobState|Restarts'
grep -v Gloo "$folder/job.log"
