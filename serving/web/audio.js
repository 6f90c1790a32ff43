// The browser's side of the sound: a microphone that gives 80 ms frames, and a speaker that plays them.

export const FRAME_MS = 80;
const START_MS = 120; // wait for this much before playing: the network's jitter
const MOST_MS = 240; // and for this much where it jitters more

// Without echo cancellation a duplex model hears, and interrupts, itself.
const CONSTRAINTS = {
  audio: { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 },
};

export class SoundError extends Error {}

async function askForMicrophone() {
  if (!navigator.mediaDevices) {
    throw new SoundError("The browser offers the microphone only to pages on localhost or over https.");
  }
  try {
    return await navigator.mediaDevices.getUserMedia(CONSTRAINTS);
  } catch (error) {
    const words = {
      NotAllowedError: "The microphone was not allowed. Allow it in the browser’s address bar and try again.",
      NotFoundError: "No microphone was found.",
      NotReadableError: "The microphone is in use by another program.",
    };
    throw new SoundError(words[error.name] ?? `The microphone cannot be used (${error.name}).`);
  }
}

async function addWorklet(context) {
  try {
    await context.audioWorklet.addModule("worklet.js");
  } catch {
    throw new SoundError("The server cannot be reached.");
  }
}

// Opens everything that needs the reader's click. `onFrame(ArrayBuffer)`, `onYourPeak(0…1)`, `onAgentPeak(0…1)`,
// `onGap()`. `play` takes a Float32Array at `rate`; the result's `rate` is that of the microphone's frames.
export async function openAudio({ rate, onFrame, onYourPeak, onAgentPeak, onGap }) {
  const stream = await askForMicrophone();
  const contexts = [];
  try {
    const out = new AudioContext({ sampleRate: rate, latencyHint: "interactive" });
    contexts.push(out);
    await addWorklet(out);
    await out.resume();

    let input = out;
    let source;
    try {
      source = out.createMediaStreamSource(stream);
    } catch {
      // Some browsers do not resample a microphone: take it at its own rate, and the server resamples.
      input = new AudioContext({ latencyHint: "interactive" });
      contexts.push(input);
      await addWorklet(input);
      source = input.createMediaStreamSource(stream);
    }

    const microphone = new AudioWorkletNode(input, "microphone", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    microphone.port.onmessage = ({ data }) => ("frame" in data ? onFrame(data.frame) : onYourPeak(data.peak));
    source.connect(microphone);

    const volume = new GainNode(out);
    const speaker = new AudioWorkletNode(out, "speaker", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { startMs: START_MS, mostMs: MOST_MS },
    });
    let bufferedMs = 0;
    speaker.port.onmessage = ({ data }) => {
      if ("peak" in data) onAgentPeak(data.peak);
      else if ("gap" in data) onGap();
      else bufferedMs = data.bufferedMs;
    };
    speaker.connect(volume).connect(out.destination);

    return {
      rate: input.sampleRate,
      play: (sound) => speaker.port.postMessage({ sound }, [sound.buffer]),
      playbackMs: () => bufferedMs + ((out.baseLatency || 0) + (out.outputLatency || 0)) * 1000,
      setMuted: (muted) => microphone.port.postMessage({ muted }),
      setVolume: (value) => volume.gain.setTargetAtTime(value * value, out.currentTime, 0.02), // ears hear in powers
      close: () => closeAll(stream, contexts),
    };
  } catch (error) {
    await closeAll(stream, contexts);
    throw error;
  }
}

async function closeAll(stream, contexts) {
  for (const track of stream.getTracks()) track.stop();
  await Promise.all(contexts.map((context) => context.close()));
}
