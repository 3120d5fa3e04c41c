import assert from "node:assert/strict";
import { test } from "node:test";

import { KeyRing } from "../../webui/js/key_ring.js";
import { SettingsStore } from "../../webui/js/settings.js";

const page = new URL("http://127.0.0.1:30000/");

/** A store with `values`, and what it wrote to the browser's storage. */
function storeWith(values) {
  const written = { text: JSON.stringify(values) };
  const storage = { getItem: () => written.text, setItem: (_, text) => (written.text = text) };
  return { store: new SettingsStore(storage), kept: () => JSON.parse(written.text) };
}

test("a key is given only to the origin it was entered for", () => {
  const { store, kept } = storeWith({});
  const keys = new KeyRing(store, page);
  keys.set("https://box:1/under", "secret");
  assert.equal(keys.get("https://box:1"), "secret");
  for (const other of ["http://box:1", "https://box:2", "https://box", "https://box.example:1", "https://evil"])
    assert.equal(keys.get(other), "", other);
  keys.set("https://box:1", "");
  assert.equal(keys.get("https://box:1"), "");
  assert.deepEqual(kept().keys, {});
});

test("the one key of older pages moves to the server it was stored with, or is forgotten", () => {
  for (const [server, origin] of [["", page.origin], ["box:31000", "http://box:31000"], ["wss://box/under", "https://box"]]) {
    const { store, kept } = storeWith({ apiKey: "secret", server });
    const keys = new KeyRing(store, page);
    assert.equal(keys.get(origin), "secret", server);
    assert.equal(keys.get("http://other"), "");
    assert.deepEqual(kept(), { server, keys: { [origin]: "secret" } });
  }
  for (const values of [{ apiKey: "secret" }, { apiKey: "secret", server: "http://" }]) {
    const { store, kept } = storeWith(values);
    assert.equal(new KeyRing(store, page).get(page.origin), "");
    assert.ok(!JSON.stringify(kept()).includes("secret"));
  }
});
