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
