// The prompts of a session, and when each took effect in the video.

import { clockText, h } from "./dom.js";

export class PromptTimeline {
  #root;
  #waiting = [];

  constructor(root) {
    this.#root = root;
  }

  start(prompt) {
    this.#waiting = [];
    this.#root.replaceChildren();
    this.#root.hidden = true;
    this.#entry(prompt, "0:00");
  }

  /** A prompt was sent. It takes effect with the first drawn frame that carries its event. */
  promptSent(prompt, eventId) {
    this.#waiting.push({ eventId, entry: this.#entry(prompt, null) });
    this.#root.hidden = false;
  }

  frameDrawn(eventId, sinceStartMs) {
    while (this.#waiting.length && eventId !== null && this.#waiting[0].eventId <= eventId) {
      const { entry } = this.#waiting.shift();
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
