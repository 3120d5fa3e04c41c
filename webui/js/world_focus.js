// The keyboard belongs to the world: clicks on buttons, Escape and sent prompts give it back, and a key starts it.

import { $, isTyping } from "./dom.js";

export const focusWorld = () => $("stage").focus({ preventScroll: true });

/** `start(code)` gets the key codes that no field, button or dialog wants. It returns whether it used one. */
export function keepKeyboardOnWorld(start) {
  // Captured, so before the click opens a dialog: closing that returns the focus to the world.
  addEventListener(
    "click",
    ({ detail, target }) => {
      const isPointer = detail > 0; // a button that the keyboard reached keeps its focus
      if (isPointer && !target.closest("dialog") && target.closest("button, summary, label.button")) focusWorld();
    },
    true,
  );
  addEventListener(
    "keydown",
    (event) => {
      const { code, target } = event;
      if (event.repeat || event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
      if (document.querySelector("dialog[open]")) return;
      if (isTyping(target)) {
        if (code === "Escape") focusWorld();
        return;
      }
      const presses = code === "Enter" || code === "Space";
      if (presses && target.closest?.("button, summary, label, a")) return;
      // A key that walks goes on to the held keys: the world starts walking.
      if (start(code) && presses) event.preventDefault();
    },
    true,
  );
}
