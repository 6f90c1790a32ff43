// Ogg pages for one Opus stream (RFC 3533, RFC 7845): enough to send ours and to read the server's.

const FIRST = 2;
const CRC = new Uint32Array(256).map((_, byte) => {
  let crc = byte << 24;
  for (let bit = 0; bit < 8; bit++) crc = crc & 0x80000000 ? (crc << 1) ^ 0x04c11db7 : crc << 1;
  return crc >>> 0;
});

function checksum(bytes) {
  let crc = 0;
  for (const byte of bytes) crc = ((crc << 8) ^ CRC[(crc >>> 24) ^ byte]) >>> 0;
  return crc;
}

const ascii = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));

function join(parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

export class OggWriter {
  constructor() {
    this.serial = Math.floor(Math.random() * 2 ** 32);
    this.number = 0;
    this.samples = 0; // at 48 kHz, Ogg's clock for Opus
  }

  headers() {
    const head = new Uint8Array(19);
    const view = new DataView(head.buffer);
    head.set(ascii("OpusHead"));
    head[8] = 1; // version
    head[9] = 1; // channel
    view.setUint16(10, 312, true); // pre-skip: libopus's look-ahead
    view.setUint32(12, 48000, true);
    const tags = new Uint8Array(24);
    tags.set(ascii("OpusTags"));
    new DataView(tags.buffer).setUint32(8, 8, true);
    tags.set(ascii("web page"), 12);
    return join([this.page([head], 0, FIRST), this.page([tags], 0, 0)]);
  }

  page(packets, samples, flags = 0) {
    this.samples += samples;
    const lacing = packets.flatMap(({ length }) => [...Array(Math.floor(length / 255)).fill(255), length % 255]);
    const header = new Uint8Array(27);
    const view = new DataView(header.buffer);
    header.set(ascii("OggS"));
    header[5] = flags;
    view.setBigInt64(6, BigInt(this.samples), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.number++, true);
    header[26] = lacing.length;
    const page = join([header, Uint8Array.from(lacing), ...packets]);
    new DataView(page.buffer).setUint32(22, checksum(page), true);
    return page;
  }
}

// The audio packets of whole pages; the server sends no others, and its checksums are TCP's business here.
export function packetsOf(bytes) {
  const packets = [];
  for (let at = 0; at + 27 <= bytes.length; ) {
    const lacing = bytes.subarray(at + 27, at + 27 + bytes[at + 26]);
    at += 27 + lacing.length;
    let size = 0;
    for (const lace of lacing) {
      size += lace;
      if (lace < 255) {
        packets.push(bytes.slice(at, at + size));
        at += size;
        size = 0;
      }
    }
  }
  return packets.filter((packet) => !(packet[0] === 0x4f && /^Opus(Head|Tags)/.test(String.fromCharCode(...packet.subarray(0, 8)))));
}
