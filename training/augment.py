"""What happens to a microphone signal: room, noise, gain. Numpy alone, seeded by the caller's generator."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RATE = 24_000
Audio = npt.NDArray[np.float32]


def rms(x: Audio) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)) + 1e-12))


def decibels(value: float) -> float:
    """A level in dB as a factor."""
    return float(10.0 ** (value / 20.0))


def coloured_noise(samples: int, slope: float, rng: np.random.Generator) -> Audio:
    """Noise of unit RMS whose power falls with frequency as f^-slope: 0 white, 1 pink, 2 brown. [samples]."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1.0 / RATE)
    spectrum *= np.maximum(frequency, 40.0) ** (-slope / 2.0)
    noise = np.fft.irfft(spectrum, samples)
    return (noise / (np.std(noise) + 1e-9)).astype(np.float32)


def hum(samples: int, rng: np.random.Generator) -> Audio:
    """Mains hum with a few harmonics, unit RMS. [samples]."""
    base = 50.0 if rng.random() < 0.5 else 60.0
    time = np.arange(samples) / RATE
    wave = sum(
        float(rng.uniform(0.1, 1.0)) * np.sin(2 * np.pi * base * k * time + float(rng.uniform(0, 6.28)))
        for k in (1, 2, 3, 5)
    )
    wave = np.asarray(wave)
    unit: Audio = (wave / (np.std(wave) + 1e-9)).astype(np.float32)
    return unit


def room_response(rng: np.random.Generator) -> Audio:
    """An impulse response: the direct sound, a few early reflections and a decaying tail of 0.1 to 0.5 s."""
    decay_s = float(rng.uniform(0.1, 0.5))
    length = int(decay_s * RATE)
    # -60 dB at the end: RT60 by definition.
    tail = rng.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length)
    tail[: int(0.004 * RATE)] = 0.0
    response = tail / (np.sqrt(np.sum(tail**2)) + 1e-9) * float(rng.uniform(0.15, 0.6))
    for _ in range(4):
        response[int(rng.uniform(0.002, 0.03) * RATE)] += float(rng.uniform(-0.4, 0.4))
    response[0] = 1.0
    room: Audio = response.astype(np.float32)
    return room


def convolve(x: Audio, response: Audio) -> Audio:
    """x through a room, as long as x and not shifted. [samples]."""
    size = 1 << (len(x) + len(response) - 2).bit_length()
    y = np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(response, size), size)[: len(x)]
    return y.astype(np.float32)


def microphone(x: Audio, rng: np.random.Generator) -> Audio:
    """A user's clean speech as some microphone might deliver it: room, then noise, then gain. [samples]."""
    y = x
    if rng.random() < 0.4:
        y = convolve(y, room_response(rng))
    level = rms(x[np.abs(x) > 1e-3]) if np.any(np.abs(x) > 1e-3) else 0.05
    if rng.random() < 0.6:
        noise = coloured_noise(len(y), float(rng.choice([0.0, 1.0, 1.0, 2.0])), rng)
        y = y + noise * np.float32(level * decibels(-float(rng.uniform(15, 45))))
    if rng.random() < 0.1:
        y = y + hum(len(y), rng) * np.float32(level * decibels(-float(rng.uniform(25, 45))))
    y = y * np.float32(decibels(float(rng.uniform(-14, 4))))
    return limited(y)


def limited(x: Audio) -> Audio:
    """x, turned down as a whole if it would clip."""
    peak = float(np.max(np.abs(x))) if len(x) else 0.0
    return x if peak <= 0.98 else (x * np.float32(0.98 / peak)).astype(np.float32)
