// The API keys, each kept for the origin that it was entered for. A server that a link names gets no other's key.

import { serverBase } from "./wire.js";

export class KeyRing {
  #store;

  /** `page` is the page's own URL. Older pages kept one key for whatever server was chosen; it moves to that server. */
  constructor(store, page) {
    this.#store = store;
    const key = store.get("apiKey", "");
    const address = store.get("server", null);
    store.set("apiKey", undefined);
    if (key && address !== null) this.#adopt(key, address, page);
  }

  /** The key for the server at `base`, or "". */
  get(base) {
    return this.#keys[originOf(base)] ?? "";
  }

  /** Keeps `key` for the origin of `base`; "" forgets it. */
  set(base, key) {
    this.#store.set("keys", { ...this.#keys, [originOf(base)]: key || undefined });
  }

  get #keys() {
    return this.#store.get("keys", {});
  }

  #adopt(key, address, page) {
    try {
      const base = serverBase(address, page);
      if (!this.get(base)) this.set(base, key);
    } catch (error) {
      // Nobody knows which server the key belongs to, so the page asks for it again.
      if (!(error instanceof TypeError)) throw error;
    }
  }
}

const originOf = (base) => new URL(base).origin;
