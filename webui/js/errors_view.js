// Error cards: what happened, the detail from the server or browser, what to do. They stay until dismissed.

import { h, icon } from "./dom.js";

export class ErrorCards {
  #list;
  #cards = new Map();

  constructor(list) {
    this.#list = list;
  }

  /**
   * Shows a card and replaces the one with the same `key`. `actions` are [label, run] pairs; the first is highlighted.
   * `minor` cards report a problem that did not end the session.
   */
  show({ key, title, detail = "", advice = "", actions = [], minor = false }) {
    this.dismiss(key);
    const buttons = actions.map(([label, run], i) =>
      h("button", {
        className: i ? "button" : "button accent",
        textContent: label,
        onclick: () => (this.dismiss(key), run()),
      }),
    );
    const card = h(
      "article",
      { className: minor ? "card minor" : "card", "data-key": key },
      icon("triangle-alert"),
      h("h3", { textContent: title }),
      h(
        "button",
        { className: "icon-button close", "aria-label": "Dismiss", onclick: () => this.dismiss(key) },
        icon("x"),
      ),
      h(
        "div",
        { className: "body" },
        detail ? h("blockquote", { textContent: detail }) : null,
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
