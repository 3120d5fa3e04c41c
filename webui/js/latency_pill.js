// The latency on the video, and the button that opens the meters. Those who did not ask for figures get none.

import { $ } from "./dom.js";
import { latencyText } from "./meters_view.js";

export class LatencyPill {
  #meters;
  #store;
  #getPlayer;

  constructor({ meters, store, getPlayer }) {
    this.#meters = meters;
    this.#store = store;
    this.#getPlayer = getPlayer;
    $("toggle-meters").onclick = $("latency-pill").onclick = () => this.toggleMeters();
  }

  /** New samples of the session's latency. */
  measured(samples) {
    const { totalMs, parts } = samples.at(-1);
    $("latency-text").textContent = `Key to frame ${Math.round(totalMs)} ms`;
    $("latency-pill").title = latencyText(parts);
    this.#meters.latency(this.#getPlayer().latency.summary());
    this.show();
  }

  show() {
    const { isLive, latency } = this.#getPlayer();
    $("latency-pill").hidden = !(isLive && this.#meters.isOpen && latency.samples.length);
  }

  /** Opens the meters if they were open before. */
  async restore() {
    if (this.#store.get("meters", false)) await this.toggleMeters();
  }

  async toggleMeters() {
    const shown = this.#meters.toggle();
    $("toggle-meters").setAttribute("aria-pressed", String(this.#meters.isOpen));
    this.show();
    this.#store.set("meters", this.#meters.isOpen);
    await shown;
  }
}
