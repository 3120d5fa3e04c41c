// Keyboard, mouse, gamepad and touch -> HeldKeys.

import { LOOK, MOVE, actionFor, dpadActions, stickActions } from "./bindings.js";
import { isTyping } from "./dom.js";

const MOUSE_PIXELS = 3; // smaller movements are ignored, per mouse event
const MOUSE_HOLD_MS = 110;

/** Holds the actions of pressed keys. `isActive()` says whether keys steer the session now. */
export function listenToKeyboard(held, { bindings, isActive }) {
  const source = (code) => `key:${code}`;
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented) return;
    const action = actionFor(bindings(), event.code);
    if (!action || event.repeat || event.ctrlKey || event.metaKey || event.altKey) {
      if (action && event.repeat && isActive() && !isTyping(event.target)) event.preventDefault();
      return;
    }
    if (!isActive() || isTyping(event.target) || event.target.closest?.("dialog")) return;
    event.preventDefault();
    held.hold(source(event.code), [action]);
  });
  // Captured: a text field that took the focus meanwhile must not hide the release.
  addEventListener("keyup", (event) => held.release(source(event.code)), true);
}

/** Releases everything when the page loses the keyboard: another window, a hidden tab, a focused text field. */
export function releaseOnBlur(held) {
  addEventListener("blur", () => held.releaseAll());
  addEventListener("pagehide", () => held.releaseAll());
  document.addEventListener("visibilitychange", () => document.hidden && held.releaseAll());
  document.addEventListener("focusin", (event) => isTyping(event.target) && held.releaseAll());
  document.addEventListener("fullscreenchange", () => held.releaseAll());
}

/** Looks around with the captured pointer. Each movement holds its direction for MOUSE_HOLD_MS. */
export class MouseLook {
  #held;
  #element;
  #timers = new Map();

  constructor(held, element, onChange) {
    this.#held = held;
    this.#element = element;
    document.addEventListener("pointerlockchange", () => {
      if (!this.isOn) this.#releaseAll();
      onChange(this.isOn);
    });
    element.addEventListener("mousemove", (event) => this.isOn && this.#moved(event.movementX, event.movementY));
  }

  static get isSupported() {
    return "requestPointerLock" in Element.prototype && matchMedia("(pointer: fine)").matches;
  }

  get isOn() {
    return document.pointerLockElement === this.#element;
  }

  toggle() {
    if (this.isOn) document.exitPointerLock();
    else this.#element.requestPointerLock();
  }

  #moved(x, y) {
    const [[left, right], [up, down]] = LOOK;
    if (Math.abs(x) >= MOUSE_PIXELS) this.#pulse("x", x > 0 ? right : left);
    if (Math.abs(y) >= MOUSE_PIXELS) this.#pulse("y", y > 0 ? down : up);
  }

  #pulse(axis, action) {
    clearTimeout(this.#timers.get(axis));
    this.#held.hold(`mouse:${axis}`, [action]);
    this.#timers.set(
      axis,
      setTimeout(() => this.#held.release(`mouse:${axis}`), MOUSE_HOLD_MS),
    );
  }

  #releaseAll() {
    for (const [axis, timer] of this.#timers) {
      clearTimeout(timer);
      this.#held.release(`mouse:${axis}`);
    }
  }
}

/** The left stick and the d-pad walk, the right stick looks. Call `poll` on every animation frame of a live session. */
export class Gamepads {
  #held;
  #connected = 0;

  constructor(held) {
    this.#held = held;
    addEventListener("gamepadconnected", () => this.#connected++);
    addEventListener("gamepaddisconnected", ({ gamepad }) => {
      this.#connected--;
      this.#held.release(`pad:${gamepad.index}`);
    });
  }

  poll() {
    if (!this.#connected) return;
    for (const pad of navigator.getGamepads()) {
      if (!pad) continue;
      const [x = 0, y = 0, lookX = 0, lookY = 0] = pad.axes;
      const sticks = [...stickActions(x, y, ...MOVE), ...stickActions(lookX, lookY, ...LOOK)];
      this.#held.hold(`pad:${pad.index}`, [...sticks, ...dpadActions(pad.buttons ?? [])]);
    }
  }
}

/** An on-screen stick. */
export function touchStick(element, held, [horizontal, vertical]) {
  const knob = element.querySelector(".knob");
  const source = `stick:${element.id}`;
  const move = (event) => {
    const box = element.getBoundingClientRect();
    const radius = box.width / 2;
    let x = (event.clientX - box.left - radius) / radius;
    let y = (event.clientY - box.top - radius) / radius;
    const length = Math.hypot(x, y);
    if (length > 1) [x, y] = [x / length, y / length];
    knob.style.translate = `${x * radius * 0.6}px ${y * radius * 0.6}px`;
    held.hold(source, stickActions(x, y, horizontal, vertical));
  };
  pressable(element, {
    down: move,
    move,
    up: () => {
      knob.style.translate = "";
      held.release(source);
    },
  });
}

/** An on-screen key. */
export function padButton(button, held, action) {
  const source = `pad-button:${action}`;
  pressable(button, { down: () => held.hold(source, [action]), move: () => {}, up: () => held.release(source) });
  button.addEventListener("keydown", ({ key, repeat }) => {
    if ((key === " " || key === "Enter") && !repeat) held.hold(source, [action]);
  });
  button.addEventListener("keyup", () => held.release(source));
  button.addEventListener("blur", () => held.release(source));
}

/** Tracks one captured pointer at a time. `up` follows every `down`, also after a pointer cancel. */
function pressable(element, { down, move, up }) {
  let pointer = null;
  element.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button > 0) return;
    pointer = event.pointerId;
    element.setPointerCapture(pointer);
    element.classList.add("held");
    down(event);
  });
  element.addEventListener("pointermove", (event) => event.pointerId === pointer && move(event));
  const end = (event) => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    element.classList.remove("held");
    up();
  };
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(name, end);
  element.addEventListener("contextmenu", (event) => event.preventDefault());
}

/** Shows on the on-screen keys which actions are held. */
export function showHeldPads(actions) {
  for (const pad of document.querySelectorAll(".pad")) {
    const isHeld = actions.includes(pad.dataset.action);
    pad.classList.toggle("held", isHeld);
    pad.setAttribute("aria-pressed", String(isHeld));
  }
}
