// The record button, the recording time shown on the video, and the clip at the end.

import { $, clockText, setIcon } from "./dom.js";
import { MAX_RECORDING_MS, startRecording } from "./video_recorder.js";

export class RecordButton {
  #canvas;
  #onClip;
  #onFailed;
  #current = null; // {recorder, startedAt}
  #isStarting = false;

  /** `onClip(blob, extension, durationMs)`, `onFailed(title, detail)`. */
  constructor(canvas, { onClip, onFailed }) {
    this.#canvas = canvas;
    this.#onClip = onClip;
    this.#onFailed = onFailed;
  }

  get isOn() {
    return this.#current !== null;
  }

  async toggle() {
    if (this.#current) return this.stop();
    if (this.#isStarting) return;
    this.#isStarting = true;
    try {
      const startedAt = performance.now();
      const recorder = await startRecording(this.#canvas, startedAt);
      if (!recorder) return this.#onFailed("This browser cannot record", "");
      this.#current = { recorder, startedAt };
    } finally {
      this.#isStarting = false;
    }
    this.#show();
  }

  /** A new frame is on the canvas. */
  frameDrawn(now) {
    if (!this.#current) return;
    const { recorder, startedAt } = this.#current;
    recorder.frame(now);
    $("rec-text").textContent = clockText(now - startedAt);
    if (now - startedAt > MAX_RECORDING_MS) void this.stop();
  }

  /** Ends the clip if one is being recorded. */
  async stop() {
    if (!this.#current) return;
    const { recorder, startedAt } = this.#current;
    this.#current = null;
    this.#show();
    const now = performance.now();
    try {
      this.#onClip(await recorder.stop(now), recorder.extension, now - startedAt);
    } catch (error) {
      this.#onFailed("The clip could not be saved", error.message);
    }
  }

  #show() {
    const button = $("record");
    button.setAttribute("aria-pressed", String(this.isOn));
    button.querySelector("span").textContent = this.isOn ? "Finish" : "Record";
    setIcon(button, this.isOn ? "circle-stop" : "circle-dot");
    $("rec-pill").hidden = !this.isOn;
    $("rec-text").textContent = "0:00";
  }
}
