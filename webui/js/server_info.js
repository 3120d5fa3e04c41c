// What a server says of itself: /v1/models as the page uses it, and a watcher that asks again with growing patience.

const POLL_READY_MS = 5000;
const POLL_BUSY_MS = 1500; // who waits outside wants to know when it is free
const POLL_LOADING_MS = 600;
const BACKOFF_MS = [500, 1000, 2000, 4000];
const TIMEOUT_MS = 4000;

/** One entry of /v1/models -> what the page needs, with the wire's own limits where an older server says nothing. */
export function readModel(entry) {
  const defaultSize = entry.default_size ?? "832x480";
  return {
    id: entry.id,
    device: entry.device ?? "",
    ready: entry.ready ?? true,
    stage: entry.status?.stage ?? "",
    detail: entry.status?.detail ?? "",
    progress: entry.status?.progress ?? null,
    busy: entry.busy ?? false,
    defaultSize,
    sizes: entry.sizes ?? [defaultSize],
    frames: entry.num_frames ?? { default: 9, choices: [9] },
    steps: entry.num_inference_steps ?? { default: 4, min: 1, max: 4 },
    fps: entry.fps ?? { default: 16, min: 1, max: 120 },
    sink: entry.realtime_causal_sink_size?.default ?? null,
    window: entry.realtime_causal_kv_cache_num_frames?.default ?? null,
    formats: entry.output_formats ?? ["webp", "jpeg", "raw"],
    extensions: entry.extensions ?? [],
    hasGuidance: entry.features?.guidance ?? true,
    hasUpscaling: entry.features?.upscaling ?? false,
    hasInterpolation: entry.features?.frame_interpolation ?? false,
  };
}

/** A parsed size, "832x480" -> {width, height}. */
export function parseSize(text) {
  const [width, height] = text.split("x").map(Number);
  return { width, height };
}

/**
 * Asks /v1/models until stopped. It always answers 200 with the warm-up state inside, so a server that still loads
 * leaves no failed request in the browser's console, as /health with its 503 would.
 *
 * `onChange({reachable, model, words})`; `words` says what is wrong, for people.
 */
export class ServerWatcher {
  #fetch;
  #timers;
  #onChange;
  #base = "";
  #apiKey = "";
  #timer = null;
  #failures = 0;
  #generation = 0;

  constructor({ fetch, timers, onChange }) {
    this.#fetch = fetch;
    this.#timers = timers;
    this.#onChange = onChange;
  }

  /** Watch this server from now on. */
  point(base, apiKey) {
    this.#base = base;
    this.#apiKey = apiKey;
    this.#failures = 0;
    this.askNow();
  }

  askNow() {
    this.#generation++;
    this.#timers.clearTimeout(this.#timer);
    void this.#ask(this.#generation);
  }

  askIn(ms) {
    this.#generation++;
    this.#timers.clearTimeout(this.#timer);
    this.#timer = this.#timers.setTimeout(() => this.askNow(), ms);
  }

  async #ask(generation) {
    const found = await this.#look();
    if (generation !== this.#generation) return;
    this.#failures = found.reachable ? 0 : this.#failures + 1;
    this.#onChange(found);
    let wait = BACKOFF_MS[Math.min(this.#failures, BACKOFF_MS.length) - 1];
    if (found.reachable) wait = !found.model.ready ? POLL_LOADING_MS : found.model.busy ? POLL_BUSY_MS : POLL_READY_MS;
    this.#timer = this.#timers.setTimeout(() => this.#ask(generation), wait);
  }

  async #look() {
    const headers = this.#apiKey ? { Authorization: `Bearer ${this.#apiKey}` } : {};
    let answer;
    try {
      answer = await this.#fetch(`${this.#base}/v1/models`, { headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
      if (answer.ok) return { reachable: true, model: readModel((await answer.json()).data[0]), words: "" };
    } catch {
      return { reachable: false, model: null, words: "No server answers there." };
    }
    const needsKey = answer.status === 401 || answer.status === 403;
    const words = needsKey ? "This server asks for its key." : `This address answers, but not as a world server (${answer.status}).`;
    return { reachable: false, model: null, words, needsKey };
  }
}
