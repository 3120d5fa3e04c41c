// Batches in, pictures out, strictly in order. One worker lives for one session.

import { BadBatch, RawDecoder, isRaw, splitPictures } from "./frames.js";

const raw = new RawDecoder();
let last = Promise.resolve();

self.onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};

async function answer({ id, header, payload }) {
  const began = performance.now();
  try {
    const images = await decodeBatch(header, payload);
    self.postMessage({ id, images, decodeMs: performance.now() - began }, images);
  } catch (error) {
    // The edge of the worker: one batch that cannot be read is reported and skipped, the session goes on.
    self.postMessage({ id, error: error.message || String(error) });
  }
}

async function decodeBatch(header, payload) {
  if (isRaw(header)) {
    const frames = await raw.decode(header, payload);
    return Promise.all(frames.map((rgba) => createImageBitmap(new ImageData(rgba, header.width, header.height))));
  }
  if (!header.content_type.startsWith("image/")) throw new BadBatch(`${header.content_type} is not a picture`);
  const pictures = splitPictures(header, payload);
  return Promise.all(pictures.map((bytes) => createImageBitmap(new Blob([bytes], { type: header.content_type }))));
}
