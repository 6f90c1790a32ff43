// Runs on the audio thread: the microphone cut into frames, and the agent's frames played from a small buffer.

const PEAK_MS = 20; // one bar of a waveform

class Peaks {
  constructor(port, rate) {
    this.port = port;
    this.every = Math.round((rate * PEAK_MS) / 1000);
    this.count = 0;
    this.peak = 0;
  }

  add(sample) {
    const level = Math.abs(sample);
    if (level > this.peak) this.peak = level;
    if (++this.count === this.every) {
      this.port.postMessage({ peak: this.peak });
      this.count = 0;
      this.peak = 0;
    }
  }
}

// Posts {frame: ArrayBuffer of PCM16} every 80 ms, so that a message is exactly the frame the model waits for.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.frame = new Int16Array(Math.round(sampleRate * 0.08));
    this.filled = 0;
    this.muted = false;
    this.peaks = new Peaks(this.port, sampleRate);
    this.port.onmessage = ({ data }) => (this.muted = data.muted);
  }

  process([input]) {
    const channel = input[0];
    const quantum = channel ? channel.length : 128; // a silent source has no channel; its time passes all the same
    for (let i = 0; i < quantum; i++) {
      const sample = channel && !this.muted ? Math.max(-1, Math.min(1, channel[i])) : 0;
      this.peaks.add(sample);
      this.frame[this.filled++] = Math.round(sample * 32767);
      if (this.filled === this.frame.length) {
        const whole = this.frame.slice();
        this.port.postMessage({ frame: whole.buffer }, [whole.buffer]);
        this.filled = 0;
      }
    }
    return true;
  }
}

// Takes Float32Arrays and starts when `startMs` of them are there. Running dry is a gap, and makes it wait for more
// from then on, up to `mostMs`: the network shakes that much. What has not been needed for two seconds is skipped.
class Speaker extends AudioWorkletProcessor {
  constructor({ processorOptions: { startMs, mostMs } }) {
    super();
    this.least = (sampleRate * startMs) / 1000;
    this.most = (sampleRate * mostMs) / 1000;
    this.start = this.least;
    this.window = sampleRate * 2;
    this.queue = [];
    this.offset = 0; // into the first of them
    this.buffered = 0;
    this.playing = false;
    this.lowest = Infinity;
    this.heard = 0;
    this.peaks = new Peaks(this.port, sampleRate);
    this.port.onmessage = ({ data }) => this.take(data.sound);
  }

  take(sound) {
    this.lowest = Math.min(this.lowest, this.buffered);
    this.queue.push(sound);
    this.buffered += sound.length;
    this.heard += sound.length;
    if (this.heard >= this.window) {
      if (this.lowest > this.least) this.catchUp();
      this.lowest = Infinity;
      this.heard = 0;
    }
    this.port.postMessage({ bufferedMs: (this.buffered / sampleRate) * 1000 });
  }

  catchUp() {
    for (let left = Math.round(this.lowest - this.least / 2); left > 0; left--) this.next();
    this.start = this.least;
  }

  process(_, [output]) {
    const out = output[0];
    if (!this.playing && this.buffered >= this.start) this.playing = true;
    for (let i = 0; i < out.length; i++) {
      if (this.playing && !this.buffered) {
        this.playing = false;
        this.start = Math.min(this.start + this.least / 3, this.most);
        this.port.postMessage({ gap: true });
      }
      out[i] = this.playing ? this.next() : 0;
      this.peaks.add(out[i]);
    }
    return true;
  }

  next() {
    const sample = this.queue[0][this.offset++];
    this.buffered--;
    if (this.offset === this.queue[0].length) {
      this.queue.shift();
      this.offset = 0;
    }
    return sample;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("speaker", Speaker);
