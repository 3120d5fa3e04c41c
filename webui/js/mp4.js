// Writes an MP4 file with one H.264 track (ISO 14496-12 and -15).

const TIMESCALE = 90000;
const UNITY = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000];

/**
 * Returns the file as Uint8Array parts, in order. `samples` are [{data: Uint8Array, isKey, at}] with increasing `at` in
 * milliseconds; `end` is when the last one ends. `description` is the encoder's avcC record.
 */
export function mp4File({ width, height, description, samples, end }) {
  const ticks = samples.map(({ at }) => Math.round((at * TIMESCALE) / 1000));
  const endTick = Math.round((end * TIMESCALE) / 1000);
  const durations = ticks.map((tick, i) => Math.max((ticks[i + 1] ?? endTick) - tick, 1));
  const total = durations.reduce((sum, duration) => sum + duration, 0);
  const bytes = samples.reduce((sum, { data }) => sum + data.length, 0);
  const ftyp = box("ftyp", text("isom"), u32(0x200), text("isomiso2avc1mp41"));
  const mdatHeader = concat([u32(bytes + 8), text("mdat")]);
  const table = sampleTable({ width, height, description, samples, durations, offset: ftyp.length + 8 });
  const moov = box(
    "moov",
    full("mvhd", 0, 0, u32(0, 0, TIMESCALE, total, 0x10000), u16(0x100, 0), u32(0, 0, ...UNITY, 0, 0, 0, 0, 0, 0, 2)),
    box(
      "trak",
      full("tkhd", 0, 3, u32(0, 0, 1, 0, total, 0, 0), u16(0, 0, 0, 0), u32(...UNITY, width << 16, height << 16)),
      box(
        "mdia",
        full("mdhd", 0, 0, u32(0, 0, TIMESCALE, total), u16(0x55c4, 0)), // language "und"
        full("hdlr", 0, 0, u32(0), text("vide"), u32(0, 0, 0), text("Video\0")),
        box(
          "minf",
          full("vmhd", 0, 1, u16(0, 0, 0, 0)),
          box("dinf", full("dref", 0, 0, u32(1), full("url ", 0, 1))),
          table,
        ),
      ),
    ),
  );
  return [ftyp, mdatHeader, ...samples.map(({ data }) => data), moov];
}

function sampleTable({ width, height, description, samples, durations, offset }) {
  const entry = box(
    "avc1",
    u16(0, 0, 0, 1, 0, 0), u32(0, 0, 0), u16(width, height), u32(0x480000, 0x480000, 0), u16(1),
    new Uint8Array(32), u16(0x18, 0xffff), box("avcC", description),
  );
  const keys = samples.flatMap(({ isKey }, i) => (isKey ? [i + 1] : []));
  return box(
    "stbl",
    full("stsd", 0, 0, u32(1), entry),
    full("stts", 0, 0, u32(durations.length, ...durations.flatMap((duration) => [1, duration]))),
    full("stss", 0, 0, u32(keys.length, ...keys)),
    full("stsc", 0, 0, u32(1, 1, samples.length, 1)), // one chunk holds all samples
    full("stsz", 0, 0, u32(0, samples.length, ...samples.map(({ data }) => data.length))),
    full("stco", 0, 0, u32(1, offset)),
  );
}

function box(type, ...parts) {
  const body = concat(parts);
  return concat([u32(body.length + 8), text(type), body]);
}

const full = (type, version, flags, ...parts) => box(type, u32(version * 2 ** 24 + flags), ...parts);

function numbers(values, width, setter) {
  const out = new Uint8Array(values.length * width);
  const view = new DataView(out.buffer);
  values.forEach((value, i) => view[setter](i * width, value));
  return out;
}

const u32 = (...values) => numbers(values, 4, "setUint32");
const u16 = (...values) => numbers(values, 2, "setUint16");
const text = (value) => new TextEncoder().encode(value);

function concat(parts) {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
