#!/bin/sh
# Puts the package triton (200 MB, a gigabyte unpacked) into .venv-triton, apart from .venv: beside a CPU build of torch
# it serves the kernels' tests alone, and a CUDA build brings its own. Does nothing if it is up to date.
set -eu
cd "$(dirname "$0")/../.."
folder=.venv-triton
wanted=$(sed -n 's/^cuda = \["\(triton==[^"]*\)"\]/\1/p' pyproject.toml)
if [ "$(cat "$folder/wanted" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
rm -rf "$folder"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$wanted"
echo "$wanted" > "$folder/wanted"
