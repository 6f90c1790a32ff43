// Sound on the wire: PCM16 as it is, or Opus through the browser's WebCodecs. Both take 80 ms of PCM16 and give
// payloads, and take payloads and give Float32Arrays for the speaker.

import { OggWriter, packetsOf } from "./ogg.js";

export const OPUS_RATE = 48000; // browsers decode Opus to this
export const PCM_RATE = 24000;
const PACKETS = 4; // of 20 ms in a frame

function encoderConfig(rate) {
  return {
    codec: "opus",
    sampleRate: rate,
    numberOfChannels: 1,
    bitrate: 32000,
    opus: { application: "voip", frameDuration: 20000 },
  };
}

export async function opusWorks(rate) {
  if (!("AudioEncoder" in window && "AudioDecoder" in window)) return false;
  const decoder = { codec: "opus", sampleRate: OPUS_RATE, numberOfChannels: 1 };
  const [out, back] = await Promise.all([
    AudioEncoder.isConfigSupported(encoderConfig(rate)).catch(() => ({ supported: false })),
    AudioDecoder.isConfigSupported(decoder).catch(() => ({ supported: false })),
  ]);
  return Boolean(out.supported && back.supported);
}

export class PcmCodec {
  constructor({ onPayload, onSound }) {
    this.encode = (frame) => onPayload(new Uint8Array(frame));
    this.decode = (payload) => onSound(Float32Array.from(new Int16Array(payload.slice().buffer), (s) => s / 32768));
  }

  restart() {}

  close() {}
}

export class OpusCodec {
  constructor({ rate, onPayload, onSound, onError }) {
    this.rate = rate;
    this.microseconds = 0;
    this.restart();
    this.encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        this.packets.push(packet);
        if (this.packets.length < PACKETS) return;
        const page = this.writer.page(this.packets, 960 * PACKETS);
        onPayload(this.headers ? new Uint8Array([...this.headers, ...page]) : page);
        this.headers = null;
        this.packets = [];
      },
      error: onError,
    });
    this.encoder.configure(encoderConfig(rate));
    this.decoder = new AudioDecoder({
      output: (sound) => {
        const samples = new Float32Array(sound.numberOfFrames);
        sound.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
        sound.close();
        onSound(samples);
      },
      error: onError,
    });
    this.decoder.configure({ codec: "opus", sampleRate: OPUS_RATE, numberOfChannels: 1 });
  }

  // What is sent from here on is a stream of its own, for another reader.
  restart() {
    this.writer = new OggWriter();
    this.headers = this.writer.headers();
    this.packets = [];
  }

  encode(frame) {
    const data = new Int16Array(frame);
    this.encoder.encode(
      new AudioData({
        format: "s16",
        sampleRate: this.rate,
        numberOfFrames: data.length,
        numberOfChannels: 1,
        timestamp: this.microseconds,
        data,
      }),
    );
    this.microseconds += 80_000;
  }

  decode(payload) {
    for (const data of packetsOf(payload)) {
      this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: 0, data }));
    }
  }

  close() {
    for (const half of [this.encoder, this.decoder]) if (half.state !== "closed") half.close();
  }
}
