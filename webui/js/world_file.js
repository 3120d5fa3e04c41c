// Reads what the page needs of a saved world: a safetensors file with JSON texts beside its tensors. No DOM.

const FORMAT = "lingbot_rt world 1";
const MAX_HEADER_BYTES = 64 * 2 ** 20;

export class WorldFileError extends Error {}

/**
 * A Blob -> {bytes, init, firstFrame}: the whole file, the settings of its session, and its first frame as RGBA bytes
 * {data, width, height}. Throws WorldFileError, for the user.
 */
export async function readWorldFile(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  try {
    const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    if (length > MAX_HEADER_BYTES) throw new RangeError("header");
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
    if (header.__metadata__.format !== FORMAT) throw new RangeError("format");
    const { init } = JSON.parse(header.__metadata__.about);
    if (typeof init.prompt !== "string" || typeof init.size !== "string") throw new RangeError("init");
    const { shape, data_offsets: offsets } = header.first_frame;
    const rgb = bytes.subarray(8 + length + offsets[0], 8 + length + offsets[1]);
    return { bytes, init, firstFrame: rgba(rgb, shape) };
  } catch (error) {
    if (error instanceof WorldFileError) throw error;
    throw new WorldFileError("This file is no saved world, or only a part of one.");
  }
}

function rgba(rgb, [height, width, channels]) {
  if (channels !== 3 || !width || !height || rgb.length !== width * height * 3) throw new RangeError("first_frame");
  const data = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let from = 0, to = 0; from < rgb.length; from += 3, to += 4) data.set(rgb.subarray(from, from + 3), to);
  return { data, width, height };
}
