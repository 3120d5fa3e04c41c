// What can be saved besides video clips: screenshots, the session as a JSON file, the session as a Python program.

import { $, canvasPng, download, timestamp } from "./dom.js";
import { SessionFileError, parseSession } from "./session_log.js";
import { pythonSnippet } from "./snippet.js";

const COPIED_MS = 2000;

export class ExportMenu {
  #errors;
  #getSnippetInput;
  #onReplay;

  /**
   * `getLog()` returns the SessionLog of the current or last session. `getSnippetInput()` returns {base, hasKey, init}
   * of the running session or of the next one. `onReplay(saved)` gets a parsed session file.
   */
  constructor({ gallery, errors, canvas, getLog, getSnippetInput, onReplay }) {
    this.#errors = errors;
    this.#getSnippetInput = getSnippetInput;
    this.#onReplay = onReplay;
    $("screenshot").onclick = async () => gallery.addImage(new Blob([await canvasPng(canvas)], { type: "image/png" }));
    $("open-gallery").onclick = () => $("gallery-dialog").showModal();
    $("save-session").onclick = () =>
      download(
        new Blob([JSON.stringify(getLog(), null, 1)], { type: "application/json" }),
        `world-${timestamp()}.json`,
      );
    $("load-session").onchange = ({ target }) => {
      if (target.files[0]) void this.#replayFile(target.files[0]);
      target.value = "";
    };
    $("open-snippet").onclick = () => this.#openSnippet();
    $("snippet-copy").onclick = () => this.#copySnippet();
    $("snippet-copy").hidden = !navigator.clipboard;
  }

  async #replayFile(file) {
    try {
      await this.#onReplay(parseSession(await file.text()));
    } catch (error) {
      if (!(error instanceof SessionFileError) && error.name !== "InvalidStateError") throw error;
      this.#errors.show({
        key: "replay",
        title: "This session cannot be replayed",
        detail: error.message,
        advice: "Choose a file that this page saved.",
      });
    }
  }

  async #openSnippet() {
    const { init, ...server } = await this.#getSnippetInput();
    $("snippet").textContent = pythonSnippet(server, init);
    $("snippet-image").disabled = !init.first_frame;
    $("snippet-image").onclick = () => download(new Blob([init.first_frame], { type: "image/png" }), "first_frame.png");
    $("snippet-dialog").showModal();
  }

  async #copySnippet() {
    const label = $("snippet-copy").querySelector("span");
    await navigator.clipboard.writeText($("snippet").textContent);
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = "Copy"), COPIED_MS);
  }
}
