// One conversation over /api/chat: binary messages, the first byte is the kind.

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
  // `on`: connected(), ready(), metadata(object), audio(Uint8Array), text(string), lag(ms),
  // ended({ok, message}) exactly once.
  constructor(url, on) {
    this.on = on;
    this.live = false;
    this.error = null;
    this.hungUp = false;
    this.sentAt = []; // times of frames whose answers have not come: answer k is for frame k
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => on.connected();
    this.socket.onmessage = ({ data }) => this.take(new Uint8Array(data));
    this.socket.onclose = ({ code, reason }) => this.end(code, reason);
  }

  take(message) {
    const payload = message.subarray(1);
    switch (message[0]) {
      case KIND.handshake:
        this.live = true;
        this.on.ready();
        break;
      case KIND.audio:
        if (this.sentAt.length) this.on.lag(performance.now() - this.sentAt.shift());
        this.on.audio(payload);
        break;
      case KIND.text:
        this.on.text(utf8.decode(payload));
        break;
      case KIND.metadata:
        this.on.metadata(JSON.parse(utf8.decode(payload)));
        break;
      case KIND.error:
        this.error = utf8.decode(payload);
        break;
    }
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
    this.error = message;
    this.socket.close(1000);
  }

  hangUp() {
    this.hungUp = true;
    this.socket.close(1000);
  }

  end(code, reason) {
    this.live = false;
    const ok = this.hungUp && !this.error;
    const message = ok ? "You ended the conversation." : this.error || reason || CLOSED[code] || `The connection was closed (${code}).`;
    this.on.ended({ ok, message });
  }
}
