// Where a first picture comes from besides a file field: a drop, a paste, the camera.

import { $, ask } from "./dom.js";

/** `onPicture(file)` for every image that is dropped or pasted anywhere on the page. */
export function listenForPictures(onPicture) {
  let depth = 0;
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  const show = (change) => document.body.classList.toggle("dropping", (depth = Math.max(depth + change, 0)) > 0);
  const take = (transfer) => {
    const file = [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file) void onPicture(file);
  };
  addEventListener("dragenter", (event) => isFile(event) && show(1));
  addEventListener("dragleave", (event) => isFile(event) && show(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    show(-Infinity);
    take(event.dataTransfer);
  });
  addEventListener("paste", (event) => take(event.clipboardData));
}

/** Shows the camera and hands over the moment that is chosen; `onRefused(words)` where there is none. */
export async function takeFromCamera({ onPicture, onRefused }) {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
  } catch (error) {
    onRefused(error.message);
    return;
  }
  const video = $("camera-video");
  video.srcObject = stream;
  await video.play();
  if ((await ask($("camera-dialog"))) === "take") await onPicture(video);
  for (const track of stream.getTracks()) track.stop();
  video.srcObject = null;
}
