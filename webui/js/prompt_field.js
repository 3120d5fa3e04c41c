// The prompt: typed before a session and sent during one.

import { $, setText } from "./dom.js";

export class PromptField {
  #store;
  #getLimit;
  #onChange;

  /** `getLimit()`: the most characters that the server takes. `onChange()` runs after every change. */
  constructor({ store, getLimit, onChange }) {
    this.#store = store;
    this.#getLimit = getLimit;
    this.#onChange = onChange;
    $("prompt").oninput = () => {
      store.set("prompt", $("prompt").value);
      onChange();
    };
  }

  get value() {
    return $("prompt").value.trim();
  }

  /** Shows a prompt that the user chose. */
  set value(prompt) {
    $("prompt").value = prompt;
    this.#store.set("prompt", prompt);
    this.#onChange();
  }

  /** Shows a prompt of the page, unless the user has one. */
  propose(prompt) {
    $("prompt").value = this.#store.get("prompt", prompt);
  }

  /** Shows whether the prompt can be sent now. `isNew`: a session runs with another one. */
  show(isNew) {
    const problem = this.#problem;
    $("prompt-problem").hidden = !problem;
    setText($("prompt-problem"), problem);
    $("prompt").setAttribute("aria-invalid", String(Boolean(problem)));
    $("apply-prompt").hidden = !isNew || Boolean(problem);
  }

  /** Whether it is short enough. If it is not, the user is taken to it. */
  check() {
    const isGood = !this.#problem;
    if (!isGood) this.focus();
    return isGood;
  }

  focus() {
    $("prompt").focus();
  }

  get #problem() {
    const limit = this.#getLimit();
    const length = [...this.value].length;
    return length > limit ? `The prompt has ${length} characters. Expected at most ${limit}.` : "";
  }
}
