// The form that asks for the server's address and key: in the dialog, and on the stage while no server answers.

export class ServerForm {
  #form;
  #server;
  #isKeyTyped = false;
  #filled = "";

  /** `form` has the inputs `address` and `key` and an element .problem. `onConnect()` runs after a good address. */
  constructor(form, server, onConnect) {
    this.#form = form;
    this.#server = server;
    const { address, key } = form.elements;
    address.addEventListener("input", () => {
      this.#refuse("");
      // A key goes to the server that it was typed for.
      if (!this.#isKeyTyped) key.value = server.keyFor(address.value);
    });
    key.addEventListener("input", () => (this.#isKeyTyped = true));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#connect()) onConnect();
    });
  }

  /** Shows the chosen server. */
  fill() {
    const { address, key } = this.#form.elements;
    address.value = this.#server.address;
    key.value = this.#server.apiKey;
    this.#isKeyTyped = false;
    this.#filled = this.#typed;
    this.#refuse("");
  }

  /** Whether the user is about to enter something. */
  get isEdited() {
    return this.#form.contains(document.activeElement) && this.#typed !== this.#filled;
  }

  get #typed() {
    const { address, key } = this.#form.elements;
    return JSON.stringify([address.value, key.value]);
  }

  #connect() {
    const { address, key } = this.#form.elements;
    try {
      this.#server.use(address.value, key.value.trim());
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.#refuse(`“${address.value.trim()}” is not an address. Enter a host and a port, like 127.0.0.1:30000.`);
      address.focus();
      return false;
    }
    this.fill();
    return true;
  }

  #refuse(text) {
    const problem = this.#form.querySelector(".problem");
    problem.textContent = text;
    problem.hidden = !text;
    this.#form.elements.address.setAttribute("aria-invalid", String(Boolean(text)));
  }
}
