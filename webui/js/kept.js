// What the page keeps of a session, so that it can go on after a lost line. No DOM; times are arguments.

const KEPT_EVENTS = 1024;
const DELAYS_MS = [0, 250, 500, 1000, 2000, 4000];
const ANSWERED = ["rewind", "branch", "save"]; // with an answer of their own; until it comes they are sent again

/** The newest chunk of the session's line, and how many of its frames were decoded. */
export class ReceivedFrames {
  #chunk = 0;
  #frames = 0;

  add(chunkIndex, frames) {
    if (chunkIndex !== this.#chunk) this.wentOnAt(chunkIndex);
    this.#frames += frames;
  }

  /** The next frames are those of `chunkIndex`: nothing of it, or of later chunks, has come. */
  wentOnAt(chunkIndex) {
    this.#chunk = chunkIndex;
    this.#frames = 0;
  }

  /** A server that came back with an older world makes its later chunks again. */
  resumedAt(chunkIndex) {
    if (chunkIndex < this.#chunk) this.wentOnAt(chunkIndex);
  }

  /** What an init that resumes says of them. A server that is told nothing takes all that it sent for received. */
  get fields() {
    return { received_chunk: this.#chunk, received_frames: this.#frames };
  }
}

/** Events that the server has not acknowledged. */
export class EventsInFlight {
  #events = new Map();

  add(eventId, kind, message) {
    this.#events.set(eventId, { eventId, kind, message });
    if (this.#events.size > KEPT_EVENTS) this.#events.delete(this.#events.keys().next().value);
  }

  /** The messages to send on a new line, in order. */
  takeAll() {
    return [...this.#events.values()].map(({ message }) => message);
  }

  received(eventId) {
    if (!ANSWERED.includes(this.#events.get(eventId)?.kind)) this.#events.delete(eventId);
  }

  answered(eventId) {
    this.#events.delete(eventId);
  }

  /** No chunk will do it. Returns the event if it waited for an answer of its own, else null. */
  dropped(eventId) {
    const event = this.#events.get(eventId);
    this.#events.delete(eventId);
    return event && ANSWERED.includes(event.kind) ? event : null;
  }

  /**
   * {eventId, kind} of the event that the server refused just now; null if it is none that is known. `eventId` null: the
   * server says it for those with an answer of their own. It answers to the others in order, so it is the oldest of them.
   */
  refused(eventId) {
    const events = [...this.#events.values()];
    const isIt = eventId === null ? ({ kind }) => !ANSWERED.includes(kind) : (event) => event.eventId === eventId;
    const event = events.find(isIt) ?? null;
    if (event) this.#events.delete(event.eventId);
    return event;
  }
}

/**
 * Tries a lost line again: at once, then ever more rarely, until `limitMs` have passed in silence.
 *
 * `attempt()` begins one try; afterwards `failed()` or `stop()` is called. `giveUp()` runs after the last one.
 */
export class Comeback {
  #clock;
  #attempt;
  #giveUp;
  #limitMs;
  #until;
  #tries = 0;
  #timer = null;

  constructor({ limitMs, clock, attempt, giveUp }) {
    this.#clock = clock;
    this.#attempt = attempt;
    this.#giveUp = giveUp;
    this.#limitMs = limitMs;
    this.#until = clock.now() + limitMs;
    this.#plan();
  }

  /** The newest try ended without the session. `serverLoads`: the time counts from when the server is ready. */
  failed({ serverLoads = false } = {}) {
    if (serverLoads) this.#until = this.#clock.now() + this.#limitMs;
    this.#plan();
  }

  /** The network is back: the next try is made now, if it is not made already. */
  hurry() {
    if (this.#timer === null) return;
    this.#clock.clearTimeout(this.#timer);
    this.#run();
  }

  stop() {
    if (this.#timer !== null) this.#clock.clearTimeout(this.#timer);
    this.#timer = null;
  }

  #plan() {
    const delay = Math.min(DELAYS_MS[Math.min(this.#tries, DELAYS_MS.length - 1)], this.#limitMs);
    if (this.#tries && this.#clock.now() + delay > this.#until) {
      this.#giveUp();
      return;
    }
    this.#timer = this.#clock.setTimeout(() => this.#run(), delay);
  }

  #run() {
    this.#timer = null;
    this.#tries++;
    this.#attempt();
  }
}
