// Clips and screenshots, in memory until the page is closed. The page asks before it closes with some not downloaded.

import { clockText, download, h, icon, timestamp } from "./dom.js";

export class Gallery {
  #root;
  #items = [];
  #onChange;

  constructor(root, onChange) {
    this.#root = root;
    this.#onChange = onChange;
    this.#draw();
  }

  /** Whether closing the page would lose something. */
  get hasUnsaved() {
    return this.#items.some(({ isSaved }) => !isSaved);
  }

  addClip(blob, extension, durationMs) {
    this.#add({ blob, name: `world-${timestamp()}.${extension}`, label: clockText(durationMs), isClip: true });
  }

  addImage(blob) {
    this.#add({ blob, name: `world-${timestamp()}.png`, label: "Screenshot", isClip: false });
  }

  #add(item) {
    this.#items.unshift({ ...item, isSaved: false, url: URL.createObjectURL(item.blob) });
    this.#draw();
  }

  #remove(item) {
    URL.revokeObjectURL(item.url);
    this.#items.splice(this.#items.indexOf(item), 1);
    this.#draw();
  }

  #draw() {
    this.#root.replaceChildren(...this.#items.map((item) => this.#figure(item)));
    if (!this.#items.length)
      this.#root.append(h("p", { className: "hint", textContent: "No clips or screenshots yet." }));
    this.#onChange(this.#items.length);
  }

  #figure(item) {
    const view = item.isClip
      ? h("video", { src: item.url, controls: true, loop: true, playsinline: true, preload: "auto" })
      : h("img", { src: item.url, alt: "Screenshot" });
    const size =
      item.blob.size < 1e6
        ? `${Math.max(1, Math.round(item.blob.size / 1e3))} KB`
        : `${(item.blob.size / 1e6).toFixed(1)} MB`;
    return h(
      "figure",
      {},
      view,
      h(
        "figcaption",
        {},
        h("span", { textContent: `${item.label} · ${size}` }),
        h(
          "button",
          {
            className: "icon-button",
            "aria-label": `Download ${item.name}`,
            onclick: () => {
              download(item.blob, item.name);
              item.isSaved = true;
            },
          },
          icon("download"),
        ),
        h(
          "button",
          { className: "icon-button", "aria-label": `Delete ${item.name}`, onclick: () => this.#remove(item) },
          icon("trash-2"),
        ),
      ),
    );
  }
}
