// The chosen server: its address, what /v1/models says, and how that is shown.

import { KeyRing } from "./key_ring.js";
import { STATIC_PAGE_PORT, serverBase } from "./wire.js";

const POLL_READY_MS = 5000;
const POLL_BUSY_MS = 1500; // a user who waits wants to know soon when the server is free
const POLL_LOADING_MS = 600;
const BACKOFF_MS = [500, 1000, 2000, 4000];
const TIMEOUT_MS = 4000;
const CLOSING_MS = 1000;
const LEAVING_LIMIT_MS = 30_000; // this long an old session of this page may keep the server busy
const LEFT_KEY = "lingbot-rt.left"; // in sessionStorage, which is this tab's own and survives a reload
const URL_PARAMETER = "server";
const OWN_PORTS = ["", "30000"]; // a page there comes from the server itself, or through a proxy
const GATEWAY_ERRORS = [502, 503, 504]; // from a proxy whose server is away

/** One entry of /v1/models as the page uses it. Fields that an older server omits get the protocol's defaults. */
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
    waiting: entry.waiting ?? 0,
    defaultSize,
    sizes: entry.sizes ?? [defaultSize],
    warmSizes: entry.warm_sizes ?? null, // those that start at once; null: all
    frames: entry.num_frames ?? { default: 9, choices: [9] },
    steps: entry.num_inference_steps ?? { default: 4, min: 1, max: 4 },
    fps: entry.fps ?? { default: 16, min: 1, max: 120 },
    sink: entry.realtime_causal_sink_size?.default ?? null,
    window: entry.realtime_causal_kv_cache_num_frames?.default ?? null,
    formats: entry.output_formats ?? ["webp", "jpeg", "raw"],
    extensions: entry.extensions ?? [],
    maxPromptCharacters: entry.limits?.max_prompt_characters ?? 8192,
    hasGuidance: entry.features?.guidance ?? true,
    hasUpscaling: entry.features?.upscaling ?? false,
    hasInterpolation: entry.features?.frame_interpolation ?? false,
  };
}

/** "832x480" -> {width, height}. */
export function parseSize(text) {
  const [width, height] = text.split("x").map(Number);
  return { width, height };
}

/**
 * Polls /v1/models. Polls less often while the server cannot be reached.
 *
 * /v1/models answers 200 with the warm-up state even while the model loads. /health answers 503 then, which the browser
 * would log as a failed request.
 *
 * `onChange({reachable, model, problem, kind})` runs after every answer. `problem` is text for the user; its `kind` is
 * "silent" (nobody answers), "key" (the key is missing or wrong) or "foreign" (somebody else answers).
 */
export class ServerPoller {
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

  /** Polls this server from now on. */
  setServer(base, apiKey) {
    this.#base = base;
    this.#apiKey = apiKey;
    this.#failures = 0;
    void this.pollNow();
  }

  /** Resolves after the answer. */
  pollNow() {
    this.#generation++;
    this.#timers.clearTimeout(this.#timer);
    return this.#poll(this.#generation);
  }

  pollIn(ms) {
    this.#generation++;
    this.#timers.clearTimeout(this.#timer);
    this.#timer = this.#timers.setTimeout(() => this.pollNow(), ms);
  }

  async #poll(generation) {
    const found = await this.#request();
    if (generation !== this.#generation) return;
    this.#failures = found.reachable ? 0 : this.#failures + 1;
    this.#onChange(found);
    let wait = BACKOFF_MS[Math.min(this.#failures, BACKOFF_MS.length) - 1];
    if (found.reachable) wait = !found.model.ready ? POLL_LOADING_MS : found.model.busy ? POLL_BUSY_MS : POLL_READY_MS;
    this.#timer = this.#timers.setTimeout(() => this.#poll(generation), wait);
  }

  async #request() {
    const headers = this.#apiKey ? { Authorization: `Bearer ${this.#apiKey}` } : {};
    let answer;
    try {
      answer = await this.#fetch(`${this.#base}/v1/models`, { headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
    } catch {
      return failed("silent", "No server answers");
    }
    const { status } = answer;
    const body = await json(answer);
    if (answer.ok && body?.data?.[0]?.id) return { reachable: true, model: readModel(body.data[0]), problem: "" };
    if (status === 401) return failed("key", this.#apiKey ? "The server refused this key" : "This server needs a key");
    if (GATEWAY_ERRORS.includes(status))
      return failed("silent", `No server answers behind this address (HTTP ${status})`);
    return failed("foreign", body?.error?.message ?? `This address is not a LingBot server (HTTP ${status})`);
  }
}

const failed = (kind, problem) => ({ reachable: false, model: null, problem, kind });

async function json(answer) {
  try {
    return await answer.json();
  } catch {
    return null; // a page, for instance
  }
}

/**
 * Whether the page comes from a server that has only files, so that asking it for the model would fail. The real one
 * forbids guessing types in every answer.
 */
async function isStaticPage() {
  if (location.port === STATIC_PAGE_PORT) return true;
  if (OWN_PORTS.includes(location.port) || !location.protocol.startsWith("http")) return false;
  try {
    const answer = await fetch("favicon.svg");
    return answer.ok && answer.headers.get("X-Content-Type-Options") !== "nosniff";
  } catch {
    return false;
  }
}

/** The server that the user chose, kept in the browser. */
export class Server {
  #store;
  #onChange;
  #onModel;
  #isOurs;
  #poller;
  #keys;
  #isStatic;
  #leftAt = Number(takeFromSession(LEFT_KEY)); // when this page's last session ended
  #capabilities = "";

  base = null; // null while the address is none
  model = null;
  reachable = null;
  kind = null; // of the problem: that of ServerPoller, or "address"
  status = "Looking for the server";

  /**
   * `onChange()` runs after every answer, `onModel(model)` when the model or its capabilities changed. `isOurs()` says
   * whether this page runs the session that makes the server busy.
   */
  constructor({ store, onChange, onModel, isOurs }) {
    this.#store = store;
    this.#onChange = onChange;
    this.#onModel = onModel;
    this.#isOurs = isOurs;
    this.#poller = new ServerPoller({
      fetch: (url, options) => fetch(url, options),
      timers: { setTimeout: (run, ms) => setTimeout(run, ms), clearTimeout: (timer) => clearTimeout(timer) },
      onChange: (found) => {
        if (found.model && !found.model.busy && !isOurs()) this.#leftAt = 0;
        this.#update(found);
      },
    });
    this.#keys = new KeyRing(store, location);
    this.address = new URLSearchParams(location.search).get(URL_PARAMETER) ?? store.get("server", "");
  }

  get apiKey() {
    return this.base === null ? "" : this.#keys.get(this.base);
  }

  /** The key kept for the server at a typed address, "" if there is none. */
  keyFor(address) {
    try {
      return this.#keys.get(this.#baseOf(address));
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      return "";
    }
  }

  async start() {
    this.#isStatic = await isStaticPage();
    try {
      this.base = this.#baseOf(this.address);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.#update(failed("address", `“${this.address}” is not an address`));
      return;
    }
    this.#poller.setServer(this.base, this.apiKey);
  }

  /** Changes the address and the key. Throws TypeError if it is not an address. */
  use(address, apiKey) {
    this.base = this.#baseOf(address);
    this.address = address.trim();
    this.#store.set("server", this.address);
    this.#keys.set(this.base, apiKey);
    forgetLink();
    this.status = "Looking for the server";
    this.model = null;
    this.reachable = null;
    this.kind = null;
    this.#onChange();
    this.#poller.setServer(this.base, apiKey);
  }

  #baseOf(address) {
    return serverBase(address, location, this.#isStatic);
  }

  /** Whether the server answers, asked anew. */
  async answers() {
    await this.#poller.pollNow();
    return this.reachable === true;
  }

  /** The page is closed or reloaded while the server runs its session. */
  pageLeaves() {
    keepForSession(LEFT_KEY, String(Date.now()));
  }

  /**
   * This page's session ended. If it was the one that the server ran, the server is shown as free, although it may
   * report busy until it has cleaned up.
   */
  sessionEnded(wasRunning) {
    if (wasRunning) this.#leftAt = Date.now();
    if (this.model)
      this.#update({ reachable: this.reachable, model: this.model, problem: this.status, kind: this.kind });
    this.#poller.pollIn(CLOSING_MS);
  }

  /** Whether somebody else's session runs. */
  get isInUse() {
    const isLeaving = Date.now() - this.#leftAt < LEAVING_LIMIT_MS;
    return (this.model?.busy ?? false) && !this.#isOurs() && !isLeaving;
  }

  get tone() {
    if (this.reachable === null) return "quiet";
    if (!this.reachable) return "bad";
    if (!this.model.ready) return "busy";
    return this.isInUse ? "used" : "good";
  }

  /** What to do about the problem. */
  get advice() {
    const isBlocked = location.protocol === "https:" && this.base?.startsWith("http:");
    switch (this.kind) {
      case "key":
        return `${this.base} runs. Enter its key.`;
      case "address":
        return "Enter a host and a port, like 127.0.0.1:30000.";
      case "foreign":
        return `Something else answers at ${this.base}. Enter the server's address.`;
      default:
        return isBlocked
          ? `This page came over https. Browsers then refuse ${this.base}: use an https address.`
          : `Nothing answers at ${this.base}. Start the server, or enter its address. This page keeps asking.`;
    }
  }

  #update({ reachable, model, problem, kind = null }) {
    this.reachable = reachable;
    this.kind = kind;
    this.model = model ?? (reachable ? null : this.model && { ...this.model, ready: false });
    this.status = reachable ? this.#statusText(model) : problem;
    this.#onChange();
    if (!reachable) return;
    const capabilities = JSON.stringify({
      ...model,
      busy: null,
      waiting: null,
      warmSizes: null,
      progress: null,
      stage: null,
      detail: null,
      ready: null,
    });
    if (capabilities === this.#capabilities) return;
    this.#capabilities = capabilities;
    this.#onModel(model);
  }

  #statusText(model) {
    if (!model.ready) return this.#warmupText();
    const device = model.device.replace(/^cuda:\s*/, "").replace(/^cpu.*/, "CPU");
    return [this.isInUse ? "In use" : "Ready", device].filter(Boolean).join(" · ");
  }

  #warmupText() {
    const { stage, progress } = this.model;
    if (stage === "failed") return "The server could not start";
    const percent = progress === null ? "" : ` ${Math.round(100 * progress)} %`;
    return stage.startsWith("loading") ? `Loading the model${percent}` : `Warming up${percent}`;
  }
}

/** The user chose a server: a reload must not go back to the one that the page's link named. */
function forgetLink() {
  const here = new URL(location.href);
  here.searchParams.delete(URL_PARAMETER);
  if (here.href !== location.href) history.replaceState(null, "", here);
}

function takeFromSession(key) {
  try {
    const value = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    return value;
  } catch {
    return null; // forbidden by the browser
  }
}

function keepForSession(key, value) {
  try {
    sessionStorage.setItem(key, value);
  } catch {
    // Forbidden by the browser: the reloaded page may take its old session for somebody else's.
  }
}
