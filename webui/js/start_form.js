// What a session starts with: a preset that ships with the page, or an image of the user's own.

import { $, ask } from "./dom.js";
import { FirstFrame } from "./first_frame.js";
import { loadPresets, markPreset, presetButtons, presetImage, presetsFor } from "./presets.js";
import { parseSize } from "./server.js";

export class StartForm {
  #store;
  #errors;
  #onPreset;
  #onImage;
  #allPresets = [];
  #preset = null;
  #offered = null; // the preset that the page proposed
  #isChosen = false; // by the user

  firstFrame = new FirstFrame({
    preview: $("first-preview"),
    poster: $("poster"),
    onChange: ({ cropped }) =>
      this.hint(cropped ? "Drag the image to choose the visible part." : "Drop or paste an image anywhere."),
  });

  /** `onPreset(preset)` runs when a preset is clicked, `onImage()` after the user's own image has been loaded. */
  constructor({ store, errors, onPreset, onImage }) {
    this.#store = store;
    this.#errors = errors;
    this.#onPreset = onPreset;
    this.#onImage = onImage;
    listenForDropAndPaste((file) => this.useImage(file));
    $("first-file").onchange = ({ target }) => {
      if (target.files[0]) void this.useImage(target.files[0]);
      target.value = "";
    };
    $("first-camera").onclick = () => this.#useCamera();
    $("first-camera").hidden = !navigator.mediaDevices?.getUserMedia;
  }

  async load() {
    try {
      this.#allPresets = await loadPresets();
    } catch (error) {
      this.#errors.show({
        key: "presets",
        title: "The presets could not be loaded",
        detail: error.message,
        advice: "Use an image of your own, or reload the page.",
      });
    }
  }

  /**
   * Shows the presets for a model; "" stands for one that is not known yet. Returns the preset to propose, or null if
   * the user chose a first frame or it is proposed already.
   */
  showPresets(modelId) {
    const presets = presetsFor(this.#allPresets, modelId);
    $("presets").replaceChildren(...presetButtons(presets, this.#onPreset));
    markPreset($("presets"), this.#preset?.id ?? null);
    if (this.#isChosen || presets.includes(this.#offered)) return null;
    this.#offered = presets.find(({ id }) => id === this.#store.get("preset")) ?? presets[0] ?? null;
    return this.#offered;
  }

  /** The session's frame size, "832x480". The first frame is cropped to its aspect ratio. */
  set size(size) {
    const { width, height } = parseSize(size);
    document.documentElement.style.setProperty("--aspect", String(width / height));
    this.firstFrame.target = { width, height };
  }

  hint(text) {
    $("first-hint").textContent = text;
  }

  /** Loads the preset's image. `isChosen`: the user wants this one, whatever the model. */
  async usePreset(preset, { isChosen = true } = {}) {
    this.#isChosen ||= isChosen;
    try {
      if (!(await this.firstFrame.use(presetImage(preset)))) return;
    } catch (error) {
      this.#offered = null;
      const title = `The image of the preset “${preset.name}” could not be loaded`;
      this.#errors.show({
        key: "image",
        title,
        detail: error.message,
        advice: "Choose the preset again, or use an image of your own.",
      });
      return;
    }
    if (isChosen) this.#store.set("preset", preset.id);
    this.#mark(preset);
  }

  async useImage(source) {
    this.#isChosen = true;
    try {
      if (!(await this.firstFrame.use(source))) return;
    } catch (error) {
      if (error.name !== "InvalidStateError") throw error;
      this.#errors.show({
        key: "image",
        title: "The browser cannot read this file as an image",
        advice: "Choose a JPEG, PNG or WebP file.",
      });
      return;
    }
    this.#mark(null);
    this.#onImage();
  }

  /** Shows the camera in a dialog and takes the image that the user chooses. */
  async #useCamera() {
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
    } catch (error) {
      const advice = "Allow camera access for this page, or choose a file.";
      this.#errors.show({ key: "camera", title: "The camera cannot be used", detail: error.message, advice });
      return;
    }
    const video = $("camera-video");
    video.srcObject = stream;
    await video.play();
    if ((await ask($("camera-dialog"))) === "take") await this.useImage(video);
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  }

  #mark(preset) {
    this.#errors.dismiss("image");
    this.#preset = preset;
    markPreset($("presets"), preset?.id ?? null);
  }
}

/** Calls `onImage(file)` for every image that is dropped or pasted anywhere on the page. */
function listenForDropAndPaste(onImage) {
  let depth = 0;
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  const show = (change) => document.body.classList.toggle("dropping", (depth = Math.max(depth + change, 0)) > 0);
  const take = (transfer) => {
    const file = [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file) void onImage(file);
  };
  addEventListener("dragenter", (event) => isFile(event) && show(1));
  addEventListener("dragleave", (event) => isFile(event) && show(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    show(-Infinity);
    take(event.dataTransfer);
  });
  addEventListener("paste", (event) => take(event.clipboardData));
}
