#!/bin/sh
# Builds .venv-livekit: LiveKit's PersonaPlex plugin with its own pins, apart from ours. Does nothing if it is up to date.
set -eu
cd "$(dirname "$0")/../.."
venv=.venv-livekit
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
if ! cmp -s tests/livekit/requirements.txt "$venv/requirements.txt"; then
    rm -rf "$venv"
    "${PYTHON:-$python}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement tests/livekit/requirements.txt
    cp tests/livekit/requirements.txt "$venv/requirements.txt"
fi
