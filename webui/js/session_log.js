// A session as a log: its init, and every event with the chunk that applied it. Saved as JSON and replayed.

const FORMAT = "lingbot-rt page session";
const VERSION = 1;
const TAIL_CHUNKS = 4; // played after the last event of a file that does not say how long the session was

export class SessionFileError extends Error {}

export class SessionLog {
  #events;
  #chunks = 0;
  #branch = 0;
  #others = new Map(); // branch -> {events, chunks} of the lines that the session is not on

  /** `init` holds the fields of the init message, first_frame as bytes. A replay begins with the `events` it repeats. */
  constructor({ model, init, firstFrameType, startedAt, events = [] }) {
    this.#events = [...events];
    this.model = model;
    this.init = init;
    this.firstFrameType = firstFrameType;
    this.startedAt = startedAt;
  }

  get events() {
    return this.#events;
  }

  /** `at` is in milliseconds since the first drawn frame; 0 before it. */
  add({ kind, payload, eventId, at }) {
    this.#events.push({ kind, payload, event_id: eventId, at_ms: Math.round(at), chunk_index: null });
  }

  /** Chunk `chunkIndex` was generated with event `eventId` and all older ones applied. */
  applied(eventId, chunkIndex) {
    for (let i = this.#events.length - 1; i >= 0; i--) {
      const event = this.#events[i];
      if (event.event_id > eventId) continue;
      if (event.chunk_index !== null) return;
      event.chunk_index = chunkIndex;
    }
  }

  /** Chunk `chunkIndex` arrived. */
  chunkCame(chunkIndex) {
    this.#chunks = Math.max(this.#chunks, chunkIndex + 1);
  }

  /**
   * The session went back to just before `chunkIndex` of the branch `source` and goes on as `branch`. The log is then of
   * the line that leads there. `held` {kind, payload, eventId} is the event of what is held at that moment.
   */
  wentBack({ source, branch, chunkIndex, held }) {
    this.#others.set(this.#branch, { events: this.#events, chunks: this.#chunks });
    const { events } = this.#others.get(source) ?? { events: [] };
    this.#events = events.filter(({ chunk_index: chunk }) => chunk !== null && chunk < chunkIndex);
    this.#branch = branch;
    this.#chunks = chunkIndex;
    this.add({ ...held, at: this.#events.at(-1)?.at_ms ?? 0 });
    this.#events.at(-1).chunk_index = chunkIndex;
  }

  toJSON() {
    const { first_frame: bytes, ...init } = this.init;
    return {
      format: FORMAT,
      version: VERSION,
      model: this.model,
      started_at: this.startedAt,
      init,
      first_frame: { type: this.firstFrameType, base64: toBase64(bytes) },
      events: this.#events,
      chunks: this.#chunks,
    };
  }
}

/** A saved session's text -> {model, init, firstFrameType, events, chunks}. Throws SessionFileError, for the user. */
export function parseSession(text) {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    throw new SessionFileError("This file is not a saved session: it is not JSON.");
  }
  if (saved?.format !== FORMAT) throw new SessionFileError("This page did not save this file.");
  if (saved.version !== VERSION)
    throw new SessionFileError(
      `This session has the file version ${saved.version}. This page reads version ${VERSION}.`,
    );
  if (
    typeof saved.init?.prompt !== "string" ||
    typeof saved.first_frame?.base64 !== "string" ||
    !Array.isArray(saved.events)
  )
    throw new SessionFileError("This saved session is incomplete.");
  let bytes;
  try {
    bytes = fromBase64(saved.first_frame.base64);
  } catch {
    throw new SessionFileError("The first frame in this saved session is damaged.");
  }
  const lastChunk = Math.max(-1, ...saved.events.map((event) => event?.chunk_index ?? -1));
  return {
    model: saved.model,
    init: { ...saved.init, first_frame: bytes },
    firstFrameType: saved.first_frame.type,
    events: saved.events,
    chunks: Number.isSafeInteger(saved.chunks) && saved.chunks > 0 ? saved.chunks : lastChunk + 1 + TAIL_CHUNKS,
  };
}

/**
 * Sends each event in time for the chunk that applied it. An event of chunk n is due when the first frames of chunk n-1
 * arrive: then chunk n-1 has been planned, and chunk n still waits for its pacing.
 */
export class Replay {
  #waiting;

  constructor(events) {
    let chunk = 0;
    // An event without a known chunk is sent with the event before it.
    this.#waiting = events.map((event) => ({
      ...event,
      chunk_index: (chunk = Math.max(event.chunk_index ?? chunk, chunk)),
    }));
  }

  /** Takes out the events to send now, in order. `chunkIndex` is the newest chunk that arrived, -1 at the start. */
  takeDue(chunkIndex) {
    const count = this.#waiting.findIndex((event) => event.chunk_index > chunkIndex + 1);
    return this.#waiting.splice(0, count < 0 ? this.#waiting.length : count);
  }
}

function toBase64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
