// How fast this server played which size, and what that says about the size chosen for the next session.

import { parseSize } from "./server.js";

const KEPT = 24;
const NEWEST = 0.3; // weight of the newest chunk in the moving average
const MOST_SLOWER = 2; // a chunk counts as at most so many times the average before it
const SLOW = 0.7; // of the frame rate; below it a size is said to be slow

const pixels = (size) => {
  const { width, height } = parseSize(size);
  return width * height;
};
const nameOf = (size) => size.replace("x", " × ");
const perSecond = (rate) => `${rate < 10 ? Math.max(rate, 0.1).toFixed(1) : Math.round(rate)} frames/s`;

export class MeasuredRates {
  #store;
  #key = ""; // of the running session: the user may choose another server meanwhile

  constructor(store) {
    this.#store = store;
  }

  sessionStarts(base, model, init) {
    this.#key = keyOf(base, model, init);
  }

  /** A chunk of the session came. The first chunk of a session is not typical. */
  chunkCame(stats) {
    const ms = stats.chunk_total_ms - (stats.pace_wait_ms ?? 0);
    if (!(stats.chunk_index > 0 && ms > 0 && stats.num_frames > 0)) return;
    const { [this.#key]: before, ...others } = this.#all;
    // One long pause of the machine says nothing of the size; what is really slow is so chunk after chunk.
    const now = Math.min(ms / stats.num_frames, MOST_SLOWER * (before ?? Infinity));
    const average = before === undefined ? now : before + NEWEST * (now - before);
    const kept = Object.entries(others).slice(1 - KEPT);
    this.#store.set("rates", Object.fromEntries([...kept, [this.#key, average]]));
  }

  /** What to say before a session with `init` starts; "" if it plays at its frame rate or nothing is known. */
  note(base, model, init) {
    const measured = this.#all[keyOf(base, model, init)];
    if (measured !== undefined) {
      const rate = 1000 / measured;
      return rate < SLOW * init.fps ? `${nameOf(init.size)} played at ${perSecond(rate)} here.` : "";
    }
    const smaller = this.#slowSmaller(base, model, init);
    if (smaller) {
      const rate = perSecond(1000 / smaller.ms);
      return `${nameOf(smaller.size)} played at ${rate} here. ${nameOf(init.size)} is larger and slower.`;
    }
    const times = pixels(init.size) / pixels(model.defaultSize);
    if (!model.device.startsWith("cpu") || times <= 1) return "";
    const comparison = `${nameOf(init.size)} has ${Math.round(times * 10) / 10} times the pixels of its default size`;
    return `This server computes on a CPU. ${comparison} and may play far below ${init.fps} frames/s.`;
  }

  get #all() {
    return this.#store.get("rates", {});
  }

  /** The largest smaller size that was slow with the same settings, or undefined. */
  #slowSmaller(base, model, init) {
    return model.sizes
      .filter((size) => pixels(size) < pixels(init.size))
      .map((size) => ({ size, ms: this.#all[keyOf(base, model, { ...init, size })] }))
      .filter(({ ms }) => 1000 / ms < SLOW * init.fps)
      .sort((a, b) => pixels(b.size) - pixels(a.size))[0];
  }
}

/** The settings that a chunk's time depends on. */
function keyOf(base, model, init) {
  const { size, num_inference_steps: steps, guidance_scale: guidance = 1 } = init;
  const { enable_upscaling: upscales = false, enable_frame_interpolation: interpolates = false } = init;
  return JSON.stringify([base, model.id, model.device, size, steps, guidance > 1, upscales, interpolates]);
}
