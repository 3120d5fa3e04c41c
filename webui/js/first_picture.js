// The picture the world begins with: where it comes from, how it is cropped, and how it is shown before the start.

import { canvasBytes, cropFor, drawCropped } from "./picture.js";

const KEY_STEPS = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] };

export class FirstPicture {
  #bitmap = null;
  #newest = 0;
  #arrivals = null; // settles when every picture on its way has come or failed
  #focus = { x: 0.5, y: 0.5 };
  #target = { width: 160, height: 96 };
  #preview;
  #poster;
  #onChange;

  /** `preview` is the small canvas beside the words, `poster` the large one behind the start button. */
  constructor({ preview, poster, onChange }) {
    this.#preview = preview;
    this.#poster = poster;
    this.#onChange = onChange;
    this.#letFocusBeDragged();
  }

  get exists() {
    return this.#bitmap !== null;
  }

  /** Whether one has been chosen; it may still be on its way. */
  get isChosen() {
    return this.#newest > 0;
  }

  get target() {
    return this.#target;
  }

  /** The world's size changed. */
  set target(size) {
    this.#target = size;
    this.#draw();
  }

  /**
   * Any image a browser reads (a File, a Blob, a canvas, a video), or a promise of one. Of several on their way the
   * newest wins: -> whether this one did. Throws where it is no picture.
   */
  use(source) {
    const arrival = this.#read(source, ++this.#newest);
    this.#arrivals = Promise.allSettled([this.#arrivals, arrival]);
    return arrival;
  }

  /** Until no picture is on its way. */
  async settled() {
    for (let seen; seen !== this.#arrivals; ) await (seen = this.#arrivals);
  }

  /** The bytes for the wire, cropped, at the world's size. */
  async bytes() {
    const canvas = document.createElement("canvas");
    drawCropped(canvas, this.#bitmap, this.#target, this.#focus);
    return canvasBytes(canvas);
  }

  async #read(source, turn) {
    const bitmap = await createImageBitmap(await source);
    if (turn !== this.#newest) {
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
    // A small world's poster is drawn larger than the world: the picture itself is sharper than the world will be.
    const scale = Math.max(1, Math.min(832 / width, this.#bitmap.width / width));
    drawCropped(this.#poster, this.#bitmap, { width: Math.round(width * scale), height: Math.round(height * scale) }, this.#focus);
    const small = 320 / Math.max(width, height);
    drawCropped(this.#preview, this.#bitmap, { width: Math.round(width * small), height: Math.round(height * small) }, this.#focus);
    this.#preview.classList.toggle("fits", this.#fits());
    this.#preview.tabIndex = this.#fits() ? -1 : 0;
    this.#onChange({ cropped: !this.#fits() });
  }

  #fits() {
    const crop = cropFor(this.#bitmap.width, this.#bitmap.height, this.#target);
    return this.#bitmap.width - crop.width < 2 && this.#bitmap.height - crop.height < 2;
  }

  #letFocusBeDragged() {
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
