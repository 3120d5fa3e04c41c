// What is kept beside clips: single pictures, the session as a file that plays again, the session as Python.

import { $, download, stamp } from "./dom.js";
import { JournalError, parseJournal } from "./journal.js";
import { canvasBytes } from "./picture.js";
import { pythonSnippet } from "./snippet.js";

const COPIED_MS = 2000;

export class Keeping {
  #gallery;
  #errors;
  #getBeginning;
  #onReplay;

  /**
   * `getJournal()` of the session that is or was, `getBeginning()` -> {base, hasKey, init} of it or of the one to be,
   * `onReplay(saved)` with a parsed session.
   */
  constructor({ gallery, errors, canvas, getJournal, getBeginning, onReplay }) {
    this.#gallery = gallery;
    this.#errors = errors;
    this.#getBeginning = getBeginning;
    this.#onReplay = onReplay;
    $("screenshot").onclick = async () => this.#gallery.addPicture(new Blob([await canvasBytes(canvas)], { type: "image/png" }));
    $("open-gallery").onclick = () => $("gallery-dialog").showModal();
    $("save-session").onclick = () =>
      download(new Blob([JSON.stringify(getJournal(), null, 1)], { type: "application/json" }), `world-${stamp()}.json`);
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
      await this.#onReplay(parseJournal(await file.text()));
    } catch (error) {
      if (!(error instanceof JournalError) && error.name !== "InvalidStateError") throw error;
      this.#errors.show({ key: "replay", title: "This session cannot be replayed", words: error.message, advice: "Choose a file that was saved here." });
    }
  }

  async #openSnippet() {
    const { init, ...server } = await this.#getBeginning();
    $("snippet").textContent = pythonSnippet(server, init);
    $("snippet-picture").disabled = !init.first_frame;
    $("snippet-picture").onclick = () => download(new Blob([init.first_frame], { type: "image/png" }), "first_frame.png");
    $("snippet-dialog").showModal();
  }

  async #copySnippet() {
    const label = $("snippet-copy").querySelector("span");
    await navigator.clipboard.writeText($("snippet").textContent);
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = "Copy"), COPIED_MS);
  }
}
