"""The decoder stage as a Ray actor: nothing but a shell around actors.codec_stage.DecoderStage."""

from __future__ import annotations

import ray

from actors.stage_config import StageConfig, StageDescription
from actors.stage_shell import CodecShell
from graphs.stages import CodecStage


class DecoderShell(CodecShell):
    def __init__(self, config: StageConfig) -> None:
        def build() -> tuple[CodecStage, StageDescription]:
            from actors.stage_build import build_decoder

            return build_decoder(config)

        super().__init__(config, build)


DecoderActor = ray.remote(DecoderShell)
