// Keyboard, mouse, gamepad and fingers -> HeldKeys. Whatever takes the attention away releases what it held.

import { LOOK, MOVE, stickTokens, tokenFor } from "./bindings.js";
import { isTyping } from "./dom.js";

const MOUSE_PIXELS = 3; // movement that counts, a mouse event
const MOUSE_HOLD_MS = 110;

/** Keys held on the keyboard. `isActive()` says whether they belong to the world now. */
export function listenToKeyboard(held, { bindings, isActive }) {
  const source = (code) => `key:${code}`;
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented) return;
    const token = tokenFor(bindings(), event.code);
    if (!token || event.repeat || event.ctrlKey || event.metaKey || event.altKey) {
      if (token && event.repeat && isActive() && !isTyping(event.target)) event.preventDefault();
      return;
    }
    if (!isActive() || isTyping(event.target) || event.target.closest?.("dialog")) return;
    event.preventDefault();
    held.hold(source(event.code), [token]);
  });
  // Wherever the key comes up, also in a field that took the focus meanwhile.
  addEventListener("keyup", (event) => held.release(source(event.code)), true);
}

/** Nothing stays held when the page loses attention: another window, a hidden tab, a field that takes the focus. */
export function releaseWhenInattentive(held) {
  addEventListener("blur", () => held.releaseAll());
  addEventListener("pagehide", () => held.releaseAll());
  document.addEventListener("visibilitychange", () => document.hidden && held.releaseAll());
  document.addEventListener("focusin", (event) => isTyping(event.target) && held.releaseAll());
  document.addEventListener("fullscreenchange", () => held.releaseAll());
}

/** Looks around with the captured pointer: a movement holds its direction for a moment. */
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

  static get exists() {
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

  #pulse(axis, token) {
    clearTimeout(this.#timers.get(axis));
    this.#held.hold(`mouse:${axis}`, [token]);
    this.#timers.set(axis, setTimeout(() => this.#held.release(`mouse:${axis}`), MOUSE_HOLD_MS));
  }

  #releaseAll() {
    for (const [axis, timer] of this.#timers) {
      clearTimeout(timer);
      this.#held.release(`mouse:${axis}`);
    }
  }
}

/** Left stick walks, right stick looks. `poll` is called once an animation frame while a world is live. */
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
      this.#held.hold(`pad:${pad.index}`, [...stickTokens(x, y, ...MOVE), ...stickTokens(lookX, lookY, ...LOOK)]);
    }
  }
}

/** A round stick under a thumb. */
export function touchStick(element, held, [horizontal, vertical]) {
  const knob = element.querySelector(".knob");
  const source = `stick:${element.id}`;
  const follow = (event) => {
    const box = element.getBoundingClientRect();
    const radius = box.width / 2;
    let x = (event.clientX - box.left - radius) / radius;
    let y = (event.clientY - box.top - radius) / radius;
    const length = Math.hypot(x, y);
    if (length > 1) [x, y] = [x / length, y / length];
    knob.style.translate = `${x * radius * 0.6}px ${y * radius * 0.6}px`;
    held.hold(source, stickTokens(x, y, horizontal, vertical));
  };
  pressable(element, {
    down: follow,
    move: follow,
    up: () => {
      knob.style.translate = "";
      held.release(source);
    },
  });
}

/** A key on the picture. */
export function padButton(button, held, token) {
  const source = `pad-button:${token}`;
  pressable(button, { down: () => held.hold(source, [token]), move: () => {}, up: () => held.release(source) });
  button.addEventListener("keydown", ({ key, repeat }) => {
    if ((key === " " || key === "Enter") && !repeat) held.hold(source, [token]);
  });
  button.addEventListener("keyup", () => held.release(source));
  button.addEventListener("blur", () => held.release(source));
}

/** One captured pointer at a time; `up` follows every `down`, whatever ends it. */
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
