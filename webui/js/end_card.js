// The card that says why there is no session. It goes by itself when a server that was away is back.

import { explainEnd, isServerAway } from "./messages.js";

export class EndCard {
  #errors;
  #server;
  #waits = false; // the card says that the server went away
  #sawAway = false; // since that card

  constructor(errors, server) {
    this.#errors = errors;
    this.#server = server;
  }

  /** A start was asked for too early. */
  notReady(retry) {
    this.show({
      title: "The server is not ready",
      detail: this.#server.status,
      advice: "Try again when it is ready. The top of the page shows its state.",
      actions: [["Try again", retry]],
    });
    this.#waits = this.#sawAway = true;
  }

  /** The session ended without the user's wish. */
  ended(end, actions) {
    this.show({ ...explainEnd(end), actions });
    this.#waits = isServerAway(end.code);
    this.#sawAway = false;
  }

  show(card) {
    this.#errors.show({ key: "session", ...card });
  }

  dismiss() {
    this.#errors.dismiss("session");
    this.#waits = false;
  }

  serverChanged() {
    this.#sawAway ||= this.#server.reachable === false;
    if (this.#waits && this.#sawAway && this.#server.model?.ready) this.dismiss();
  }
}
