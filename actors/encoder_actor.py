"""The encoder stage as a Ray actor: nothing but a shell around actors.codec_stage.EncoderStage."""

from __future__ import annotations

import ray

from actors.stage_config import StageConfig, StageDescription
from actors.stage_shell import CodecShell
from graphs.stages import CodecStage


class EncoderShell(CodecShell):
    def __init__(self, config: StageConfig) -> None:
        def build() -> tuple[CodecStage, StageDescription]:
            from actors.stage_build import build_encoder

            return build_encoder(config)

        super().__init__(config, build)


EncoderActor = ray.remote(EncoderShell)
