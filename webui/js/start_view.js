// The middle of the stage: the start button and the note below it, or the question for a server.

import { keyName } from "./bindings.js";
import { $, h, setText } from "./dom.js";
import { ServerForm } from "./server_form.js";

const ACTIONS = { paused: "Resume", ended: "Start again", lost: "Start again" };

/** Keys and what they do: [[key names], text]. */
const keyHelp = (bindings) => [
  [namesFor("wasd", bindings), "walk"],
  [namesFor("ijkl", bindings), "look"],
  [["Space"], "pauses"],
  [["Enter"], "starts"],
];

const namesFor = (actions, bindings) =>
  [...actions].map((action) => bindings[action][0]).filter(Boolean).map(keyName);

export class StartView {
  #server;
  #form;

  constructor(server) {
    this.#server = server;
    this.#form = new ServerForm($("connect"), server, () => $("stage").focus({ preventScroll: true }));
  }

  /**
   * `state` is the session's. `progress` is text while it opens, else "". `isLoading`: the first frame still loads.
   * `note` is shown below a button that can be pressed or while the server prepares the size. The `keys`, the bindings
   * or null for sticks, are shown below a button that can be pressed.
   */
  show({ state, isRunning, progress, isLoading, note, keys }) {
    const { model } = this.#server;
    const isReady = state === "paused" || (model?.ready ?? false);
    const isIdle = !isRunning && !isLoading;
    this.#showQuestion(isIdle && this.#server.reachable === false);
    const button = $("start");
    button.hidden = !$("connect").hidden;
    button.disabled = Boolean(progress) || isLoading || !isReady;
    $("start-text").textContent =
      progress || (isLoading ? "Loading the image" : isReady ? (ACTIONS[state] ?? "Start") : this.#server.status);
    const canPress = !button.disabled && !button.hidden;
    setText($("start-note"), canPress || state === "warming" ? note : "");
    this.#showKeys(canPress && state !== "paused", keys);
  }

  #showKeys(isShown, keys) {
    const root = $("start-keys");
    const wanted = isShown ? JSON.stringify(keys) : "";
    if (root.dataset.shown === wanted) return;
    root.dataset.shown = wanted;
    root.hidden = !isShown;
    const entry = ([names, does]) => h("span", {}, ...names.map((key) => h("kbd", { textContent: key })), ` ${does}`);
    if (keys) root.replaceChildren(...keyHelp(keys).map(entry));
    else root.textContent = "The left stick walks, the right stick looks.";
  }

  #showQuestion(isWanted) {
    const question = $("connect");
    // It stays while the user types into it, so that the keys do not reach the world.
    if (!isWanted && this.#form.isEdited) return;
    if (isWanted && question.hidden) this.#form.fill();
    question.hidden = !isWanted;
    if (!isWanted) return;
    setText($("connect-title"), this.#server.status);
    setText($("connect-advice"), this.#server.advice);
  }
}
