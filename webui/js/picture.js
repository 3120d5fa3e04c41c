// The first picture: any image file -> the part of it that fits the world's shape, as bytes for the wire.

/** The largest part of width x height with the target's aspect, at `focus` (0..1 each way): {x, y, width, height}. */
export function cropFor(width, height, target, focus = { x: 0.5, y: 0.5 }) {
  const aspect = target.width / target.height;
  const isWide = width / height > aspect;
  const cropWidth = isWide ? height * aspect : width;
  const cropHeight = isWide ? height : width / aspect;
  return { x: (width - cropWidth) * focus.x, y: (height - cropHeight) * focus.y, width: cropWidth, height: cropHeight };
}

/** Draws `bitmap`, cropped, over the whole canvas of the target's size. */
export function drawCropped(canvas, bitmap, target, focus) {
  canvas.width = target.width;
  canvas.height = target.height;
  const crop = cropFor(bitmap.width, bitmap.height, target, focus);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, crop.x, crop.y, crop.width, crop.height, 0, 0, target.width, target.height);
}

/** PNG: the world begins with exactly the pixels that were shown. */
export async function canvasBytes(canvas, type = "image/png") {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type));
  return new Uint8Array(await blob.arrayBuffer());
}
