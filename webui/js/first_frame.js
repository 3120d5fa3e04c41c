// The first frame of a session: the chosen image, its crop, and how it is shown before the start.

import { canvasPng } from "./dom.js";

const KEY_STEPS = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] };

/** The largest part {x, y, width, height} with the target's aspect ratio, placed by `focus` (0..1 per axis). */
export function cropFor(width, height, target, focus) {
  const aspect = target.width / target.height;
  const isWide = width / height > aspect;
  const cropWidth = isWide ? height * aspect : width;
  const cropHeight = isWide ? height : width / aspect;
  return { x: (width - cropWidth) * focus.x, y: (height - cropHeight) * focus.y, width: cropWidth, height: cropHeight };
}

/** Gives the canvas the target's size and fills it with the cropped bitmap. */
function drawCropped(canvas, bitmap, target, focus) {
  canvas.width = target.width;
  canvas.height = target.height;
  const crop = cropFor(bitmap.width, bitmap.height, target, focus);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, crop.x, crop.y, crop.width, crop.height, 0, 0, target.width, target.height);
}

export class FirstFrame {
  #bitmap = null;
  #newest = 0;
  #pending = null; // settles when every image that is loading has loaded or failed
  #focus = { x: 0.5, y: 0.5 };
  #target = { width: 160, height: 96 };
  #preview;
  #poster;
  #onChange;

  /** `preview` is the small canvas in the panel, `poster` the large one behind the start button. */
  constructor({ preview, poster, onChange }) {
    this.#preview = preview;
    this.#poster = poster;
    this.#onChange = onChange;
    this.#listenForDragging();
  }

  get exists() {
    return this.#bitmap !== null;
  }

  /** The session's frame size, {width, height}. */
  set target(size) {
    this.#target = size;
    this.#draw();
  }

  /**
   * Takes any image the browser can read (a File, a Blob, a canvas, a video), or a promise of one. The newest call
   * wins. Returns whether this call did. Throws InvalidStateError if the source is not an image.
   */
  use(source) {
    const loading = this.#read(source, ++this.#newest);
    this.#pending = Promise.allSettled([this.#pending, loading]);
    return loading;
  }

  /** Resolves when no image is loading. */
  async settled() {
    for (let seen; seen !== this.#pending;) await (seen = this.#pending);
  }

  /** The cropped image at the session's size, as PNG bytes. */
  async bytes() {
    const canvas = document.createElement("canvas");
    drawCropped(canvas, this.#bitmap, this.#target, this.#focus);
    return canvasPng(canvas);
  }

  async #read(source, call) {
    const bitmap = await createImageBitmap(await source);
    if (call !== this.#newest) {
      bitmap.close();
      return false;
    }
    this.#bitmap?.close();
    this.#bitmap = bitmap;
    this.#focus = { x: 0.5, y: 0.5 };
    this.#draw();
    return true;
  }

  #draw() {
    if (!this.#bitmap) return;
    const { width, height } = this.#target;
    // The poster keeps the image's own resolution, which may be higher than that of the session.
    const scale = Math.max(1, Math.min(832 / width, this.#bitmap.width / width));
    drawCropped(
      this.#poster,
      this.#bitmap,
      { width: Math.round(width * scale), height: Math.round(height * scale) },
      this.#focus,
    );
    const small = 320 / Math.max(width, height);
    drawCropped(
      this.#preview,
      this.#bitmap,
      { width: Math.round(width * small), height: Math.round(height * small) },
      this.#focus,
    );
    this.#preview.classList.toggle("fits", this.#fits());
    this.#preview.tabIndex = this.#fits() ? -1 : 0;
    this.#onChange({ cropped: !this.#fits() });
  }

  #fits() {
    const crop = cropFor(this.#bitmap.width, this.#bitmap.height, this.#target, this.#focus);
    return this.#bitmap.width - crop.width < 2 && this.#bitmap.height - crop.height < 2;
  }

  #listenForDragging() {
    let from = null;
    this.#preview.addEventListener("pointerdown", (event) => {
      if (!this.#bitmap || this.#fits()) return;
      this.#preview.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY, focus: { ...this.#focus } };
    });
    this.#preview.addEventListener("pointermove", (event) => {
      if (!from) return;
      const box = this.#preview.getBoundingClientRect();
      const moved = (start, now, size, focus) => Math.min(Math.max(focus - (2 * (now - start)) / size, 0), 1);
      this.#focus = {
        x: moved(from.x, event.clientX, box.width, from.focus.x),
        y: moved(from.y, event.clientY, box.height, from.focus.y),
      };
      this.#draw();
    });
    this.#preview.addEventListener("keydown", (event) => {
      const step = KEY_STEPS[event.key];
      if (!step || !this.#bitmap || this.#fits()) return;
      event.preventDefault();
      const moved = (focus, by) => Math.min(Math.max(focus + by, 0), 1);
      this.#focus = { x: moved(this.#focus.x, step[0]), y: moved(this.#focus.y, step[1]) };
      this.#draw();
    });
    for (const name of ["pointerup", "pointercancel"]) this.#preview.addEventListener(name, () => (from = null));
  }
}
