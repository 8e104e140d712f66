#!/usr/bin/env bash
# Captions in, a served quantized LLaVA out, on this machine:
#   bash jobs/quickstart.sh
#   bash jobs/quickstart.sh data.source=tests/data/real/captions.jsonl
# Arguments are overrides of jobs/configs/quickstart.yaml, or --config FILE. Run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/setup.sh

install_environment "linux-$(uname -m)"
export PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1
python -m llava_ray.cluster up cluster/local.yaml
eval "$(python -m llava_ray.cluster env cluster/local.yaml)"

config=(--config jobs/configs/quickstart.yaml)
[[ " $* " != *" --config "* ]] || config=()
job="pipeline-$(date +%Y%m%d-%H%M%S)-$$"
code=0
trap 'echo; echo "job $job goes on: \"ray job logs -f $job\" shows it, \"ray job stop $job\" ends it" >&2' INT
ray job submit --submission-id "$job" --runtime-env jobs/runtime_env.yaml --working-dir . \
    -- python jobs/pipeline.py "${config[@]}" "$@" || code=$?
if [ "$code" -ne 0 ]; then
    code=$(python -m llava_ray.cluster exit-code "$job") || code=1
    exit "$code"
fi
