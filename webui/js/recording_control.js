// The record button, its clock on the picture, and the clip at the end.

import { $, clockText, setIcon } from "./dom.js";
import { recordingLimitMs, startRecording } from "./recorder.js";

export class RecordingControl {
  #canvas;
  #onClip;
  #onFailed;
  #current = null; // {recorder, began}
  #isStarting = false;

  /** `onClip(blob, extension, durationMs)`, `onFailed(title, words)`. */
  constructor(canvas, { onClip, onFailed }) {
    this.#canvas = canvas;
    this.#onClip = onClip;
    this.#onFailed = onFailed;
  }

  async toggle() {
    if (this.#current) return this.stop();
    if (this.#isStarting) return;
    this.#isStarting = true;
    try {
      const began = performance.now();
      const recorder = await startRecording(this.#canvas, began);
      if (!recorder) return this.#onFailed("This browser cannot record", "");
      this.#current = { recorder, began };
    } finally {
      this.#isStarting = false;
    }
    this.#show();
  }

  /** The canvas has been drawn anew. */
  drawn(now) {
    if (!this.#current) return;
    const { recorder, began } = this.#current;
    recorder.frame(now);
    $("rec-text").textContent = clockText(now - began);
    if (now - began > recordingLimitMs) void this.stop();
  }

  /** Ends the clip, if there is one. */
  async stop() {
    if (!this.#current) return;
    const { recorder, began } = this.#current;
    this.#current = null;
    this.#show();
    const now = performance.now();
    try {
      this.#onClip(await recorder.stop(now), recorder.extension, now - began);
    } catch (error) {
      this.#onFailed("The clip could not be kept", error.message);
    }
  }

  #show() {
    const button = $("record");
    const isOn = this.#current !== null;
    button.setAttribute("aria-pressed", String(isOn));
    button.querySelector("span").textContent = isOn ? "Finish" : "Record";
    setIcon(button, isOn ? "circle-stop" : "circle-dot");
    $("rec-pill").hidden = !isOn;
    $("rec-text").textContent = "0:00";
  }
}
