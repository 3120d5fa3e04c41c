// Key-to-frame latency as the page measures it, and its parts.

const KEPT = 240;

/**
 * Times every event from its sending to the first drawn frame that carries it. A frame carries its own event and all
 * older ones.
 *
 * A sample's parts add up to its total: `wait` until a chunk applied the event, `generate` until its first frame
 * arrived, `decode`, and `draw` until the frame was on the canvas. Without control_ack `wait` is part of `generate`.
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

  /** A frame was drawn. Returns the samples it completed, oldest event first. */
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
        parts: { wait: applied - sent, generate: arrived - applied, decode: decoded - arrived, draw: now - decoded },
      });
    }
    this.samples.push(...done);
    if (this.samples.length > KEPT) this.samples.splice(0, this.samples.length - KEPT);
    return done;
  }

  /** The session ended: the pending events will not be answered. */
  clearPending() {
    this.#pending.clear();
  }

  /** {count, medianMs, slowestMs, parts} of the last 240 samples, or null; `parts` are medians. */
  summary() {
    if (!this.samples.length) return null;
    const parts = {};
    for (const name of ["wait", "generate", "decode", "draw"])
      parts[name] = median(this.samples.map((sample) => sample.parts[name]));
    const totals = this.samples.map((sample) => sample.totalMs);
    return { count: totals.length, medianMs: median(totals), slowestMs: Math.max(...totals), parts };
  }

  #mark(eventId, name, now) {
    if (eventId === null || eventId === undefined) return;
    for (const [id, entry] of this.#pending) if (id <= eventId) entry[name] ??= now;
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Counts frames drawn in the last second. */
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
