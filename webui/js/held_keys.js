// Which actions are held, and the state events that tell the server. No DOM; the clock is given.

const ACTION_ORDER = ["w", "a", "s", "d", "i", "j", "k", "l"];

/**
 * Combines several sources: keyboard keys, on-screen buttons, sticks, the mouse. An action is held while any source
 * holds it. A source that ends (pointer cancel, a disconnected gamepad) releases only its own actions.
 */
export class HeldKeys {
  #sources = new Map();
  #actions = [];

  /** `onChange(actions)` gets the held actions in the order of ACTION_ORDER, only when they changed. */
  constructor(onChange) {
    this.onChange = onChange;
  }

  get actions() {
    return this.#actions;
  }

  /** `source` now holds exactly `actions`; an empty list releases it. */
  hold(source, actions) {
    if (actions.length) this.#sources.set(source, new Set(actions));
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
    const held = ACTION_ORDER.filter((action) => [...this.#sources.values()].some((actions) => actions.has(action)));
    if (held.join() === this.#actions.join()) return;
    this.#actions = held;
    this.onChange(held);
  }
}

const COALESCE_MS = 16;
const RESEND_MS = 250;

/**
 * Sends changes of the held actions. The first change is sent at once; changes within the next 16 ms are sent together,
 * in order. `send(transitions)` gets [{actions, at}]; `clock` has now(), setTimeout() and clearTimeout().
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

  /** Whether to resend held keys every 250 ms, for servers that ask for it. */
  set resend(isOn) {
    this.#resend = isOn;
    this.#scheduleResend();
  }

  /** Sends nothing more. */
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
