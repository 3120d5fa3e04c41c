// One session from its socket to frames that wait to be drawn. The socket and the worker are given, so tests bring theirs.

import { LatencyMeter } from "./latency.js";
import { EXTENSIONS, MessageReader, eventMessage, initMessage, promptPayload, statePayload } from "./wire.js";

const NORMAL_CLOSE = 1000;
const SILENCE_MS = 30_000; // six heartbeats
const SLEPT_MS = 5_000; // a timer this late means that the computer slept: what came meanwhile is not read yet

/**
 * States: connecting -> (waiting) -> opening -> live <-> paused -> ended | lost.
 *
 * `on` has state(name), queue(place), frames(frames), stats(chunk_stats), applied(eventId, chunkIndex),
 * skipped(words), refused(words) for an event the server did not take, and over({normal, code, words, errorCode}).
 */
export class WorldSession {
  #socket;
  #worker;
  #on;
  #clock;
  #reader = new MessageReader();
  #jobs = new Map();
  #nextJob = 0;
  #lastError = null;
  #state = "connecting";
  #nextEventId;
  #heardAt = 0;
  #watch = null;

  latency = new LatencyMeter();
  capabilities = {};

  constructor({ socket, worker, init, on, clock, nextEventId }) {
    this.#socket = socket;
    this.#worker = worker;
    this.#on = on;
    this.#clock = clock;
    this.#nextEventId = nextEventId;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#enter("opening");
      socket.send(initMessage({ ...init, protocol_extensions: EXTENSIONS }));
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    worker.onmessage = ({ data }) => this.#decoded(data);
    worker.onerror = () => this.#on.skipped("The pictures could not be read by this browser.");
  }

  get state() {
    return this.#state;
  }

  get isLive() {
    return this.#state === "live" || this.#state === "paused";
  }

  get isOver() {
    return this.#state === "ended" || this.#state === "lost";
  }

  /** Held actions, as the transitions that led to them. -> the event id, or null when there is nobody to tell. */
  sendKeys(transitions) {
    return this.sendEvent("camera_actions", statePayload(transitions));
  }

  sendPrompt(prompt, heldActions) {
    return this.sendEvent("composite_input", promptPayload(prompt, heldActions, this.#clock.now()));
  }

  sendEvent(kind, payload) {
    if (this.isOver || this.#state === "connecting") return null;
    const eventId = this.#nextEventId();
    this.latency.sent(eventId, this.#clock.now());
    this.#socket.send(eventMessage(kind, payload, eventId));
    return eventId;
  }

  pause(wanted) {
    if (!this.isLive) return;
    this.#socket.send(eventMessage(wanted ? "pause" : "resume", null, undefined));
    this.#enter(wanted ? "paused" : "live");
  }

  /** Ends the session from this side; `over` is told at once, as a normal end. */
  stop() {
    if (this.isOver) return;
    this.#hangUp("stopped");
    this.#finish({ normal: true, code: NORMAL_CLOSE, words: "", errorCode: null });
  }

  #enter(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#on.state(state);
  }

  #receive(data) {
    if (this.isOver) return;
    this.#heardAt = this.#clock.now();
    let arrived;
    try {
      arrived = this.#reader.read(data);
    } catch (error) {
      this.#on.skipped(`A message from the server could not be read: ${error.message}`);
      return;
    }
    if (arrived?.header) this.#frames(arrived);
    else if (arrived) this.#message(arrived.message);
  }

  #frames({ header, payload }) {
    const arrivedAt = this.#clock.now();
    this.latency.arrived(header.event_id ?? null, arrivedAt);
    const id = this.#nextJob++;
    this.#jobs.set(id, { header, arrivedAt });
    // A payload inside its header map is a part of a larger buffer: it is copied, one of its own is handed over.
    const whole = payload.byteLength === payload.buffer.byteLength;
    this.#worker.postMessage({ id, header, payload }, whole ? [payload.buffer] : []);
  }

  #decoded({ id, images, decodeMs, error }) {
    const job = this.#jobs.get(id);
    this.#jobs.delete(id);
    if (error !== undefined || this.isOver) {
      images?.forEach((image) => image.close());
      if (error !== undefined) this.#on.skipped(`A few pictures were skipped: ${error}`);
      return;
    }
    const { header, arrivedAt } = job;
    const now = this.#clock.now();
    const eventId = header.event_id ?? null;
    this.latency.decoded(eventId, now);
    if (this.#state === "opening" || this.#state === "waiting") this.#enter("live");
    const shared = { eventId, chunkIndex: header.chunk_index, arrivedAt, decodedAt: now, decodeMs };
    this.#on.frames(images.map((image) => ({ image, ...shared })));
  }

  #message(message) {
    switch (message.type) {
      case "chunk_stats":
        this.#on.stats(message);
        break;
      case "session":
        this.capabilities = message.capabilities ?? {};
        if (this.#state === "waiting") this.#enter("opening");
        if (this.capabilities.extensions?.includes("heartbeat")) this.#listen();
        break;
      case "queue":
        if (message.position > 0) this.#enter("waiting");
        this.#on.queue(message.position);
        break;
      case "control_ack":
        if (message.state === "applied" && message.event_id !== undefined) {
          this.latency.applied(message.event_id, message.chunk_index, this.#clock.now());
          this.#on.applied(message.event_id, message.chunk_index);
        }
        break;
      case "error":
        this.#error(message);
        break;
      default: // a heartbeat, or something newer than this page
    }
  }

  #error(message) {
    const words = String(message.content ?? "");
    if (this.isLive && words.startsWith("invalid event")) {
      this.#on.refused(words);
      return;
    }
    this.#lastError = { words, code: message.code ?? null };
    // A refused init leaves the socket open for another try; this page starts anew instead.
    if (!this.isLive && words.startsWith("invalid generate request")) this.#abandon();
    else if (!this.isLive && message.code === "not_ready") this.#abandon();
  }

  #abandon() {
    this.#hangUp("init refused");
    this.#closed(1008, "");
  }

  /** A server whose heart beats is never silent for long: a line that died without a close is noticed here. */
  #listen() {
    const planned = this.#heardAt + SILENCE_MS;
    this.#watch = this.#clock.setTimeout(() => {
      const now = this.#clock.now();
      if (now - planned > SLEPT_MS) this.#heardAt = now;
      if (now - this.#heardAt < SILENCE_MS) return this.#listen();
      this.#hangUp("nothing heard");
      this.#closed(1006, `Nothing was heard from the server for ${SILENCE_MS / 1000} s.`);
    }, planned - this.#clock.now());
  }

  #hangUp(reason) {
    this.#socket.onclose = null;
    this.#socket.close(NORMAL_CLOSE, reason);
  }

  #closed(code, reason) {
    const normal = code === NORMAL_CLOSE && this.#lastError === null;
    const words = this.#lastError?.words || reason || "";
    this.#finish({ normal, code, words, errorCode: this.#lastError?.code ?? null });
  }

  #finish(end) {
    const wasLive = this.isLive;
    this.latency.forget();
    if (this.#watch !== null) this.#clock.clearTimeout(this.#watch);
    this.#enter(end.normal ? "ended" : "lost");
    this.#worker.terminate();
    this.#on.over({ ...end, wasLive });
  }
}
