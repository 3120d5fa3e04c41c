// From a key to the picture that carries it, measured on this page, and where the time went.

const KEPT = 240;

/**
 * Event ids on their way. `drawn` closes every event that the drawn frame carries (its own and all older ones).
 *
 * A sample's parts add up to its total: `wait` until a chunk took the event up, `make` until its first frame arrived,
 * `decode`, and `draw` until the frame was on the canvas. Without control_ack `wait` is part of `make`.
 */
export class LatencyMeter {
  #pending = new Map();
  samples = [];

  sent(eventId, now) {
    this.#pending.set(eventId, { sent: now });
  }

  applied(eventId, chunkIndex, now) {
    this.#mark(eventId, "applied", now);
    for (const [id, entry] of this.#pending) if (id <= eventId) entry.chunkIndex ??= chunkIndex;
  }

  arrived(eventId, now) {
    this.#mark(eventId, "arrived", now);
  }

  decoded(eventId, now) {
    this.#mark(eventId, "decoded", now);
  }

  /** -> the samples this frame completed, oldest event first. */
  drawn(eventId, now) {
    const done = [];
    if (eventId === null) return done;
    for (const [id, entry] of this.#pending) {
      if (id > eventId) continue;
      this.#pending.delete(id);
      const { sent } = entry;
      const decoded = entry.decoded ?? now;
      const arrived = entry.arrived ?? decoded;
      const applied = entry.applied ?? sent;
      done.push({
        eventId: id,
        chunkIndex: entry.chunkIndex ?? null,
        totalMs: now - sent,
        parts: { wait: applied - sent, make: arrived - applied, decode: decoded - arrived, draw: now - decoded },
      });
    }
    this.samples.push(...done);
    if (this.samples.length > KEPT) this.samples.splice(0, this.samples.length - KEPT);
    return done;
  }

  /** Events that will never be answered: the session is over. */
  forget() {
    this.#pending.clear();
  }

  /** {count, medianMs, slowestMs, parts} of the last `count` samples, or null. */
  summary(count = KEPT) {
    const recent = this.samples.slice(-count);
    if (!recent.length) return null;
    const parts = {};
    for (const name of ["wait", "make", "decode", "draw"]) parts[name] = median(recent.map((s) => s.parts[name]));
    const totals = recent.map((sample) => sample.totalMs);
    return { count: recent.length, medianMs: median(totals), slowestMs: Math.max(...totals), parts };
  }

  #mark(eventId, name, now) {
    if (eventId === null || eventId === undefined) return;
    for (const [id, entry] of this.#pending) if (id <= eventId) entry[name] ??= now;
  }
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Frames drawn in the last second. */
export class RateMeter {
  #times = [];

  tick(now) {
    this.#times.push(now);
    this.#trim(now);
  }

  perSecond(now) {
    this.#trim(now);
    return this.#times.length;
  }

  #trim(now) {
    while (this.#times.length && this.#times[0] <= now - 1000) this.#times.shift();
  }
}
