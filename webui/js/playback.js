// A jitter buffer: decides when each frame is drawn. No clock, no DOM: times are arguments, in milliseconds.

const MODES = {
  "low-latency": { minDelay: 150, maxDelay: 600, baseDelay: 100, jitterFactor: 1.25 },
  smooth: { minDelay: 500, maxDelay: 2000, baseDelay: 350, jitterFactor: 2 },
};

const WINDOW_CHUNKS = 8;
const WINDOW_BATCHES = 4;
const MIN_RATE = 0.8;
const MAX_RATE = 1.25;
const STEERING_MS = 500; // a surplus of this much would change the rate by 1
const SKIP_MS = 1500; // a larger surplus is skipped instead of played faster
const STALL_MS = 700;
const AWAY_MS = 1000; // without a call of take(): the tab was hidden
const MAX_QUEUED_MS = 4000; // more than the largest delay and surplus

/**
 * A queue of frames {eventId, chunkIndex, ...} whose target delay follows the jitter of the arrivals.
 *
 * `targetDelay` is how much should still be queued when a batch arrives. The playback rate moves towards it, between
 * 0.8 and 1.25 of the stream's frame rate. Frames that carry a newer event are drawn at once: older queued frames are
 * dropped, and the delay grows back while the new ones play.
 *
 * In a hidden tab frames still arrive, but nobody takes them: the oldest are dropped, and when the tab is shown again
 * only the target delay is kept.
 */
export class Playback {
  #mode;
  #paced;
  #nominal;
  #interval;
  #queue = [];
  #drop;
  #isBuffering = true;
  #bufferingSince = null;
  #nextDue = 0;
  #rate = 1;
  #eventId = null;
  #hasStarted = false;
  #margins = [];
  #mediaMs = 0; // of all frames pushed
  #lateness = []; // per chunk: arrival of its latest batch minus mediaMs
  #latenessChunk = null;
  #idleSince = null;
  #takenAt = null;
  #chunk = { index: null, length: 0, longest: 0 }; // of the newest chunk, in frames

  /** `paced`: the server sends in real time. `drop(frame)` is called for every frame that is not drawn. */
  constructor({ fps, paced = true, mode = "low-latency", drop = () => {} }) {
    this.#nominal = this.#interval = 1000 / fps;
    this.#paced = paced;
    this.#mode = MODES[mode];
    this.#drop = drop;
  }

  set mode(name) {
    this.#mode = MODES[name];
  }

  get bufferedMs() {
    return this.#queue.length * this.#interval;
  }

  get targetDelay() {
    const { minDelay, maxDelay, baseDelay, jitterFactor } = this.#mode;
    const jitter = this.#lateness.length ? Math.max(...this.#lateness) - Math.min(...this.#lateness) : 0;
    return Math.min(Math.max(baseDelay + jitterFactor * jitter, minDelay), maxDelay);
  }

  /** A chunk took `totalMs` for `numFrames`. Adapts the frame interval. A paced stream never exceeds its fps. */
  chunkTook(totalMs, numFrames) {
    const measured = totalMs / numFrames;
    const target = this.#paced ? Math.max(measured, this.#nominal) : measured;
    this.#interval += 0.3 * (target - this.#interval);
  }

  /** Adds a decoded batch. */
  push(frames, now) {
    const newer = frames.findIndex(({ eventId }) => eventId !== null && eventId !== this.#eventId);
    const isCutover = newer >= 0 && this.#hasStarted;
    if (isCutover) {
      this.#dropQueue();
      frames.slice(0, newer).forEach(this.#drop);
      frames = frames.slice(newer);
      this.#restartClocks();
    } else if (this.#hasStarted && !this.#isBuffering) {
      this.#steer(now);
    }
    if (frames.at(-1).eventId !== null) this.#eventId = frames.at(-1).eventId;
    this.#measure(frames, now);
    this.#queue.push(...frames);
    this.#bound(frames);
    if (isCutover || !this.#hasStarted) {
      // The first frame is drawn at once. The delay builds up while it plays.
      this.#isBuffering = false;
      this.#nextDue = now;
      this.#hasStarted = true;
    }
    this.#idleSince ??= now;
  }

  /** The frame to draw now, or null. Skips frames whose display time has passed. */
  take(now) {
    if (this.#takenAt !== null && now - this.#takenAt > AWAY_MS) this.#catchUp(now);
    this.#takenAt = now;
    if (this.#isBuffering && !this.#endBuffering(now)) return null;
    if (now < this.#nextDue) return null;
    if (!this.#queue.length) {
      this.#isBuffering = true;
      this.#bufferingSince = null;
      return null;
    }
    const step = this.#interval / this.#rate;
    const late = Math.floor((now - this.#nextDue) / step);
    const skipped = Math.min(late, this.#queue.length - 1);
    for (let i = 0; i < skipped; i++) this.#drop(this.#queue.shift());
    this.#nextDue += (skipped + 1) * step;
    if (this.#nextDue < now) this.#nextDue = now;
    this.#idleSince = now;
    return this.#queue.shift();
  }

  /** How long no frame has been drawn; 0 below the stall threshold. */
  stalledMs(now) {
    if (this.#idleSince === null) return 0;
    const idle = now - this.#idleSince;
    return idle > Math.max(STALL_MS, 4 * this.#interval) ? idle : 0;
  }

  /** The session is paused: queued frames still play, and running out of them is not a stall. */
  pausedAt(now) {
    this.#idleSince = now;
    this.#restartClocks();
  }

  clear() {
    this.#dropQueue();
    this.#isBuffering = true;
    this.#bufferingSince = null;
  }

  #dropQueue() {
    this.#queue.forEach(this.#drop);
    this.#queue = [];
  }

  /** Drops the oldest frames beyond the limit. A slow server sends whole chunks at once, so two of those always fit. */
  #bound(frames) {
    const { chunkIndex: index } = frames.at(-1);
    const length = frames.length + (index === this.#chunk.index ? this.#chunk.length : 0);
    this.#chunk = { index, length, longest: Math.max(length, this.#chunk.longest) };
    this.#keepNewest(Math.max(Math.ceil(MAX_QUEUED_MS / this.#interval), 2 * this.#chunk.longest));
  }

  /** The tab is shown again. */
  #catchUp(now) {
    this.#keepNewest(Math.max(Math.ceil(this.targetDelay / this.#interval), this.#chunk.length));
    this.#nextDue = now;
    this.#restartClocks();
  }

  #keepNewest(count) {
    this.#queue.splice(0, Math.max(this.#queue.length - count, 0)).forEach(this.#drop);
  }

  #endBuffering(now) {
    if (!this.#queue.length) return false;
    this.#bufferingSince ??= now;
    if (this.bufferedMs < this.targetDelay && now - this.#bufferingSince < this.targetDelay) return false;
    this.#isBuffering = false;
    this.#nextDue = now;
    return true;
  }

  /** Sets the rate. Runs before a batch is added: what is queued then is the margin against a stall. */
  #steer(now) {
    const margin = this.bufferedMs + Math.max(this.#nextDue - now, 0);
    this.#margins.push(margin);
    if (this.#margins.length > WINDOW_BATCHES) this.#margins.shift();
    const surplus = Math.min(...this.#margins) - this.targetDelay;
    this.#rate = Math.min(Math.max(1 + surplus / STEERING_MS, MIN_RATE), MAX_RATE);
    if (surplus > SKIP_MS) {
      const skip = Math.min(Math.floor(surplus / this.#interval), this.#queue.length);
      this.#queue.splice(0, skip).forEach(this.#drop);
      this.#margins = [];
    }
  }

  /** Records how late each chunk's latest batch arrived, against a clock that advances with the frames. */
  #measure(frames, now) {
    const chunk = frames.at(-1).chunkIndex;
    const offset = now - this.#mediaMs;
    if (chunk === this.#latenessChunk) {
      this.#lateness[this.#lateness.length - 1] = Math.max(this.#lateness.at(-1), offset);
    } else {
      this.#lateness.push(offset);
      if (this.#lateness.length > WINDOW_CHUNKS) this.#lateness.shift();
      this.#latenessChunk = chunk;
    }
    this.#mediaMs += frames.length * this.#interval;
  }

  #restartClocks() {
    this.#margins = [];
    this.#rate = 1;
    this.#mediaMs = 0;
    this.#lateness = [];
    this.#latenessChunk = null;
  }
}
