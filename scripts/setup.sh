#!/usr/bin/env bash
# Makes .venv with everything pinned in pyproject.toml. Called by the Makefile, which remembers that it was done.
#   scripts/setup.sh VENV STAMP
# PYTHON=… picks the interpreter; TORCH_INDEX=URL adds an index for torch alone (see README, "Two commands").
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 stamp=$2

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf '\n%s\n' "$*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  if command -v "$candidate" >/dev/null && new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  found=$(python3 --version 2>/dev/null || echo "no python3 at all")
  fail "This project needs Python 3.11 or newer, and found ${found}.
Install one (Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv) or name it: make demo PYTHON=/path/to/python3.12"
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module. On Debian and Ubuntu: apt-get install python${version}-venv (or python3-venv)."

if [ -x "$venv/bin/python" ] && ! new_enough "$venv/bin/python"; then
  fail "$venv was made with an older Python. Remove it (rm -r $venv) and run this again."
fi
if [ ! -x "$venv/bin/python" ]; then
  say "Making $venv with Python $version (once; some minutes, about 2 GB)"
  "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check)
torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
[ -n "$torch" ] || fail "pyproject.toml names no torch==VERSION."

# Torch first and by exactly its pin: resolved together with the rest, pip may choose a CUDA build of several GB.
say "Installing $torch"
"${pip[@]}" install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch"
say "Installing the project and its tools"
"${pip[@]}" install --quiet --constraint constraints.txt --editable '.[dev]'

"$venv/bin/python" -c 'import torch, ray, fastapi' ||
  fail "The installation is incomplete; remove $venv and run this again."
say "Compiling the kernels for this CPU (a minute)"
"$venv/bin/python" -m actors.compile_ahead ||
  say "That failed: they are compiled when a server first starts."
touch "$stamp"
