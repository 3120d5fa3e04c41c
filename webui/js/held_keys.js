// Which actions are held, by whom, and how they are told to the server. No DOM, no clock of its own.

export const TOKENS = ["w", "a", "s", "d", "i", "j", "k", "l"];

/**
 * Actions held by several sources at once: a keyboard key, a finger, a stick. An action is held while any source holds
 * it, and a source that goes away (blur, pointer cancel, a pulled gamepad) releases only what it held.
 */
export class HeldKeys {
  #sources = new Map();
  #actions = [];

  /** `onChange(actions)` gets the held actions in the order of TOKENS, only when they really changed. */
  constructor(onChange) {
    this.onChange = onChange;
  }

  get actions() {
    return this.#actions;
  }

  /** `source` now holds exactly `tokens`; an empty list releases it. */
  hold(source, tokens) {
    if (tokens.length) this.#sources.set(source, new Set(tokens));
    else this.#sources.delete(source);
    this.#update();
  }

  release(source) {
    this.hold(source, []);
  }

  releaseAll() {
    this.#sources.clear();
    this.#update();
  }

  #update() {
    const held = TOKENS.filter((token) => [...this.#sources.values()].some((tokens) => tokens.has(token)));
    if (held.join() === this.#actions.join()) return;
    this.#actions = held;
    this.onChange(held);
  }
}

const COALESCE_MS = 16;
const RESEND_MS = 250;

/**
 * Held actions -> state events. The first transition leaves at once, those that follow within 16 ms leave together, in
 * order. `send(transitions)`; `clock` has now(), setTimeout and clearTimeout.
 */
export class TransitionSender {
  #send;
  #clock;
  #waiting = [];
  #timer = null;
  #lastSent = -Infinity;
  #held = [];
  #resend = false;
  #resendTimer = null;

  constructor(send, clock) {
    this.#send = send;
    this.#clock = clock;
  }

  /** The held actions changed. */
  change(actions) {
    this.#held = actions;
    const now = this.#clock.now();
    this.#waiting.push({ actions, at: now });
    const wait = this.#lastSent + COALESCE_MS - now;
    if (wait <= 0) this.#flush();
    else this.#timer ??= this.#clock.setTimeout(() => this.#flush(), wait);
  }

  /** Repeat held keys as state every 250 ms, for a server that forgets them. */
  set resend(wanted) {
    this.#resend = wanted;
    this.#scheduleResend();
  }

  /** The session is over: nothing more is sent. */
  stop() {
    if (this.#timer !== null) this.#clock.clearTimeout(this.#timer);
    if (this.#resendTimer !== null) this.#clock.clearTimeout(this.#resendTimer);
    this.#timer = this.#resendTimer = null;
    this.#waiting = [];
    this.#held = [];
    this.#resend = false;
  }

  #flush() {
    if (this.#timer !== null) this.#clock.clearTimeout(this.#timer);
    this.#timer = null;
    const transitions = this.#waiting;
    this.#waiting = [];
    this.#lastSent = this.#clock.now();
    this.#send(transitions);
    this.#scheduleResend();
  }

  #scheduleResend() {
    if (this.#resendTimer !== null) this.#clock.clearTimeout(this.#resendTimer);
    this.#resendTimer = null;
    if (!this.#resend || !this.#held.length) return;
    this.#resendTimer = this.#clock.setTimeout(() => {
      this.#waiting.push({ actions: this.#held, at: this.#clock.now() });
      this.#flush();
    }, RESEND_MS);
  }
}
