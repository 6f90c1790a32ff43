// One conversation over /api/chat: binary messages, the first byte is the kind. It outlives its socket: the server gives
// a token, and when the connection breaks, or the server that held it leaves, a new one goes on where the old one was.

const KIND = { handshake: 0, audio: 1, text: 2, control: 3, metadata: 4, error: 5, ping: 6 };
const utf8 = new TextDecoder();

// What a close code means to a person, where the server sent no sentence of its own.
const CLOSED = {
  1000: "The conversation has ended.",
  1001: "The server went away.",
  1003: "The server did not understand this page.",
  1005: "The conversation has ended.",
  1006: "The connection broke.",
  1007: "The server could not read the audio.",
  1008: "The server refused the conversation.",
  1009: "A message was too big for the server.",
  1011: "The server failed.",
  1012: "The server is being restarted. Try again in a moment.",
  1013: "All slots are taken. Try again in a moment.",
};

const COME_BACK_CODES = [1006, 1012]; // the connection broke; the server is being restarted
const COME_BACK_MS = 28000; // the server keeps a lost caller's place for 30 s
const AGAIN_MS = 250; // between two tries; twice as much after each, up to 2 s
const KEPT_PARAMETERS = ["audio", "audio_rate", "silence_gate", "api_key"]; // of the query; the rest the server knows

// `parameters`: what goes into the query; empty values are left out.
export function chatUrl(base, parameters) {
  const url = new URL("api/chat", base);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== "" && value != null) url.searchParams.set(name, value);
  }
  return url;
}

export class Call {
  // `on`: connected(), ready(), lost(), back(), metadata(object), audio(Uint8Array), text(string), lag(ms),
  // ended({ok, message}) exactly once.
  constructor(url, on) {
    this.on = on;
    this.url = url;
    this.live = false;
    this.error = null;
    this.hungUp = false;
    this.token = null;
    this.frames = 0; // of the agent that have come: with a token, one message of audio each
    this.lostMs = null; // since when there is no connection
    this.tries = 0;
    url.searchParams.set("resume", "1");
    this.dial(url);
  }

  dial(url) {
    this.sentAt = []; // times of frames whose answers have not come: answer k is for frame k
    const socket = (this.socket = new WebSocket(url));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.lostMs ?? this.on.connected();
    socket.onmessage = ({ data }) => this.take(new Uint8Array(data));
    socket.onclose = ({ code, reason }) => this.closed(code, reason);
  }

  take(message) {
    const payload = message.subarray(1);
    switch (message[0]) {
      case KIND.handshake:
        this.live = true;
        if (this.lostMs === null) this.on.ready();
        else this.on.back();
        this.lostMs = null;
        this.tries = 0;
        break;
      case KIND.audio:
        this.frames++;
        if (this.sentAt.length) this.on.lag(performance.now() - this.sentAt.shift());
        if (payload.length) this.on.audio(payload); // empty: a frame without anything to hear
        break;
      case KIND.text:
        this.on.text(utf8.decode(payload));
        break;
      case KIND.metadata:
        this.described(JSON.parse(utf8.decode(payload)));
        break;
      case KIND.error:
        this.error = utf8.decode(payload);
        break;
    }
  }

  described(content) {
    this.token = content.resume_token ?? this.token;
    this.frames = content.first_frame ?? this.frames;
    this.on.metadata(content);
  }

  // The payload of one 80 ms frame.
  speak(payload) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(payload.length + 1);
    message[0] = KIND.audio;
    message.set(payload, 1);
    this.socket.send(message);
    this.sentAt.push(performance.now());
  }

  fail(message) {
    this.failed = true;
    this.error = message;
    this.leave();
  }

  hangUp() {
    this.hungUp = true;
    this.leave();
  }

  leave() {
    clearTimeout(this.waiting);
    if (this.socket.readyState === WebSocket.CLOSED) this.end(1000, "");
    else this.socket.close(1000);
  }

  closed(code, reason) {
    this.live = false;
    const now = performance.now();
    const mayComeBack = COME_BACK_CODES.includes(code) || (this.lostMs !== null && code === 1013);
    if (this.hungUp || this.failed || !this.token || !mayComeBack || now - (this.lostMs ?? now) > COME_BACK_MS) {
      return this.end(code, reason);
    }
    if (this.lostMs === null) {
      this.lostMs = now;
      this.on.lost();
    }
    this.error = null;
    this.waiting = setTimeout(() => this.dial(this.wayBack()), Math.min(AGAIN_MS * 2 ** this.tries++, 2000));
  }

  wayBack() {
    const url = new URL(this.url);
    url.search = "";
    for (const name of KEPT_PARAMETERS) {
      if (this.url.searchParams.has(name)) url.searchParams.set(name, this.url.searchParams.get(name));
    }
    // What was said meanwhile is read, not heard: played late it would leave the conversation late.
    for (const [name, value] of Object.entries({ resume: this.token, missed: "skip", have: this.frames })) {
      url.searchParams.set(name, value);
    }
    return url;
  }

  end(code, reason) {
    this.live = false;
    const ok = this.hungUp && !this.error;
    const message = ok ? "You ended the conversation." : this.error || reason || CLOSED[code] || `The connection was closed (${code}).`;
    this.on.ended({ ok, message });
  }
}
