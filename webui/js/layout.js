// Everything around the video: theatre mode, full screen, the settings sheet, help, shortcuts and input devices.

import { ACTIONS, LOOK, MOVE, defaultBindings } from "./bindings.js";
import { $, h, isTyping } from "./dom.js";
import { HelpView } from "./help_view.js";
import { MouseLook, listenToKeyboard, padButton, releaseOnBlur, touchStick } from "./inputs.js";

const PAD_OPTIONS = [
  ["keys", "Keys"],
  ["sticks", "Sticks"],
  ["none", "Nothing"],
];

const SHORTCUTS = {
  Space: () => $("pause").click(),
  KeyF: () => $("fullscreen").click(),
  KeyT: () => $("theatre").click(),
  KeyR: () => $("record").click(),
  KeyP: () => $("screenshot").click(),
};

const SURROUND_MS = 400;
const SURROUND_BLEND = 0.4; // how much of it each drawing replaces: it follows the picture softly

/** Fills the room that the picture leaves in its box with the picture's colours. */
function drawSurround() {
  const { clientWidth, clientHeight } = $("stage");
  const isFilled = clientWidth - $("frame").clientWidth < 4 && clientHeight - $("frame").clientHeight < 4;
  if (document.hidden || isFilled) return;
  const isShown = (canvas) => getComputedStyle(canvas).opacity !== "0";
  const context = $("surround").getContext("2d");
  context.globalAlpha = SURROUND_BLEND;
  context.drawImage(isShown($("canvas")) ? $("canvas") : $("poster"), 0, 0, 16, 16);
}

export class Layout {
  #store;
  #onChange;

  /** `isLive()` says whether keys steer the session now. `onChange()` runs when other on-screen controls are chosen. */
  constructor({ store, held, isLive, onChange }) {
    this.#store = store;
    this.#onChange = onChange;
    document.body.dataset.pads = this.pads;
    this.#connectView();
    this.#connectInputs(held, isLive);
    this.#connectShortcuts(this.#connectHelp());
    setInterval(drawSurround, SURROUND_MS);
  }

  /** The controls shown on the video: "keys", "sticks" or "none". */
  get pads() {
    return this.#store.get("pads", matchMedia("(pointer: coarse)").matches ? "sticks" : "keys");
  }

  openSheet(isOpen) {
    document.body.toggleAttribute("data-sheet", isOpen);
    $("open-sheet").setAttribute("aria-expanded", String(isOpen));
  }

  get #bindings() {
    return this.#store.get("bindings", null) ?? defaultBindings();
  }

  #connectView() {
    $("theatre").onclick = () =>
      $("theatre").setAttribute("aria-pressed", String(document.body.toggleAttribute("data-theatre")));
    $("fullscreen").onclick = () => {
      if (document.fullscreenElement) void document.exitFullscreen();
      else void $("layout").requestFullscreen();
    };
    $("fullscreen").hidden = !document.fullscreenEnabled;
    $("open-sheet").onclick = () => this.openSheet(!document.body.hasAttribute("data-sheet"));
    document.querySelector(".skip").onclick = () => this.openSheet(true);
    $("close-sheet").onclick = () => this.openSheet(false);
  }

  #connectInputs(held, isLive) {
    listenToKeyboard(held, { bindings: () => this.#bindings, isActive: isLive });
    releaseOnBlur(held);
    for (const [root, actions] of [
      ["pads-move", "wasd"],
      ["pads-look", "ijkl"],
    ])
      for (const action of actions) {
        const { label, icon } = ACTIONS.find((known) => known.action === action);
        const button = h("button", {
          className: "pad",
          "data-action": action,
          "aria-label": label,
          title: label,
          textContent: icon,
        });
        padButton(button, held, action);
        $(root).append(button);
      }
    touchStick($("stick-move"), held, MOVE);
    touchStick($("stick-look"), held, LOOK);
    const mouse = new MouseLook(held, $("stage"), (on) => $("mouse-look").setAttribute("aria-pressed", String(on)));
    $("mouse-look").onclick = () => mouse.toggle();
    $("mouse-look").hidden = !MouseLook.isSupported;
  }

  /** Returns the function that opens the help. */
  #connectHelp() {
    const help = new HelpView($("help-body"), {
      getBindings: () => this.#bindings,
      setBindings: (next) => this.#store.set("bindings", next),
      pads: { value: () => this.pads, options: PAD_OPTIONS, choose: (pads) => this.#usePads(pads) },
    });
    const open = () => {
      help.draw();
      if (!$("help-dialog").open) $("help-dialog").showModal();
    };
    $("open-help").onclick = open;
    return open;
  }

  #usePads(pads) {
    this.#store.set("pads", pads);
    document.body.dataset.pads = pads;
    this.#onChange();
  }

  #connectShortcuts(openHelp) {
    addEventListener("keydown", (event) => {
      if (event.defaultPrevented || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
      if (isTyping(event.target) || document.querySelector("dialog[open]")) return;
      if (event.key === "?") return openHelp();
      if (event.code === "Escape") {
        if (document.body.hasAttribute("data-theatre")) $("theatre").click();
        return this.openSheet(false);
      }
      if (event.code === "Space" && event.target.closest("button, summary, label")) return;
      const run = SHORTCUTS[event.code];
      if (!run) return;
      event.preventDefault();
      run();
    });
  }
}
