// One session: from the WebSocket to decoded frames. The socket, the worker and the clock are arguments, for tests.

import { EventsInFlight, ReceivedFrames } from "./kept.js";
import { LatencyMeter } from "./latency.js";
import { EXTENSIONS, MessageReader, eventMessage, initMessage, promptPayload, statePayload } from "./wire.js";

const NORMAL_CLOSE = 1000;
const LINE_LOST_CLOSE = 4000; // after a normal close the server would not keep the session
const SILENCE_LIMIT_MS = 30_000; // six heartbeats
const SLEPT_MS = 5_000; // a timer this late means that the computer slept; received messages may still be unread

let nextJob = 0; // of all sessions: one that goes on shares the worker of the one before

/**
 * States: connecting -> (waiting) -> opening -> (warming -> opening) -> live <-> paused -> ended | lost.
 *
 * `on` has the callbacks state(name), queue(position, waitedMs), warming({size, expectedMs}), frames(frames),
 * stats(chunk_stats), applied(eventId, chunkIndex), skipped(detail) for data that could not be read, refused(detail,
 * event) for an event that the server refused, dropped(event) for a rewind, branch or save that is not done, opened({token, resumeMs, isResumed, branch}) when the server says that the
 * session is open, rewound({chunkIndex, branch, exact, eventId}), world(bytes), and ended({normal, code, message,
 * errorCode, wasLive}).
 *
 * `received` and `events` are those of the session before, and `isPaused` says whether that one was, when `init`
 * resumes it. The worker stays the caller's.
 */
export class Session {
  #socket;
  #worker;
  #on;
  #clock;
  #reader = new MessageReader();
  #jobs = new Map();
  #lastError = null;
  #state = "connecting";
  #nextEventId;
  #receivedAt = 0;
  #silenceTimer = null;

  #isPaused;

  latency = new LatencyMeter();
  capabilities = {};
  hasOpened = false; // the WebSocket did
  wasPaused = false; // when it ended

  constructor({ socket, worker, init, on, clock, nextEventId, received, events, isPaused = false }) {
    this.received = received ?? new ReceivedFrames();
    this.events = events ?? new EventsInFlight();
    this.#isPaused = isPaused;
    this.#socket = socket;
    this.#worker = worker;
    this.#on = on;
    this.#clock = clock;
    this.#nextEventId = nextEventId;
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.hasOpened = true;
      this.#enter("opening");
      socket.send(initMessage({ ...init, protocol_extensions: EXTENSIONS }));
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    worker.onmessage = ({ data }) => this.#decoded(data);
    worker.onerror = () => this.#on.skipped("The browser could not run the frame decoder.");
  }

  get state() {
    return this.#state;
  }

  get isLive() {
    return this.#state === "live" || this.#state === "paused";
  }

  get hasEnded() {
    return this.#state === "ended" || this.#state === "lost";
  }

  /** Sends transitions of the held actions. Returns the event id, or null if the session is not open. */
  sendKeys(transitions) {
    return this.sendEvent("camera_actions", statePayload(transitions));
  }

  sendPrompt(prompt, heldActions) {
    return this.sendEvent("composite_input", promptPayload(prompt, heldActions, this.#clock.now()));
  }

  sendEvent(kind, payload) {
    const eventId = this.request(kind, payload);
    if (eventId !== null) this.latency.sent(eventId, this.#clock.now());
    return eventId;
  }

  /** Sends an event that no frame answers. Returns its id, or null if the session is not open. */
  request(kind, payload) {
    if (this.hasEnded || this.#state === "connecting") return null;
    const eventId = this.#nextEventId();
    const message = eventMessage(kind, payload, eventId);
    this.events.add(eventId, kind, message);
    this.#socket.send(message);
    return eventId;
  }

  pause(isPaused) {
    if (!this.isLive) return;
    this.#isPaused = isPaused;
    this.#socket.send(eventMessage(isPaused ? "pause" : "resume", null, undefined));
    this.#enter(isPaused ? "paused" : "live");
  }

  /** Takes the line for lost. */
  abandon() {
    if (this.hasEnded) return;
    this.#closeSocket("no answer", LINE_LOST_CLOSE);
    this.#closed(1006, "The server does not answer.");
  }

  /** Ends the session from this side. `ended` is called at once, as a normal end. */
  stop() {
    if (this.hasEnded) return;
    this.#closeSocket("stopped");
    this.#end({ normal: true, code: NORMAL_CLOSE, message: "", errorCode: null });
  }

  #enter(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#on.state(state);
  }

  #receive(data) {
    if (this.hasEnded) return;
    this.#receivedAt = this.#clock.now();
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
    this.latency.arrived(header.event_id ?? null, this.#clock.now());
    const id = nextJob++;
    this.#jobs.set(id, header);
    // A payload inside its header message shares that message's buffer and is copied. A separate one is transferred.
    const isSeparate = payload.byteLength === payload.buffer.byteLength;
    this.#worker.postMessage({ id, header, payload }, isSeparate ? [payload.buffer] : []);
  }

  #decoded({ id, images, error }) {
    const header = this.#jobs.get(id);
    this.#jobs.delete(id);
    if (error !== undefined || this.hasEnded || !header || header.isStale) {
      images?.forEach((image) => image.close());
      if (error !== undefined && header) this.#on.skipped(`Some frames were skipped: ${error}`);
      return;
    }
    const now = this.#clock.now();
    const eventId = header.event_id ?? null;
    this.latency.decoded(eventId, now);
    if (["opening", "waiting", "warming"].includes(this.#state)) this.#enter("live");
    this.received.add(header.chunk_index, images.length);
    const shared = { eventId, chunkIndex: header.chunk_index, decodedAt: now };
    this.#on.frames(images.map((image) => ({ image, ...shared })));
  }

  #message(message) {
    switch (message.type) {
      case "chunk_stats":
        this.#on.stats(message);
        break;
      case "session":
        this.capabilities = message.capabilities ?? {};
        if (this.#state === "waiting" || this.#state === "warming") this.#enter("opening");
        if (this.capabilities.extensions?.includes("heartbeat")) this.#watchSilence();
        this.#opened(message);
        break;
      case "queue":
        this.#enter(message.position > 0 ? "waiting" : "opening");
        this.#on.queue(message.position, message.waited_ms ?? 0);
        // A server that says how long it was repeats the place every few seconds. Opening may take long in silence.
        if (message.position === 0) this.#stopWatching();
        else if (message.waited_ms !== undefined) this.#watchSilence();
        break;
      case "warming":
        this.#on.warming({ size: message.size, expectedMs: message.expected_ms ?? null });
        this.#enter("warming");
        this.#watchSilence(); // heartbeats come meanwhile
        break;
      case "rewound":
        this.#rewound(message);
        break;
      case "world":
        this.events.answered(message.event_id);
        this.#on.world(message.payload);
        break;
      case "control_ack":
        if (message.state === "received") this.events.received(message.event_id);
        if (message.state === "dropped") this.#dropped(message.event_id);
        if (message.state === "applied" && message.event_id !== undefined) {
          this.latency.applied(message.event_id, message.chunk_index, this.#clock.now());
          this.#on.applied(message.event_id, message.chunk_index);
        }
        break;
      case "error":
        this.#error(message);
        break;
      default: // a heartbeat, or a type that this page does not know
    }
  }

  #opened({ resume_token: token = null, resume_s: seconds = 0, resumed = false, ...place }) {
    this.#on.opened({ token, resumeMs: 1000 * seconds, isResumed: resumed, branch: place.branch ?? 0 });
    if (!resumed) return;
    if (place.chunk_index !== undefined) this.received.resumedAt(place.chunk_index);
    for (const event of this.events.takeAll()) this.#socket.send(event);
    if (!this.#isPaused) return;
    this.#socket.send(eventMessage("pause", null, undefined));
    this.#enter("paused");
  }

  #dropped(eventId) {
    const event = this.events.dropped(eventId);
    if (event) this.#on.dropped(event);
  }

  /** Frames of the old line that still decode are not shown. */
  #rewound({ chunk_index: chunkIndex, branch = 0, exact = true, event_id: eventId = null }) {
    for (const header of this.#jobs.values()) header.isStale = true;
    this.received.wentOnAt(chunkIndex);
    this.events.answered(eventId);
    this.#on.rewound({ chunkIndex, branch, exact, eventId });
  }

  #error(message) {
    const content = String(message.content ?? "");
    if (this.isLive && content.startsWith("invalid event")) {
      this.#on.refused(content, this.events.refused(message.event_id ?? null));
      return;
    }
    this.#lastError = { message: content, code: message.code ?? null };
    // After a refused init the server waits for another one. This page opens a new connection instead.
    if (!this.isLive && content.startsWith("invalid generate request")) this.#giveUp();
    else if (!this.isLive && message.code === "not_ready") this.#giveUp();
  }

  #giveUp() {
    this.#closeSocket("init refused");
    this.#closed(1008, "");
  }

  /** Ends the session if a server that sends heartbeats is silent: a connection can break without a close. */
  #watchSilence() {
    this.#stopWatching();
    const planned = this.#receivedAt + SILENCE_LIMIT_MS;
    this.#silenceTimer = this.#clock.setTimeout(() => {
      const now = this.#clock.now();
      if (now - planned > SLEPT_MS) this.#receivedAt = now;
      if (now - this.#receivedAt < SILENCE_LIMIT_MS) return this.#watchSilence();
      this.#closeSocket("server silent", LINE_LOST_CLOSE);
      this.#closed(1006, `The server sent nothing for ${SILENCE_LIMIT_MS / 1000} s.`);
    }, planned - this.#clock.now());
  }

  #stopWatching() {
    if (this.#silenceTimer !== null) this.#clock.clearTimeout(this.#silenceTimer);
    this.#silenceTimer = null;
  }

  #closeSocket(reason, code = NORMAL_CLOSE) {
    this.#socket.onclose = null;
    this.#socket.close(code, reason);
  }

  #closed(code, reason) {
    const normal = code === NORMAL_CLOSE && this.#lastError === null;
    const message = this.#lastError?.message || reason || "";
    this.#end({ normal, code, message, errorCode: this.#lastError?.code ?? null });
  }

  #end(end) {
    const wasLive = this.isLive;
    this.wasPaused = this.#isPaused;
    this.latency.clearPending();
    this.#stopWatching();
    this.#enter(end.normal ? "ended" : "lost");
    this.#on.ended({ ...end, wasLive });
  }
}
