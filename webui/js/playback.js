// When each frame is drawn. Pure: frames and times go in, the frame that is due comes out. Times are milliseconds.

export const MODES = {
  "low-latency": { minLead: 150, maxLead: 600, base: 100, share: 1.25 },
  smooth: { minLead: 500, maxLead: 2000, base: 350, share: 2 },
};

const WINDOW_CHUNKS = 8;
const WINDOW_BATCHES = 4;
const SLOWEST = 0.8;
const FASTEST = 1.25;
const STEERING_MS = 500; // a lead that is off by this much would change the rate by one
const JUMP_MS = 1500; // beyond this surplus frames are skipped, not hurried through
const STALL_MS = 700;

/**
 * A queue of frames {eventId, chunkIndex, ...} with a lead that follows the arrivals' jitter.
 *
 * `lead` is what should still wait to be drawn when a batch arrives. The rate is steered gently towards it, between
 * 0.8 and 1.25 of the stream's pace. Frames that carry a newer event are drawn at once: what was queued before them is
 * dropped, and the lead grows back while they play.
 */
export class Playback {
  #mode;
  #paced;
  #nominal;
  #interval;
  #queue = [];
  #drop;
  #filling = true;
  #fillingSince = null;
  #nextDue = 0;
  #rate = 1;
  #eventId = null;
  #begun = false;
  #margins = [];
  #media = 0;
  #lateness = []; // of each chunk: arrival of its latest batch against the stream's own clock
  #latenessChunk = null;
  #lastTaken = null;
  #idleSince = null;

  /** `drop(frame)` is called for every frame that will never be drawn. */
  constructor({ fps, paced = true, mode = "low-latency", drop = () => {} }) {
    this.#nominal = this.#interval = 1000 / fps;
    this.#paced = paced;
    this.#mode = MODES[mode];
    this.#drop = drop;
  }

  set mode(name) {
    this.#mode = MODES[name];
  }

  get interval() {
    return this.#interval;
  }

  get bufferedMs() {
    return this.#queue.length * this.#interval;
  }

  get lead() {
    const { minLead, maxLead, base, share } = this.#mode;
    const jitter = this.#lateness.length ? Math.max(...this.#lateness) - Math.min(...this.#lateness) : 0;
    return Math.min(Math.max(base + share * jitter, minLead), maxLead);
  }

  get rate() {
    return this.#rate;
  }

  /** A chunk took `totalMs` for `numFrames`: the stream's pace. A paced stream is never played faster than its fps. */
  pace(totalMs, numFrames) {
    const measured = totalMs / numFrames;
    const target = this.#paced ? Math.max(measured, this.#nominal) : measured;
    this.#interval += 0.3 * (target - this.#interval);
  }

  /** A decoded batch. Returns how many older frames were dropped for it. */
  push(frames, now) {
    const newer = frames.findIndex(({ eventId }) => eventId !== null && eventId !== this.#eventId);
    const isCutover = newer >= 0 && this.#begun;
    let dropped = 0;
    if (isCutover) {
      dropped = this.#clear() + newer;
      frames.slice(0, newer).forEach(this.#drop);
      frames = frames.slice(newer);
      this.#restartClocks();
    } else if (this.#begun && !this.#filling) {
      this.#steer(now);
    }
    if (frames.at(-1).eventId !== null) this.#eventId = frames.at(-1).eventId;
    this.#measure(frames, now);
    this.#queue.push(...frames);
    if (isCutover || !this.#begun) {
      // The first frame is drawn at once; the lead of a new session is then filled behind it.
      this.#filling = false;
      this.#nextDue = now;
      this.#begun = true;
    }
    this.#idleSince ??= now;
    return dropped;
  }

  /** The frame to draw now, or null. Frames whose time has wholly passed are skipped. */
  take(now) {
    if (this.#filling && !this.#endFilling(now)) return null;
    if (now < this.#nextDue) return null;
    if (!this.#queue.length) {
      this.#filling = true;
      this.#fillingSince = null;
      return null;
    }
    const step = this.#interval / this.#rate;
    const late = Math.floor((now - this.#nextDue) / step);
    const skipped = Math.min(late, this.#queue.length - 1);
    for (let i = 0; i < skipped; i++) this.#drop(this.#queue.shift());
    this.#nextDue += (skipped + 1) * step;
    if (this.#nextDue < now) this.#nextDue = now;
    this.#lastTaken = this.#idleSince = now;
    return this.#queue.shift();
  }

  /** Milliseconds without a new frame, 0 while frames come as they should. */
  stalledMs(now) {
    if (this.#idleSince === null) return 0;
    const idle = now - this.#idleSince;
    return idle > Math.max(STALL_MS, 4 * this.#interval) ? idle : 0;
  }

  /** The world stands still on purpose: what is queued still plays, and its end is no stall. */
  rest(now) {
    this.#idleSince = now;
    this.#restartClocks();
  }

  clear() {
    this.#clear();
    this.#filling = true;
    this.#fillingSince = null;
  }

  #clear() {
    const count = this.#queue.length;
    this.#queue.forEach(this.#drop);
    this.#queue = [];
    return count;
  }

  #endFilling(now) {
    if (!this.#queue.length) return false;
    this.#fillingSince ??= now;
    if (this.bufferedMs < this.lead && now - this.#fillingSince < this.lead) return false;
    this.#filling = false;
    this.#nextDue = now;
    return true;
  }

  /** Before a batch is added: what waits now is the margin against an interruption. */
  #steer(now) {
    const margin = this.bufferedMs + Math.max(this.#nextDue - now, 0);
    this.#margins.push(margin);
    if (this.#margins.length > WINDOW_BATCHES) this.#margins.shift();
    const surplus = Math.min(...this.#margins) - this.lead;
    this.#rate = Math.min(Math.max(1 + surplus / STEERING_MS, SLOWEST), FASTEST);
    if (surplus > JUMP_MS) {
      const skip = Math.min(Math.floor(surplus / this.#interval), this.#queue.length);
      this.#queue.splice(0, skip).forEach(this.#drop);
      this.#margins = [];
    }
  }

  /** How late each chunk's latest batch came, against a clock that advances with the frames. */
  #measure(frames, now) {
    const chunk = frames.at(-1).chunkIndex;
    const offset = now - this.#media;
    if (chunk === this.#latenessChunk) {
      this.#lateness[this.#lateness.length - 1] = Math.max(this.#lateness.at(-1), offset);
    } else {
      this.#lateness.push(offset);
      if (this.#lateness.length > WINDOW_CHUNKS) this.#lateness.shift();
      this.#latenessChunk = chunk;
    }
    this.#media += frames.length * this.#interval;
  }

  #restartClocks() {
    this.#margins = [];
    this.#rate = 1;
    // The offsets seen so far stay as they are; the next one starts where the smallest of them was.
    this.#restartOffsets();
  }

  #restartOffsets() {
    this.#media = 0;
    this.#lateness = [];
    this.#latenessChunk = null;
  }
}
