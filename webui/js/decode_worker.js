// The decode worker: frame batches in, ImageBitmaps out, in order. Each session has its own worker.

import { BadBatch, RawDecoder, isRaw, splitImages } from "./frames.js";

const raw = new RawDecoder();
let last = Promise.resolve();

self.onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};

async function answer({ id, header, payload }) {
  try {
    const images = await decodeBatch(header, payload);
    self.postMessage({ id, images }, images);
  } catch (error) {
    // A bad batch is reported and skipped. The session goes on.
    self.postMessage({ id, error: error.message || String(error) });
  }
}

async function decodeBatch(header, payload) {
  if (isRaw(header)) {
    const frames = await raw.decode(header, payload);
    return Promise.all(frames.map((rgba) => createImageBitmap(new ImageData(rgba, header.width, header.height))));
  }
  if (!header.content_type.startsWith("image/")) throw new BadBatch(`${header.content_type} is not an image`);
  const images = splitImages(header, payload);
  return Promise.all(images.map((bytes) => createImageBitmap(new Blob([bytes], { type: header.content_type }))));
}
