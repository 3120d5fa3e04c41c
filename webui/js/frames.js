// The payload of a frame batch -> encoded images or RGBA pixels. No DOM: the worker and the tests use it.

const RAW = "application/x-raw-rgb";
const DELTA = "application/x-raw-rgb-delta-gzip";

export class BadBatch extends Error {}

export const isRaw = (header) => header.content_type === RAW || header.content_type === DELTA;

/** The encoded images of a webp or jpeg batch, as views of the payload. Throws BadBatch. */
export function splitImages(header, payload) {
  const lengths = header.payload_lengths ?? [payload.length];
  if (lengths.reduce((sum, length) => sum + length, 0) !== payload.length)
    throw new BadBatch(`payload_lengths do not add up to ${payload.length} bytes`);
  let at = 0;
  return lengths.map((length) => payload.subarray(at, (at += length)));
}

/** Decodes the raw and delta-gzip batches of one session, in order. Keeps the last frame for the next delta. */
export class RawDecoder {
  #previous = null;

  /** Returns RGBA pixels, one Uint8ClampedArray per frame. Throws BadBatch. */
  async decode(header, payload) {
    const isDelta = header.content_type === DELTA;
    const rgb = isDelta ? await gunzip(payload) : payload;
    const frameBytes = header.bytes_per_frame;
    if (rgb.length !== header.num_frames * frameBytes || frameBytes !== header.width * header.height * 3) {
      this.#previous = null;
      throw new BadBatch(`${rgb.length} bytes are not ${header.num_frames} frames of ${frameBytes}`);
    }
    if (isDelta) this.#undelta(header, rgb, frameBytes);
    return Array.from({ length: header.num_frames }, (_, i) =>
      toRgba(rgb.subarray(i * frameBytes, (i + 1) * frameBytes)),
    );
  }

  /** Each frame is XORed with the one before; the first one with the last frame of the previous batch, if any. */
  #undelta(header, rgb, frameBytes) {
    if (header.delta_reference === "previous-frame") {
      const previous = this.#previous;
      if (previous?.length !== frameBytes) throw new BadBatch("the reference frame of this delta is missing");
      for (let i = 0; i < frameBytes; i++) rgb[i] ^= previous[i];
    }
    for (let i = frameBytes; i < rgb.length; i++) rgb[i] ^= rgb[i - frameBytes];
    this.#previous = rgb.slice(rgb.length - frameBytes);
  }
}

async function gunzip(payload) {
  const stream = new Blob([payload]).stream().pipeThrough(new DecompressionStream("gzip"));
  try {
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch (error) {
    throw new BadBatch(`gzip cannot be decompressed: ${error.message}`);
  }
}

function toRgba(rgb) {
  const rgba = new Uint8ClampedArray((rgb.length / 3) * 4);
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) {
    rgba[to] = rgb[from];
    rgba[to + 1] = rgb[from + 1];
    rgba[to + 2] = rgb[from + 2];
    rgba[to + 3] = 255;
  }
  return rgba;
}
