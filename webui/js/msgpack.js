// MessagePack. Reads every type but extensions; writes what the wire uses.

const utf8Encoder = new TextEncoder();
const utf8Decoder = new TextDecoder("utf-8", { fatal: true });
const MAX_DEPTH = 64;

/** Encodes a JSON-like value, with Uint8Array for bytes. Leaves out keys whose value is undefined. */
export function encode(value) {
  const parts = [];
  write(value, parts);
  let total = 0;
  for (const part of parts) total += part.length;
  const out = new Uint8Array(total);
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

function write(value, parts) {
  if (value === null || value === undefined) parts.push([0xc0]);
  else if (value === false) parts.push([0xc2]);
  else if (value === true) parts.push([0xc3]);
  else if (typeof value === "number") parts.push(numberBytes(value));
  else if (typeof value === "string") {
    const bytes = utf8Encoder.encode(value);
    parts.push(bytes.length < 32 ? [0xa0 | bytes.length] : header(bytes.length, 0xd9, 0xda, 0xdb), bytes);
  } else if (value instanceof Uint8Array) {
    parts.push(header(value.length, 0xc4, 0xc5, 0xc6), value);
  } else if (Array.isArray(value)) {
    parts.push(value.length < 16 ? [0x90 | value.length] : header(value.length, null, 0xdc, 0xdd));
    for (const item of value) write(item, parts);
  } else if (typeof value === "object") {
    const entries = Object.entries(value).filter(([, item]) => item !== undefined);
    parts.push(entries.length < 16 ? [0x80 | entries.length] : header(entries.length, null, 0xde, 0xdf));
    for (const [key, item] of entries) {
      write(key, parts);
      write(item, parts);
    }
  } else {
    throw new TypeError(`MessagePack cannot encode a ${typeof value}`);
  }
}

/** The shortest length header: one, two or four bytes after its code. */
function header(length, code8, code16, code32) {
  if (code8 !== null && length < 0x100) return [code8, length];
  if (length < 0x10000) return [code16, length >> 8, length & 0xff];
  return [code32, length >>> 24, (length >>> 16) & 0xff, (length >>> 8) & 0xff, length & 0xff];
}

function numberBytes(value) {
  if (Number.isInteger(value) && !Object.is(value, -0)) {
    if (value >= 0 && value < 0x80) return [value];
    if (value < 0 && value >= -32) return [0x100 + value];
    if (value >= 0 && value <= 0xffffffff) return value < 0x100 ? [0xcc, value] : header(value, null, 0xcd, 0xce);
  }
  // Everything else, also integers beyond 32 bits, is a float64: exact up to 2^53.
  const bytes = new Uint8Array(9);
  bytes[0] = 0xcb;
  new DataView(bytes.buffer).setFloat64(1, value);
  return bytes;
}

/** Decodes one value from an ArrayBuffer or Uint8Array. Byte strings are views of the input. Throws RangeError. */
export function decode(data) {
  const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
  const reader = new Reader(bytes);
  const value = reader.value(0);
  const extra = bytes.length - reader.at;
  if (extra) throw new RangeError(`${extra} bytes follow the MessagePack value`);
  return value;
}

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  value(depth) {
    if (depth > MAX_DEPTH) throw new RangeError("MessagePack is nested too deeply");
    const code = this.uint(1);
    if (code < 0x80) return code;
    if (code < 0x90) return this.map(code & 0x0f, depth);
    if (code < 0xa0) return this.array(code & 0x0f, depth);
    if (code < 0xc0) return this.text(code & 0x1f);
    if (code >= 0xe0) return code - 0x100;
    switch (code) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return this.take(this.uint(1));
      case 0xc5: return this.take(this.uint(2));
      case 0xc6: return this.take(this.uint(4));
      case 0xca: return this.view.getFloat32(this.skip(4));
      case 0xcb: return this.view.getFloat64(this.skip(8));
      case 0xcc: return this.uint(1);
      case 0xcd: return this.uint(2);
      case 0xce: return this.uint(4);
      case 0xcf: return Number(this.view.getBigUint64(this.skip(8)));
      case 0xd0: return this.view.getInt8(this.skip(1));
      case 0xd1: return this.view.getInt16(this.skip(2));
      case 0xd2: return this.view.getInt32(this.skip(4));
      case 0xd3: return Number(this.view.getBigInt64(this.skip(8)));
      case 0xd9: return this.text(this.uint(1));
      case 0xda: return this.text(this.uint(2));
      case 0xdb: return this.text(this.uint(4));
      case 0xdc: return this.array(this.uint(2), depth);
      case 0xdd: return this.array(this.uint(4), depth);
      case 0xde: return this.map(this.uint(2), depth);
      case 0xdf: return this.map(this.uint(4), depth);
      default: throw new RangeError(`MessagePack type 0x${code.toString(16)} is not supported`);
    }
  }

  skip(count) {
    const start = this.at;
    if (start + count > this.bytes.length) throw new RangeError("the MessagePack message ends too early");
    this.at = start + count;
    return start;
  }

  uint(width) {
    const start = this.skip(width);
    if (width === 1) return this.bytes[start];
    return width === 2 ? this.view.getUint16(start) : this.view.getUint32(start);
  }

  take(length) {
    const start = this.skip(length);
    return this.bytes.subarray(start, start + length);
  }

  text(length) {
    return utf8Decoder.decode(this.take(length));
  }

  array(length, depth) {
    const items = [];
    for (let i = 0; i < length; i++) items.push(this.value(depth + 1));
    return items;
  }

  map(length, depth) {
    const map = {};
    for (let i = 0; i < length; i++) {
      const key = String(this.value(depth + 1));
      const item = this.value(depth + 1);
      if (key !== "__proto__") map[key] = item;
    }
    return map;
  }
}
