// The chosen server: where it is, what it says, and in which words that is shown.

import { ServerWatcher } from "./server_info.js";
import { serverBase } from "./wire.js";

const PARAMETER = "server";
const LEAVING_MS = 1000;

export class ServerLink {
  #store;
  #onChange;
  #onModel;
  #isInside;
  #watcher;
  #shape = "";

  model = null;
  reachable = null;
  words = "Looking for the server";

  /**
   * `onChange()` after every answer; `onModel(model)` when another model is there; `isInside()` tells the visitor's own
   * session from somebody else's.
   */
  constructor({ store, onChange, onModel, isInside }) {
    this.#store = store;
    this.#onChange = onChange;
    this.#onModel = onModel;
    this.#isInside = isInside;
    this.#watcher = new ServerWatcher({
      fetch: (url, options) => fetch(url, options),
      timers: { setTimeout: (run, ms) => setTimeout(run, ms), clearTimeout: (timer) => clearTimeout(timer) },
      onChange: (found) => this.#found(found),
    });
    this.typed = new URLSearchParams(location.search).get(PARAMETER) ?? store.get("server", "");
    this.apiKey = store.get("apiKey", "");
  }

  begin() {
    try {
      this.base = serverBase(this.typed, location);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.typed = "";
      this.base = serverBase("", location);
    }
    this.#watcher.point(this.base, this.apiKey);
  }

  /** Another address or key. Throws TypeError when it is no address. */
  use(typed, apiKey) {
    this.base = serverBase(typed, location);
    this.typed = typed.trim();
    this.apiKey = apiKey;
    this.#store.set("server", this.typed);
    this.#store.set("apiKey", apiKey);
    this.words = "Looking for the server";
    this.model = null;
    this.reachable = null;
    this.#onChange();
    this.#watcher.point(this.base, apiKey);
  }

  /** The visitor's own session is over: a server that is still putting it away is not in use by somebody else. */
  left() {
    if (this.model) this.#found({ reachable: this.reachable, model: { ...this.model, busy: false }, words: this.words });
    this.#watcher.askIn(LEAVING_MS);
  }

  get tone() {
    if (this.reachable === null) return "quiet";
    if (!this.reachable) return "bad";
    return this.model.ready ? "good" : "busy";
  }

  /** For the start button. */
  get shortWords() {
    if (!this.model) return this.reachable === false ? "No server yet" : "Looking for the server";
    return this.#warmUpWords();
  }

  #found({ reachable, model, words }) {
    this.reachable = reachable;
    this.model = model ?? (reachable ? null : this.model && { ...this.model, ready: false });
    this.words = reachable ? this.#wordsFor(model) : words;
    this.#onChange();
    if (!reachable) return;
    const shape = JSON.stringify({ ...model, busy: null, progress: null, stage: null, detail: null, ready: null });
    if (shape === this.#shape) return;
    this.#shape = shape;
    this.#onModel(model);
  }

  #wordsFor(model) {
    if (!model.ready) return this.#warmUpWords();
    const device = model.device.replace(/^cuda:\s*/, "").replace(/^cpu.*/, "CPU");
    return [model.busy && !this.#isInside() ? "In use" : "Ready", device].filter(Boolean).join(" · ");
  }

  #warmUpWords() {
    const { stage, progress } = this.model;
    if (this.reachable === false) return "Waiting for the server";
    if (stage === "failed") return "The server could not start";
    const share = progress === null ? "" : ` ${Math.round(100 * progress)} %`;
    return stage.startsWith("loading") ? `Loading the model${share}` : `Warming up${share}`;
  }
}
