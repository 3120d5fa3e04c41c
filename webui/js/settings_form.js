// The advanced settings as a form, built from the fields in settings.js.

import { h } from "./dom.js";
import { allValid, fieldsFor, problemWith, validValue } from "./settings.js";

const LATER = "Applies at the next start.";

export class SettingsForm {
  #form;
  #store;
  #onChange;
  #fields = [];
  #values = {};
  #rows = new Map();

  constructor(form, store, onChange) {
    this.#form = form;
    this.#store = store;
    this.#onChange = onChange;
    form.onsubmit = (event) => event.preventDefault();
  }

  get fields() {
    return this.#fields;
  }

  get values() {
    return this.#values;
  }

  /** Builds the form for a model, with stored values where they are still valid. */
  build(model) {
    this.#fields = fieldsFor(model);
    this.#values = allValid(this.#fields, this.#store.get(`values:${model.id}`, {}));
    this.model = model;
    const groups = new Map();
    for (const field of this.#fields) groups.set(field.group, [...(groups.get(field.group) ?? []), field]);
    this.#rows.clear();
    this.#form.replaceChildren(
      ...[...groups].map(([name, fields]) =>
        h("fieldset", {}, h("legend", { textContent: name }), ...fields.map((field) => this.#row(field))),
      ),
    );
    this.#refresh();
  }

  set(changes) {
    for (const key of Object.keys(changes)) this.#refuse(key, "");
    this.#values = allValid(this.#fields, { ...this.#values, ...changes });
    this.#store.set(`values:${this.model.id}`, this.#values);
    this.#refresh();
    this.#onChange(this.#values);
  }

  /** Shows at each field for which isLater(key) is true that it waits for the next session. */
  markLater(isLater) {
    for (const [key, { later }] of this.#rows) later.hidden = !isLater(key);
  }

  reset() {
    this.set(Object.fromEntries(this.#fields.map(({ key, fallback }) => [key, fallback ?? null])));
  }

  #row(field) {
    const id = `set-${field.key}`;
    const input = this.#input(field, id);
    const label = h("span", {}, field.label, unitText(field));
    const later = h("small", { className: "later", role: "status", hidden: true, textContent: LATER });
    const problem = h("small", { className: "problem", role: "alert", hidden: true });
    const row = h(
      "label",
      { className: `field ${field.kind}`, for: id },
      label,
      input,
      h("small", { id: `${id}-help`, textContent: field.help }),
      problem,
      later,
    );
    this.#rows.set(field.key, { row, input, later, problem });
    return row;
  }

  #input(field, id) {
    const common = { id, name: field.key, "aria-describedby": `${id}-help` };
    if (field.kind === "switch")
      return h("input", {
        ...common,
        type: "checkbox",
        onchange: ({ target }) => this.set({ [field.key]: target.checked }),
      });
    const change = ({ target }) => this.#typed(field, target);
    if (field.kind === "choice")
      return h(
        "select",
        { ...common, onchange: change },
        ...field.options.map(([value, text]) => h("option", { value, textContent: text })),
      );
    if (field.kind === "text")
      return h("input", { ...common, type: "text", onchange: change });
    const { min, max, step, placeholder } = field;
    const empty = placeholder ?? (field.optional ? "none" : undefined);
    return h("input", {
      ...common,
      type: "number",
      inputmode: "decimal",
      min,
      max,
      step,
      placeholder: empty,
      onchange: change,
    });
  }

  /** Takes what the user entered, or keeps the value and says why. */
  #typed(field, input) {
    const problem = input.validity.badInput ? "Expected a number." : problemWith(field, input.value);
    if (!problem) return this.set({ [field.key]: validValue(field, input.value) });
    this.#refuse(field.key, `Refused. ${problem} Still used: ${this.#values[field.key] ?? "the default"}.`);
  }

  #refuse(key, text) {
    const shown = this.#rows.get(key);
    if (!shown) return; // a setting of another model
    shown.problem.textContent = text;
    shown.problem.hidden = !text;
    shown.input.setAttribute("aria-invalid", String(Boolean(text)));
  }

  #refresh() {
    for (const field of this.#fields) {
      const { row, input, problem } = this.#rows.get(field.key);
      const value = this.#values[field.key];
      if (field.kind === "switch") input.checked = value;
      else if (problem.hidden) input.value = value ?? ""; // what was refused stays to be mended
      row.hidden = !(field.when?.(this.#values) ?? true);
    }
  }
}

function unitText(field) {
  const range =
    field.kind === "number" && field.unit && !field.unit.includes("to")
      ? `${field.min} to ${field.max} ${field.unit}`
      : field.unit;
  return range ? h("small", { textContent: range }) : null;
}
