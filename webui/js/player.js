// Runs a session: connects it to playback, the session log and the canvas, and draws on every animation frame.

import { TransitionSender } from "./held_keys.js";
import { RateMeter } from "./latency.js";
import { Playback } from "./playback.js";
import { Session } from "./session.js";
import { Replay, SessionLog } from "./session_log.js";
import { promptPayload, statePayload } from "./wire.js";

const clock = {
  now: () => performance.now(),
  setTimeout: (run, ms) => setTimeout(run, ms),
  clearTimeout: (timer) => clearTimeout(timer),
};
const DRAW_AVERAGE = 0.2; // weight of the newest frame in the moving average

/**
 * `on` has the callbacks state(name), queue(position, waitedMs), warming({size, expectedMs}), drawn(frame, now),
 * latency(samples), stats(chunk_stats, drawMs), tick(now, stalledMs), skipped(detail), refused(detail) and ended(end),
 * which also has hasOpened: whether the WebSocket ever opened.
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

  log = null;
  init = null;
  isReplay = false;
  firstDrawnAt = null;
  hasDrawn = false;

  constructor(canvas, on) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false, desynchronized: true });
    this.#on = on;
  }

  get isLive() {
    return this.#session?.isLive ?? false;
  }

  get isRunning() {
    return this.#session !== null && !this.#session.hasEnded;
  }

  get latency() {
    return this.#session?.latency ?? null;
  }

  set playbackMode(mode) {
    if (this.#playback) this.#playback.mode = mode;
  }

  /**
   * Starts a session. `model` comes from readModel. `saved`, if given, is a session to replay: its events are repeated,
   * it ends after its chunks, and held keys do not reach it.
   */
  start({ url, init, firstFrameType, model, mode, saved = null }) {
    this.stop();
    this.init = init;
    this.isReplay = saved !== null;
    this.firstDrawnAt = null;
    const startedAt = new Date().toISOString();
    this.log = new SessionLog({ model: model.id, init, firstFrameType, startedAt, events: saved?.events });
    this.#playback = new Playback({
      fps: init.fps,
      paced: init.realtime_output_pacing,
      mode,
      drop: ({ image }) => image.close(),
    });
    this.#replay = null;
    const sentInit = saved ? this.#prepareReplay(init, saved, model) : init;
    const session = new Session({
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
    this.#loop ??= requestAnimationFrame(this.#animate);
  }

  stop() {
    this.#session?.stop();
  }

  pause(isPaused) {
    this.#session?.pause(isPaused);
    this.#playback?.pausedAt(clock.now());
  }

  /** The held actions changed. Before a session is live they are kept and sent when it starts. */
  hold(actions) {
    this.#heldActions = actions;
    if (this.isLive && !this.isReplay) this.#sender.change(actions);
  }

  /** Sends a prompt. Returns its event id, or null if the session is not open. */
  sendPrompt(prompt) {
    const eventId = this.#session.sendPrompt(prompt, this.#heldActions);
    if (eventId === null) return null;
    this.#logEvent("composite_input", promptPayload(prompt, this.#heldActions), eventId);
    return eventId;
  }

  meters(now) {
    const last = this.latency?.samples.at(-1);
    return {
      now,
      latencyMs: last?.totalMs ?? null,
      fps: this.#fps.perSecond(now),
      bufferMs: this.#playback?.bufferedMs ?? 0,
    };
  }

  #sendKeys(transitions) {
    const eventId = this.#session.sendKeys(transitions);
    if (eventId === null) return;
    this.#logEvent("camera_actions", statePayload(transitions.map(({ actions }) => ({ actions }))), eventId);
  }

  #logEvent(kind, payload, eventId) {
    const at = this.firstDrawnAt === null ? 0 : clock.now() - this.firstDrawnAt;
    this.log.add({ kind, payload, eventId, at });
  }

  /** Servers with the pinned_events extension replay the events exactly. For others they are sent as chunks arrive. */
  #prepareReplay(init, { events, chunks }, model) {
    const limited = { ...init, max_chunks: Math.min(chunks, init.max_chunks ?? chunks) };
    if (!events.length) return limited;
    this.#nextEventId = Math.max(this.#nextEventId, ...events.map(({ event_id: id }) => id + 1));
    if (!model.extensions.includes("pinned_events")) {
      this.#replay = new Replay(events);
      return limited;
    }
    const known = events.filter(({ chunk_index: chunk }) => chunk !== null && chunk < limited.max_chunks);
    return {
      ...limited,
      pinned_events: known.map(({ chunk_index: chunk, kind, payload, event_id }) => ({
        chunk,
        kind,
        payload,
        event_id,
      })),
    };
  }

  #sessionEvents() {
    return {
      state: (state) => {
        if (state === "live") {
          this.#sender.resend = this.#session.capabilities.resend_held_keys === true;
          if (this.#heldActions.length && !this.isReplay) this.#sender.change(this.#heldActions);
        }
        this.#on.state(state);
      },
      queue: (position, waitedMs) => this.#on.queue(position, waitedMs),
      warming: (warmUp) => this.#on.warming(warmUp),
      frames: (frames) => {
        for (const event of this.#replay?.takeDue(frames.at(-1).chunkIndex) ?? [])
          this.#session.sendEvent(event.kind, event.payload);
        this.#playback.push(frames, clock.now());
      },
      stats: (stats) => {
        this.log.chunkCame(stats.chunk_index);
        this.#playback.chunkTook(stats.chunk_total_ms, Math.max(stats.num_frames, 1));
        this.#on.stats(stats, this.#drawMs);
      },
      applied: (eventId, chunkIndex) => this.log.applied(eventId, chunkIndex),
      skipped: (detail) => this.#on.skipped(detail),
      refused: (detail) => this.#on.refused(detail),
      ended: (end) => {
        this.#sender.stop();
        this.#playback.clear();
        this.#on.ended({ ...end, hasOpened: this.#session.hasOpened });
      },
    };
  }

  #animate = () => {
    this.#loop = this.isRunning ? requestAnimationFrame(this.#animate) : null;
    if (this.isLive) {
      const now = clock.now();
      const frame = this.#playback.take(now);
      if (frame) this.#draw(frame);
      if (this.#session.state === "paused") this.#playback.pausedAt(now);
      this.#on.tick(now, this.#session.state === "live" ? this.#playback.stalledMs(now) : 0);
    }
  };

  #draw(frame) {
    const { image } = frame;
    if (this.#canvas.width !== image.width || this.#canvas.height !== image.height) {
      this.#canvas.width = image.width;
      this.#canvas.height = image.height;
    }
    this.#context.drawImage(image, 0, 0);
    image.close();
    const now = clock.now();
    this.firstDrawnAt ??= now;
    this.hasDrawn = true;
    this.#fps.tick(now);
    this.#drawMs += DRAW_AVERAGE * (now - frame.decodedAt - this.#drawMs);
    const samples = this.latency.drawn(frame.eventId, now);
    if (samples.length) this.#on.latency(samples);
    this.#on.drawn(frame, now);
  }
}
