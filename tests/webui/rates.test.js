import assert from "node:assert/strict";
import { test } from "node:test";

import { MeasuredRates } from "../../webui/js/rates.js";
import { readModel } from "../../webui/js/server.js";
import { SettingsStore } from "../../webui/js/settings.js";

const model = readModel({ id: "a-world", device: "cuda:0 H100", default_size: "160x96", sizes: ["160x96", "832x480", "1280x720"] });
const init = { size: "832x480", fps: 16, num_inference_steps: 4 };
const chunk = (index, frames, ms) => ({ chunk_index: index, num_frames: frames, chunk_total_ms: ms, pace_wait_ms: 0 });

test("a size that played slowly says how fast it played, and so do larger ones; nothing is said without a figure", () => {
  const rates = new MeasuredRates(new SettingsStore(null));
  assert.equal(rates.note("http://a", model, init), "");
  rates.sessionStarts("http://a", model, init);
  rates.chunkCame(chunk(0, 9, 90_000)); // the first chunk is not typical
  assert.equal(rates.note("http://a", model, init), "");
  for (let i = 1; i < 4; i++) rates.chunkCame(chunk(i, 12, 12_000));
  assert.match(rates.note("http://a", model, init), /832 × 480 played at 1\.0 frames\/s/);
  assert.match(rates.note("http://a", model, { ...init, size: "1280x720" }), /832 × 480 played at 1\.0 .*1280 × 720 is larger/);
  assert.equal(rates.note("http://a", model, { ...init, size: "160x96" }), "");
  assert.equal(rates.note("http://b", model, init), "", "another server");
  assert.equal(rates.note("http://a", model, { ...init, num_inference_steps: 1 }), "", "other settings");
});

test("a size that keeps up, pacing not counted, is not called slow", () => {
  const rates = new MeasuredRates(new SettingsStore(null));
  rates.sessionStarts("", model, init);
  for (let i = 1; i < 4; i++) rates.chunkCame({ ...chunk(i, 12, 4000), pace_wait_ms: 3400 });
  assert.equal(rates.note("", model, init), "");
});

test("one long pause is no verdict on a size; a size that became slow is told after some chunks", () => {
  const rates = new MeasuredRates(new SettingsStore(null));
  rates.sessionStarts("", model, init);
  for (let i = 1; i < 4; i++) rates.chunkCame(chunk(i, 12, 600));
  rates.chunkCame(chunk(4, 12, 60_000));
  assert.equal(rates.note("", model, init), "");
  for (let i = 5; i < 20; i++) rates.chunkCame(chunk(i, 12, 6000));
  assert.match(rates.note("", model, init), /played at 2\.\d frames/);
});

test("on a CPU a size above the default is said to be slow, by its pixels", () => {
  const rates = new MeasuredRates(new SettingsStore(null));
  assert.match(rates.note("", { ...model, device: "cpu" }, init), /CPU.*26 times/);
  assert.equal(rates.note("", { ...model, device: "cpu" }, { ...init, size: "160x96" }), "");
});
