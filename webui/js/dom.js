// DOM helpers that several modules share.

export const $ = (id) => document.getElementById(id);

/** Creates an element. Sets names with "on" and those in PROPERTIES as properties, the rest as attributes. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on") || PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const PROPERTIES = new Set(["value", "checked", "textContent", "disabled", "className"]);
const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const setIcon = (button, name) => button.querySelector("use").setAttribute("href", `#icon-${name}`);

/** Sets the text if it differs: screen readers repeat a live region at every write. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Whether a key pressed there is text input. */
export const isTyping = (target) =>
  target instanceof HTMLElement && (target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName));

/** Opens a dialog. Resolves to the value of the button that closed it. */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

/** Lets the buttons marked data-close close their dialogs. They submit no form, so Enter does not press them. */
export function closeButtons() {
  for (const button of document.querySelectorAll("dialog [data-close]"))
    button.onclick = () => button.closest("dialog").close("");
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The canvas as PNG bytes. */
export async function canvasPng(canvas) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new Uint8Array(await blob.arrayBuffer());
}

/** The current UTC time as 20261124-131502, for file names. */
export const timestamp = () => new Date().toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-");

/** Milliseconds as 1:05. */
export function clockText(ms) {
  const seconds = Math.floor(ms / 1000);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}
