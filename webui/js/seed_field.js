// The seed of the next session: typed, thrown, and kept in the browser.

import { $, setText } from "./dom.js";

const DEFAULT = 42;
const THROWN_BELOW = 2 ** 32;

export class SeedField {
  #store;
  #onChange;

  /** `onChange()` runs after every new seed. */
  constructor({ store, onChange }) {
    this.#store = store;
    this.#onChange = onChange;
    $("seed").value = this.value;
    $("seed").onchange = () => this.#typed($("seed").value.trim());
    $("dice").onclick = () => (this.value = Math.floor(Math.random() * THROWN_BELOW));
  }

  /** The newest seed that was not refused. */
  get value() {
    return this.#store.get("seed", DEFAULT);
  }

  set value(seed) {
    $("seed").value = seed;
    this.#store.set("seed", seed);
    this.#refuse("");
    this.#onChange();
  }

  /** Says that the seed applies to the next session. */
  set isLater(isLater) {
    $("seed-note").hidden = !isLater;
  }

  #typed(text) {
    const seed = Number(text);
    if (/^\d+$/.test(text) && Number.isSafeInteger(seed)) this.value = seed;
    else this.#refuse(`Refused. Expected a whole number, 0 to ${Number.MAX_SAFE_INTEGER}. Still used: ${this.value}.`);
  }

  #refuse(text) {
    $("seed-problem").hidden = !text;
    setText($("seed-problem"), text);
    $("seed").setAttribute("aria-invalid", String(Boolean(text)));
  }
}
