// The middle of the stage: the start button and the note below it, or the question for a server.

import { $, setText } from "./dom.js";
import { ServerForm } from "./server_form.js";

const ACTIONS = { paused: "Resume", ended: "Start again", lost: "Start again" };

export class StartView {
  #server;
  #form;

  constructor(server) {
    this.#server = server;
    this.#form = new ServerForm($("connect"), server, () => $("stage").focus({ preventScroll: true }));
  }

  /**
   * `state` is the session's. `progress` is text while it opens, else "". `isLoading`: the first frame still loads.
   * `note` is shown below a button that can be pressed.
   */
  show({ state, isRunning, progress, isLoading, note }) {
    const { model } = this.#server;
    const isReady = state === "paused" || (model?.ready ?? false);
    const isIdle = !isRunning && !isLoading;
    this.#showQuestion(isIdle && this.#server.reachable === false);
    const button = $("start");
    button.hidden = !$("connect").hidden;
    button.disabled = Boolean(progress) || isLoading || !isReady;
    $("start-text").textContent =
      progress || (isLoading ? "Loading the image" : isReady ? (ACTIONS[state] ?? "Start") : this.#server.shortStatus);
    setText($("start-note"), button.disabled || button.hidden ? "" : note);
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
