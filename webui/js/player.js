// Runs a session: connects it to playback, the session log and the canvas, and draws on every animation frame.

import { TransitionSender } from "./held_keys.js";
import { Comeback } from "./kept.js";
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
const OPEN_LIMIT_MS = 8000; // of a WebSocket that comes back
const SHUT_DOWN = "shutting_down";
const NOT_YET = ["not_ready", "session_busy", SHUT_DOWN];

/**
 * A session that the server keeps comes back by itself after a lost line. Its state is "away" meanwhile.
 *
 * `on` has the callbacks state(name), queue(position, waitedMs), warming({size, expectedMs}), drawn(frame, now),
 * latency(samples), stats(chunk_stats, drawMs), tick(now, stalledMs), skipped(detail), refused(detail, event),
 * dropped(event), opened(ticket), rewound(place), world(bytes) and ended(end), which also has hasOpened: whether the WebSocket ever
 * opened, and wasKept: whether the server had promised to keep the session.
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
  #url = null;
  #worker = null;
  #token = null; // with which the session comes back
  #resumeMs = 0;
  #comeback = null; // while the line is lost
  #tryTimer = null;
  #wasPaused = false;
  #sources = new Map(); // by the id of an event that goes back: the branch that it goes back in

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
    return this.isAway || (this.#session !== null && !this.#session.hasEnded);
  }

  get isPaused() {
    return this.#session?.state === "paused";
  }

  /** Whether the line is lost and the session comes back. */
  get isAway() {
    return this.#comeback !== null;
  }

  get latency() {
    return this.#session?.latency ?? null;
  }

  set playbackMode(mode) {
    if (this.#playback) this.#playback.mode = mode;
  }

  /**
   * Starts a session. `model` comes from readModel. `saved`, if given, is a session to replay: its events are repeated,
   * it ends after its chunks, and held keys do not reach it. `world`, if given, is the file of a kept world to go on
   * with; `init` is then that world's own.
   */
  start({ url, init, firstFrameType, model, mode, saved = null, world = null }) {
    this.#prepare({ url, init, mode, isReplay: saved !== null });
    const startedAt = new Date().toISOString();
    this.log = world ? null : new SessionLog({ model: model.id, init, firstFrameType, startedAt, events: saved?.events });
    const sentInit = world ? worldInit(world, init) : saved ? this.#prepareReplay(init, saved, model) : init;
    this.#on.state("connecting");
    this.#open(sentInit);
    this.#loop ??= requestAnimationFrame(this.#animate);
  }

  /** Goes on with a session of this page before it was loaded again. `init` is that session's, without its picture. */
  resume({ url, init, mode, token, resumeMs }) {
    this.#prepare({ url, init, mode, isReplay: false });
    this.log = null;
    this.#token = token;
    this.#resumeMs = resumeMs;
    this.#comeBack({ code: 1001, message: "", errorCode: null });
    this.#loop ??= requestAnimationFrame(this.#animate);
  }

  #prepare({ url, init, mode, isReplay }) {
    this.stop();
    this.#url = url;
    this.init = init;
    this.isReplay = isReplay;
    this.firstDrawnAt = null;
    this.#session = this.#token = this.#replay = null;
    this.#wasPaused = false;
    this.#playback = new Playback({
      fps: init.fps,
      paced: init.realtime_output_pacing,
      mode,
      drop: ({ image }) => image.close(),
    });
    this.#sender = new TransitionSender((transitions) => this.#sendKeys(transitions), clock);
    // One for the session, also after a lost line: while the server is away no other can be loaded.
    this.#worker = new Worker(new URL("decode_worker.js", import.meta.url), { type: "module" });
  }

  /** Opens a line. `before`: the session that goes on there. */
  #open(init, before = null) {
    const session = new Session({
      socket: new WebSocket(this.#url),
      worker: this.#worker,
      init,
      clock,
      nextEventId: () => this.#nextEventId++,
      on: this.#sessionEvents(),
      received: before?.received,
      events: before?.events,
      isPaused: this.#wasPaused,
    });
    if (before) session.latency = before.latency;
    this.#session = session;
  }

  stop() {
    const isOver = this.isAway && this.#session?.hasEnded !== false; // between two tries
    this.#endComeback();
    if (isOver) this.#finish({ normal: true, code: 1000, message: "", errorCode: null, wasLive: false });
    else this.#session?.stop();
  }

  /** The network may be back. */
  hurry() {
    this.#comeback?.hurry();
  }

  /** Asks the server for `kind`: "rewind", "branch" or "save". Returns the event id, or null without a line. */
  request(kind, payload = null) {
    const eventId = this.isLive ? this.#session.request(kind, payload) : null;
    if (eventId !== null && payload) this.#sources.set(eventId, payload.branch);
    return eventId;
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
    this.log?.add({ kind, payload, eventId, at });
  }

  /** The keys that are held now are held from there on. */
  #logWayBack({ chunkIndex, branch, eventId }) {
    const source = this.#sources.get(eventId) ?? branch;
    this.#sources.delete(eventId);
    const payload = statePayload([{ actions: this.#heldActions }]);
    const held = { kind: "camera_actions", payload, eventId: this.#nextEventId++ };
    this.log?.wentBack({ source, branch, chunkIndex, held });
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
        if (state === "lost" || state === "ended") return; // `ended` says what follows
        const isBack = this.isAway && (state === "live" || state === "paused");
        if (isBack) this.#endComeback();
        if (state === "live") {
          this.#sender.resend = this.#session.capabilities.resend_held_keys === true;
          // What the server holds of a session that came back may be older than the keys.
          if ((this.#heldActions.length || isBack) && !this.isReplay) this.#sender.change(this.#heldActions);
        }
        this.#on.state(this.isAway && state === "opening" ? "away" : state);
      },
      queue: (position, waitedMs) => this.#on.queue(position, waitedMs),
      warming: (warmUp) => this.#on.warming(warmUp),
      frames: (frames) => {
        for (const event of this.#replay?.takeDue(frames.at(-1).chunkIndex) ?? [])
          this.#session.sendEvent(event.kind, event.payload);
        this.#playback.push(frames, clock.now());
      },
      stats: (stats) => {
        this.log?.chunkCame(stats.chunk_index);
        this.#playback.chunkTook(stats.chunk_total_ms, Math.max(stats.num_frames, 1));
        this.#on.stats(stats, this.#drawMs);
      },
      applied: (eventId, chunkIndex) => this.log?.applied(eventId, chunkIndex),
      skipped: (detail) => this.#on.skipped(detail),
      refused: (detail, event) => this.#on.refused(detail, event),
      dropped: (event) => this.#on.dropped(event),
      opened: (ticket) => {
        this.#token = ticket.token;
        this.#resumeMs = ticket.resumeMs;
        if (ticket.isResumed) this.#playback.pausedAt(clock.now());
        this.#on.opened({ ...ticket, init: this.init });
      },
      rewound: (place) => {
        this.#playback.clear();
        this.#logWayBack(place);
        this.#on.rewound(place);
      },
      world: (bytes) => this.#on.world(bytes),
      ended: (end) => this.#lineEnded(end),
    };
  }

  #lineEnded(end) {
    clearTimeout(this.#tryTimer);
    const { errorCode } = end;
    const mayComeBack = !end.normal && this.#token !== null && (errorCode === null || NOT_YET.includes(errorCode));
    if (!mayComeBack || (!this.isAway && errorCode !== null && errorCode !== SHUT_DOWN)) this.#finish(end);
    else if (this.isAway) this.#comeback.failed({ serverLoads: errorCode === "not_ready" });
    else this.#comeBack(end);
  }

  /** The line is lost with `end`: opens another one, and then another, until the session goes on. */
  #comeBack(end) {
    this.#wasPaused = this.#session?.wasPaused ?? false;
    const attempt = () => {
      const before = this.#session;
      this.#open({ resume: this.#token, ...before?.received.fields }, before);
      const tried = this.#session;
      this.#tryTimer = setTimeout(() => tried.hasOpened || tried.abandon(), OPEN_LIMIT_MS);
    };
    const giveUp = () => this.#finish({ ...end, normal: false, wasLive: true });
    this.#comeback = new Comeback({ limitMs: this.#resumeMs, clock, attempt, giveUp });
    this.#on.state("away");
  }

  #endComeback() {
    clearTimeout(this.#tryTimer);
    this.#comeback?.stop();
    this.#comeback = null;
  }

  #finish(end) {
    this.#endComeback();
    const wasKept = this.#token !== null;
    this.#token = null;
    this.#sender.stop();
    this.#worker.terminate();
    this.#playback.clear();
    this.#on.state(end.normal ? "ended" : "lost");
    this.#on.ended({ ...end, hasOpened: wasKept || (this.#session?.hasOpened ?? false), wasKept });
  }

  #animate = () => {
    this.#loop = this.isRunning ? requestAnimationFrame(this.#animate) : null;
    if (this.isLive || this.isAway) {
      const now = clock.now();
      const frame = this.#playback.take(now);
      if (frame) this.#draw(frame);
      if (!this.isLive) return;
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
    const samples = this.latency?.drawn(frame.eventId, now) ?? [];
    if (samples.length) this.#on.latency(samples);
    this.#on.drawn(frame, now);
  }
}

/** The init that goes on with a kept world; how its frames come is the page's choice. */
function worldInit(world, init) {
  const { realtime_output_format, output_compression, realtime_preview_max_width, realtime_output_pacing } = init;
  return {
    resume: world,
    realtime_output_format,
    output_compression,
    realtime_preview_max_width,
    realtime_output_pacing,
    profile: true,
  };
}
