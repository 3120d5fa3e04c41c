// Errors stay until they are dismissed: what happened, the server's words, what to do.

import { h, icon } from "./dom.js";

export class ErrorCards {
  #list;
  #cards = new Map();

  constructor(list) {
    this.#list = list;
  }

  /**
   * A card; one with the same `key` is replaced. `actions` are [label, run] pairs, the first is the way on. `mild`
   * cards report something that was got over.
   */
  show({ key, title, words = "", advice = "", actions = [], mild = false }) {
    this.dismiss(key);
    const buttons = actions.map(([label, run], i) =>
      h("button", { className: i ? "button" : "button accent", textContent: label, onclick: () => (this.dismiss(key), run()) }),
    );
    const card = h(
      "article",
      { className: mild ? "card mild" : "card", "data-key": key },
      icon("triangle-alert"),
      h("h3", { textContent: title }),
      h("button", { className: "icon-button close", "aria-label": "Dismiss", onclick: () => this.dismiss(key) }, icon("x")),
      h(
        "div",
        { className: "body" },
        words ? h("blockquote", { textContent: words }) : null,
        advice ? h("p", { textContent: advice }) : null,
        buttons.length ? h("div", { className: "card-actions" }, ...buttons) : null,
      ),
    );
    this.#cards.set(key, card);
    this.#list.append(card);
    card.scrollIntoView({ block: "nearest" });
  }

  dismiss(key) {
    this.#cards.get(key)?.remove();
    this.#cards.delete(key);
  }
}

/** Why a session ended against the player's will -> {title, words, advice}. */
export function explainEnd({ code, words, errorCode, wasLive }) {
  if (/another realtime session/.test(words))
    return { title: "Someone else is inside", words, advice: "This server shows one world at a time. Try again when it is free." };
  if (errorCode === "not_ready") return { title: "The server is still warming up", words, advice: "Try again in a moment." };
  if (errorCode === "unauthorized" || /api.?key/i.test(words))
    return { title: "The server asks for its key", words, advice: "Enter the key under Server, then try again." };
  if (/^invalid generate request/.test(words))
    return { title: "The server did not accept this beginning", words, advice: "Change what it names, then try again." };
  if (code === 1001) return { title: "The server was shut down", words, advice: "Your settings are kept. Try again when it is back." };
  if (code === 1011) return { title: "The world broke off", words, advice: "The server met an error. Beginning again usually helps." };
  if (!wasLive) return { title: "No connection to the server", words, advice: "Check the address under Server, and that the server runs." };
  return { title: "The connection was lost", words, advice: "The picture is the last one that arrived. Your settings are kept." };
}
