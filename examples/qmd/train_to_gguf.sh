#!/usr/bin/env bash
# From nothing to a GGUF that QMD loads, without a download: a tiny model, of no use but to see that all runs.
#     bash examples/qmd/train_to_gguf.sh [FOLDER]
# Leave --base tiny and the names out for Qwen3-1.7B on a Mac.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/qmd-example}
python mlx_impl/train.py sft --base tiny --output "$out/sft"
python mlx_impl/train.py grpo --base tiny --model.sft "$out/sft" --output "$out/grpo"
python mlx_impl/eval.py "$out/grpo" "$out/sft" --max-tokens 120 --output "$out/eval"
python mlx_impl/convert.py "$out/grpo" --output "$out/model" --types F16 Q8_0
