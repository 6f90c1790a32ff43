#!/bin/sh
# Builds .venv-vllm: vLLM's CPU build (3.5 GB) with its own pins, apart from ours. Does nothing if it is up to date.
# TORCH_INDEX=URL says where the CPU build of torch is.
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-vllm
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
if cmp -s tests/vllm/requirements.txt "$venv/requirements.txt"; then exit 0; fi
rm -rf "$venv"
"${PYTHON:-$python}" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check"
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
# Torch first, or pip may choose a CUDA build of several gigabytes.
$pip install --quiet --extra-index-url "$index" "$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
$pip install --quiet --extra-index-url "$index" --requirement tests/vllm/requirements.txt
# It brings them, and they break every import beside a CPU build of torch.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec
cp tests/vllm/requirements.txt "$venv/requirements.txt"
