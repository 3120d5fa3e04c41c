import assert from "node:assert/strict";
import { readFileSync, statSync } from "node:fs";
import { test } from "node:test";

import { presetsFor } from "../../webui/js/presets.js";
import { ServerPoller, readModel } from "../../webui/js/server.js";
import { SettingsStore, allValid, fieldsFor, problemWith, validValue, wireValues } from "../../webui/js/settings.js";
import { FakeClock } from "./helpers.js";

const entry = {
  id: "lingbot-rt-builtin", ready: true, status: { stage: "ready", progress: null }, device: "cpu", default_size: "160x96", sizes: ["160x96", "832x480"],
  num_frames: { default: 9, choices: [1, 5, 9] }, num_inference_steps: { default: 4, min: 1, max: 50 }, fps: { default: 16, min: 1, max: 120 },
  output_formats: ["webp", "raw"], extensions: ["session"], features: { guidance: true, upscaling: false, frame_interpolation: false },
};
const model = readModel(entry);
const fields = fieldsFor(model);
const byKey = Object.fromEntries(fields.map((field) => [field.key, field]));

test("every field has a label, one line of help, and numbers a range and a unit", () => {
  const all = fieldsFor(readModel({ ...entry, features: { guidance: true, upscaling: true, frame_interpolation: true } }));
  assert.ok(all.length > fields.length);
  for (const field of all) {
    assert.ok(field.label && field.help && !field.help.includes("\n") && field.group, field.key);
    if (field.kind === "number") assert.ok(field.min < field.max && field.step > 0 && field.unit, field.key);
    assert.deepEqual(validValue(field, validValue(field, undefined)), validValue(field, undefined), field.key);
  }
});

test("only what the server offers can be chosen", () => {
  assert.deepEqual(byKey.size.options.map(([value]) => value), ["160x96", "832x480"]);
  assert.equal(validValue(byKey.size, "9999x9"), "160x96");
  assert.equal(validValue(byKey.realtime_output_format, "jpeg"), "webp");
  assert.equal(validValue(byKey.num_frames, "5"), 5);
  assert.equal(validValue(byKey.fps, 1000), 120);
  assert.equal(validValue(byKey.fps, "abc"), 16);
  assert.equal(validValue(byKey.max_chunks, ""), null);
  assert.equal(byKey.enable_upscaling, undefined);
});

test("a field refuses what is out of its range and says what it expects", () => {
  for (const [key, typed] of [["fps", "0"], ["fps", "121"], ["fps", ""], ["fps", "abc"], ["fps", "1e999"], ["fps", "16.5"], ["max_chunks", "0"]])
    assert.match(problemWith(byKey[key], typed), /Expected/, `${key} ${typed}`);
  for (const [key, typed] of [["fps", "120"], ["fps", " 24 "], ["max_chunks", ""], ["guidance_scale", "1.7"], ["negative_prompt", "x".repeat(8192)]])
    assert.equal(problemWith(byKey[key], typed), "", `${key} ${typed}`);
  assert.match(problemWith(byKey.negative_prompt, "x".repeat(8193)), /8193.*at most 8192/);
});

test("the page's own settings, empty fields and those that do not apply are never sent", () => {
  const values = allValid(fields, { realtime_output_format: "raw", guidance_scale: 1, negative_prompt: "blur" });
  const sent = wireValues(fields, values);
  assert.deepEqual(Object.keys(sent).sort(), ["fps", "guidance_scale", "num_frames", "num_inference_steps", "realtime_output_format", "realtime_output_pacing", "size"]);
  assert.equal(wireValues(fields, allValid(fields, { guidance_scale: 3, negative_prompt: "blur" })).negative_prompt, "blur");
});

test("the settings store works with damaged values and without storage", () => {
  const storage = new Map();
  const fake = { getItem: (key) => storage.get(key) ?? null, setItem: (key, value) => storage.set(key, value) };
  new SettingsStore(fake).set("seed", 7);
  assert.equal(new SettingsStore(fake).get("seed", 1), 7);
  storage.set("lingbot-rt.settings", "{damaged");
  assert.equal(new SettingsStore(fake).get("seed", 1), 1);
  const none = new SettingsStore(null);
  none.set("seed", 3);
  assert.equal(none.get("seed", 1), 3);
});

test("a server that reports only its model's name can be used", () => {
  const bare = readModel({ id: "other", object: "model" });
  assert.equal(bare.ready, true);
  assert.equal(allValid(fieldsFor(bare), {}).size, "832x480");
});

test("six presets ship for the built-in world, each with a prompt and a small image", () => {
  const folder = new URL("../../webui/presets/", import.meta.url);
  const presets = presetsFor(JSON.parse(readFileSync(new URL("presets.json", folder), "utf8")), model.id);
  assert.equal(presets.length, 6);
  for (const { name, prompt, picture } of presets) {
    assert.ok(name.length < 16 && prompt.length > 40);
    assert.ok(statSync(new URL(picture, folder)).size < 40_000, picture);
  }
  const own = [{ id: "a", models: ["tiny"] }, { id: "b" }];
  assert.deepEqual(presetsFor(own, "tiny-world").map(({ id }) => id), ["a"]);
  assert.deepEqual(presetsFor(own, "other").map(({ id }) => id), ["b"]);
});

test("a server is polled with growing intervals, and at once when another server is set", async () => {
  const clock = new FakeClock();
  const asked = [];
  const found = [];
  let answer = () => Promise.reject(new TypeError("refused"));
  const poller = new ServerPoller({
    fetch: (url, { headers }) => (asked.push({ at: clock.time - 1000, url, headers }), answer()),
    timers: clock,
    onChange: (state) => found.push(state),
  });
  const settle = () => new Promise(setImmediate);
  poller.setServer("http://a", "");
  for (let i = 0; i < 40; i++) {
    await settle();
    clock.advance(250);
  }
  assert.deepEqual(asked.map(({ at }) => at), [0, 500, 1500, 3500, 7500]);
  assert.equal(found.at(-1).reachable, false);
  answer = () => Promise.resolve({ ok: true, json: () => Promise.resolve({ data: [entry] }) });
  poller.setServer("http://b", "secret");
  await settle();
  assert.deepEqual(asked.at(-1), { at: 10000, url: "http://b/v1/models", headers: { Authorization: "Bearer secret" } });
  await settle();
  assert.equal(found.at(-1).model.id, "lingbot-rt-builtin");
  answer = () => Promise.resolve({ ok: false, status: 401 });
  poller.pollNow();
  await settle();
  await settle();
  assert.match(found.at(-1).problem, /key/);
  const kinds = [];
  for (const [status, json] of [[401, {}], [403, { error: { message: "unknown host" } }], [404, null], [200, null], [200, { data: [] }], [502, null]]) {
    answer = () => Promise.resolve({ ok: status === 200, status, json: () => (json ? Promise.resolve(json) : Promise.reject(new SyntaxError("a page"))) });
    poller.pollNow();
    await settle();
    await settle();
    kinds.push(found.at(-1).kind);
    assert.equal(found.at(-1).reachable, false);
    if (status === 403) assert.equal(found.at(-1).problem, "unknown host");
  }
  assert.deepEqual(kinds, ["key", "foreign", "foreign", "foreign", "foreign", "silent"]);
});
