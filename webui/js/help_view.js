// The help dialog: keys and how to change them.

import { ACTIONS, defaultBindings, keyName, rebind } from "./bindings.js";
import { h } from "./dom.js";

const SLOTS = 2;

export class HelpView {
  #root;
  #getBindings;
  #setBindings;
  #pads;
  #stopListening = null;

  /** `pads` has value, options [[value, label]] and choose(value). */
  constructor(root, { getBindings, setBindings, pads }) {
    this.#root = root;
    this.#getBindings = getBindings;
    this.#setBindings = setBindings;
    this.#pads = pads;
  }

  draw() {
    this.#stopListening?.();
    this.#root.replaceChildren(
      h("p", { className: "hint", textContent: "Click a key, then press the new one. Escape cancels." }),
      h("div", { className: "key-table" }, ...ACTIONS.map((known) => this.#row(known))),
      h(
        "div",
        { className: "actions" },
        h("button", {
          className: "button quiet",
          textContent: "Reset keys",
          onclick: () => this.#change(defaultBindings()),
        }),
      ),
      this.#section(
        "Controls on the video",
        h("div", { className: "choices" }, ...this.#pads.options.map((option) => this.#padChoice(option))),
      ),
      this.#section(
        "The walk so far",
        h("p", {
          className: "hint",
          textContent:
            "The strip below the picture is there while the server keeps the walk. Click a place in it, or use the " +
              "arrow keys, to look at it. Enter or Go back to here: a new walk begins there, and the old one stays as " +
              "Walk 1. Escape or Cancel: back to now.",
        }),
      ),
      this.#section(
        "Mouse, gamepad and shortcuts",
        h("p", {
          className: "hint",
          textContent:
            "Mouse: click the mouse button below the video and move the mouse to look around. Escape releases it. " +
              "Gamepad: the left stick or the d-pad walks, the right stick looks.",
        }),
        h("p", {
          className: "hint",
          textContent:
            "Enter or Space: start. Space: pause. Escape: leave a text field. F: full screen. T: theatre mode. " +
              "R: record. P: screenshot. ?: this help.",
        }),
      ),
    );
  }

  #section(title, ...content) {
    return h("section", { className: "help-section" }, h("h3", { textContent: title }), ...content);
  }

  #row({ action, label }) {
    const codes = this.#getBindings()[action];
    const keys = Array.from({ length: SLOTS }, (_, slot) => {
      const code = codes[slot];
      const name = code ? keyName(code) : "+";
      return h("button", {
        className: code ? "key" : "key free",
        textContent: name,
        "aria-label": code ? `${label}: ${name}, change` : `${label}: add a key`,
        onclick: ({ currentTarget }) => this.#listen(currentTarget, action, slot),
      });
    });
    return h("div", { className: "key-row" }, h("span", { textContent: label }), h("div", {}, ...keys));
  }

  #padChoice([value, label]) {
    const chosen = this.#pads.value() === value;
    return h("button", {
      className: "button",
      "aria-pressed": String(chosen),
      textContent: label,
      onclick: () => (this.#pads.choose(value), this.draw()),
    });
  }

  #listen(button, action, slot) {
    this.#stopListening?.();
    button.classList.add("listening");
    button.textContent = "…";
    const onKey = (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (event.code === "Escape") this.draw();
      else this.#change(rebind(this.#getBindings(), action, slot, event.code));
    };
    addEventListener("keydown", onKey, { capture: true });
    this.#stopListening = () => {
      removeEventListener("keydown", onKey, { capture: true });
      this.#stopListening = null;
    };
  }

  #change(bindings) {
    this.#setBindings(bindings);
    this.draw();
  }
}
