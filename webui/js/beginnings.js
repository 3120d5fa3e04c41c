// What a world begins with: a place that ships with the page, or a picture of one's own.

import { $ } from "./dom.js";
import { FirstPicture } from "./first_picture.js";
import { listenForPictures, takeFromCamera } from "./picture_sources.js";
import { loadCatalog, markPreset, presetButtons, presetPicture, presetsFor } from "./presets.js";
import { parseSize } from "./server_info.js";

export class Beginnings {
  #store;
  #errors;
  #onChosen;
  #onPicture;
  #catalog = [];
  #preset = null;

  first = new FirstPicture({
    preview: $("first-preview"),
    poster: $("poster"),
    onChange: ({ cropped }) => this.hint(cropped ? "Drag the picture to choose its part." : "Drop or paste a picture anywhere."),
  });

  /** `onChosen(preset)` when a place is clicked, `onPicture()` when a picture of one's own has been taken in. */
  constructor({ store, errors, onChosen, onPicture }) {
    this.#store = store;
    this.#errors = errors;
    this.#onChosen = onChosen;
    this.#onPicture = onPicture;
    listenForPictures((file) => this.usePicture(file));
    $("first-file").onchange = ({ target }) => {
      if (target.files[0]) void this.usePicture(target.files[0]);
      target.value = "";
    };
    $("first-camera").onclick = () =>
      takeFromCamera({
        onPicture: (video) => this.usePicture(video),
        onRefused: (words) => errors.show({ key: "camera", title: "The camera cannot be used", words, advice: "Allow it for this page, or choose a file." }),
      });
    $("first-camera").hidden = !navigator.mediaDevices?.getUserMedia;
  }

  async load() {
    this.#catalog = await loadCatalog();
  }

  /** Shows the places for `model` -> the one to begin with, or null when a picture has been chosen already. */
  offer(model) {
    const presets = presetsFor(this.#catalog, model.id);
    $("presets").replaceChildren(...presetButtons(presets, this.#onChosen));
    markPreset($("presets"), this.#preset?.id ?? null);
    if (this.first.isChosen) return null;
    return presets.find(({ id }) => id === this.#store.get("preset")) ?? presets[0];
  }

  /** The world's size, "832x480": the picture is cropped to its shape. */
  set size(size) {
    const { width, height } = parseSize(size);
    document.documentElement.style.setProperty("--aspect", String(width / height));
    this.first.target = { width, height };
  }

  hint(words) {
    $("first-hint").textContent = words;
  }

  async usePreset(preset) {
    try {
      if (!(await this.first.use(presetPicture(preset)))) return;
    } catch (error) {
      const advice = "Choose it again, or bring a picture of your own.";
      this.#errors.show({ key: "picture", title: `The picture of “${preset.name}” could not be loaded`, words: error.message, advice });
      return;
    }
    this.#store.set("preset", preset.id);
    this.#mark(preset);
  }

  async usePicture(source) {
    try {
      if (!(await this.first.use(source))) return;
    } catch (error) {
      if (error.name !== "InvalidStateError") throw error;
      this.#errors.show({ key: "picture", title: "This file is not a picture the browser can read", advice: "Choose a JPEG, PNG or WebP file." });
      return;
    }
    this.#mark(null);
    this.#onPicture();
  }

  #mark(preset) {
    this.#errors.dismiss("picture");
    this.#preset = preset;
    markPreset($("presets"), preset?.id ?? null);
  }
}
