// Helpers of the page's tests.

import { readFileSync } from "node:fs";

export const golden = (name) => JSON.parse(readFileSync(new URL(`../golden/transport/${name}.json`, import.meta.url), "utf8"));

export const fromBase64 = (text) => new Uint8Array(Buffer.from(text, "base64"));

/** A clock with timers that moves only by advance() and sleep(). */
export class FakeClock {
  time = 1000;
  #timers = new Map();
  #next = 1;

  now = () => this.time;
  setTimeout = (run, ms) => {
    this.#timers.set(this.#next, { at: this.time + ms, run });
    return this.#next++;
  };
  clearTimeout = (id) => this.#timers.delete(id);

  /** Time passes without timers; those that are due run at the end. */
  sleep(ms) {
    this.time += ms;
    this.advance(0);
  }

  advance(ms) {
    const end = this.time + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at)[0];
      if (!due) break;
      const [id, { at, run }] = due;
      this.#timers.delete(id);
      this.time = Math.max(this.time, at);
      run();
    }
    this.time = end;
  }
}
