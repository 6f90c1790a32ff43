"""Every setting of the server, with its unit. Each can come from the environment as PERSONAPLEX_<NAME>."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

FRAME_S = 0.08  # one frame of Mimi: 1,920 samples at 24 kHz


class ServeSettings(BaseSettings):
    """What `personaplex serve` can be told. A wrong value is refused at start with the name of its field."""

    model_config = SettingsConfigDict(env_prefix="PERSONAPLEX_", frozen=True, extra="forbid", env_ignore_empty=True)

    # What is served
    checkpoint: str = Field(
        "demo",
        description="folder, Hugging Face repo id, `demo` (the small model that ships, if one does) or `demo-random` "
        "(random weights, generated on first use)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes CUDA where torch sees one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="`auto`: bf16; on a CPU without numba fp32"
    )
    slots: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        "auto",
        description="conversations a replica holds at once; `auto`: what the GPU's memory holds, on a CPU 4",
    )
    attention_backend: Literal["auto", "ours", "vllm"] = Field(
        "auto", description="`auto`: what a self-test at start finds right and fastest; vLLM's where it is installed"
    )
    linear_backend: Literal["auto", "ours", "int8", "onednn", "vllm", "vllm-int8", "vllm-fp8"] = Field(
        "auto", description="matrix products; `auto` as above. Name one, so that all replicas compute the same bits"
    )
    kv_dtype: Literal["auto", "bfloat16", "fp8"] = Field(
        "auto", description="keys and values; `auto`: as computed; fp8, on CUDA, holds about twice the conversations"
    )
    kv_overcommit: float = Field(
        1.0,
        ge=1,
        le=4,
        description="1: each slot has the memory of a full context; 1.5: three slots share that of two, and calls move "
        "to another replica when it runs short",
    )
    kv_reserve_s: float = Field(
        30.0,
        ge=1,
        le=300,
        description="with kv_overcommit: seconds for which every call must have memory when another is let in",
    )
    threads_per_actor: int = Field(
        1,
        ge=1,
        le=64,
        description="torch threads of the engine actor, on CPU; without numba, more than 1 is not exact in company",
    )
    codec_threads: int = Field(1, ge=1, le=64, description="torch threads of each codec actor, on CPU")
    role_max_chars: int = Field(4000, ge=1, description="longest role (text prompt), in characters")

    # Where it listens
    host: str = Field("127.0.0.1", description="address to bind; anything but loopback needs `keys_file`")
    port: int = Field(8998, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    keys_file: Path | None = Field(None, description="API keys (TOML or JSON, hashed); none: open, loopback only")
    proxy: Literal["auto", "haproxy", "python"] = Field(
        "auto",
        description="what clients connect to; `auto`: HAProxy where Ray brings it (docs/decisions/http-proxy.md)",
    )
    ingresses: int = Field(1, ge=1, description="ingress processes; more than one, and every node has a proxy")
    trunk_host: str | None = Field(None, description="address the trunks bind; none: the node's own")
    max_message_bytes: int = Field(1 << 20, ge=4096, description="longest WebSocket message from a client, in bytes")
    max_receive_bytes_per_s: int = Field(
        1 << 20, ge=65_536, description="bytes/s one client may send for long; beyond it the server reads no faster"
    )
    stalled_client_s: float = Field(10.0, gt=0, description="seconds one write to a client may hang before it is cut")

    batch_window_s: float | None = Field(
        None, ge=0, lt=FRAME_S, description="seconds a first frame waits for company; none: 0.004 on CUDA, else 0.015"
    )

    # How it scales
    min_replicas: int = Field(1, ge=1, description="replicas kept even when nobody calls")
    max_replicas: int = Field(1, ge=1, description="most replicas autoscaling may start")
    accelerator: str = Field(
        "auto", description="what a replica asks Ray for: a type such as H100, or `none`; `auto`: H100 on CUDA alone"
    )
    spare_slots: int = Field(1, ge=0, description="free slots autoscaling keeps for the next caller")
    reserve_slots: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="free slots kept for conversations whose replica dies; `auto`: as many as the largest replica has, "
        "if max_replicas > 1",
    )
    shrink_after_s: float = Field(120.0, ge=0, description="quiet seconds before a replica is given back")
    drain_s: float = Field(
        3600.0, ge=0, description="seconds a stopping replica waits for its conversations to move, or to end"
    )
    ingress_drain_s: float = Field(
        300.0, ge=0, description="seconds an ingress that a deploy replaces keeps the calls that it carries"
    )
    surge_replicas: int = Field(
        0, ge=0, description="replicas a deploy may start before it stops old ones; needs as many free accelerators"
    )

    # How a conversation is treated
    # Not 0: the slot of a call that has just ended is free some milliseconds after its socket is.
    admission_wait_s: float = Field(1.0, ge=0, description="seconds a caller waits for a slot before 1013")
    max_waiting: int = Field(64, ge=0, description="callers that may wait for a slot at once")
    ready_timeout_s: float = Field(120.0, gt=0, description="seconds a prompt may take to be in the KV cache")
    idle_timeout_s: float = Field(120.0, gt=0, description="seconds without audio before a conversation is closed")
    ahead_frames: int = Field(5, ge=1, description="80 ms frames a client may be ahead of real time")
    stale_audio_s: float = Field(2.0, gt=0, description="seconds behind after which oldest audio is dropped")
    slow_client_s: float = Field(10.0, gt=0, description="seconds behind after which the conversation is closed")
    recovery_s: float = Field(30.0, gt=0, description="seconds a conversation may look for a new home after a death")
    resume_grace_s: float = Field(30.0, ge=0, description="seconds a lost client's slot waits for its resume token")
    opus_complexity: int = Field(5, ge=0, le=10, description="libopus complexity; costs 0.5-0.9 ms a frame and stream")

    # How the parts watch each other
    rebuilds_at_once: int = Field(4, ge=1, description="conversations a replica rebuilds from journals at a time")
    lease_s: float = Field(3.0, gt=0, description="seconds a lease lives without a report from its replica")
    report_interval_s: float = Field(0.5, gt=0, description="seconds between a replica's reports to the router")
    trunk_ping_s: float = Field(0.3, gt=0, description="seconds between heartbeats on a trunk")
    trunk_dead_s: float = Field(0.9, gt=0, description="seconds of silence after which a trunk's other end is dead")
    trunk_secret: str | None = Field(None, min_length=16, repr=False, description="shared by ingress and replicas")

    # What it tells
    otlp_endpoint: str | None = Field(None, description="OTLP/HTTP base URL for traces and metrics; none: off")
    otlp_interval_s: float = Field(10.0, gt=0, description="seconds between exports of metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("WARNING", description="level of the logs")

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})")
        if self.stale_audio_s >= self.slow_client_s:
            raise ValueError("stale_audio_s must be smaller than slow_client_s")
        if self.trunk_ping_s >= self.trunk_dead_s:
            raise ValueError("trunk_ping_s must be smaller than trunk_dead_s")
        if self.report_interval_s * 2 > self.lease_s:
            raise ValueError("lease_s must span at least two reports (report_interval_s), or leases flicker")
        if self.keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reachable from other machines and no keys_file is given: "
                "pass --keys-file FILE (PERSONAPLEX_KEYS_FILE), or bind 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
