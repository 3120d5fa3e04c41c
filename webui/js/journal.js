// What happened in a session: its init, and every event with the chunk that took it up. Saved as JSON and replayed.

export const FORMAT = "lingbot-rt page session";
const VERSION = 1;

export class JournalError extends Error {}

export class Journal {
  #events = [];

  /** `init` holds the wire's fields, its first_frame as bytes. */
  constructor({ model, init, firstFrameType, startedAt }) {
    this.model = model;
    this.init = init;
    this.firstFrameType = firstFrameType;
    this.startedAt = startedAt;
  }

  get events() {
    return this.#events;
  }

  /** `at`: milliseconds since the session's first picture, negative before it. */
  add({ kind, payload, eventId, at }) {
    this.#events.push({ kind, payload, event_id: eventId, at_ms: Math.round(at), chunk_index: null });
  }

  /** Chunk `chunkIndex` was made with `eventId` in force. */
  applied(eventId, chunkIndex) {
    for (let i = this.#events.length - 1; i >= 0; i--) {
      const event = this.#events[i];
      if (event.event_id > eventId) continue;
      if (event.chunk_index !== null) return;
      event.chunk_index = chunkIndex;
    }
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
    };
  }
}

/** The text of a saved session -> {model, init, firstFrameType, events}. Throws JournalError in words for people. */
export function parseJournal(text) {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    throw new JournalError("This file is not a saved session: it is not JSON.");
  }
  if (saved?.format !== FORMAT) throw new JournalError("This file is not a session saved by this page.");
  if (saved.version !== VERSION) throw new JournalError(`This session was saved by another version (${saved.version}).`);
  if (typeof saved.init?.prompt !== "string" || typeof saved.first_frame?.base64 !== "string" || !Array.isArray(saved.events))
    throw new JournalError("This saved session is incomplete.");
  let bytes;
  try {
    bytes = fromBase64(saved.first_frame.base64);
  } catch {
    throw new JournalError("The first picture in this saved session is damaged.");
  }
  return {
    model: saved.model,
    init: { ...saved.init, first_frame: bytes },
    firstFrameType: saved.first_frame.type,
    events: saved.events,
  };
}

/**
 * Gives each event back in time for the chunk that took it up: an event of chunk n leaves when the first frames of
 * chunk n-1 arrive, when chunk n-1 is certainly planned and chunk n waits for the pace.
 */
export class Replay {
  #waiting;

  constructor(events) {
    let chunk = 0;
    // An event that no chunk was seen to take up goes with the one before it.
    this.#waiting = events.map((event) => ({ ...event, chunk_index: (chunk = Math.max(event.chunk_index ?? chunk, chunk)) }));
  }

  get remaining() {
    return this.#waiting.length;
  }

  /** The newest chunk seen; -1 when the session has just begun. -> events to send now, in order. */
  reached(chunkIndex) {
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
