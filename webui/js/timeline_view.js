// The prompts of a session, and when each took effect in the video.

import { clockText, h } from "./dom.js";

export class PromptTimeline {
  #root;
  #waiting = [];

  /** The prompt of the frame that was drawn last. */
  prompt = "";

  constructor(root) {
    this.#root = root;
  }

  start(prompt) {
    this.#waiting = [];
    this.#root.replaceChildren();
    this.#root.hidden = true;
    this.prompt = prompt;
    this.#entry(prompt, "0:00");
  }

  /** The session went back to where `prompt` was in force. Prompts that had not taken effect never will. */
  wentBack(prompt, sinceStartMs) {
    for (const { entry } of this.#waiting.splice(0)) entry.remove();
    if (prompt === this.prompt) return;
    this.prompt = prompt;
    this.#entry(prompt, clockText(sinceStartMs));
  }

  /** A prompt was sent. It takes effect with the first drawn frame that carries its event. */
  promptSent(prompt, eventId) {
    this.#waiting.push({ eventId, prompt, entry: this.#entry(prompt, null) });
    this.#root.hidden = false;
  }

  frameDrawn(eventId, sinceStartMs) {
    while (this.#waiting.length && eventId !== null && this.#waiting[0].eventId <= eventId) {
      const { entry, prompt } = this.#waiting.shift();
      this.prompt = prompt;
      entry.classList.remove("waiting");
      entry.querySelector("time").textContent = clockText(sinceStartMs);
    }
  }

  #entry(prompt, time) {
    const entry = h(
      "li",
      { className: time ? "" : "waiting", title: prompt },
      h("time", { textContent: time ?? "…" }),
      h("span", { textContent: prompt }),
    );
    this.#root.append(entry);
    entry.scrollIntoView({ block: "nearest", inline: "end" });
    return entry;
  }
}
