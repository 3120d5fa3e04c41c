// A running world: session, playback and journal together, and the loop that draws.

import { Journal, Replay } from "./journal.js";
import { TransitionSender } from "./held_keys.js";
import { RateMeter } from "./latency.js";
import { Playback } from "./playback.js";
import { WorldSession } from "./session.js";

const clock = {
  now: () => performance.now(),
  setTimeout: (run, ms) => setTimeout(run, ms),
  clearTimeout: (timer) => clearTimeout(timer),
};
const DRAW_AVERAGE = 0.2;

/**
 * `on` has state(name), queue(place), drawn(frame, now), latency(samples), stats(chunk_stats, drawMs), tick(now, stalledMs),
 * skipped(words), refused(words) and over(end).
 */
export class Player {
  #canvas;
  #context;
  #on;
  #session = null;
  #playback = null;
  #sender = null;
  #replay = null;
  #heldActions = [];
  #nextEventId = 1;
  #drawMs = 0;
  #loop = null;
  #fps = new RateMeter();

  journal = null;
  init = null;
  firstPictureAt = null;
  hasPicture = false;

  constructor(canvas, on) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false, desynchronized: true });
    this.#on = on;
  }

  get isLive() {
    return this.#session?.isLive ?? false;
  }

  get isRunning() {
    return this.#session !== null && !this.#session.isOver;
  }

  get latency() {
    return this.#session?.latency ?? null;
  }

  set playbackMode(mode) {
    if (this.#playback) this.#playback.mode = mode;
  }

  /** `events` of a saved session are played again, `model` is the entry of the server that will make them. */
  start({ url, init, firstFrameType, model, mode, events = [] }) {
    this.stop();
    this.init = init;
    this.firstPictureAt = null;
    this.journal = new Journal({ model: model.id, init, firstFrameType, startedAt: new Date().toISOString() });
    this.#playback = new Playback({ fps: init.fps, paced: init.realtime_output_pacing, mode, drop: ({ image }) => image.close() });
    const sentInit = this.#prepareReplay(init, events, model);
    const session = new WorldSession({
      socket: new WebSocket(url),
      worker: new Worker(new URL("decode_worker.js", import.meta.url), { type: "module" }),
      init: sentInit,
      clock,
      nextEventId: () => this.#nextEventId++,
      on: this.#sessionEvents(),
    });
    this.#session = session;
    this.#sender = new TransitionSender((transitions) => this.#sendKeys(transitions), clock);
    this.#on.state("connecting");
    this.#loop ??= requestAnimationFrame(this.#frame);
  }

  stop() {
    this.#session?.stop();
  }

  pause(wanted) {
    this.#session?.pause(wanted);
    this.#playback?.rest(clock.now());
  }

  /** The held actions changed; they count from now on, and from the start when nothing is live yet. */
  hold(actions) {
    this.#heldActions = actions;
    if (this.isLive) this.#sender.change(actions);
  }

  say(prompt) {
    const eventId = this.#session.sendPrompt(prompt, this.#heldActions);
    if (eventId === null) return null;
    this.#note("composite_input", { input_types: ["camera_actions", "prompt"], camera_actions: { mode: "state", transitions: [{ actions: this.#heldActions }] }, prompt }, eventId);
    return eventId;
  }

  meters(now) {
    const last = this.latency?.samples.at(-1);
    return { now, latencyMs: last?.totalMs ?? null, fps: this.#fps.perSecond(now), bufferMs: this.#playback?.bufferedMs ?? 0 };
  }

  #sendKeys(transitions) {
    const eventId = this.#session.sendKeys(transitions);
    if (eventId === null) return;
    const payload = { mode: "state", transitions: transitions.map(({ actions }) => ({ actions })) };
    this.#note("camera_actions", payload, eventId);
  }

  #note(kind, payload, eventId) {
    const at = this.firstPictureAt === null ? 0 : clock.now() - this.firstPictureAt;
    this.journal.add({ kind, payload, eventId, at });
  }

  /** A server that pins events plays them exactly; for any other they are sent in time. */
  #prepareReplay(init, events, model) {
    this.#replay = null;
    if (!events.length) return init;
    this.#nextEventId = Math.max(this.#nextEventId, ...events.map(({ event_id: id }) => id + 1));
    if (!model.extensions.includes("pinned_events")) {
      this.#replay = new Replay(events);
      return init;
    }
    const known = events.filter(({ chunk_index: chunk }) => chunk !== null);
    return { ...init, pinned_events: known.map(({ chunk_index: chunk, kind, payload, event_id }) => ({ chunk, kind, payload, event_id })) };
  }

  #sessionEvents() {
    return {
      state: (state) => {
        if (state === "live") {
          this.#sender.resend = this.#session.capabilities.resend_held_keys === true;
          if (this.#heldActions.length) this.#sender.change(this.#heldActions);
        }
        this.#on.state(state);
      },
      queue: (place) => this.#on.queue(place),
      frames: (frames) => {
        for (const event of this.#replay?.reached(frames.at(-1).chunkIndex) ?? []) this.#session.sendEvent(event.kind, event.payload);
        this.#playback.push(frames, clock.now());
      },
      stats: (stats) => {
        this.#playback.pace(stats.chunk_total_ms, Math.max(stats.num_frames, 1));
        this.#on.stats(stats, this.#drawMs);
      },
      applied: (eventId, chunkIndex) => this.journal.applied(eventId, chunkIndex),
      skipped: (words) => this.#on.skipped(words),
      refused: (words) => this.#on.refused(words),
      over: (end) => {
        this.#sender.stop();
        this.#playback.clear();
        this.#on.over(end);
      },
    };
  }

  #frame = () => {
    this.#loop = this.isRunning ? requestAnimationFrame(this.#frame) : null;
    if (this.isLive) {
      const now = clock.now();
      const frame = this.#playback.take(now);
      if (frame) this.#draw(frame);
      if (this.#session.state === "paused") this.#playback.rest(now);
      this.#on.tick(now, this.#session.state === "live" ? this.#playback.stalledMs(now) : 0);
    }
  };

  #draw(frame) {
    const { image } = frame;
    const began = clock.now();
    if (this.#canvas.width !== image.width || this.#canvas.height !== image.height) {
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
    }
    this.#context.drawImage(image, 0, 0);
    image.close();
    const now = clock.now();
    this.firstPictureAt ??= now;
    this.hasPicture = true;
    this.#fps.tick(now);
    const shown = now - began + (began - frame.decodedAt);
    this.#drawMs += DRAW_AVERAGE * (shown - this.#drawMs);
    const samples = this.latency.drawn(frame.eventId, now);
    if (samples.length) this.#on.latency(samples);
    this.#on.drawn(frame, now);
  }
}
