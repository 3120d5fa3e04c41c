// The page around the picture: theatre, full screen, the sheet, help, shortcuts, and what turns hands into held keys.

import { ACTIONS, LOOK, MOVE, defaultBindings } from "./bindings.js";
import { $, h, isTyping } from "./dom.js";
import { HelpView } from "./help_view.js";
import { MouseLook, listenToKeyboard, padButton, releaseWhenInattentive, touchStick } from "./inputs.js";

const PADS = [["keys", "Keys"], ["sticks", "Sticks"], ["none", "Nothing"]];

const SHORTCUTS = {
  Space: () => $("pause").click(),
  KeyF: () => $("fullscreen").click(),
  KeyT: () => $("theatre").click(),
  KeyR: () => $("record").click(),
  KeyP: () => $("screenshot").click(),
};

export class Surroundings {
  #store;
  #onChange;

  /** `isLive()`: keys belong to the world now. `onChange()` when other pads were chosen. */
  constructor({ store, held, isLive, onChange }) {
    this.#store = store;
    this.#onChange = onChange;
    document.body.dataset.pads = this.pads;
    this.#wireView();
    this.#wireInputs(held, isLive);
    this.#wireShortcuts(this.#wireHelp());
  }

  /** What is shown on the picture: "keys", "sticks" or "none". */
  get pads() {
    return this.#store.get("pads", matchMedia("(pointer: coarse)").matches ? "sticks" : "keys");
  }

  openSheet(wanted) {
    document.body.toggleAttribute("data-sheet", wanted);
    $("open-sheet").setAttribute("aria-expanded", String(wanted));
  }

  get #bindings() {
    return this.#store.get("bindings", null) ?? defaultBindings();
  }

  #wireView() {
    $("theatre").onclick = () => $("theatre").setAttribute("aria-pressed", String(document.body.toggleAttribute("data-theatre")));
    $("fullscreen").onclick = () => {
      if (document.fullscreenElement) void document.exitFullscreen();
      else void document.querySelector(".world").requestFullscreen();
    };
    $("fullscreen").hidden = !document.fullscreenEnabled;
    $("open-sheet").onclick = () => this.openSheet(true);
    $("close-sheet").onclick = () => this.openSheet(false);
  }

  #wireInputs(held, isLive) {
    listenToKeyboard(held, { bindings: () => this.#bindings, isActive: isLive });
    releaseWhenInattentive(held);
    for (const [root, tokens] of [["pads-move", "wasd"], ["pads-look", "ijkl"]])
      for (const token of tokens) {
        const { label, icon } = ACTIONS.find((action) => action.token === token);
        const button = h("button", { className: "pad", "data-token": token, "aria-label": label, title: label, textContent: icon });
        padButton(button, held, token);
        $(root).append(button);
      }
    touchStick($("stick-move"), held, MOVE);
    touchStick($("stick-look"), held, LOOK);
    const mouse = new MouseLook(held, $("stage"), (on) => $("mouse-look").setAttribute("aria-pressed", String(on)));
    $("mouse-look").onclick = () => mouse.toggle();
    $("mouse-look").hidden = !MouseLook.exists;
  }

  /** -> what opens the help. */
  #wireHelp() {
    const help = new HelpView($("help-body"), {
      getBindings: () => this.#bindings,
      setBindings: (next) => this.#store.set("bindings", next),
      pads: { value: () => this.pads, options: PADS, choose: (pads) => this.#usePads(pads) },
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

  #wireShortcuts(openHelp) {
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
