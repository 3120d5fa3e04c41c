// The card of a visitor who waits in line: the place, the time so far, and a way to leave.

import { $, setText } from "./dom.js";
import { placeText } from "./messages.js";

const TICK_MS = 1000;

export class LineView {
  #begunAt = 0;
  #timer = null;
  #title = document.title;

  /** `onLeave()` runs when the visitor leaves the line. */
  constructor(onLeave) {
    $("leave-line").onclick = onLeave;
  }

  /** `position` 1 is next; the server let this page wait for `waitedMs` so far. */
  show(position, waitedMs) {
    this.#begunAt = performance.now() - waitedMs;
    this.#timer ??= setInterval(() => this.#showTime(), TICK_MS);
    setText($("line-place"), placeText(position));
    document.title = `${placeText(position)} · ${this.#title}`;
    this.#showTime();
    $("line").hidden = false;
  }

  hide() {
    if (this.#timer === null) return;
    clearInterval(this.#timer);
    this.#timer = null;
    document.title = this.#title;
    $("line").hidden = true;
  }

  #showTime() {
    setText($("line-time"), waitText(performance.now() - this.#begunAt));
  }
}

/** 83000 -> "1:23". */
function waitText(ms) {
  const seconds = Math.max(Math.floor(ms / 1000), 0);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}
